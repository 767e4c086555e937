"""Test the sources of pairs: every format, several sources together, and the errors for corrupted files."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import options, tiny_model, write_jsonl

from training.data import load_pairs
from training.data_options import DataOptions
from training.errors import InputError
from training.model import byte_tokenizer
from training.options import parse_config
from training.sources import parse_sources
from training.train import main

TOKENIZER = byte_tokenizer()
RECORDS = [{"prompt": f"Why {i}?", "chosen": f"Ja, {i}\nindeed", "rejected": "Nein"} for i in range(5)]
CHAT = [
    {
        "prompt": [{"role": "user", "content": f"Why {i}?"}],
        "chosen": [{"role": "assistant", "content": f"Ja {i}"}],
        "rejected": [{"role": "assistant", "content": "Nein"}],
    }
    for i in range(3)
]


def zstd(content):
    return pa.Codec("zstd").compress(content, asbytes=True)


def write(folder, form, records):
    """Write ``records`` to a file or folder, and return its path."""
    file = folder / f"d.{form}"
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    if form == "saved":
        datasets.Dataset.from_list(records).save_to_disk(file)
    elif form == "splits":
        split = datasets.Dataset.from_list(records)
        datasets.DatasetDict({"test": split.select([0]), "train": split}).save_to_disk(file)
    elif form == "folder":
        file.mkdir()
        (file / "train.jsonl").write_bytes(lines)
    elif form == "parquet":
        datasets.Dataset.from_list(records).to_parquet(file)
    elif form in ("csv", "tsv"):
        with file.open("w", newline="") as opened:
            writer = csv.DictWriter(opened, records[0].keys(), delimiter="\t" if form == "tsv" else ",")
            writer.writeheader()
            writer.writerows(records)
    elif form == "json":
        file.write_text(json.dumps(records, indent=2))
    else:
        packers = {
            "jsonl": bytes,
            "jsonl.gz": gzip.compress,
            "jsonl.bz2": bz2.compress,
            "jsonl.xz": lzma.compress,
            "jsonl.zst": zstd,
        }
        file.write_bytes(packers[form](lines))
    return str(file)


FORMS = [
    "jsonl",
    "jsonl.gz",
    "jsonl.bz2",
    "jsonl.xz",
    "jsonl.zst",
    "json",
    "csv",
    "tsv",
    "parquet",
    "saved",
    "splits",
    "folder",
]


def ids(pairs):
    return [pair[:3] for pair in pairs]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))

        yield


@pytest.mark.parametrize("form", FORMS)
def test_every_format_gives_the_same_pairs(tmp_path, form):
    expected = load_pairs(write_jsonl(tmp_path / "e.jsonl", RECORDS), TOKENIZER)
    assert ids(load_pairs(write(tmp_path, form, RECORDS), TOKENIZER)) == ids(expected)


@pytest.mark.parametrize("form", ["json", "parquet", "saved"])
def test_every_format_gives_the_same_messages(tmp_path, form):
    expected = load_pairs(write_jsonl(tmp_path / "e.jsonl", CHAT), TOKENIZER)
    assert ids(load_pairs(write(tmp_path, form, CHAT), TOKENIZER)) == ids(expected)


def test_messages_in_a_csv_cell_are_json(tmp_path):
    expected = load_pairs(write_jsonl(tmp_path / "e.jsonl", CHAT), TOKENIZER)
    cells = [{name: json.dumps(value) for name, value in record.items()} for record in CHAT]
    assert ids(load_pairs(write(tmp_path, "csv", cells), TOKENIZER)) == ids(expected)
    cells[1]["chosen"] = str(CHAT[1]["chosen"])
    with pytest.raises(InputError, match=r"d\.csv:3: 'chosen' is not JSON"):
        load_pairs(write(tmp_path, "csv", cells), TOKENIZER)


@pytest.mark.parametrize(
    ("form", "origins"),
    [
        ("jsonl", ["d.jsonl:1", "d.jsonl:2"]),
        ("jsonl.gz", ["d.jsonl.gz:1", "d.jsonl.gz:2"]),
        ("json", ["d.json:2", "d.json:7"]),
        ("csv", ["d.csv:2", "d.csv:4"]),  # a cell holds a newline
        ("parquet", ["d.parquet row 0", "d.parquet row 1"]),
        ("saved", ["d.saved row 0", "d.saved row 1"]),
    ],
)
def test_pairs_know_their_line_or_row(tmp_path, form, origins):
    pairs = load_pairs(write(tmp_path, form, RECORDS), TOKENIZER)
    assert [pair.origin.rpartition("/")[2] for pair in pairs][:2] == origins


@pytest.mark.parametrize("form", ["json", "csv", "parquet", "saved", "jsonl.gz"])
def test_a_bad_record_is_named_in_every_format(tmp_path, form):
    prompt = "Why is 2?"
    records = [*RECORDS[:2], {"prompt": prompt, "chosen": f"{prompt} Ja", "rejected": f"{prompt} Nein"}]
    file = write(tmp_path, form, records)
    where = {"json": ":12", "csv": ":6", "parquet": " row 2", "saved": " row 2", "jsonl.gz": ":3"}[form]
    with pytest.raises(InputError, match=rf"d\.{form}{where}: 'chosen' begins with the prompt"):
        load_pairs(file, TOKENIZER)


@pytest.mark.parametrize("form", ["jsonl", "parquet", "saved"])
def test_a_null_prompt_is_not_replaced(tmp_path, form):
    """Otherwise the words that both answers share at their start would become the prompt."""
    records = [*RECORDS, {"prompt": None, "chosen": "The sea is blue", "rejected": "The sea is red"}]
    with pytest.raises(InputError, match=rf"d\.{form}( row |:)\d: 'prompt' is null"):
        load_pairs(write(tmp_path, form, records), TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.json", b'[{"prompt": "a"}, 3]', r"d\.json:1: each entry of the list must be a JSON object"),
        ("d.json", b'[{"prompt": "a"},\n {"prompt": ]', r"d\.json:2: not a JSON list"),
        ("d.json", b'[{"prompt": "a", "chosen": "b", "rejected": "c"}\n', r"d\.json:2: not a JSON list"),
        ("d.json", b'{\n "prompt": "a"\n}', r"d\.json:1: not JSON"),
        ("d.jsonl", b"[" * 100_000, r"d\.jsonl:1: not a JSON list|must be a JSON object"),
        ("d.csv", b"prompt,chosen,rejected\na,b\n", r"d\.csv:2: has not as many cells"),
        ("d.csv", b"prompt,chosen,rejected\na,b,c,d\n", r"d\.csv:2: has not as many cells"),
        ("d.csv", b'prompt,chosen,rejected\na,b,"c\n', r"d\.csv:2: not a line of CSV"),
        ("d.csv", b"prompt,chosen,rejected\n\xff,b,c\n", r"d\.csv:2: not a line of CSV"),
        ("d.csv", b"question,chosen,rejected\na,b,c\n", r"d\.csv:2: no 'prompt'"),
        ("d.jsonl.gz", b"no gzip", r"d\.jsonl\.gz: cannot be decompressed"),
        ("d.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n' * 9, mtime=0)[:-9], r"d\.jsonl\.gz: cannot be decompressed"),
        ("d.jsonl.xz", b"no xz", r"d\.jsonl\.xz: cannot be decompressed"),
        ("d.jsonl.zst", b"no zstd", r"d\.jsonl\.zst: cannot be decompressed"),
        ("d.jsonl.zst", zstd(b'{"prompt": "a"}\n' * 9)[:-3], r"d\.jsonl\.zst: cannot be decompressed"),
        ("d.jsonl", gzip.compress(b"{}", mtime=0), r"d\.jsonl: is not UTF-8 text; .* end names in their format: \.gz"),
        ("d.zip", b"PK\3\4\x14", r"d\.zip: is not UTF-8 text; .*unpack archives"),
        ("d.pq", b"PAR1\x15\4", r"d\.pq: is not UTF-8 text; .*\.parquet"),
        ("d.parquet", b"no parquet", r"d\.parquet could not be loaded"),
        ("d.arrow", b"no arrow", r"d\.arrow could not be loaded"),
    ],
)
def test_a_corrupted_file_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_pairs(str(tmp_path / name), TOKENIZER)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.jsonl", '{"prompt": "a"}'.encode("utf-16"), r"d\.jsonl: is not UTF-8 text; save text as UTF-8"),
        ("d.json", '[{"prompt": "a"}]'.encode("utf-16"), r"d\.json: is not UTF-8 text; save text as UTF-8"),
        ("d.csv", "prompt,chosen\n".encode("utf-16"), r"d\.csv: is not UTF-8 text; save text as UTF-8"),
        ("d.jsonl", b'{"chosen": "b", "prompt": "a", "chosen": "c"}', r"d\.jsonl:1: .*'chosen' appears twice"),
        ("d.json", b'[{"a": 1},\n{"a": {"b": 1, "b": 2}}]', r"d\.json:2: .*'b' appears twice"),
        ("d.csv", b"prompt,chosen,rejected,chosen\na,b,c,d\n", r"d\.csv:1: two columns have the same name"),
        ("d.csv", b'prompt,chosen,rejected\n"a\n",b,c\n\xe9,b,c\n', r"d\.csv:4: not a line of CSV in UTF-8"),
        ("d.jsonl", b'{"prompt": "a", "chosen": "b", "rejected": NaN}', r"d\.jsonl:1: 'rejected' must be a string"),
        ("d.jsonl", b"\0\0\0", r"d\.jsonl: is not UTF-8 text"),
    ],
)
def test_text_that_others_read_wrong_is_refused(tmp_path, name, content, message):
    if name == "d.json" and b"\0" not in content:
        content = content.replace(b'"a": 1', b'"prompt": "a", "chosen": "b", "rejected": "c"')
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_pairs(str(tmp_path / name), TOKENIZER)


@pytest.mark.parametrize("name", ["d.jsonl", "d.JSONL", "d.json", "d.csv"])
def test_byte_order_marks_are_no_text(tmp_path, name):
    form = name[2:].lower()
    content = open(write(tmp_path, form, RECORDS), "rb").read()
    if form != "csv":
        content = content.replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content)
    plain = load_pairs(write_jsonl(tmp_path / "plain.jsonl", RECORDS), TOKENIZER)
    assert ids(load_pairs(str(tmp_path / name), TOKENIZER)) == ids(plain)


def test_cells_that_look_like_nothing_are_text(tmp_path):
    (tmp_path / "d.csv").write_text("prompt,chosen,rejected\nNA,None,nan\n")
    pair = load_pairs(str(tmp_path / "d.csv"), TOKENIZER)[0]
    assert [TOKENIZER.decode(part, skip_special_tokens=True) for part in pair[:3]] == ["NA", "None", "nan"]


def test_folders_are_read_file_by_file(tmp_path):
    days = {"prompt": "When? ", "chosen": "2024-01-02", "rejected": "2024-01-03"}
    implicit = {"chosen": "On Monday", "rejected": "On Sunday"}
    write_jsonl(tmp_path / "a.jsonl", [days])
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(json.dumps(implicit).encode()))
    pairs = load_pairs({"path": str(tmp_path), "weight": 0.5}, TOKENIZER)
    assert len(pairs) == 1  # half of the folder, not of each file
    pairs = load_pairs(str(tmp_path), TOKENIZER)
    assert [pair.origin for pair in pairs] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/b.jsonl.gz:1"]
    assert TOKENIZER.decode(pairs[0].chosen) == "2024-01-02<eos>"


@pytest.mark.parametrize("name", ["more.csv", "sub/test.jsonl"])
def test_unread_files_of_a_folder_are_named(tmp_path, name):
    write_jsonl(tmp_path / "a.jsonl", RECORDS)
    (tmp_path / "sub").mkdir()
    (tmp_path / ".hidden.csv").write_text("")
    assert len(load_pairs(str(tmp_path), TOKENIZER)) == 5
    (tmp_path / name).write_text(json.dumps(RECORDS[0]))
    left = "a.jsonl" if "test" in name else name
    with pytest.raises(InputError, match=f"{left} would not be read"):
        load_pairs(str(tmp_path), TOKENIZER)


@pytest.mark.parametrize("form", ["folder", "saved"])
def test_local_folders_have_no_revision_or_subset(tmp_path, form):
    folder = write(tmp_path, form, RECORDS)
    for more in [{"revision": "v1"}] + [{"subset": "easy"}] * (form == "saved"):
        with pytest.raises(InputError, match="a local folder has no revision, and a saved dataset no subset"):
            load_pairs({"path": folder, **more}, TOKENIZER)


def test_a_corrupted_file_of_a_folder_is_named(tmp_path):
    for folder in ("shards", "saved"):
        (tmp_path / folder).mkdir()
    for name in ("shards/train-00000.parquet", "shards/train-00001.parquet"):
        datasets.Dataset.from_list(RECORDS).to_parquet(tmp_path / name)
    datasets.Dataset.from_list(RECORDS).save_to_disk(tmp_path / "saved")
    for folder, name in (("shards", "train-00001.parquet"), ("saved", "data-00000-of-00001.arrow")):
        file = tmp_path / folder / name
        file.write_bytes(file.read_bytes()[:-200])
        with pytest.raises(InputError, match=rf"{folder} could not be loaded .*{name} is damaged"):
            load_pairs(str(tmp_path / folder), TOKENIZER)


def test_json_lines_are_not_called_damaged(tmp_path):
    (tmp_path / "d").mkdir()
    write_jsonl(tmp_path / "d/train.json", RECORDS)
    with pytest.raises(InputError, match=r"could not be loaded \(ValueError: BuilderConfig 'x' not found") as refused:
        load_pairs({"path": str(tmp_path / "d"), "subset": "x"}, TOKENIZER)
    assert "damaged" not in str(refused.value)


def test_an_empty_source_among_others_is_refused(tmp_path):
    full = write_jsonl(tmp_path / "full.jsonl", RECORDS)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InputError, match=r"empty\.jsonl: holds no record"):
        load_pairs([full, str(tmp_path / "empty.jsonl")], TOKENIZER)


@pytest.mark.parametrize("name", ["empty", "empty:dev", "train.jsonl:dev", "config.json"])
def test_a_dry_run_refuses_unreadable_data(tmp_path, capsys, name):
    (tmp_path / "empty").mkdir()
    write_jsonl(tmp_path / "train.jsonl", RECORDS)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit, match="2"):
        main(options(tmp_path / "o", "--train_data", str(tmp_path / name), "--dry_run", "true"))
    assert capsys.readouterr().err.startswith("error: ")


def test_a_dry_run_refuses_weights_without_a_tokenizer(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "m")
    words = ["--model", str(tmp_path / "m"), "--train_data", write_jsonl(tmp_path / "d.jsonl", RECORDS)]
    with pytest.raises(SystemExit, match="2"):
        main([*words, "--output_dir", str(tmp_path / "o"), "--dry_run", "true"])
    assert "its tokenizer (tokenizer.json, tokenizer_config.json) could not be loaded" in capsys.readouterr().err


def test_a_table_without_rows_is_named(tmp_path):
    pq.write_table(pa.table({name: pa.array([], pa.string()) for name in RECORDS[0]}), tmp_path / "d.parquet")
    with pytest.raises(InputError, match=r"d\.parquet: holds no record"):
        load_pairs(str(tmp_path / "d.parquet"), TOKENIZER)


def test_a_weight_that_leaves_nothing_is_refused(tmp_path):
    one, other = (write_jsonl(tmp_path / f"{name}.jsonl", RECORDS) for name in "ab")
    with pytest.raises(InputError, match=r"a\.jsonl: weight=0.05 leaves none of its 5 pairs"):
        load_pairs([{"path": one, "weight": 0.05}, other], TOKENIZER)


@pytest.mark.parametrize(
    "name", ["no.jsonl", "no.json", "no.csv", "no.parquet", "no.jsonl.gz", "./no", "/no/such", "~/no"]
)
def test_a_missing_file_is_not_searched_on_the_hub(name):
    for given in (name, {"path": name}, [name]):
        with pytest.raises(InputError, match="no such file"):
            load_pairs(given, TOKENIZER)


def test_paths_expand_home_and_variables(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "d.jsonl", RECORDS)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MY_DATA", str(tmp_path))
    for given in ("~/d.jsonl", "$MY_DATA/d.jsonl", {"path": "${MY_DATA}/d.jsonl"}):
        assert len(load_pairs(given, TOKENIZER)) == 5


def test_the_split_is_named_or_train(tmp_path):
    folder = write(tmp_path, "splits", RECORDS)
    assert len(load_pairs(folder, TOKENIZER)) == 5
    assert (
        len(load_pairs(f"{folder}:test", TOKENIZER))
        == len(load_pairs({"path": folder, "split": "test"}, TOKENIZER))
        == 1
    )
    with pytest.raises(InputError, match=r"has no split 'dev' \(found: 'test', 'train'\)"):
        load_pairs(f"{folder}:dev", TOKENIZER)
    with pytest.raises(InputError, match="was saved without splits"):
        load_pairs(write(tmp_path, "saved", RECORDS) + ":train", TOKENIZER)


def test_subset_split_and_revision_reach_the_hub(monkeypatch):
    asked = []

    def hub(path, name=None, *, split, revision=None):
        asked.append((path, name, split, revision))
        return datasets.Dataset.from_list(RECORDS)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    load_pairs("org/name", TOKENIZER)
    load_pairs("org/name:test[:10%]", TOKENIZER)
    pairs = load_pairs({"path": "org/name", "subset": "easy", "split": "dev", "revision": "v1"}, TOKENIZER)
    assert asked == [
        ("org/name", None, "train", None),
        ("org/name", None, "test[:10%]", None),
        ("org/name", "easy", "dev", "v1"),
    ]
    assert pairs[0].origin == "org/name:easy:dev row 0"


def test_sources_are_concatenated_by_weight(tmp_path):
    one = write_jsonl(tmp_path / "one.jsonl", RECORDS[:2])
    other = write_jsonl(tmp_path / "other.jsonl", RECORDS * 2)
    assert [p.origin[-7:] for p in load_pairs([one, one], TOKENIZER)] == ["jsonl:1", "jsonl:2"] * 2
    mixed = [{"path": one, "weight": 2}, {"path": other, "weight": 0.5}]
    pairs = load_pairs(mixed, TOKENIZER, DataOptions(seed=1))
    origins = [pair.origin.rpartition("/")[2] for pair in pairs]
    assert origins[:4] == ["one.jsonl:1", "one.jsonl:2"] * 2
    assert len(origins) == 9 and len(set(origins[4:])) == 5 and all("other" in origin for origin in origins[4:])
    again, seeded = (load_pairs(mixed, TOKENIZER, DataOptions(seed=seed)) for seed in (1, 2))
    assert pairs == again and pairs != seeded


def test_columns_have_the_names_that_the_user_gives(tmp_path):
    records = [{"q": r["prompt"], "good": r["chosen"], "bad": r["rejected"], "chosen": "scores"} for r in RECORDS]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    expected = ids(load_pairs(write_jsonl(tmp_path / "e.jsonl", RECORDS), TOKENIZER))
    assert ids(load_pairs(file, TOKENIZER, DataOptions(columns=columns))) == expected
    assert ids(load_pairs({"path": file, "columns": columns}, TOKENIZER)) == expected
    for ours in ("prompt", "chosen"):
        with pytest.raises(InputError, match=r"d\.jsonl:1: no column 'best' \(found: 'q', 'good', 'bad', 'chosen'\)"):
            load_pairs({"path": file, "columns": {ours: "best"}}, TOKENIZER)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "at least one"),
        ('[{"path": ', "not a well-formed list or section"),
        ({"split": "train"}, "section with path"),
        ({"path": "d", "spilt": "train"}, "of the data source d: spilt; did you mean 'split'"),
        ({"path": ["a", "b"]}, "must be a string, or a section"),
        ({"path": "d", "columns": ["chosen"]}, "columns=.* must be a section"),
        ({"path": "d", "weight": 0}, "weight=0 must be a number above 0"),
        ({"path": "d", "weight": "2"}, "must be a number"),
        ({"path": "d", "weight": 1e12}, "must be a number above 0, at most 1000"),
        ("$NO_SUCH_PLACE/d", r"the environment has no variable \$NO_SUCH_PLACE; set it"),
        ({"path": "${NO_SUCH_PLACE}/d"}, r"the environment has no variable \$\{NO_SUCH_PLACE\}; set it"),
        ({"path": "d", "columns": {"promt": "q"}}, "columns.promt; did you mean 'prompt'"),
        ({"path": "d", "columns": {"chosen": "q", "rejected": "q"}}, "reads 'q' for two columns of a pair"),
        (3, "must be a string"),
        ("https://huggingface.co/datasets/org/name", "URLs are not read; give the hub name ORG/NAME"),
        ({"path": "hf://datasets/org/name"}, "URLs are not read"),
    ],
)
def test_an_invalid_source_says_what_is_wrong(given, message):
    with pytest.raises(InputError, match=message):
        parse_sources(given)


def test_sources_are_read_from_yaml_and_the_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\noutput_dir: o\ntrain_data:\n  - a.jsonl\n  - {path: org/b, weight: 0.5}\n")
    config = parse_config(["--config", str(file)])
    assert config.train_data == ["a.jsonl", {"path": "org/b", "weight": 0.5}]
    words = ["--model", "m", "--output_dir", "o", "--columns.chosen", "good"]
    config = parse_config([*words, "--train_data", '["a.jsonl", {"path": "b.csv"}]'])
    assert [source.path for source in parse_sources(config.train_data)] == ["a.jsonl", "b.csv"]
    assert config.columns == {"chosen": "good"}
    with pytest.raises(InputError, match="did you mean 'weight'"):
        parse_config([*words, "--train_data", '[{"path": "b", "wieght": 1}]'])


def test_a_slice_of_pairs_and_its_lengths(tmp_path):
    pairs = load_pairs(write_jsonl(tmp_path / "d.jsonl", RECORDS), TOKENIZER)
    assert pairs[1:3] == [pairs[1], pairs[2]] and pairs[-1] == pairs[4]
    assert pairs.lengths.tolist() == [[*map(len, pair[:3])] for pair in pairs]
    assert pairs[1:3].lengths.tolist() == pairs.lengths[1:3].tolist()
    assert pairs[:3].digest != pairs[1:4].digest == pairs[1:][:3].digest
    with pytest.raises(IndexError):
        pairs[5]

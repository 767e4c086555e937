"""Test tokenised pairs in a cache file: reused, rewritten, and read by several processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import datasets
import pytest
from helpers import write_jsonl

from training import data
from training.config import TrainConfig
from training.data import load_pairs
from training.data_options import DataOptions
from training.errors import InputError
from training.model import byte_tokenizer

TOKENIZER = byte_tokenizer()
RECORDS = [{"prompt": f"Why {i}?", "chosen": f"Ja, {i}\nindeed", "rejected": "Nein"} for i in range(5)]


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Record which records are tokenised. Cache sources of any size, in batches of two."""
    monkeypatch.setattr(data, "_KEPT_FROM", 0)
    monkeypatch.setattr(data, "_BATCH", 2)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    found = []
    original = data.draft
    monkeypatch.setattr(data, "draft", lambda *a: found.append(a) or original(*a))
    return found


@pytest.fixture
def source(tmp_path):
    return write_jsonl(tmp_path / "d.jsonl", RECORDS)


def test_tokenised_pairs_are_cached_and_reused(source, calls):
    first = load_pairs(source, TOKENIZER)
    assert len(calls) == 5
    said = []
    again = load_pairs(source, TOKENIZER, log=said.append)
    assert len(calls) == 5 and again == first and again.digest == first.digest
    assert "5 tokenised pairs are in " in said[0]
    assert first == load_pairs(source, TOKENIZER, TrainConfig(dry_run=True))


@pytest.mark.parametrize("change", ["data", "template", "tokenizer", "columns"])
def test_cached_pairs_are_not_used_for_other_inputs(tmp_path, source, calls, change):
    load_pairs(source, TOKENIZER)
    tokenizer, options = byte_tokenizer(), DataOptions()
    if change == "data":
        write_jsonl(tmp_path / "d.jsonl", RECORDS[::-1])
    if change == "template":
        tokenizer.chat_template = "{{ messages }}"
    if change == "tokenizer":
        tokenizer.add_tokens(["Ja"])
    if change == "columns":
        options = DataOptions(columns={"prompt": "rejected", "rejected": "prompt"})
    load_pairs(source, tokenizer, options)
    assert len(calls) == 10


def cut_between_batches(content):
    starts = [at for at in range(0, len(content), 8) if content[at : at + 4] == b"\xff\xff\xff\xff"]
    return content[: starts[2]]


DAMAGE = {
    "empty": lambda content: b"",
    "short": lambda content: content[:100],
    "cut": lambda content: content[:-300],
    "fewer batches": cut_between_batches,
    "zeros": lambda content: content[:-400] + bytes(400),
    "another bit": lambda content: content[:700] + bytes([content[700] ^ 4]) + content[701:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_corrupted_cached_pairs_are_rewritten(tmp_path, source, calls, damage):
    first = [*load_pairs(source, TOKENIZER)]
    (kept,) = (tmp_path / "cache").rglob("*.arrow")
    content = kept.read_bytes()
    kept.write_bytes(DAMAGE[damage](content))
    said = []
    assert load_pairs(source, TOKENIZER, log=said.append) == first and len(calls) == 10
    assert said[0] == f"WARNING: {kept} is damaged; its pairs are tokenised again"
    assert kept.read_bytes() == content and load_pairs(source, TOKENIZER) == first and len(calls) == 10


def test_incomplete_cached_pairs_are_rewritten(tmp_path, source, calls):
    first = [*load_pairs(source, TOKENIZER)]
    (kept,) = (tmp_path / "cache").rglob("*.arrow")
    kept.rename(kept.with_name(kept.name.partition("-")[0] + ".unfinished"))
    assert load_pairs(source, TOKENIZER) == first and len(calls) == 10
    assert not [*(tmp_path / "cache").rglob("*.unfinished")]


def test_without_a_cache_folder_pairs_stay_in_memory(tmp_path, source, calls):
    (tmp_path / "cache").write_text("a file")
    said = []
    assert len(load_pairs(source, TOKENIZER, log=said.append)) == 5
    assert "cannot be kept" in said[0] and "they are in memory" in said[0]


def test_an_error_leaves_nothing_in_the_cache(tmp_path, calls):
    file = write_jsonl(tmp_path / "d.jsonl", [*RECORDS, {"prompt": "a"}])
    with pytest.raises(InputError, match=r"d\.jsonl:6"):
        load_pairs(file, TOKENIZER)
    assert not [file for file in (tmp_path / "cache").rglob("*") if file.suffix in (".arrow", ".unfinished")]


def test_only_one_of_two_readers_tokenises(tmp_path, calls):
    file = write_jsonl(tmp_path / "d.jsonl", RECORDS * 100)
    with ThreadPoolExecutor(2) as pool:
        one, other = pool.map(lambda tokenizer: load_pairs(file, tokenizer), [byte_tokenizer(), byte_tokenizer()])
    assert one == other and len(calls) == 500

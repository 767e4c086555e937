from __future__ import annotations

import json
import tracemalloc

import datasets
import pytest
from helpers import PAIRS, tiny_model, write_jsonl
from tokenizers import processors

from training.chat import TextEncoder
from training.config import TrainConfig
from training.data import Pair, check_pairs, load_pairs, select_pairs
from training.errors import InputError
from training.model import byte_tokenizer
from training.pairs import Pairs

BOS, EOS = 1, 2
TOKENIZER = byte_tokenizer()
USER = {"role": "user", "content": "Why?"}


def says(text):
    return [{"role": "assistant", "content": text}]


def load_one(tmp_path, record, tokenizer=TOKENIZER):
    return load_pairs(write_jsonl(tmp_path / "d.jsonl", [record]), tokenizer)[0]


def select(pairs, said=None, **options):
    config = TrainConfig(**options)
    log = (said if said is not None else []).append
    return select_pairs(pairs, "train_data", config, vocab_size=300, bos_token_id=BOS, log=log)


def test_strings_get_one_bos_and_a_scored_eos_each(tmp_path):
    pair = load_one(tmp_path, {"prompt": "Hi. ", "chosen": "Ja", "rejected": "Nein<eos>"})
    assert pair.prompt == [BOS, *TOKENIZER("Hi. ", add_special_tokens=False)["input_ids"]]
    assert pair.prompt.count(BOS) == 1
    for ids, text in ((pair.chosen, "Ja"), (pair.rejected, "Nein")):
        assert ids[-1] == EOS and ids.count(EOS) == 1
        assert BOS not in ids
        assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    assert pair.origin.endswith("d.jsonl:1")


def test_bos_is_neither_doubled_nor_invented():
    encode = TextEncoder(TOKENIZER).prompt
    assert encode("<bos>Hi") == encode("Hi")
    without = byte_tokenizer()
    without.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    assert BOS not in TextEncoder(without).prompt("Hi")


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("prompt", {"prompt": "<bos><bos>Hi", "chosen": "a", "rejected": "b"}),
        ("chosen", {"prompt": "Hi", "chosen": "<bos>a", "rejected": "b"}),
        ("rejected", {"prompt": [USER], "chosen": says("a"), "rejected": says("b")}),
    ],
)
def test_a_second_bos_is_an_error(tmp_path, name, record):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'].replace('b', '<bos>b') }}\n{% endfor %}"
    with pytest.raises(InputError, match=rf"d.jsonl:1: a second '<bos>' stands at the beginning of '{name}'"):
        load_one(tmp_path, record, tokenizer)


def test_only_messages_can_be_asked_for(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(InputError, match=r"d\.jsonl:1: holds strings; use messages, which alternative=chat needs"):
        load_pairs(file, TOKENIZER, TrainConfig(alternative="chat"))


def test_text_outside_ascii_survives():
    pairs = load_pairs(str(PAIRS), TOKENIZER)
    assert len(pairs) == 24
    assert "Schreibe einen Satz über Käse." in [TOKENIZER.decode(p.prompt, skip_special_tokens=True) for p in pairs]


def test_messages_continue_the_templates_prompt(tmp_path):
    pair = load_one(tmp_path, {"prompt": [USER], "chosen": says("Because."), "rejected": says("No idea.")})
    whole = TOKENIZER.apply_chat_template([USER, *says("Because.")], tokenize=False)
    assert TOKENIZER.decode(pair.prompt) + TOKENIZER.decode(pair.chosen) == whole.rstrip("\n")
    assert pair.chosen[-1] == EOS and pair.chosen.count(EOS) == 1


def test_template_bos_and_end_of_turn_are_not_doubled(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = (
        "<bos>{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    pair = load_one(tmp_path, {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}, tokenizer)
    assert pair.prompt.count(BOS) == 1 and pair.prompt[0] == BOS
    assert tokenizer.decode(pair.chosen) == "A<end>"
    assert EOS not in pair.chosen


@pytest.mark.parametrize(
    "record",
    [
        {"chosen": [USER, *says("A")], "rejected": [USER, *says("B")]},
        {"prompt": "Why?", "chosen": [USER, *says("A")], "rejected": [USER, *says("B")]},
        {"prompt": "Why?", "chosen": says("A"), "rejected": says("B")},
    ],
    ids=["implicit", "string beside conversations", "string beside answers"],
)
def test_ways_to_give_a_conversation_agree(tmp_path, record):
    explicit = load_one(tmp_path, {"prompt": [USER], "chosen": says("A"), "rejected": says("B")})
    assert load_one(tmp_path, record)[:3] == explicit[:3]


def test_implicit_prompt_of_strings_ends_at_a_word(tmp_path):
    pair = load_one(tmp_path, {"chosen": "The sky is blue.", "rejected": "The sky is black."})
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in pair[:3]]
    assert texts == ["The sky is", " blue.", " black."]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "chosen": "b", ', "d.jsonl:2: not JSON"),
        ('["a", "b", "c"]', "d.jsonl:2: must be a JSON object"),
        ('{"prompt": "a", "chosen": "b"}', r"d.jsonl:2: 'rejected' is missing \(keys found: 'prompt', 'chosen'\)"),
        ('{"prompt": "a", "chosen": "b", "rejected": null}', "d.jsonl:2: 'rejected' is null"),
        ('{"prompt": null, "chosen": "b", "rejected": "c"}', "d.jsonl:2: 'prompt' is null"),
        ('{"prompt": "a", "chosen": 3, "rejected": "c"}', "d.jsonl:2: 'chosen' must be a string or a list of messages"),
        ('{"prompt": "a", "chosen": [{"role": "assistant"}], "rejected": "c"}', "d.jsonl:2: 'chosen' must be"),
        ('{"prompt": "a", "chosen": [], "rejected": []}', "d.jsonl:2: 'chosen' must be"),
        ('{"prompt": [{"role": "user", "content": "a"}], "chosen": "b", "rejected": "c"}', "d.jsonl:2: 'prompt' is a "),
        ('{"chosen": "yes", "rejected": "no"}', "d.jsonl:2: no 'prompt'"),
        ('{"prompt": "a", "chosen": "\xff", "rejected": "c"}', "d.jsonl:2: not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_number(tmp_path, line, message):
    file = tmp_path / "d.jsonl"
    file.write_bytes(b'{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line.encode("latin-1") + b"\n")
    with pytest.raises(InputError, match=message):
        load_pairs(str(file), TOKENIZER)


def test_blank_lines_count_as_lines(tmp_path):
    (tmp_path / "d.jsonl").write_text('\n{"prompt": "a", "chosen": "b", "rejected": "c"}\n\n')
    assert load_pairs(str(tmp_path / "d.jsonl"), TOKENIZER)[0].origin.endswith(":2")


def test_a_missing_file_is_named():
    with pytest.raises(InputError, match=r"nowhere\.jsonl: no such file"):
        load_pairs("nowhere.jsonl", TOKENIZER)


def test_other_sources_go_through_datasets(tmp_path, monkeypatch):
    write_jsonl(tmp_path / "train.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    assert load_pairs(str(tmp_path), TOKENIZER)[0].origin == f"{tmp_path}/train.jsonl:1"
    with pytest.raises(InputError, match=r"could not be loaded .*missing"):
        load_pairs(f"{tmp_path}:missing", TOKENIZER)

    def offline(*args, **kwargs):
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match=r"no_such/dataset could not be loaded .*no network.*give a local path"):
        load_pairs("no_such/dataset", TOKENIZER)


def test_missing_and_rewriting_templates_are_errors(tmp_path):
    record = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(InputError, match="writes the prompt in another way"):
        load_one(tmp_path, record, tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="no chat template"):
        load_one(tmp_path, record, tokenizer)


def test_unusable_pairs_are_dropped_counted_and_named(tmp_path):
    records = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": " ", "rejected": "c"},
        {"prompt": "a", "chosen": "b", "rejected": ""},
        {"prompt": "a", "chosen": "same", "rejected": "same"},
        {"prompt": [USER], "chosen": says("b"), "rejected": says("")},
        {"prompt": "a" * 50, "chosen": "b", "rejected": "c"},
        {"prompt": "a", "chosen": "<eos>", "rejected": "c"},
        {"prompt": " ", "chosen": "b", "rejected": "c"},
    ]
    file = write_jsonl(tmp_path / "d.jsonl", records)
    pairs = load_pairs(file, TOKENIZER)
    said = []
    assert select(pairs, said, max_length=40, truncation="drop") == pairs[:1]
    assert said == [
        f"train_data: 8 pairs read, 1 kept; dropped: 1 empty prompt ({file}:8), "
        f"4 empty response ({file}:2, {file}:3, {file}:5, ...), 1 identical responses ({file}:4), 1 too long ({file}:6)"
    ]
    with pytest.raises(InputError, match=r"4 empty response .*d.jsonl:2.* 1 identical responses .*d.jsonl:4"):
        select(pairs, truncation="drop", max_length=40, invalid_pairs="error")
    with pytest.raises(InputError, match=r"1 too long .*d.jsonl:6.*max_length=40.*truncation"):
        select(pairs, max_length=40, truncation="error")
    with pytest.raises(InputError, match="no pair is left"):
        select(pairs[1:], max_length=40, truncation="drop")


def test_prompts_are_cut_after_their_bos():
    fits, long = Pair([BOS, 5], [6, EOS], [7, EOS], "x:1"), Pair([BOS, 5, 8, 9], [6, EOS], [7, EOS], "x:2")
    hopeless = Pair([BOS, 5], [6] * 9, [7], "x:3")
    said = []
    kept = select([fits, long, hopeless], said, max_length=6, truncation="prompt_left")
    assert [p.prompt for p in kept] == [[BOS, 5], [BOS, 9]]
    assert kept[1].chosen == long.chosen and kept[1].rejected == long.rejected
    assert said == ["train_data: 3 pairs read, 2 kept; dropped: 1 too long (x:3); noted: 1 truncated (x:2)"]


def test_separators_count_towards_the_length():
    pair, said = Pair([BOS, 5, 8], [6, EOS], [7, EOS], "x:1"), []
    options = {"vocab_size": 300, "bos_token_id": BOS, "log": said.append, "separator_length": 3}
    assert select_pairs([pair], "d", TrainConfig(max_length=10), **options) == [pair]
    (cut,) = select_pairs([pair], "d", TrainConfig(max_length=9, truncation="prompt_left"), **options)
    assert cut.prompt == [BOS, 8]
    with pytest.raises(InputError, match=r"x:1.*max_length=9 tokens of prompt, chosen and rejected \(and 3 between"):
        select_pairs([pair], "d", TrainConfig(max_length=9), **options)
    with pytest.raises(InputError, match="have 10 tokens, but the model 9 positions"):
        check_pairs([pair], [], tiny_model(max_position_embeddings=9), said.append, separator_length=3)


def test_held_out_prompts_that_are_trained_on_are_counted():
    train, held_out = Pair([BOS, 5, 8, 9], [6, 6, EOS], [7, EOS]), Pair([BOS, 5, 8, 9], [6, EOS], [7, EOS])
    said = []
    check_pairs([train], [held_out], tiny_model(), said.append)
    assert said == ["note: 1 of 1 eval_data pairs have a prompt of train_data; they are not held out"]


def test_held_out_prompts_are_compared_as_they_were_before_cuts():
    train, held_out = Pair([BOS, 5, 8, 9], [6, 6, EOS], [7, EOS]), Pair([BOS, 5, 8, 9], [6, EOS], [7, EOS])
    cut = [select([pair], max_length=7, truncation="prompt_left")[:] for pair in (train, held_out)]
    said = []
    assert cut[0][0].prompt != cut[1][0].prompt
    check_pairs(*cut, tiny_model(), said.append)
    assert said == ["note: 1 of 1 eval_data pairs have a prompt of train_data; they are not held out"]


def test_many_cut_prompts_take_little_memory():
    pairs = Pairs.of_lists([Pair([BOS, *range(300, 2300)], [4, EOS], [5, EOS])] * 8000, "train_data")
    tracemalloc.start()
    cut = pairs.cut(dict.fromkeys(range(8000), 1000), BOS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert cut.lengths[:, 0].tolist() == [1001] * 8000 and cut[-1].prompt == [BOS, *range(1300, 2300)]
    assert peak < 16e6  # half of the ids


@pytest.mark.parametrize("token", [300, -100])
def test_token_ids_outside_the_vocabulary_are_an_error(token):
    with pytest.raises(InputError, match=rf"x:1: token id {token}, but the model's vocabulary ends at 299"):
        select([Pair([BOS], [token, EOS], [4, EOS], "x:1")])


def test_pairs_in_memory_need_no_origin():
    assert select([([1], [2, 3], [4])]) == [Pair([1], [2, 3], [4], "train_data pair 0")]
    assert json.loads(json.dumps(select([([1], [2, 3], [4])])[0][:3])) == [[1], [2, 3], [4]]

"""Test pairs in the forms of public data sets, and columns that hold a prompt under another name."""

from __future__ import annotations

import pytest
from helpers import write_jsonl
from test_boundaries import CHATML, USER, load, says, texts, tokenizer_with

from training.chat import set_template_kwargs
from training.data import load_pairs
from training.errors import InputError
from training.model import byte_tokenizer

PLAIN = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
OPENS_THOUGHT = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")


def sharegpt(role, text):
    return {"from": role, "value": text}


def parts(message, *more):
    return message | {"content": [{"type": "text", "text": message["content"]}, *more]}


HUMAN, GOOD, BAD = sharegpt("human", USER["content"]), sharegpt("gpt", "A"), sharegpt("gpt", "B")


@pytest.mark.parametrize(
    "record",
    [
        {name: [parts(m) for m in messages] for name, messages in PLAIN.items()},
        PLAIN | {"prompt": [USER | {"content": [{"type": "text", "text": t} for t in ("Why is the ", "sky blue?")]}]},
        {"conversations": [HUMAN], "chosen": GOOD, "rejected": BAD},
        {"prompt": [HUMAN], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [HUMAN, GOOD], "rejected": [HUMAN, BAD]},
        PLAIN | {"chosen": says("A")[0], "rejected": says("B")[0]},
    ],
)
def test_conversations_of_every_form_give_the_same_pair(tmp_path, record):
    pairs = load(tmp_path, [PLAIN, record], tokenizer_with(CHATML))
    assert pairs[0][:3] == pairs[1][:3]


def test_conversations_in_cells_of_text_are_read(tmp_path):
    record = {"conversations": "[{'from'".replace("'", '"') + ': "human", "value": "Why is the sky blue?"}]'}
    pairs = load(tmp_path, [PLAIN, {**record, "chosen": GOOD, "rejected": BAD}], tokenizer_with(CHATML))
    assert pairs[0][:3] == pairs[1][:3]


@pytest.mark.parametrize(
    "text",
    [
        '[{"$lookup": {"from": "orders", "as": "found"}}]',
        '[{"name": "Ann", "role": "admin"}]',
        '[{"from": "Rome", "to": "Oslo"}] is the way',
    ],
)
def test_json_that_holds_no_messages_is_text(tmp_path, text):
    (pair,) = load(tmp_path, [{"prompt": "As JSON: ", "chosen": text, "rejected": "[]"}], byte_tokenizer())
    assert texts(pair, byte_tokenizer())[1] == f"{text}<eos>"


@pytest.mark.parametrize("part", [{"type": "image", "image": "a.png"}, {"type": "image_url"}, {"type": "input_audio"}])
def test_non_text_parts_are_refused_by_name(tmp_path, part):
    with pytest.raises(InputError, match=f"d.jsonl:1: a message of 'prompt' has a part of type '{part['type']}'"):
        load(tmp_path, [PLAIN | {"prompt": [parts(USER, part)]}], tokenizer_with(CHATML))


@pytest.mark.parametrize("name", ["question", "instruction", "query", "messages"])
def test_a_prompt_under_another_name_is_not_lost(tmp_path, name):
    file = write_jsonl(tmp_path / "d.jsonl", [{name: "Why? ", "chosen": "The air.", "rejected": "The sea."}])
    with pytest.raises(InputError, match=rf"d\.jsonl:1: no 'prompt'; set columns\.prompt={name}"):
        load_pairs(file, byte_tokenizer())
    pairs = load_pairs({"path": file, "columns": {"prompt": name}}, byte_tokenizer())
    assert byte_tokenizer().decode(pairs[0].prompt) == "<bos>Why? "


@pytest.mark.parametrize("record", [PLAIN, {"chosen": "a", "rejected": "b"}])
def test_a_missing_prompt_names_the_columns_found(tmp_path, record):
    record = {"ask": "Why?", "chosen": record["chosen"], "rejected": record["rejected"]}
    with pytest.raises(InputError, match=r"no 'prompt', and .*'ask', 'chosen', 'rejected'\); name its column"):
        load(tmp_path, [record], tokenizer_with(CHATML))


def test_answers_that_repeat_the_opened_thought_are_kept(tmp_path):
    tokenizer = tokenizer_with(OPENS_THOUGHT)
    record = PLAIN | {"chosen": says("<think>\nHm.\n</think>\nA"), "rejected": says("<think>\nEh.\n</think>\nB")}
    (pair,) = load(tmp_path, [record], tokenizer)
    prompt, chosen, _ = texts(pair, tokenizer)
    assert prompt.endswith("assistant\n<think>\n") and chosen == "Hm.\n</think>\nA<|im_end|>"


def test_switches_that_no_template_reads_are_refused():
    tokenizer = tokenizer_with("{% if think %}{{ day }}{% endif %}" + CHATML)
    with pytest.raises(
        InputError, match=r"chat_template_kwargs: the chat template reads no 'thnk' \(it reads: day, think\)"
    ):
        set_template_kwargs(tokenizer, {"thnk": False})
    set_template_kwargs(tokenizer, {"think": False})
    with pytest.raises(InputError, match="reads no 'think'"):  # another value would be without effect
        set_template_kwargs(tokenizer, {"think": True})

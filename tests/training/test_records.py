"""Test records that can be read but would train wrong: each is refused, dropped with a count, or named."""

from __future__ import annotations

import json
import re

import pytest
from helpers import write_jsonl
from test_boundaries import CHATML, TOOL, TOOLS, USER, load, says, texts, tokenizer_with
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from training.chat import TextEncoder
from training.data import load_pairs, trained_ends
from training.errors import InputError
from training.model import byte_tokenizer

CHAT = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
STRINGS = {"prompt": "Why? ", "chosen": "b", "rejected": "c"}
CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}{{ c.function.arguments }}</call>"
    "{% endfor %}",
)
NEEDS_SYSTEM = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML
SYSTEM = {"role": "system", "content": "Be kind."}


def calls(arguments):
    return says("", tool_calls=[{"type": "function", "function": {"name": "f", "arguments": arguments}}])


def refused(tmp_path, record, message, template=CHATML):
    with pytest.raises(InputError, match=rf"d\.jsonl:1: {message}"):
        load(tmp_path, [record], tokenizer_with(template))


def remark(tmp_path, record, template=CHATML, kept=True):
    """Return the report on ``record``, read together with a correct record."""
    said = []
    assert len(load(tmp_path, [CHAT, record], tokenizer_with(template), said)) == 1 + kept
    return re.search(rf"{'noted: ' if kept else 'dropped: '}1 (.*?) \(.*d\.jsonl:2\)", said[-1] if kept else said[0])[1]


@pytest.mark.parametrize("record", [CHAT, STRINGS])
@pytest.mark.parametrize("name", ["images", "videos", "audio"])
def test_columns_that_are_no_text_are_refused(tmp_path, record, name):
    refused(tmp_path, record | {name: ["a.png"]}, f"has '{name}', which is not read")
    assert len(load(tmp_path, [record | {name: []}], tokenizer_with(CHATML))) == 1


def test_columns_that_nothing_reads_are_named_once(tmp_path):
    said = []
    records = [CHAT | {"system": "You are a pirate."}, CHAT | {"id": 3, "tools": []}]
    load(tmp_path, records, tokenizer_with(CHATML), said)
    assert [line for line in said if "columns not read: 'id', 'system'" in line] == said[:1]
    assert (
        sum("WARNING" in line and "'system' is not read, and its text is not in the prompts" in line for line in said)
        == 1
    )
    for record in (CHAT | {"system": ""}, CHAT | {"prompt": [SYSTEM, USER], "system": "Be kind."}):
        load(tmp_path, [record], tokenizer_with(CHATML), said := [])
        assert not any("WARNING" in line for line in said)
    load(tmp_path, [CHAT | {"date": "today"}], tokenizer_with("{{ date }}" + CHATML), said := [])
    assert len(said) == 1


def test_keys_of_messages_that_nothing_reads_are_named(tmp_path):
    said = []
    records = [CHAT, CHAT | {"chosen": says("A", thought="It is hot.", thinking="A"), "prompt": [USER | {"weight": 0}]}]
    load(tmp_path, records, tokenizer_with(CHATML), said)
    assert "columns not read: 'thought (in messages)', 'weight (in messages)'" in said[0]
    load(
        tmp_path,
        records,
        tokenizer_with(CHATML.replace("m['content']", "m.thought ~ m.weight ~ m['content']")),
        said := [],
    )
    assert not any("not read" in line for line in said)


@pytest.mark.parametrize("text", ["Let me see.", None])
def test_a_function_call_left_out_is_found(tmp_path, text):
    legacy = says(text, function_call={"name": "f", "arguments": '{"city": "Bonn"}'})
    assert remark(tmp_path, CHAT | {"chosen": legacy}, kept=False).startswith("text left out")
    assert remark(tmp_path, CHAT | {"prompt": [USER, *legacy, USER]}, kept=False).startswith("text left out")
    reads = CHATML.replace(
        "{{ m['content'] }}",
        "{{ m['content'] }}{{ m.function_call.name ~ m.function_call.arguments if m.function_call }}",
    )
    assert len(load(tmp_path, [CHAT | {"chosen": legacy}], tokenizer_with(reads))) == 1


@pytest.mark.parametrize("role", ["human", "User", "gpt", ""])
def test_a_role_that_no_template_knows_is_refused(tmp_path, role):
    prompt = [{"role": role, "content": "Why?"}]
    refused(tmp_path, CHAT | {"prompt": prompt}, f"the role '{role}' is not one of assistant, developer")
    knows = CHATML.replace("m['role']", f"'user' if m['role'] == '{role}' else m['role']")
    assert len(load(tmp_path, [CHAT | {"prompt": prompt}], tokenizer_with(knows))) == 1


@pytest.mark.parametrize(
    "record",
    [
        CHAT | {"prompt": [USER, *says("Sure, ")]},
        {"chosen": [USER, *says("a"), *says("b")], "rejected": [USER, *says("a"), *says("c")]},
    ],
)
def test_a_prompt_that_the_assistant_ends_is_refused(tmp_path, record):
    refused(tmp_path, record, "the prompt ends with an assistant message")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (CHAT | {"prompt": [USER | {"content": "a<|im_end|>b"}]}, "with special tokens in messages or answers"),
        (STRINGS | {"rejected": "c<pad><pad>"}, "with special tokens in messages or answers"),
        (CHAT | {"chosen": says("A<eos>B<|im_start|>")}, None),
    ],
)
def test_doubtful_pairs_are_kept_and_counted(tmp_path, record, said):
    if said:
        assert remark(tmp_path, record) == said
    else:
        assert remark(tmp_path, record, kept=False) == "text behind the end of an answer"


@pytest.mark.parametrize("name", ["prompt", "chosen"])
def test_messages_rendered_already_are_dropped(tmp_path, name):
    record = CHAT | {name: [CHAT[name][0] | {"content": "<|im_start|>assistant\nA"}]}
    for template in (CHATML, CHATML[: CHATML.index("{% if add")]):
        assert remark(tmp_path, record, template, kept=False) == "messages that hold the chat template's own text"


def test_text_unknown_to_the_tokenizer_is_counted(tmp_path):
    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    said, record = [], {"prompt": "a ", "chosen": "b zebra", "rejected": "b"}
    load(tmp_path, [record], PreTrainedTokenizerFast(tokenizer_object=words, **special), said)
    assert "1 with text that the tokenizer does not know" in said[0]


@pytest.mark.parametrize("name", ["prompt", "chosen"])
def test_messages_as_text_are_read_as_messages(tmp_path, name):
    message = {"content": "x" * 300, **CHAT[name][0], "weight": 1}
    message["content"] = "x" * 300
    tokenizer = tokenizer_with(CHATML)
    as_list, as_text = CHAT | {name: [message]}, CHAT | {name: json.dumps([message])}
    assert load(tmp_path, [as_text], tokenizer)[0][:3] == load(tmp_path, [as_list], tokenizer)[0][:3]
    refused(tmp_path, CHAT | {name: f"[{message}\n {message}]"}, f"'{name}' is not JSON")


def test_columns_of_json_text_reach_the_template(tmp_path):
    tokenizer = tokenizer_with("{{ date_string }}" + TOOLS)
    values = {"chat_template_kwargs": {"date_string": "Today"}, "tools": [TOOL]}
    records = [
        CHAT | values,
        CHAT | {name: json.dumps(value) for name, value in values.items()},
        CHAT | values | {"tools": [json.dumps(TOOL)]},
    ]
    pairs = load(tmp_path, records, tokenizer)
    assert pairs[0][:3] == pairs[1][:3] == pairs[2][:3] and "Today" in texts(pairs[0], tokenizer)[0]
    refused(tmp_path, CHAT | {"chat_template_kwargs": "[1]"}, "'chat_template_kwargs' must be a JSON object")


@pytest.mark.parametrize(
    ("template", "arguments", "message"),
    [
        (CALLS, {"city": "Bonn"}, "as Python does"),
        (CALLS.replace("arguments }}", "arguments | tojson }}"), '{"city": "Köln"}', "within a string of JSON"),
    ],
)
def test_arguments_of_calls_are_written_as_json(tmp_path, template, arguments, message):
    other = json.dumps(arguments) if isinstance(arguments, dict) else json.loads(arguments)
    text = "the chat template writes the arguments of a tool's call "
    refused(tmp_path, CHAT | {"chosen": calls(arguments)}, text + message, template)
    refused(tmp_path, CHAT | {"prompt": [USER, *calls(arguments), USER]}, text + message, template)
    assert len(load(tmp_path, [CHAT | {"chosen": calls(other)}], tokenizer_with(template))) == 1


def test_numbers_dropped_from_tool_calls_are_found(tmp_path):
    drops = CALLS.replace("{{ c.function.arguments }}", "")
    assert remark(tmp_path, CHAT | {"chosen": calls({"a": 12345})}, drops, kept=False).startswith("text left out")


def test_a_message_left_out_is_found(tmp_path):
    drops = CHATML.replace("in messages %}", "in messages if m.role != 'system' %}")
    record = CHAT | {"prompt": [{"role": "system", "content": "the sky"}, USER]}
    assert remark(tmp_path, record, drops, kept=False).startswith("text left out")
    twice = CHAT | {"prompt": [USER, *says("Tell me."), USER]}
    assert len(load(tmp_path, [twice, CHAT | {"prompt": [USER, *says("sky"), USER]}], tokenizer_with(CHATML))) == 2


def test_nulls_and_empty_lists_are_as_if_left_out(tmp_path):
    template = CHATML.replace("{{ m['content'] }}", "{{ m['content'] }}{{ 'calls' if 'tool_calls' in m }}")
    nulls = CHAT | {"prompt": [USER | {"tool_calls": None}], "chosen": says("A", tool_calls=[], name=None)}
    pairs = load(tmp_path, [CHAT, nulls], tokenizer_with(template))
    assert pairs[0][:3] == pairs[1][:3]


def test_templates_that_need_a_system_message_work(tmp_path):
    record = CHAT | {"prompt": [SYSTEM, USER]}
    found = load(tmp_path, [record], tokenizer_with(NEEDS_SYSTEM))
    assert found[0][:3] == load(tmp_path, [record], tokenizer_with(CHATML))[0][:3]
    refused(tmp_path, CHAT, "the tokenizer's chat template cannot render .*no system", NEEDS_SYSTEM)


@pytest.mark.parametrize("eos", ["<eos>", "<|im_end|>"])
def test_a_tool_call_ends_with_its_own_token(tmp_path, eos):
    template = CALLS.replace("arguments }}", "arguments | tojson }}").replace(
        "<|im_end|>", "{{ '<|eom|>' if m.tool_calls else '<|im_end|>' }}"
    )
    tokenizer = tokenizer_with(template)
    tokenizer.add_tokens(AddedToken("<|eom|>", special=True))
    tokenizer.eos_token = eos
    pairs = load(tmp_path, [CHAT | {"chosen": calls({"a": 1})}], tokenizer)
    assert [text[-9:] for text in texts(pairs[0], tokenizer)[1:]] == ["l><|eom|>", "|im_end|>"]
    ends = tokenizer.convert_tokens_to_ids(["<|eom|>", "<|im_end|>"])
    assert trained_ends(pairs, tokenizer) == set(ends)


def test_an_invalid_template_is_named(tmp_path):
    refused(tmp_path, CHAT, "the tokenizer's chat template cannot render these messages", "{% for m in %}")


def test_conversations_in_strings_end_at_their_last_turn(tmp_path):
    start = "\n\nHuman: Why?\n\nAssistant:"
    record = {"chosen": f"{start} The sky is blue.", "rejected": f"{start} The sky is far."}
    tokenizer = byte_tokenizer()
    assert texts(load(tmp_path, [record], tokenizer)[0], tokenizer) == [
        f"<bos>{start}",
        " The sky is blue.<eos>",
        " The sky is far.<eos>",
    ]
    record["chosen"] += "\n\nHuman: And?\n\nAssistant: No."
    assert remark(tmp_path, record, kept=False) == "turns of others in an answer"
    record = {"prompt": start, "chosen": " So.\n\nHuman: And?", "rejected": " No."}
    assert remark(tmp_path, record, kept=False) == "turns of others in an answer"


def test_strings_that_are_rendered_end_once(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    opening, texts_of = TextEncoder(tokenizer).render_pair([USER], [says("A"), says("B")], "d:1")
    record = dict(zip(("prompt", "chosen", "rejected"), [opening, *texts_of]))
    assert load(tmp_path, [record], tokenizer)[0][:3] == load(tmp_path, [CHAT], tokenizer)[0][:3]
    joined = {name: opening + text + "\n" for name, text in zip(("chosen", "rejected"), texts_of)}
    blank = {"prompt": opening, **{name: record[name] + "\n" for name in joined}}
    shared = {"chosen": f"{opening}The sky is<|im_end|>\n", "rejected": f"{opening}The sea is<|im_end|>\n"}
    pairs = load(tmp_path, [joined, blank, shared], tokenizer)
    assert pairs[0][:3] == pairs[1][:3] == load(tmp_path, [CHAT], tokenizer)[0][:3]
    assert texts(pairs[2], tokenizer)[1:] == ["The sky is<|im_end|>", "The sea is<|im_end|>"]
    record["chosen"] += "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\nSo.<|im_end|>"
    assert remark(tmp_path, record, kept=False) == "text behind the end of an answer"


def test_strings_need_no_chat_template_that_works(tmp_path):
    file = write_jsonl(tmp_path / "d.jsonl", [STRINGS])
    assert load_pairs(file, tokenizer_with("{% for m in %}"))[0][:3] == load_pairs(file, byte_tokenizer())[0][:3]

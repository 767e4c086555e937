"""Test that rendered text contains the data, and that only the model's text is scored, on data others score wrong."""

from __future__ import annotations

import datetime
import json
import re

import pytest
from helpers import metrics, tiny_model, write_jsonl
from transformers import AutoTokenizer, GenerationConfig

from training import generate
from training.chat import TextEncoder, prepare_tokenizer, set_template_kwargs
from training.data import load_pairs, select_pairs, trained_ends
from training.data_options import DataOptions
from training.errors import InputError
from training.model import byte_tokenizer, load_model
from training.pairs import Pair
from training.train import main

USER = {"role": "user", "content": "Why is the sky blue?"}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_GENERATION_PROMPT = CHATML[: CHATML.index("{% if add")]
# Like DeepSeek-R1's template: it removes the text before </think> from every answer.
DROPS_THOUGHTS = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
# Like Qwen3's template: thoughts have their own key, and the last answer keeps them.
REASONING = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}{{ m['content'] }}",
)
TOOLS = "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] }}{% for call in m.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}",
)
LLAMA_DATE = (
    "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }}"
    + CHATML
)
TOOL = {"type": "function", "function": {"name": "weather", "description": "The weather", "parameters": {}}}


def tokenizer_with(template):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def says(text="", **more):
    return [{"role": "assistant", "content": text, **more}]


def call(**arguments):
    return says(None, tool_calls=[{"type": "function", "function": {"name": "weather", "arguments": arguments}}])


def load(tmp_path, records, tokenizer, said=None, **options):
    """Return the pairs of ``records`` that can be trained on."""
    log = (said if said is not None else []).append
    options = DataOptions(**{"max_length": 4096, **options})
    pairs = load_pairs(write_jsonl(tmp_path / "d.jsonl", records), tokenizer, options, log)
    return select_pairs(pairs, "train_data", options, vocab_size=400, bos_token_id=1, log=log)


def texts(pair, tokenizer):
    return [tokenizer.decode(ids) for ids in pair[:3]]


# --- The prompt contained in the responses ---


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Question: why?\nAnswer:", "Question: why?\nAnswer: because", "Question: why?\nAnswer: no"),
        ("Why is it blue? ", "Why is it blue? Because.", "Why is it blue?\nNo idea."),
        ([USER], says(f"{USER['content']} Because."), says(f"{USER['content']} No.")),
    ],
)
def test_responses_that_begin_with_the_prompt_are_refused(tmp_path, prompt, chosen, rejected):
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    good = {"prompt": "What is it? ", "chosen": "That.", "rejected": "This."}
    with pytest.raises(InputError, match=r"d\.jsonl:2: 'chosen' begins with the prompt.*Remove it from both"):
        load(tmp_path, [good, record], tokenizer_with(CHATML))


def test_a_shared_first_word_is_refused(tmp_path):
    records = [{"prompt": f"Why{i}?", "chosen": f"Why{i}? a", "rejected": f"Why{i}? b"} for i in range(3)]
    with pytest.raises(InputError, match=r"train_data: 'chosen' begins with the prompt.*in each pair \(.*d\.jsonl:1"):
        load(tmp_path, records, byte_tokenizer())


def test_answers_that_repeat_the_question_are_counted(tmp_path):
    said = []
    records = [
        {"prompt": "Hello", "chosen": "Hello! What is it?", "rejected": "Hello there."},
        {"prompt": "What is light? ", "chosen": "What is light? A wave.", "rejected": "A wave."},
        {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
        {"prompt": "Good morning", "chosen": "Good morning! Tea?", "rejected": "Good morning."},
    ]
    assert len(load(tmp_path, records, byte_tokenizer(), said)) == 4
    assert re.search(
        r"1 with one answer that begins with the prompt \(.*:2\), 2 with answers that .*:1, .*:4\)", said[-1]
    )


def test_prompt_messages_are_not_repeated_in_responses(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    plain = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
    whole = {"prompt": [USER], "chosen": [USER, *says("A")], "rejected": [USER, *says("B")]}
    half = {"prompt": [USER], "chosen": [USER, *says("A")], "rejected": says("B")}
    pairs = load(tmp_path, [plain, whole, half], tokenizer)
    assert pairs[0][:3] == pairs[1][:3] == pairs[2][:3]


def test_a_prompt_missing_from_conversations_is_refused(tmp_path):
    record = {"prompt": "You are a pirate.", "chosen": [USER, *says("A")], "rejected": [USER, *says("B")]}
    with pytest.raises(InputError, match=r"d\.jsonl:1: what 'chosen' and 'rejected' begin with is not 'prompt'"):
        load(tmp_path, [record], tokenizer_with(CHATML))


# --- Columns and keys that a template reads ---


def test_tools_and_calls_of_tools_reach_the_template(tmp_path):
    tokenizer = tokenizer_with(TOOLS)
    record = {"prompt": [USER], "chosen": call(city="Köln"), "rejected": call(city="Bonn"), "tools": [TOOL]}
    as_text = record | {"tools": json.dumps([TOOL])}
    pairs = load(tmp_path, [record, as_text], tokenizer)
    prompt, chosen, rejected = texts(pairs[0], tokenizer)
    assert '"name": "weather"' in prompt and "Köln" in chosen and "Bonn" in rejected
    assert chosen.endswith("</call><|im_end|>") and pairs[0][:3] == pairs[1][:3]


def test_tools_that_no_template_reads_are_refused(tmp_path):
    record = {"prompt": [USER], "chosen": says("A"), "rejected": says("B"), "tools": [TOOL]}
    with pytest.raises(InputError, match=r"d\.jsonl:1: has 'tools', which the tokenizer's chat template does not read"):
        load(tmp_path, [record], tokenizer_with(CHATML))
    strings = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}
    with pytest.raises(InputError, match=r"d\.jsonl:1: 'tools' are read by a chat template, which needs messages"):
        load(tmp_path, [strings], tokenizer_with(TOOLS))
    with pytest.raises(InputError, match=r"d\.jsonl:1: 'tools' is not JSON"):
        load(tmp_path, [record | {"tools": "{'name': 1}"}], tokenizer_with(TOOLS))
    assert len(load(tmp_path, [record | {"tools": []}], tokenizer_with(CHATML))) == 1


def test_a_tool_call_dropped_by_the_template_is_counted(tmp_path):
    said = []
    good = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
    record = {"prompt": [USER], "chosen": call(city="Köln"), "rejected": says("I cannot.")}
    assert len(load(tmp_path, [good, record], tokenizer_with(CHATML), said)) == 1
    assert re.search(r"dropped: 1 text left out by the chat template \(.*d\.jsonl:2\)", said[0])


@pytest.mark.parametrize("name", ["documents", "date_string", "chat_template_kwargs"])
def test_other_columns_of_the_template_reach_it(tmp_path, name):
    template = "{{ documents[0].text if documents }}{{ date_string }}" + CHATML
    value = {"documents": [{"text": "Read me"}], "chat_template_kwargs": {"date_string": "Read me"}}.get(
        name, "Read me"
    )
    record = {"prompt": [USER], "chosen": says("A"), "rejected": says("B"), name: value}
    tokenizer = tokenizer_with(template)
    assert texts(load(tmp_path, [record], tokenizer)[0], tokenizer)[0].startswith("<bos>Read me")


def test_thoughts_in_their_own_key_are_scored(tmp_path):
    record = {"prompt": [USER], "chosen": says("A", reasoning_content="I think."), "rejected": says("A")}
    tokenizer = tokenizer_with(REASONING)
    (pair,) = load(tmp_path, [record], tokenizer)
    assert texts(pair, tokenizer)[1] == "<think>\nI think.\n</think>\n\nA<|im_end|>"


# --- Templates that leave data out ---


@pytest.mark.parametrize(
    ("template", "chosen", "rejected"),
    [
        (DROPS_THOUGHTS, says("<think>so</think>A"), says("<think>but</think>A")),
        (DROPS_THOUGHTS, says("<think>so</think>A"), says("B")),
        (CHATML, says("A", reasoning_content="so"), says("B")),
        (CHATML.replace("m['content']", "m['content'][:20]"), says("A" * 30), says("B")),
    ],
)
def test_pairs_cut_by_the_template_are_dropped(tmp_path, template, chosen, rejected):
    good = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": says("A"), "rejected": says("B")}
    record = {"prompt": good["prompt"], "chosen": chosen, "rejected": rejected}
    said = []
    assert len(load(tmp_path, [good, record], tokenizer_with(template), said)) == 1
    assert re.search(r"1 text left out by the chat template \(.*d\.jsonl:2\)", said[0])
    with pytest.raises(InputError, match=r"1 text left out by the chat template \(.*d\.jsonl:2\).*invalid_pairs=drop"):
        load(tmp_path, [good, record], tokenizer_with(template), invalid_pairs="error")


def test_a_message_that_the_template_ignores_is_found(tmp_path):
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    system = {"role": "system", "content": "Be kind."}
    with pytest.raises(InputError, match=r"no pair is left to use; dropped: 1 text left out .*d\.jsonl:1"):
        load(
            tmp_path, [{"prompt": [system, USER], "chosen": says("A"), "rejected": says("B")}], tokenizer_with(template)
        )


def test_white_space_and_escapes_are_not_dropped_text(tmp_path):
    trims = TOOLS.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
    record = {
        "prompt": [USER],
        "chosen": says('  A "b"\n\n\tc \n'),
        "rejected": call(city='K"ö\n\\ln'),
        "tools": [TOOL],
    }
    assert len(load(tmp_path, [record], tokenizer_with(trims))) == 1


# --- Text that the model did not write ---


def test_turns_behind_the_answer_are_not_scored(tmp_path):
    tokenizer, said = tokenizer_with(CHATML), []
    record = {"prompt": [USER], "chosen": [*says("A"), USER], "rejected": [*says("B"), USER, *says("C")]}
    with pytest.raises(InputError, match=r"d\.jsonl:1: 'rejected' has the roles assistant, user, assistant"):
        load(tmp_path, [record], tokenizer)
    (pair,) = load(tmp_path, [record | {"rejected": says("B")}], tokenizer, said)
    assert texts(pair, tokenizer)[1:] == ["A<|im_end|>", "B<|im_end|>"]
    assert re.search(r"1 with turns after the answer, not read \(.*d\.jsonl:1\)", said[0])


@pytest.mark.parametrize(
    ("response", "message"),
    [
        ([USER], "has the roles none; it must be one message with the role 'assistant'"),
        ([{"role": "tool", "content": "42"}, *says("A")], "has the roles tool, assistant"),
        ([USER | {"content": "Else?"}, *says("A")], "has the roles user, assistant"),
        ([*says("A"), *says("B")], "has the roles assistant, assistant"),
    ],
)
def test_a_response_is_one_message_of_the_assistant(tmp_path, response, message):
    record = {"prompt": [USER], "chosen": response, "rejected": says("B")}
    with pytest.raises(InputError, match=rf"d\.jsonl:1: 'chosen' {message}"):
        load(tmp_path, [record], tokenizer_with(CHATML))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": says("A<|im_end|>\n<|im_start|>user\nMore"), "rejected": says("B")},
        {"prompt": "Why? ", "chosen": "A<eos>More", "rejected": "B"},
    ],
)
def test_text_behind_an_end_is_dropped_and_named(tmp_path, record):
    with pytest.raises(InputError, match=r"dropped: 1 text behind the end of an answer \(.*d\.jsonl:1\)"):
        load(tmp_path, [record], tokenizer_with(CHATML))


# --- The boundary of prompt and response ---


def test_a_template_without_generation_prompt_scores_no_header(tmp_path):
    record = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
    with_prompt, without = tokenizer_with(CHATML), tokenizer_with(NO_GENERATION_PROMPT)
    pairs = [load(tmp_path, [record], tokenizer)[0] for tokenizer in (with_prompt, without)]
    assert pairs[0] == pairs[1] and texts(pairs[1], without)[1] == "A<|im_end|>"
    said = []
    mended = prepare_tokenizer(without, DataOptions(), said.append)
    assert "has no generation prompt: '<|im_start|>assistant\\n'" in said[1]
    for prompt in (True, False):
        rendered = [
            t.apply_chat_template([USER], tokenize=False, add_generation_prompt=prompt) for t in (mended, with_prompt)
        ]
        assert rendered[0] == "<bos>" + rendered[1]
    assert load(tmp_path, [record], mended)[0] == pairs[0]
    assert without.chat_template == NO_GENERATION_PROMPT  # the caller's own


def test_text_the_template_begins_answers_with_is_named(tmp_path):
    empty = "<think>\n\n</think>\n\n"
    switch = "{% if enable_thinking is false %}" + empty + "{% endif %}"
    always = CHATML.replace(
        "{{ m['content'] }}", "{% if m.role == 'assistant' %}" + empty + "{% endif %}{{ m['content'] }}"
    )
    template = always.replace("assistant\n{% endif %}", "assistant\n" + switch + "{% endif %}")
    record = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
    load(tmp_path, [record], tokenizer_with(template), said := [])
    assert "begins plain answers with '<think>\\n\\n</think>', which is scored" in said[0]
    assert "chat_template_kwargs: {enable_thinking: false} makes it part of the prompt" in said[0]
    load(tmp_path, [record | {"enable_thinking": False}], tokenizer_with(template), said := [])
    assert len(said) == 1
    tokenizer = tokenizer_with(template)
    set_template_kwargs(tokenizer, {"enable_thinking": False})
    pairs = load(tmp_path, [record], tokenizer, said := [])
    assert len(said) == 1 and texts(pairs[0], tokenizer)[1] == "A<|im_end|>"


def test_a_bos_before_a_system_message_is_not_doubled(tmp_path):
    template = "{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + CHATML
    prepared = prepare_tokenizer(tokenizer_with(template), DataOptions(), lambda line: None)
    record = {"prompt": [{"role": "system", "content": "Be brief."}, USER], "chosen": says("A"), "rejected": says("B")}
    (pair,) = load(tmp_path, [record], prepared)
    assert prepared.decode(pair.prompt).count("<bos>") == 1


def test_a_server_writes_the_bos_of_training(tmp_path):
    """Servers add nothing to what a chat template writes."""
    said, file = [], write_jsonl(tmp_path / "d.jsonl", [{"prompt": [USER], "chosen": says("A"), "rejected": says("B")}])
    options = ["--max_steps", "1", "--output_dir", str(tmp_path / "o"), "--model", str(tmp_path / "base")]
    base = tokenizer_with(CHATML)
    tiny_model(vocab_size=len(base)).save_pretrained(tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    main([*options, "--train_data", file, "--chat_template_kwargs", "{}"])
    saved = AutoTokenizer.from_pretrained(tmp_path / "o/final")
    served = saved.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)
    assert served == load_pairs(file, saved)[0].prompt == load_pairs(file, base)[0].prompt
    assert saved.decode(served).count("<bos>") == 1
    assert prepare_tokenizer(saved, DataOptions(), said.append).chat_template == saved.chat_template and not said


def test_the_separator_ends_with_the_templates_header():
    expected, found = (TextEncoder(tokenizer_with(t)).separator("Better?") for t in (CHATML, NO_GENERATION_PROMPT))
    assert found == expected


# --- Text that no tokenizer takes ---


@pytest.mark.parametrize("name", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("chat", [False, True])
def test_lone_surrogates_are_refused_with_their_line(tmp_path, name, chat):
    record = {"prompt": "a", "chosen": "b", "rejected": "c"} | {name: "smile \ud83d"}
    if chat:
        role = {"prompt": "user"}
        record = {n: [{"role": role.get(n, "assistant"), "content": text}] for n, text in record.items()}
    with pytest.raises(InputError, match=r"d\.jsonl:2.*half a character"):
        load(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}, record], tokenizer_with(CHATML))


def test_lone_surrogates_are_refused_in_every_text(tmp_path, capsys):
    tiny_model().save_pretrained(tmp_path / "m")
    byte_tokenizer().save_pretrained(tmp_path / "m")
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "\udc80"}])
    for words in (["--prompt", "caf\udce9"], ["--prompts", prompts, "--out", str(tmp_path / "o")]):
        with pytest.raises(SystemExit, match="2"):
            generate.main(["--model", str(tmp_path / "m"), *words])
        assert "half a character" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"alternative_instruction.*half a character"):
        TextEncoder(tokenizer_with(CHATML)).separator("Better \ud83d")
    whole = {"prompt": "a", "chosen": "\ud83d\ude00", "rejected": "c"}  # json writes both halves
    assert len(load(tmp_path, [whole], byte_tokenizer())) == 1


# --- Inputs that change over time ---


@pytest.mark.parametrize("template", [LLAMA_DATE, "{{ strftime_now('%Y') }}" + CHATML])
def test_a_template_with_a_clock_is_noted(tmp_path, template):
    record, said = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}, []
    tokenizer = tokenizer_with(template)
    load(tmp_path, [record], tokenizer, said)
    (note,) = [line for line in said if "today's date" in line]
    cure = dict([re.search(r"chat_template_kwargs: \{(\w+): (.*)\}", note).groups()])
    fixed = prepare_tokenizer(tokenizer, DataOptions(chat_template_kwargs=cure), said.append)
    said.clear()
    prompt = texts(load(tmp_path, [record], fixed, said)[0], fixed)[0]
    assert prompt.startswith("<bos>26 Jul 2024<|im_start|>") and not any("today" in line for line in said)
    fixed.save_pretrained(tmp_path / "t")
    again = AutoTokenizer.from_pretrained(tmp_path / "t")
    assert again.apply_chat_template([USER], tokenize=False).startswith("<bos>26 Jul 2024")


def test_strings_need_no_note_of_the_clock(tmp_path):
    said = []
    load(tmp_path, [{"prompt": "a ", "chosen": "b", "rejected": "c"}], tokenizer_with(LLAMA_DATE), said)
    assert len(said) == 1


def test_cached_pairs_depend_on_a_templates_date(monkeypatch):
    encoder = TextEncoder(tokenizer_with(LLAMA_DATE))
    assert str(datetime.datetime.now().year) in encoder.today() and not TextEncoder(tokenizer_with(CHATML)).today()


# --- The end of a turn ---


@pytest.mark.parametrize("chat", [True, False])
def test_the_trained_end_of_turn_stops_the_saved_model(tmp_path, capsys, chat):
    tokenizer = tokenizer_with(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    record = {"prompt": [USER], "chosen": says("A"), "rejected": says("B")}
    record = record if chat else {"prompt": "Why? ", "chosen": "A", "rejected": "B"}
    data = write_jsonl(tmp_path / "d.jsonl", [record])
    for name, lora in (("full", []), ("lora", ["--lora.r", "2"])):
        main(
            [
                "--model",
                str(tmp_path / "m"),
                "--train_data",
                data,
                "--output_dir",
                str(tmp_path / name),
                "--max_steps",
                "1",
                *lora,
            ]
        )
        ends = GenerationConfig.from_pretrained(tmp_path / name / "final").eos_token_id
        assert ends == ([2, end] if chat else 2)
        served, _ = load_model(DataOptions(model=str(tmp_path / name / "final")), training=False)
        assert served.generation_config.eos_token_id == ends
        assert ("eos_token_id gets" in capsys.readouterr().out) is chat
    assert GenerationConfig.from_pretrained(tmp_path / "m").eos_token_id == 2
    assert metrics(tmp_path / "full")


def test_ends_are_those_that_pairs_have():
    tokenizer = tokenizer_with(CHATML)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    pairs = [Pair([1, 5], [6, 2], [7, 2]), Pair([1, 5], [6, end], [7, end])]
    assert trained_ends(pairs, tokenizer) == {2, end}
    assert trained_ends(pairs[:1], tokenizer) == {2} and trained_ends(pairs, None) == set()


def test_padding_outside_the_vocabulary_is_not_used(tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "m")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "m")
    record = {"prompt": "Why? ", "chosen": "A", "rejected": "B"}
    data = write_jsonl(tmp_path / "d.jsonl", [record, record | {"prompt": "Why is it so? ", "chosen": "Because."}])
    words = ["--model", str(tmp_path / "m"), "--train_data", data, "--eval_data", data, "--max_steps", "1"]
    main([*words, "--layout", "rows", "--output_dir", str(tmp_path / "o"), "--sample_tokens", "2"])
    assert "no row for the padding token '[PAD]'; EOS is used" in capsys.readouterr().out
    assert AutoTokenizer.from_pretrained(tmp_path / "o/final").pad_token == "[PAD]"

from __future__ import annotations

import errno
import io
import json
import math
import re
import sys
import time

import pytest
import torch
from helpers import tiny_model, write_jsonl
from transformers import GenerationConfig

from training import answers, exports
from training.answers import generate_batch
from training.chat import TextEncoder
from training.errors import InputError
from training.generate import generate, main
from training.model import byte_tokenizer

TOKENIZER = byte_tokenizer()
ENCODER = TextEncoder(TOKENIZER)
PROMPTS = ["Why?", "What causes the northern lights?", "A", "Name a fruit.", "Tell me more about it, please."]


def wild_model(**fields):
    """Return a model whose large embeddings make the next byte depend visibly on the prompt."""
    return tiny_model(initializer_range=1.0, **fields).eval()


@pytest.fixture
def saved(tmp_path):
    model = wild_model()
    model.save_pretrained(tmp_path / "final")
    TOKENIZER.save_pretrained(tmp_path / "final")
    return model, str(tmp_path / "final")


def by_hand(model, ids, count, ends=(2,)):
    """Return the greedy answer's ids, computed directly from the logits."""
    answer = []
    while len(answer) < count and not (answer and answer[-1] in ends):
        answer.append(model(torch.tensor([[*ids, *answer]])).logits[0, -1].argmax().item())
    return answer


def batch(model, prompts, temperature=0.0, seeds=None, count=12, chat=False):
    return generate_batch(
        model,
        ENCODER,
        [ENCODER.prompt(text) for text in prompts],
        max_new_tokens=count,
        chat=chat,
        temperatures=[temperature] * len(prompts),
        seeds=seeds or [[0, i] for i in range(len(prompts))],
    )


def answer_file(tmp_path, folder, records, form, *more, name="answers"):
    prompts = write_jsonl(tmp_path / "prompts.jsonl", records)
    out = tmp_path / f"{name}.json"
    main(["--model", folder, "--prompts", prompts, "--out", str(out), "--format", form, "--max_new_tokens", "6", *more])
    text = out.read_text()
    return json.loads(text) if form == "alpaca_eval" else [json.loads(line) for line in text.splitlines()]


def test_main_answers_greedily_from_the_prompt_alone(saved, capsys):
    model, folder = saved
    expected = by_hand(model, [1, *TOKENIZER("Why?", add_special_tokens=False)["input_ids"]], 8)
    main(["--model", folder, "--prompt", "Why?", "--max_new_tokens", "8"])
    assert capsys.readouterr().out == TOKENIZER.decode(expected, skip_special_tokens=True) + "\n"


def test_a_batch_answers_as_each_prompt_alone():
    model = wild_model()
    assert batch(model, PROMPTS) == [by_hand(model, ENCODER.prompt(text), 12) for text in PROMPTS]


def test_answers_end_where_the_model_ends_them():
    model = wild_model()
    free = batch(model, PROMPTS)
    model.generation_config.eos_token_id = [2, free[0][3]]
    ended = batch(model, PROMPTS)
    assert ended[0] == free[0][:4]
    for ids, whole in zip(ended, free):
        stop = next((i + 1 for i, token in enumerate(whole) if token in model.generation_config.eos_token_id), 12)
        assert ids == whole[:stop]


def test_the_end_of_turn_ends_a_chat_answer():
    model, tokenizer = wild_model(), byte_tokenizer()
    free = batch(model, ["Why?"])[0]
    end = tokenizer.convert_ids_to_tokens(free[4])
    tokenizer.add_special_tokens({"additional_special_tokens": [end]})
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '" + end + "' }}{% endfor %}"
    encoder = TextEncoder(tokenizer)
    prompt = ENCODER.prompt("Why?")
    options = {"max_new_tokens": 12, "temperatures": [0.0], "seeds": [[0]]}
    first = free.index(free[4]) + 1
    assert generate_batch(model, encoder, [prompt], chat=True, **options) == [free[:first]]
    assert generate_batch(model, encoder, [prompt], chat=False, **options) == [free]


def test_samples_follow_the_seed(saved):
    model, _ = saved
    one, again, other = (
        generate(model, TOKENIZER, "Why?", max_new_tokens=12, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    )
    assert one == again != other


def test_a_sample_does_not_depend_on_its_batch():
    model = wild_model()
    together = batch(model, PROMPTS, temperature=3.0)
    alone = [batch(model, [text], temperature=3.0, seeds=[[0, i]])[0] for i, text in enumerate(PROMPTS)]
    assert together == alone
    same_prompt = batch(model, ["Why?"] * 4, temperature=3.0)
    assert len({tuple(ids) for ids in same_prompt}) == 4


def test_samples_follow_the_softmax_at_the_temperature():
    model, count = tiny_model(initializer_range=0.3).eval(), 4000
    prompt = ENCODER.prompt("Why?")
    scores = model(torch.tensor([prompt])).logits[0, -1].double() / 0.5
    expected = scores.softmax(0)
    drawn = torch.zeros_like(expected)
    for answer in batch(model, ["Why?"] * count, temperature=0.5, count=1):
        drawn[answer[0]] += 1 / count
    top = expected.topk(5).indices
    for token in top.tolist():
        p = expected[token].item()
        assert drawn[token].item() == pytest.approx(p, abs=4.5 * math.sqrt(p * (1 - p) / count))
    assert expected[top].max() > 0.03  # otherwise the bounds above would be too weak


def test_the_models_sampling_settings_have_no_effect():
    model = wild_model()
    free = batch(model, PROMPTS)
    model.generation_config = own = GenerationConfig(
        do_sample=True, top_k=1, repetition_penalty=5.0, suppress_tokens=[free[0][0]], eos_token_id=2
    )
    assert batch(model, PROMPTS) == free
    assert model.generation_config is own


def test_chat_wraps_the_prompt(saved):
    model, _ = saved
    wrapped = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True
    )
    answer = generate(model, TOKENIZER, "Why?", max_new_tokens=8, chat=True)
    assert answer == generate(model, TOKENIZER, wrapped, max_new_tokens=8)
    assert answer != generate(model, TOKENIZER, "Why?", max_new_tokens=8)


def said(model, messages, count=6):
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = by_hand(model, ENCODER.prompt(text), count)
    return TOKENIZER.decode(ids, skip_special_tokens=True).strip(), len(ids)


def user(text):
    return {"role": "user", "content": text}


def test_alpaca_eval_reads_instruction_output_and_generator(saved, tmp_path, capsys):
    model, folder = saved
    records = [
        {"dataset": "helpful_base", "instruction": "Why?", "output": "the baseline's", "generator": "baseline"},
        {"messages": [{"role": "system", "content": "Be brief."}, user("Name a fruit.")]},
        {"prompt": "A raw text"},
    ]
    entries = answer_file(tmp_path, folder, records, "alpaca_eval", "--name", "mine")
    raw = by_hand(model, ENCODER.prompt("A raw text"), 6)
    assert entries == [
        {
            "dataset": "helpful_base",
            "instruction": "Why?",
            "output": said(model, [user("Why?")])[0],
            "generator": "mine",
        },
        {"instruction": "Name a fruit.", "output": said(model, records[1]["messages"])[0], "generator": "mine"},
        {
            "instruction": "A raw text",
            "output": TOKENIZER.decode(raw, skip_special_tokens=True).strip(),
            "generator": "mine",
        },
    ]
    assert "3 prompts answered" in capsys.readouterr().err


def test_chat_makes_prompts_of_a_file_messages(saved, tmp_path):
    model, folder = saved
    (entry,) = answer_file(tmp_path, folder, [{"prompt": "Why?"}], "alpaca_eval", "--chat")
    assert entry == {"instruction": "Why?", "output": said(model, [user("Why?")])[0], "generator": folder}


def test_a_json_list_is_read_as_well(saved, tmp_path):
    _, folder = saved
    (tmp_path / "p.json").write_text(json.dumps([{"instruction": text} for text in PROMPTS], indent=1))
    out = tmp_path / "a.json"
    main(["--model", folder, "--prompts", str(tmp_path / "p.json"), "--out", str(out), "--max_new_tokens", "2"])
    assert [entry["instruction"] for entry in json.loads(out.read_text())] == PROMPTS


def test_arena_hard_2_reads_uid_model_and_messages(saved, tmp_path):
    model, folder = saved
    record = {"uid": "u1", "category": "hard_prompt", "subcategory": "x", "prompt": "Why?"}
    (entry,) = answer_file(tmp_path, folder, [record], "arena_hard", "--name", "mine")
    assert isinstance(entry.pop("ans_id"), str) and abs(entry.pop("tstamp") - time.time()) < 600
    answer = {"role": "assistant", "content": {"answer": said(model, [user("Why?")])[0]}}
    assert entry == {"uid": "u1", "model": "mine", "messages": [user("Why?"), answer]}


def test_mt_bench_answers_the_second_turn_after_the_first(saved, tmp_path):
    model, folder = saved
    records = [
        {"question_id": 81 + i, "category": "math", "turns": turns, "reference": ["x"]}
        for i, turns in enumerate([["Why?", "And then?"], ["Name a fruit.", "Another one."], ["Only one"]])
    ]
    entries = answer_file(tmp_path, folder, records, "mt_bench", "--name", "mine", "--batch_size", "2")
    for record, entry in zip(records, entries):
        first, *rest = record["turns"]
        answers = [said(model, [user(first)])[0]]
        for text in rest:
            history = [user(first), {"role": "assistant", "content": answers[0]}, user(text)]
            answers.append(said(model, history)[0])
        assert entry.pop("answer_id") and entry.pop("tstamp")
        assert entry == {
            "question_id": record["question_id"],
            "model_id": "mine",
            "choices": [{"index": 0, "turns": answers}],
        }


def test_mt_bench_uses_the_categorys_temperature(saved, tmp_path):
    _, folder = saved
    records = [
        {"question_id": i, "category": category, "turns": ["Why?"]}
        for i, category in enumerate(["math", "math", "writing", "writing", "other"])
    ]
    turns = [e["choices"][0]["turns"][0] for e in answer_file(tmp_path, folder, records, "mt_bench")]
    assert turns[0] == turns[1] and len({*turns}) == 4
    cold = answer_file(tmp_path, folder, records, "mt_bench", "--temperature", "0", name="cold")
    assert len({e["choices"][0]["turns"][0] for e in cold}) == 1


def test_an_interrupted_run_leaves_no_file(saved, tmp_path, monkeypatch):
    def stops(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(answers, "generate_batch", stops)
    with pytest.raises(SystemExit, match="130"):
        answer_file(tmp_path, saved[1], [{"prompt": "Why?"}], "alpaca_eval")
    assert not [*tmp_path.glob("answers*")]


USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER | {"content": [{"type": "text", "text": "Why?"}]}]},
        {"conversations": [{"from": "human", "value": "Why?"}]},
        {"prompt": [USER]},
    ],
)
def test_conversations_of_every_form_are_answered(saved, tmp_path, record):
    _, folder = saved
    (expected,) = answer_file(tmp_path, folder, [{"messages": [USER]}], "alpaca_eval")
    assert expected["instruction"] == "Why?"
    assert answer_file(tmp_path, folder, [record], "alpaca_eval", name="other") == [expected]


@pytest.mark.parametrize(
    ("record", "form", "message"),
    [
        (
            {"text": "a"},
            "alpaca_eval",
            r"p.jsonl:1: neither messages, turns, instruction nor prompt \(keys found: 'text'",
        ),
        ({"instruction": "a", "input": "b"}, "alpaca_eval", "p.jsonl:1: 'input' is not read"),
        ({"prompt": "a", "system": "b"}, "alpaca_eval", "p.jsonl:1: 'system' is not read"),
        ({"turns": ["a", "b"]}, "alpaca_eval", "2 turns, but alpaca_eval has one"),
        ({"turns": ["a"]}, "mt_bench", "'question_id' is missing, which mt_bench needs"),
        ({"question_id": 1, "turns": []}, "mt_bench", "'turns' must be a list with at least one"),
        (
            {"question_id": 1, "turns": [3]},
            "mt_bench",
            "'turns' must hold text or messages; each message needs a role and a content",
        ),
        ({"uid": "a", "instruction": "b"}, "arena_hard", "'prompt' is missing, which arena_hard needs"),
        ({"prompt": "a"}, "arena_hard", "'uid' is missing"),
        ({"prompt": 3}, "alpaca_eval", "'prompt' must hold text or messages"),
        ({"messages": "a"}, "alpaca_eval", "each message needs a role and a content"),
        ({"messages": [USER, ANSWER]}, "alpaca_eval", "ends with an assistant message"),
        ({"messages": [USER | {"role": "human"}]}, "alpaca_eval", "p.jsonl:1: the role 'human' is not one of"),
        ({"messages": [USER], "tools": [{"name": "f"}]}, "alpaca_eval", "p.jsonl:1: has 'tools', which the"),
        ({"messages": [USER | {"content": [{"type": "image"}]}]}, "alpaca_eval", "has a part of type 'image'"),
        (3, "alpaca_eval", "p.jsonl:1: must be a JSON object"),
        ({"prompt": "a" * 60}, "alpaca_eval", "p.jsonl:1: the prompt has 61 tokens, which leaves fewer than 6 of the"),
    ],
)
def test_a_bad_record_is_named(tmp_path, capsys, record, form, message):
    wild_model(max_position_embeddings=64).save_pretrained(tmp_path / "m")
    TOKENIZER.save_pretrained(tmp_path / "m")
    prompts = write_jsonl(tmp_path / "p.jsonl", [record])
    with pytest.raises(SystemExit, match="2"):
        main(
            [
                "--model",
                str(tmp_path / "m"),
                "--prompts",
                prompts,
                "--out",
                str(tmp_path / "o"),
                "--format",
                form,
                "--max_new_tokens",
                "6",
            ]
        )
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert not (tmp_path / "o").exists()


def test_bad_files_and_options_are_named(saved, tmp_path, capsys):
    _, folder = saved
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "a"}])
    (tmp_path / "there.json").write_text("kept")
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "broken.json").write_text('[{"prompt": "a"}, ')
    for words, message in (
        (["--prompts", prompts, "--out", str(tmp_path / "there.json")], "there.json exists; choose another file"),
        (["--prompts", prompts, "--out", str(tmp_path / "no/o.json")], "there is no folder"),
        (["--prompts", str(tmp_path / "none"), "--out", str(tmp_path / "o")], "none: no such file"),
        (["--prompts", str(tmp_path), "--out", str(tmp_path / "o")], "is a folder; give a file"),
        (["--prompts", str(tmp_path / "empty.jsonl"), "--out", str(tmp_path / "o")], "holds no record"),
        (["--prompts", str(tmp_path / "broken.json"), "--out", str(tmp_path / "o")], "not a JSON list"),
        (["--prompts", prompts], "--prompts and --out belong together"),
        (["--prompt", "a", "--prompts", prompts], "not allowed with"),
        (["--prompt", "a", "--temperature", "-1"], "must be at least 0"),
        (["--prompt", "a", "--temperature", "nan"], "must be at least 0, and finite"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["--model", folder, *words])
        assert message in capsys.readouterr().err
    assert (tmp_path / "there.json").read_text() == "kept"


@pytest.mark.parametrize("more", [[], ["--reflect"]])
def test_answer_takes_the_positions_that_the_model_has(saved, more, capsys):
    model, folder = saved
    model.config.max_position_embeddings = 64
    model.config.save_pretrained(folder)
    main(["--model", folder, "--prompt", "Why?", *more])
    assert capsys.readouterr().out


def test_all_turns_share_the_models_positions(saved, tmp_path, capsys):
    model, folder = saved
    model.config.max_position_embeddings = 256
    model.config.save_pretrained(folder)
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"question_id": 1, "turns": ["Why?", "Go on. " * 10]}])
    command = ["--model", folder, "--prompts", prompts, "--out", str(tmp_path / "o"), "--format", "mt_bench"]
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--max_new_tokens", "100"])
    assert "fewer than 100 of the model's 256 positions for each answer; lower" in capsys.readouterr().err
    main(command)
    answers = json.loads((tmp_path / "o").read_text())["choices"][0]["turns"]
    assert len(answers) == 2 and "max_new_tokens=100" not in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_named(saved, tmp_path, monkeypatch, capsys):
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Why?"}])
    command = ["--model", saved[1], "--prompts", prompts, "--max_new_tokens", "6", "--out"]
    with pytest.raises(SystemExit, match="2"):  # before the model is loaded
        main([*command, "/proc/answers.json"])
    assert "--out /proc/answers.json: cannot be written to" in capsys.readouterr().err

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(exports, "write_answers", full)
    with pytest.raises(SystemExit, match="1"):
        main([*command, str(tmp_path / "o")])
    assert "error: " in (error := capsys.readouterr().err) and "No space left on device" in error


def test_answers_that_are_cut_off_are_counted(saved, tmp_path, capsys):
    _, folder = saved
    answer_file(tmp_path, folder, [{"prompt": text} for text in PROMPTS], "alpaca_eval")
    assert "5 answers have --max_new_tokens=6 tokens and may be cut off" in capsys.readouterr().err


def test_a_missing_model_is_named(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        main(["--model", str(tmp_path / "nothing"), "--prompt", "Why?"])
    assert stopped.value.code == 2
    assert "nothing" in capsys.readouterr().err


def test_a_template_that_drops_the_question_is_refused(saved):
    model, _ = saved
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages if m.role == 'assistant' %}{{ m.content }}{% endfor %}A:"
    with pytest.raises(InputError, match="--prompt: the chat template drops text of a message"):
        generate(model, tokenizer, "Why?", chat=True)


def test_a_model_that_never_ends_is_refused():
    model, tokenizer = wild_model(), byte_tokenizer()
    model.generation_config.eos_token_id = tokenizer.eos_token = None
    with pytest.raises(InputError, match=r"neither the tokenizer nor generation_config\.json has an EOS token"):
        generate(model, tokenizer, "Why?")


def test_tokens_that_the_model_lacks_are_named(saved, capsys):
    _, folder = saved
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(folder)
    with pytest.raises(SystemExit, match="2"):
        main(["--model", folder, "--prompt", "a <tool>", "--max_new_tokens", "4"])
    assert "'<tool>' with the id 259, but the model's vocabulary ends at 258" in capsys.readouterr().err


def test_answers_that_stdout_cannot_encode_are_escaped(saved, monkeypatch):
    monkeypatch.setattr("training.generate.answer_questions", lambda *given, **more: [["d\u00e9j\u00e0"]])
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        main(["--model", saved[1], "--prompt", "Why?"])
        monkeypatch.undo()
        stream.flush()
        assert raw.getvalue() == b"d\\xe9j\\xe0\n"

"""Test answers given a draft: the layout of training, the command line, and the comparison with best-of-two."""

from __future__ import annotations

import json

import pytest
import torch
from helpers import write_jsonl
from test_boundaries import CHATML
from test_generate import ENCODER, PROMPTS, TOKENIZER, by_hand, saved, wild_model  # noqa: F401  # saved is a fixture

import inspo_kernels as ik
from training.answers import generate_batch, reflect_batch
from training.chat import TextEncoder
from training.demo.answers import best_of_two
from training.generate import main
from training.model import byte_tokenizer


def settings(temperature=0.0, count=12, prompts=PROMPTS):
    return {
        "max_new_tokens": count,
        "temperatures": [temperature] * len(prompts),
        "chat": False,
        "seeds": [[7, i, 0] for i in range(len(prompts))],
    }


def test_the_answer_follows_the_draft_as_in_training():
    model, ids = wild_model(), [ENCODER.prompt(text) for text in PROMPTS]
    ended = by_hand(model, ids[0], 12)[3]
    model.generation_config.eos_token_id = [2, ended]  # some drafts end, others are cut
    drafts = generate_batch(model, ENCODER, ids, **settings())
    found = reflect_batch(model, ENCODER, ids, separator=[40, 41], **settings())
    assert [draft for draft, _ in found] == drafts
    assert {draft[-1] in (2, ended) for draft in drafts} == {True, False}
    for prompt, (draft, answer) in zip(ids, found, strict=True):
        whole = draft if draft[-1] in (2, ended) else [*draft, 2]
        laid_out = ik.condition_pairs([(prompt, answer, whole)], pad_token_id=0, separator_ids=[40, 41])
        row = laid_out["input_ids"][0].tolist()
        assert answer == by_hand(model, row[: -len(answer)], 12, ends=(2, ended))


def test_best_of_two_keeps_the_likelier_draft():
    model, ids = wild_model(), [ENCODER.prompt(text) for text in PROMPTS]
    kept = best_of_two(model, ENCODER, ids, **settings(temperature=1.0))
    common = settings(temperature=1.0)
    first = generate_batch(model, ENCODER, ids, **common)
    second = generate_batch(model, ENCODER, ids, **{**common, "seeds": [[*seed, 2] for seed in common["seeds"]]})
    assert first != second and any(a != b for a, b in zip(kept, first)) and any(a == b for a, b in zip(kept, first))
    for prompt, best, tries in zip(ids, kept, zip(first, second)):

        def by_log_softmax(answer, prompt=prompt):
            logps = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            return logps.gather(1, torch.tensor(answer)[:, None]).mean().item()

        assert best == max(tries, key=by_log_softmax)


def test_the_command_line_prints_draft_and_answer(saved, capsys):  # noqa: F811
    model, folder = saved
    prompt = ENCODER.prompt("Why?")
    draft = by_hand(model, prompt, 8)
    answer = by_hand(model, [*prompt, *draft, *([] if draft[-1] == 2 else [2])], 8)
    main(["--model", folder, "--prompt", "Why?", "--max_new_tokens", "8", "--reflect"])
    texts = [TOKENIZER.decode(ids, skip_special_tokens=True).strip() for ids in (draft, answer)]
    assert capsys.readouterr().out == f"draft: {texts[0]}\n\nanswer given the draft: {texts[1]}\n"


def test_out_gets_one_line_per_answer(saved, tmp_path):  # noqa: F811
    model, folder = saved
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in PROMPTS])
    out = tmp_path / "out.jsonl"
    command = ["--model", folder, "--prompts", prompts, "--max_new_tokens", "6", "--batch_size", "2", "--reflect"]
    main([*command, "--out", str(out)])
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == PROMPTS
    ids = [ENCODER.prompt(text) for text in PROMPTS]
    for row, found in zip(rows, reflect_batch(model, ENCODER, ids, **settings(count=6)), strict=True):
        texts = [TOKENIZER.decode(part, skip_special_tokens=True).strip() for part in found]
        assert [row["draft"], row["answer"]] == texts


def test_a_chat_turn_between_draft_and_answer(tmp_path, capsys):
    tokenizer, model = byte_tokenizer(), wild_model()
    tokenizer.chat_template = CHATML
    model.save_pretrained(tmp_path / "final")
    tokenizer.save_pretrained(tmp_path / "final")
    encoder = TextEncoder(tokenizer)
    prompt = encoder.prompt(encoder.render([{"role": "user", "content": "Why?"}], answer_next=True, origin=""))
    separator = encoder.separator("Again.")
    (found,) = reflect_batch(
        model, encoder, [prompt], separator=separator, max_new_tokens=6, temperatures=[0.0], seeds=[[0]], chat=True
    )
    main(
        [
            "--model",
            str(tmp_path / "final"),
            "--prompt",
            "Why?",
            "--chat",
            "--max_new_tokens",
            "6",
            "--reflect",
            "--alternative",
            "chat",
            "--alternative_instruction",
            "Again.",
        ]
    )
    texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in found]
    assert capsys.readouterr().out == f"draft: {texts[0]}\n\nanswer given the draft: {texts[1]}\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--reflect", "--format", "mt_bench"], "leave --format out"),
        (["--alternative", "chat"], "--alternative is for --reflect"),
    ],
)
def test_options_that_would_be_ignored_are_refused(capsys, more, message):
    with pytest.raises(SystemExit) as error:
        main(["--model", "m", "--prompts", "p", "--out", "o", *more])
    assert error.value.code == 2 and message in capsys.readouterr().err


def test_reflect_refuses_several_turns(saved, tmp_path, capsys):  # noqa: F811
    prompts = write_jsonl(tmp_path / "p.jsonl", [{"turns": ["Why?", "And then?"]}])
    with pytest.raises(SystemExit, match="2"):
        main(["--model", saved[1], "--prompts", prompts, "--out", str(tmp_path / "o"), "--reflect"])
    assert "p.jsonl:1: 2 turns, but --reflect answers a single turn" in capsys.readouterr().err


def test_draft_and_answer_must_fit_the_models_positions(tmp_path, capsys):
    wild_model(max_position_embeddings=30).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        main(["--model", str(tmp_path), "--prompt", "four", "--max_new_tokens", "13", "--reflect"])
    error = capsys.readouterr().err
    assert "fewer than 13 of the model's 30 positions for each answer; lower --max_new" in error
    main(["--model", str(tmp_path), "--prompt", "four", "--max_new_tokens", "12", "--reflect"])

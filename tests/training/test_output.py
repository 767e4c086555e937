"""Test what a run writes: curves, samples, the best model, trackers and the model card."""

from __future__ import annotations

import io
import json
import re
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from helpers import PAIRS, metrics, options, tiny_model, token_pairs
from huggingface_hub import ModelCard
from matplotlib.figure import Figure
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers.integrations import TensorBoardCallback

import inspo_kernels as ik
import training.reporting
import training.resumable
from training import output
from training.checkpoint import check_checkpoint
from training.config import TrainConfig
from training.errors import InputError
from training.evaluation import is_better, sample_answers
from training.model import byte_tokenizer
from training.scoring import PairModel
from training.train import main, train
from training.trainer import PairTrainer

RUN = [
    "--max_steps",
    "4",
    "--eval_data",
    str(PAIRS),
    "--eval_steps",
    "1",
    "--logging_steps",
    "1",
    "--learning_rate",
    "3e-2",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(options(folder, *RUN, "--save_steps", "1", "--save_total_limit", "9", "--report_to", "tensorboard"))
    return folder


def test_tensorboard_shows_the_numbers_of_the_rows(finished, monkeypatch):
    (events,) = finished.rglob("events.out.tfevents.*")
    shown = EventAccumulator(str(events), size_guidance={"scalars": 0})
    shown.Reload()
    rows = metrics(finished)
    for name, tag in (
        ("loss", "train/loss"),
        ("eval_loss", "eval/loss"),
        ("grad_norm", "train/grad_norm"),
        ("eval_marginal/rewards/margins", "eval/marginal/rewards/margins"),
    ):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        found = [(event.step, event.value) for event in shown.Scalars(tag)]
        assert [step for step, _ in found] == [step for step, _ in expected], name
        assert [value for _, value in found] == pytest.approx([value for _, value in expected], rel=1e-5)


def test_a_missing_tracker_is_an_early_error(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # a folder like wandb's in the working directory, which is not a package
    monkeypatch.chdir(tmp_path)
    for name in ("trackio", "wandb"):
        with pytest.raises(InputError, match=rf"report_to={name}: .* pip install {name}"):
            TrainConfig(model="nowhere", train_data="none.jsonl", output_dir=str(tmp_path / "out"), report_to=name)


@pytest.mark.parametrize("kind", [OSError, ImportError])
def test_curves_are_drawn_and_failures_are_not_fatal(tmp_path, monkeypatch, capsys, kind):
    def draw(rows, title, file):
        drawn.append(rows[-1]["step"])
        raise kind("no space")

    drawn = []
    monkeypatch.setattr(output, "plot_curves", draw)
    main(options(tmp_path / "out", *RUN))
    assert drawn == [0, 1, 2, 3, 4]
    assert "curves.png could not be written: no space" in capsys.readouterr().out


def test_plain_runs_without_evaluation_have_curves(tmp_path, curves):
    main(options(tmp_path / "out", "--objective", "sft", "--conditioned", "false", "--logging_steps", "1"))
    assert (tmp_path / "out/curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_cut_off_by_a_full_disk_go(tmp_path, curves, monkeypatch):
    def full(figure, file, **settings):
        Path(file).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        output.plot_curves([{"step": 1, "loss": 0.5}], "title", tmp_path / "curves.png")
    assert not [*tmp_path.iterdir()]


def test_the_best_model_has_the_best_evaluation(finished):
    rows = [row for row in metrics(finished) if row["step"] and "eval_loss" in row]

    def best_of(some):
        return max(some, key=lambda row: [row[f"eval_marginal/rewards/{kind}"] for kind in ("accuracies", "margins")])

    step = best_of(rows)["step"]
    best = AutoModelForCausalLM.from_pretrained(finished / "best").state_dict()
    at_step = load_file(finished / f"checkpoint-{step}" / "model.safetensors")
    assert all(torch.equal(best[name.removeprefix("model.")], tensor) for name, tensor in at_step.items())
    assert f"After step {step}, on held-out pairs" in (finished / "best" / "README.md").read_text()
    assert check_checkpoint(finished / "checkpoint-4")["best"] == best_of(rows)


def test_the_best_model_has_best_prompt_only_accuracy():
    def row(step, accuracy, margin, **more):
        return {
            "step": step,
            "eval_marginal/rewards/accuracies": accuracy,
            "eval_marginal/rewards/margins": margin,
            **more,
        }

    best = row(1, 0.6, 0.5, eval_loss=0.1)
    assert is_better(best, None) and not is_better(row(0, 0.9, 0.9), None)
    assert is_better(row(2, 0.7, 0.1, eval_loss=9.0), best)
    assert is_better(row(2, 0.6, 0.6), best)
    assert not is_better(row(2, 0.6, 0.5, eval_loss=0.0), best)
    assert not is_better(row(2, 0.5, 9.0) | {"eval_conditioned/rewards/accuracies": 1.0}, best)


def test_a_best_model_that_cannot_be_written_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    original = training.reporting.model_card
    calls = iter(range(99))

    def fail_first(*given, **more):
        if next(calls) == 0:
            raise OSError("full")
        return original(*given, **more)

    monkeypatch.setattr(training.reporting, "model_card", fail_first)
    main(options(tmp_path / "out", *RUN))
    assert "best could not be written: full; the run goes on" in capsys.readouterr().out
    assert (tmp_path / "out" / "best").is_dir() and (tmp_path / "out" / "final").is_dir()


def test_no_best_model_without_evaluation(tmp_path):
    main(options(tmp_path / "a", *RUN, "--keep_best", "false"))
    main(options(tmp_path / "b"))
    assert not (tmp_path / "a" / "best").exists() and not (tmp_path / "b" / "best").exists()


def test_samples_are_greedy_answers_to_held_out_prompts(finished):
    rows = [json.loads(line) for line in (finished / "samples.jsonl").open()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert {row["prompt"] for row in rows} == {json.loads(PAIRS.open().readline())["prompt"]}
    model, tokenizer = (c.from_pretrained(finished / "final") for c in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(rows[-1]["prompt"], return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=4, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert rows[-1]["answer"] == tokenizer.decode(expected, skip_special_tokens=True)
    last = [row for row in metrics(finished) if "eval_samples/tokens" in row][-1]
    assert last["eval_samples/tokens"] == rows[-1]["tokens"] == len(expected)
    assert last["eval_samples/ended"] == rows[-1]["ended"] == 0


def test_answers_stop_at_ends_and_last_position():
    module, tokenizer = PairModel(tiny_model(max_position_embeddings=12).eval(), ik.DPO()), byte_tokenizer()
    module.model.generation_config.repetition_penalty = 5.0  # of another use: samples are plain greedy answers
    (long,) = sample_answers(module, [[1, 5, 6]], tokenizer, ends={2}, max_new_tokens=50)
    assert long["tokens"] == 9 and not long["ended"]
    ids = [1, 5, 6]
    with torch.no_grad():
        first = module.model(torch.tensor([ids])).logits[0, -1].argmax().item()
    (short,) = sample_answers(module, [ids], tokenizer, ends={2, first}, max_new_tokens=50)
    assert short["tokens"] == 1 and short["ended"]


def test_the_model_card_describes_the_run(finished):
    card = ModelCard.load(finished / "final" / "README.md")
    assert card.data.base_model is None and card.data.library_name == "transformers"  # a base made of random weights
    evaluations = [row for row in metrics(finished) if "eval_loss" in row]
    for row in (evaluations[0], evaluations[-1]):
        low, high = row["eval_marginal/rewards/accuracies_ci"]
        assert f"{row['eval_marginal/rewards/accuracies']:.3f} ({low:.3f} to {high:.3f})" in card.text
        assert f"{row['eval_loss']:.4f}" in card.text
    facts = [
        "a model built on the spot with random weights",
        "24 pairs",
        "4 of 4 steps",
        "learning_rate: 0.03",
        "objective: dpo",
        "before training",
        f"torch {torch.__version__}",
        "python -m training.generate --model FOLDER",
    ]
    for fact in facts:
        assert fact in card.text, fact
    assert str(finished) not in card.text


def test_a_card_without_evaluation_claims_nothing(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path / "out"), max_steps=1, conditioned=False)
    train(config, token_pairs(), model=tiny_model(), quiet=True)
    text = (tmp_path / "out" / "final" / "README.md").read_text()
    assert "The model was not evaluated" in text and "given in memory" in text and "prompt alone" in text
    assert "InSPO" not in ModelCard(text).text and "reward accuracy" not in text


def test_a_run_warns_once_and_at_the_end(tmp_path, capsys):
    """The learning rate is so large that a random model forgets both responses."""
    main(
        options(
            tmp_path / "out", *RUN, "--learning_rate", "1.0", "--lr_scheduler_type", "constant", "--warmup_steps", "0"
        )
    )
    lines = capsys.readouterr().out.splitlines()
    said = [i for i, line in enumerate(lines) if "the log-probs of both responses fall together" in line]
    first, last = (next(i for i, line in enumerate(lines) if f"eval at step {step}:" in line) for step in (1, 4))
    assert len(said) == 2 and first < said[0] < last < said[1]
    main(options(tmp_path / "calm", *RUN, "--learning_rate", "1e-4"))
    assert "fall together" not in capsys.readouterr().out


def test_a_run_resumed_elsewhere_keeps_a_best_model(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(training.reporting, "is_better", lambda row, best: best is None and row["step"] > 0)
    main(options(out, *RUN, "--resume_from_checkpoint", str(finished / "checkpoint-3")))
    assert "After step 4, on held-out pairs" in (out / "best" / "README.md").read_text()


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, capsys):
    def fail(self, args, state, *what, **more):
        calls.append(state.global_step)
        raise ConnectionError("the tracker's server is gone")

    calls = []
    monkeypatch.setattr(TensorBoardCallback, "on_log", fail)
    main(options(tmp_path / "out", "--logging_steps", "1", "--report_to", "tensorboard"))
    assert calls == [1] and [row["step"] for row in metrics(tmp_path / "out")] == [1, 2, 3]
    said = capsys.readouterr().out
    assert said.count("WARNING: TensorBoardCallback failed (ConnectionError: the tracker's server is gone)") == 1


def test_lines_are_flushed_and_write_errors_tolerated(monkeypatch):
    log = output.RunLog(None, quiet=False)
    raw = io.BytesIO()
    with io.TextIOWrapper(raw) as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        log.say("WARNING: at once")
        assert raw.getvalue().endswith(b" WARNING: at once\n")
        monkeypatch.undo()
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        log.say("nowhere")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()


def test_the_log_file_outlives_the_terminal(tmp_path, monkeypatch):
    log = output.RunLog(tmp_path, quiet=False)
    log.open("")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        log.say("kept")
        monkeypatch.undo()
        with suppress(OSError):
            full.close()
    assert (tmp_path / output.LOG).read_text().endswith(" kept\n")


def test_characters_that_stdout_lacks_are_escaped(tmp_path, monkeypatch):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        main(options(tmp_path / "\u00fcbung", "--max_steps", "1"))
        monkeypatch.undo()
        assert b"\\xfcbung/final" in raw.getvalue()
    assert "\u00fcbung" in (tmp_path / "\u00fcbung/log.txt").read_text()


def test_log_lines_have_times_and_a_file(tmp_path, capsys):
    main(options(tmp_path / "out", "--logging_steps", "1"))
    lines = capsys.readouterr().out.splitlines()
    (line,) = (line for line in lines if "step     2/3" in line)
    assert any(re.search(r"checkpoint-3: 0\.00 GiB in \d\.\d s", line) for line in lines)  # what a launcher must wait
    assert re.match(r"\d\d:\d\d:\d\d step", line) and re.search(r"\| \d\d:\d\d elapsed, \d\d:\d\d left$", line)
    kept = (tmp_path / "out/log.txt").read_text().splitlines()
    assert line in [row.split(" ", 1)[-1] for row in kept] and "output_dir=" in kept[0]
    assert [len(row["time"]) for row in metrics(tmp_path / "out")] == [19] * 3


def test_the_trained_model_alone_is_uploaded(tmp_path, monkeypatch, capsys):
    """There is no hub: the test records what would be sent."""
    sent = []
    monkeypatch.setattr(PairTrainer, "init_hf_repo", lambda self, token=None: setattr(self, "hub_model_id", "me/mine"))
    monkeypatch.setattr(training.resumable, "upload_folder", lambda **given: sent.append(given))
    main(options(tmp_path / "out", "--push_to_hub", "true", "--hub_model_id", "me/mine", "--save_steps", "1"))
    assert [(one["repo_id"], one["folder_path"]) for one in sent] == [("me/mine", tmp_path / "out/final")]

    def fail(**given):
        raise ConnectionError("no network")

    monkeypatch.setattr(training.resumable, "upload_folder", fail)
    main(options(tmp_path / "two", "--push_to_hub", "true"))
    assert "could not be uploaded (ConnectionError: no network)" in capsys.readouterr().out
    assert (tmp_path / "two/final").is_dir()


def test_a_failing_hub_repository_is_refused_early(tmp_path, monkeypatch, capsys):
    def fail(*given, **more):
        raise ConnectionError("no network")

    monkeypatch.setattr(Trainer, "init_hf_repo", fail)
    with pytest.raises(SystemExit, match="2"):
        main(options(tmp_path / "out", "--push_to_hub", "true", "--hub_model_id", "me/mine"))
    assert "push_to_hub: the repository could not be created: no network; log in" in capsys.readouterr().err
    assert not (tmp_path / "out/metrics.jsonl").exists()


def test_a_full_disk_at_the_start_names_the_file(tmp_path, capsys):
    (tmp_path / "out/config.yaml").mkdir(parents=True)
    with pytest.raises(SystemExit, match="1"):
        main(options(tmp_path / "out"))
    assert str(tmp_path / "out/config.yaml") in capsys.readouterr().err

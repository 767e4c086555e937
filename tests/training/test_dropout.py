"""Test alternative_dropout in a run: between InSPO and plain, with draws that do not depend on how the run executes."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from helpers import metrics, options, tiny_model, token_pairs, without_timings
from transformers import AutoModelForCausalLM

from inspo_kernels.layouts.alternative_dropout import keeps_alternative
from training.batching import Batcher
from training.config import TrainConfig
from training.errors import InputError
from training.options import parse_config
from training.train import main, train

COUNT = 10
OPTIONS = {
    "max_steps": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_batch_tokens": 90,
    "seed": 3,
}


def run(pairs=None, **given):
    pairs = token_pairs(COUNT) if pairs is None else pairs
    config = TrainConfig(**{**OPTIONS, **given})
    return train(config, pairs, eval_pairs=token_pairs(4, seed=5), model=tiny_model(), quiet=True)


def same_run(one, other, ignored=()):
    rows = (
        [
            [{k: v for k, v in row.items() if not k.startswith(ignored)} for row in without_timings(r.metrics)]
            for r in (one, other)
        ]
        if ignored
        else [without_timings(r.metrics) for r in (one, other)]
    )
    weights = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    return rows[0] == rows[1] and all(torch.equal(a, b) for a, b in weights)


@pytest.fixture
def trained_layouts(monkeypatch):
    """Return (pair, conditioned) of each training pass, read from the batches."""
    seen = []
    call = Batcher.__call__

    def spy(self, pairs, *, conditioned, marginals=True):
        batch = call(self, pairs, conditioned=conditioned, marginals=marginals)
        if torch.is_grad_enabled():
            seen.append(([tuple(pair.prompt + pair.chosen) for pair in pairs], set(batch["plain"])))
        return batch

    monkeypatch.setattr(Batcher, "__call__", spy)
    return seen


@pytest.mark.parametrize("layout", ["rows", "tree"])
def test_dropout_zero_is_inspo_and_one_the_baseline(layout):
    inspo, plain = run(layout=layout), run(layout=layout, conditioned=False)
    assert same_run(run(layout=layout, alternative_dropout=0), inspo)
    assert same_run(run(layout=layout, alternative_dropout=1), plain)
    assert same_run(run(layout=layout, alternative_dropout=1, reference_conditioned=True), plain)
    half = run(layout=layout, alternative_dropout=0.5)
    assert not same_run(half, inspo) and not same_run(half, plain)


def test_each_epoch_throws_new_coins_for_each_pair(trained_layouts):
    pairs = token_pairs(40)
    run(pairs, alternative_dropout=0.4, max_steps=30)  # three epochs of ten steps
    number = {tuple(pair[0] + pair[1]): index for index, pair in enumerate(pairs)}
    found = [
        (number[pair], position not in plain) for some, plain in trained_layouts for position, pair in enumerate(some)
    ]
    assert len(found) == 3 * 40
    for epoch in range(3):
        coins = dict(found[40 * epoch : 40 * (epoch + 1)])
        assert coins == {index: keeps_alternative(0.4, 3, epoch, index) for index in range(40)}
        assert 8 <= 40 - sum(coins.values()) <= 24
    assert len({tuple(sorted(found[40 * epoch : 40 * (epoch + 1)])) for epoch in range(3)}) == 3


def test_each_pairs_loss_follows_its_layout():
    pairs = token_pairs(8)
    options = {"objective": "simpo", "max_steps": 1, "per_device_train_batch_size": 8, "max_batch_tokens": 60}
    kept = [keeps_alternative(0.5, 3, 0, index) for index in range(8)]
    assert 0 < sum(kept) < 8
    alone = [
        run([pair], **{**options, "per_device_train_batch_size": 1}, conditioned=keeps).metrics
        for pair, keeps in zip(pairs, kept, strict=True)
    ]
    (found,) = [row for row in run(pairs, **options, alternative_dropout=0.5).metrics if "loss" in row]
    rows = [next(row for row in metrics if "loss" in row) for metrics in alone]
    for name in ("loss", "rewards/margins", "logps/chosen"):
        assert found[name] == pytest.approx(sum(row[name] for row in rows) / 8, rel=1e-5)
    for name in ("rewards/margins", "logps/rejected"):  # a plain pair's own are those from the prompt alone
        expected = sum(row[f"marginal/{name}" if keeps else name] for row, keeps in zip(rows, kept, strict=True)) / 8
        assert found[f"marginal/{name}"] == pytest.approx(expected, rel=1e-5)
    assert found["num_tokens"] == sum(row["num_tokens"] for row in rows)


@pytest.mark.parametrize("reference_conditioned", [True, False])
def test_each_pair_has_the_reference_of_its_layout(reference_conditioned):
    result = run(alternative_dropout=0.5, reference_conditioned=reference_conditioned, max_steps=1)
    loss = next(row["loss"] for row in result.metrics if "loss" in row)
    # The policy is the reference: the loss is ln 2 if and only if both see the same.
    assert (abs(loss - math.log(2)) < 1e-6) == reference_conditioned


@pytest.mark.parametrize(
    "reference", [[], ["--reference_conditioned", "true"]], ids=["plain reference", "two references"]
)
def test_resuming_within_an_epoch_gives_the_same_bits(tmp_path, reference):
    more = [
        "--alternative_dropout",
        "0.5",
        "--per_device_train_batch_size",
        "5",
        "--save_steps",
        "2",
        "--logging_steps",
        "1",
        "--save_total_limit",
        "9",
        "--layout",
        "rows",
        *reference,
    ]
    main(options(tmp_path / "whole", *more, "--max_steps", "8"))  # an epoch is five steps
    for step in (2, 6):
        out = tmp_path / f"from {step}"
        shutil.copytree(tmp_path / "whole" / f"checkpoint-{step}", out / f"checkpoint-{step}")
        main(options(out, *more, "--max_steps", "8", "--resume_from_checkpoint", "auto"))
        one, other = (
            AutoModelForCausalLM.from_pretrained(run / "final").state_dict() for run in (tmp_path / "whole", out)
        )
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert without_timings(metrics(out)) == without_timings(metrics(tmp_path / "whole"))


def test_another_share_is_another_run(tmp_path, capsys):
    main(options(tmp_path / "out", "--alternative_dropout", "0.5", "--save_steps", "2"))
    shutil.rmtree(tmp_path / "out" / "final")
    with pytest.raises(SystemExit):
        main(options(tmp_path / "out", "--alternative_dropout", "0.25", "--resume_from_checkpoint", "auto"))
    assert "alternative_dropout was 0.5, is 0.25" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"alternative_dropout": -0.1}, "alternative_dropout must be in 0..1, got -0.1"),
        ({"alternative_dropout": 1.01}, "alternative_dropout must be in 0..1"),
        ({"alternative_dropout": math.nan}, "alternative_dropout must be a finite number"),
        ({"alternative_dropout": 0.5, "conditioned": False}, "alternative_dropout needs conditioned=true"),
        ({"alternative_dropout": 0.5, "marginal_weight": 1.0}, "needs marginal_weight=0"),
        ({"alternative_dropout": 0.5, "objective": "orpo"}, "needs marginal_weight=0, and sft=chosen"),
        ({"alternative_dropout": 1, "objective": "orpo", "sft": "marginal"}, "needs marginal_weight=0, and sft=chosen"),
    ],
)
def test_unsupported_dropout_options_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(**given)


def test_orpo_that_fits_the_chosen_response_takes_dropout():
    config = parse_config(
        [
            "--model",
            "m",
            "--train_data",
            "d",
            "--output_dir",
            "o",
            "--objective",
            "orpo",
            "--sft",
            "chosen",
            "--alternative_dropout",
            "0.25",
        ]
    )
    assert config.title.endswith("each response given the other, 25% of the pairs plain")
    result = run(objective="orpo", sft="chosen", alternative_dropout=0.5, max_steps=2)
    assert all(math.isfinite(row["marginal/rewards/margins"]) for row in result.metrics if "loss" in row)

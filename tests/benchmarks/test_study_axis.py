"""Test runs of the over-training study: dropped alternatives, checkpoints, the plan, the command."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from micro_study import MICRO_SIZE

from benchmarks.study import __main__ as command
from benchmarks.study import axis, execution, runs
from benchmarks.study import model as models
from benchmarks.study.arms import AXIS_ARMS
from benchmarks.study.axis import AXIS_PLANS, BASE, AxisJob, AxisPlan, axis_jobs
from benchmarks.study.runs import Example, Size
from benchmarks.study.world import Judge, encode

PLAN = AxisPlan(
    MICRO_SIZE,
    pairs=(8, 16),
    checkpoints=(1, 2),
    tested_updates=2,
    tested_seeds=3,
    seeds=1,
    arms=("plain", "inspo", "other", "dropout"),
)
EXAMPLES = [
    Example(encode("Rabc="), encode("cba$"), encode("a$"), (-1.0, -2.0), (encode("a$"), encode("cba$"))),
    Example(encode("Nab="), encode("bc~~$"), encode("c$"), (-3.0, -4.0), (encode("c$"), encode("bc~~$"))),
]


def trained(arm):
    """Return the weights after three updates of ``arm``."""
    model = models.build(16, 1, 0)
    objective = arm.make_objective(0.1)
    runs.train(model, EXAMPLES, arm, objective, learning_rate=1e-2, updates=3, update_pairs=2, seed=0)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_dropping_no_alternative_is_the_conditioned_arm():
    none = replace(AXIS_ARMS["dropout"], alternative_dropout=0.0)
    assert torch.equal(trained(none), trained(AXIS_ARMS["conditioned reference"]))


def test_dropping_every_alternative_is_the_plain_arm():
    every = trained(replace(AXIS_ARMS["dropout"], alternative_dropout=1.0))
    torch.testing.assert_close(every, trained(AXIS_ARMS["plain"]), rtol=1e-4, atol=1e-5)
    assert (every - trained(AXIS_ARMS["conditioned reference"])).abs().max() > 1e-3


def test_a_dropped_pair_is_laid_out_plain():
    batch = runs.training_batch(EXAMPLES, AXIS_ARMS["dropout"], [True, False])
    plain = runs.make_batch(EXAMPLES, conditioned=False)
    both = runs.make_batch(EXAMPLES, conditioned=True)
    width = plain["input_ids"].shape[1]
    for name in ("input_ids", "attention_mask", "position_ids", "labels"):
        for row in (0, 2):
            assert torch.equal(batch[name][row, :width], plain[name][row])
        for row in (1, 3):
            assert torch.equal(batch[name][row], both[name][row])
    assert not batch["attention_mask"][0, width:].any() and (batch["labels"][0, width:] == -100).all()
    assert batch["marginal_labels"] is None


def test_coins_differ_between_passes_and_pairs():
    arm = AXIS_ARMS["dropout"]
    coins = [[arm.drops_alternative(1, number, pair) for pair in range(200)] for number in range(3)]
    assert all(70 < sum(row) < 130 for row in coins) and coins[0] != coins[1]
    assert coins[0] == [arm.drops_alternative(1, 0, pair) for pair in range(200)]
    assert coins[0] != [arm.drops_alternative(2, 0, pair) for pair in range(200)]


def test_greedy_equals_low_temperature():
    model = models.build(16, 1, 0)
    for p in model.parameters():
        p.data.mul_(3)
    prompts = runs.draw_prompts((3,), training=8, validation=8, test=8, seed=0).test
    greedy = models.sample(model, prompts, count=1, seed=0, temperature=0)
    assert greedy == models.sample(model, prompts, count=1, seed=1, temperature=0)
    assert greedy == models.sample(model, prompts, count=1, seed=1, temperature=1e-6)
    with pytest.raises(ValueError, match="temperature must be 0"):
        models.sample(model, prompts, count=1, seed=0, temperature=-1.0)


def test_the_learning_rate_stays_so_checkpoints_are_prefixes(tmp_path):
    short = replace(PLAN, checkpoints=(2,))
    long = replace(PLAN, checkpoints=(2, 4))
    a, b = (AxisJob("inspo", 16, 7).execute(plan, tmp_path, "cpu") for plan in (short, long))
    assert a["checkpoints"][0] == b["checkpoints"][0] and len(b["checkpoints"]) == 2


def test_shuffled_alternatives_come_from_the_cells_pairs(tmp_path):
    begun = runs.start(MICRO_SIZE, 3, drafts=True, cache=tmp_path)
    few = begun.training[:8]
    mine = {answer for pair in few for answer in pair.answers}
    for example in runs.label(few, Judge(), AXIS_ARMS["other"].own_alternative):
        assert {runs.decode(ids) for ids in example.alternatives} <= mine


def test_a_run_that_ends_early_keeps_its_last_model(tmp_path, monkeypatch):
    monkeypatch.setattr(axis.runs, "train", lambda *_, **__: {"updates": 0, "tokens": 0, "finite": False})
    record = AxisJob("plain", 8, 7).execute(PLAN, tmp_path, "cpu")
    assert [point["updates"] for point in record["checkpoints"]] == [1, 2] and not record["finite"]


def test_the_planned_runs_are_those_of_the_protocol():
    plan = AXIS_PLANS["full"]
    jobs = [job for pairs in plan.pairs for job in axis_jobs(plan, pairs)]
    assert len(jobs) == len(set(jobs)) == 4 * 24 + 4 * 5 + 2 * 7 * 5
    assert {job.arm for job in jobs[: 4 * 24]} == {BASE, "plain", "inspo", "other"}
    assert {job.seed for job in jobs} == set(range(730_000, 730_024))
    text = " ".join((command.report.DOCS / "study_protocol.md").read_text().split())
    for words in (
        "24: 730000 to 730023",
        "5: 730000 to 730004",
        "{20, 40, 80, 160} updates",
        "learning rate is 3e-4, constant",
        "Beta is 0.1",
        "learning rate 1e-3",
        "160 updates of 32 pairs",
        "240 validation prompts and 400 test prompts",
    ):
        assert words in text
    size = plan.size
    assert (plan.learning_rate, plan.sft_learning_rate, plan.beta, size.update_pairs) == (3e-4, 1e-3, 0.1, 32)
    assert (size.validation_prompts, size.test_prompts, size.samples) == (240, 400, 2)
    assert replace(size, validation_prompts=160, test_prompts=240, samples=4) == Size()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ("plain", "none")}, "unknown arms"),
        ({"checkpoints": (1, 3)}, "checkpoints must ascend and hold 2"),
        ({"checkpoints": (2, 1)}, "checkpoints must ascend"),
        ({"pairs": (8, 48)}, "a seed has at most 24 pairs, fewer than 48"),
        ({"seeds": 0}, "at least one seed"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(PLAN, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alternative_dropout": 1.5}, "alternative_dropout must be within 0 and 1"),
        ({"alternative_dropout": -0.1}, "alternative_dropout must be within 0 and 1"),
        ({"marginal_weight": 1.0}, "no marginals to train on"),
        ({"conditioned": False}, "only conditioned sequences have an alternative"),
    ],
)
def test_an_arm_that_cannot_drop_alternatives_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(AXIS_ARMS["dropout"], **change)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--large", "--part", "axis"], "--large works only with the part arms"),
        (["--quick", "--workers", "0"], "--workers must be at least 1, got 0"),
        (["--part", "none"], "invalid choice"),
        (["--quick", "--part", "axis", "--report", "--output", "empty"], "does not hold two seeds of base, plain"),
    ],
)
def test_the_command_refuses_bad_options(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        command.main(arguments)
    assert left.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.sweep
def test_the_command_continues_after_a_kill(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(AXIS_PLANS, "quick", PLAN)
    arguments = ["--quick", "--part", "axis", "--workers", "1", "--output", "out"]
    command.main(arguments)
    jobs = sum(len(axis_jobs(PLAN, pairs)) for pairs in PLAN.pairs)
    assert f"{jobs} of {jobs} runs to do: about" in capsys.readouterr().out
    text = (tmp_path / "out" / "study_axis.md").read_text()
    assert "**Tiny sizes" in text and "## The three hypotheses" in text and "another pair's alternative" in text
    assert (tmp_path / "out" / "study_axis.png").exists()
    file = tmp_path / "out" / "8.jsonl"
    whole, result = file.read_text(), json.loads((tmp_path / "out" / "axis.json").read_text())
    assert result["runs"] == result["planned"] == jobs and result["command"].endswith("--output out")

    kept = whole.splitlines(keepends=True)
    file.write_text("".join(kept[:-2]) + kept[-2][:50])  # one line lost, one cut off
    command.main([*arguments, "--report"])
    assert f"**Not finished: {jobs - 2} of {jobs} runs.**" in command.axis_report.text(
        json.loads((tmp_path / "out" / "axis.json").read_text()) | {"plan": plan_of_full_size()}
    )
    command.main(arguments)
    assert f"2 of {jobs} runs to do" in capsys.readouterr().out
    assert sorted(map(without_seconds, file.read_text().splitlines())) == sorted(map(without_seconds, kept))

    monkeypatch.setitem(AXIS_PLANS, "quick", replace(PLAN, beta=0.2))
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "holds runs with other settings (plan)" in capsys.readouterr().err


def without_seconds(line):
    return json.dumps({name: value for name, value in json.loads(line).items() if name != "seconds"})


def plan_of_full_size():
    return json.loads(json.dumps(execution.asdict(replace(PLAN, size=replace(MICRO_SIZE, hidden_size=96)))))

"""Check on batches and losses that the study's arms do what their names say."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import inspo_kernels as ik
from benchmarks.study import model as models
from benchmarks.study import runs
from benchmarks.study.arms import ARMS, OBJECTIVES, VARIANTS, Arm, WithSFT
from benchmarks.study.runs import Candidates, label, make_batch
from benchmarks.study.world import IDS, PAD, Judge, Prompt, decode

SILENT = dataclasses.replace(Judge(), noise=0.0)


@pytest.fixture
def pairs() -> list[Candidates]:
    """Return twelve prompts of each of two kinds. Each answer names its prompt's number; the first answer is better."""
    rng = random.Random(0)
    found = []
    for i in range(24):
        prompt = Prompt("R" if i % 2 else "S", "cab")
        good, bad = ("bac$", "ja$") if i % 2 else ("abc$", "ja$")
        tag = "~" * (i // 2)
        found.append(
            Candidates(prompt, (tag + good, tag + bad), (-3.0, -4.0), (0.0, 0.9, rng.random(), rng.randrange(2**31)))
        )
    return found


def tokens(row: torch.Tensor) -> str:
    return decode([i for i in row.tolist() if i != IDS[PAD]])


def test_conditioned_rows_show_the_other_response_of_the_pair(pairs):
    examples = label(pairs, SILENT)
    batch = make_batch(examples, conditioned=True)
    for i, (pair, n) in enumerate(zip(pairs, range(24))):
        good, bad = pair.answers
        assert tokens(batch["input_ids"][i]) == f"{pair.prompt}{bad}{good}"
        assert tokens(batch["input_ids"][24 + n]) == f"{pair.prompt}{good}{bad}"
    plain = make_batch(examples, conditioned=False)
    assert tokens(plain["input_ids"][0]) == f"{pairs[0].prompt}{pairs[0].answers[0]}"


def test_shuffled_alternatives_keep_kind_and_role(pairs):
    batch = make_batch(label(pairs, SILENT, own_alternative=0.0), conditioned=True)
    labels, rows = batch["labels"], batch["input_ids"]
    assert len(rows) == 48 and batch["marginal_labels"] is None
    for i, pair in enumerate(pairs):
        good, bad = pair.answers
        kin = [p.answers for j, p in enumerate(pairs) if j != i and p.prompt.kind == pair.prompt.kind]
        before_good = tokens(rows[i]).removeprefix(str(pair.prompt)).removesuffix(good)
        before_bad = tokens(rows[24 + i]).removeprefix(str(pair.prompt)).removesuffix(bad)
        assert (before_bad, before_good) in kin
        assert decode(labels[i][labels[i] != -100].tolist()) == good
        assert decode(labels[24 + i][labels[24 + i] != -100].tolist()) == bad


def test_own_alternative_share_is_exact_and_labels_stay(pairs):
    many = pairs * 40
    rng = random.Random(1)
    many = [dataclasses.replace(p, dice=(*p.dice[:2], rng.random(), rng.randrange(2**31))) for p in many]
    all_own, half = label(many, SILENT), label(many, SILENT, own_alternative=0.5)
    assert all(e.alternatives == (e.rejected, e.chosen) for e in all_own)
    # Another pair may have the same answers (each occurs forty times), so the share is a little above one half.
    assert sum(e.alternatives == (e.rejected, e.chosen) for e in half) / len(half) == pytest.approx(0.53, abs=0.05)
    assert [(e.chosen, e.rejected) for e in all_own] == [(e.chosen, e.rejected) for e in half]


def test_both_ways_of_building_a_batch_agree(pairs):
    examples = label(pairs, SILENT)
    wanted = make_batch(examples, conditioned=True)
    examples[0] = dataclasses.replace(examples[0], alternatives=(examples[2].rejected, examples[2].chosen))
    built = make_batch(examples, conditioned=True)
    for name in ("input_ids", "labels", "attention_mask", "position_ids"):
        for row in {*range(48)} - {0, 24}:
            ours, theirs = built[name][row], wanted[name][row]
            short = min(len(ours), len(theirs))
            assert torch.equal(ours[:short], theirs[:short])


def loss_of(arm: Arm, model, examples, *, marginal_weight: float | None = None) -> float:
    objective = arm.make_objective(0.3)
    batch = make_batch(examples, conditioned=arm.conditioned)
    hidden, head = models.hidden_and_head(model, batch)
    reference = runs.reference_log_probs(model, examples, arm).flatten()
    return ik.fused_inspo_loss(
        hidden,
        labels=batch["labels"],
        marginal_labels=batch["marginal_labels"] if arm.uses_marginals else None,
        ref_logps=reference if objective.needs_reference else None,
        objective=objective,
        marginal_weight=arm.marginal_weight if marginal_weight is None else marginal_weight,
        **head,
    ).loss.item()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_anchored_loss_adds_the_plain_loss(objective, pairs):
    model, examples = models.build(32, 1, seed=0), label(pairs, SILENT)
    for parameter in model.parameters():  # far from uniform, so that contexts matter
        parameter.data *= 4
    plain, inspo, anchored = (loss_of(ARMS[f"{objective} {variant}"], model, examples) for variant in VARIANTS)
    assert anchored == pytest.approx(inspo + plain, rel=1e-5)
    assert inspo != pytest.approx(plain, rel=1e-3)


def test_the_sft_loss_is_the_mean_token_loss(pairs):
    model, examples = models.build(32, 1, seed=0), label(pairs, SILENT)
    batch = make_batch(examples, conditioned=False)
    chosen = models.log_probs(model, batch)[0] / torch.tensor([len(e.chosen) for e in examples])
    assert loss_of(ARMS["sft"], model, examples) == pytest.approx(-chosen.mean().item(), rel=1e-5)
    with_sft = loss_of(ARMS["dpo + sft"], model, examples)
    assert with_sft == pytest.approx(loss_of(ARMS["dpo plain"], model, examples) - chosen.mean().item(), rel=1e-5)


def test_the_cached_reference_is_the_base_given_prompts(pairs):
    model = models.build(32, 1, seed=0)
    ids = [(runs.encode(str(p.prompt)), *map(runs.encode, p.answers)) for p in pairs]
    scored = runs.log_probs_of(ids, model).tolist()
    pairs = [dataclasses.replace(p, log_probs=(a, b)) for p, a, b in zip(pairs, *scored)]
    examples = label([dataclasses.replace(p, dice=(1.0, *p.dice[1:])) for p in pairs], SILENT)  # the second is chosen
    plain = runs.reference_log_probs(model, examples, ARMS["dpo inspo"])
    torch.testing.assert_close(plain, models.log_probs(model, make_batch(examples, conditioned=False)))
    seen = runs.reference_log_probs(model, examples, ARMS["dpo inspo, presentation reference conditioned, too"])
    torch.testing.assert_close(seen, models.log_probs(model, make_batch(examples, conditioned=True)))
    assert (seen - plain).abs().min() > 1e-3


def test_held_out_accuracies_take_marginals_from_the_right_rows(pairs):
    """Plain training separates chosen and rejected responses, so a swap would show."""
    model, arm = models.build(32, 1, seed=0), ARMS["dpo plain"]
    ids = [(runs.encode(str(p.prompt)), *map(runs.encode, p.answers)) for p in pairs]
    pairs = [
        dataclasses.replace(p, log_probs=(a, b)) for p, a, b in zip(pairs, *runs.log_probs_of(ids, model).tolist())
    ]
    examples = label(pairs, SILENT)
    before = runs.reward_accuracies(model, examples, ik.DPO(), "")
    assert before["marginal accuracy"] == 0.5  # every margin is 0: ties
    runs.train(model, examples, arm, ik.DPO(), learning_rate=1e-2, updates=12, update_pairs=12, seed=0)
    after = runs.reward_accuracies(model, examples, ik.DPO(), "")
    assert after["marginal accuracy"] > 0.95
    scored = models.log_probs(model, make_batch(examples, conditioned=False))[0]
    per_token = (scored / torch.tensor([len(e.chosen) for e in examples])).mean().item()
    assert after["marginal chosen"] == pytest.approx(per_token, abs=1e-3)


def test_table_arms_make_equal_updates_twice_arms_double(pairs, monkeypatch):
    examples = label(pairs, SILENT)
    seen: dict[str, list] = {}
    original = runs.make_batch

    def spy(part, **options):
        seen[name] = seen.get(name, []) + [tuple(e.prompt + e.chosen) for e in part]
        return original(part, **options)

    monkeypatch.setattr(runs, "make_batch", spy)
    counts = {}
    for name in ("dpo plain", "dpo inspo", "dpo anchored", "dpo twice"):
        arm, model = ARMS[name], models.build(32, 1, seed=0)
        counts[name] = runs.train(
            model,
            examples,
            arm,
            arm.make_objective(0.3),
            learning_rate=1e-3,
            updates=3 * arm.updates,
            update_pairs=8,
            seed=5,
        )
    assert {name: count["updates"] for name, count in counts.items()} == {
        "dpo plain": 3,
        "dpo inspo": 3,
        "dpo anchored": 3,
        "dpo twice": 6,
    }
    assert seen["dpo plain"] == seen["dpo inspo"] == seen["dpo anchored"] == seen["dpo twice"][:24]
    assert counts["dpo inspo"]["tokens"] == counts["dpo anchored"]["tokens"] > counts["dpo plain"]["tokens"]


def test_a_nonfinite_loss_ends_training_and_is_reported(pairs):
    class Broken(ik.Objective):
        needs_reference = False

        def __call__(self, s):
            return s.chosen * float("nan")

    model = models.build(32, 1, seed=0)
    before = [p.clone() for p in model.parameters()]
    counts = runs.train(
        model, label(pairs, SILENT), ARMS["dpo plain"], Broken(), learning_rate=1e-3, updates=3, update_pairs=8, seed=0
    )
    assert counts == {"updates": 0, "tokens": 0, "finite": False}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_meaningless_arms_are_refused():
    with pytest.raises(ValueError, match="marginals need the pair"):
        dataclasses.replace(ARMS["orpo inspo"], own_alternative=0.0)
    with pytest.raises(ValueError, match="marginals need the pair"):
        dataclasses.replace(ARMS["dpo anchored"], own_alternative=0.5)
    with pytest.raises(ValueError, match="only conditioned"):
        dataclasses.replace(ARMS["dpo plain"], marginal_weight=1.0)
    with pytest.raises(ValueError, match="plain sequences"):
        dataclasses.replace(ARMS["dpo inspo"], sft_weight=1.0)


def test_every_arm_has_a_baseline_and_a_tuned_arm():
    assert {f"{o} {v}" for o in OBJECTIVES for v in VARIANTS} <= set(ARMS)
    for arm in ARMS.values():
        assert arm.tuned_as in ARMS and ARMS[arm.tuned_as].objective == arm.objective
        assert ARMS[arm.tuned_as].conditioned == arm.conditioned
        assert arm.objective == "sft" or arm.twin in ARMS
        objective = arm.make_objective(None if arm.objective == "sft" else 0.5)
        assert isinstance(objective.objective if isinstance(objective, WithSFT) else objective, ik.Objective)


def test_samples_depend_only_on_prompt_and_draws():
    model = models.build(32, 1, seed=0)
    prompts = [Prompt("R", "abc"), Prompt("S", "cabd"), Prompt("D", "ij")]
    first = models.sample(model, prompts, count=3, seed=7)
    assert first == models.sample(model, prompts, count=3, seed=7) != models.sample(model, prompts, count=3, seed=8)
    # The first token's distribution is the model's at the prompt's end.
    many = models.sample(model, prompts[:1] * 3000, count=1, seed=0)
    share = sum(answers[0][0] == "~" for answers in many) / 3000
    logits = model(input_ids=torch.tensor([runs.encode(str(prompts[0]))])).logits[0, -1]
    assert share == pytest.approx(logits.softmax(-1)[IDS["~"]].item(), abs=0.02)

"""Check that a study run follows its arm: base and pairs, training, and the arguments of the loss."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from micro_study import MICRO_SIZE

from benchmarks.study import model as models
from benchmarks.study import runs, tabular
from benchmarks.study.arms import ARMS
from benchmarks.study.runs import Example
from benchmarks.study.world import END, EQUALS, IDS, Judge, Prompt, encode

SIZE = replace(MICRO_SIZE, test_prompts=16)


@pytest.fixture
def spy(monkeypatch):
    """Return ``spy(module, name)``, which records the arguments of each call of a function without changing it."""

    def watch(module, name):
        original, calls = getattr(module, name), []

        def call(*args, **kwargs):
            calls.append((args, kwargs))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)
        return calls

    return watch


@pytest.mark.parametrize("drafts", [True, False])
def test_training_and_held_out_pairs_use_separate_prompts(tmp_path, spy, drafts):
    fits = spy(models, "fit")
    begun = runs.start(SIZE, 0, drafts=drafts, cache=tmp_path)
    ((_, fitted), options) = fits[0]
    assert len(fits) == 1 and set(fitted) == set(begun.prompts.training)
    assert options["draft_share"] == (SIZE.draft_share if drafts else 0.0)
    assert begun.training and {c.prompt for c in begun.training} <= set(begun.prompts.training)
    assert begun.held_out and {c.prompt for c in begun.held_out} <= set(begun.prompts.test)
    for part in ("validation", "test"):
        assert len(begun.answers[part]) == len(getattr(begun.prompts, part))
    again = runs.start(SIZE, 0, drafts=drafts, cache=tmp_path)
    assert len(fits) == 1 and again.training == begun.training
    other = runs.start(SIZE, 0, drafts=not drafts, cache=tmp_path)
    assert len(fits) == 2 and other.prompts == begun.prompts


def test_a_pair_is_the_best_and_worst_answer(monkeypatch):
    prompt = Prompt("S", "cab")
    answers = ["abc", "ab$", "abc$", "bca~$"]  # the first has no end, but would be the best
    ended = sorted(answers[1:], key=lambda answer: Judge().score(prompt, answer))
    monkeypatch.setattr(models, "sample", lambda model, prompts, *, count, seed: [answers[:count]] * len(prompts))
    found = runs.candidates(models.build(16, 1, 0), [prompt] * 60, 50, seed=0)
    assert len(found) == 50 and {frozenset(c.answers) for c in found} == {frozenset((ended[0], ended[-1]))}
    assert 10 < sum(c.answers[0] == ended[-1] for c in found) < 40
    dice = [c.dice for c in found]
    assert len(set(dice)) == 50 and all(0 <= d < 1 for one in dice for d in one[:3])


NAMES = (
    "dpo inspo, label noise 0.5",
    "dpo shuffled",
    "dpo twice",
    "dpo plain, learning rate 3.0",
    "dpo inspo, no drafts",
    "dpo anchored",
    "dpo inspo, presentation after another =",
)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_hands_on_all_of_its_arm(tmp_path, spy, name):
    starts, labels, trains, samples = spy(runs, "start"), spy(runs, "label"), spy(runs, "train"), spy(models, "sample")
    arm = ARMS[name]
    record = runs.run(arm, SIZE, 3, learning_rate=0.01, parameter=0.2, part="test", cache=tmp_path)
    begun = runs.start(SIZE, 3, drafts=arm.drafts, cache=tmp_path)
    assert starts[0][1]["drafts"] is arm.drafts
    (training, judge, own), (held_out, silent) = (args for args, _ in labels)
    assert (training, judge, own) == (begun.training, replace(Judge(), noise=arm.noise), arm.own_alternative)
    assert (held_out, silent) == (begun.held_out, replace(Judge(), noise=0.0))
    ((_, examples, trained, objective), options) = trains[0]
    assert trained is arm and len(examples) == len(begun.training) and objective.beta == 0.2 * arm.parameter
    assert options["learning_rate"] == pytest.approx(0.01 * arm.learning_rate) and options["seed"] == 3
    assert options["updates"] == SIZE.updates * arm.updates == record["updates"]
    (_, prompts), options = samples[-1]
    assert prompts == begun.prompts.test and options == {"count": 2, "seed": runs._sampling_seed(3, "test")}
    assert len(record["lengths"]) == 2 * len(prompts) and (record["arm"], record["part"]) == (name, "test")


def test_no_two_seeds_or_parts_share_their_draws():
    seeds = {runs._sampling_seed(seed, part) for seed in (*range(20), 900) for part in ("validation", "test")}
    assert len(seeds) == 42


@pytest.mark.parametrize("name", NAMES)
def test_training_passes_the_arms_options_to_the_loss(spy, name):
    """The references' values identify the pairs: pair i has -i - 1 (chosen) and -i - 101 (rejected)."""
    examples = [
        Example(encode("Rab="), encode("ba$"), encode("a$"), (-i - 1.0, -i - 101.0), (encode("a$"), encode("ba$")))
        for i in range(12)
    ]
    arm, model = ARMS[name], models.build(16, 1, 0)
    losses, batches = spy(runs.ik, "fused_inspo_loss"), spy(runs, "make_batch")
    runs.train(model, examples, arm, arm.make_objective(0.1), learning_rate=1e-3, updates=3, update_pairs=4, seed=0)
    used = []
    for _, given in losses:
        chosen, rejected = given["ref_logps"].view(2, 4)
        assert torch.equal(rejected, chosen - 100) and chosen.min() >= -12
        used += chosen.tolist()
        assert given["marginal_weight"] == arm.marginal_weight == (1.0 if name == "dpo anchored" else 0.0)
        assert (given["marginal_labels"] is not None) is arm.uses_marginals
    assert sorted(used) == [-i - 1.0 for i in reversed(range(12))]  # each pair once
    assert all(o == {"conditioned": arm.conditioned, "separator": arm.separator} for _, o in batches)


def test_ablations_change_only_the_named_option():
    for name, arm in ARMS.items():
        assert arm.drafts is ("no drafts" not in name)
        assert arm.own_alternative == (
            0.0 if "shuffled" in name else arm.level if arm.group == "own alternative" else 1.0
        )
        assert arm.noise == (arm.level if arm.group == "label noise" else Judge().noise)
        assert arm.updates == (2 if name.endswith(" twice") else 1)
    assert ARMS["dpo inspo, beta 3.0"].make_objective(0.1).beta == pytest.approx(0.3)
    assert ARMS["dpo inspo, learning rate 0.33"].learning_rate == pytest.approx(1 / 3)


@pytest.mark.parametrize(("share", "answers"), [(0.0, {1}), (1.0, {2}), (0.5, {1, 2})])
def test_a_base_does_not_learn_prompts(share, answers):
    model, seen = models.build(16, 1, 0), []
    model.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    prompts = [Prompt("R", "abc"), Prompt("D", "cab")]
    models.fit(model, prompts, steps=2, rows=16, learning_rate=1e-3, draft_share=share, seed=0)
    counts = set()
    for batch in seen:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            question = ids.tolist().index(IDS[EQUALS]) + 1
            length = len(ids) - ids.tolist()[::-1].index(IDS[END])
            assert (labels[:question] == -100).all() and (labels[length:] == -100).all()
            assert torch.equal(labels[question:length], ids[question:length])
            counts.add(int((ids == IDS[END]).sum()))
    assert counts == answers


def test_tabular_comparisons_change_only_reference_and_weights(monkeypatch):
    seen = []
    monkeypatch.setattr(tabular, "_prompt_only", lambda here, changed: seen.append((here, changed)))
    tabular.measure(3, 2)
    assert len(seen) == 2
    for here, changed in seen:
        other_reference, other_weights = changed["reference"], changed["weights"]
        assert torch.equal(here.preferences, other_reference.preferences)
        assert torch.equal(here.preferences, other_weights.preferences)
        assert torch.equal(here.weights, other_reference.weights) and torch.equal(here.log_ref, other_weights.log_ref)
        assert (here.weights != other_weights.weights).all() and (here.log_ref != other_reference.log_ref).all()


def test_shares_of_prompt_only_favourites(monkeypatch):
    """There are two worlds with two responses. P favours the first response in world 1, the second in world 2."""
    preferences = torch.tensor([[[0.5, 0.9], [0.1, 0.5]], [[0.5, 0.1], [0.9, 0.5]]], dtype=torch.float64)
    here, reference, weights = (
        tabular.World(preferences, torch.ones_like(preferences), torch.tensor([[-0.1, -2.0]] * 2).double())
        for _ in range(3)
    )
    answers = {
        (id(here), "logistic"): [0, 1],
        (id(here), "squared"): [0, 1],
        (id(here), "exponential"): [0, 0],
        (id(reference), "logistic"): [1, 1],
        (id(weights), "logistic"): [0, 1],
    }

    def policy(world, scalarization):
        (name,) = (name for name, s in tabular.SCALARIZATIONS.items() if s is scalarization)
        return torch.nn.functional.one_hot(torch.tensor(answers[id(world), name]), 2).double()

    excess = torch.zeros(2)
    monkeypatch.setattr(tabular, "shared_descent", lambda world, s: (policy(world, s), excess))
    monkeypatch.setattr(tabular, "plain_optimum", policy)
    changed = {"reference": reference, "weights": weights}
    found = tabular._prompt_only(here, changed)
    assert (
        found["conditioned"]
        == found["plain"]
        == {
            "same_for_all_scalarizations": 0.5,
            "same_for_other_reference": 0.5,
            "same_for_other_weights": 1.0,
            "is_the_favourite": 1.0,
        }
    )
    assert found["reference_is_the_favourite"] == 0.5
    excess[1] = torch.nan
    with pytest.raises(ArithmeticError, match="excess risk of nan"):
        tabular._prompt_only(here, changed)

from __future__ import annotations

import math

import pytest
import torch
from helpers import token_pairs

import inspo_kernels as ik
from training.config import TrainConfig
from training.data import Pair
from training.errors import InputError
from training.evaluation import conditioning_gap, evaluate, mean_interval, proportion_interval, starting_report
from training.scoring import Scores

GENERATOR = torch.Generator().manual_seed(3)
VALUES = torch.randn(40, generator=GENERATOR, dtype=torch.float64)
OWN_GROUP = torch.arange(40)


def random_scores(count=6):
    logps, marginals = -20 * torch.rand(2, 2, count, generator=GENERATOR, dtype=torch.float64)
    lengths = torch.randint(2, 9, (2, count), generator=GENERATOR).double()
    return Scores(logps, lengths, marginals)


SIMPO = TrainConfig(objective="simpo")


def test_interval_of_a_mean_without_groups_is_the_textbook_one():
    low, high = mean_interval(VALUES, OWN_GROUP)
    half = 1.959964 * VALUES.std().item() / math.sqrt(40)
    assert (low, high) == pytest.approx((VALUES.mean().item() - half, VALUES.mean().item() + half))


def test_repeated_pairs_do_not_narrow_intervals():
    correct = (VALUES > 0).double()
    for interval, values in ((mean_interval, VALUES), (proportion_interval, correct)):
        once = interval(values, OWN_GROUP)
        assert interval(values.repeat(4), OWN_GROUP.repeat(4)) == pytest.approx(once, rel=1e-6)
        independent = interval(values.repeat(4), torch.arange(160))
        assert independent[1] - independent[0] < 0.6 * (once[1] - once[0])


def test_pairs_of_a_prompt_form_one_cluster():
    pairs = [Pair([1, 9 + i], *ids[1:]) for i, ids in enumerate(token_pairs(12))]
    scores = random_scores(12)
    twice = Scores(*(table.repeat(1, 2) for table in (scores.logps, scores.lengths, scores.marginal_logps)))
    once, again = (
        evaluate(some, None, some_pairs, SIMPO) for some, some_pairs in ((scores, pairs), (twice, 2 * pairs))
    )
    intervals = [name for name in once if name.endswith("_ci")]
    assert len(intervals) == 9
    for name in intervals:
        assert again[name] == pytest.approx(once[name], rel=1e-6), name


def test_wilson_interval_of_known_counts():
    eight_of_ten = torch.tensor([1.0] * 8 + [0.0] * 2, dtype=torch.float64)
    # Cluster-robust variance has a factor 10/9 here, so 9 observations count: Wilson's formula for 0.8 of 9.
    z, n, p = 1.959964, 9, 0.8
    middle, half = (p + z * z / (2 * n)), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    expected = [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
    assert proportion_interval(eight_of_ten, torch.arange(10)) == pytest.approx(expected)
    all_right = proportion_interval(torch.ones(10, dtype=torch.float64), torch.arange(10))
    assert all_right == pytest.approx([10 / (10 + z * z), 1.0])
    twice = torch.arange(10).repeat(2)  # where no pair differs, pairs of a group count as one
    assert proportion_interval(torch.ones(20, dtype=torch.float64), twice) == pytest.approx(all_right)
    none_right = proportion_interval(torch.zeros(20, dtype=torch.float64), twice)
    assert none_right == pytest.approx([0.0, 1 - 10 / (10 + z * z)])


def test_one_group_has_no_interval_of_the_mean():
    assert mean_interval(VALUES, torch.zeros(40, dtype=torch.int64)) is None
    low, high = proportion_interval((VALUES > 0).double(), torch.zeros(40, dtype=torch.int64))
    assert high - low > 0.7


@pytest.mark.parametrize("conditioned", [True, False])
@pytest.mark.parametrize("name", ["dpo", "simpo", "ipo", "orpo"])
def test_evaluation_reports_both_layouts_and_the_runs_own_loss(name, conditioned):
    config = TrainConfig(objective=name, conditioned=conditioned, sft="chosen" if name == "orpo" else None)
    objective = config.make_objective()
    scores, pairs = random_scores(), [Pair(*ids) for ids in token_pairs(6)]
    ref = -20 * torch.rand(2, 6, generator=GENERATOR, dtype=torch.float64)
    result = evaluate(scores, ref, pairs, config)
    for layout, logps in (("conditioned", scores.logps), ("marginal", scores.marginal_logps)):
        fields = dict(chosen_len=scores.lengths[0], rejected_len=scores.lengths[1], index=torch.arange(6))
        s = ik.PairSums(chosen=logps[0], rejected=logps[1], ref_chosen=ref[0], ref_rejected=ref[1], **fields)
        chosen, rejected = objective.rewards(s)
        assert result[f"eval_{layout}/rewards/margins"] == pytest.approx((chosen - rejected).mean().item())
        assert result[f"eval_{layout}/rewards/accuracies"] == pytest.approx((chosen > rejected).double().mean().item())
        assert result[f"eval_{layout}/logps/chosen"] == pytest.approx(logps[0].mean().item())
        low, high = result[f"eval_{layout}/rewards/margins_ci"]
        assert low < result[f"eval_{layout}/rewards/margins"] < high
        if conditioned == (layout == "conditioned"):
            assert result["eval_loss"] == pytest.approx(objective(s).mean().item())


def test_equal_rewards_are_neither_right_nor_wrong():
    scores, pairs = random_scores(), [Pair(*ids) for ids in token_pairs(6)]
    ref = scores.marginal_logps + 1e-9
    result = evaluate(scores, ref, pairs, TrainConfig())
    assert result["eval_marginal/rewards/accuracies"] == 0.5


def test_marginal_weight_enters_the_held_out_loss():
    scores, pairs = random_scores(), [Pair(*ids) for ids in token_pairs(6)]
    ref = torch.zeros(2, 6, dtype=torch.float64)
    alone, given, both = (
        evaluate(scores, ref, pairs, TrainConfig(conditioned=c, marginal_weight=w))["eval_loss"]
        for c, w in ((False, 0.0), (True, 0.0), (True, 0.7))
    )
    assert both == pytest.approx(given + 0.7 * alone)


@pytest.mark.parametrize(("gap", "warned"), [(-0.1, False), (-2.0, True)])
def test_a_low_conditioning_gap_warns(gap, warned):
    scores, said = random_scores(), []
    shifted = Scores(scores.marginal_logps + gap * scores.lengths, scores.lengths, scores.marginal_logps)
    starting_report(shifted, None, TrainConfig(), said.append)
    assert f"chosen {gap:+.3f}, rejected {gap:+.3f}" in said[0]
    assert any("WARNING" in line for line in said) == warned


def test_a_reference_of_another_model_is_refused():
    scores = random_scores()
    starting_report(scores, scores.marginal_logps + 1e-5, TrainConfig(), [].append)
    starting_report(scores, scores.logps, TrainConfig(reference_conditioned=True), [].append)
    for config in (TrainConfig(), TrainConfig(conditioned=False)):
        with pytest.raises(InputError, match="differs from the model"):
            starting_report(scores, scores.marginal_logps + 0.1, config, [].append)


def scored(chosen, rejected, chosen_len, rejected_len):
    """Return scores of pairs with these prompt-only log-probs; conditioned, they are one nat per token lower."""
    marginals, lengths = torch.tensor([chosen, rejected]).double(), torch.tensor([chosen_len, rejected_len]).double()
    return Scores(marginals - lengths, lengths, marginals)


def test_log_probs_per_token_are_means_over_pairs():
    scores = scored([-4.0, -9.0], [-2.0, -8.0], [2, 9], [4, 2])
    pairs = [Pair(*ids) for ids in token_pairs(2)]
    result = evaluate(scores, None, pairs, SIMPO)
    assert result["eval_marginal/logps_per_token/chosen"] == pytest.approx((-2.0 - 1.0) / 2)
    assert result["eval_marginal/logps_per_token/rejected"] == pytest.approx((-0.5 - 4.0) / 2)
    assert result["eval_conditioned/logps_per_token/chosen"] == pytest.approx((-3.0 - 2.0) / 2)
    assert conditioning_gap(scores) == pytest.approx((-1.0, -1.0))


def test_length_preference_skips_pairs_of_equal_length():
    # The longer response is chosen and preferred, rejected and preferred, chosen and not preferred. The last are equal.
    scores = scored([-1.0, -5.0, -9.0, -1.0], [-3.0, -2.0, -2.0, -8.0], [8, 3, 8, 5], [3, 8, 3, 5])
    pairs, ref = [Pair(*ids) for ids in token_pairs(4)], torch.zeros(2, 4, dtype=torch.float64)
    result = evaluate(scores, ref, pairs, TrainConfig())
    assert result["eval_marginal/longer_preferred"] == pytest.approx(2 / 3)
    assert result["eval_longer_chosen"] == pytest.approx(2 / 3)
    low, high = result["eval_marginal/longer_preferred_ci"]
    assert 0 < low < 2 / 3 < high < 1
    equal = scored([-1.0], [-3.0], [5], [5])
    result = evaluate(equal, ref[:, :1], pairs[:1], TrainConfig())
    assert not any("longer" in name for name in result)

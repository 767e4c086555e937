from __future__ import annotations

import pytest

from training.watch import Watch, evaluation_warnings, training_warnings

TRAINING = {
    "rewards/margins": 1.0,
    "marginal/rewards/margins": 0.5,
    "logps/chosen": -50.0,
    "logps/rejected": -80.0,
    "marginal/logps/chosen": -20.0,
    "marginal/logps/rejected": -40.0,
    "ref_logps/chosen": -21.0,
    "ref_logps/rejected": -35.0,
    "tokens/chosen": 10.0,
    "tokens/rejected": 20.0,
}
START = {
    "step": 0,
    "eval_marginal/logps_per_token/chosen": -2.0,
    "eval_marginal/logps_per_token/rejected": -2.5,
    "eval_marginal/logps_per_token/chosen_ci": [-2.1, -1.9],
    "eval_marginal/longer_preferred": 0.5,
    "eval_marginal/longer_preferred_ci": [0.4, 0.6],
    "eval_longer_chosen": 0.55,
}


def raised(warnings):
    return {kind for kind, text in warnings.items() if text}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, set()),
        ({"marginal/rewards/margins": -0.5}, {"opposite"}),
        ({"marginal/rewards/margins": -0.5, "rewards/margins": -1.0}, set()),
        ({"marginal/rewards/margins": -1e-7}, set()),  # rounding: the policy is still the reference
        ({"marginal/logps/chosen": -23.0, "marginal/logps/rejected": -38.0}, {"falling"}),
        ({"marginal/logps/chosen": -21.5, "marginal/logps/rejected": -99.0}, set()),  # the chosen ones hardly fall
        ({"marginal/logps/chosen": -30.0, "marginal/logps/rejected": -35.0}, set()),
    ],
)
def test_training_rows(change, kinds):
    assert raised(training_warnings(TRAINING | change)) == kinds


def test_plain_and_reference_free_runs_compare_their_log_probs():
    plain = {name: value for name, value in TRAINING.items() if not name.startswith("marginal/")}
    assert raised(training_warnings(plain)) == {"falling"}
    alone = {name: value for name, value in plain.items() if not name.startswith("ref_logps/")}
    assert raised(training_warnings(alone)) == set()


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, set()),
        (
            {
                "eval_marginal/logps_per_token/chosen": -2.3,
                "eval_marginal/logps_per_token/rejected": -2.9,
                "eval_marginal/logps_per_token/chosen_ci": [-2.4, -2.2],
            },
            {"falling, held-out"},
        ),
        (  # noise
            {
                "eval_marginal/logps_per_token/chosen": -2.3,
                "eval_marginal/logps_per_token/rejected": -2.9,
                "eval_marginal/logps_per_token/chosen_ci": [-2.6, -2.0],
            },
            set(),
        ),
        (  # mostly the rejected ones
            {
                "eval_marginal/logps_per_token/chosen": -2.3,
                "eval_marginal/logps_per_token/rejected": -3.9,
                "eval_marginal/logps_per_token/chosen_ci": [-2.4, -2.2],
            },
            set(),
        ),
        ({"eval_marginal/logps_per_token/chosen": -1.9, "eval_marginal/logps_per_token/rejected": -2.9}, set()),
        (
            {"eval_marginal/longer_preferred": 0.8, "eval_marginal/longer_preferred_ci": [0.7, 0.9]},
            {"longer preferred"},
        ),
        ({"eval_marginal/longer_preferred": 0.8, "eval_marginal/longer_preferred_ci": [0.5, 0.95]}, set()),
        (
            {
                "eval_marginal/longer_preferred": 0.8,
                "eval_marginal/longer_preferred_ci": [0.7, 0.9],
                "eval_longer_chosen": 0.7,
            },
            set(),
        ),
    ],
)
def test_evaluations(change, kinds):
    assert raised(evaluation_warnings({**START, "step": 5, **change}, START)) == kinds


def test_the_first_evaluation_has_nothing_to_compare_with():
    eager = START | {"eval_marginal/longer_preferred": 0.9, "eval_marginal/longer_preferred_ci": [0.8, 1.0]}
    assert raised(evaluation_warnings(eager, eager)) == set()


def test_few_pairs_warn_only_after_confirmation():
    said = []
    watch = Watch(said.append)
    for text in ("one", "two", None, "three", "four", "five", "six"):
        watch({"falling": text}, last=False)
    assert said == ["WARNING: five"]
    watch({"falling": "seven"}, last=True)
    assert said[-1] == "WARNING: seven"
    watch({"opposite": "first"}, last=True)
    assert len(said) == 2


def test_a_warning_repeats_only_after_clearing():
    said = []
    watch = Watch(said.append)
    for text in ("one", "two", None, "three", "four"):
        watch({"a": text, "b": None}, last=False)
    assert said == ["WARNING: one", "WARNING: three"]
    watch({"a": "five"}, last=True)
    assert said[-1] == "WARNING: five"
    watch({"a": None}, last=True)
    assert len(said) == 3

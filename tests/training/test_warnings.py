from __future__ import annotations

import pytest

from training.evaluation import warnings

START = {
    "step": 0,
    "eval_marginal/logps_per_token/chosen": -2.0,
    "eval_marginal/logps_per_token/rejected": -2.5,
    "eval_marginal/logps_per_token/chosen_ci": [-2.1, -1.9],
    "eval_marginal/longer_preferred": 0.5,
    "eval_marginal/longer_preferred_ci": [0.4, 0.6],
    "eval_longer_chosen": 0.55,
}
MARGINS = {
    "eval_conditioned/rewards/margins": 1.0,
    "eval_conditioned/rewards/margins_ci": [0.5, 1.5],
    "eval_marginal/rewards/margins": -0.5,
    "eval_marginal/rewards/margins_ci": [-0.8, -0.2],
}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({}, set()),
        (MARGINS, {"opposite"}),
        (MARGINS | {"eval_marginal/rewards/margins_ci": [-0.9, 0.1]}, set()),  # noise
        (MARGINS | {"eval_conditioned/rewards/margins_ci": [-0.1, 2.0]}, set()),
        (MARGINS | {"eval_marginal/rewards/margins_ci": [-2e-7, -1e-7]}, set()),  # rounding: still the reference
        (MARGINS | {"eval_marginal/rewards/margins_ci": None}, set()),  # one prompt: no interval
        (
            {
                "eval_marginal/logps_per_token/chosen": -2.3,
                "eval_marginal/logps_per_token/rejected": -2.9,
                "eval_marginal/logps_per_token/chosen_ci": [-2.4, -2.2],
            },
            {"falling"},
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
    assert warnings({**START, "step": 5, **change}, START).keys() == kinds


def test_the_first_evaluation_has_nothing_to_compare_with():
    eager = START | {"eval_marginal/longer_preferred": 0.9, "eval_marginal/longer_preferred_ci": [0.8, 1.0]}
    assert not warnings(eager, eager)

# ruff: noqa: RUF001  (minus signs, primes and Greek letters are meant)
"""Report what ``benchmarks.study.tabular`` computed, for ``docs/study.md``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .markdown import filled, item, table


def invariance(tabular: Mapping[str, Any]) -> str:
    """Return the section on the exact tabular world."""
    keys = (
        "gap_to_bayes",
        "error_of_decoded_preferences",
        "decoded_moves_with_ref_and_weights",
        "policy_moves_with_ref_and_weights",
    )
    kinds = {"bradley_terry": "Bradley-Terry", "cyclic": "any, with cycles"}
    rows = [
        [title, training, name, *(f"{row[key]:.0e}" if row[key] < 1e-3 else f"{row[key]:.2f}" for key in keys)]
        for kind, title in kinds.items()
        for training in ("conditioned", "plain")
        for name, row in tabular[kind][training].items()
    ]
    columns = [
        "preferences",
        "training",
        "scalarization",
        "excess over the Bayes risk, relative",
        "error of link⁻¹(u)",
        "link⁻¹(u) moves with reference and weights",
        "policy moves",
    ]
    shares = ("same_for_all_scalarizations", "same_for_other_weights", "same_for_other_reference", "is_the_favourite")
    alone = [
        [title, training, *(f"{tabular[kind]['prompt_only'][training][key]:.2f}" for key in shares)]
        for kind, title in kinds.items()
        for training in ("conditioned", "plain")
    ]
    columns_alone = [
        "preferences",
        "training",
        "same for all scalarizations",
        "same with other weights",
        "same with another reference",
        "is the answer that P favours",
    ]
    lucky = " and ".join(
        f"{tabular[kind]['prompt_only']['reference_is_the_favourite']:.2f} ({title})" for kind, title in kinds.items()
    )
    intro = f"""
        This world has {tabular["responses"]} responses, and every log π(y|y′) is a free parameter in float64. We drew
        {tabular["worlds"]} random preference matrices without cycles and as many with cycles, with P in (0, 1). Each
        matrix was also solved with a second reference and with other weights.
        u(y,y′) = [log π(y|y′) − log ref(y)] − [log π(y′|y) − log ref(y′)]. The largest values over the worlds:"""
    points = [
        "(i) The un-regularised target argmax_y P(y≻y′) depends on P alone, by definition.",
        """(ii) The decoded preferences link⁻¹(u): the conditioned loss reaches its Bayes risk for every P, even with
        cycles, and decodes P for every scalarization, reference and weighting. The plain loss does so only if link(P)
        is additive (Bradley-Terry under the logistic or exponential link). Otherwise its decoded preferences change
        with the weights.""",
        f"""(iii) The conditioned policy is not determined: the optima form a family of dimension
        {tabular["dimension_of_optima"]} = K(K−1)/2. One member repeats the alternative with a probability of at least
        {tabular["echo"]["least_probability_of_the_alternative"]:.4f}.""",
        f"""(iv) The prompt-only policy depends on the parametrisation and the optimizer. Here log π(y|y′) = log
        softmax(θ_y + φ_yy′) and log π(y) = log softmax(θ_y), trained by gradient descent from θ = log ref, φ = 0.
        Plain training has a single optimum. The table shows in which share of the worlds the most likely answer stays
        the same, and in which share it is the answer that wins most often by P. (The reference's most likely answer is
        that answer in a share of {lucky}.)""",
    ]
    return "\n".join(
        [
            "## Is the optimum invariant? Exactly, in a tabular world",
            "",
            filled(intro),
            "",
            *table(columns, rows),
            "",
            *(item(point) for point in points),
            "",
            *table(columns_alone, alone),
            "",
            "So the invariance of (ii) says nothing about (iii) and (iv), and inference uses (iv).",
        ]
    )

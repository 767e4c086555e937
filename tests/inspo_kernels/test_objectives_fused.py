"""Test objectives through ``fused_inspo_loss``: against the reference, in any workspace, with and without marginals."""

from __future__ import annotations

import pytest
import torch
from cases import RAGGED, gradients_of, relative_error, run

import inspo_kernels as ik
from inspo_kernels.objectives import OBJECTIVES

ROW = 29 * 8  # bytes of one row of float64 logits
COUPLED = (
    "aot",
    ik.AOTUnpaired(label_smoothing=0.1),
    ik.Mixture([("dpo", 1.0), ("aot", 0.5), ("sft", 0.3)]),
)
MIXTURE = ik.Mixture([("nca_pair", 0.5), ("orpo", 1.0), (ik.DPO(divergence="js"), 0.2)])


def assert_equal(got, expected):
    """Assert equal loss, losses, rewards and gradients. ``got`` and ``expected`` are (output, gradients)."""
    (out, gradients), (expected_out, expected_gradients) = got, expected
    for name in ("loss", "losses", "chosen_rewards", "rejected_rewards"):
        assert relative_error(getattr(out, name).detach(), getattr(expected_out, name).detach()) < 1e-11, name
    for a, b in zip(gradients, expected_gradients, strict=True):
        assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("marginal_weight", [0.0, 0.5])
@pytest.mark.parametrize("objective", [*OBJECTIVES, *COUPLED[1:], MIXTURE], ids=str)
def test_conditioned_pairs_equal_reference(objective, marginal_weight):
    options = {"objective": objective, "marginal_weight": marginal_weight}
    expected = run(RAGGED, backend="reference", **options)
    for workspace in (None, 9 * ROW):
        assert_equal(run(RAGGED, backend="torch", max_workspace_bytes=workspace, **options), expected)


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if name != "orpo"])
def test_plain_pairs_equal_reference(name):
    options = {"objective": name, "marginal_labels": None}
    expected = run(RAGGED, backend="reference", **options)
    assert_equal(run(RAGGED, backend="torch", **options), expected)


@pytest.mark.parametrize("objective", COUPLED, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8, 20])
def test_coupled_objectives_do_not_depend_on_the_workspace(objective, rows):
    options = {"objective": objective, "marginal_weight": 0.25, "pair_weights": torch.tensor([0.5, 2.0, 0.0, 1.0])}
    whole = run(RAGGED, backend="torch", **options)
    assert_equal(run(RAGGED, backend="torch", max_workspace_bytes=rows * ROW, **options), whole)


@pytest.mark.parametrize("objective", [*COUPLED, "sft"], ids=str)
def test_evaluation_gives_the_loss_of_training(objective):
    out, _ = run(RAGGED, backend="torch", objective=objective, max_workspace_bytes=5 * ROW)
    with torch.no_grad():
        evaluated = ik.fused_inspo_loss(
            RAGGED.hidden,
            RAGGED.weight,
            RAGGED.labels,
            bias=RAGGED.bias,
            ref_logps=RAGGED.ref_logps,
            marginal_labels=RAGGED.marginal_labels,
            objective=objective,
            backend="torch",
        )
    torch.testing.assert_close(evaluated.loss, out.loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_pair_weights_meet_the_losses_of_their_pairs(name):
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0])
    plain, _ = run(RAGGED, backend="torch", objective=name)
    weighted, _ = run(RAGGED, backend="torch", objective=name, pair_weights=weights)
    torch.testing.assert_close(weighted.losses, plain.losses * weights, rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("workspace", [None, ROW])
def test_sft_is_the_mean_over_batch_tokens(backend, workspace):
    """With marginals, SFT uses only log pi(y_w | x). Without marginals it uses the given sequences."""
    options = {"objective": "sft", "backend": backend, "max_workspace_bytes": workspace}
    for labels in (RAGGED.marginal_labels, None):
        hidden, weight = RAGGED.hidden.clone().requires_grad_(), RAGGED.weight.clone().requires_grad_()
        scored = RAGGED.labels[:4] if labels is None else labels[4:]
        rows = hidden[:4] if labels is None else hidden[4:]
        logits = rows[:, :-1] @ weight.T + RAGGED.bias
        tokens = torch.nn.functional.cross_entropy(logits.flatten(0, 1), scored[:, 1:].flatten())
        expected = gradients_of(tokens, hidden, weight)
        out, gradients = run(RAGGED, marginal_labels=labels, **options)
        torch.testing.assert_close(out.loss, tokens, rtol=1e-12, atol=0)
        for a, b in zip(gradients, expected):
            assert relative_error(a, b) < 1e-11


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("marginals", [True, False])
def test_sft_of_the_compact_form_equals_rows(backend, marginals):
    compact = RAGGED.compact()
    if not marginals:
        compact = {name: value[RAGGED.compact()["segment_ids"] < 8] for name, value in compact.items()}
    labels = RAGGED.marginal_labels if marginals else None
    expected, (_, d_weight, _) = run(RAGGED, backend="torch", objective="sft", marginal_labels=labels)
    weight = RAGGED.weight.clone().requires_grad_()
    out = ik.fused_inspo_loss(
        compact["hidden"],
        weight,
        compact["labels"],
        segment_ids=compact["segment_ids"],
        num_pairs=4,
        bias=RAGGED.bias,
        objective="sft",
        backend=backend,
    )
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-12, atol=0)
    assert relative_error(gradients_of(out.loss, weight)[0], d_weight) < 1e-11


@pytest.mark.parametrize("objective", ["sft", MIXTURE, ik.Mixture([("aot", 1.0), ("sft", 0.5)])], ids=str)
def test_compiled_instances_equal_eager(objective):
    torch._dynamo.reset()

    def loss(hidden, weight):
        return ik.fused_inspo_loss(
            hidden,
            weight,
            RAGGED.labels,
            objective=objective,
            ref_logps=RAGGED.ref_logps,
            marginal_labels=RAGGED.marginal_labels,
        ).loss

    leaves = [t.clone().requires_grad_() for t in (RAGGED.hidden, RAGGED.weight)]
    expected = loss(*leaves)
    got = torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients_of(got, *leaves), gradients_of(expected, *leaves), strict=True):
        assert relative_error(a, b) < 1e-12


def test_a_mixture_says_what_is_missing():
    with pytest.raises(ValueError, match="objective Mixture needs ref_logps"):
        run(RAGGED, backend="torch", objective=MIXTURE, ref_logps=None)
    with pytest.raises(ValueError, match="objective Mixture needs the marginals"):
        run(RAGGED, backend="torch", objective=MIXTURE, marginal_labels=None)

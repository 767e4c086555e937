"""Make random batches for the tests: ragged pairs as rows, with marginals, and the same batch in other forms."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import inspo_kernels as ik

IGNORE = -100
OBJECTIVES = ("dpo", "one_sided", "ipo", "simpo", "rdpo", "orpo", "hinge")


@dataclass(frozen=True)
class Case:
    """Inputs of ``fused_inspo_loss`` in the rows form; every sequence is right-padded to the longest."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    marginal_labels: Tensor
    ref_logps: Tensor
    lengths: list[int]

    def to(self, dtype: torch.dtype) -> Case:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def packed(self) -> dict[str, Tensor]:
        keep = torch.cat([torch.arange(n) + i * self.labels.shape[1] for i, n in enumerate(self.lengths)])
        return {
            "hidden": self.hidden.flatten(0, 1)[keep],
            "labels": self.labels.flatten()[keep],
            "marginal_labels": self.marginal_labels.flatten()[keep],
            "cu_seqlens": torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32),
        }

    def compact(self, seed: int = 0) -> dict[str, Tensor]:
        """Return the scored rows in random order, with a few ignored rows in between."""
        rows, targets, segments = [], [], []
        num_rows = len(self.labels)
        for i in range(num_rows):
            marginal = num_rows + (i + num_rows // 2) % num_rows
            for labels, segment in ((self.labels, i), (self.marginal_labels, marginal)):
                for t in range(1, self.lengths[i]):
                    if labels[i, t] != IGNORE or t % 5 == 0:
                        rows.append(self.hidden[i, t - 1])
                        targets.append(labels[i, t])
                        segments.append(segment)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        return {
            "hidden": torch.stack(rows)[order],
            "labels": torch.stack(targets)[order],
            "segment_ids": torch.tensor(segments)[order],
        }


def make_case(
    lengths: list[tuple[int, int, int]],
    *,
    hidden_size: int = 6,
    vocab: int = 29,
    bias: bool = True,
    scale: float = 1.0,
    seed: int = 0,
) -> Case:
    """Return a float64 case with one pair per (prompt, chosen, rejected) lengths, all at least 1."""
    g = torch.Generator().manual_seed(seed)
    pairs = [[torch.randint(vocab, (n,), generator=g).tolist() for n in pair] for pair in lengths]
    batch = ik.condition_pairs(pairs, pad_token_id=0)
    num_rows, length = batch["labels"].shape

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    return Case(
        hidden=scale * normal(num_rows, length, hidden_size),
        weight=normal(vocab, hidden_size),
        bias=normal(vocab) if bias else None,
        labels=batch["labels"],
        marginal_labels=batch["marginal_labels"],
        ref_logps=-10 * normal(num_rows).abs(),
        lengths=batch["attention_mask"].sum(1).tolist(),
    )


RAGGED = make_case([(3, 5, 2), (1, 1, 7), (4, 3, 3), (2, 6, 1)])


def gradients_of(loss: Tensor, *leaves: Tensor | None) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [leaf for leaf in leaves if leaf is not None]))


def run(
    case: Case, *, backend: str, objective: object = "dpo", **options: object
) -> tuple[ik.InSPOOutput, list[Tensor]]:
    """Return the output, and the gradients of hidden, weight and bias (if any)."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (case.hidden, case.weight, case.bias)]
    hidden, weight, bias = leaves
    out = ik.fused_inspo_loss(
        hidden,
        weight,
        case.labels,
        bias=bias,
        objective=objective,
        **{"ref_logps": case.ref_logps, "marginal_labels": case.marginal_labels, "backend": backend, **options},
    )
    return out, gradients_of(out.loss, *leaves)


def relative_error(got: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return ((got.double() - expected).norm() / expected.norm().clamp(min=1e-300)).item()


def certain_label(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return hidden, weight and targets of two rows with an almost certain word: exp(label - offset) overflows."""
    weight, hidden = torch.zeros(40, 2, dtype=dtype), torch.ones(2, 2, dtype=dtype)
    weight[3, 0] = 900.0
    return hidden, weight, torch.tensor([3, 5])

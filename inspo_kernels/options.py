"""Bundle the arguments of the public functions: build once, check once, pass on as one value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .arguments import finite, integer, positive
from .backends import check_backend
from .head import FLOATS
from .objectives import Objective, make_objective
from .row_sums import checked_statistics

_Options = TypeVar("_Options", bound="TokenOptions")


@dataclass(frozen=True)
class TokenOptions:
    """Hold the arguments of ``linear_logps`` that are not tensors; see there."""

    softcap: float | None = None
    logit_scale: float = 1.0
    temperature: float = 1.0
    ignore_index: int = -100
    statistics: tuple[str, ...] = ()
    max_workspace_bytes: int | None = None
    backend: str = "auto"

    @classmethod
    def checked(cls: type[_Options], **given: Any) -> _Options:
        """Check and convert ``given``. The ``TypeError`` or ``ValueError`` names the wrong argument."""
        return cls(**check_options(given))


@dataclass(frozen=True)
class PairOptions(TokenOptions):
    """Hold the arguments of ``fused_inspo_loss`` and ``pair_logps`` that are not tensors; see there."""

    objective: str | Objective = "dpo"
    shift: bool = True
    num_pairs: int | None = None
    marginal_weight: float = 0.0
    reduction: str = "mean"


@dataclass(frozen=True)
class PairTensors:
    """Hold the tensors of ``fused_inspo_loss`` and ``pair_logps``; see there for shapes."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    bias: Tensor | None = None
    marginal_labels: Tensor | None = None
    cu_seqlens: Tensor | None = None
    segment_ids: Tensor | None = None
    ref_logps: Tensor | None = None
    pair_weights: Tensor | None = None

    def check_kinds(self) -> None:
        """Raise unless labels, boundaries, references and weights are tensors of the right kind."""
        for name in ("ref_logps", "pair_weights"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, Tensor) or value.dtype not in FLOATS):
                got = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a floating-point tensor, got {got}")
        if self.pair_weights is not None and self.pair_weights.requires_grad:
            raise ValueError("pair_weights requires grad, but would get no gradient here: pass pair_weights.detach()")
        for name in ("labels", "cu_seqlens", "segment_ids", "marginal_labels"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) and (value is not None or name == "labels"):
                raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")

    def for_reference(self) -> PairTensors:
        """Return the same tensors, with labels and segments as int64 on the device of hidden."""
        given = {name: getattr(self, name) for name in ("labels", "segment_ids", "marginal_labels")}
        moved: dict[str, Any] = {
            name: None if t is None else t.to(self.hidden.device, torch.int64) for name, t in given.items()
        }
        return replace(self, **moved)


def arguments_of(value: Any, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the fields of a dataclass as keyword arguments."""
    return {field.name: getattr(value, field.name) for field in fields(value) if field.name not in without}


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Check and convert ``options``; an error names the argument."""
    checked = dict(options)
    for name, value in options.items():
        if name == "objective" and not isinstance(value, (str, Objective)):
            make_objective(value)  # raises the error that says what is wrong
        elif name == "reduction" and (not isinstance(value, str) or value not in ("mean", "sum")):
            raise ValueError(f'reduction must be "mean" or "sum", got {value!r}')
        elif name == "shift" and not isinstance(value, bool):
            raise ValueError(f"shift must be True or False, got {value!r}")
        elif name == "backend":
            check_backend(value)
        elif name == "ignore_index":
            checked[name] = integer(name, value)
        elif name in ("max_workspace_bytes", "num_pairs") and value is not None:
            checked[name] = integer(name, value, minimum=1)
        elif name == "marginal_weight" and not (torch.compiler.is_compiling() and isinstance(value, (int, float))):
            # Under torch.compile, reading the value would make a new graph for every value.
            checked[name] = finite(name, value)
        elif name == "logit_scale":
            checked[name] = finite(name, value)
        elif name == "softcap" and value is not None:
            checked[name] = positive(name, value, or_else=" or None")
        elif name == "temperature":
            checked[name] = positive(name, value)
        elif name == "statistics":
            checked[name] = checked_statistics(value)
    return checked

"""Read the weight and bias of an output head: a single layer, or a layer with an adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..groups import first_rows, is_dtensor, sharing_group

_FUSED_ADAPTERS = (
    "Of adapters on the head, plain LoRA and modules_to_save can be fused: use either of them, leave the head out of "
    "target_modules, or call merge_and_unload() first; its base weight alone would leave the adapter out"
)


class HeadError(ValueError):
    """Say why a head cannot be fused; ``advice`` says what to do if the general advice does not apply."""

    def __init__(self, problem: str, advice: str | None = None) -> None:
        super().__init__(problem)
        self.advice = advice


@dataclass(frozen=True)
class LowRank:
    """Hold a LoRA adapter on the head, which adds ``scaling * up(down(dropout(hidden)))`` to the head's output."""

    down: Tensor  # (r, H)
    up: Tensor  # (V, r)
    scaling: float
    dropout: nn.Module | None


@dataclass(frozen=True)
class HeadParts:
    """Hold the tensors that make up a head. They are the model's own, so gradients reach its parameters."""

    weight: Tensor  # (V, H)
    bias: Tensor | None  # (V,)
    adapters: tuple[LowRank, ...] = ()

    def joined(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Return hidden (..., H + r) and weight (V, H + r) whose product is that of the head with its adapters.

        Adding ``scaling * up @ down`` to the weight would round the adapter to the weight's dtype. The longer product
        does not, and it lets dropout act on the adapter's input alone.
        """
        if not self.adapters:
            return hidden, self.weight
        if is_dtensor(self.weight):
            raise HeadError("its output head is tensor-parallel and carries an adapter", _FUSED_ADAPTERS)
        columns, rows = [hidden], [self.weight]
        for adapter in self.adapters:
            states = hidden if adapter.dropout is None else adapter.dropout(hidden)
            low = linear(states.to(adapter.down.dtype), adapter.down) * adapter.scaling
            columns.append(low.to(hidden.dtype))
            rows.append(adapter.up.to(self.weight.dtype))
        return torch.cat(columns, -1), torch.cat(rows, -1)

    def apply(self, hidden: Tensor) -> Tensor:
        """Return the head's output for ``hidden`` (..., H) from its parts, for all words, even if ranks share them."""
        hidden, weight = self.joined(hidden)
        if not is_dtensor(weight):
            return linear(hidden, weight, self.bias)
        from torch.distributed.tensor import DTensor, Replicate

        mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
        states = DTensor.from_local(hidden, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return linear(states, weight, self.bias).full_tensor()  # type: ignore[attr-defined]

    def words(self, count: int | None) -> tuple[Tensor, Tensor | None, Any]:
        """Return weight and bias of the first ``count`` words (None: of all), and the group whose ranks share them.

        Where ranks share the head (tensor parallelism), these are the rows of this rank, perhaps none.

        Raises:
            HeadError: ranks hold parts of the weight other than rows.
        """
        weight, bias = self.weight, self.bias
        if not is_dtensor(weight):
            if count is None:
                return weight, bias, None
            return weight[:count], None if bias is None else bias[:count], None
        group = sharing_group(weight)
        if group is None or not (bias is None or is_dtensor(bias)):
            placements = getattr(weight, "placements", None)
            raise HeadError(
                f"its output head is a DTensor with placements {placements}",
                "A tensor-parallel head must be sharded over its words, weight and bias over dimension 0 "
                '("colwise_gather_output" in a tp_plan)',
            )
        count = weight.shape[0] if count is None else count
        return first_rows(weight, count), None if bias is None else first_rows(bias, count), group

    def mapped(self, change: Callable[[Tensor], Tensor]) -> HeadParts:
        """Return parts with ``change`` applied to each tensor."""
        adapters = tuple(replace(each, down=change(each.down), up=change(each.up)) for each in self.adapters)
        return HeadParts(change(self.weight), None if self.bias is None else change(self.bias), adapters)


def head_parts(module: Any) -> HeadParts:
    """Read the parts of an output head: any layer with a weight (V, H), also under peft's wrappers.

    Raises:
        HeadError: the layer has no such weight, or an adapter of a kind whose weight is not known here.
    """
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        return head_parts(_saved_module(module))
    if hasattr(module, "base_layer"):
        return _with_adapters(module)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not weight.is_floating_point():
        shape = f"a weight of {weight.dtype} {tuple(weight.shape)}" if isinstance(weight, Tensor) else "no weight"
        raise HeadError(f"its output head is {qualified_name(module)}, which has {shape} instead of a float (V, H)")
    return HeadParts(weight, bias if isinstance(bias, Tensor) else None)


def adapter_state(module: nn.Module) -> tuple[Any, ...]:
    """Return what decides which of the head's adapters act; empty for a head without any."""
    names = ("active_adapters", "active_adapter", "merged_adapters", "disable_adapters", "scaling")
    layers = [part for part in module.modules() if hasattr(part, "base_layer") or hasattr(part, "original_module")]
    return tuple((id(layer), *(str(getattr(layer, name, None)) for name in names)) for layer in layers)


def _saved_module(wrapper: Any) -> nn.Module:
    """Return the copy that peft's ``modules_to_save`` runs in place of the head."""
    if wrapper.disable_adapters:
        return wrapper.original_module
    active = [name for name in wrapper.active_adapters if name in wrapper.modules_to_save]
    return wrapper.modules_to_save[active[0]] if active else wrapper.original_module


def _with_adapters(layer: Any) -> HeadParts:
    """Return the parts of a head that a peft layer wraps, with the adapters that act now."""
    parts = head_parts(layer.base_layer)
    if layer.disable_adapters or layer.merged:
        return parts
    if not hasattr(layer, "lora_A"):
        raise HeadError(f"its output head carries an adapter of the kind {qualified_name(layer)}", _FUSED_ADAPTERS)
    adapters, bias = [], parts.bias
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        up, scaling = layer.lora_B[name], float(layer.scaling[name])
        if name in (getattr(layer, "lora_variant", None) or {}) or type(up) is not nn.Linear:
            raise HeadError(f"the adapter {name!r} on its output head is a variant of LoRA", _FUSED_ADAPTERS)
        dropout = layer.lora_dropout[name]
        acting = dropout if isinstance(dropout, nn.Dropout) else None
        adapters.append(LowRank(layer.lora_A[name].weight, up.weight, scaling, acting))
        if up.bias is not None:
            bias = up.bias * scaling if bias is None else bias + up.bias * scaling
    return HeadParts(parts.weight, bias, tuple(adapters))


def qualified_name(value: Any) -> str:
    """Return the module and name of the value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"

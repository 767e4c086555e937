"""Find and verify, once per model, how a causal LM turns the states given to its output head into logits.

The model's own forward runs, so everything that it does before the head happens here, too. Hooks on the head keep the
states that it gets and pass it no rows instead, so no logits are computed. On the first call they pass it a few rows
of growing size. The model's own logits of these rows show scale, soft-cap and vocabulary, and whether the logits follow
from the states at all.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..gradients import graph_leaves
from ..groups import is_dtensor
from .head_fit import fit_tail, named_numbers, numbers, row_difference, rows_of, tolerance_of
from .head_parts import HeadError, HeadParts, adapter_state, head_parts, qualified_name

# Factors on the hidden states of the trial rows: small logits show the scale, large logits show the soft-cap.
_SIZES = (1.0, 4.0, 16.0, 64.0, 256.0, 1024.0)


@dataclass(frozen=True)
class Tail:
    """Turn the head's output y into logits: ``softcap * tanh(z / softcap)`` with ``z = logit_scale * y``.

    ``vocab_size`` is the number of leading columns that are words; None for all. ``from_base`` says that the head is
    given what the base model returns as ``last_hidden_state``.
    """

    softcap: float | None = None
    logit_scale: float = 1.0
    vocab_size: int | None = None
    from_base: bool = True


_TAILS: weakref.WeakKeyDictionary[nn.Module, dict[Any, Tail]] = weakref.WeakKeyDictionary()


def known_in_any_mode(model: Any, head: nn.Module) -> Tail | None:
    """Return the tail found by an earlier call in any train or grad mode."""
    wanted = _state(model, head)[2:]
    return next((tail for state, tail in _TAILS.get(model, {}).items() if state[2:] == wanted), None)


def _state(model: Any, head: nn.Module) -> tuple[Any, ...]:
    configs = {id(config): config for config in (model.config, model.config.get_text_config())}
    kinds = sorted({"cpu", "cuda", *(parameter.device.type for parameter in head.parameters())} - {"meta"})
    return (
        torch.is_grad_enabled(),
        model.training,
        id(head),
        type(head),
        adapter_state(head),
        tuple(torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) for kind in kinds),
        tuple(numbers(model).items()),
        tuple(tuple(numbers(config).items()) for config in configs.values()),
    )


@dataclass
class HeadCall:
    """Record the inputs and outputs of the head in one forward pass of the model."""

    shape: tuple[int, int]
    hidden: Tensor | None = None
    parts: HeadParts | None = None
    rows: Tensor | None = None  # what the head was handed instead of hidden
    output: Tensor | None = None
    expected: Tensor | None = None  # the output according to the parts
    base_states: Tensor | None = None  # last_hidden_state of the base model
    outputs: Any = field(default=None, repr=False)


def run_model(model: Any, inputs: dict[str, Any]) -> tuple[HeadCall, Tail]:
    """Run the model's own forward on ``inputs`` with ``input_ids`` or ``inputs_embeds``, without computing logits.

    The first call in a mode verifies the head, too.

    Raises:
        HeadError: the logits do not follow from what the head is given; the message says how far they are off.
    """
    head = model.get_output_embeddings()
    tail = _TAILS.get(model, {}).get(_state(model, head))  # unless something that it depends on has changed since
    batch, length, *_ = inputs["input_ids" if "input_ids" in inputs else "inputs_embeds"].shape
    call = HeadCall((batch, length))
    # A compiled forward would be compiled again for the hooks of each call.
    forward = model if model._compiled_call_impl is None and not in_fsdp(model) else model.forward
    with _intercepted(model, head, call, few=tail is None):
        call.outputs = forward(**inputs)
    if call.hidden is None:
        raise HeadError(f"it computes its logits without calling its output head, {qualified_name(head)}")
    if tail is None:
        tail = _verified(model, call)
        if not call.hidden.is_meta:
            _TAILS.setdefault(model, {})[_state(model, head)] = tail
    return call, tail


def in_fsdp(model: Any) -> bool:
    """Tell whether FSDP2 shards the model itself: then its hooks have run, and must not run again inside it."""
    return any(base.__name__ == "FSDPModule" for base in type(model).__mro__)


@contextmanager
def _intercepted(model: Any, head: nn.Module, call: HeadCall, few: bool) -> Iterator[None]:
    """Make the head run on few rows or none, and record in ``call`` the states that it was given.

    Other threads may run the same model meanwhile.
    """
    thread = threading.get_ident()

    def own(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: hook(*args) if threading.get_ident() == thread else None

    before_forward = _identity(head)
    offloaded = _LinearArguments()
    around_head = ExitStack()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call.hidden is not None:
            raise HeadError("it calls its output head more than once")
        call.hidden = args[0] if args else next(iter(kwargs.values()))
        if is_dtensor(call.hidden):
            raise HeadError("its output head is given a DTensor instead of the whole states")
        if call.hidden.dim() != 3 or call.hidden.shape[:2] != call.shape:
            raise HeadError(f"its head is given states {tuple(call.hidden.shape)} for tokens {tuple(call.shape)}")
        # A head that ranks share gets a row: DTensor's linear map takes no empty input.
        fewest = int(any(is_dtensor(parameter) for parameter in module.parameters()))
        call.rows = _few_rows(call.hidden) if few else call.hidden[:, :fewest].detach()
        for part in module.modules():
            if isinstance(part, nn.Dropout) and part.training:
                part.training = False
                around_head.callback(setattr, part, "training", True)
        if any(parameter.is_meta for parameter in module.parameters()):
            around_head.enter_context(offloaded)
        return (call.rows, *args[1:]), ({} if not args else kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        assert call.hidden is not None and call.rows is not None
        if offloaded.weight is not None and not call.hidden.is_meta:
            call.parts = HeadParts(offloaded.weight, offloaded.bias)
        else:
            call.parts = head_parts(module)
            if _identity(module) != before_forward or _in_zero3(module):
                call.parts = call.parts.mapped(torch.clone)  # the parameters exist only while the head runs
        if few:
            call.output = output
            call.expected = call.parts.apply(call.rows)
            if call.parts.adapters:
                _check_adapters(module, call.rows)
        around_head.close()

    def released(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if call.parts is not None and _in_zero3(module):
            call.parts = call.parts.mapped(lambda p: _AfterOutput.apply(output, p) if p.requires_grad else p)

    def base_done(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call.base_states = getattr(output, "last_hidden_state", None)

    with ExitStack() as hooks:
        hooks.enter_context(around_head)  # in case the head raises
        # Our hooks need the head's weight, so they run after an engine's hooks gather it and before they release it.
        hooks.enter_context(head.register_forward_pre_hook(own(before), with_kwargs=True))
        hooks.enter_context(head.register_forward_hook(own(after), with_kwargs=True, prepend=True))
        hooks.enter_context(head.register_forward_hook(own(released), with_kwargs=True))
        if few and model.base_model is not model:
            hooks.enter_context(model.base_model.register_forward_hook(own(base_done), with_kwargs=True))
        yield


class _LinearArguments(TorchFunctionMode):
    """Keep weight and bias of the first linear map: accelerate puts offloaded weights in place inside the forward."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear and self.weight is None:
            named = dict(zip(("input", "weight", "bias"), args)) | (kwargs or {})
            self.weight, self.bias = named["weight"], named.get("bias")
        return func(*args, **(kwargs or {}))


def _in_zero3(head: nn.Module) -> bool:
    """Return whether DeepSpeed's ZeRO-3 shards the parameters of ``head``."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


class _AfterOutput(torch.autograd.Function):
    """Return ``part``, a copy of a parameter, tied to the head's ``output``: its gradient flows after the output's.

    ZeRO-3 gathers a layer's parameters again when a gradient reaches the layer's output. Until then they are empty, and
    torch cannot add a gradient to an empty parameter. Autograd visits the output first, because it was created later
    than the copies.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, part: Tensor) -> Tensor:
        ctx.like_output = output.new_zeros(()).expand(output.shape)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return ctx.like_output, grad


def _identity(head: nn.Module) -> list[tuple[int, int, int]]:
    """Return a value that changes if an engine replaces parameters by other tensors, or fills empty parameters."""
    return [
        (id(p), p.numel(), 0 if is_dtensor(p) or p.is_meta else p.untyped_storage().size()) for p in head.parameters()
    ]


def _few_rows(hidden: Tensor) -> Tensor:
    """Return (B, k, H): states of the first places in every size of ``_SIZES``, without gradient."""
    batch, length = hidden.shape[0], hidden.shape[1]
    count = -(-len(_SIZES) // max(batch, 1))
    places = torch.arange(count, device=hidden.device) % max(length, 1)
    sizes = torch.tensor(_SIZES, device=hidden.device).repeat(-(-batch * count // len(_SIZES)))[: batch * count]
    states = torch.nan_to_num(hidden.detach()[:, places])
    # Any scale fits states of 0, which padding tokens may have.
    pattern = torch.arange(hidden.shape[2], device=hidden.device).cos().to(hidden.dtype)
    states = torch.where((states != 0).any(-1, keepdim=True), states, pattern)
    return torch.nan_to_num(states * sizes.view(batch, count, 1).to(hidden.dtype))


def _verified(model: Any, call: HeadCall) -> Tail:
    """Return the tail with which the call's logits follow from the head's output, or raise HeadError."""
    logits = getattr(call.outputs, "logits", None)
    if not isinstance(logits, Tensor) or not isinstance(call.output, Tensor):
        raise HeadError(f"its forward returns no logits, but {qualified_name(call.outputs)}")
    assert call.expected is not None and call.hidden is not None and call.parts is not None
    base = call.base_states
    from_base = base is not None and base.shape == call.hidden.shape and base.data_ptr() == call.hidden.data_ptr()
    if call.hidden.is_meta:
        return Tail(from_base=from_base)
    if call.output.shape != call.expected.shape or logits.shape[:-1] != call.output.shape[:-1]:
        raise HeadError(
            f"its head made {tuple(call.output.shape)} and its forward {tuple(logits.shape)} of states "
            f"{tuple(call.hidden.shape)}"
        )
    tolerance = tolerance_of(call.output, logits, call.expected)
    output, expected, logits_ = (rows_of(t) for t in (call.output, call.expected, logits))
    if (error := row_difference(output, expected)) > 10 * tolerance:
        raise HeadError(
            f"its output head, {qualified_name(model.get_output_embeddings())}, is not a linear map by its weight: its "
            f"output differs from hidden @ weight.T + bias by {error:.1e} of the largest logit"
        )
    softcap, scale, words = fit_tail(output, logits_, named_numbers(model), tolerance)
    # A parameter outside the head that affects the logits would get no gradient.
    if missing := graph_leaves(logits).keys() - graph_leaves(call.expected).keys():
        names = [name for name, parameter in model.named_parameters() if id(parameter) in missing]
        raise HeadError(f"its logits depend on {', '.join(names[:3]) or 'a parameter'} besides its output head")
    return Tail(softcap, scale, None if words == output.shape[1] else words, from_base)


def _check_adapters(module: nn.Module, rows: Tensor) -> None:
    """Compare a head with its parts while its adapters hold random numbers: fresh ones are zero and show nothing."""
    generator = torch.Generator().manual_seed(0)
    other = {}
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            values = 0.1 * torch.randn(parameter.shape, generator=generator)
            other[f"head.{name}"] = values.to(parameter.device, parameter.dtype)
    with torch.no_grad():
        output, expected = torch.func.functional_call(_WithParts(module), other, (rows,))
    error = row_difference(rows_of(output), rows_of(expected))
    if error > 10 * tolerance_of(output, expected):
        raise HeadError(f"its head's adapter is not plain LoRA: its output differs by {error:.1e} of the largest logit")


class _WithParts(nn.Module):
    """Compare a head with its parts on the same rows."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return type(self.head).forward(self.head, rows), head_parts(self.head).apply(rows)

"""Return the final hidden states and the output head of any transformers causal LM, without computing its logits."""

from __future__ import annotations

import ctypes
import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..groups import is_dtensor
from .head_parts import HeadError, head_parts, qualified_name
from .model_head import Tail, in_fsdp, known_in_any_mode, run_model
from .small_runs import device_of, mixes_packed_sequences, small_ids, undisturbed

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

# Arguments of the causal LM's forward that would have no effect or a different effect here.
_HEAD_ARGUMENTS = frozenset({"labels", "logits_to_keep", "num_logits_to_keep", "shift_labels", "num_items_in_batch"})


def hidden_and_head(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | BlockMask | dict[str, Tensor | BlockMask] | None = None,
    position_ids: Tensor | None = None,
    *,
    return_outputs: bool = False,
    **model_kwargs: Any,
) -> tuple[Any, ...]:
    """Run a transformers causal LM once and return its hidden states and LM head instead of its logits.

    The results satisfy ``model(...).logits == cap(logit_scale * (hidden @ weight.T + bias))`` with
    ``cap(z) = softcap * tanh(z / softcap)``, or ``cap(z) = z`` where ``softcap`` is None. They are ready for
    ``fused_inspo_loss(hidden, labels=labels, **head)``.

    The model's own forward runs, without a key-value cache, in the model's train or eval mode and under the caller's
    grad and autocast modes. Its output head runs on no rows. The first call in each mode is an exception: the head
    runs on a few rows, and their logits verify the formula above. If the config or the head's adapters change, the
    next call verifies again. Inside ``torch.compile`` the base model runs instead, and tracing verifies the head.

    Call it inside the forward of the module that DDP, FSDP2 or DeepSpeed wraps, on the inner model.

    Args:
        model: a transformers causal LM, or a ``PeftModel`` around one.
        input_ids: (batch, T) int64, or (1, N) for packed sequences.
        attention_mask: (batch, T), 1 on tokens. None for packed sequences or without padding. For trees, the result
            of ``tree_attention_mask``.
        position_ids: (batch, T) int64. With ``attention_mask=None`` its restarts separate packed sequences.
        return_outputs: also return the model's outputs; do not use their ``logits``. With
            ``output_router_logits=True`` they hold the router loss of a mixture of experts as ``aux_loss``; add
            ``model.config.router_aux_loss_coef * outputs.aux_loss`` to the loss.
        model_kwargs: further arguments of the model, e.g. ``inputs_embeds``, ``token_type_ids`` or ``pixel_values``.

    Returns:
        ``hidden`` (batch, T, H), the input of the output head; and ``head`` with ``"weight"`` (V, H) and ``"bias"``
        (V,) or None, ``"softcap"`` (float or None) and ``"logit_scale"`` (float). With ``return_outputs`` the model's
        outputs are third.

        Weight and bias are the model's own parameters, tied or not, or are computed from them, so gradients reach the
        parameters. Rows that pad the vocabulary are left out. If an engine gathers the parameters only for the head's
        forward, weight and bias are copies. A LoRA adapter of rank r on the head adds r columns to weight and hidden.

        For a model under tensor parallelism (``DistributedConfig(tp_plan="auto")`` of transformers) weight and bias
        are this rank's rows, and ``head`` also holds ``"process_group"``, the group whose ranks share the vocabulary.

    Raises:
        TypeError: ``model`` is a wrapper (DDP, FSDP, DeepSpeed, torch.compile), an encoder-decoder or not a
            transformers model, or an argument concerns the logits.
        ValueError: the logits do not follow from the head's input; the message says by how much they differ. Also
            raised if the model does not take the position ids, or lets packed sequences attend to each other.
    """
    model = _inner_model(model)
    if fixed := {"use_cache", "return_dict"}.intersection(model_kwargs):
        names = ", ".join(sorted(fixed))
        raise TypeError(f"the model runs without a cache, so {names} is set here; remove it")
    if misplaced := _HEAD_ARGUMENTS.intersection(model_kwargs):
        names = ", ".join(sorted(misplaced))
        raise TypeError(f"no logits are computed here, so {names} would have no effect; remove it")
    head = _output_head(model)
    accepted = _accepted(model)
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask, **model_kwargs}
    inputs = {name: value for name, value in inputs.items() if value is not None}
    inputs |= {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in accepted}
    if position_ids is not None:
        if "position_ids" in accepted:
            inputs["position_ids"] = position_ids
        else:
            _check_implied_positions(model, position_ids, attention_mask)
        if attention_mask is None and not torch.compiler.is_compiling() and mixes_packed_sequences(model):
            if (torch.diff(position_ids, dim=-1) != 1).any():
                raise ValueError(
                    f"{model.config.model_type!r} lets packed sequences attend to each other, or counts positions in "
                    "its own way; use padded rows and their attention_mask"
                )
    _drop_router_loss(model, inputs, accepted, return_outputs)

    if "input_ids" not in inputs and "inputs_embeds" not in inputs:
        raise TypeError("give input_ids or inputs_embeds")
    try:
        if torch.compiler.is_compiling():
            # Hooks on the head cannot be traced, so the base model runs, whose output is the head's input.
            tail = _tail_while_tracing(id(model))
            outputs = model.base_model(**inputs)
            hidden, parts = outputs.last_hidden_state, head_parts(head)
        else:
            call, tail = run_model(model, inputs)
            assert call.hidden is not None and call.parts is not None
            hidden, parts, outputs = call.hidden, call.parts, call.outputs
    except HeadError as error:
        raise _refusal(model, error) from None
    hidden, weight = parts.joined(hidden)
    weight, bias, group = replace(parts, weight=weight).words(tail.vocab_size)
    result = {"weight": weight, "bias": bias, "softcap": tail.softcap, "logit_scale": tail.logit_scale}
    if group is not None:
        result["process_group"] = group
    return (hidden, result, outputs) if return_outputs else (hidden, result)


def check_head(model: PreTrainedModel) -> None:
    """Raise the error that ``hidden_and_head`` would raise for this model's class and head, without computing anything.

    This is the only check for a model on the meta device, which has no weights.
    """
    model = _inner_model(model)
    try:
        head_parts(_output_head(model))
    except HeadError as error:
        raise _refusal(model, error) from None


def _refusal(model: Any, error: HeadError) -> ValueError:
    problem = f"{model.config.model_type!r}: {error}"
    return ValueError(f"{problem}. {error.advice}" if error.advice else _by_hand(problem))


@torch.compiler.assume_constant_result
def _tail_while_tracing(address: int) -> Tail:
    """Return the verified tail; verify it on two tokens if no call outside torch.compile has done so.

    ``address`` is the model's id(), because torch 2.11 passes no module to such a function. torch guards the compiled
    code on it. The caller holds the model, so the address is valid.
    """
    model = ctypes.cast(address, ctypes.py_object).value
    head = model.get_output_embeddings()
    tail = known_in_any_mode(model, head)
    if tail is None:
        with undisturbed(model):
            ids = small_ids(model, 2)[None].to(device_of(model))
            _, tail = run_model(model, {"input_ids": ids})
    if not tail.from_base:
        raise HeadError("its head's input is not what its base model returns: call it outside torch.compile")
    return tail


def _inner_model(model: Any) -> Any:
    """Return the causal LM itself, out of peft's wrapper; refuse any other wrapper."""
    if hasattr(model, "get_base_model"):
        if getattr(model, "active_peft_config", None) is not None and model.active_peft_config.is_prompt_learning:
            raise TypeError(
                f"{qualified_name(model)} learns a prompt, whose positions have no token: use an adapter inside the "
                "model's layers, such as LoRA"
            )
        model = model.get_base_model()
    # FSDP2 turns the model itself into a wrapper. While its own forward runs, some of its parameters are whole.
    sharded = in_fsdp(model) and all(map(is_dtensor, model.parameters()))
    if sharded or isinstance(getattr(model, "module", None), nn.Module) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{qualified_name(model)} is a wrapper, and calling the model inside it would bypass its hooks; put the "
            "model and the loss into one nn.Module whose forward calls hidden_and_head on the inner model and returns "
            "the loss, and wrap that module instead"
        )
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "model_type"):
        raise TypeError(f"expected a transformers causal LM, got {qualified_name(model)}")
    if getattr(model.config, "is_encoder_decoder", False):  # its encoder would show the decoder what it is to predict
        raise TypeError(f"expected a transformers causal LM, got the encoder-decoder {qualified_name(model)}")
    return model


def _output_head(model: Any) -> nn.Module:
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        problem = f"{qualified_name(model)} has no single output head: get_output_embeddings() gives {head!r}"
        raise ValueError(_by_hand(problem))
    return head


def _accepted(model: Any) -> set[str]:
    """Return the names among the arguments of interest that the model's forward takes."""
    parameters = inspect.signature(model.forward).parameters
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    base = inspect.signature(model.base_model.forward).parameters if anything else {}
    return {*parameters, *base}


def _drop_router_loss(model: Any, inputs: dict[str, Any], accepted: set[str], return_outputs: bool) -> None:
    """Keep a mixture of experts from computing a router loss that is unused or incompatible with the mask."""
    if "output_router_logits" not in accepted:
        return
    mask = inputs.get("attention_mask")
    wanted = inputs.get("output_router_logits", getattr(model.config, "output_router_logits", False))
    if not return_outputs:
        inputs["output_router_logits"] = False
    elif wanted and mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise ValueError(
            "the router loss needs an attention_mask (batch, T), which trees do not have: use layout='rows', or "
            "output_router_logits=False"
        )


def _check_implied_positions(model: Any, position_ids: Tensor, attention_mask: Any) -> None:
    """Refuse positions that differ from the model's own count, for a model that takes no position ids."""
    mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2 else None
    counted = torch.ones_like(position_ids) if mask is None else mask.to(position_ids.dtype)
    differs = position_ids != counted.cumsum(-1) - 1
    if mask is not None:
        differs &= mask.bool()
    if differs.any():
        raise ValueError(
            f"{model.config.model_type!r} takes no position_ids: it counts tokens from 0 in each row. Use padded rows "
            "(layout='rows') and leave position_ids out"
        )


def _by_hand(problem: str) -> str:
    return (
        f"{problem}. Call fused_inspo_loss with its parts instead: hidden, the input of the output head; weight; and, "
        "if the model's forward uses them, bias, softcap (logits = softcap * tanh(z / softcap)) and "
        "logit_scale (a factor on the logits). A head that does anything else to hidden or to the logits cannot be "
        "fused"
    )

"""Final hidden states and output head of a transformers causal LM, without computing its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel


class _Tail(NamedTuple):
    """How logits follow from the head's output y: ``softcap * tanh(z / softcap)`` with ``z = logit_scale * y``."""

    softcap: float | None = None
    logit_scale: float = 1.0


def _plain(model: Any) -> _Tail:
    return _Tail()


def _softcapped(model: Any) -> _Tail:
    return _Tail(softcap=model.config.final_logit_softcapping)


def _scaled(model: Any) -> _Tail:
    return _Tail(logit_scale=model.logit_scale)


def _divided(model: Any) -> _Tail:
    return _Tail(logit_scale=1.0 / model.config.logits_scaling)


# config.model_type -> how that architecture turns its head's output into logits. The head itself (weight and bias) is
# always get_output_embeddings(). An architecture belongs here only if nothing else stands between the base model's
# last_hidden_state and the logits; each entry has a tiny model in the tests.
_TAILS: dict[str, Callable[[Any], _Tail]] = {
    "cohere": _scaled,
    "cohere2": _scaled,
    "gemma": _plain,
    "gemma2": _softcapped,
    "gemma3": _plain,  # the multimodal wrapper: unlike gemma3_text it never soft-caps
    "gemma3_text": _softcapped,
    "gpt2": _plain,
    "gpt_neox": _plain,
    "gptj": _plain,
    "granite": _divided,
    "granitemoe": _divided,
    "llama": _plain,
    "mistral": _plain,
    "mixtral": _plain,
    "olmo": _plain,
    "olmo2": _plain,
    "olmo3": _plain,
    "opt": _plain,
    "phi": _plain,
    "phi3": _plain,
    "qwen2": _plain,
    "qwen2_moe": _plain,
    "qwen3": _plain,
    "qwen3_moe": _plain,
    "smollm3": _plain,
    "stablelm": _plain,
    "starcoder2": _plain,
}

# Architectures that build their causal mask without position_ids, so that packed sequences would see each other.
_CANNOT_PACK = frozenset({"opt"})

# Arguments of the causal LM's forward that its base model would swallow without effect.
_HEAD_ARGUMENTS = frozenset({"labels", "logits_to_keep", "num_logits_to_keep", "shift_labels", "num_items_in_batch"})


def hidden_and_head(
    model: PreTrainedModel,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | BlockMask | dict[str, Tensor | BlockMask] | None = None,
    position_ids: Tensor | None = None,
    **model_kwargs: Any,
) -> tuple[Tensor, dict[str, Any]]:
    """Run the trunk of a transformers causal LM once and return what its logits are made of.

    The two results satisfy ``model(...).logits == cap(logit_scale * (hidden @ weight.T + bias))`` with
    ``cap(z) = softcap * tanh(z / softcap)``, or ``cap(z) = z`` where ``softcap`` is None. They are ready for
    ``fused_inspo_loss(hidden, labels=labels, **head)``.

    The trunk runs without a key-value cache, in the model's own train or eval mode and under the caller's grad and
    autocast modes. Losses a model adds by itself (the router loss of a mixture of experts) are not part of the result.

    Args:
        model: a transformers causal LM itself, not a wrapper around one. The table covers transformers' own classes;
            code loaded from elsewhere under a known ``model_type`` is taken to compute its logits in the same way.
        input_ids: (batch, T) int64, or (1, N) for packed sequences.
        attention_mask: (batch, T), 1 on tokens; None for packed sequences or where nothing is padded; for trees what
            ``tree_attention_mask`` makes of the batch.
        position_ids: (batch, T) int64. With ``attention_mask=None`` its restarts separate packed sequences.
        model_kwargs: further arguments of the base model, e.g. ``inputs_embeds`` or ``token_type_ids``.

    Returns:
        ``hidden`` (batch, T, H), the input of the output head; and ``head`` with ``"weight"`` (V, H) and ``"bias"``
        (V,) or None, which are the model's own parameters (so gradients reach them, tied or not), ``"softcap"``
        (float or None) and ``"logit_scale"`` (float).

    Raises:
        TypeError: ``model`` is a wrapper (DDP, FSDP, DeepSpeed, peft, torch.compile) or no transformers model, or an
            argument concerns the logits.
        ValueError: the architecture is not in the table or its head is not a plain ``nn.Linear``; the message says
            what to pass to ``fused_inspo_loss`` by hand. Also packed sequences for an architecture that mixes them.
    """
    _refuse_wrapper(model)
    if fixed := {"use_cache", "return_dict"}.intersection(model_kwargs):
        names = ", ".join(sorted(fixed))
        raise TypeError(f"the trunk runs without a cache, for which {names} is set here; remove it")
    if misplaced := _HEAD_ARGUMENTS.intersection(model_kwargs):
        names = ", ".join(sorted(misplaced))
        raise TypeError(f"no logits are computed here, so {names} would have no effect; remove it")
    model_type = model.config.model_type
    if model_type not in _TAILS:
        raise ValueError(_by_hand(f"model_type {model_type!r} is not in the table of known output heads"))
    if model_type in _CANNOT_PACK and attention_mask is None and _has_restarts(position_ids):
        raise ValueError(
            f"{model_type!r} lets packed sequences attend to each other; use padded rows and their attention_mask"
        )
    linear = model.get_output_embeddings()
    # Exact type: adapters, quantised and parametrised layers subclass or replace nn.Linear and compute something else.
    # So does FSDP2 where it shards the head by itself, and then the weight is not whole here.
    if type(linear) is not nn.Linear:
        raise ValueError(_by_hand(f"the output head of this {model_type!r} model is {_name(linear)}, not nn.Linear"))

    outputs = model.base_model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        use_cache=False,
        return_dict=True,
        **model_kwargs,
    )
    tail = _TAILS[model_type](model)
    head = {"weight": linear.weight, "bias": linear.bias, "softcap": tail.softcap, "logit_scale": tail.logit_scale}
    return outputs.last_hidden_state, head


def _refuse_wrapper(model: Any) -> None:
    if hasattr(model, "get_base_model"):
        raise TypeError(
            f"{_name(model)} is an adapter wrapper; if its adapter sits inside the model's own layers (LoRA does), "
            "pass model.get_base_model(), which keeps it active"
        )
    sharded = any(base.__name__ == "FSDPModule" for base in type(model).__mro__)
    if sharded or isinstance(getattr(model, "module", None), nn.Module) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"{_name(model)} is a wrapper, and calling the model inside it would bypass its hooks; put the model and "
            "the loss into one nn.Module whose forward calls hidden_and_head on the inner model and returns the loss, "
            "and wrap that module instead"
        )
    if not isinstance(model, nn.Module) or not hasattr(getattr(model, "config", None), "model_type"):
        raise TypeError(f"expected a transformers causal LM, got {_name(model)}")


def _by_hand(problem: str) -> str:
    return (
        f"{problem}. Call fused_inspo_loss with its parts instead: hidden, the state after the final norm; "
        "weight=model.get_output_embeddings().weight; and where the model's forward uses them, bias, softcap "
        "(logits = softcap * tanh(z / softcap)) and logit_scale (a factor on the logits). A head that does anything "
        "else to hidden or to the logits cannot be fused"
    )


def _has_restarts(position_ids: Tensor | None) -> bool:
    return position_ids is not None and bool((torch.diff(position_ids, dim=-1) != 1).any())


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"

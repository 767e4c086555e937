"""Check that a model can be trained on pairs: a causal language model with finite weights and a head that is known."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

import inspo_kernels as ik
from inspo_kernels.models import check_head

from .errors import InputError, first_of

# Largest change of the logits that rounding causes, relative to the largest logit. In bfloat16 kernels round more.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def check_architecture(model: PreTrainedModel) -> None:
    """Raise InputError if ``hidden_and_head`` cannot split the model or it is not causal; this tries a few tokens."""
    check_finite(model)
    try:
        if model.device.type == "meta":  # nothing can be computed
            check_head(model)
        else:
            words = cast(Tensor, model.get_input_embeddings().weight).shape[0]
            # No padding, whose states may be 0 and fit any head.
            ids = torch.arange(4, device=model.device) + words // 2
            with torch.no_grad():
                ik.hidden_and_head(model, input_ids=ids[None] % words)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, RuntimeError) as error:
        problem = str(error).split(". ")[0]  # advice to callers of the library follows
        raise InputError(
            f"model: {type(model).__name__} cannot be trained here: {problem}; choose a model of another architecture"
        ) from None
    check_causal(model, rounds_by_batch=rounds_by_batch(model))


def check_causal(model: PreTrainedModel, *, rounds_by_batch: bool) -> None:
    """Raise InputError if a token's logits depend on later tokens, as in BERT; this tries it on a few tokens.

    On the meta device and with ``rounds_by_batch``, only encoders that transformers knows are found.
    """
    config = model.config.get_text_config()
    decoder = getattr(config, "is_decoder", False) or getattr(config, "causal", False)
    sees_later = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder
    if not sees_later and model.device.type != "meta" and not rounds_by_batch:
        words = model.get_output_embeddings().weight.shape[0]
        ids = torch.arange(6, device=model.device)[None].repeat(2, 1) + words // 2
        ids[1, -1] += 1
        training = model.training
        with torch.no_grad():
            first, other = model.eval()(input_ids=ids % words, use_cache=False).logits[:, :-1].float()
        model.train(training)
        sees_later = bool((first - other).abs().max() > _ROUNDING.get(model.dtype, 5e-2) * first.abs().max())
    if sees_later:
        raise InputError(
            f"model: in {type(model).__name__} a token sees the tokens after it, so log-probs of responses would be "
            "meaningless; choose a causal language model (decoder only)"
        )


def check_finite(model: PreTrainedModel) -> None:
    """Raise InputError for weights that are not finite; those on the meta device have no values."""
    weights = {n: p for n, p in model.named_parameters() if p.device.type != "meta" and p.is_floating_point()}
    if bad := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise InputError(f"model: its weights hold values that are not finite: {first_of(bad)}; copy or save it again")


def rounds_by_batch(model: PreTrainedModel) -> bool:
    """Return whether a row's log-probs depend on its batch: 8-bit layers treat a batch's outliers separately."""
    return any(getattr(getattr(module, "state", None), "threshold", 0) > 0 for module in model.modules())

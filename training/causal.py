"""Check that a model can be trained on pairs: it must be a causal language model, which sees no later tokens."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from .errors import InputError

# Largest change of the logits that rounding causes, relative to the largest logit. In bfloat16 kernels round more.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


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

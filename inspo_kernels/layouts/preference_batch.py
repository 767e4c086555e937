"""Lay collated preference batches (TRL's collators and processors) out for InSPO (arXiv 2512.23126).

Such a batch holds a prompt and a chosen response in row ``b``, and the same prompt and the rejected response in row
``B + b``. Everything here works on *positions* in the batch. Token types therefore follow their tokens, and an image
stays with its prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .conditioning import IGNORE_INDEX, condition_pairs

# Tensors that every batch must hold, by the names of TRL's collators.
_NEEDED = ("input_ids", "attention_mask", "completion_mask")


def condition_batch(
    batch: Mapping[str, Any],
    *,
    pad_token_id: int,
    separator_ids: Sequence[int] | Tensor = (),
    conditioned: bool | Sequence[bool] = True,
    alternative_dropout: float = 0.0,
    dropout_seed: int = 0,
    marginals: bool = False,
) -> dict[str, Any]:
    """Return the conditioned version of a collated preference batch, text or vision.

    Row ``b`` becomes ``x + y_l + separator + y_w`` and row ``B + b`` becomes ``x + y_w + separator + y_l``, each scored
    on its last response alone. Rows are padded on the right. Use the result in place of the batch:

        batch = collator(examples)                     # TRL's, or a processor's
        conditioned = ik.condition_batch(batch, pad_token_id=tokenizer.pad_token_id)

    Args:
        batch: ``input_ids``, ``attention_mask`` and ``completion_mask``, each (2B, T): rows 0..B-1 hold prompt and
            chosen response, rows B..2B-1 the same prompts and the rejected responses. Padding may be on either side.
            Other integer or bool tensors of that shape (``token_type_ids``, ``mm_token_type_ids``) follow their
            tokens. ``position_ids`` are recomputed, and ``labels`` score the last response. Everything else (pixel
            values, image sizes) is passed on, because each row keeps its prompt and so its images.
        pad_token_id: id at the right end of the shorter rows; never scored and never attended to.
        separator_ids: ids between the two responses; never scored. Their token types are 0.
        conditioned: which pairs are conditioned, as for ``condition_pairs``. The other pairs keep their rows
            ``x + y_w`` and ``x + y_l``.
        alternative_dropout: as for ``condition_pairs``.
        dropout_seed: as for ``condition_pairs``.
        marginals: also return ``marginal_mask`` (2B, T) int64. It is 1 on the other response of each row, which sees
            the prompt alone, and 0 in the rows of a pair that is not conditioned.

    Returns:
        A dict with the batch's keys, on the batch's device.

    Raises:
        KeyError: ``input_ids``, ``attention_mask`` or ``completion_mask`` is missing.
        ValueError: their shapes differ, the number of rows is odd, rows ``b`` and ``B + b`` have different prompts, or
            a prompt or response is empty.
    """
    positions = pair_positions(batch)
    ids = batch["input_ids"]
    separator = torch.as_tensor(separator_ids, dtype=ids.dtype).to(ids.device)
    laid_out = condition_pairs(
        positions,
        pad_token_id=0,
        separator_ids=torch.arange(ids.numel(), ids.numel() + len(separator)),
        conditioned=conditioned,
        alternative_dropout=alternative_dropout,
        dropout_seed=dropout_seed,
    )
    source = laid_out["input_ids"].to(ids.device)
    attention, position_ids = (laid_out[name].to(ids.device) for name in ("attention_mask", "position_ids"))
    scored = (laid_out["labels"] != IGNORE_INDEX).to(ids.device)

    def follow(values: Tensor, between: Tensor, padding: int) -> Tensor:
        moved = torch.cat([values.flatten(), between.to(values.dtype)])[source]
        return moved.masked_fill(attention == 0, padding)

    result = dict(batch)
    for name, value in batch.items():
        if name == "position_ids" and isinstance(value, Tensor):
            if value.shape != ids.shape:
                raise ValueError(
                    f"position_ids of shape {tuple(value.shape)} cannot be recomputed: leave them out of the batch, "
                    "so that the model computes its own"
                )
            result[name] = position_ids
        elif isinstance(value, Tensor) and value.shape == ids.shape and not value.is_floating_point():
            # One integer per token. Image features are floating-point and have other shapes.
            result[name] = follow(value, torch.zeros_like(separator), 0)
    result["input_ids"] = follow(ids, separator, pad_token_id)
    result["attention_mask"] = attention.to(batch["attention_mask"].dtype)
    result["completion_mask"] = scored.to(batch["completion_mask"].dtype)
    if "labels" in batch:
        result["labels"] = result["input_ids"].masked_fill(~scored, IGNORE_INDEX)
    if marginals:
        other = laid_out["marginal_labels"]
        mask = torch.zeros_like(source) if other is None else (other != IGNORE_INDEX).long()
        result["marginal_mask"] = mask.to(ids.device)
    return result


def pair_positions(batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return the positions of each pair's prompt and responses in ``input_ids.flatten()``: int64, on the CPU."""
    for name in _NEEDED:
        if name not in batch:
            raise KeyError(f"the batch has no {name!r}: it holds {', '.join(map(repr, batch))}")
    ids, attention, completion = (batch[name].cpu() for name in _NEEDED)
    if ids.ndim != 2 or not ids.shape == attention.shape == completion.shape:
        shapes = ", ".join(f"{name} {tuple(batch[name].shape)}" for name in _NEEDED)
        raise ValueError(f"the batch's tensors must have one shape (2B, T), got {shapes}")
    if len(ids) % 2:
        raise ValueError(f"the batch has {len(ids)} rows, but chosen rows and as many rejected rows are an even number")
    pairs, at = len(ids) // 2, torch.arange(ids.numel()).view_as(ids)
    scored = attention.bool() & completion.bool()
    prompt = attention.bool() & ~completion.bool()
    found = []
    for b in range(pairs):
        chosen_prompt, rejected_prompt = at[b][prompt[b]], at[pairs + b][prompt[pairs + b]]
        if not torch.equal(ids.flatten()[chosen_prompt], ids.flatten()[rejected_prompt]):
            raise ValueError(
                f"rows {b} and {pairs + b} are one pair, but their prompts differ: the rows must be chosen responses, "
                "then rejected responses, with prompts that no truncation has cut"
            )
        found.append((chosen_prompt, at[b][scored[b]], at[pairs + b][scored[pairs + b]]))
    return found

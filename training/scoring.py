"""Model and loss as one module, and the log-probs of many pairs: one code path for policy, reference and evaluation."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel

import inspo_kernels as ik

from .config import InputError
from .data import Pair


class PairModel(nn.Module):
    """A causal LM whose forward takes a batch of pairs and returns the loss summed over them, with all that is logged.

    Training engines wrap this module, not the model inside: the head's weight is read within the wrapped forward.
    """

    def __init__(self, model: PreTrainedModel, objective: ik.Objective, marginal_weight: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.loss = ik.InSPOLoss(objective, marginal_weight=marginal_weight, reduction="sum")
        # Any objective without a reference would do: of its output only the sums are read.
        self.sums = ik.InSPOLoss(ik.SimPO(), reduction="sum")

    def forward(
        self, batch: dict[str, Any], ref_logps: Tensor | None = None, *, sums_only: bool = False
    ) -> ik.InSPOOutput:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
        hidden, head = ik.hidden_and_head(self.model, **inputs)
        scored = {name: batch[name] for name in ("labels", "marginal_labels")}
        if sums_only:
            return self.sums(hidden, **scored, **head)
        return self.loss(hidden, **scored, ref_logps=ref_logps, **head)


@dataclass(frozen=True)
class Batcher:
    """Pairs to the tensors ``PairModel`` takes. Labels stay on the CPU, where planning needs no synchronisation."""

    pad_token_id: int
    device: torch.device

    def __call__(self, pairs: Sequence[Pair], *, conditioned: bool) -> dict[str, Any]:
        batch = ik.condition_pairs([p[:3] for p in pairs], pad_token_id=self.pad_token_id, conditioned=conditioned)
        return batch | {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask", "position_ids")}


@dataclass(frozen=True)
class Scores:
    """Summed log-probs of n pairs, float64 on the CPU, (2, n) each: row 0 the chosen, row 1 the rejected responses."""

    logps: Tensor
    lengths: Tensor
    marginal_logps: Tensor | None


@torch.no_grad()
def score(
    module: nn.Module, pairs: Sequence[Pair], batcher: Batcher, *, conditioned: bool, batch_size: int,
    progress: str | None,
) -> Scores:  # fmt: skip
    """Log-probs of all pairs; conditioned ones bring the marginals along. ``progress`` names the bar, None hides it."""
    order = sorted(range(len(pairs)), key=lambda i: -pairs[i].tokens)  # similar lengths together: little padding
    parts = []
    for start in tqdm(range(0, len(pairs), batch_size), desc=progress, disable=progress is None or None, leave=False):
        batch = batcher([pairs[i] for i in order[start : start + batch_size]], conditioned=conditioned)
        out = module(batch, sums_only=True)
        marginals = [] if out.marginal_logps is None else [out.marginal_logps.view(2, -1)]
        parts.append(torch.cat([out.logps.view(2, -1), out.lengths.view(2, -1), *marginals]))
    table = torch.cat(parts, 1).cpu()
    table = torch.empty_like(table).index_copy_(1, torch.tensor(order), table)
    return Scores(table[:2], table[2:4], table[4:] if conditioned else None)


def reference_logps(
    module: nn.Module, model: PreTrainedModel, pairs: Sequence[Pair], batcher: Batcher, *, conditioned: bool,
    mixed_precision: str, batch_size: int, cache: Path | None, progress: str | None, log: Callable[[str], None],
) -> Tensor:  # fmt: skip
    """(2, n) float64 log-probs of ``pairs`` under the model as it is now, from ``cache`` if they are there.

    Call it before training or resuming. The file is keyed by the token ids, the weights, the model's configuration and
    the precision of the computation, and by nothing else; a file that is damaged or lacks rows is computed anew.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{conditioned} {mixed_precision}".encode())
    for pair in pairs:
        digest.update(json.dumps(pair[:3]).encode())
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    key = digest.hexdigest()
    file = cache / f"reference-{key}.safetensors" if cache else None
    if file and file.exists():
        logps = _read_cache(file, len(pairs))
        if logps is not None:
            log(f"reference log-probs: {len(pairs)} pairs read from {file}")
            return logps
        log(f"reference log-probs: {file} is damaged or lacks rows; computing them again")
    logps = score(module, pairs, batcher, conditioned=conditioned, batch_size=batch_size, progress=progress).logps
    if not logps.isfinite().all():
        bad = [pairs[i].origin for i in (~logps.isfinite()).any(0).nonzero().flatten().tolist()]
        raise InputError(f"the model's own log-probs are not finite on {len(bad)} pairs ({', '.join(bad[:8])})")
    if file:
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(file.name + f".{os.getpid()}.tmp")
        save_file({"logps": logps.contiguous()}, partial)
        partial.replace(file)
    log(f"reference log-probs: {len(pairs)} pairs computed" + (f", kept in {file}" if file else ""))
    return logps


def _read_cache(file: Path, num_pairs: int) -> Tensor | None:
    try:
        with safe_open(file, framework="pt") as tensors:
            logps = tensors.get_tensor("logps")
    except (SafetensorError, OSError):
        return None
    return logps if logps.shape == (2, num_pairs) and logps.isfinite().all() else None

"""The reference's log-probs: settled once, before anything is trained or resumed, and kept between runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .config import InputError, TrainConfig
from .data import Pair
from .engine import from_first_process, process_index, together
from .inputs import Inputs
from .model import adapter_off
from .scoring import Batcher, score, unwrap


@dataclass(frozen=True)
class References:
    """Of a run, float64; None where the objective needs none, or there are no held-out pairs.

    ``train`` (2, n) of the pairs ``used``, by their index; ``held_out`` (2, m), and ``held_out_marginal`` where the
    former sees the other response and the rewards from the prompt alone need another.
    """

    used: list[int]
    train: Tensor | None
    held_out: Tensor | None
    held_out_marginal: Tensor | None

    @classmethod
    def settle(
        cls, config: TrainConfig, inputs: Inputs, module: nn.Module, batcher: Batcher, used: list[int], *,
        needed: bool, quiet: bool, log: Callable[[str], None],
    ) -> References:  # fmt: skip
        """Under the model as loaded, an adapter off: call it before a checkpoint replaces the weights."""

        def logps_of(pairs: Sequence[Pair], *, conditioned: bool) -> Tensor | None:
            if not needed or not pairs:
                return None
            with adapter_off(inputs.model):
                return reference_logps(
                    module, inputs.digests["model"], pairs, batcher, conditioned=conditioned,
                    mixed_precision=config.mixed_precision,
                    cache=Path(config.reference_cache) if config.reference_cache else config.folder,
                    progress=None if quiet else "reference", log=log,
                )  # fmt: skip

        conditioned = config.reference_conditioned
        return cls(
            used=used,
            train=logps_of([inputs.train_pairs[i] for i in used], conditioned=conditioned),
            held_out=logps_of(inputs.held_out, conditioned=conditioned),
            held_out_marginal=logps_of(inputs.held_out, conditioned=False) if conditioned else None,
        )

    def of_batch(self, batch: Sequence[int]) -> Tensor | None:
        """(2B,) of the training pairs of these indices, as the loss takes them."""
        return None if self.train is None else self.train[:, [self._row_of[i] for i in batch]].reshape(-1)

    @cached_property
    def _row_of(self) -> dict[int, int]:
        return {pair: row for row, pair in enumerate(self.used)}


def reference_logps(
    module: nn.Module, weights: str, pairs: Sequence[Pair], batcher: Batcher, *, conditioned: bool,
    mixed_precision: str, cache: Path | None, progress: str | None, log: Callable[[str], None],
) -> Tensor:  # fmt: skip
    """(2, n) float64 log-probs of ``pairs`` under the model as it is now, from ``cache`` if they are there.

    Call it before training or resuming. The file is keyed by the token ids, ``weights`` (their digest), the layout, the
    attention implementation and the precision of the computation, and by nothing else; a file that is damaged or lacks
    rows is computed anew. The first process alone reads and writes it.
    """
    digest = hashlib.blake2b(digest_size=16)
    separator = batcher.separator_ids if conditioned else ()
    attention = unwrap(module).model.config.get_text_config()._attn_implementation
    digest.update(f"{conditioned} {separator} {batcher.layout} {mixed_precision} {attention} {weights}".encode())
    for pair in pairs:
        digest.update(json.dumps(pair[:3]).encode())
    file = cache / f"reference-{digest.hexdigest()}.safetensors" if cache else None
    cached = None
    if file and process_index() == 0 and file.exists():
        cached = _read_cache(file, len(pairs))
        if cached is None:
            log(f"reference log-probs: {file} is damaged or lacks rows; computing them again")
    if (cached := from_first_process(cached)) is not None:
        log(f"reference log-probs: {len(pairs)} pairs read from {file}")
        return cached
    logps = score(module, pairs, batcher, conditioned=conditioned, progress=progress).logps
    if not logps.isfinite().all():
        bad = [pairs[i].origin for i in (~logps.isfinite()).any(0).nonzero().flatten().tolist()]
        raise InputError(f"the model's own log-probs are not finite on {len(bad)} pairs ({', '.join(bad[:8])})")
    with together():
        if file and process_index() == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
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

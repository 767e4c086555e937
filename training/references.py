"""The reference's log-probs: computed once, before anything is trained or resumed, and kept between runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapters import adapter_off
from .config import TrainConfig
from .engine import from_first_process, process_index
from .errors import InputError, Stopped
from .inputs import Inputs
from .output import duration
from .scoring import Batcher, Conditioned, StopRequested, score, unwrap

# Pairs that are scored together, always the same ones: a pass that is resumed gives the same bits.
CHUNK = 256
KEEP_SECONDS = 60.0  # between two writings of what is scored so far, and two lines about it


@dataclass(frozen=True)
class References:
    """Summed log-probs of a run's reference, float64; None where the objective needs none, or there are no such pairs.

    ``train`` (2, n) of the pairs ``used``, by their index; ``held_out`` (2, m), and ``held_out_marginal`` where the
    former sees the other response and the rewards from the prompt alone need another. ``train_plain`` (2, n) for pairs
    whose alternative is dropped, where ``train`` is conditioned.
    """

    used: Sequence[int]
    train: Tensor | None
    held_out: Tensor | None
    held_out_marginal: Tensor | None
    train_plain: Tensor | None = None

    @classmethod
    def compute(
        cls, config: TrainConfig, inputs: Inputs, module: nn.Module, batcher: Batcher, used: Sequence[int], *,
        log: Callable[[str], None], stop_requested: Callable[[], bool],
    ) -> References:  # fmt: skip
        """Score under the model as loaded, a fresh adapter off: call it before a checkpoint replaces the weights.

        Raises Stopped where SIGTERM came meanwhile; what is scored is kept.
        """
        cache = Path(config.reference_cache) if config.reference_cache else config.folder
        attention = unwrap(module).model.config.get_text_config()._attn_implementation
        precision = "bf16" if config.bf16 else "no"

        def logps_of(pairs: Sequence, digest: str, indices: Sequence[int], conditioned: bool) -> Tensor | None:
            if not config.make_objective().needs_reference or not indices:
                return None
            separator = batcher.separator_ids if conditioned else ()
            weights = inputs.digests["model"]
            key = f"{conditioned} {separator} {batcher.layout} {precision} {attention} {weights} {digest}"
            key += "" if len(indices) == len(pairs) else str(list(indices))
            name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
            file = cache / f"reference-{name}.safetensors" if cache else None
            with adapter_off(inputs.model):
                return reference_logps(
                    module, pairs, indices, batcher, conditioned=conditioned, file=file, log=log,
                    stop_requested=stop_requested,
                )  # fmt: skip

        conditioned, held = config.reference_sees_alternative, range(len(inputs.held_out))
        digests, drops = inputs.digests, config.alternative_dropout > 0
        return cls(
            used=used,
            train=logps_of(inputs.train_pairs, digests["train_data"], used, conditioned),
            held_out=logps_of(inputs.held_out, digests["eval_data"], held, conditioned),
            held_out_marginal=logps_of(inputs.held_out, digests["eval_data"], held, False) if conditioned else None,
            train_plain=(
                logps_of(inputs.train_pairs, digests["train_data"], used, False) if conditioned and drops else None
            ),
        )

    def of_batch(self, batch: Sequence[int], conditioned: Conditioned) -> Tensor | None:
        """Return (2B,) of the training pairs of these indices, as the loss takes them, each in its own layout."""
        if self.train is None:
            return None
        rows = [self._row_of[i] for i in batch]
        if self.train_plain is None:
            return self.train[:, rows].reshape(-1)
        return torch.where(torch.tensor(conditioned), self.train[:, rows], self.train_plain[:, rows]).reshape(-1)

    @cached_property
    def _row_of(self) -> dict[int, int]:
        return {pair: row for row, pair in enumerate(self.used)}


def reference_logps(
    module: nn.Module, pairs: Sequence, indices: Sequence[int], batcher: Batcher, *, conditioned: bool,
    file: Path | None, log: Callable[[str], None], stop_requested: Callable[[], bool],
) -> Tensor:  # fmt: skip
    """Return (2, n) float64 log-probs of the ``pairs`` of ``indices``, from ``file`` where they are there.

    The file holds NaN for what is not scored yet. The first process alone reads and writes it. A file that cannot be
    written costs a warning: the values are in memory.
    """
    table = from_first_process(_read(file, len(indices), log) if process_index() == 0 else None)
    if table is None:
        table = torch.full((2, len(indices)), torch.nan, dtype=torch.float64)
    starts = [i for i in range(0, len(indices), CHUNK) if table[:, i : i + CHUNK].isnan().any()]
    if not starts:
        log(f"reference log-probs: {len(indices)} pairs read from {file}")
        return table
    began = told = time.monotonic()
    for number, start in enumerate(starts):
        some = [pairs[i] for i in indices[start : start + CHUNK]]
        try:
            logps = score(module, some, batcher, conditioned=conditioned, stop_requested=stop_requested).logps
        except StopRequested:
            scored = int(table.isfinite().all(0).sum())
            kept = _write(table, file, log) if number else bool(file and file.exists())
            where = f"kept in {file}; the same command goes on from there" if kept else "and not kept"
            raise Stopped(f"stopped by SIGTERM: reference log-probs of {scored} pairs are scored, {where}") from None
        if not logps.isfinite().all():
            bad = [some[i].origin for i in (~logps.isfinite()).any(0).nonzero().flatten().tolist()]
            raise InputError(f"the model's own log-probs are not finite on {len(bad)} pairs ({', '.join(bad[:8])})")
        table[:, start : start + CHUNK] = logps
        now = time.monotonic()
        if from_first_process(now - told > KEEP_SECONDS) and number + 1 < len(starts):
            told = now
            _write(table, file, log)
            left = (now - began) / (number + 1) * (len(starts) - number - 1)
            log(f"reference log-probs: {start + len(some)} of {len(indices)} pairs, {duration(left)} left")
    kept = _write(table, file, log)
    log(f"reference log-probs: {len(indices)} pairs computed" + (f", kept in {file}" if kept else ""))
    return table


def _read(file: Path | None, num_pairs: int, log: Callable[[str], None]) -> Tensor | None:
    if file is None or not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            logps = tensors.get_tensor("logps")
    except (SafetensorError, OSError):
        logps = torch.empty(0)
    if logps.shape == (2, num_pairs) and not logps.isinf().any():
        return logps
    log(f"reference log-probs: {file} is damaged or lacks rows; computing them again")
    return None


def _write(table: Tensor, file: Path | None, log: Callable[[str], None]) -> bool:
    """Whether the first process has written ``table``."""
    if file is None:
        return False
    problem = None
    if process_index() == 0:
        partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({"logps": table.contiguous()}, partial)
            partial.replace(file)
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            problem = str(error)
    if (problem := from_first_process(problem)) is not None:
        log(f"WARNING: {file} could not be written ({problem}); the run goes on with the values in memory")
    return problem is None

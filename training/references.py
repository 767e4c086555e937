"""Compute the reference's log-probs once, before anything is trained or resumed, and keep them between runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .adapters import adapter_off
from .batching import Batcher, Conditioned
from .checkpoint import whole_file
from .config import TrainConfig
from .engine import from_first_process, process_index
from .errors import InputError, Log, Stopped
from .inputs import Inputs
from .scoring import score

CHUNK = 256  # pairs scored together, always the same ones: a resumed pass gives the same bits
KEEP_SECONDS = 60.0  # between two times that the scored pairs are written and reported


@dataclass(frozen=True)
class References:
    """Summed log-probs of a run's reference, float64; None if the objective needs none or there are no such pairs.

    ``train`` (2, n): the training pairs, NaN for pairs that the run does not use. ``held_out`` (2, m): the held-out
    pairs. If the reference is conditioned, two more rows hold the same given the prompt alone, for evaluations and
    for pairs whose alternative is dropped.
    """

    train: Tensor | None
    held_out: Tensor | None

    @classmethod
    def compute(
        cls,
        config: TrainConfig,
        inputs: Inputs,
        module: nn.Module,
        batcher: Batcher,
        used: Sequence[int],
        *,
        log: Log,
        stop_requested: Callable[[], bool],
    ) -> References:
        """Score the pairs with the model as loaded and a new adapter off, before a checkpoint replaces the weights.

        ``used``: indices of the training pairs that the run takes. Raises Stopped after SIGTERM; scored pairs are kept.
        """
        if not config.make_objective().needs_reference:
            return cls(None, None)
        cache = Path(config.reference_cache) if config.reference_cache else config.folder
        attention = inputs.model.config.get_text_config()._attn_implementation
        common = f"{batcher.layout} {'bf16' if config.bf16 else 'no'} {attention} {inputs.digests['model']}"
        logps_of = partial(reference_logps, module, batcher=batcher, log=log, stop_requested=stop_requested)
        conditioned, tables = config.reference_sees_alternative, []
        for pairs, data, indices in (
            (inputs.train_pairs, "train_data", used),
            (inputs.held_out, "eval_data", range(len(inputs.held_out))),
        ):
            key = f"{conditioned} {batcher.separator_ids if conditioned else ()} {common} {inputs.digests[data]}"
            name = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
            file = cache / f"reference-{name}.safetensors" if cache else None
            with adapter_off(inputs.model):
                tables.append(logps_of(pairs, indices, conditioned=conditioned, file=file) if len(indices) else None)
        return cls(*tables)

    def of_batch(self, batch: Sequence[int], conditioned: Conditioned) -> Tensor | None:
        """Return (2B,): the log-probs of the training pairs ``batch``, each in its own layout."""
        if self.train is None:
            return None
        table = self.train[:, list(batch)]  # its last two rows are those given the prompt alone, or its only ones
        return torch.where(torch.tensor(conditioned), table[:2], table[-2:]).reshape(-1)


def reference_logps(
    module: nn.Module,
    pairs: Sequence,
    indices: Sequence[int],
    batcher: Batcher,
    *,
    conditioned: bool,
    file: Path | None,
    log: Log,
    stop_requested: Callable[[], bool],
) -> Tensor:
    """Return (2, len(pairs)) float64 log-probs of the pairs ``indices``, and of other pairs that ``file`` holds.

    With ``conditioned``, two more rows hold the log-probs given the prompt alone. Pairs that are not scored have NaN.
    Only the first rank reads and writes the file. If the file cannot be written, the run warns and uses the values in
    memory.
    """
    shape = 4 if conditioned else 2, len(pairs)
    table = from_first_process(_read(file, shape, log) if process_index() == 0 else None)
    if table is None:
        table = torch.full(shape, torch.nan, dtype=torch.float64)
    empty = table.isnan().any(0).tolist()
    missing = [i for i in indices if empty[i]]
    if not missing:
        log(f"reference log-probs: {len(indices)} pairs read from {file}")
        return table
    began = told = time.monotonic()
    for start in range(0, len(missing), CHUNK):
        chunk = missing[start : start + CHUNK]
        some, done = [pairs[i] for i in chunk], start + len(chunk)
        try:
            scores = score(module, some, batcher, conditioned=conditioned, stop_requested=stop_requested)
        except Stopped:
            scored = int(table.isfinite().all(0).sum())
            kept = _write(table, file, log) if start else bool(file and file.exists())
            where = f"kept in {file}; the same command continues from there" if kept else "and not kept"
            raise Stopped(f"stopped by SIGTERM: reference log-probs of {scored} pairs are scored, {where}") from None
        logps = torch.cat([scores.logps, *([] if scores.marginal_logps is None else [scores.marginal_logps])])
        if not logps.isfinite().all():
            bad = [some[i].origin for i in (~logps.isfinite()).any(0).nonzero().flatten().tolist()]
            raise InputError(f"the model's own log-probs are not finite on {len(bad)} pairs ({', '.join(bad[:8])})")
        table[:, chunk] = logps
        now = time.monotonic()
        if from_first_process(now - told > KEEP_SECONDS) and done < len(missing):
            told = now
            _write(table, file, log)
            left = tqdm.format_interval((now - began) / done * (len(missing) - done))
            log(f"reference log-probs: {done} of {len(missing)} pairs, {left} left")
    kept = _write(table, file, log)
    log(f"reference log-probs: {len(missing)} pairs computed" + (f", kept in {file}" if kept else ""))
    return table


def _read(file: Path | None, shape: tuple[int, int], log: Log) -> Tensor | None:
    if file is None or not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as tensors:
            logps = tensors.get_tensor("logps")
    except (SafetensorError, OSError):
        logps = torch.empty(0)
    if logps.shape == shape and not logps.isinf().any():
        return logps
    log(f"reference log-probs: {file} is damaged or lacks rows; computing them again")
    return None


def _write(table: Tensor, file: Path | None, log: Log) -> bool:
    """Write ``table`` on the first rank; return on all ranks whether that succeeded."""
    if file is None:
        return False
    problem = None
    if process_index() == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(file, shared=True) as to:
                save_file({"logps": table.contiguous()}, to)
        except (OSError, SafetensorError) as error:
            problem = str(error)
    if (problem := from_first_process(problem)) is not None:
        log(f"WARNING: {file} could not be written ({problem}); the run goes on with the values in memory")
    return problem is None

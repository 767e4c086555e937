"""Time other block sizes and workspaces beside the shipped ones, and count the shipped workspace's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from inspo_kernels import backends
from inspo_kernels.head import checked_head

from .batches import PairBatch
from .contenders import CONTENDERS
from .harness import compared, reason, seconds_behind_work
from .launches import fused_pass_launch, row_pass_launch
from .measure import TRAIN, step

# The shipped candidate's name, and a run of each candidate.
Candidates = tuple[str, dict[str, Callable[[], Any]]]
ROW_PASS_ROWS, ROW_PASS_REPEATS = 1024, 10  # one launch is no longer than its own latency


def tune(batch: PairBatch, seconds: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each tuned choice and its candidates, timed beside the shipped one; nothing is changed."""
    device, missing = batch.hidden.device, CONTENDERS["triton"].unavailable(batch)
    for name, candidates_of in TUNED.items():
        try:
            found = None if missing else candidates_of(batch)
            yield name, sweep(*found, device, seconds) if found else {"status": missing or "not used on this device"}
        except Exception as error:  # named in the results; what follows does not need it
            yield name, {"status": reason(error)}


def sweep(shipped: str, runs: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float) -> dict[str, Any]:
    """Time interleaved candidates, each beside ``shipped``."""
    rows = compared(
        runs, shipped, str(device), 15, seconds=seconds, clock=seconds_behind_work, ratio="times_shipped", memory=False
    )
    medians = {name: row["seconds"]["median"] for name, row in rows.items() if row["status"] == "measured"}
    return {"shipped": shipped, "best": min(medians, key=lambda name: medians[name], default=None), "candidates": rows}


def patched(run: Callable[[], Any], module: Any, **values: Any) -> Callable[[], None]:
    """Return ``run`` with some names of the module patched to ``values``."""

    def call() -> None:
        with mock.patch.multiple(module, **values):
            run()

    return call


def launch_row_pass(batch: PairBatch, rows: int, *, store: bool = True) -> tuple[Callable[..., None], Tensor]:
    """Return a launch of the pass over whole rows of random logits, given its first word, and these logits."""
    from inspo_kernels.kernels import config

    device, stride = batch.hidden.device, config.padded_vocab(batch.head.vocab)
    narrow = torch.bfloat16 if batch.hidden.dtype == torch.float32 else batch.hidden.dtype
    raw = torch.randn(rows, stride, device=device)
    e = torch.empty(rows, stride, dtype=narrow, device=device) if store else None
    launch = row_pass_launch(raw, batch.targets[:rows], e, vocab=batch.head.vocab, softcap=batch.softcap)
    return partial(launch, arch=config.architecture(device)), raw


def launch_fused_pass(batch: PairBatch, *, store: bool) -> Callable[[], None] | None:
    """Return a function that launches the fused pass over all scored rows, or None if the backend does not use it."""
    from inspo_kernels.kernels import config
    from inspo_kernels.kernels.label_logits import label_logits

    device, x = batch.hidden.device, batch.scored_rows(batch.hidden)
    arch = config.architecture(device)
    if device.type != "cuda" or config.fused_pass(arch, batch.softcap) is None:
        return None
    label = label_logits(x, batch.weight, batch.targets, arch=arch)
    e = torch.empty(len(x), config.padded_vocab(batch.head.vocab), dtype=x.dtype, device=device) if store else None
    return partial(fused_pass_launch(x, batch.weight, batch.targets, label, e, softcap=batch.softcap), arch=arch)


def fused_passes(batch: PairBatch) -> Candidates | None:
    """Return other tiles, stages, parts and groups of the fused pass with E, over all scored rows."""
    from inspo_kernels.kernels import config

    launch = launch_fused_pass(batch, store=True)
    if launch is None:
        return None
    shipped = config.fused_pass(config.architecture(batch.hidden.device), batch.softcap)
    assert shipped is not None
    changes: list[dict[str, int]] = [{}, {"parts": 1}, {"parts": 4}, {"num_stages": 4}]
    changes += [*({"group": n} for n in (4, 8, 32, 64)), {"rows": 256, "words": 128}]
    changes += [{"num_stages": 4, "group": 8}, {"parts": 1, "group": 8}]
    candidates = {", ".join(f"{k} {v}" for k, v in change.items()): replace(shipped, **change) for change in changes}
    runs = {name or "shipped": patched(launch, config, fused_pass=lambda *_, c=c: c) for name, c in candidates.items()}
    return "shipped", runs


def row_passes(batch: PairBatch) -> Candidates:
    """Return other blocks and warps of the pass over one tile of logits, launched ``ROW_PASS_REPEATS`` times."""
    from inspo_kernels.kernels import config

    launch, raw = launch_row_pass(batch, min(ROW_PASS_ROWS, batch.shape.scored))  # each row reads its target
    shipped = config.row_pass(config.architecture(batch.hidden.device), raw.shape[1], torch.float32, batch.softcap)
    pairs = [(2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 16)]
    candidates = dict.fromkeys([shipped, *(config.RowPass(*pair) for pair in pairs)])

    def run() -> None:
        for _ in range(ROW_PASS_REPEATS):
            launch(first=0)

    names = {c: f"block {c.block}, {c.num_warps} warps" for c in candidates}
    return names[shipped], {names[c]: patched(run, config, row_pass=lambda *_, c=c: c) for c in candidates}


def logits_tiles(batch: PairBatch) -> Candidates:
    """Return forward + backward with other tiles of logits, in the cache or not."""
    from inspo_kernels.kernels import config

    device = batch.hidden.device
    shipped = config.logits_tile(config.architecture(device), device, 4)
    sizes = [(rows, words) for rows in (512, 1024, 2048) for words in (4224, 8448, 16896)]
    whole = config.LogitsTile(1024, config.padded_vocab(batch.head.vocab))  # written to memory
    names = {c: f"{c.rows} x {c.words}" for c in [shipped, *(config.LogitsTile(*size) for size in sizes), whole]}
    run, unused = partial(step, batch, TRAIN, CONTENDERS["triton"]), {"fused_pass": lambda *_: None}
    return names[shipped], {
        name: patched(run, config, logits_tile=lambda *_, c=c: c, **unused) for c, name in names.items()
    }


def kept_rows(batch: PairBatch) -> Candidates:
    """Return forward + backward with fewer rows of E kept at a time."""
    from inspo_kernels.backends import triton_backend

    run, shipped = partial(step, batch, TRAIN, CONTENDERS["triton"]), triton_backend.KEPT_ROWS
    return str(shipped), {
        str(n): patched(run, triton_backend, KEPT_ROWS=n) for n in sorted({shipped, 2048, 4096, 8192})
    }


TUNED: dict[str, Callable[[PairBatch], Candidates | None]] = {
    "fused pass": fused_passes,
    "row pass": row_passes,
    "triton logits tile": logits_tiles,
    "triton kept rows": kept_rows,
}


def workspace_and_gradients(batch: PairBatch, backend: str) -> int:
    """Count bytes of the default workspace (what N rows keep beside its tile, if less) + dX + dW in its dtype."""
    head, resolved, default = head_and_backend(batch, backend)
    rows = batch.shape.scored
    unused = max(0, resolved.capacity(head, batch.hidden.device, default) - rows)
    workspace = default - resolved.kept_bytes(head, unused)
    return workspace + (rows * batch.head.hidden + batch.weight.numel()) * head.accumulate_dtype.itemsize


def head_and_backend(batch: PairBatch, backend: str) -> tuple[Any, Any, int]:
    """Return the batch's checked head, the backend, and the bytes of its default workspace."""
    head = checked_head(batch.hidden, batch.weight, None, batch.softcap, 1.0)
    resolved = backends.resolve_backend(backend, head, batch.hidden.device)
    assert resolved is not None
    return head, resolved, resolved.default_workspace_bytes(head, batch.hidden.device)

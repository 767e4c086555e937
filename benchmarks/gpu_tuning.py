"""Time other block sizes and workspaces beside the shipped ones, and count the shipped workspace's bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from inspo_kernels import backends
from inspo_kernels.head import checked_head

from .batches import PairBatch
from .contenders import CONTENDERS, Contender, ours
from .harness import compared, reason, seconds_behind_work
from .launches import fused_pass_launch, row_pass_launch
from .measure import TRAIN, step
from .tables import figures


def sweep(
    shipped: str, runs: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, repeats: int = 1
) -> dict[str, Any]:
    """Time interleaved candidates, each beside ``shipped``; each run is ``repeats`` launches, back to back."""
    rows = compared(
        runs, shipped, str(device), 15, seconds=seconds, clock=seconds_behind_work, ratio="times_shipped", memory=False
    )
    measured = {name: row["seconds"] for name, row in rows.items() if row["status"] == "measured"}
    for one in measured.values():
        one |= {name: value / repeats for name, value in one.items()}
    best = min(measured, key=lambda name: measured[name]["median"], default=None)
    return {"shipped": shipped, "best": best, "candidates": rows}


def patched(run: Callable[[], Any], module: Any, **values: Any) -> Callable[[], None]:
    """Return ``run`` with some names of the module patched to ``values``."""

    def call() -> None:
        with mock.patch.multiple(module, **values):
            run()

    return call


def tune(batch: PairBatch, workspace_rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Time candidates beside the shipped choice; nothing is changed."""
    on_gpu = batch.hidden.device.type == "cuda"
    no_triton = CONTENDERS["triton"].unavailable(batch)
    no_torch = "not tuned on a GPU: its float32 matmuls take most of the time" if on_gpu else None
    result: dict[str, Any] = {}
    for name, why, tune_one in (
        ("fused pass", no_triton, tune_fused_pass),
        ("row pass", no_triton, tune_row_pass),
        ("triton logits tile", no_triton, tune_tiles),
        ("triton kept rows", no_triton, tune_kept),
        ("torch workspace rows", no_torch, partial(tune_torch, workspace_rows=workspace_rows)),
    ):
        try:
            result[name] = {"status": why} if why else tune_one(batch, seconds=seconds)
        except Exception as error:  # named in the results; what follows does not need it
            result[name] = {"status": reason(error)}
    return result


def launch_row_pass(
    batch: PairBatch, rows: int, words: int | None = None, *, store: bool = True
) -> tuple[Callable[..., None], Tensor]:
    """Return a launch of the pass over a tile of random logits, given its first word, and the tile (rows, words)."""
    from inspo_kernels.kernels import config

    device, vocab = batch.hidden.device, batch.head.vocab
    narrow = torch.bfloat16 if batch.hidden.dtype == torch.float32 else batch.hidden.dtype
    stride = config.padded_vocab(vocab)
    raw = torch.randn(rows, stride if words is None else words, device=device)
    e = torch.empty(rows, stride, dtype=narrow, device=device) if store else None
    launch = row_pass_launch(raw, batch.targets[:rows], e, vocab=vocab, softcap=batch.softcap)
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


def tune_fused_pass(batch: PairBatch, seconds: float) -> dict[str, Any]:
    """Time other tiles, stages, parts and groups of the fused pass with E, over all scored rows."""
    from inspo_kernels.kernels import config

    launch = launch_fused_pass(batch, store=True)
    if launch is None:
        return {"status": "not used on this device"}
    shipped = config.fused_pass(config.architecture(batch.hidden.device), batch.softcap)
    assert shipped is not None
    changes = [{"parts": 1}, {"parts": 4}, {"num_stages": 4}, *({"group": n} for n in (4, 8, 32, 64))]
    changes += [{"rows": 256, "words": 128}, {"num_stages": 4, "group": 8}, {"parts": 1, "group": 8}]
    candidates = {"shipped": shipped} | {
        ", ".join(f"{name} {value}" for name, value in change.items()): replace(shipped, **change) for change in changes
    }

    runs = {name: patched(launch, config, fused_pass=lambda *_, c=c: c) for name, c in candidates.items()}
    return sweep("shipped", runs, batch.hidden.device, seconds)


def tune_row_pass(batch: PairBatch, seconds: float, rows: int = 1024) -> dict[str, Any]:
    """Time other blocks and warps of the pass over one tile of logits."""
    from inspo_kernels.kernels import config

    rows = min(rows, batch.shape.scored)  # each row reads its target
    launch, raw = launch_row_pass(batch, rows)
    moved = raw.nbytes * 3 // 2  # E takes half as much
    shipped = config.row_pass(config.architecture(batch.hidden.device), raw.shape[1], torch.float32, batch.softcap)
    pairs = [(2048, 4), (2048, 8), (4096, 4), (4096, 8), (4096, 16), (8192, 8), (8192, 16), (16384, 16)]
    candidates = dict.fromkeys([shipped, *(config.RowPass(*pair) for pair in pairs)])
    repeats = 10  # one launch is no longer than its own latency

    def run() -> None:
        for _ in range(repeats):
            launch(first=0)

    runs = {row_pass_name(c): patched(run, config, row_pass=lambda *_, c=c: c) for c in candidates}
    swept = sweep(row_pass_name(shipped), runs, batch.hidden.device, seconds, repeats)
    for row in swept["candidates"].values():
        if row["status"] == "measured":
            row["terabytes_per_second"] = moved / row["seconds"]["median"] / 1e12
    return swept | {"rows": rows, "vocab": batch.head.vocab}


def row_pass_name(candidate: Any) -> str:
    return f"block {candidate.block}, {candidate.num_warps} warps"


def tune_tiles(batch: PairBatch, seconds: float) -> dict[str, Any]:
    """Time forward + backward with other tiles of logits, in the cache or not."""
    from inspo_kernels.kernels import config

    device = batch.hidden.device
    shipped = config.logits_tile(config.architecture(device), device, 4)
    sizes = [(rows, words) for rows in (512, 1024, 2048) for words in (4224, 8448, 16896)]
    whole = config.LogitsTile(1024, config.padded_vocab(batch.head.vocab))  # written to memory
    candidates = dict.fromkeys([shipped, *(config.LogitsTile(*size) for size in sizes), whole])

    run = partial(step, batch, TRAIN, CONTENDERS["triton"])
    runs = {
        f"{c.rows} x {c.words}": patched(run, config, logits_tile=lambda *_, c=c: c, fused_pass=lambda *_: None)
        for c in candidates
    }
    return sweep(f"{shipped.rows} x {shipped.words}", runs, device, seconds)


def tune_kept(batch: PairBatch, seconds: float) -> dict[str, Any]:
    """Time forward + backward with fewer rows of E kept at a time."""
    from inspo_kernels.backends import triton_backend

    run = partial(step, batch, TRAIN, CONTENDERS["triton"])
    values = sorted({triton_backend.KEPT_ROWS, 2048, 4096, 8192})
    runs = {str(value): patched(run, triton_backend, KEPT_ROWS=value) for value in values}
    return sweep(str(triton_backend.KEPT_ROWS), runs, batch.hidden.device, seconds)


def tune_torch(batch: PairBatch, workspace_rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Time forward + backward of the torch backend with other workspaces."""
    shipped, runs = workspace_runs(batch, "torch", workspace_rows)
    return sweep(shipped, {name: run for name, (_, run) in runs.items()}, batch.hidden.device, seconds)


def workspace_runs(
    batch: PairBatch, backend: str, workspace_rows: Sequence[int]
) -> tuple[str, dict[str, tuple[int, Callable[[], Any]]]]:
    """Return the default workspace's name, and for each name a workspace's rows and a run of forward + backward."""
    head, resolved, default = head_and_backend(batch, backend)
    rows = resolved.capacity(head, batch.hidden.device, default)
    shipped = f"default ({rows})"

    def run(limit: int | None) -> None:
        step(batch, TRAIN, Contender("ours", loss=ours(backend, max_workspace_bytes=limit)))

    others = {str(n): (n, partial(run, resolved.kept_bytes(head, n))) for n in workspace_rows}
    return shipped, {shipped: (rows, partial(run, None)), **others}


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


def tuning_table(tuning: dict[str, Any]) -> str:
    texts = ["tuning"]
    for name, swept in tuning.items():
        best = swept.get("candidates", {}).get(swept.get("best"))
        found = ", ".join(["", *figures(best)]) if best else ""
        status = swept.get("status") or f"shipped {swept['shipped']}, best {swept['best']}{found}"
        texts.append(f"  {name}: {status}")
    return "\n".join(texts)

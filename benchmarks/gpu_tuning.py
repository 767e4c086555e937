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
from .harness import guarded, interleaved_times, ratios, reason, seconds_behind_work, spread
from .measure import TRAIN, step


def sweep(
    shipped: str, runs: Mapping[str, Callable[[], Any]], device: torch.device, seconds: float, repeats: int = 1
) -> dict[str, Any]:
    """Time interleaved candidates, each beside ``shipped``; each run is ``repeats`` launches, back to back."""
    failed: dict[str, str] = {}
    runs = guarded(runs, failed)
    for run in runs.values():
        run()
    times = interleaved_times(
        {name: run for name, run in runs.items() if name not in failed},
        15,
        device=str(device),
        seconds=seconds,
        clock=seconds_behind_work,
    )
    times = {name: [t / repeats for t in values] for name, values in times.items() if name not in failed}
    to_shipped = ratios(times, shipped) if shipped in times else {}
    rows: dict[str, Any] = {name: {"status": why} for name, why in failed.items()}
    for name, values in times.items():
        rows[name] = {"status": "measured", "seconds": spread(values), "times_shipped": to_shipped.get(name)}
    best = min(times, key=lambda name: spread(times[name])["median"], default=None)
    return {"shipped": shipped, "best": best, "candidates": rows}


def tune(batch: PairBatch, workspace_rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Time candidates beside the shipped choice; nothing is changed."""
    result: dict[str, Any] = {}
    for name, runs in (
        ("fused pass", tune_fused_pass),
        ("row pass", tune_row_pass),
        ("triton logits tile", tune_tiles),
        ("triton kept rows", tune_kept),
    ):
        why = CONTENDERS["triton"].unavailable(batch)
        try:
            result[name] = {"status": why} if why else runs(batch, seconds)
        except Exception as error:
            result[name] = {"status": reason(error)}
    if batch.hidden.device.type == "cuda":
        result["torch workspace rows"] = {"status": "not tuned on a GPU: its float32 matmuls take most of the time"}
        return result
    try:
        result["torch workspace rows"] = tune_torch(batch, workspace_rows, seconds)
    except Exception as error:  # named in the results; what follows does not need it
        result["torch workspace rows"] = {"status": reason(error)}
    return result


def launch_row_pass(
    batch: PairBatch, rows: int, words: int | None = None, *, store: bool = True
) -> tuple[Callable[[int], None], Tensor]:
    """Return a launch of the pass over a tile of random logits, given its first word, and the tile (rows, words)."""
    from inspo_kernels.kernels import config, row_pass

    device, vocab = batch.hidden.device, batch.head.vocab
    narrow = torch.bfloat16 if batch.hidden.dtype == torch.float32 else batch.hidden.dtype
    stride = config.padded_vocab(vocab)
    raw = torch.randn(rows, stride if words is None else words, device=device)
    e = torch.empty(rows, stride, dtype=narrow, device=device) if store else None
    label, offset, rest = torch.zeros(3, rows, device=device)
    parts, raised = (
        torch.empty(len(row_pass.PARTS), rows, device=device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )
    softcap = batch.softcap

    def launch(first: int = 0) -> None:
        row_pass.row_pass(
            raw,
            batch.targets[:rows],
            label,
            offset,
            rest,
            parts,
            raised,
            first=first,
            vocab=vocab,
            e=e,
            bias=None,
            softcap=softcap,
            outer=1.0 if softcap is None else softcap,
            scale=1.0,
            wanted=frozenset(),
            arch=config.architecture(device),
        )

    return launch, raw


def launch_fused_pass(batch: PairBatch, *, store: bool) -> Callable[[], None] | None:
    """Return a function that launches the fused pass over all scored rows, or None if the backend does not use it."""
    from inspo_kernels.kernels import config, fused_pass
    from inspo_kernels.kernels.label_logits import label_logits

    device, x = batch.hidden.device, batch.scored_rows(batch.hidden)
    arch = config.architecture(device)
    if device.type != "cuda" or config.fused_pass(arch, batch.softcap) is None:
        return None
    label = label_logits(x, batch.weight, batch.targets, arch=arch)
    e = torch.empty(len(x), config.padded_vocab(batch.head.vocab), dtype=x.dtype, device=device) if store else None
    offset, sums = torch.empty(len(x), device=device), torch.empty(1, len(x), device=device)
    raised = torch.empty(len(x), dtype=torch.int32, device=device)

    def launch() -> None:
        fused_pass.fused_pass(
            x,
            batch.weight,
            batch.targets,
            label,
            offset,
            sums,
            raised,
            e=e,
            bias=None,
            softcap=batch.softcap,
            outer=1.0 if batch.softcap is None else batch.softcap,
            scale=1.0,
            wanted=frozenset(),
            arch=arch,
        )

    return launch


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

    def run(candidate: Any) -> None:
        with mock.patch.object(config, "fused_pass", lambda *_: candidate):
            launch()

    return sweep("shipped", {name: partial(run, c) for name, c in candidates.items()}, batch.hidden.device, seconds)


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

    def run(candidate: Any) -> None:
        with mock.patch.object(config, "row_pass", lambda *_: candidate):
            for _ in range(repeats):
                launch(0)

    runs = {row_pass_name(c): partial(run, c) for c in candidates}
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

    def run(tile: Any) -> None:
        with (
            mock.patch.object(config, "logits_tile", lambda *_: tile),
            mock.patch.object(config, "fused_pass", lambda *_: None),
        ):
            step(batch, TRAIN, CONTENDERS["triton"])

    runs = {f"{c.rows} x {c.words}": partial(run, c) for c in candidates}
    return sweep(f"{shipped.rows} x {shipped.words}", runs, device, seconds)


def tune_kept(batch: PairBatch, seconds: float) -> dict[str, Any]:
    """Time forward + backward with fewer rows of E kept at a time."""
    from inspo_kernels.backends import triton_backend

    def run(rows: int) -> None:
        with mock.patch.object(triton_backend, "KEPT_ROWS", rows):
            step(batch, TRAIN, CONTENDERS["triton"])

    values = sorted({triton_backend.KEPT_ROWS, 2048, 4096, 8192})
    runs = {str(value): partial(run, value) for value in values}
    return sweep(str(triton_backend.KEPT_ROWS), runs, batch.hidden.device, seconds)


def tune_torch(batch: PairBatch, workspace_rows: Sequence[int], seconds: float) -> dict[str, Any]:
    """Time forward + backward of the torch backend with other workspaces."""
    head, resolved = _head_and_backend(batch, "torch")
    default = resolved.default_workspace_bytes(head, batch.hidden.device)
    shipped = f"default ({resolved.capacity(head, batch.hidden.device, default)})"

    def run(limit: int | None) -> None:
        step(batch, TRAIN, Contender("torch", loss=ours("torch", max_workspace_bytes=limit)))

    runs = {str(rows): partial(run, rows * resolved.kept_bytes(head, 1)) for rows in workspace_rows}
    return sweep(shipped, {shipped: partial(run, None), **runs}, batch.hidden.device, seconds)


def workspace_and_gradients(batch: PairBatch, backend: str) -> int:
    """Count bytes of the default workspace (what N rows keep beside its tile, if less) + dX + dW in its dtype."""
    head, resolved = _head_and_backend(batch, backend)
    device, rows = batch.hidden.device, batch.shape.scored
    default = resolved.default_workspace_bytes(head, device)
    unused = max(0, resolved.capacity(head, device, default) - rows)
    workspace = default - resolved.kept_bytes(head, unused)
    return workspace + (rows * batch.head.hidden + batch.weight.numel()) * head.accumulate_dtype.itemsize


def _head_and_backend(batch: PairBatch, backend: str) -> tuple[Any, Any]:
    head = checked_head(batch.hidden, batch.weight, None, batch.softcap, 1.0)
    resolved = backends.resolve_backend(backend, head, batch.hidden.device)
    assert resolved is not None
    return head, resolved


def tuning_table(tuning: dict[str, Any]) -> str:
    lines = ["tuning"]
    for name, swept in tuning.items():
        if "best" not in swept:
            lines.append(f"  {name}: {swept['status']}")
            continue
        rows = swept["candidates"]
        best = rows.get(swept["best"], {}).get("times_shipped")
        beside = (
            f", {best['median']:.3f} ({best['q1']:.3f}-{best['q3']:.3f}) times the shipped one's time" if best else ""
        )
        lines.append(f"  {name}: shipped {swept['shipped']}, best {swept['best']}{beside}")
    return "\n".join(lines)

"""Run one step of the GPU benchmark in its own process.

``benchmarks.gpu`` starts these processes. After each figure, a step writes its results so far to DIR/part.json. When
the process has ended, even by a crash, ``benchmarks.gpu`` merges them into DIR/gpu.json.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from . import gpu_accuracy, gpu_decomposition, gpu_training, gpu_tuning
from .batches import PairBatch, dtype_of, equal, random_head, scored_tokens
from .contenders import CONTENDERS, OURS, Contender, chosen
from .gpu_plan import FULL, QUICK, Plan
from .gpu_processes import end_with_parent, run_tests
from .harness import Timer, reason
from .measure import LOSS, TRAIN, measure
from .result_files import checked_device, dtype_name, make_parser, write_json
from .speed_tables import SHAPE_ROWS
from .tables import line, shape_title, table

PART = "part.json"
# The torch backend runs its matmuls in float32 on every device. On a GPU this takes more than ten times as long as the
# Triton backend.
TIMED = tuple(name for name in OURS if name != "torch")
# No cell starts with less time left than the slowest one takes at its fewest rounds.
RESERVE_SECONDS = 20.0


@dataclass
class Context:
    """Hold a step's input: sizes, device, its own time, and the part of the results that it fills.

    ``known`` holds the cells of earlier calls, which are not measured again.
    """

    name: str
    plan: Plan
    device: torch.device
    peers: Sequence[str]
    out: Path
    timer: Timer
    known: Sequence[str] = ()
    part: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return dtype_of(self.device)

    @property
    def quick_peers(self) -> list[str]:
        return [name for name in self.peers if not CONTENDERS[name].compiles_per_shape]

    def main_batch(self) -> PairBatch:
        shape = scored_tokens(self.plan.main_head, self.plan.main[1], self.plan.response)
        return PairBatch(shape, dtype=self.dtype, device=self.device)

    def save(self, status: str = "") -> None:
        """Write the part so far; ``status`` ends the step."""
        row = {"step": self.name, "status": status, "notes": self.notes, "part": self.part}
        write_json(self.out / PART, row)

    def say(self, text: str) -> None:
        self.save()
        print(text, flush=True)

    def fill(self, rows: Iterable[tuple[str, dict[str, Any]]]) -> None:
        """Record rows of (name, figures) under the step's name as they arrive."""
        part = self.part[self.name] = dict[str, Any]()
        for name, row in rows:
            part[name] = row
            self.say(line(name, row))


# --- the steps ---


def smoke(context: Context) -> None:
    """A small head through loss and gradients, both backends against float64."""
    shape = equal(gpu_accuracy.SMOKE_HEAD, 2, 8, 32)
    rows = context.part["smoke"] = []
    for dtype in (torch.bfloat16, torch.float32):
        batch = PairBatch(shape, dtype=dtype, device=context.device)
        found = chosen([n for n in OURS if CONTENDERS[n].variant_of is None], batch)
        about = {"dtype": dtype_name(dtype), "softcap": None, "response": 32}
        rows += [about | row for row in gpu_accuracy.errors(batch, found, LOSS)]
        context.say(gpu_accuracy.accuracy_table(rows[-2 * len(found) :]))


def main_shape(context: Context) -> None:
    """Floor and ours at the main shape, three modes."""
    measure_cells(context, context.plan.main_cells(), TIMED, rounds=2 * context.plan.rounds)


def decomposition(context: Context) -> None:
    """Time each matmul and pass alone, on an idle and on a busy device."""
    context.fill(gpu_decomposition.decompose(context.main_batch(), context.plan.stage_rows))


def tests(context: Context) -> None:
    """The Triton tests on the device itself."""
    result = context.part["tests"] = run_tests(context.plan.tests, context.out / "tests.log", context.timer.left)
    context.say(f"tests {result['status']}: {result['summary']}")


def accuracy(context: Context) -> None:
    """Both backends and the peers against float64, with and without a soft-cap."""
    plan, peers = context.plan, context.quick_peers
    context.part["accuracy"] = []
    for rows in gpu_accuracy.accuracy(plan.main_head, plan.response, peers, context.dtype, context.device):
        context.part["accuracy"] += rows
        context.say(gpu_accuracy.accuracy_table(rows))


def autocast(context: Context) -> None:
    """Float32 hidden states and weights under autocast, without and with marginals, as training calls the loss."""
    context.fill(gpu_training.autocast(context.main_batch(), context.plan.rounds, context.timer.left))


def statistics(context: Context) -> None:
    """Measure the time that entropy and the other statistics add to log-probs and loss."""
    context.fill(gpu_training.statistics(context.main_batch(), context.plan.rounds, context.timer.left))


def peers(context: Context) -> None:
    """The other libraries at the main shape, beside the Triton backend."""
    measure_cells(context, context.plan.main_cells(), ["triton", *context.quick_peers], rounds=context.plan.rounds)


def trees(context: Context) -> None:
    """A model's forward and backward over trees and rows, by attention."""
    context.fill(gpu_training.trees(context.plan, context.device, context.timer.left))


def training(context: Context) -> None:
    """Measure the tokens and operations per second of one real training run."""
    result = context.part["training"] = gpu_training.training_run(context.plan, context.device, context.timer.left)
    context.say(f"  training: {result}")


def shapes(context: Context) -> None:
    """The other lengths and models."""
    names = [name for name in SHAPE_ROWS if name in (*TIMED, *context.quick_peers)]
    measure_cells(context, context.plan.other_cells(), names, rounds=context.plan.rounds)


def tuning(context: Context) -> None:
    """Block sizes and stages beside the shipped ones. Reported, never applied."""
    context.part["tuning"] = dict[str, Any]()
    for name, swept in gpu_tuning.tune(context.main_batch(), context.timer.left / 5):
        context.part["tuning"][name] = swept
        title = f"{name}: {swept.get('status') or 'shipped ' + swept['shipped'] + ', best ' + str(swept['best'])}"
        context.say(table(title, swept.get("candidates", {})))


def compiled(context: Context) -> None:
    """Slowest to measure: baselines that torch.compile compiles, and the torch backend, at the main shape."""
    names = [name for name in context.peers if CONTENDERS[name].compiles_per_shape]
    measure_cells(context, context.plan.main_cells(), ["torch", *names], rounds=context.plan.rounds)


@dataclass(frozen=True)
class Step:
    """``seconds`` is the most it may take, ``least`` what must be left for it to start."""

    run: Callable[[Context], None]
    seconds: float
    least: float = 20.0

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").splitlines()[0].rstrip(".")


# In order of value: what a call has no time for is what matters least.
STEPS = {
    "smoke": Step(smoke, 45),
    "main": Step(main_shape, 90),
    "decomposition": Step(decomposition, 75),
    "tests": Step(tests, 180, least=60),
    "accuracy": Step(accuracy, 90),
    "autocast": Step(autocast, 60),
    "statistics": Step(statistics, 45),
    "peers": Step(peers, 120, least=40),
    "trees": Step(trees, 90, least=40),
    "training": Step(training, 240, least=90),
    "shapes": Step(shapes, 300, least=40),
    "tuning": Step(tuning, 60),
    "compiled": Step(compiled, 150, least=60),
}


# --- what steps share ---


def measure_cells(context: Context, cells: Sequence[tuple[str, int, str]], names: Sequence[str], rounds: int) -> None:
    """Time ``names`` beside the bare matmuls in each cell, until the step's time is spent."""
    weight, weight_of = None, None
    done = context.part["cells"] = []
    todo = [cell for cell in cells if cell_name(*cell) not in context.known]
    for i, (model, tokens, mode) in enumerate(todo):
        head = context.plan.models[model]
        shape = scored_tokens(head, tokens, context.plan.response)
        cell: dict[str, Any] = {"name": cell_name(model, tokens, mode), "model": model, "tokens": tokens, "mode": mode}
        cell |= shape.as_json()
        if i and context.timer.left < RESERVE_SECONDS:
            context.notes.append(f"{len(todo) - i} cells not measured: out of time")
            return context.save()
        done.append(cell)
        try:
            if weight_of != model:
                weight = None
                weight, weight_of = random_head(head, dtype=context.dtype, device=context.device), model
            batch = PairBatch(shape, dtype=context.dtype, device=context.device, weight=weight)
        except torch.OutOfMemoryError as error:
            cell["contenders"] = {name: {"status": reason(error)} for name in ("floor", *names)}
            context.say(table(shape_title(cell), cell["contenders"]))
            continue
        found = chosen(names, batch)
        share = max(0.0, context.timer.left - RESERVE_SECONDS) / (len(todo) - i)
        measure(batch, mode, found, rounds, seconds=share / 2, with_errors=False, cell=cell, save=context.save)
        if mode == TRAIN and isinstance(found.get("triton"), Contender):
            cell["workspace_and_gradients_bytes"] = gpu_tuning.workspace_and_gradients(batch, "triton")
        context.say(table(shape_title(cell), cell["contenders"]))
        if context.device.type == "cuda":
            torch.cuda.synchronize()  # an error that outlives its contender ends the step here, and only the step


def cell_name(model: str, tokens: int, mode: str) -> str:
    return f"{model}, {tokens} tokens, {mode}"


def pin_matmul_settings() -> dict[str, Any]:
    """Have every contender multiply with full-precision sums, and return the settings that hold."""
    matmul = torch.backends.cuda.matmul
    settings = ("bf16_reduced_precision_reduction", "fp16_reduced_precision_reduction", "fp16_accumulation", "tf32")
    known = [name for name in (f"allow_{setting}" for setting in settings) if hasattr(matmul, name)]
    for name in known:
        setattr(matmul, name, False)
    return {name: str(getattr(matmul, name)) for name in known}


def device_notes(device: torch.device) -> list[str]:
    """Return warnings about the device: too old for our kernels, or shared with other processes."""
    if device.type != "cuda":
        return []
    notes, name = [], torch.cuda.get_device_name(device)
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        notes.append(f"{name} is too old for the Triton kernels: compute capability 8.0 is needed")
    free, total = torch.cuda.mem_get_info(device)
    if free < 0.9 * total:
        notes.append(f"{name} is busy: {free / 2**30:.1f} of {total / 2**30:.1f} GiB are free; others may slow it down")
    return notes


def main(given: dict[str, Any]) -> int:
    end_with_parent()
    name, plan, out = given["name"], QUICK if given["quick"] else FULL, Path(given["out"])
    device = checked_device(make_parser("gpu_steps", __doc__), given["device"])
    context = Context(name, plan, device, given["peers"], out, Timer(given["seconds"]), given["known"])
    context.part["settings"] = pin_matmul_settings()
    try:
        context.notes += device_notes(device)
        for note in context.notes:
            print(f"note: {note}")
        STEPS[name].run(context)
    except Exception as error:
        traceback.print_exc()
        why = reason(error)
        if why == "out of memory" and device.type == "cuda":
            why += f": the device has {torch.cuda.get_device_properties(device).total_memory / 2**30:.0f} GiB"
        context.save(why if why.startswith("failed") else f"failed: {why}")
        return 1
    context.save("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

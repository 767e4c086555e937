"""Measure whole training steps: ours, TRL's trainers, and four forwards as in the authors' code.

    python -m benchmarks.step --json benchmarks/results/step_cpu.json

Every contender makes the same SGD updates of the same Llama-shaped model (random weights) on the same pairs. The
timed part goes from token ids to updated weights and includes building batches. All contenders but ``four_forwards``
compute the reference's log-probs once, before training; this is timed separately. First, a float64 run of a few updates
shows that all contenders do the same work. It compares their losses, and the distance between their final weights
relative to the distance that the weights moved.

A cell is a model with pairs of equal length, for one share of the prompt in prompt + chosen + rejected, or with the
lengths of real pairs ("real").
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import real_lengths
from .harness import compared, own_peak, peak_memory_in_fresh_process, peak_row, reason, release_freed_memory
from .result_files import Run, add_common_options, add_names, lacks, make_parser, measuring, positive
from .step_contenders import STEP_CONTENDERS, TRAINERS
from .step_jobs import MODELS, Job, Trained, job_of
from .tables import table

BASE = "four_forwards"


def prepared(names: Sequence[str], job: Job) -> dict[str, Callable[[], Trained] | str]:
    """Prepare a run from the job's weights for each contender, with its own copy of the model, or say why it cannot."""
    found: dict[str, Callable[[], Trained] | str] = {}
    start = copy.deepcopy(job.model.state_dict())
    for name in names:
        if why := STEP_CONTENDERS[name].unavailable():
            found[name] = why
            continue
        own = Job(copy.deepcopy(job.model), job.batches, job.learning_rate)
        try:
            found[name] = partial(from_start, own, start, STEP_CONTENDERS[name].prepare(own))
        except Exception as error:
            found[name] = reason(error)
    return found


def from_start(own: Job, start: dict[str, Any], run: Callable[[], Trained]) -> Trained:
    """Run from the weights ``start`` and return what was trained, with the final weights."""
    own.model.load_state_dict(start)
    own.model.zero_grad()
    trained = run()
    trained.weights = dict(own.model.named_parameters())
    return trained


def same_work(names: Sequence[str], job: Job) -> dict[str, Any]:
    """Return each contender's float64 losses, and the distance of its final weights from ``four_forwards``."""
    rows: dict[str, Any] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    for name, run in prepared([BASE, *(n for n in names if n != BASE)], job).items():
        try:
            if isinstance(run, str):
                rows[name] = {"status": run}
                continue
            trained = run()
            rows[name] = {"status": "measured", "losses": trained.losses}
            weights[name] = trained.weights  # of its own copy of the model
        except Exception as error:
            rows[name] = {"status": reason(error)}
    if BASE not in weights:
        return rows | {name: {"status": f"not compared: {BASE} {rows[BASE]['status']}"} for name in weights}
    moved = distance(weights[BASE], job.model.state_dict())
    for name, final in weights.items():
        errors = {
            "loss": max(abs(a / b - 1) for a, b in zip(rows[name]["losses"], rows[BASE]["losses"], strict=True)),
            "weights": distance(final, weights[BASE]) / moved,
        }
        tolerance = STEP_CONTENDERS[name].tolerance
        rows[name] |= {"errors": errors, "tolerance": tolerance, "same": max(errors.values()) <= tolerance}
    return rows


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the distance between ``a`` and ``b`` over the parameters in ``a``."""
    return math.sqrt(sum((value - b[name]).square().sum().item() for name, value in a.items()))


def measure(job: Job, names: Sequence[str], rounds: int, cell: dict[str, Any], save: Callable[[], None]) -> None:
    """Time interleaved runs of every contender from the same weights, and record them in ``cell``."""
    rows = cell.setdefault("contenders", {})
    updates, scored = len(job.batches), sum(len(w) + len(l) for _, w, l in job.pairs)
    last: dict[str, Trained] = {}

    def run_of(name: str, run: Callable[[], Trained]) -> float:
        last[name] = run()
        return last[name].seconds / updates

    def save_round() -> None:
        for name in last:
            if rows[name]["status"] == "measured":
                cell["rounds"], seconds = rows[name]["rounds"], rows[name]["seconds"]["median"]
                rows[name] |= {
                    "positions_per_step": last[name].positions / updates,
                    "scored_tokens_per_second": scored / updates / seconds,
                    "reference_seconds_per_step": last[name].reference_seconds / updates,
                }
        save()

    able = [name for name in names if rows.get(name, {}).get("status", "measured") == "measured"]
    runs = {n: run if isinstance(run, str) else partial(run_of, n, run) for n, run in prepared(able, job).items()}
    base, device = BASE if BASE in names else "trl_compact", str(job.model.device)
    # Runs measure themselves: building a trainer is not part of its steps.
    options: dict[str, Any] = {"clock": lambda run, _: run(), "memory": False, "warmup": 0}
    compared(runs, base, device, rounds, **options, rows=rows, save=save_round)


def peak_of(what: dict[str, Any], name: str, device: str) -> int | str | None:
    """Return the peak memory above the model while preparing and running, including gradients and all copies.

    On a CPU, call this in a fresh process. If the contender cannot run, return the reason.
    """
    contender = STEP_CONTENDERS[name]
    if why := contender.unavailable():
        return why
    given: dict[str, Any] = {"dtype": torch.float32, "device": torch.device(device)}
    contender.prepare(job_of("quick", "0.3", 1, 2, 16, **given))()
    job = job_of(**what, **given)
    release_freed_memory()
    return own_peak(lambda: contender.prepare(job)(), device)


def share(text: str) -> str:
    """Parse a number between 0 and 1, or "real", for argparse."""
    with contextlib.suppress(ValueError):
        if text == "real" or 0 < float(text) < 1:
            return text
    raise argparse.ArgumentTypeError(f'{text} is not a number between 0 and 1, or "real"')


def parsed(arguments: Sequence[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = make_parser("step", __doc__)
    add_common_options(parser, rounds=5)
    add_names(parser, "--models", MODELS, "models to train [small trunk; with --quick quick]")
    parser.add_argument(
        "--shares",
        nargs="+",
        type=share,
        default=["0.1", "0.5", "0.9", "real"],
        metavar="SHARE",
        help='the prompt\'s share of a pair, or "real" [0.1 0.5 0.9 real]',
    )
    about = f"contenders to measure [all but {', '.join(TRAINERS)}]"
    default = [name for name in STEP_CONTENDERS if name not in TRAINERS]
    add_names(parser, "--contenders", STEP_CONTENDERS, about, default=default)
    parser.add_argument("--pairs", type=positive, default=4, help="pairs a step [4]")
    parser.add_argument("--tokens", type=positive, default=512, help="tokens of a pair, at most [512]")
    parser.add_argument("--updates", type=positive, default=2, help="updates timed together [2]")
    options = parser.parse_args(arguments)
    options.models = options.models or (["quick"] if options.quick else ["small", "trunk"])
    options.tokens = min(options.tokens, 48) if options.quick else options.tokens
    fitting = sum(sum(lengths) <= options.tokens for lengths in real_lengths())
    needed = options.updates * options.pairs
    if "real" in options.shares and needed > fitting:
        parser.error(
            f"{needed} real pairs of at most {options.tokens} tokens are needed and there are {fitting}: "
            "fewer --pairs or --updates, or more --tokens"
        )
    return parser, options


def prove(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Compare the contenders' updates in float64, and print their differences."""
    model, updates, tokens = ("quick", 3, 48) if options.quick else ("small", 6, 160)
    rows = same_work(options.contenders, job_of(model, "real", updates, 2, tokens, torch.float64, device))
    for name, row in rows.items():
        verdict = "the same" if row.get("same") else "NOT THE SAME"
        print(f"{name}: {row['errors']} {verdict}" if "errors" in row else f"{name}: {row['status']}")
    return {"model": model, "updates": updates, "dtype": "float64", "contenders": rows}


def fill(run: Run, cell: dict[str, Any], what: dict[str, Any]) -> None:
    """Measure the missing figures of ``cell``: first memory, on a CPU in fresh processes, then times."""
    rows, options, device = cell["contenders"], run.options, run.device
    if options.only != "time":
        for name in [n for n in options.contenders if lacks(rows.get(n), "peak_bytes")]:
            given = {"what": what, "name": name, "device": str(device)}
            if device.type == "cuda":  # its allocator counts peaks, so no fresh process is needed
                found = peak_row(peak_of, given)
            else:
                found = peak_memory_in_fresh_process("benchmarks.step", "peak_of", given)
            rows[name] = rows.get(name, {}) | found
            run.save()
    if options.only != "memory" and cell.get("rounds", 0) < options.rounds:
        measure(job_of(**what, dtype=torch.float32, device=device), options.contenders, options.rounds, cell, run.save)
        tqdm.write(table(cell["name"], rows))


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser, options = parsed(arguments)
    fields: dict[str, Any] = {"models": {}, "titles": {}, "same_work": {}}
    with measuring(parser, options, arguments, ("trl", "datasets"), lambda _: torch.float32, **fields) as run:
        result = run.result
        result["models"] |= {name: asdict(MODELS[name]) for name in options.models}
        result["titles"] |= {name: STEP_CONTENDERS[name].title for name in options.contenders}
        if not result["same_work"]:
            result["same_work"] = prove(options, run.device)
            run.save()
        todo = [(model, share) for model in options.models for share in options.shares]
        for model, share in tqdm(todo, desc="cells", disable=not sys.stderr.isatty()):
            what = {"model": model, "share": share, "updates": options.updates, "pairs": options.pairs}
            what |= {"tokens": options.tokens}
            most = " at most" if share == "real" else ""
            name = f"{model}, {share}, {options.pairs} pairs of {options.tokens} tokens{most}"
            fill(run, run.cell(name, **what), what)


if __name__ == "__main__":
    main()

"""A whole training step, end to end: ours, TRL's trainer with a conditioning collator, and four forwards.

    python -m benchmarks.step --json benchmarks/results/step_cpu.json

Every contender makes the same SGD updates of the same Llama-shaped model (random weights) on the same pairs. What is
timed goes from token ids to updated weights, batches included; the reference's log-probs, computed once before training
by all but ``four_forwards``, are timed by themselves. Before any timing, a float64 run of a few updates shows that the
work is the same: losses, and the weights' distance after the updates as a share of the way they went.

Cells are a model with pairs of one length at a share of the prompt in prompt + chosen + rejected, or with the lengths
of real pairs ("real").
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .batches import Lengths, real_lengths, sample_lengths
from .harness import (
    add_common_options,
    cell_of,
    checked_device,
    checked_result,
    command,
    guarded,
    kept_on_interrupt,
    lacks,
    limit_memory,
    own_peak,
    peak_memory_in_fresh_process,
    positive,
    provenance,
    ratios,
    reason,
    release_freed_memory,
    spread,
    write_json,
)
from .step_contenders import STEP_CONTENDERS, Job, ModelShape, Trained, random_pairs

# "small": the head is most of the step. "trunk": the layers are, as in models of billions of parameters.
MODELS = {
    "small": ModelShape(256, 688, 2, 4, 32_000),
    "trunk": ModelShape(512, 1376, 12, 8, 32_000),
    "quick": ModelShape(32, 64, 2, 2, 500),
}
LEARNING_RATE = 0.05
# Of losses, relative, and of weights, relative to the way they went, in float64. TRL's op keeps its sums in float32.
TOLERANCE = 1e-9
TRL_TOLERANCE = 1e-4
BASE = "four_forwards"


def lengths_of(share: str, pairs: int, tokens: int) -> tuple[Lengths, ...]:
    """Build a step of ``pairs`` pairs: of ``tokens`` tokens with a prompt of ``share``, or real ones no longer."""
    if share == "real":
        return sample_lengths(pairs, longest=tokens)
    response = max(1, round(tokens * (1 - float(share)) / 2))
    return ((tokens - 2 * response, response, response),) * pairs


def job_of(
    model: str, share: str, updates: int, pairs: int, tokens: int, dtype: torch.dtype, device: torch.device
) -> Job:
    shape = MODELS[model]
    drawn = random_pairs(lengths_of(share, updates * pairs, tokens), shape.vocab)
    batches = [drawn[i : i + pairs] for i in range(0, len(drawn), pairs)]
    return Job(shape.build(dtype, device), batches, LEARNING_RATE)


def prepared(names: Sequence[str], job: Job, failed: dict[str, str]) -> dict[str, tuple[Job, Callable[[], Trained]]]:
    """Each contender with a copy of the model to itself; a failing or missing one goes to ``failed``."""
    found = {}
    for name in names:
        why = STEP_CONTENDERS[name].unavailable()
        if why:
            failed[name] = why
            continue
        own = Job(copy.deepcopy(job.model), job.batches, job.learning_rate)
        try:
            found[name] = (own, STEP_CONTENDERS[name].prepare(own))
        except Exception as error:
            failed[name] = reason(error)
    return found


def from_start(own: Job, start: dict[str, Any], run: Callable[[], Trained]) -> Trained:
    own.model.load_state_dict(start)
    own.model.zero_grad()
    return run()


def same_work(names: Sequence[str], job: Job) -> dict[str, Any]:
    """Losses of every contender in float64, and how far its final weights are from those of ``four_forwards``."""
    failed: dict[str, str] = {}
    start = copy.deepcopy(job.model.state_dict())
    rows: dict[str, Any] = {}
    weights = {}
    for name, (own, run) in prepared([BASE, *(n for n in names if n != BASE)], job, failed).items():
        runs = guarded({name: partial(from_start, own, start, run)}, failed)
        trained = runs[name]()
        if trained is not None:
            weights[name] = {k: v.detach().clone() for k, v in own.model.named_parameters()}
            rows[name] = {"status": "measured", "losses": trained.losses}
    rows |= {name: {"status": why} for name, why in failed.items()}
    if BASE in failed:
        return rows | {name: {"status": f"not compared: {BASE} {failed[BASE]}"} for name in weights}
    moved = distance(weights[BASE], start)
    for name, final in weights.items():
        errors = {
            "loss": max(abs(a / b - 1) for a, b in zip(rows[name]["losses"], rows[BASE]["losses"], strict=True)),
            "weights": distance(final, weights[BASE]) / moved,
        }
        tolerance = TRL_TOLERANCE if name.startswith("trl") else TOLERANCE
        rows[name] |= {"errors": errors, "tolerance": tolerance, "same": max(errors.values()) <= tolerance}
    return rows


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Between the parameters that ``a`` names."""
    return math.sqrt(sum((value - b[name]).square().sum().item() for name, value in a.items()))


def measure(job: Job, names: Sequence[str], rounds: int, cell: dict[str, Any], save: Callable[[], None]) -> None:
    """Interleaved runs of every contender from the same weights, entered in ``cell``."""
    rows = cell.setdefault("contenders", {})
    failed = {name: row["status"] for name, row in rows.items() if row["status"] != "measured"}
    start = copy.deepcopy(job.model.state_dict())
    found = prepared([n for n in names if n not in failed], job, failed)
    runs = guarded({n: partial(from_start, own, start, run) for n, (own, run) in found.items()}, failed)
    updates, scored = len(job.batches), sum(len(w) + len(l) for _, w, l in job.pairs)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=not sys.stderr.isatty()):
        for name, run in runs.items():
            trained = run()
            if trained is None or i == 0:
                continue
            times[name].append(trained.seconds / updates)
            rows[name] = rows.get(name, {}) | {
                "status": "measured",
                "seconds": spread(times[name]),
                "positions_per_step": trained.positions / updates,
                "scored_tokens_per_second": scored / updates / spread(times[name])["median"],
                "reference_seconds_per_step": trained.reference_seconds / updates,
                "losses": trained.losses,
            }
        rows |= {name: {"status": why} for name, why in failed.items()}
        if i:
            cell["rounds"] = i
            done = {name: t for name, t in times.items() if name not in failed}
            for base in (BASE, "trl", "rows"):
                if base in done:
                    for name, ratio in ratios(done, base).items():
                        rows[name][f"times_{base}"] = ratio
        save()


def peak(what: dict[str, Any], name: str, device: torch.device) -> dict[str, Any]:
    """Peak above the model itself, of preparing and running, gradients and all copies included.

    On a CPU this is to be called in a fresh process.
    """
    contender = STEP_CONTENDERS[name]
    why = contender.unavailable()
    if why:
        return {"status": why}
    if device.type == "cpu":
        limit_memory()
    try:
        contender.prepare(job_of("quick", "0.3", 1, 2, 16, torch.float32, device))()
        job = job_of(**what, dtype=torch.float32, device=device)
        release_freed_memory()
        return {"status": "measured", "peak_bytes": own_peak(lambda: contender.prepare(job)(), str(device))}
    except Exception as error:
        return {"status": reason(error)}


def table(cell: dict[str, Any]) -> str:
    lines = [cell["name"]]
    for name, row in cell["contenders"].items():
        if "seconds" not in row:
            lines.append(f"  {name:<15}{row['status']}")
            continue
        beside = row.get(f"times_{BASE}")
        memory = "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:8,.0f} MiB"
        lines.append(
            f"  {name:<15}{row['seconds']['median']:8.3f} s"
            + (f"{beside['median']:7.2f}x {BASE} ({beside['q1']:.2f}-{beside['q3']:.2f})" if beside else "")
            + f"{row['positions_per_step']:8,.0f} positions"
            + f"{row['scored_tokens_per_second']:8,.0f} scored tokens/s{memory}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--peak-of"]:
        what = json.loads(arguments[1])
        print(json.dumps(peak(what, what.pop("name"), torch.device("cpu"))))
        return
    parser = argparse.ArgumentParser("python -m benchmarks.step", description=__doc__.splitlines()[0])
    add_common_options(parser, rounds=5)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)} [small trunk]"
    )
    parser.add_argument(
        "--shares",
        nargs="+",
        default=["0.1", "0.5", "0.667", "0.9", "real"],
        metavar="SHARE",
        help='of the prompt, or "real" [0.1 0.5 0.667 0.9 real]',
    )
    parser.add_argument(
        "--contenders",
        nargs="+",
        choices=STEP_CONTENDERS,
        default=list(STEP_CONTENDERS),
        metavar="NAME",
        help=f"of {', '.join(STEP_CONTENDERS)} [all]",
    )
    parser.add_argument("--pairs", type=positive, default=4, help="a step [4]")
    parser.add_argument("--tokens", type=positive, default=512, help="of a pair, at most [512]")
    parser.add_argument("--updates", type=positive, default=2, help="timed together [2]")
    options = parser.parse_args(arguments)
    for share in options.shares:
        if share != "real" and not _is_share(share):
            parser.error(f'--shares {share}: a number between 0 and 1, or "real"')
    device = checked_device(parser, options.device)
    models = options.models or (["quick"] if options.quick else ["small", "trunk"])
    tokens = min(options.tokens, 48) if options.quick else options.tokens
    fitting, needed = sum(sum(lengths) <= tokens for lengths in real_lengths()), options.updates * options.pairs
    if "real" in options.shares and needed > fitting:
        parser.error(
            f"{needed} real pairs of at most {tokens} tokens are needed and there are {fitting}: "
            "fewer --pairs or --updates, or more --tokens"
        )
    proof_model, proof_updates = ("quick", 3) if options.quick else ("small", 6)
    result: dict[str, Any] = {
        **provenance(command("benchmarks.step", arguments, options.json), ["trl", "datasets"]),
        "dtype": "float32",
        "models": {},
        "titles": {},
        "finished": False,
        "same_work": {},
        "cells": [],
    }
    result = checked_result(parser, options, result)
    result["models"] |= {name: asdict(MODELS[name]) for name in models}
    result["titles"] |= {name: contender.title for name, contender in STEP_CONTENDERS.items()}

    def save() -> None:
        if options.json:
            write_json(options.json, result)

    with kept_on_interrupt(save):
        if not result["same_work"]:
            proof = job_of(proof_model, "real", proof_updates, 2, 48 if options.quick else 160, torch.float64, device)
            result["same_work"] = {
                "model": proof_model,
                "updates": proof_updates,
                "dtype": "float64",
                "contenders": same_work(options.contenders, proof),
            }
            for name, row in result["same_work"]["contenders"].items():
                print(
                    f"{name}: {row['errors']} {'the same' if row['same'] else 'NOT THE SAME'}"
                    if "errors" in row
                    else f"{name}: {row['status']}"
                )
            save()
        todo = [(model, share) for model in models for share in options.shares]
        for model, share in tqdm(todo, desc="cells", disable=not sys.stderr.isatty()):
            what = {"model": model, "share": share, "updates": options.updates, "pairs": options.pairs}
            what |= {"tokens": tokens}
            name = f"{model}, {share}, {options.pairs} pairs of {tokens} tokens{' at most' * (share == 'real')}"
            cell = cell_of(result, {"name": name, **what, "contenders": {}})
            rows = cell["contenders"]
            if options.only != "time":
                for name in [n for n in options.contenders if lacks(rows.get(n), "peak_bytes")]:
                    if device.type == "cuda":  # whose allocator counts by itself: no process of its own
                        found = peak(what, name, device)
                    else:
                        given = json.dumps(what | {"name": name})
                        found = peak_memory_in_fresh_process("benchmarks.step", ["--peak-of", given])
                    rows[name] = rows.get(name, {}) | found
                    save()
            if "rounds" in cell or options.only == "memory":
                continue
            job = job_of(**what, dtype=torch.float32, device=device)
            measure(job, options.contenders, options.rounds, cell, save)
            tqdm.write(table(cell))
        result["finished"] = True
        save()
    if options.json:
        print(f"written to {options.json}")


def _is_share(text: str) -> bool:
    try:
        return 0 < float(text) < 1
    except ValueError:
        return False


if __name__ == "__main__":
    main()

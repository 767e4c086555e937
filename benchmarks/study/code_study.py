"""Run the study of conditioning on real text: ``python -m benchmarks.study.code_study --json FILE``.

It follows ``docs/study_protocol_code.md``. Every finished run is a line of ``runs.jsonl`` next to FILE. After an
interruption, the same command runs the rest. At the end it writes FILE, ``study_code.md`` and its picture. To repeat
the study, run it with another FILE; a copy of its ``runs.jsonl``, named ``repeat.jsonl``, is reported beside the first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaForCausalLM

from ..result_files import command, provenance, result_file, write_json
from . import code_report
from .code_runs import (
    ARMS,
    Data,
    Pair,
    Size,
    draw_pairs,
    evaluate,
    fitted_base,
    fitting_data,
    log_probs,
    train,
    with_alternatives,
)
from .code_world import Judge, read_library
from .lines import append_line, check_settings, read_lines, write_lines
from .statistics import holm, t_interval

CACHE = Path("runs", "study-code")
QUICK = Size(
    most_files=120,
    vocabulary=300,
    hidden_size=32,
    layers=1,
    most_tokens=48,
    fit_steps=12,
    fit_rows=8,
    pairs=6,
    update_pairs=3,
    epochs=(1, 2),
    validation_prompts=4,
    test_prompts=4,
    samples=1,
    seeds=2,
)
MARGIN = 0.03  # of quality: smaller differences do not matter
LEVEL = 0.05
LAST = "last"  # the last epoch; otherwise BEST, the epoch chosen on validation prompts
BEST = "best"

# name: (what is claimed, arm, arm that is subtracted, epoch of the first, epoch of the second)
HYPOTHESES = {
    "H1": ("InSPO beats plain after the last epoch", "inspo", "plain", LAST, LAST),
    "H2": ("InSPO beats plain at the epoch chosen on validation prompts", "inspo", "plain", BEST, BEST),
    "H3": ("the own alternative beats another pair's after the last epoch", "inspo", "shuffled", LAST, LAST),
}
CHOSEN = ("quality", "gain", "greedy", "greedy_gain", "compiles", "length", "win_rate")
OTHERS = {
    "plain, last epoch - plain, chosen epoch": ("plain", "plain", LAST, BEST),
    "own - shuffled alternative, chosen epoch": ("inspo", "shuffled", BEST, BEST),
    "conditioned reference, dropout - plain, last epoch": ("dropout", "plain", LAST, LAST),
    "conditioned reference, dropout - plain, chosen epoch": ("dropout", "plain", BEST, BEST),
    "shuffled - plain, last epoch": ("shuffled", "plain", LAST, LAST),
    "InSPO, last epoch - plain, chosen epoch": ("inspo", "plain", LAST, BEST),
    "plain - SFT, chosen epoch": ("plain", "sft", BEST, BEST),
    "InSPO - SFT, chosen epoch": ("inspo", "sft", BEST, BEST),
}


class Records:
    """Finished runs, one JSON line each, after a first line with settings and provenance."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Read ``file`` if it exists. Raises ValueError if its runs have other settings."""
        self.file, self.settings = file, json.loads(json.dumps(settings))
        lines = read_lines(file)
        self.head: dict[str, Any] = lines[0] if lines else {}
        self.runs: list[dict[str, Any]] = lines[1:]
        if lines:
            check_settings(file, self.head["settings"], self.settings)

    def has(self, arm: str, seed: int) -> bool:
        return any(run["arm"] == arm and run["seed"] == seed for run in self.runs)

    def open(self, head: Mapping[str, Any]) -> None:
        """Start the file, or drop a last line that is incomplete because the run was killed."""
        self.head = self.head or {**head, "settings": self.settings}
        write_lines(self.file, (self.head, *self.runs))

    def add(self, run: dict[str, Any]) -> None:
        append_line(self.file, run)
        self.runs.append(run)


def study(size: Size, records: Records, call: str) -> None:
    """Run what ``records`` lacks, all arms of a seed before the next seed."""
    left = [(arm, seed) for seed in range(size.seeds) for arm in ("base", *ARMS) if not records.has(arm, seed)]
    if not left:
        return
    library = read_library(most_files=size.most_files)
    data = fitting_data(library, size)
    facts = {"files": library.files, "digest": library.digest}
    facts |= {part: [len(found), len(data.prompts(part))] for part, found in data.functions.items()}
    if records.head and records.head["library"] != facts:
        raise ValueError(f"{records.file} holds runs with another Python's library; move it or choose another folder")
    base, fitted = fitted_base(data, library.digest, size, CACHE, lambda words: print(words, flush=True))
    records.open({**provenance(call, ["tokenizers"]), "library": facts, "base": fitted})
    weights = {name: value.clone() for name, value in base.state_dict().items()}
    pairs: dict[int, list[Pair]] = {}
    for done, (arm, seed) in enumerate(left):
        print(f"{done} of {len(left)} runs done; seed {seed}, {arm}", flush=True)
        base.load_state_dict(weights)
        if seed not in pairs:
            pairs = {seed: draw_pairs(base, data, size, seed, Judge())}
        mine = with_alternatives(pairs[seed], own=arm == "base" or ARMS[arm].own, seed=seed)
        run = base_run(base, mine, data, size, seed) if arm == "base" else arm_run(base, mine, data, size, arm, seed)
        records.add({"arm": arm, "seed": seed, **run})


def base_run(model: LlamaForCausalLM, pairs: Sequence[Pair], data: Data, size: Size, seed: int) -> dict[str, Any]:
    """Grade the base itself and describe its pairs."""
    began = time.perf_counter()
    lengths = torch.tensor([[len(p.chosen), len(p.rejected)] for p in pairs]).T
    gap = (log_probs(model, pairs, conditioned=True) - log_probs(model, pairs, conditioned=False)) / lengths
    better = [p.qualities[0] - p.qualities[1] for p in pairs]
    found = {
        "count": len(pairs),
        "chosen_better": float(np.mean([b > 0 for b in better])),
        "chosen_worse": float(np.mean([b < 0 for b in better])),
        "gap": gap.mean(1).tolist(),
        "lengths": lengths.double().mean(1).tolist(),
    }
    evaluation = {"epoch": 0, **evaluate(model, data, size, seed)}
    return {"evaluations": [evaluation], "pairs": found, "seconds": round(time.perf_counter() - began, 1)}


def arm_run(
    model: LlamaForCausalLM, pairs: Sequence[Pair], data: Data, size: Size, arm: str, seed: int
) -> dict[str, Any]:
    """Train one arm from the base in ``model`` and grade its answers after each epoch in ``size.epochs``."""
    began = time.perf_counter()
    evaluations: list[dict[str, Any]] = []

    def after_epoch(epoch: int) -> None:
        evaluations.append({"epoch": epoch, **evaluate(model, data, size, seed)})

    counts = train(model, pairs, ARMS[arm], size, seed, after_epoch)
    return {**counts, "evaluations": evaluations, "seconds": round(time.perf_counter() - began, 1)}


def summarize(size: Size, records: Records) -> dict[str, Any]:
    """Compute the report's numbers from the seeds whose arms are all finished."""
    complete = [s for s in range(size.seeds) if all(records.has(arm, s) for arm in ("base", *ARMS))]
    if len(complete) < 2:
        raise ValueError(f"{records.file} holds {len(complete)} finished seeds; a summary needs at least two")
    runs = {(run["arm"], run["seed"]): run for run in records.runs}
    bases = {
        seed: measures(runs["base", seed]["evaluations"][0], runs["base", seed]["evaluations"][0]) for seed in complete
    }
    table: dict[str, dict[int, list[dict[str, float]]]] = {"base": {0: list(bases.values())}}
    for arm in ARMS:
        table[arm] = {
            epoch: [
                measures(runs[arm, seed]["evaluations"][i], runs["base", seed]["evaluations"][0]) for seed in complete
            ]
            for i, epoch in enumerate(size.epochs)
        }
    chosen = {arm: chosen_epochs(table[arm]) for arm in ARMS}

    def qualities(arm: str, when: str, what: str = "quality") -> list[float]:
        epochs = [size.epochs[-1]] * len(complete) if when == LAST else chosen[arm]
        return [table[arm][epoch][i][what] for i, epoch in enumerate(epochs)]

    def contrast(one: str, other: str, when: str, when_other: str) -> dict[str, Any]:
        result: dict[str, Any] = {"arms": [one, other], "epochs": [when, when_other]}
        for what in ("quality", "greedy", "win_rate", "length"):
            pairs = zip(qualities(one, when, what), qualities(other, when_other, what))
            differences = [a - b for a, b in pairs]
            result[what] = t_interval(differences)
            if what == "quality":
                result["narrow"] = t_interval(differences, 0.90)
                result["by_seed"] = differences
        return result

    tests = {name: {"claim": h[0], **contrast(*h[1:])} for name, h in HYPOTHESES.items()}
    adjusted = holm([test["quality"]["p"] if test["quality"]["p"] is not None else 1.0 for test in tests.values()])
    for test, p in zip(tests.values(), adjusted):
        test["holm_p"] = p
        test["decision"] = decision(test["quality"], test["narrow"], p)
    return {
        "seeds": complete,
        "planned_seeds": size.seeds,
        "arms": {arm: [{"epoch": e, **over_seeds(rows)} for e, rows in found.items()] for arm, found in table.items()},
        "chosen": {
            arm: {"epochs": chosen[arm], **{w: t_interval(qualities(arm, BEST, w)) for w in CHOSEN}} for arm in ARMS
        },
        "hypotheses": tests,
        "others": {name: contrast(*other) for name, other in OTHERS.items()},
        "pairs": [runs["base", seed]["pairs"] for seed in complete],
        "tokens": {arm: float(np.mean([runs[arm, seed]["tokens"] for seed in complete])) for arm in ARMS},
        "updates": sorted({runs[arm, seed]["updates"] for arm in ARMS for seed in complete}),
        "run_seconds": sum(run["seconds"] for run in records.runs),
    }


def measures(evaluation: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    """Return the means over answers.

    ``win_rate`` is the judge's mean probability of preferring the answers to the base's. Gains are differences from
    the base.
    """
    judge = Judge()
    test = {name: np.array(values, dtype=float) for name, values in evaluation["test"].items()}
    theirs = {name: np.array(values, dtype=float) for name, values in base["test"].items()}
    ahead = judge.a * (test["quality"] - theirs["quality"]) / 1000 + judge.b * (test["length"] - theirs["length"])
    quality, greedy = test["quality"].mean() / 1000, np.mean(evaluation["greedy"]["quality"]) / 1000
    return {
        "quality": float(quality),
        "gain": float(quality - theirs["quality"].mean() / 1000),
        "compiles": float((test["quality"] > 0).mean()),
        "length": float(test["length"].mean()),
        "win_rate": float((1 / (1 + np.exp(-ahead))).mean()),
        "greedy": float(greedy),
        "greedy_gain": float(greedy - np.mean(base["greedy"]["quality"]) / 1000),
        "validation": float(np.mean(evaluation["validation"]["quality"])) / 1000,
    }


def chosen_epochs(by_epoch: Mapping[int, Sequence[Mapping[str, float]]]) -> list[int]:
    """Return, for each seed, the epoch with the best quality on validation prompts. The earliest wins ties."""
    seeds = range(len(next(iter(by_epoch.values()))))
    return [max(by_epoch, key=lambda epoch: (by_epoch[epoch][i]["validation"], -epoch)) for i in seeds]


def over_seeds(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    return {what: t_interval([row[what] for row in rows]) for what in rows[0]}


def decision(interval: Mapping[str, Any], narrow: Mapping[str, Any], p: float) -> str:
    """Return the protocol's decision for a difference, its 90% interval and its adjusted p-value."""
    if p < LEVEL:
        return "better" if interval["mean"] > 0 else "worse"
    return "equivalent" if -MARGIN < narrow["low"] and narrow["high"] < MARGIN else "undecided"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study.code_study", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--json", type=result_file, required=True, help="result file; runs.jsonl is kept next to it")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: everything runs, nothing is learned")
    options = parser.parse_args(arguments)
    words = sys.argv[1:] if arguments is None else arguments
    run_study(options.json, quick=options.quick, call=command("benchmarks.study.code_study", words, options.json))


def repeated(size: Size, records: Records) -> dict[str, Any] | None:
    """Compute the hypotheses again from a repeat of all runs on a base that was fitted anew; None without one."""
    if not records.head:
        return None
    about = {name: records.head[name] for name in ("date", "package", "base")}
    return about | {name: summarize(size, records)[name] for name in ("seeds", "hypotheses")}


def run_study(file: Path, *, quick: bool, call: str) -> None:
    """Run the rest of the study, then write ``file`` and the report."""
    torch.set_num_threads(1)
    size = QUICK if quick else Size()
    settings = {"size": asdict(size), "judge": asdict(Judge()), "arms": {n: asdict(a) for n, a in ARMS.items()}}
    try:
        records = Records(file.parent / "runs.jsonl", settings)
        study(size, records, call)
        result = {
            **provenance(call, ["tokenizers"]),
            "settings": settings,
            "started": records.head,
            "margin": MARGIN,
            **summarize(size, records),
            "repeat": repeated(size, Records(file.parent / "repeat.jsonl", settings)),
        }
    except KeyboardInterrupt:
        print("interrupted; the same command runs the rest", file=sys.stderr)
        sys.exit(130)
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    write_json(file, result)
    for written in code_report.write(result, file.parent):
        print(f"wrote {written}")


if __name__ == "__main__":
    main()

"""Run the study of whether conditioning on the other response helps: ``python -m benchmarks.study``.

The study has two parts: "arms" compares objectives and controls (study.md), "axis" varies the numbers of pairs and
updates (study_axis.md). Each part first prints how long it will take. Every finished run is a line of a .jsonl file in
the part's folder. After an interruption, the same command runs the rest. Each part ends by writing its summary and its
report.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..result_files import checked_device, provenance, write_json
from . import axis_report, axis_summary, code_study, report, summary
from .axis import AXIS_PLANS
from .execution import axis_study, open_axis_records, open_records, study
from .plan import PLANS, base_jobs, tuning_jobs
from .world import Judge

CACHE = Path("runs", "study-bases")
PARTS = ("arms", "axis")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="only this part [both; --large has only arms]")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: everything runs, nothing is learned")
    parser.add_argument("--large", action="store_true", help="a larger model and more seeds; needs --device cuda")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" [cpu]')
    parser.add_argument(
        "--workers", type=int, help="number of processes, with one thread each [one per core, at most 16]"
    )
    parser.add_argument(
        "--output", type=Path, help="folder for the results [the committed results, or runs/study-SIZE]"
    )
    parser.add_argument("--report", action="store_true", help="run nothing, write the report from the finished runs")
    options = parser.parse_args(arguments)
    if options.quick and options.large:
        parser.error("--quick and --large exclude each other")
    if options.large and options.part == "axis":
        parser.error("--large works only with the part arms; leave out --large or --part axis")
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    checked_device(parser, options.device)
    options.size = "quick" if options.quick else "large" if options.large else "full"
    options.workers = options.workers or min(16, os.cpu_count() or 1)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m benchmarks.study", *words])
    torch.set_num_threads(1)
    parts = [options.part] if options.part else PARTS[:1] if options.large else PARTS
    try:
        for part in parts:
            (_arms if part == "arms" else _axis)(parser, options, command)
        if options.quick and not options.part and not options.report:  # at full size it has its own command
            folder, _ = _folders(options, report.RESULTS)
            code_study.run_study(folder / "code" / "study_code.json", quick=True, call=command)
    except KeyboardInterrupt:
        print("interrupted; the same command runs the rest", file=sys.stderr)
        sys.exit(130)


def _folders(options: argparse.Namespace, committed: Path) -> tuple[Path, Path]:
    """Return the folders of a part's results and report. The committed results' report is in docs."""
    if options.output is None and options.size == "full":
        return committed, report.DOCS
    folder = options.output or Path("runs", f"study-{options.size}")
    return folder, folder


def _arms(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> None:
    plan = PLANS[options.size]
    folder, docs = _folders(options, report.RESULTS)
    try:
        records = open_records(plan, folder, options.device)
    except ValueError as error:
        parser.error(str(error))
    if not options.report:
        study(plan, records, CACHE, workers=options.workers, device=options.device)
    elif any(job not in records for job in base_jobs(plan) + tuning_jobs(plan)):
        parser.error(f"--report: {folder} does not hold all bases and all of the tuning yet")
    print("fitting the length model and its bootstrap", flush=True)
    result: dict[str, Any] = {
        **provenance(command),
        "plan": asdict(plan),
        "judge": asdict(Judge()),
        **summary.summarize(plan, records.by_key.values()),
    }
    write_json(folder / "study.json", result)
    for file in report.write(result, docs):
        print(f"wrote {file}")


def _axis(parser: argparse.ArgumentParser, options: argparse.Namespace, command: str) -> None:
    plan = AXIS_PLANS[options.size]
    folder, docs = _folders(options, axis_report.RESULTS)
    try:
        records = open_axis_records(plan, folder, options.device)
    except ValueError as error:
        parser.error(str(error))
    if not options.report:
        axis_study(plan, records, CACHE, workers=options.workers, device=options.device)
    elif missing := axis_summary.missing_for_report(plan, records[plan.pairs[0]].by_key):
        parser.error(f"--report: {folder} does not hold two seeds of {missing} yet")
    found = [record for held in records.values() for record in held.by_key.values()]
    result = {**provenance(command), "plan": asdict(plan), **axis_summary.summarize(plan, found)}
    write_json(folder / "axis.json", result)
    for file in axis_report.write(result, docs):
        print(f"wrote {file}")


if __name__ == "__main__":
    main()

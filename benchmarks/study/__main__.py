"""Does conditioning on the other response help? The whole study: ``python -m benchmarks.study``.

Says first how long it will take. Every finished run is a line of ``runs.jsonl`` in the output folder; after an
interruption, the same command does what is left. Ends by writing ``study.json`` and the report.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from ..harness import checked_device, provenance, write_json
from . import report, summary
from .execution import open_records, study
from .plan import PLANS, base_jobs, tuning_jobs
from .world import Judge

CACHE = Path("runs", "study-bases")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: everything runs, nothing is learned")
    parser.add_argument("--large", action="store_true", help="a larger model and more seeds; wants --device cuda")
    parser.add_argument("--device", default="cpu", help='"cpu" or "cuda" [cpu]')
    parser.add_argument("--workers", type=int, help="processes of one thread each [one for each core, at most 16]")
    parser.add_argument("--output", type=Path, help="folder of the results [the committed one, or runs/study-SIZE]")
    parser.add_argument("--report", action="store_true", help="run nothing, report what is finished")
    options = parser.parse_args(arguments)
    if options.quick and options.large:
        parser.error("--quick and --large exclude each other")
    checked_device(parser, options.device)
    size = "quick" if options.quick else "large" if options.large else "full"
    folder = options.output or (report.RESULTS if size == "full" else Path("runs", f"study-{size}"))
    workers = options.workers or min(16, os.cpu_count() or 1)
    torch.set_num_threads(1)
    try:
        records = open_records(PLANS[size], folder, options.device)
    except ValueError as error:
        parser.error(str(error))
    if not options.report:
        try:
            study(PLANS[size], records, CACHE, workers=workers, device=options.device)
        except KeyboardInterrupt:
            print("interrupted; the same command does what is left", file=sys.stderr)
            sys.exit(130)
    elif any(job not in records for job in base_jobs(PLANS[size]) + tuning_jobs(PLANS[size])):
        parser.error(f"--report: {folder} does not hold all bases and all of the tuning yet")
    print("fitting the length model and its bootstrap", flush=True)
    words = sys.argv[1:] if arguments is None else arguments
    result = {
        **provenance(" ".join(["python -m benchmarks.study", *words])),
        "plan": asdict(PLANS[size]),
        "judge": asdict(Judge()),
        **summary.summarize(PLANS[size], records.by_key.values()),
    }
    write_json(folder / "study.json", result)
    for file in report.write(result, report.DOCS if folder == report.RESULTS else folder):
        print(f"wrote {file}")


if __name__ == "__main__":
    main()

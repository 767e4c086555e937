"""Run the plan in worker processes. Finished runs are kept and not repeated."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import plan as planning
from .arms import ARMS, AXIS_ARMS, FIXED, Arm
from .axis import BASE, AxisJob, AxisPlan, axis_jobs
from .axis import seconds as axis_seconds
from .lines import append_line, check_settings, read_lines, write_lines
from .plan import Job, Plan, all_jobs, base_jobs, grid, seconds, test_jobs, tuned_arms, tuning_jobs, winners
from .world import Judge

AnyJob = Job | AxisJob


class Records:
    """Finished runs, one JSON line each, after a first line with the settings."""

    def __init__(self, file: Path, settings: Mapping[str, Any], job: type[AnyJob] = Job) -> None:
        """Read ``file`` if it exists. Raises ValueError if its runs have other settings."""
        self.file, self.settings, self.job = file, json.loads(json.dumps(settings)), job
        self.by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
        lines = read_lines(file)
        if lines:
            check_settings(file, lines[0], self.settings)
        for record in lines[1:]:
            self._keep(record)

    def open(self) -> None:
        """Prepare the file for new lines. Drop a last line that is incomplete because the run was killed."""
        write_lines(self.file, [self.settings, *self.by_key.values()])

    def _keep(self, record: dict[str, Any]) -> None:
        self.by_key[self.job(**{name: record[name] for name in self.job.__dataclass_fields__}).key] = record

    def __contains__(self, job: AnyJob) -> bool:
        return job.key in self.by_key

    def add(self, record: dict[str, Any]) -> None:
        append_line(self.file, record)
        self._keep(record)


def execute(job: AnyJob, settings: Any, cache: Path, device: str) -> dict[str, Any]:
    """Run a job in a worker process, with one thread so that results do not depend on the number of cores."""
    torch.set_num_threads(1)
    return job.execute(settings, cache, device)


Run = Callable[[AnyJob, Any], "Future[dict[str, Any]]"]


@contextmanager
def worker_pool(
    workers: int, total: int, left: int, cache: Path, device: str
) -> Iterator[tuple[Run, Callable[[], Any]]]:
    """Yield a function that submits a job, and a function that advances the bar. On an error, cancel waiting jobs."""
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=total, initial=total - left, unit="run") as bar,
    ):

        def run(job: AnyJob, settings: Any) -> Future[dict[str, Any]]:
            return pool.submit(execute, job, settings, cache, device)

        try:
            yield run, bar.update
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def finish(jobs: Sequence[AnyJob], records: Records, run: Callable[[AnyJob], Any], done: Callable[[], Any]) -> None:
    """Add the records of the ``jobs`` that have none. ``run`` returns a future for a job."""
    waiting = {run(job) for job in jobs if job not in records}
    while waiting:
        ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ended:
            records.add(future.result())
            done()


def _settings(arm: Arm) -> dict[str, Any]:
    """Return all settings that determine what the arm does."""
    return {name: value for name, value in asdict(arm).items() if name not in ("title", "group", "level")}


def open_records(plan: Plan, folder: Path, device: str) -> Records:
    """Return the records of ``plan`` in ``folder``. Raises ValueError if they have other settings."""
    settings = {
        "plan": asdict(plan) | {"arms": {name: _settings(ARMS[name]) for name in plan.arms}},
        "grids": {name: grid(arm) for name, arm in tuned_arms(plan).items()},
        "judge": asdict(Judge()),
        "fixed": FIXED,
        "device": device,
        "torch": torch.__version__,
    }
    return Records(folder / "runs.jsonl", settings)


def study(plan: Plan, records: Records, cache: Path, *, workers: int, device: str = "cpu") -> None:
    """Run the rest of ``plan``. ``cache`` keeps the bases."""
    records.open()
    total = all_jobs(plan, records.by_key.values())
    left = [job for job in total if job not in records]
    estimate = seconds(plan, left, device) / workers
    print(f"{len(left)} of {len(total)} runs to do: about {estimate / 60:.0f} minutes, {workers} processes", flush=True)
    with worker_pool(workers, len(total), len(left), cache, device) as (submit, done):

        def run(job: AnyJob) -> Any:
            return submit(job, plan.size)

        finish(base_jobs(plan), records, run, done)
        finish(tuning_jobs(plan), records, run, done)
        finish(test_jobs(plan, winners(plan, records.by_key.values())), records, run, done)


def open_axis_records(plan: AxisPlan, folder: Path, device: str) -> dict[int, Records]:
    """Return the over-training study's records in ``folder``, one file per number of pairs. Raises as above."""
    settings = {
        "plan": asdict(plan) | {"arms": {name: _settings(AXIS_ARMS[name]) for name in plan.arms}},
        "judge": asdict(Judge()),
        "device": device,
        "torch": torch.__version__,
    }
    return {pairs: Records(folder / f"{pairs}.jsonl", settings, AxisJob) for pairs in plan.pairs}


def axis_study(plan: AxisPlan, records: Mapping[int, Records], cache: Path, *, workers: int, device: str) -> None:
    """Run the rest of the over-training study, with the cells of its hypotheses first."""
    total = [job for pairs in plan.pairs for job in axis_jobs(plan, pairs)]
    left = [job for job in total if job not in records[job.pairs]]
    estimate = axis_seconds(plan, left, *planning.step_seconds(plan.size, device)) / workers
    print(f"{len(left)} of {len(total)} runs to do: about {estimate / 60:.0f} minutes, {workers} processes", flush=True)
    with worker_pool(workers, len(total), len(left), cache, device) as (submit, done):
        for pairs, held in records.items():
            held.open()
            jobs = axis_jobs(plan, pairs)
            if workers > 1:  # bases first, otherwise two workers would fit the same base
                finish([job for job in jobs if job.arm == BASE], held, lambda job: submit(job, plan), done)
            finish(jobs, held, lambda job: submit(job, plan), done)

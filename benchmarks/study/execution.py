"""Runs the plan in worker processes; what is finished is kept, and not done again."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from .arms import ARMS, FIXED, Arm
from .plan import Job, Plan, all_jobs, base_jobs, grid, seconds, test_jobs, tuned_arms, tuning_jobs, winners
from .runs import Size
from .world import Judge


class Records:
    """Finished runs, one JSON line each behind a first line with the settings."""

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Reads ``file``, if there is one; raises ValueError if it holds runs of other settings."""
        self.file, self.settings = file, json.loads(json.dumps(settings))
        self.by_key: dict[tuple[Any, ...], dict[str, Any]] = {}
        whole = file.read_text().rpartition("\n")[0].split("\n") if file.exists() else []
        lines = [json.loads(line) for line in whole if line]
        if lines and lines[0] != self.settings:
            other = ", ".join(name for name in self.settings if lines[0].get(name) != self.settings[name])
            raise ValueError(f"{file}: holds runs of other settings ({other}); move it or choose another folder")
        for record in lines[1:]:
            self._keep(record)

    def open(self) -> None:
        """Makes the file ready for more: a line that a kill cut off is dropped."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        lines = [self.settings, *self.by_key.values()]
        self.file.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _keep(self, record: dict[str, Any]) -> None:
        self.by_key[Job(**{name: record[name] for name in Job.__dataclass_fields__}).key] = record

    def __contains__(self, job: Job) -> bool:
        return job.key in self.by_key

    def add(self, record: dict[str, Any]) -> None:
        with self.file.open("a") as out:
            out.write(json.dumps(record) + "\n")
        self._keep(record)


def execute(job: Job, size: Size, cache: Path, device: str) -> dict[str, Any]:
    """In a worker process: one thread, so that results do not depend on how many cores there are."""
    torch.set_num_threads(1)
    return job.execute(size, cache, device)


def finish(jobs: Sequence[Job], records: Records, run: Callable[[Job], Any], done: Callable[[], Any]) -> None:
    """Adds the records of those ``jobs`` that have none. ``run`` gives a future of each."""
    waiting = {run(job) for job in jobs if job not in records}
    while waiting:
        ended, waiting = wait(waiting, return_when=FIRST_COMPLETED)
        for future in ended:
            records.add(future.result())
            done()


def _settings(arm: Arm) -> dict[str, Any]:
    """All that decides what the arm does."""
    return {name: value for name, value in asdict(arm).items() if name not in ("title", "group", "level")}


def open_records(plan: Plan, folder: Path, device: str) -> Records:
    """What ``folder`` holds of ``plan``; raises ValueError if that is of other settings."""
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
    """Runs what is left of ``plan``; ``cache`` is for the bases."""
    records.open()
    total = all_jobs(plan, records.by_key.values())
    left = [job for job in total if job not in records]
    estimate = seconds(plan, left, device) / workers
    print(f"{len(left)} of {len(total)} runs to do: about {estimate / 60:.0f} minutes, {workers} processes", flush=True)
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(workers, mp_context=context) as pool,
        tqdm(total=len(total), initial=len(total) - len(left), unit="run") as bar,
    ):

        def run(job: Job) -> Any:
            return pool.submit(execute, job, plan.size, cache, device)

        try:
            finish(base_jobs(plan), records, run, bar.update)
            finish(tuning_jobs(plan), records, run, bar.update)
            finish(test_jobs(plan, winners(plan, records.by_key.values())), records, run, bar.update)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise

"""Run training in several processes, one of which gets SIGTERM. A launcher starts this program.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/training/stopped_processes.py FOLDER

FOLDER/one holds checkpoint-2 of a run in one process. The program writes FOLDER/whole (uninterrupted), FOLDER/stopped
(stopped and resumed), FOLDER/broken_off (stopped in an evaluation), FOLDER/reference (stopped in the reference pass),
FOLDER/continued (resumed from FOLDER/one) and FOLDER/RANK.json with each process's observations.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers import PAIRS, options

import training.references
import training.reporting
import training.resumable
from training import checkpoint, output
from training.engine import end_processes, process_index
from training.errors import SaveError, Stopped
from training.options import parse_config
from training.train import train

RUN = [
    "--max_steps",
    "4",
    "--max_batch_tokens",
    "400",
    "--save_steps",
    "2",
    "--logging_steps",
    "1",
    "--eval_data",
    str(PAIRS),
    "--eval_steps",
    "2",
    "--weight_decay",
    "0.1",
    "--learning_rate",
    "1e-2",
]
PAIRS_OF_A_STEP = 8
TWO = [*RUN, "--per_device_train_batch_size", str(PAIRS_OF_A_STEP // 2)]


def run(folder: Path, *more: str) -> str | None:
    """Run, and return the exception that stopped the run, if any."""
    try:
        train(parse_config(options(folder, *TWO, *more)), quiet=True)
    except (Stopped, SaveError) as stop:
        return str(stop)
    return None


def terminate_one() -> None:
    if process_index() == 1:
        os.kill(os.getpid(), signal.SIGTERM)


def stopped_in(owner: Any, name: str, when: Callable[..., bool], folder: Path) -> str | None:
    """Send SIGTERM to one process of the run in ``folder``, at the first call of ``owner.name`` that fits ``when``."""
    original = getattr(owner, name)

    def patched(*what: Any, **how: Any) -> Any:
        if when(*what, **how):
            setattr(owner, name, original)
            terminate_one()
        return original(*what, **how)

    setattr(owner, name, patched)
    said = run(folder)
    setattr(owner, name, original)
    assert run(folder, "--resume_from_checkpoint", "auto") is None
    return said


def main() -> None:
    folder = Path(sys.argv[1])
    gc.freeze()  # every run collects garbage, and would scan what imports made
    output.plot_curves = lambda *what: None
    training.references.CHUNK = 8
    seen = {}
    assert run(folder / "whole") is None
    seen["stopped"] = stopped_in(output.Window, "add", lambda *_: True, folder / "stopped")
    in_evaluation = lambda *_, stop_requested=None, **__: (  # noqa: E731
        stop_requested is not None and (folder / "broken_off" / "metrics.jsonl").read_text().count("\n") > 1
    )
    seen["broken_off"] = stopped_in(training.reporting, "score", in_evaluation, folder / "broken_off")
    scored = iter(range(99))
    seen["reference"] = stopped_in(
        training.references, "score", lambda *_, **__: next(scored) == 1, folder / "reference"
    )
    assert run(folder / "continued", "--resume_from_checkpoint", str(folder / "one" / "checkpoint-2")) is None

    def full(*what: object) -> None:
        raise OSError("no space in the first process")

    write, training.resumable.save_file = training.resumable.save_file, full
    assert run(folder / "full", "--keep_best", "false") is None
    training.resumable.save_file = write
    checkpoint.publish = full
    seen["full"] = run(folder / "fuller", "--keep_best", "false")
    (folder / f"{process_index()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
    end_processes(0)

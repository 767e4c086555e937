"""A run in several processes that SIGTERM reaches in one of them; the program that a launcher starts.

    python -m torch.distributed.run --standalone --nproc_per_node 2 tests/training/stopped_processes.py FOLDER ENGINE

FOLDER/one holds checkpoint-2 of a run in one process. Leaves FOLDER/whole (uninterrupted), FOLDER/stopped (stopped and
resumed), FOLDER/broken_off (the same in an evaluation), FOLDER/continued (resumed from FOLDER/one) and FOLDER/RANK.json
with what each process saw.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from helpers import PAIRS, options

import training.train
from training import checkpoint, output
from training.checkpoint import SaveError
from training.config import parse_config
from training.engine import end_processes, process_index
from training.stopping import Stopped
from training.train import train

RUN = ["--max_steps", "4", "--batch_size", "7", "--max_batch_tokens", "400", "--save_every", "2", "--log_every", "1",
       "--eval_data", str(PAIRS), "--eval_every", "2", "--weight_decay", "0.1", "--learning_rate", "1e-2"]  # fmt: skip


def main() -> None:
    folder, engine = Path(sys.argv[1]), sys.argv[2]
    if engine == "FSDP2":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    output.plot_curves = lambda *what: None
    seen = {}
    train(parse_config(options(folder / "whole", *RUN)), quiet=True)

    original = output.Window.add

    def add(self: output.Window, *what: object) -> None:
        original(self, *what)
        if process_index() == 1 and self.pairs:
            output.Window.add = original
            os.kill(os.getpid(), signal.SIGTERM)

    output.Window.add = add
    try:
        train(parse_config(options(folder / "stopped", *RUN)), quiet=True)
    except Stopped as stopped:
        seen["stopped"] = str(stopped)
    output.Window.add = original
    train(parse_config(options(folder / "stopped", *RUN, "--resume", "auto")), quiet=True)

    score = training.train.score

    def score_and_stop(*what: Any, **how: Any) -> Any:
        if how["stop_requested"] is not None and process_index() == 1 and list((folder / "broken_off").glob("ch*-2")):
            os.kill(os.getpid(), signal.SIGTERM)
        return score(*what, **how)

    training.train.score = score_and_stop
    try:
        train(parse_config(options(folder / "broken_off", *RUN)), quiet=True)
    except Stopped as stopped:
        seen["broken_off"] = str(stopped)
    training.train.score = score
    train(parse_config(options(folder / "broken_off", *RUN, "--resume", "auto")), quiet=True)

    resume = ["--resume", str(folder / "one" / "checkpoint-2")]
    train(parse_config(options(folder / "continued", *RUN, *resume)), quiet=True)

    write = checkpoint.save_file

    def full(*what: object) -> None:
        raise OSError("no space in the first process")

    checkpoint.save_file = full
    train(parse_config(options(folder / "full", *RUN, "--keep_best", "false")), quiet=True)
    checkpoint.save_file = write
    checkpoint._publish, publish = full, checkpoint._publish
    try:
        train(parse_config(options(folder / "fuller", *RUN, "--keep_best", "false")), quiet=True)
    except SaveError as error:
        seen["full"] = str(error)
    checkpoint._publish = publish
    (folder / f"{process_index()}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main()
    end_processes(0)

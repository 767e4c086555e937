"""Keep real gloo processes running while a test module sends them one function after another."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

TIMEOUT = datetime.timedelta(seconds=60)
_CONTEXT = multiprocessing.get_context("forkserver")
# Imports take seconds, a fork milliseconds.
_CONTEXT.set_forkserver_preload(["rank_pool", "split_checks", "exchange_checks", "engine_checks"])


class RankPool:
    """A pool of ``size`` ranks. ``run`` calls a module's function on all ranks and returns their results."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        size, self._broken = self.size, False
        self._folder = tempfile.TemporaryDirectory()
        pairs = [_CONTEXT.Pipe() for _ in range(size)]
        self._pipes = [ours for ours, _ in pairs]
        self._processes = [
            _CONTEXT.Process(target=_serve, args=(rank, size, self._folder.name, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pairs)
        ]
        for process in self._processes:
            with _import_path():
                process.start()

    def run(self, function: Callable[..., Any], *args: Any, **options: Any) -> list[Any]:
        if self._broken:  # the ranks may wait for different things
            self.close()
            self._start()
        self._broken = True
        for pipe in self._pipes:
            pipe.send((function, args, options))
        answers = []
        for rank, pipe in enumerate(self._pipes):
            assert pipe.poll(TIMEOUT.total_seconds() + 30), f"rank {rank} hangs"
            answers.append(pipe.recv())
        errors = [f"rank {rank}:\n{error}" for rank, (error, _) in enumerate(answers) if error]
        assert not errors, "\n".join(errors)
        self._broken = False
        return [answer for _, answer in answers]

    def close(self) -> None:
        for pipe, process in zip(self._pipes, self._processes):
            pipe.close()
            process.join(0 if self._broken else 5)
            process.kill()
        self._folder.cleanup()


def ranks(size: int) -> Any:
    """Return a fixture: a pool of ``size`` ranks that the tests of a module share."""

    @pytest.fixture(scope="module")
    def pool() -> Iterator[RankPool]:
        pool = RankPool(size)
        yield pool
        pool.close()

    return pool


@contextlib.contextmanager
def _import_path() -> Iterator[None]:
    """Let the fork server, which the first process starts, find the modules to import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _serve(rank: int, size: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        while True:
            function, args, options = pipe.recv()
            try:
                answer = (None, function(*args, **options))
            except Exception:
                answer = (traceback.format_exc(), None)
            pipe.send(answer)
    except (EOFError, OSError):
        os._exit(0)

"""Checkpoints that are complete or absent.

``Trainer`` writes model, optimizer, schedule and random states into a temporary folder. ``manifest.json`` is added with
size and SHA-256 of every file, and the folder is renamed to ``checkpoint-STEP``. A checkpoint that was cut off, or
corrupted later, is recognised and named.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError

from .engine import gathered, process_count, process_index, raise_on_all_ranks
from .errors import SaveError

FORMAT = 3
MANIFEST, STATE = "manifest.json", "state.json"


class DamagedError(ValueError):
    """A checkpoint is not as it was written; the message names the file and the difference."""


# ---- writing ----


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to, and rename it to ``folder`` at the end. All ranks call this.

    Raises SaveError on all ranks, and removes the temporary folder, if writing fails.
    """
    around, first = folder.with_name(f"{folder.name}.partial"), process_index() == 0
    partial = around / folder.name
    try:
        with raise_on_all_ranks():
            if first:
                shutil.rmtree(around, ignore_errors=True)
                partial.mkdir(parents=True)
        yield partial
        with raise_on_all_ranks():
            if first:
                publish(partial, folder)
    except (OSError, SafetensorError, RuntimeError) as error:  # RuntimeError: SaveError, or torch.save on a full disk
        raise SaveError(f"{folder} could not be written: {error}") from error
    finally:
        if first:
            shutil.rmtree(around, ignore_errors=True)


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """Yield a temporary file to write to, and rename it to ``file`` at the end. ``file`` is never incomplete.

    The temporary file's name contains the process id. Files that killed processes left behind are removed.
    """
    for left in file.parent.glob(f"{glob.escape(file.name)}.*.tmp"):
        writer = left.suffixes[-2][1:]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            left.unlink(missing_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        yield partial
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, folder: Path) -> None:
    """Rename ``partial`` to ``folder`` once every byte of it is on the disk."""
    for file in [*partial.rglob("*"), partial]:
        _sync(file)
    # An earlier best model, or a checkpoint from before the run was resumed. ``whole_folder`` deletes it.
    if folder.exists():
        os.replace(folder, partial.with_name("earlier"))
    os.replace(partial, folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(path: Path, write: Callable[[Path], None], state: dict[str, Any]) -> int:
    """Write the checkpoint ``path``: the files that ``write`` puts into a folder of its name, and ``state`` (JSON).

    ``write`` takes the parent of that folder, as Trainer does. All ranks call this. Returns the bytes written. Raises
    SaveError on all ranks, and leaves nothing behind then.
    """
    first = process_index() == 0
    with whole_folder(path) as partial:
        with raise_on_all_ranks():
            write(partial.parent)
            if first:
                (partial / STATE).write_text(json.dumps(state), encoding="utf-8")
        with raise_on_all_ranks():
            share = _measure_share(partial)  # hashing takes as long as writing: each rank reads a part
        files = {name: entry for part in gathered(share) for name, entry in part.items()}
        with raise_on_all_ranks():
            if first:
                (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
    return sum(entry["bytes"] for entry in files.values())


def _measure_share(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): _measure(file) for file in files[process_index() :: process_count()]}


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


# ---- finding ----


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Compare every byte of a checkpoint with its manifest, and return its run state. Raises DamagedError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None
    if manifest["format"] != FORMAT:
        raise DamagedError(f"{MANIFEST} is not of format {FORMAT}")
    for name, written in manifest["files"].items():
        try:
            found = _measure(path / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
        if found != written:
            sizes = f"has {found['bytes']} bytes, {written['bytes']} were written"
            problem = sizes if found["bytes"] != written["bytes"] else "is not what was written (SHA-256)"
            raise DamagedError(f"{name} {problem}")
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    number = path.name.removeprefix("checkpoint-")
    if number.isdecimal() and int(number) != state["step"]:
        raise DamagedError(f"its name says step {number}, but it is of step {state['step']}")
    return state


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the folders ``checkpoint-STEP`` in ``folder`` by step, ascending."""
    found = {p.name.removeprefix("checkpoint-"): p for p in folder.glob("checkpoint-*") if p.is_dir()}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def rotate(folder: Path, keep: int | None) -> None:
    """Delete the oldest checkpoints until ``keep`` are left (None: keep all). Ignore copies under other names."""
    for old in list(checkpoints(folder).values())[:-keep] if keep else []:
        shutil.rmtree(old, ignore_errors=True)

"""Checkpoints that are whole or not there.

``Trainer`` writes model, optimizer, schedule and random states into a folder beside the place where they belong. Then
``manifest.json`` is added with size and SHA-256 of every file, and the folder is renamed to ``checkpoint-STEP``. So a
checkpoint that was cut off, or corrupted since, is known and named.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from .engine import gathered, process_count, process_index
from .errors import SaveError

Value = TypeVar("Value")
FORMAT = 3
MANIFEST, STATE = "manifest.json", "state.json"
# What a checkpoint cannot be without, each under the names that the engines give it.
NEEDED = {
    "model": ("model.safetensors", "pytorch_model_fsdp", "global_step"),
    "optimizer state": ("optimizer", "global_step"),
    "learning-rate schedule": ("scheduler.pt", "global_step"),
    "trainer state": ("trainer_state.json",),
    "run state": (STATE,),
}


class DamagedError(ValueError):
    """A checkpoint is not as it was written; the message says which file, and how it differs."""


# ---- writing ----


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write to, renamed to ``folder`` at the end: a folder of that name is whole.

    Where writing fails, the temporary folder is removed and SaveError raised.
    """
    partial = partial_folder(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        publish(partial, folder)
    except (OSError, SafetensorError) as error:
        raise SaveError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def publish(partial: Path, folder: Path) -> None:
    """Give ``partial`` the name ``folder`` once every byte of it is on the disk."""
    for file in [*partial.rglob("*"), partial]:
        _sync(file)
    if folder.exists():  # of this step, from before the run was taken back to an earlier one
        shutil.rmtree(folder)
    os.replace(partial, folder)
    _sync(folder.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(path: Path, write: Callable[[Path], None], state: dict[str, Any]) -> int:
    """Write the checkpoint ``path``: what ``write`` puts into a folder of its name, and ``state`` (JSON types).

    ``write`` takes the folder around it, as Trainer does. All processes call this. Returns the bytes written. Raises
    SaveError on all of them, and leaves nothing behind then.
    """
    around = partial_folder(path)
    partial = around / path.name

    def begin() -> None:
        shutil.rmtree(around, ignore_errors=True)
        partial.mkdir(parents=True)

    def seal() -> None:
        files = {name: entry for part in shares for name, entry in part.items()}
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "files": files}, indent=1), encoding="utf-8")
        publish(partial, path)

    try:
        on_first_process(begin)
        _on_all(lambda: write(around))
        on_first_process(lambda: (partial / STATE).write_text(json.dumps(state), encoding="utf-8"))
        shares = _on_all(lambda: _measure_share(partial))  # hashing takes as long as writing: each reads a part
        on_first_process(seal)
    except SaveError as error:
        raise SaveError(f"{path} could not be written: {error}") from error
    finally:
        if process_index() == 0:
            shutil.rmtree(around, ignore_errors=True)
    return sum(entry["bytes"] for part in shares for entry in part.values())


def _on_all(act: Callable[[], Value]) -> list[Value]:
    """Return what ``act`` returns in each process; where it fails in one, raise SaveError in all of them."""
    failure = value = None
    try:
        value = act()
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        failure = str(error) or type(error).__name__
    results = gathered((failure, value))
    for failed, _ in results:
        if failed is not None:
            raise SaveError(failed)
    return [value for _, value in results]  # type: ignore[misc]


def on_first_process(act: Callable[[], object]) -> None:
    """Call ``act`` in the first process; where that fails, raise SaveError in all of them."""
    _on_all(lambda: None if process_index() else act() and None)


def _measure_share(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): _measure(file) for file in files[process_index() :: process_count()]}


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


# ---- finding ----


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Return the run state of a checkpoint after comparing every byte with the manifest. Raises DamagedError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        kind, files = manifest["format"], manifest.get("files", {})
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None
    if kind != FORMAT:
        raise DamagedError(f"{MANIFEST} is not of format {FORMAT}")
    for what, names in NEEDED.items():
        if not any(name.startswith(names) for name in files):
            raise DamagedError(f"it has no {what}")
    for name, written in files.items():
        try:
            found = _measure(path / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
        if found["bytes"] != written["bytes"]:
            raise DamagedError(f"{name} has {found['bytes']} bytes, {written['bytes']} were written")
        if found != written:
            raise DamagedError(f"{name} is not what was written (SHA-256)")
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the folders ``checkpoint-STEP`` in ``folder`` by step, ascending."""
    found = {p.name.removeprefix("checkpoint-"): p for p in folder.glob("checkpoint-*") if p.is_dir()}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


# ---- deleting ----


def rotate(folder: Path, step: int, keep: int | None, log: Callable[[str], None]) -> None:
    """Delete the oldest checkpoints so that ``keep`` are left (None: all), the one of ``step`` being the newest."""
    older = [path for number, path in checkpoints(folder).items() if number <= step]
    for old in older[:-keep] if keep else []:
        try:
            os.replace(old, partial_folder(old))  # what is half deleted must not look like a checkpoint
            shutil.rmtree(partial_folder(old))
        except OSError as error:
            log(f"WARNING: the old {old} could not be deleted: {error}")

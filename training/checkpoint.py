"""Checkpoints that are complete or absent, and the check that one belongs to the run that resumes from it.

``Trainer`` writes model, optimizer, schedule and random states into a temporary folder. ``manifest.json`` is added with
size and SHA-256 of every file, and the folder is renamed to ``checkpoint-STEP``. A checkpoint that was cut off, or
corrupted later, is recognised and named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import filterfalse
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from .config import TrainConfig
from .engine import gathered, process_count, process_index, raise_on_all_ranks
from .errors import InputError, Log, SaveError

FORMAT = 3
MANIFEST, STATE = "manifest.json", "state.json"
# Prefixes of the options that a resumed run may change. They affect logs, files, the run's length, or only rounding.
# The paths of data and model may change, too, because their contents are compared.
_MAY_CHANGE = (
    "logging_ log_level eval_ sample_ report_to run_name project trackio_space_id output_dir save_ keep_best resume_ "
    "reference_cache push_to_hub hub_ dry_run train_data max_steps num_train_epochs per_device_ use_cpu ddp_ layout "
    "gradient_accumulation_steps max_batch_tokens attn_implementation activation_checkpointing disable_tqdm"
).split()


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
def whole_file(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary file to write to, and rename it to ``file`` at the end. ``file`` is never incomplete.

    With ``shared``, several processes may write ``file``.
    """
    partial = file.with_name(f"{file.name}{f'.{os.getpid()}' if shared else ''}.tmp")
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
            problem = sizes if found["bytes"] != written["bytes"] else "differs from what was written (SHA-256)"
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


# ---- resuming ----


def may_change(option: str) -> bool:
    """Return whether a resumed run may change ``option``."""
    return option.startswith(tuple(_MAY_CHANGE))


class Resumed(NamedTuple):
    """The checkpoint from which a run resumes, with the state of that run."""

    path: Path
    state: dict[str, Any]


def newest_valid(folder: Path, log: Log) -> Resumed | None:
    """Return the newest complete checkpoint and log newer ones that are damaged; None if there is no checkpoint.

    Raises InputError if all are damaged: only the user can decide to start again.
    """
    paths = checkpoints(folder)
    for path in reversed(paths.values()):
        try:
            return Resumed(path, check_checkpoint(path))
        except DamagedError as error:
            log(f"WARNING: {path} is damaged: {error}; trying the one before it")
    if paths:
        raise InputError(f"every checkpoint in {folder} is damaged; to begin anew, delete them or use another folder")
    return None


def find_checkpoint(folder: Path, config: TrainConfig, log: Log) -> Resumed | None:
    """Return the checkpoint from which to resume; None if the run starts at step 1.

    Raises InputError if another run in ``folder`` would be lost, the checkpoint is damaged, or its settings differ.
    """
    wanted, found = config.resume_from_checkpoint, None
    if wanted == "auto":
        found = newest_valid(folder, log)
    elif wanted:
        try:
            found = Resumed(Path(wanted), check_checkpoint(Path(wanted)))
        except DamagedError as error:
            raise InputError(
                f"--resume_from_checkpoint {wanted} is damaged, or no checkpoint: {error}; give another, or 'auto'"
            ) from None
    kept, finished = list(checkpoints(folder).values()), (folder / "final").exists()
    if (kept or finished) and (found is None or (wanted != "auto" and found.path.resolve().parent != folder.resolve())):
        raise InputError(
            f"output_dir {folder} holds {'a finished run' if finished else f'an unfinished run with {kept[-1].name}'}; "
            "continue it with --resume_from_checkpoint auto (and more max_steps or num_train_epochs if it is "
            "finished), or choose another output_dir"
        )
    if found is not None:
        changed = _changed_settings(found.state["settings"], config)
        _refuse(changed, found.path, config, log)
        if other := [text for text in changed if text.startswith("optim was ")]:
            raise InputError(
                f"{found.path} holds the state of another optimizer ({other[0]}), which is of no use here; resume with "
                "the old one, or start a new run in another output_dir"
            )
    return found


def settings_to_keep(config: TrainConfig) -> dict[str, Any]:
    """Return the settings with which a resumed run is compared."""
    return json.loads(json.dumps({**config.settings(), "pairs in a step": config.pairs_per_step}))


def _changed_settings(then: dict[str, Any], config: TrainConfig) -> list[str]:
    now, defaults = settings_to_keep(config), {field.name: field.default for field in dataclasses.fields(config)}
    changed = []
    for name in filterfalse(may_change, {**now, **then}):
        old, new = (settings.get(name, defaults.get(name)) for settings in (then, now))
        moved = name == "model" and isinstance(old, str) and isinstance(new, str)  # compared by what it holds
        if old != new and not moved:
            changed.append(f"{name} was {old!r}, is {new!r}")
    return sorted(changed)


def check_resumed(found: Resumed, inputs: dict[str, str], total_steps: int, config: TrainConfig, log: Log) -> None:
    """Raise InputError if the digests ``inputs`` of model or data have changed, or no step is left to train."""
    path, state = found
    changed = [f"{name} holds something else" for name in inputs if inputs[name] != state["inputs"][name]]
    _refuse(changed, path, config, log)
    if state["step"] > total_steps:
        raise InputError(f"{path} is of step {state['step']}, but the run has {total_steps} steps")
    if state["step"] == total_steps and config.folder and (config.folder / "final").exists():
        raise InputError(
            f"output_dir {config.folder} holds a finished run of {total_steps} steps; raise max_steps or "
            "num_train_epochs to go on, or choose another output_dir"
        )


def _refuse(differences: list[str], path: Path, config: TrainConfig, log: Log) -> None:
    if differences and not config.resume_changed:
        raise InputError(
            f"{path} belongs to a run with other settings ({'; '.join(differences)}); resume with the old settings, "
            "start a new run in another output_dir, or mix them knowingly with --resume_changed true"
        )
    if differences:
        log(f"WARNING: {path} is resumed with other settings: {'; '.join(differences)}")


def resume_hint(folder: Path | None, *, changed: bool = False) -> str:
    """Tell the user how to resume an interrupted run, or with ``changed`` how to resume it with other settings."""
    kept = list(checkpoints(folder).values()) if folder else []
    if not kept:
        return "no checkpoint was kept"
    other = ", with other settings if --resume_changed true is given" if changed else ""
    return f"{kept[-1]} is kept: --resume_from_checkpoint auto continues from it{other}"


def discard_later_checkpoints(folder: Path, step: int, log: Log) -> None:
    """Delete incomplete saves, and rename checkpoints after ``step`` so that the new run cannot mistake them."""
    for partial in folder.glob("*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    for number, path in checkpoints(folder).items():
        if number > step:
            aside = path.with_name(f"set-aside-{path.name}")  # this name no longer counts as a checkpoint
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            log(f"the run goes on after step {step}: {path.name} is renamed to {aside.name}, and may be deleted")

"""Checkpoints that are whole or not there, and which of them a run goes on from.

``Trainer`` writes model, optimizer, schedule and random states into a folder beside the place where they belong. Then
``manifest.json`` is added with size and SHA-256 of every file, and the folder is renamed to ``checkpoint-STEP``. So a
checkpoint that was cut off, or corrupted since, is known and named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError

from .config import TrainConfig
from .engine import gathered, process_count, process_index
from .errors import InputError, SaveError

FORMAT = 2
MANIFEST, STATE = "manifest.json", "state.json"
# What a checkpoint cannot be without, each under the names that the engines give it.
NEEDED = {
    "model": ("model.safetensors", "pytorch_model_fsdp", "global_step"),
    "optimizer state": ("optimizer", "global_step"),
    "learning-rate schedule": ("scheduler.pt", "global_step"),
    "trainer state": ("trainer_state.json",),
    "run state": (STATE,),
}
# Options that a resumed run may change: they decide what is shown and kept, how far the run goes, or change no more
# than rounding. Whether data and a model's files are the same, wherever they are now, is seen by what they hold.
MAY_CHANGE = {
    "output_dir", "resume_from_checkpoint", "resume_changed", "logging_steps", "logging_strategy",
    "logging_first_step", "eval_steps", "eval_strategy", "eval_delay", "save_steps", "save_strategy",
    "save_total_limit", "keep_best", "report_to", "run_name", "project", "sample_prompts", "sample_tokens",
    "reference_cache", "max_batch_tokens", "activation_checkpointing", "activation_checkpointing_kwargs", "layout",
    "attn_implementation", "train_data", "eval_data", "dry_run", "max_steps", "num_train_epochs", "use_cpu",
    "per_device_train_batch_size", "gradient_accumulation_steps", "ddp_timeout", "push_to_hub", "hub_model_id",
    "log_level", "disable_tqdm", "data_workers", "do_eval",
}  # fmt: skip


class DamagedError(ValueError):
    """A checkpoint is not as it was written; the message says which file, and how it differs."""


class Resumed(NamedTuple):
    """The checkpoint that a run goes on from, with its run state."""

    path: Path
    state: dict[str, Any]


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
    for file in partial.rglob("*"):
        _sync(file)
    _sync(partial)
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


def save_checkpoint(path: Path, write: Callable[[Path], None], state: dict[str, Any], texts: dict[str, str]) -> int:
    """Write the checkpoint ``path``: what ``write`` puts into a folder, ``state`` (JSON types) and ``texts``.

    All processes call it. Returns the bytes written. Raises SaveError on all of them, and leaves nothing behind then.
    """
    partial, mine, files = partial_folder(path), {}, {}  # type: ignore[var-annotated]

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    def finish() -> None:
        inner = partial / path.name  # where Trainer writes: a folder of that name in the one it is given
        for file in list(inner.iterdir()) if inner.is_dir() else []:
            file.rename(partial / file.name)
        shutil.rmtree(inner, ignore_errors=True)
        for name, content in {STATE: json.dumps(state), **texts}.items():
            (partial / name).write_text(content, encoding="utf-8")

    def measure() -> None:
        mine.update(_measure_share(partial))  # each process reads its share back: hashing takes as long as writing

    def seal() -> None:
        manifest = {"format": FORMAT, "files": files}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        publish(partial, path)

    try:
        _on_all(lambda: begin() if process_index() == 0 else None)
        _on_all(lambda: write(partial))
        _on_all(lambda: finish() if process_index() == 0 else None)
        _on_all(measure)
        files.update({name: entry for part in gathered(mine) for name, entry in part.items()})
        _on_all(lambda: seal() if process_index() == 0 else None)
    except SaveError as error:
        raise SaveError(f"{path} could not be written: {error}") from error
    finally:
        if process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return sum(entry["bytes"] for entry in files.values())


def _on_all(act: Callable[[], None]) -> None:
    """Call ``act``; where it fails in one process, raise SaveError in all of them."""
    failure = None
    try:
        act()
    except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        failure = str(error) or type(error).__name__
    for failed in gathered(failure):
        if failed is not None:
            raise SaveError(failed)


def on_first_process(act: Callable[[], None]) -> None:
    """Call ``act`` in the first process; where that fails, raise SaveError in all of them."""
    _on_all(lambda: act() if process_index() == 0 else None)


def _measure_share(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): _measure(file) for file in files[process_index() :: process_count()]}


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def check_checkpoint(path: Path) -> dict[str, Any]:
    """Return the run state of a checkpoint after comparing every byte with the manifest. Raises DamagedError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} is not of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise DamagedError(f"{MANIFEST} names no files")
    for what, names in NEEDED.items():
        if not any(name.startswith(names) for name in files):
            raise DamagedError(f"it has no {what}")
    for name, expected in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise DamagedError(f"{MANIFEST} names a file outside the checkpoint ({name})")
        try:
            size = (path / name).stat().st_size
            if size != expected["bytes"]:
                raise DamagedError(f"{name} has {size} bytes, {expected['bytes']} were written")
            if _measure(path / name) != expected:
                raise DamagedError(f"{name} is not what was written (SHA-256)")
        except FileNotFoundError:
            raise DamagedError(f"{name} is missing") from None
        except (OSError, KeyError, TypeError) as error:
            raise DamagedError(f"{name} cannot be checked ({error})") from None
    return json.loads((path / STATE).read_text(encoding="utf-8"))


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the folders ``checkpoint-STEP`` in ``folder`` by step, ascending."""
    found = {p.name.removeprefix("checkpoint-"): p for p in folder.glob("checkpoint-*") if p.is_dir()}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def newest_valid(folder: Path, log: Callable[[str], None]) -> Resumed | None:
    """Return the newest whole checkpoint; say which newer ones are corrupted. None where there is none at all.

    Raises InputError where all are corrupted: to begin anew is for the user to decide.
    """
    paths = checkpoints(folder)
    for path in reversed(paths.values()):
        try:
            return Resumed(path, check_checkpoint(path))
        except DamagedError as error:
            log(f"WARNING: {path} is damaged: {error}; trying the one before it")
    if paths:
        raise InputError(
            f"every checkpoint in {folder} is damaged; to begin anew, delete them or choose another folder"
        )
    return None


def find_checkpoint(folder: Path, config: TrainConfig, log: Callable[[str], None]) -> Resumed | None:
    """Return the checkpoint to go on from; None where the run begins anew.

    Raises InputError for a folder in which another run would be lost, a checkpoint that is damaged, and settings other
    than the run's.
    """
    wanted = config.resume_from_checkpoint
    found = None
    if wanted == "auto":
        found = newest_valid(folder, log)
    elif wanted:
        found = Resumed(Path(wanted), _named_checkpoint(Path(wanted)))
    own = wanted == "auto" or (found is not None and found.path.resolve().parent == folder.resolve())
    if (folder / "final").exists() and (found is None or not own):
        raise InputError(
            f"output_dir {folder} holds a finished run; choose another one, or give it more steps with "
            "--resume_from_checkpoint auto and a larger max_steps or num_train_epochs"
        )
    if checkpoints(folder) and not own:
        newest = list(checkpoints(folder).values())[-1].name
        raise InputError(
            f"output_dir {folder} holds an unfinished run with {newest}; continue it with --resume_from_checkpoint "
            "auto, or choose another output_dir"
        )
    if found is not None:
        then, now = found.state["settings"], settings_to_keep(config)
        defaults = {field.name: field.default for field in dataclasses.fields(config)}
        pairs = {n: [some.get(n, defaults.get(n)) for some in (then, now)] for n in {**now, **then}}
        if isinstance(then["model"], str) and isinstance(now["model"], str):
            del pairs["model"]
        changed = {name: values for name, values in pairs.items() if values[0] != values[1] and name not in MAY_CHANGE}
        _refuse([f"{name} was {old!r}, is {new!r}" for name, (old, new) in changed.items()], found.path, config, log)
    return found


def settings_to_keep(config: TrainConfig) -> dict[str, Any]:
    """The settings by which a resumed run is compared with the one it goes on from."""
    return json.loads(json.dumps({**config.settings(), "pairs in a step": config.pairs_per_step}))


def _named_checkpoint(path: Path) -> dict[str, Any]:
    if not (path / STATE).is_file() and not (path / MANIFEST).is_file():
        raise InputError(f"--resume_from_checkpoint {path}: no checkpoint there; give a checkpoint-* folder or 'auto'")
    try:
        return check_checkpoint(path)
    except DamagedError as error:
        raise InputError(
            f"--resume_from_checkpoint {path}: damaged: {error}; give an earlier checkpoint, or 'auto'"
        ) from None


def check_resumed(
    found: Resumed, inputs: dict[str, str], total_steps: int, config: TrainConfig, log: Callable[[str], None]
) -> None:
    """Raise InputError where model or data, by their digests, are not those that the checkpoint's run began with, and
    where it is beyond the last step.
    """
    path, state = found
    _refuse(
        [f"{name} holds something else" for name in inputs if inputs[name] != state["inputs"][name]], path, config, log
    )
    if state["step"] > total_steps:
        raise InputError(f"{path} is of step {state['step']}, but the run has {total_steps} steps")
    if state["step"] == total_steps and config.folder and (config.folder / "final").exists():
        raise InputError(
            f"output_dir {config.folder} holds a finished run of {total_steps} steps; raise max_steps or "
            "num_train_epochs to go on, or choose another output_dir"
        )


def _refuse(differences: list[str], path: Path, config: TrainConfig, log: Callable[[str], None]) -> None:
    if differences and not config.resume_changed:
        raise InputError(
            f"{path} belongs to a run with other settings ({'; '.join(differences)}); resume with the old ones, start "
            "a new run in another output_dir, or mix them knowingly with --resume_changed true"
        )
    if differences:
        log(f"WARNING: {path} is resumed with other settings: {'; '.join(differences)}")


def resume_hint(folder: Path | None) -> str:
    """Tell the user how to resume a run that ends before its time."""
    kept = list(checkpoints(folder).values()) if folder else []
    if not kept:
        return "no checkpoint was kept"
    return f"{kept[-1]} is kept: --resume_from_checkpoint auto goes on from it"


def rotate(folder: Path, step: int, keep: int | None, log: Callable[[str], None]) -> None:
    """Delete the oldest checkpoints so that ``keep`` are left (None: all), the one of ``step`` being the newest."""
    older = [path for number, path in checkpoints(folder).items() if number <= step]
    for old in older[:-keep] if keep else []:
        try:
            os.replace(old, partial_folder(old))  # what is half deleted must not look like a checkpoint
            shutil.rmtree(partial_folder(old))
        except OSError as error:
            log(f"WARNING: the old {old} could not be deleted: {error}")


def discard_later_checkpoints(folder: Path, step: int, log: Callable[[str], None]) -> None:
    """Remove what an interrupted save has left, and rename checkpoints later than ``step``: none is taken for the new
    run's.
    """
    for partial in folder.glob("*.partial"):
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
    for number, path in checkpoints(folder).items():
        if number > step:
            aside = path.with_name(f"{path.name}.set-aside")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
            log(f"the run goes on after step {step}: {path.name} is renamed to {aside.name}, and may be deleted")

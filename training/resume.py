"""The checkpoint from which a run resumes, and the check that it belongs to the same run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from itertools import filterfalse
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import MANIFEST, STATE, DamagedError, check_checkpoint, checkpoints
from .config import TrainConfig
from .errors import InputError, Log

# Prefixes of the options that a resumed run may change. They affect logs, files, the run's length, or only rounding.
# The paths of data and model may change, too, because their contents are compared.
_MAY_CHANGE = (
    "logging_ log_level eval_ sample_ report_to run_name project trackio_space_id output_dir save_ keep_best resume_ "
    "reference_cache push_to_hub hub_ dry_run train_data max_steps num_train_epochs per_device_ use_cpu ddp_ layout "
    "gradient_accumulation_steps max_batch_tokens attn_implementation activation_checkpointing disable_tqdm"
).split()


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
        raise InputError(
            f"every checkpoint in {folder} is damaged; to begin anew, delete them or choose another folder"
        )
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
            there = any((Path(wanted) / name).exists() for name in (STATE, MANIFEST))
            problem = f"damaged: {error}" if there else "no checkpoint there"
            raise InputError(
                f"--resume_from_checkpoint {wanted}: {problem}; give another checkpoint-* folder, or 'auto'"
            ) from None
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
            f"{path} belongs to a run with other settings ({'; '.join(differences)}); resume with the old ones, start "
            "a new run in another output_dir, or mix them knowingly with --resume_changed true"
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

"""Checkpoints: whole or not there, read without pickle, written and read by any number of processes.

A checkpoint is a folder ``checkpoint-STEP`` of safetensors and JSON. ``manifest.json`` is written last and holds size
and SHA-256 of every other file, so that a checkpoint that was cut off, or damaged since, is known and named. What is
gathered from the processes is the unsharded state: one process, DDP and FSDP2 read each other's checkpoints.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .config import InputError, TrainConfig
from .data import Pair
from .engine import from_first_process, process_count, process_index

FORMAT = 1
MANIFEST, MODEL, OPTIMIZER, STATE, RANDOM = (
    "manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "random.json",
)  # fmt: skip
# Options that a resumed run may change: they decide what is shown and kept, or change no more than rounding. Whether
# data and a model's files are the same, wherever they are now, is seen by what they hold.
MAY_CHANGE = {
    "output_dir", "resume", "resume_changed", "log_every", "eval_every", "save_every", "save_total", "keep_best",
    "report_to", "sample_prompts", "sample_tokens", "reference_cache", "max_batch_tokens", "gradient_checkpointing",
    "layout", "attn_implementation", "train_data", "eval_data", "dry_run",
}  # fmt: skip
# The first process gathers whole tensors, in CPU memory; the others get none.
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
_WHOLE = StateDictOptions(full_state_dict=True, strict=False)


class SaveError(RuntimeError):
    """A folder could not be written, for want of space for instance; what was there before is untouched."""


class DamagedError(ValueError):
    """A checkpoint is not as it was written; the message says which file, and how it differs."""


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, renamed to ``folder`` at the end: one of that name is whole, and on the disk.

    Where writing fails, the temporary folder is removed and SaveError raised.
    """
    partial = partial_folder(folder)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        _publish(partial, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise SaveError(f"{folder} could not be written: {error}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def partial_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _publish(partial: Path, folder: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
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


def save_checkpoint(
    folder: Path, step: int, module: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any],
    texts: dict[str, str],
) -> Path:  # fmt: skip
    """Writes ``folder/checkpoint-STEP``: trained parameters, buffers, optimizer state, random states, state and texts.

    ``module`` and ``optimizer`` are the ones inside the engine's wrappers. ``state`` holds JSON types, ``texts`` file
    names with what they contain. All processes call it; the main one writes. Raises SaveError on all of them, and then
    leaves nothing behind.
    """
    path = folder / f"checkpoint-{step}"
    partial = partial_folder(path)

    def write_rest() -> None:
        for name, content in {STATE: json.dumps(state), RANDOM: json.dumps(random_states), **texts}.items():
            (partial / name).write_text(content, encoding="utf-8")
        files = {file.name: _measure(file) for file in sorted(partial.iterdir())}
        (partial / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1))
        _publish(partial, path)

    random_states: list[Any] = [random_state()]
    if process_count() > 1:
        gathered: list[Any] = [None] * process_count()
        dist.all_gather_object(gathered, random_states[0])
        random_states = gathered
    try:
        in_first_process(lambda: _begin(partial))
        for name, gather in ((MODEL, _trained_tensors), (OPTIMIZER, _optimizer_tensors)):
            tensors = gather(module, optimizer)  # one after the other: together they need twice the memory
            in_first_process(functools.partial(save_file, tensors, partial / name))
        in_first_process(write_rest)
    except SaveError as error:
        raise SaveError(f"{path} could not be written: {error}") from error
    finally:
        if process_index() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    return path


def _begin(partial: Path) -> None:
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def in_first_process(write: Callable[[], None]) -> None:
    """Calls ``write`` in the first process; where that fails, all processes raise SaveError."""
    failure = None
    if process_index() == 0:
        try:
            write()
        except (OSError, SafetensorError, SaveError) as error:
            failure = str(error) or type(error).__name__
    if (failure := from_first_process(failure)) is not None:
        raise SaveError(failure)


def _trained_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Trained parameters and buffers; a tied parameter once, under its first name."""
    gathered = get_model_state_dict(module, options=_GATHERED)
    found = {name: gathered.get(name) for name in _saved_names(module)}
    return {name: tensor.contiguous() for name, tensor in found.items() if isinstance(tensor, Tensor)}


def _saved_names(module: nn.Module) -> list[str]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    return trained + [name for name in module.state_dict() if name not in parameters]


def _optimizer_tensors(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State of each parameter as NAME_OF_STATE.NAME_OF_PARAMETER. Rates and the like follow from the run's settings."""
    gathered: dict[str, Any] = get_optimizer_state_dict(module, optimizer, options=_GATHERED)
    return {
        f"{key}.{name}": value.contiguous()
        for name, entries in gathered.get("state", {}).items()
        for key, value in entries.items()
    }


def load_checkpoint(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, log: Callable[[str], None]
) -> dict[str, str]:
    """Puts the checkpoint ``path`` into module, optimizer and random generators; returns its texts.

    ``check_checkpoint`` has found it whole. All processes read it. Raises InputError where it does not fit the model.
    """
    tensors, entries = _read_tensors(path / MODEL), _read_tensors(path / OPTIMIZER)
    expected = {name: tuple(module.state_dict()[name].shape) for name in _saved_names(module)}
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if found != expected:
        names = [name for name in {**expected, **found} if found.get(name) != expected.get(name)]
        details = [f"{n}: {found.get(n, 'nothing')} there, {expected.get(n, 'nothing')} here" for n in names[:3]]
        raise InputError(
            f"{path} does not fit the model, or what is trained of it: {len(names)} tensors differ "
            f"({'; '.join(details)})"
        )
    name_of = {id(parameter): name for name, parameter in module.named_parameters()}
    states: dict[str, Any] = {}
    for key, tensor in entries.items():
        state_name, _, name = key.partition(".")
        states.setdefault(name, {})[state_name] = tensor
    groups = [group | {"params": [name_of[id(p)] for p in group["params"]]} for group in optimizer.param_groups]
    set_optimizer_state_dict(module, optimizer, {"state": states, "param_groups": groups}, options=_WHOLE)
    set_model_state_dict(module, {**tensors}, options=_WHOLE)

    random_states = json.loads((path / RANDOM).read_text(encoding="utf-8"))
    if len(random_states) == process_count():
        set_random_state(random_states[process_index()])
    else:
        log(f"note: {path} was written by {len(random_states)} processes; their random states are not used")
    written = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    texts = set(written) - {MODEL, OPTIMIZER, STATE, RANDOM}
    return {name: (path / name).read_text(encoding="utf-8") for name in texts}


def _read_tensors(file: Path) -> dict[str, Tensor]:
    with safe_open(file, framework="pt") as tensors:
        return {name: tensors.get_tensor(name) for name in tensors.keys()}


def check_checkpoint(path: Path) -> dict[str, Any]:
    """The run state of a checkpoint, after every byte was compared with the manifest. Raises DamagedError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedError(f"{MANIFEST} is not of format {FORMAT}")
    files = manifest.get("files")
    if not isinstance(files, dict) or not {MODEL, OPTIMIZER, STATE, RANDOM} <= set(files):
        raise DamagedError(f"{MANIFEST} does not name all files")
    for name, expected in files.items():
        if Path(name).name != name:
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


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}


def checkpoints(folder: Path) -> dict[int, Path]:
    """The folders ``checkpoint-STEP`` in ``folder`` by step, ascending."""
    found = {p.name.removeprefix("checkpoint-"): p for p in folder.glob("checkpoint-*") if p.is_dir()}
    return {int(step): found[step] for step in sorted(filter(str.isdecimal, found), key=int)}


def newest_valid(folder: Path, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint with its state; says which newer ones are damaged. None where there is none at all.

    Raises InputError where all are damaged: to begin anew is for the user to decide.
    """
    paths = checkpoints(folder)
    for path in reversed(paths.values()):
        try:
            return path, check_checkpoint(path)
        except DamagedError as error:
            log(f"WARNING: {path} is damaged: {error}; trying the one before it")
    if paths:
        raise InputError(
            f"every checkpoint in {folder} is damaged; to begin anew, delete them or choose another folder"
        )
    return None


def find_checkpoint(
    folder: Path, config: TrainConfig, log: Callable[[str], None]
) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint to go on from, with its state; None where the run begins anew.

    Raises InputError for a folder in which another run would be lost, a checkpoint that is damaged, and settings other
    than the run's.
    """
    if (folder / "final").exists():
        raise InputError(f"output_dir {folder} holds a finished run; choose another one, or move or delete that folder")
    found = None
    if config.resume == "auto":
        found = newest_valid(folder, log)
    elif config.resume:
        found = Path(config.resume), _named_checkpoint(Path(config.resume))
    own = config.resume == "auto" or (found is not None and found[0].resolve().parent == folder.resolve())
    if checkpoints(folder) and not own:
        newest = list(checkpoints(folder).values())[-1].name
        raise InputError(
            f"output_dir {folder} holds an unfinished run with {newest}; continue it with --resume auto, or choose "
            "another output_dir"
        )
    if found is not None:
        path, state = found
        then, now = state["config"], asdict(config)
        names = [name for name in {**now, **then} if name not in MAY_CHANGE and now.get(name) != then.get(name)]
        if isinstance(then["model"], str) and isinstance(now["model"], str):
            names = [name for name in names if name != "model"]
        _refuse([f"{n} was {then.get(n)!r}, is {now.get(n)!r}" for n in names], path, config, log)
    return found


def _named_checkpoint(path: Path) -> dict[str, Any]:
    if not (path / STATE).is_file() and not (path / MANIFEST).is_file():
        raise InputError(f"--resume {path}: no checkpoint there; give a checkpoint-* folder or 'auto'")
    try:
        return check_checkpoint(path)
    except DamagedError as error:
        raise InputError(f"--resume {path}: damaged: {error}; give an earlier checkpoint, or 'auto'") from None


def check_resumed(
    path: Path, state: dict[str, Any], inputs: dict[str, str], total_steps: int, config: TrainConfig,
    log: Callable[[str], None],
) -> None:  # fmt: skip
    """Raises InputError where model or data, by their digests, are not those that the checkpoint's run began with, and
    where it is beyond the last step.
    """
    _refuse(
        [f"{name} holds something else" for name in inputs if inputs[name] != state["inputs"][name]], path, config, log
    )
    if state["step"] > total_steps:
        raise InputError(f"{path} is of step {state['step']}, but the run has {total_steps} steps")


def _refuse(differences: list[str], path: Path, config: TrainConfig, log: Callable[[str], None]) -> None:
    if differences and not config.resume_changed:
        raise InputError(
            f"{path} belongs to a run with other settings ({'; '.join(differences)}); resume with the old ones, start "
            "a new run in another output_dir, or mix them knowingly with --resume_changed true"
        )
    if differences:
        log(f"WARNING: {path} is resumed with other settings: {'; '.join(differences)}")


def way_on(folder: Path | None) -> str:
    """How a run that ends before its time is continued."""
    kept = list(checkpoints(folder).values()) if folder else []
    return f"{kept[-1]} is kept: --resume auto goes on from it" if kept else "no checkpoint was kept"


def digest_of(pairs: Sequence[Pair]) -> str:
    """Of token ids."""
    digest = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        digest.update(json.dumps([part for name, part in pair._asdict().items() if name != "origin"]).encode())
    return digest.hexdigest()


def rotate(folder: Path, step: int, keep: int, log: Callable[[str], None]) -> None:
    """Deletes the oldest checkpoints so that ``keep`` are left, the one of ``step`` being the newest."""
    for old in [path for number, path in checkpoints(folder).items() if number <= step][:-keep]:
        try:
            os.replace(old, partial_folder(old))  # what is half deleted must not look like a checkpoint
            shutil.rmtree(partial_folder(old))
        except OSError as error:
            log(f"WARNING: the old {old} could not be deleted: {error}")


def clear_for(folder: Path, step: int, log: Callable[[str], None]) -> None:
    """Makes way for a run that goes on after ``step``: removes what an interrupted save has left, and renames later
    checkpoints, so that none is taken for the new run's.
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


def random_state() -> dict[str, Any]:
    """Of Python, NumPy and torch in this process, as JSON types."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": [version, list(words), gauss],
        "numpy": [name, np.asarray(keys).tolist(), *rest],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": torch.cuda.get_rng_state().numpy().tobytes().hex() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(tuple(state["numpy"]))

    def tensor(text: str) -> Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensor(state["cuda"]))

from __future__ import annotations

import errno
import json
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from helpers import tiny_model, token_pairs
from safetensors.torch import load_file

from training import checkpoint
from training.checkpoint import (
    DamagedError,
    SaveError,
    check_checkpoint,
    checkpoints,
    discard_later_checkpoints,
    newest_valid,
    rotate,
    save_checkpoint,
    whole_file,
    whole_folder,
)
from training.config import TrainConfig
from training.errors import InputError
from training.train import train


def save(folder, step=1):
    """Save a checkpoint with the files of a real checkpoint."""

    def write(to):
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"):
            (to / f"checkpoint-{step}" / name).write_text(f"{name} of step {step}")

    save_checkpoint(folder / f"checkpoint-{step}", write, {"step": step})
    return folder / f"checkpoint-{step}"


def run(folder, frozen=(), **given):
    model = tiny_model(**{key: given.pop(key) for key in ("tie_word_embeddings", "vocab_size") if key in given})
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    settings = {"max_steps": 2, "learning_rate": 1e-2, "save_steps": 1, "output_dir": str(folder), **given}
    train(TrainConfig(**settings), token_pairs(), model=model, quiet=True)
    return model


def test_killed_writers_leave_at_most_one_file(tmp_path):
    program = f"""
import os, signal, pathlib
from training.checkpoint import whole_file
with whole_file(pathlib.Path({str(tmp_path / "curves.png")!r})) as to:
    to.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", program]).returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 1
    with whole_file(tmp_path / "curves.png") as to:
        to.write_text("whole")
    assert [file.read_text() for file in tmp_path.iterdir()] == ["whole"]


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "lm_head", "mlp", "layernorm")], ids=["all", "some_frozen"])
def test_trained_state_is_saved_and_restored(tmp_path, tied, frozen):
    trained = run(tmp_path / "one", frozen, tie_word_embeddings=tied)
    names = {name for name, parameter in trained.named_parameters() if parameter.requires_grad}
    written = load_file(tmp_path / "one/checkpoint-2/model.safetensors")
    assert {name.removeprefix("model.") for name in written} == {
        "model." + name.removeprefix("model.") if "lm_head" not in name else name for name in names
    }
    again = run(
        tmp_path / "two",
        frozen,
        tie_word_embeddings=tied,
        resume_from_checkpoint=str(tmp_path / "one/checkpoint-1"),
    )
    assert all(torch.equal(again.state_dict()[name], value) for name, value in trained.state_dict().items())


def test_another_models_checkpoint_names_differing_tensors(tmp_path):
    run(tmp_path / "one")
    resume = {"resume_from_checkpoint": str(tmp_path / "one/checkpoint-1"), "resume_changed": True}
    with pytest.raises(InputError, match=r"does not fit .*size mismatch for model.model.embed_tokens.weight"):
        run(tmp_path / "two", vocab_size=260, **resume)
    with pytest.raises(InputError, match=r"does not fit .*only one of them has model.lm_head.weight"):
        run(tmp_path / "three", ("lm_head",), **resume)


def test_more_steps_are_no_change(tmp_path):
    """A finished run continues with the learning rates of the longer schedule."""
    run(tmp_path / "out")
    with pytest.raises(InputError, match="holds a finished run of 2 steps; raise max_steps or num_train_epochs"):
        run(tmp_path / "out", resume_from_checkpoint="auto")
    run(tmp_path / "out", resume_from_checkpoint="auto", max_steps=4, logging_steps=1)
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row][-2:] == [3, 4]
    run(tmp_path / "fresh", max_steps=4, logging_steps=1)
    fresh = [json.loads(line) for line in (tmp_path / "fresh/metrics.jsonl").read_text().splitlines()]
    assert [row["learning_rate"] for row in rows][-2:] == [row["learning_rate"] for row in fresh][-2:]
    assert (tmp_path / "out/checkpoint-4").is_dir()


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = [
    (lambda path: truncate(path / "optimizer.pt"), r"optimizer.pt has \d+ bytes, \d+ were written"),
    (lambda path: flip(path / "model.safetensors"), r"model.safetensors differs from what was written"),
    (lambda path: flip(path / "rng_state.pth"), r"rng_state.pth differs from what was written"),
    (lambda path: (path / "optimizer.pt").unlink(), r"optimizer.pt cannot be read"),
    (lambda path: (path / "state.json").unlink(), r"state.json cannot be read"),
    (lambda path: (path / "manifest.json").unlink(), r"it has no manifest.json"),
    (lambda path: truncate(path / "manifest.json"), r"manifest.json cannot be read"),
    (lambda path: (path / "manifest.json").write_text('{"format": 9}'), r"manifest.json is not of format 3"),
    (lambda path: (path / "model.safetensors").write_bytes(b""), r"model.safetensors has 0 bytes"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_corrupted_checkpoint_falls_back_to_the_previous(tmp_path, damage, message):
    for step in (9, 10):  # 10 is the newer one: names are compared as numbers
        save(tmp_path, step)
    (tmp_path / "checkpoint-11.partial").mkdir()
    assert newest_valid(tmp_path, print) == (tmp_path / "checkpoint-10", {"step": 10})
    damage(tmp_path / "checkpoint-10")
    with pytest.raises(DamagedError, match=message):
        check_checkpoint(tmp_path / "checkpoint-10")
    said = []
    assert newest_valid(tmp_path, said.append) == (tmp_path / "checkpoint-9", {"step": 9})
    assert len(said) == 1 and "checkpoint-10 is damaged" in said[0]


def test_a_checkpoint_under_another_number_is_not_used(tmp_path):
    """Otherwise the run would treat it as a later step and discard it."""
    shutil.copytree(save(tmp_path, 4), tmp_path / "checkpoint-0009")
    said = []
    assert newest_valid(tmp_path, said.append) == (tmp_path / "checkpoint-4", {"step": 4})
    assert "its name says step 0009, but it is of step 4" in said[0]


def test_all_checkpoints_corrupted_is_an_error(tmp_path):
    assert newest_valid(tmp_path, print) is None
    truncate(save(tmp_path, 3) / "rng_state.pth")
    with pytest.raises(InputError, match=r"every checkpoint .* is damaged"):
        newest_valid(tmp_path, [].append)


def test_a_checkpoint_may_be_moved(tmp_path):
    shutil.copytree(save(tmp_path / "one", 4), tmp_path / "two" / "checkpoint-4")
    assert newest_valid(tmp_path / "two", print) == (tmp_path / "two" / "checkpoint-4", {"step": 4})


@pytest.mark.parametrize("failing", ["_measure", "_sync"])
def test_a_failed_save_keeps_only_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    before = save(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, failing, full)
        for step in (1, 2):
            with pytest.raises(SaveError, match=rf"checkpoint-{step} could not be written: .*No space left"):
                save(tmp_path, step)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    check_checkpoint(before)


def test_an_interrupted_folder_leaves_the_earlier_one(tmp_path):
    with whole_folder(tmp_path / "best") as to:
        (to / "a").write_text("first")
    for error in (KeyboardInterrupt, OSError):
        with pytest.raises((KeyboardInterrupt, SaveError)), whole_folder(tmp_path / "best") as to:
            (to / "a").write_text("second")
            raise error
        assert (tmp_path / "best" / "a").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_the_earlier_folder_goes_last(tmp_path, monkeypatch):
    """Deleting a large folder takes long, and a run may be killed meanwhile."""
    delete, folder = shutil.rmtree, tmp_path / "best"

    def checked(*given, **more):
        delete(*given, **more)
        assert not written or folder.is_dir()

    written = []
    monkeypatch.setattr(checkpoint.shutil, "rmtree", checked)
    for text in ("first", "second"):
        with whole_folder(folder) as to:
            (to / "a").write_text(text)
        written.append(text)
    assert (folder / "a").read_text() == "second" and len(list(tmp_path.iterdir())) == 1


def test_later_checkpoints_are_set_aside(tmp_path):
    for step in (2, 4, 6, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    said = []
    discard_later_checkpoints(tmp_path, 6, said.append)
    assert list(checkpoints(tmp_path)) == [2, 4, 6] and len(said) == 2
    assert {path.name for path in tmp_path.glob("set-aside-*")} == {f"set-aside-checkpoint-{i}" for i in (10, 12)}
    rotate(tmp_path, 2)  # those set aside do not count
    assert list(checkpoints(tmp_path)) == [4, 6] and (tmp_path / "checkpoint-best").exists()


def test_copies_of_checkpoints_are_not_rotated(tmp_path):
    """A user's copy is neither deleted nor taken for the newest checkpoint."""
    copies = [tmp_path / name for name in ("checkpoint-1-keep", "checkpoint-9.bak")]
    for copy in copies:
        copy.mkdir()
    run(tmp_path, save_total_limit=1)
    assert list(checkpoints(tmp_path)) == [2] and all(copy.is_dir() for copy in copies)


def test_manifest_is_readable_and_complete(tmp_path):
    path = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 3
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}

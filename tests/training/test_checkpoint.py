from __future__ import annotations

import errno
import json
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny_model

import inspo_kernels as ik
from training import checkpoint
from training.checkpoint import (
    DamagedError,
    SaveError,
    check_checkpoint,
    checkpoints,
    clear_for,
    load_checkpoint,
    newest_valid,
    rotate,
    save_checkpoint,
    whole_folder,
)
from training.config import InputError
from training.scoring import PairModel


def module_and_optimizer(frozen=(), seed=0, steps=0, **fields):
    module = PairModel(tiny_model(seed, **fields), ik.DPO())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not any(part in name for part in frozen))
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if (p.ndim > 1) == large], "weight_decay": 0.1} for large in (True, False)]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    for _ in range(steps):
        for parameter in trained:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


def state_of(module, optimizer):
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    for name, parameter in module.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            state[f"{key} of {name}"] = value.clone()
    return state


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def save(folder, step=1, **given):
    module, optimizer = module_and_optimizer(**{"steps": 2, **given})
    return save_checkpoint(folder, step, module, optimizer, {"step": step}, {"metrics.jsonl": '{"step": 1}\n'})


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("frozen", [(), ("embed_tokens", "lm_head", "mlp")], ids=["all", "some_frozen"])
def test_what_is_loaded_is_what_was_saved(tmp_path, tied, frozen):
    module, optimizer = module_and_optimizer(frozen, steps=2, tie_word_embeddings=tied)
    path = save_checkpoint(tmp_path, 2, module, optimizer, {"step": 2, "tokens": 9}, {"metrics.jsonl": "{}\n"})
    assert check_checkpoint(path) == {"step": 2, "tokens": 9}
    saved = state_of(module, optimizer)

    other, fresh = module_and_optimizer(frozen, tie_word_embeddings=tied)
    assert not same(state_of(other, fresh), saved)
    assert load_checkpoint(path, other, fresh, print) == {"metrics.jsonl": "{}\n"}
    assert same(state_of(other, fresh), saved)
    assert [group["lr"] for group in fresh.param_groups] == [1e-2, 1e-2]
    for one in (module, other):
        torch.manual_seed(1)
        for parameter in one.parameters():
            parameter.grad = torch.randn_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    fresh.step()
    assert same(state_of(module, optimizer), state_of(other, fresh))


def test_of_a_partly_frozen_model_only_what_is_trained_is_written(tmp_path):
    path = save(tmp_path, frozen=("embed_tokens", "lm_head", "mlp", "layernorm"))
    with checkpoint.safe_open(path / "model.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == {
            "model.model.norm.weight", *(f"model.model.layers.0.self_attn.{x}_proj.weight" for x in "qkvo")
        }  # fmt: skip


def test_random_generators_go_on_where_they_were(tmp_path):
    module, optimizer = module_and_optimizer(steps=1)
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(5)
    random.gauss(0, 1)  # leaves a second value behind
    np.random.standard_normal()
    path = save_checkpoint(tmp_path, 1, module, optimizer, {}, {})

    def draw():
        return random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()

    expected = draw()
    draw()
    load_checkpoint(path, module, optimizer, print)
    assert draw() == expected


def test_random_states_of_another_number_of_processes_are_left_out_and_said_so(tmp_path, monkeypatch):
    path = save(tmp_path)
    said = []
    monkeypatch.setattr(checkpoint, "process_count", lambda: 2)
    load_checkpoint(path, *module_and_optimizer(), said.append)
    assert "written by 1 processes" in said[0]


def test_nothing_is_pickled_or_unpickled(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle was used")

    for owner, name in ((torch, "load"), (torch, "save"), (pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"),
                        (pickle, "dump"), (pickle, "dumps"), (pickle, "Pickler")):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    path = save(tmp_path)
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json", ".jsonl"}
    check_checkpoint(path)
    load_checkpoint(path, *module_and_optimizer(), print)


def truncate(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = [
    (lambda path: truncate(path / "optimizer.safetensors"), r"optimizer.safetensors has \d+ bytes, \d+ were written"),
    (lambda path: flip(path / "model.safetensors"), r"model.safetensors is not what was written"),
    (lambda path: flip(path / "metrics.jsonl"), r"metrics.jsonl is not what was written"),
    (lambda path: (path / "state.json").unlink(), r"state.json is missing"),
    (lambda path: (path / "manifest.json").unlink(), r"it has no manifest.json"),
    (lambda path: truncate(path / "manifest.json"), r"manifest.json cannot be read"),
    (lambda path: (path / "manifest.json").write_text('{"format": 9}'), r"manifest.json is not of format 1"),
    (lambda path: (path / "manifest.json").write_text('{"format": 1, "files": {}}'), r"does not name all files"),
    (
        lambda path: (path / "manifest.json").write_text(
            (path / "manifest.json").read_text().replace('"metrics.jsonl"', '"../metrics.jsonl"')
        ),
        r"names a file outside",
    ),
    (lambda path: (path / "model.safetensors").write_bytes(b""), r"model.safetensors has 0 bytes"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(tmp_path, damage, message):
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


def test_where_all_are_damaged_the_run_does_not_silently_begin_anew(tmp_path):
    assert newest_valid(tmp_path, print) is None
    truncate(save(tmp_path, 3) / "random.json")
    with pytest.raises(InputError, match=r"every checkpoint .* is damaged"):
        newest_valid(tmp_path, [].append)


def test_a_checkpoint_of_another_model_says_which_tensors_differ(tmp_path):
    path = save(tmp_path)
    with pytest.raises(
        InputError, match=r"2 tensors differ \(model.model.embed_tokens.weight: \(259, 16\) there, \(26"
    ):
        load_checkpoint(path, *module_and_optimizer(vocab_size=260), print)
    with pytest.raises(InputError, match=r"lm_head.weight: .* there, nothing here"):
        load_checkpoint(path, *module_and_optimizer(("lm_head",)), print)


def test_a_checkpoint_may_be_moved(tmp_path):
    shutil.copytree(save(tmp_path / "one", 4), tmp_path / "two" / "checkpoint-4")
    assert newest_valid(tmp_path / "two", print) == (tmp_path / "two" / "checkpoint-4", {"step": 4})


@pytest.mark.parametrize("failing", ["save_file", "_sync"])
def test_a_failed_save_leaves_the_earlier_one_and_nothing_else(tmp_path, monkeypatch, failing):
    before = save(tmp_path, 1)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, failing, full)
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


def test_rotation_counts_back_from_the_step_that_was_saved(tmp_path):
    for step in (2, 4, 6, 10, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    said = []
    clear_for(tmp_path, 6, said.append)
    assert list(checkpoints(tmp_path)) == [2, 4, 6] and len(said) == 2
    assert {path.stem for path in tmp_path.glob("*.set-aside")} == {"checkpoint-10", "checkpoint-12"}
    rotate(tmp_path, 6, 2, print)
    assert list(checkpoints(tmp_path)) == [4, 6]
    (tmp_path / "checkpoint-99").mkdir()
    rotate(tmp_path, 6, 1, print)
    assert list(checkpoints(tmp_path)) == [6, 99]
    assert (tmp_path / "checkpoint-best").exists() and not list(tmp_path.glob("*.partial"))


def test_manifest_is_readable_and_complete(tmp_path):
    path = save(tmp_path, 7)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["format"] == 1 and manifest["step"] == 7
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}

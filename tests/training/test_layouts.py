"""Compare runs in trees with the same runs in rows, and test the choice of layout and the refusal of wrong trees."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from helpers import tiny_model, token_pairs
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import reference

import inspo_kernels as ik
import training.batching
import training.scoring
import training.train
from inspo_kernels.layouts.tree import MAX_DENSE_TOKENS
from training.batching import Batcher, choose_layout, micro_batches
from training.config import TrainConfig
from training.data import Pair
from training.errors import InputError
from training.pairs import lengths_of
from training.scoring import Batch, PairModel, check_layout, score
from training.train import train

PAIRS = [Pair(*ids, f"pair {i}") for i, ids in enumerate(token_pairs(7))]
BATCHER = Batcher(pad_token_id=0, device=torch.device("cpu"), max_tokens=100, separator_ids=(5, 6))


def choose(wanted, model, pairs=PAIRS, conditioned=True):
    """Return the layout, and the line that gives the reason."""
    said = []
    batcher = choose_layout(wanted, model, BATCHER, lengths_of(pairs), conditioned=conditioned, log=said.append)
    assert dataclasses.replace(batcher, layout="rows") == BATCHER
    (line,) = said
    return batcher.layout, line


def test_trees_are_chosen_if_the_model_reads_them():
    model, pairs = tiny_model(), PAIRS
    layout, line = choose("auto", model, pairs)
    assert layout == "tree" and "layout: tree" in line and "one in a row" in line
    assert choose("auto", model, pairs, conditioned=False)[0] == "tree"
    assert choose("rows", model, pairs) == ("rows", "layout: rows, as set")
    model.set_attn_implementation("flex_attention")
    layout, line = choose("auto", model, pairs)
    assert layout == "packed_tree" and "layout: tree" in line and "many in a row" in line


def test_eager_attention_reads_trees_only_for_long_prompts():
    model = tiny_model()
    model.set_attn_implementation("eager")
    short, long = Pair([1], [2] * 9, [3] * 9, "short"), Pair([1] * 90, [2] * 9, [3] * 9, "long")
    assert choose("auto", model, [short])[0] == "rows" and choose("tree", model, [short])[0] == "tree"
    assert choose("auto", model, [long])[0] == "tree"


def test_unreadable_trees_become_rows_or_an_error():
    model = tiny_model()
    model.config._attn_implementation = "flash_attention_2"
    layout, line = choose("auto", model)
    assert layout == "rows" and "'flash_attention_2' takes no mask" in line
    with pytest.raises(InputError, match=r"layout=tree: .*'flash_attention_2' takes no mask.*sdpa"):
        choose("tree", model)
    long = [*PAIRS, Pair([1] * MAX_DENSE_TOKENS, [3], [4])]
    eager = tiny_model()
    eager.set_attn_implementation("eager")
    layout, line = choose("auto", eager, long)
    assert layout == "rows" and f"longest pair takes {MAX_DENSE_TOKENS + 8} tokens" in line
    with pytest.raises(InputError, match="lower max_length"):
        choose("tree", eager, long)
    assert choose("auto", tiny_model(), long)[0] == "tree"


@pytest.mark.parametrize("layout", ["tree", "packed_tree"])
@pytest.mark.parametrize("conditioned", [True, False])
def test_scores_and_sizes_are_those_of_the_batches(layout, conditioned):
    model = PairModel(tiny_model(), ik.DPO())
    batcher = dataclasses.replace(BATCHER, layout=layout)
    expected, found = (score(model, PAIRS, b, conditioned=conditioned) for b in (BATCHER, batcher))
    for name in ("logps", "lengths", "marginal_logps") if conditioned else ("logps", "lengths"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0)
    ids = batcher(PAIRS, conditioned=conditioned)["input_ids"]
    tokens = batcher.tokens(lengths_of(PAIRS), conditioned=conditioned).tolist()
    assert tokens == batcher.padded(lengths_of(PAIRS), conditioned=conditioned).tolist()
    assert ids.numel() == (sum(tokens) if layout == "packed_tree" else len(PAIRS) * max(tokens))
    for part in batcher.plan(PAIRS, conditioned=conditioned):
        used = batcher([PAIRS[i] for i in part.pairs], conditioned=conditioned)["input_ids"].numel()
        assert used <= BATCHER.max_tokens or len(part.pairs) == 1


@given(st.lists(st.integers(1, 60), min_size=1, max_size=30), st.integers(1, 120), st.integers(1, 4))
def test_packed_passes_stay_within_the_budget(sizes, most, processes):
    dealt = micro_batches(sizes, most, processes, packed=True)
    assert len({len(passes) for passes in dealt}) == 1
    real = [part.pairs for passes in dealt for part in passes if part.weight]
    assert sorted(i for pairs in real for i in pairs) == [*range(len(sizes))]
    filled = [sum(sizes[i] for i in pairs) for pairs in real]
    assert all(tokens <= most or len(pairs) == 1 for tokens, pairs in zip(filled, real))
    fillers = [part for passes in dealt for part in passes if not part.weight]
    assert len(fillers) < processes and all(len(part.pairs) == 1 for part in fillers)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("layout", ["tree", "packed_tree"])
def test_trees_must_give_the_logps_of_rows(layout, bf16, monkeypatch):
    model = tiny_model(initializer_range=0.5)  # context has to matter
    module = Autocast(PairModel(model, ik.DPO()), bf16)
    batcher = dataclasses.replace(BATCHER, layout=layout)
    said = []

    def check(required):
        return check_layout(batcher, module, PAIRS, bf16=bf16, required=required, log=said.append)

    assert check(True) is batcher and not said
    for wrong in ("mask", "positions"):
        with monkeypatch.context() as patch:
            if wrong == "mask":
                patch.setattr(training.scoring.ik, "tree_attention_mask", see_everything)
            else:
                patch.setattr(training.scoring.ik, "hidden_and_head", without_positions(ik.hidden_and_head))
            assert check(False) == BATCHER
            assert said.pop().startswith("WARNING: this model scores a small pair differently as a tree")
            with pytest.raises(InputError, match=r"layout=tree: .* nats per token; set layout=rows"):
                check(True)


class Autocast(torch.nn.Module):
    """Run ``module`` as accelerate does."""

    def __init__(self, module, enabled):
        super().__init__()
        self.module, self.enabled = module, enabled

    def forward(self, *batch):
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.module(*batch)


def see_everything(batch, model):
    """Imitate a model that ignores its mask: it sees all earlier tokens, also of other branches and pairs."""
    length = batch["input_ids"].shape[1]
    return torch.ones(length, length, dtype=torch.bool).tril()[None, None]


def without_positions(hidden_and_head):
    def forward(model, position_ids, **inputs):
        return hidden_and_head(model, **inputs)

    return forward


def run(layout, **options):
    model = tiny_model(num_hidden_layers=2)
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 5,
        "max_batch_tokens": 100,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    config = TrainConfig(layout=layout, eval_steps=2, **{**settings, **options})
    result = train(config, token_pairs(9), eval_pairs=token_pairs(3, seed=1), model=model, quiet=True)
    return result.metrics, dict(result.model.named_parameters())


def assert_same_run(one, other, tolerance):
    for mine, theirs in zip(one[0], other[0], strict=True):
        for name in mine:
            if name.startswith(("loss", "rewards", "logps", "marginal", "grad_norm", "eval")) and "accura" not in name:
                assert mine[name] == pytest.approx(theirs[name], rel=tolerance, abs=tolerance), name
    for name, parameter in one[1].items():
        expected = other[1][name]
        assert (parameter - expected).abs().max() <= tolerance * expected.abs().max(), name


@pytest.mark.parametrize(
    "options",
    [
        {"marginal_weight": 0.5},
        {"conditioned": False},
        {"objective": "orpo", "activation_checkpointing": True},
        {"reference_conditioned": True},
    ],
)
def test_trees_train_as_rows(options):
    # AdamW turns the sign of a gradient near 0, which is rounding, into a step: hence the eps of the tolerance.
    assert_same_run(run("tree", **options), run("rows", **options), 2e-4)


def test_packed_trees_train_as_rows(monkeypatch):
    expected = run("rows")
    # flex_attention has no backward on a CPU: here the packed rows get a dense mask.
    packed = lambda layout, model, batcher, lengths, **_: dataclasses.replace(batcher, layout="packed_tree")  # noqa: E731
    monkeypatch.setattr(training.train, "choose_layout", packed)
    assert_same_run(run("auto"), expected, 2e-4)


def test_autocast_runs_in_trees():
    rows, _ = run("rows", bf16=True)
    tree, _ = run("tree", bf16=True)
    for mine, theirs in zip(tree, rows, strict=True):
        if "loss" in mine:
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.05)


def test_a_resumed_run_keeps_its_layout(tmp_path, monkeypatch, capsys):
    def start(**options):
        config = TrainConfig(
            output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=5, save_steps=2, **options
        )
        return train(config, token_pairs(9), model=tiny_model())

    with monkeypatch.context() as patch:
        patch.setattr(training.batching.ik, "tree_unsupported", lambda model: "of a reason")
        start()
    assert "layout: rows, because of a reason" in capsys.readouterr().out
    state = json.loads((tmp_path / "checkpoint-2" / "state.json").read_text())
    assert state["layout"] == "rows"
    shutil.rmtree(tmp_path / "final")
    start(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "layout: rows, as set" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "final")
    start(resume_from_checkpoint=str(tmp_path / "checkpoint-2"), layout="tree")
    assert "layout: tree" in capsys.readouterr().out


def test_a_cached_reference_is_of_one_layout(tmp_path):
    said = []
    for layout in ("rows", "tree", "tree"):
        reference(tiny_model(), tmp_path, said, PAIRS, batcher=dataclasses.replace(BATCHER, layout=layout))
    assert ["computed" in line for line in said] == [True, True, False]


def test_without_marginals_the_head_sees_no_marginal_rows():
    module = PairModel(tiny_model(), ik.DPO())
    ref = torch.zeros(2 * len(PAIRS), dtype=torch.float64)
    for layout in ("rows", "tree", "packed_tree"):
        batcher = dataclasses.replace(BATCHER, layout=layout)
        (loss, full), (same, bare) = (
            module(Batch(batcher(PAIRS, conditioned=True, marginals=some), ref)) for some in (True, False)
        )
        assert same.item() == pytest.approx(loss.item(), rel=1e-6)
        assert any(name.startswith("marginal/") for name in full.metrics)
        assert not any(name.startswith("marginal/") for name in bare.metrics)

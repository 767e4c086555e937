"""The README's code runs as printed, and its generated parts are those of the committed result files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import inspo_kernels as ik
from benchmarks.report import README, render
from training.model import byte_tokenizer

TEXT = README.read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_custom_loop_runs_and_learns(model_folder, capsys):
    texts = [("Say hi.", "Hi!", "No."), ("Count to three.", "1 2 3", "Four score and seven years ago")]
    loop = next(block for block in BLOCKS if "for step in range" in block)
    scope = {"name": str(model_folder), "texts": texts, "steps": 8}
    exec(loop.replace("lr=5e-7", "lr=1e-3"), scope)
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines() if line[:1].isdigit()]
    assert len(losses) == 8 and losses[-1] < losses[0]


def test_tree_gives_the_loss_of_rows(model_folder):
    model = AutoModelForCausalLM.from_pretrained(model_folder).eval()
    pairs, ref_logps = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11])], torch.full((4,), -9.0)
    scope = {"ik": ik, "model": model, "pairs": pairs, "pad": 0, "ref_logps": ref_logps}
    exec(next(block for block in BLOCKS if 'layout="tree"' in block), scope)
    batch = ik.condition_pairs(pairs, pad_token_id=0)
    hidden, head = ik.hidden_and_head(model, **{k: batch[k] for k in ("input_ids", "attention_mask", "position_ids")})
    rows = ik.fused_inspo_loss(hidden, labels=batch["labels"], ref_logps=ref_logps, **head)
    torch.testing.assert_close(scope["out"].loss, rows.loss)
    assert scope["out"].marginal_logps is not None


def test_custom_objective_runs():
    scope = {"ik": ik}
    exec(next(block for block in BLOCKS if "class Mine" in block), scope)
    one = torch.ones(1, dtype=torch.float64)
    sums = ik.PairSums(chosen=-2 * one, rejected=-1.5 * one, chosen_len=one, rejected_len=one, index=torch.arange(1))
    assert scope["Mine"]()(sums).tolist() == [1.5]


@pytest.mark.parametrize("command", re.findall(r"python -m ([\w.]+)", TEXT))
def test_named_modules_exist(command):
    assert (
        Path(README.parent, *command.split(".")).with_suffix(".py").exists()
        or Path(README.parent, *command.split("."), "__main__.py").exists()
    )


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:inspo_kernels|training|benchmarks)/[\w/.]*)`", TEXT))))
def test_named_files_exist(path):
    assert (README.parent / path).exists()


def test_generated_parts_are_up_to_date():
    assert render(TEXT) == TEXT, "run python -m benchmarks.report"

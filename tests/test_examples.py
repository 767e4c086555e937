"""Test that every file in examples/ runs offline and does what its first line says."""

from __future__ import annotations

import importlib
import inspect
import re
import runpy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import inspo_kernels as ik

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPTS = sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "tiny")


@pytest.fixture(autouse=True)
def at_hand(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(name, as_main=True):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__" if as_main else name)


@pytest.mark.parametrize("name", SCRIPTS)
def test_example_runs(name, capsys):
    if name not in ("custom_loop", "own_objective", "verl_loss", "walk_through"):
        pytest.importorskip("trl")
    run(name)
    assert "loss" in capsys.readouterr().out


def test_every_example_is_short():
    lines = {path.name: len(path.read_text().splitlines()) for path in EXAMPLES.iterdir() if path.is_file()}
    assert lines["custom_loop.py"] <= 40
    assert max(lines.values()) <= 50


def test_custom_loop_learns_its_pairs(capsys):
    run("custom_loop")
    losses = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0]


def test_walk_through_shows_what_it_explains(capsys):
    run("walk_through")
    said = capsys.readouterr().out
    assert "row 0 scores the chosen response '4<eos>' in '2+2=5<eos>4<eos>" in said
    assert float(re.search(r"difference .*: (\S+) nats", said)[1]) < 1e-4
    assert all(float(margin) > 0 for margin in re.findall(r"margin from the prompt alone (\S+)", said))


def test_trl_example_differs_from_trl_in_its_import(monkeypatch, capsys):
    """The same file also trains with TRL's own import."""
    pytest.importorskip("trl")
    text = (EXAMPLES / "trl_inspo.py").read_text()
    before = next(line for line in text.splitlines() if line.startswith("# before: "))
    own = [line for line in text.splitlines() if line.startswith("from inspo_kernels")]
    assert len(own) == 2
    for line in own:
        text = text.replace(line, "")
    exec(compile(text.replace(before, before.removeprefix("# before: ")), "trl", "exec"), {"__name__": "trl_example"})
    assert "marginal/" not in capsys.readouterr().out


def test_on_policy_pairs_are_ranked(monkeypatch):
    pytest.importorskip("trl")
    module = run("on_policy", as_main=False)
    torch.manual_seed(0)
    pairs = module["sampled_pairs"](["1+1=", "2+2="])
    assert pairs
    for pair in pairs:
        assert module["score"](pair["prompt"], pair["chosen"]) > module["score"](pair["prompt"], pair["rejected"])


def test_verl_loss_is_the_fused_loss():
    module = run("verl_loss", as_main=False)
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 6, 16), torch.randn(50, 16, requires_grad=True)
    mask = torch.tensor([[1] * 6, [1] * 3 + [0] * 3, [1] * 4 + [0] * 2, [1] * 6])
    data = {"responses": torch.randint(50, (4, 6)), "response_mask": mask, "ref_log_prob": torch.randn(4, 6) - 4}
    output = module["response_log_probs"](hidden, weight, data["responses"], 1.0)
    config = SimpleNamespace(objective=ik.SigmoidNorm(beta=0.5))
    loss, metrics = module["inspo_loss"](config, model_output=output, data=data, dp_group=None)
    (gradient,) = torch.autograd.grad(loss, weight)
    out = ik.fused_inspo_loss(
        hidden,
        weight,
        data["responses"].masked_fill(mask == 0, -100),
        shift=False,
        objective=config.objective,
        ref_logps=(data["ref_log_prob"] * mask).sum(1),
    )
    (expected,) = torch.autograd.grad(out.loss, weight)
    assert loss.item() == pytest.approx(out.loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)
    assert metrics["actor/rewards_chosen"] == pytest.approx(out.chosen_rewards.mean().item(), rel=1e-5)


def test_axolotl_constructs_the_trainer(tmp_path):
    """Imitate ``HFRLTrainerBuilder.build``: models by position, all else by name, arguments of axolotl's class."""
    pytest.importorskip("trl")
    import peft
    from datasets import Dataset
    from tiny import tiny_model, tiny_tokenizer
    from trl import DPOConfig

    settings = yaml.safe_load((EXAMPLES / "axolotl.yaml").read_text())
    module, name = settings["trainer_cls"].rsplit(".", 1)
    trainer_class = getattr(importlib.import_module(module), name)

    @dataclass
    class AxolotlDPOConfig(DPOConfig):
        sample_packing: bool | None = None
        dpo_norm_loss: bool | None = None

    args = AxolotlDPOConfig(
        logging_first_step=True,
        output_dir=str(tmp_path),
        beta=settings["rl_beta"],
        max_length=settings["sequence_len"],
        per_device_train_batch_size=settings["micro_batch_size"],
        gradient_checkpointing=settings["gradient_checkpointing"],
        learning_rate=settings["learning_rate"],
        remove_unused_columns=False,
        max_steps=2,
        bf16=False,
        report_to=[],
        save_strategy="no",
    )
    tokenizer = tiny_tokenizer()
    rows = Dataset.from_list([{"prompt": f"{i}?", "chosen": "Yes.", "rejected": "No, no."} for i in range(4)])
    keywords = {"eval_dataset": rows, "peft_config": peft.LoraConfig(r=2, target_modules=["q_proj"])}
    assert "tokenizer" not in inspect.signature(trainer_class).parameters  # axolotl asks
    keywords["processing_class"] = tokenizer
    model_ref = None  # with an adapter; otherwise a second model
    trainer = trainer_class(tiny_model(tokenizer), model_ref, args=args, train_dataset=rows, callbacks=[], **keywords)
    trainer.train()
    assert any("marginal/logps/chosen" in log for log in trainer.state.log_history)  # conditioned, by default

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch
from helpers import PAIRS, metrics, options, tiny_model, token_pairs
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from inspo_kernels import gradients
from training import generate
from training.adapters import adapter_off, add_lora
from training.architecture import check_architecture
from training.config import TrainConfig
from training.data_options import LoraOptions
from training.errors import InputError
from training.model import byte_tokenizer, load_model, size_text
from training.options import parse_config
from training.train import dry_run, main, train


def base(folder, **fields):
    """Save a base whose answers depend visibly on the prompt, and return its path."""
    tiny_model(initializer_range=0.5, **fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def lora_run(out, model, *more):
    main(["--model", model, "--lora.r", "4", *options(out, *more)[8:]])


def run(model, pairs=None, **given):
    settings = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "lora": LoraOptions(r=4), **given}
    return train(TrainConfig(**settings), pairs or token_pairs(), model=model, quiet=True)


@pytest.mark.parametrize("tied", [False, True])
def test_training_changes_only_the_adapter(tied):
    model = tiny_model(tie_word_embeddings=tied)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert result.model is model and trained and all("lora_" in name for name in trained)
    after = {name.replace(".base_layer", ""): t for name, t in model.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert all(p.abs().max() > 0 for name, p in trained.items() if "lora_B" in name)  # 0 before training
    layers = {name.split(".lora_")[0].rpartition(".")[2] for name in trained}
    assert layers == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert result.metrics[-1]["loss"] < result.metrics[0]["loss"]


def test_disabling_the_adapter_gives_the_base_temporarily():
    ids = torch.tensor([[1, 5, 6, 7]])
    model = tiny_model()
    base_logits = model(ids).logits
    run(model)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    adapted = model(ids).logits
    with adapter_off(model):
        assert torch.equal(model(ids).logits, base_logits)
    assert torch.equal(model(ids).logits, adapted) and not torch.equal(adapted, base_logits)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == trained


@pytest.mark.parametrize(("lora", "expected"), [(LoraOptions(r=4), False), (None, True)])
def test_a_frozen_head_gets_no_gradient(monkeypatch, lora, expected):
    made = []
    empty = gradients.Gradients.empty.__func__

    def spy(cls, *arguments):
        new = empty(cls, *arguments)
        made.append((new.x is not None, new.weight is not None))
        return new

    monkeypatch.setattr(gradients.Gradients, "empty", classmethod(spy))
    run(tiny_model(), lora=lora, max_steps=1)
    assert any(weight for _, weight in made) is expected


def test_the_first_loss_is_ln_2_for_every_seed():
    for seed in (0, 1):
        (row, _) = run(tiny_model(), conditioned=False, seed=seed).metrics
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_the_reference_is_the_base_even_after_training(tmp_path, capsys):
    model = base(tmp_path / "base")
    more = ["--save_steps", "1", "--logging_steps", "1"]
    main(["--model", model, *options(tmp_path / "full", "--max_steps", "1")[8:]])
    lora_run(tmp_path / "lora", model, *more)
    (of_base,), (of_lora,) = ([*(tmp_path / run).glob("reference-*")] for run in ("full", "lora"))
    # The adapter is in neither name nor content: runs can share the file.
    assert of_lora.name == of_base.name
    assert torch.equal(load_file(of_base)["logps"], load_file(of_lora)["logps"])

    # Imitate a kill after step 2 that loses the reference. It must not be recomputed with the trained adapter.
    broken = tmp_path / "broken"
    shutil.copytree(tmp_path / "lora", broken, ignore=shutil.ignore_patterns("final", "checkpoint-3", "reference-*"))
    lora_run(broken, model, *more, "--resume_from_checkpoint", "auto")
    assert "resumed from" in capsys.readouterr().out
    (again,) = broken.glob("reference-*")
    assert torch.equal(load_file(again)["logps"], load_file(of_base)["logps"])
    one, other = (load_file(tmp_path / run / "final/adapter_model.safetensors") for run in ("lora", "broken"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert [r["loss"] for r in metrics(broken) if "loss" in r] == [
        r["loss"] for r in metrics(tmp_path / "lora") if "loss" in r
    ]


def test_checkpoints_hold_only_the_adapter(tmp_path):
    model = base(tmp_path / "base")
    lora_run(tmp_path / "out", model, "--save_steps", "2")
    kept = load_file(tmp_path / "out/checkpoint-2/model.safetensors")
    assert kept and all("lora_" in name for name in kept)


def test_the_saved_adapter_generates_and_merges(tmp_path, capsys):
    model = base(tmp_path / "base")
    out = tmp_path / "out"
    lora_run(out, model, "--learning_rate", "1e-1")
    assert "M of them trained (LoRA)" in capsys.readouterr().out
    final = out / "final"
    settings = json.loads((final / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 32.0, 0.0)
    assert settings["base_model_name_or_path"] == model
    assert not list(final.glob("model*.safetensors"))

    adapted, _ = load_model(TrainConfig(model=str(final)), training=False)
    merged = AutoPeftModelForCausalLM.from_pretrained(final).merge_and_unload()
    plain = AutoModelForCausalLM.from_pretrained(model)
    ids = torch.tensor([[1, 50, 60, 70]])
    with torch.no_grad():
        logits = [m.eval()(ids).logits for m in (adapted, merged, plain)]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[0] - logits[2]).abs().max() > 0.1

    generate.main(["--model", str(final), "--prompt", "Why?", "--max_new_tokens", "8"])
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompt = tokenizer("Why?", return_tensors="pt")["input_ids"]
    answer = merged.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert capsys.readouterr().out == tokenizer.decode(answer, skip_special_tokens=True) + "\n"


def test_a_second_adapter_is_refused(tmp_path):
    lora_run(tmp_path / "out", base(tmp_path / "base"), "--max_steps", "1")
    adapter = TrainConfig(model=str(tmp_path / "out/final"), train_data=str(PAIRS), lora={})
    for start in (lambda: train(adapter, quiet=True), lambda: dry_run(adapter, print)):
        with pytest.raises(InputError, match=r"holds an adapter already.*merge_and_unload\(\)\.save_pretrained"):
            start()


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["q_proj", "nope"], "lora.target_modules: nothing in the model is called 'nope'"),
        (["q_porj"], "nothing in the model is called 'q_porj'; did you mean 'q_proj'"),
    ],
)
def test_targets_that_no_adapter_can_have_are_named(targets, message):
    with pytest.raises(InputError, match=message):
        add_lora(tiny_model(), LoraOptions(target_modules=targets), 0)


def test_the_adapter_is_float32_and_seeded():
    def adapter(seed):
        model = tiny_model().bfloat16()
        before = torch.get_rng_state()
        add_lora(model, LoraOptions(r=2, target_modules=["q_proj"]), seed)
        assert torch.equal(before, torch.get_rng_state())
        check_architecture(model)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    one, again, other = adapter(0), adapter(0), adapter(1)
    assert len(one) == 2 and {p.dtype for p in one.values()} == {torch.float32}
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_bfloat16_parameters_and_activation_checkpointing_train_an_adapter():
    model = tiny_model().bfloat16()
    result = run(model, dtype="bfloat16", activation_checkpointing=True)
    assert all(math.isfinite(row["loss"]) for row in result.metrics)
    assert all(p.abs().max() > 0 for name, p in model.named_parameters() if "lora_B" in name)


def test_the_number_of_trained_parameters_is_printed():
    model = tiny_model(hidden_size=160, intermediate_size=320)
    total = sum(p.numel() for p in model.parameters())
    add_lora(model, LoraOptions(r=8, target_modules=["q_proj", "v_proj"]), 0)
    adapter = 2 * 8 * (160 + 160)
    assert size_text(model) == f"{(total + adapter) / 1e6:.2f}M parameters, {adapter / 1e6:.2f}M of them trained (LoRA)"


def test_lora_options_come_from_yaml_and_command_line(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ntrain_data: d.jsonl\noutput_dir: o\nlora: {r: 8, target_modules: [q_proj, v_proj]}\n")
    config = parse_config(["--config", str(file), "--lora.alpha", "4"])
    assert config.lora == {"r": 8, "target_modules": ["q_proj", "v_proj"], "alpha": 4}
    file.write_text(config.to_yaml())
    assert parse_config(["--config", str(file)]) == config
    assert parse_config(["--config", str(file), "--lora", "null"]).lora is None
    words = ["--model", "m", "--train_data", "d", "--output_dir", "o"]
    assert parse_config([*words, "--lora", "{}"]).lora == {}
    for bad, message in (
        (
            ["--lora.layer_replication", "[[0, 2], [1, 2]]"],
            "layer_replication is not supported: copies of a layer share",
        ),
        (["--lora.alora_invocation_tokens", "[5]"], "alora_invocation_tokens is not supported: peft cannot merge"),
        (["--lora.r", "0"], "lora: r=0"),
        (["--lora.rank", "8"], "lora"),
        (["--lora.lora_dropout", "0.1"], "must be 0"),
        (["--lora.r", "much"], "much"),
    ):
        with pytest.raises(InputError, match=message):
            parse_config([*words, *bad])


TARGETS = [
    {"target_modules": ["q_proj", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": ["lm_head", "embed_tokens"]},
    {"target_modules": r".*lm_head"},
    {"target_parameters": ["embed_tokens.weight"]},
]


@pytest.mark.parametrize("targets", TARGETS)
def test_adapters_on_a_tied_matrix_are_refused(targets):
    with pytest.raises(InputError, match=r"share one matrix.*lora\.modules_to_save"):
        add_lora(tiny_model(tie_word_embeddings=True), LoraOptions(**targets), 0)
    add_lora(tiny_model(), LoraOptions(**targets), 0)


def test_dry_runs_refuse_adapters_on_tied_matrices(tmp_path, capsys):
    more = ["--lora.target_modules", "[lm_head, embed_tokens]", "--dry_run", "true"]
    with pytest.raises(SystemExit, match="2"):
        lora_run(tmp_path / "out", base(tmp_path / "base", tie_word_embeddings=True), *more)
    assert "share one matrix" in capsys.readouterr().err


def test_adapters_that_peft_cannot_save_are_refused():
    options = LoraOptions(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(InputError, match=r"lora\.ensure_weight_tying: .*leave it out"):
        add_lora(tiny_model(tie_word_embeddings=True), options, 0)


def test_a_saved_copy_of_a_tied_head_merges(tmp_path):
    more = ["--lora.modules_to_save", "[lm_head]", "--learning_rate", "1e-2"]
    lora_run(tmp_path / "out", base(tmp_path / "base", tie_word_embeddings=True), *more)
    ids = torch.tensor([[1, 50, 60, 70]])
    adapter = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out/final").eval()
    expected = adapter(ids).logits
    adapter.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(merged(ids).logits, expected)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_continued_adapter_trains_its_biases(tmp_path, bias):
    more = ["--lora.bias", bias, "--max_steps", "1"]
    lora_run(tmp_path / "out", base(tmp_path / "base", attention_bias=True), *more)
    continued, _ = load_model(TrainConfig(model=str(tmp_path / "out/final")))
    fresh = tiny_model(attention_bias=True)
    add_lora(fresh, LoraOptions(r=4, bias=bias), 0)
    trained = [{name for name, p in model.named_parameters() if p.requires_grad} for model in (continued, fresh)]
    assert trained[0] == trained[1] and any(name.endswith("q_proj.base_layer.bias") for name in trained[0])

from __future__ import annotations

import dataclasses
import runpy
import sys
from pathlib import Path

import pytest
import yaml
from helpers import PAIRS, TINY
from transformers import TrainingArguments

from inspo_kernels.objectives import OBJECTIVES
from training.config import TrainConfig
from training.errors import InputError
from training.options import parse_config
from training.other_options import UNSUPPORTED
from training.train import main

ROOT = Path(__file__).parents[2]
REQUIRED = ["--model", "m", "--train_data", "d.jsonl", "--output_dir", "out"]


@pytest.mark.filterwarnings("ignore:'training.train' found in sys.modules:RuntimeWarning")
def test_help_shows_this_projects_options_on_one_screen(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.train", "--help"])
    runpy.run_module("training.train", run_name="__main__")  # as python -m does
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 50 and max(map(len, lines)) <= 120
    assert "huggingface.co/docs/transformers" in lines[-1]
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(TrainConfig):
        if field.name in theirs:
            continue
        assert any(f"--{field.name} " in line for line in lines), field.name
        shown = {True: "true", False: "false"}[field.default] if isinstance(field.default, bool) else field.default
        assert f"[{shown}]" in printed or field.default in (None, "", []), field.name


def test_every_parameter_of_an_objective_is_an_option():
    names = {field.name for field in dataclasses.fields(TrainConfig)}
    for objective in OBJECTIVES.values():
        assert {field.name for field in dataclasses.fields(objective)} <= names, objective


def test_command_line_wins_over_yaml_and_types_are_converted(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {hidden_size: 8, num_hidden_layers: 3}\nlearning_rate: 1e-4\nbeta: 0.5\noutput_dir: a\n")
    words = "--train_data=d.jsonl --model.hidden_size 16 --beta 0.2 --conditioned=false".split()
    config = parse_config(["--config", str(file), *words])
    assert config.model == {"hidden_size": 16, "num_hidden_layers": 3}
    assert (config.learning_rate, config.beta, config.conditioned) == (1e-4, 0.2, False)


def test_resolved_config_reads_back_equal(tmp_path):
    config = parse_config(
        [*REQUIRED, "--objective", "simpo", "--gamma", "0.5", "--max_steps", "7", "--resume_from_checkpoint", "auto"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert parse_config(["--config", str(file)]) == config


def test_a_config_can_be_replaced():
    config = TrainConfig(optim="sgd", lr_scheduler_type="linear", eval_strategy="epoch", eval_data="d")
    assert dataclasses.replace(dataclasses.replace(config, seed=7), seed=config.seed) == config


def test_tiny_yaml_is_valid_and_needs_only_data():
    config = parse_config(["--config", str(ROOT / "training/configs/tiny.yaml"), "--train_data", str(PAIRS)])
    assert isinstance(config.model, dict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betaa", "1"], "--betaa; did you mean beta"),
        (["--learning_rat=1"], "--learning_rat; did you mean learning_rate"),
        (["--batch_size", "8"], "here it is per_device_train_batch_size"),  # the old name
        (["--save_every", "8"], "here it is save_steps"),
        (["--loss_type", "ipo"], "here it is objective"),  # TRL's
        (["--model_name_or_path", "m"], "here it is model"),
        (["--micro_batch_size", "1"], "here it is per_device_train_batch_size"),  # axolotl's
        (["--sequence_len", "1"], "here it is max_length"),
        (["--lora_dropout", "0"], "here it is lora.lora_dropout"),
        (["--lora_target_modules", "q"], "here it is lora.target_modules"),
        (["--lora_rank", "8"], "here it is lora.r$"),  # LLaMA-Factory's
        (["--lora_target", "all"], "here it is lora.target_modules"),
        (["--use_lora", "true"], "here it is lora$"),
        (["--warmup_ratio", "0.1"], "here it is warmup_steps, below 1 a share of all steps"),  # transformers' old one
        (["--rpo_alpha", "1"], "a mixture with SFT needs a loop of your own"),
        (["--load_in_4bit", "true"], "here it is quantization: 4bit"),
        (["--f_divergence_type", "js"], "here it is divergence"),
        (["--disable_dropout", "true"], "not needed: dropout is always off"),
        (["--group_by_length", "true"], "not needed: max_batch_tokens"),
        (["--deepspeed", "nowhere.json"], "deepspeed"),
        (["--micro_batchsize", "1"], "did you mean per_device_train_batch_size"),
        (["--objective", "simp"], "unknown objective 'simp'; did you mean 'simpo'"),
        (["--objective", "simpo", "--tau", "0.1"], "'simpo' takes no 'tau'"),
        (["--beta", "much"], "beta='much': must be a valid number"),
        (["--max_steps", "2.5"], "max_steps='2.5': must be a valid integer"),
        (["--truncation", "cut"], "truncation='cut': must be .*prompt_left"),
        (["--conditioned", "maybe"], "conditioned='maybe': must be a valid boolean"),
        (["--beta", "-1"], "beta must be positive, got -1.0"),
        (["--max_steps", "0"], "max_steps=0: must be at least 1"),
        (["--learning_rate", "nan"], "learning_rate.*nan"),
        (["--warmup_steps", "-1"], "warmup_steps=-1.0: must be at least 0"),
        (["--conditioned", "false", "--marginal_weight", "1"], "marginal_weight needs conditioned=true"),
        (["--conditioned", "false", "--objective", "orpo", "--sft", "marginal"], "needs conditioned=true"),
        (["--reference_conditioned", "true", "--marginal_weight", "1"], "reference_conditioned needs"),
        (["--reference_conditioned", "true", "--objective", "simpo"], "'simpo' has no reference"),
        (["--objective", "aot", "--gradient_accumulation_steps", "2"], "couples a step's pairs"),
        (["--fp16", "true"], "fp16 is not supported: .*bf16"),
        (["--load_best_model_at_end", "true"], "keep_best leaves the best model"),
        (["--save_only_model", "true"], "a run cannot resume without"),
        (["--lr_scheduler_type", "cosin"], "lr_scheduler_type='cosin': must be .*cosine"),
        (["--report_to", "nobody"], "report_to=nobody: unknown, or the package is missing"),
        (["--num_train_epochs", "0"], "num_train_epochs=0: must be above 0"),
        (["--num_train_epochs", "inf"], "num_train_epochs=inf: must be finite"),
        (["--learning_rate", "inf"], "learning_rate=inf: must be finite"),
        (["--save_steps", "0"], "save_steps=0: must be above 0; save_strategy=no"),
        (["--save_strategy", "best"], "keep_best leaves the best model"),
        (["--optim", "galore_adamw_layerwise"], "updates weights within each backward pass"),
        (["--optim", "lomo"], "updates weights within each backward pass"),
        (["--optim", "schedule_free_adamw"], "differ between training and evaluation"),
        (["--torch_compile_mode", "default"], "torch_compile_mode is not supported"),
        (
            ["--metric_for_best_model", "loss"],
            "metric_for_best_model is not supported: keep_best leaves",
        ),
        (["--debug", "underflow_overflow"], "debug is not supported"),
        (["--lr_scheduler_type", "reduce_lr_on_plateau"], "lr_scheduler_type=reduce_lr_on_plateau is not supported"),
        (["--lr_scheduler_type", "greedy"], "lr_scheduler_type=greedy is not supported: it follows evaluations"),
        (["--save_strategy", "best"], "save_strategy=best is not supported: keep_best leaves"),
        (["--data_seed", "3"], "data_seed is not supported: seed orders the pairs"),
        (["--dataloader_num_workers", "4"], "dataloader_num_workers is not supported"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["beta", "1"], "'beta' stands alone"),
        (["--beta"], "--beta has no value"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_config([*REQUIRED, *arguments])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beat: 0.1\n", "c.yaml: beat; did you mean beta"),
        ("objective: dpoo\n", "did you mean 'dpo'"),
        ("beta: [1\n", "c.yaml: .*line 2"),
        ("just words\n", "c.yaml: must hold lines of the form"),
        ("max_steps: soon\n", "max_steps"),
        ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "c.yaml: line 3: 'beta' appears twice"),
        ("lora: {r: 1, r: 2}\n", "'r' appears twice"),
        ("? [a, b]\n: 1\n", "line 1: a key must be a word"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        parse_config([*REQUIRED, "--config", str(file)])


def test_yaml_means_what_it_says(tmp_path, monkeypatch):
    """YAML reads no as false, and does not expand the home folder as a shell does."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUNS", "/runs")
    file = tmp_path / "c.yaml"
    file.write_text(
        "output_dir: ~/runs/x\nreference_cache: $RUNS/cache\nsave_strategy: no\nlearning_rate: 1e-4\nmodel: 7\n"
    )
    config = parse_config(["--config", str(file), "--train_data", "~/d.jsonl"])
    assert (config.output_dir, config.reference_cache) == ("/home/me/runs/x", "/runs/cache")
    assert config.train_data == "/home/me/d.jsonl"
    assert (config.save_strategy, config.learning_rate, config.model) == ("no", 1e-4, "7")
    with pytest.raises(InputError, match=r"\$RUMS/x: the environment has no variable \$RUMS"):
        parse_config(["--config", str(file), "--output_dir", "$RUMS/x"])
    start = f"model: m\ntrain_data: d\noutput_dir: {tmp_path}\n"
    file.write_text(start + "seed: 042\nsave_steps: 1_000\nlora: {r: 08}\nrun_name: 7_\n")
    config = parse_config(["--config", str(file)])
    assert (config.seed, config.save_steps, config.lora, config.run_name) == (42, 1000, {"r": 8}, "7_")
    file.write_text("max_length: 20:48\n")
    with pytest.raises(InputError, match="max_length='20:48': must be a valid integer"):
        parse_config(["--config", str(file)])


def test_the_learning_rate_follows_what_is_trained():
    assert TrainConfig().learning_rate == 5e-7
    assert TrainConfig(lora={"r": 4}).learning_rate == 1e-5
    assert TrainConfig(lora={"r": 4}, learning_rate=1e-3).learning_rate == 1e-3


def test_a_cpu_does_not_get_bf16_unasked():
    assert not TrainConfig().bf16 and TrainConfig(bf16=True).bf16


@pytest.mark.parametrize("missing", ["model", "train_data", "output_dir"])
def test_missing_options_are_named(tmp_path, missing):
    given = {"model": TINY, "train_data": str(PAIRS), "output_dir": str(tmp_path / "out")}
    del given[missing]
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(given))
    with pytest.raises(InputError, match=f"--{missing} is missing"):
        parse_config(["--config", str(file)])


def test_main_prints_one_line_and_exits_with_2(capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*REQUIRED, "--betaa", "1"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.strip() == "error: unknown option --betaa; did you mean beta?"


def test_plain_orpo_fits_the_chosen_response():
    assert TrainConfig(objective="orpo", conditioned=False).make_objective().sft == "chosen"
    assert TrainConfig(objective="orpo").make_objective().sft == "marginal"


def test_numbers_in_sections_may_have_exponents(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-7}\nlora: {r: 8}\n")
    config = parse_config([*REQUIRED, "--config", str(file), "--lora.lora_alpha", "1E1"])
    assert config.lr_scheduler_kwargs == {"min_lr": 1e-7} and config.lora == {"r": 8, "lora_alpha": 10.0}


def test_a_default_may_be_written_out(tmp_path):
    """This includes options that refuse any other value."""
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    given = {name: defaults[name] for name in UNSUPPORTED if defaults[name] is not None}
    for values in (given, given | {"include_num_input_tokens_seen": False}):
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
        assert parse_config([*REQUIRED, "--config", str(tmp_path / "c.yaml")]) == parse_config(REQUIRED)


@pytest.mark.parametrize(
    "text, said",
    [
        ('{"optimizer": {"type": "AdamW"}}', "remove 'optimizer' from the settings file, and set optim instead"),
        ('{"scheduler": {}}', "remove 'scheduler' .* set lr_scheduler_type"),
        ("{", "deepspeed=.*Expecting property name"),
    ],
)
def test_deepspeed_settings_leave_the_optimizer_to_the_options(tmp_path, text, said):
    file = tmp_path / "zero.json"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        TrainConfig(model="m", train_data="d", deepspeed=str(file))


def test_a_seed_that_numpy_refuses_is_named():
    with pytest.raises(InputError, match=r"seed=4294967296: must be at least 0 and below 2\*\*32"):
        parse_config([*REQUIRED, "--seed", str(2**32)])


@pytest.mark.parametrize(("word", "expected"), [("true", "auto"), ("True", "auto"), ("false", None)])
def test_resume_takes_truth_values(tmp_path, word, expected):
    file = tmp_path / "c.yaml"
    file.write_text(f"resume_from_checkpoint: {word}\n")
    for words in (["--config", str(file)], ["--resume_from_checkpoint", word]):
        assert parse_config([*REQUIRED, *words]).resume_from_checkpoint == expected


def test_yaml_merges_sections_and_keeps_dates(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lora: &a {r: 8}\nrun_name: 2026-01-31\n")
    config = parse_config([*REQUIRED, "--config", str(file)])
    assert (config.run_name, config.lora) == ("2026-01-31", {"r": 8})
    file.write_text("model: base\nlora: {<<: {r: 8, alpha: 4}, alpha: 16}\n")
    assert parse_config([*REQUIRED[2:], "--config", str(file)]).lora == {"r": 8, "alpha": 16}

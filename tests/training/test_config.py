from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import PAIRS, TINY

from training.config import InputError, TrainConfig, parse_config
from training.train import main

ROOT = Path(__file__).parents[2]
REQUIRED = ["--model", "m", "--train_data", "d.jsonl", "--output_dir", "out"]


def test_help_of_the_module_fits_one_screen_and_names_every_option():
    run = subprocess.run(
        [sys.executable, "-m", "training.train", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    lines = run.stdout.splitlines()
    assert len(lines) <= 60 and max(map(len, lines)) <= 120
    for field in dataclasses.fields(TrainConfig):
        (line,) = (line for line in lines if f"--{field.name} " in line)
        shown = {True: "true", False: "false"}[field.default] if isinstance(field.default, bool) else field.default
        assert line.endswith(f" [{shown}]") == (field.default not in (None, "")), line


def test_command_line_wins_over_yaml_and_types_are_converted(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: {hidden_size: 8, num_hidden_layers: 3}\nlearning_rate: 1e-4\nbeta: 0.5\noutput_dir: a\n")
    words = "--train_data=d.jsonl --model.hidden_size 16 --beta 0.2 --conditioned=false".split()
    config = parse_config(["--config", str(file), *words])
    assert config.model == {"hidden_size": 16, "num_hidden_layers": 3}
    assert (config.learning_rate, config.beta, config.conditioned) == (1e-4, 0.2, False)


def test_resolved_config_reads_back_equal(tmp_path):
    config = parse_config([*REQUIRED, "--objective", "simpo", "--gamma", "0.5", "--max_steps", "7", "--resume", "auto"])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml())
    assert parse_config(["--config", str(file)]) == config


def test_tiny_yaml_is_valid_and_needs_only_data():
    config = parse_config(["--config", str(ROOT / "training/configs/tiny.yaml"), "--train_data", str(PAIRS)])
    assert isinstance(config.model, dict)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--betaa", "1"], "--betaa; did you mean 'beta'"),
        (["--learning_rat=1"], "--learning_rat; did you mean 'learning_rate'"),
        (["--objective", "simp"], "unknown objective 'simp'; did you mean 'simpo'"),
        (["--objective", "simpo", "--tau", "0.1"], "'simpo' takes no 'tau'"),
        (["--beta", "much"], '"beta".*much'),
        (["--max_steps", "2.5"], '"max_steps".*2.5'),
        (["--truncation", "cut"], '"truncation".*prompt_left'),
        (["--beta", "-1"], "beta must be positive, got -1.0"),
        (["--max_steps", "0"], "max_steps=0: must be at least 1"),
        (["--learning_rate", "nan"], "learning_rate.*nan"),
        (["--warmup", "100"], "warmup=100.0: is a share"),
        (["--conditioned", "false", "--marginal_weight", "1"], "marginal_weight needs conditioned=true"),
        (["--conditioned", "false", "--objective", "orpo", "--sft", "marginal"], "needs conditioned=true"),
        (["--reference_conditioned", "true", "--marginal_weight", "1"], "reference_conditioned needs"),
        (["--reference_conditioned", "true", "--objective", "simpo"], "'simpo' has no reference"),
        (["--output_dir", "null", "--save_every", "3"], "need an output_dir"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        parse_config([*REQUIRED, *arguments])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("beat: 0.1\n", "c.yaml: beat; did you mean 'beta'"),
        ("objective: dpoo\n", "did you mean 'dpo'"),
        ("beta: [1\n", "c.yaml: .*line 2"),
        ("just words\n", "c.yaml: must hold lines of the form"),
        ("max_steps: soon\n", "max_steps"),
    ],
)
def test_bad_yaml_is_named(tmp_path, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        parse_config([*REQUIRED, "--config", str(file)])


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
    assert capsys.readouterr().err.strip() == "error: unknown option --betaa; did you mean 'beta'?"


def test_plain_orpo_fits_the_chosen_response():
    assert TrainConfig(objective="orpo", conditioned=False).make_objective().sft == "chosen"
    assert TrainConfig(objective="orpo").make_objective().sft == "marginal"

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import yaml
from helpers import PAIRS, TINY, options, write_jsonl
from transformers import BloomConfig, Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from training.config import TrainConfig
from training.errors import InputError
from training.model import byte_tokenizer
from training.options import parse_config
from training.output import locked
from training.train import dry_run, main

CONFIGS = Path(__file__).parents[2] / "training/configs"
# The architecture options in the hub's config.json of each model, and published parameter counts.
ARCHITECTURES = {
    "llama-3-8b": (
        8_030_261_248,
        LlamaConfig(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=8192,
        ),
    ),
    "mistral-7b": (
        7_241_732_096,
        MistralConfig(
            vocab_size=32000,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            max_position_embeddings=32768,
            sliding_window=4096,
        ),
    ),
    "gemma-2-9b": (
        9_241_705_984,
        Gemma2Config(
            vocab_size=256000,
            hidden_size=3584,
            intermediate_size=14336,
            num_hidden_layers=42,
            num_attention_heads=16,
            num_key_value_heads=8,
            head_dim=256,
            query_pre_attn_scalar=256,
            max_position_embeddings=8192,
        ),
    ),
    "qwen3-8b": (
        8_190_735_360,
        Qwen3Config(
            vocab_size=151936,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=36,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        ),
    ),
}


def planned(config):
    said = []
    dry_run(config, said.append)
    return "\n".join(said)


def words_of(name, folder, *more):
    """Return the command line of a configuration whose model lies in ``folder``, without weights."""
    ARCHITECTURES[name][1].save_pretrained(folder)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{%- if enable_thinking %}{%- endif %}" + tokenizer.chat_template  # Qwen3's switch
    tokenizer.save_pretrained(folder)
    given = ["--model", str(folder), "--train_data", str(PAIRS), "--eval_data", str(PAIRS), *more]
    return ["--config", str(CONFIGS / f"{name}.yaml"), *given]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_configurations_of_real_models_hold_without_their_weights(name, tmp_path):
    count, architecture = ARCHITECTURES[name]
    config = parse_config(words_of(name, tmp_path))
    said = planned(config)
    assert f"{count / 1e6:,.2f}M parameters, in float32" in said
    assert f"output head of {architecture.vocab_size} x {architecture.hidden_size}" in said
    assert ("(tied)" in said) == (name == "gemma-2-9b")
    assert "has no weights; a run needs them" in said and "24 pairs read, 24 kept" in said
    assert "DPO(beta=0.1" in said and "each response given the other" in said
    assert f"parameters {4 * count / 2**30:.2f}" in said and f"parameters {4 * count / 2**30 / 8:.2f}" in said
    assert (config.per_device_train_batch_size, config.num_train_epochs, config.learning_rate, config.warmup_steps) == (
        16,
        1,
        5e-7,
        0.1,
    )


def test_configurations_name_known_models_and_their_sources():
    files = {file.stem: file.read_text() for file in CONFIGS.glob("*.yaml")}
    assert files.keys() == {*ARCHITECTURES, "tiny"}
    for name in ARCHITECTURES:
        written = yaml.safe_load(files[name])
        assert parse_config(["--config", str(CONFIGS / f"{name}.yaml")]).model == written["model"]
        assert "this project's" in files[name] and "Not yet run" in files[name]
        assert f"--config training/configs/{name}.yaml" in files[name]


def test_lora_of_a_real_model_is_counted(tmp_path):
    said = planned(parse_config(words_of("llama-3-8b", tmp_path, "--lora.r", "16")))
    # Of each layer: q, o 4096 to 4096; k, v to 1024; gate, up to 14336, down from it.
    adapter = 32 * 16 * (2 * 8192 + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert f"{adapter / 1e6:,.2f}M of them trained (LoRA)" in said and adapter == 41_943_040
    assert f"gradients {4 * adapter / 2**30:.2f} + optimizer {8 * adapter / 2**30:.2f}" in said


def test_main_plans_and_writes_nothing(tmp_path, capsys):
    model = [word for name, value in TINY.items() for word in (f"--model.{name}", str(value))]
    out = tmp_path / "out"
    main(
        [
            *model,
            "--train_data",
            str(PAIRS),
            "--eval_data",
            str(PAIRS),
            "--output_dir",
            str(out),
            "--per_device_train_batch_size",
            "5",
            "--dry_run",
            "true",
        ]
    )
    printed = capsys.readouterr().out
    assert "train_data: 24 pairs read, 24 kept" in printed and "5 steps of 5 pairs" in printed
    assert "24 of 24 eval_data pairs have a prompt of train_data" in printed
    assert not out.exists()


def test_a_dry_run_checks_folders_and_trackers(tmp_path, capsys):
    done, unfinished, file = tmp_path / "done", tmp_path / "unfinished", tmp_path / "file"
    main(options(done, "--save_steps", "2", "--eval_data", str(PAIRS)))
    shutil.copytree(done, unfinished, ignore=shutil.ignore_patterns("final"))
    (unfinished / "checkpoint-9.partial").mkdir()
    file.write_text("")
    one = write_jsonl(tmp_path / "one.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    auto = ["--resume_from_checkpoint", "auto"]
    for out, more, message in (
        (done, [], "holds a finished run; continue it"),
        (unfinished, [], "unfinished run with checkpoint-3; continue it with --resume_from_checkpoint auto"),
        (unfinished, [*auto, "--seed", "7"], "seed was 42, is 7"),
        (unfinished, [*auto, "--eval_data", one], "eval_data holds something else"),
        (unfinished, [*auto, "--max_steps", "1", "--resume_changed", "true"], "is of step 3, but the run has 1 steps"),
        (file, [], "not a folder"),
        (tmp_path / "new", ["--report_to", "trackio"], "pip install trackio"),
    ):
        before = sorted(tmp_path.rglob("*"))
        for dry in ("true", "false"):
            assert sorted(tmp_path.rglob("*")) == before
            with pytest.raises(SystemExit, match="2"):
                main(options(out, "--eval_data", str(PAIRS), *more, "--dry_run", dry))
            assert message in capsys.readouterr().err, (message, dry)
    main(options(unfinished, "--eval_data", str(PAIRS), *auto, "--dry_run", "true"))
    assert f"continues from {unfinished / 'checkpoint-3'} after step 3" in capsys.readouterr().out
    assert (unfinished / "checkpoint-9.partial").is_dir()
    main(options(unfinished, "--eval_data", str(PAIRS), *auto))
    assert not list(unfinished.glob("*.partial"))


def test_a_folder_with_data_is_checked_in_full(tmp_path):
    LlamaConfig(vocab_size=259, max_position_embeddings=64, **TINY).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    messages = {"prompt": [{"role": "user", "content": "a"}]} | {
        name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "b"), ("rejected", "c"))
    }
    common = {"model": str(tmp_path), "train_data": write_jsonl(tmp_path / "d.jsonl", [messages])}
    # "<bos>user: a\nassistant: ", "b<eos>", "c<eos>"
    assert "a pair has 24 tokens on average, the longest 24" in planned(TrainConfig(**common))
    for given, message in (
        ({"alternative": "chat", "alternative_instruction": "x" * 60}, "model 64 positions"),
        ({"max_length": 9}, "d.jsonl:1.*more than max_length=9"),
        ({"train_data": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file"),
        ({"train_data": str(PAIRS), "alternative": "chat"}, "pairs.jsonl:1: holds strings"),
        ({"eval_data": write_jsonl(tmp_path / "e.jsonl", [{"prompt": "a"}])}, "e.jsonl:1: 'chosen' is missing"),
        ({"model": str(tmp_path / "none")}, "none': no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            planned(TrainConfig(**{**common, **given}))


def test_any_architecture_is_planned_without_weights(tmp_path):
    config = BloomConfig(hidden_size=8, n_layer=1, n_head=2)
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"its tokenizer .* could not be loaded"):  # nor could a run
        planned(TrainConfig(model=str(tmp_path), train_data=str(PAIRS)))
    byte_tokenizer().save_pretrained(tmp_path)
    assert f"output head of {config.vocab_size} x 8" in planned(TrainConfig(model=str(tmp_path), train_data=str(PAIRS)))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lr_scheduler_type cosine_with_min_lr", "One of min_lr or min_lr_rate"),
        ("--lr_scheduler_kwargs {nope:1}", "unexpected keyword argument 'nope'"),
        ("--lr_scheduler_type warmup_stable_decay", "num_decay_steps"),
        ("--optim adamw_bnb_8bit", "install `bitsandbytes`"),
        ("--optim galore_adamw --optim_target_modules all-linear", "install `galore_torch`"),
        ("--optim_args nonsense", "optim=adamw_torch"),
        ("--adam_beta1 1.5", "Invalid beta parameter"),
        ("--adam_epsilon -1", "Invalid epsilon value"),
    ],
)
def test_optimizers_and_schedules_are_tried_before_step_one(tmp_path, capsys, words, message):
    for dry in ("true", "false"):
        given = [word.replace(":", ": ") for word in words.split()]
        with pytest.raises(SystemExit, match="2"):
            main(options(tmp_path / "out", *given, "--dry_run", dry))
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out" / "config.yaml").exists()


def test_unusable_output_folders_are_refused(tmp_path, capsys):
    busy = tmp_path / "busy"
    for dry in ("true", "false"):
        with locked(busy), pytest.raises(SystemExit, match="2"):
            main(options(busy, "--dry_run", dry))
        assert "another run is writing there" in capsys.readouterr().err
        with pytest.raises(SystemExit, match="2"):
            main(options(PAIRS / "out", "--dry_run", dry))
        assert f"cannot be written to (not a folder: {PAIRS})" in capsys.readouterr().err
        (link := tmp_path / f"link_{dry}").symlink_to(tmp_path / "gone/out")
        with pytest.raises(SystemExit, match="2"):
            main(options(link, "--dry_run", dry))
        assert f"cannot be written to (not a folder: {link})" in capsys.readouterr().err

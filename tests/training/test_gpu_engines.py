"""What only a GPU can show of the training loop, on a tiny model against the plain run of the same command.

Precisions, attention kernels, optimizers of bitsandbytes, quantised bases, FSDP2 and DeepSpeed through accelerate in
one process, and resuming.

    python -m pytest tests/training/test_gpu_engines.py -n 12
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import PAIRS, metrics, options, tiny_model
from safetensors.torch import load_file

from training import generate
from training.model import byte_tokenizer
from training.train import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs"
COMPARED = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
EXACT, ROUNDED = 1e-3, 1e-1  # relative differences: order of additions, and bfloat16
LORA = ("--lora.r", "4", "--learning_rate", "1e-2")
CHECKPOINTING = ("--activation_checkpointing", "true")
BF16 = ("--bf16", "true")

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: precisions, engines and quantised bases are NOT tested on one"
)


def need(package: str) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: it is NOT tested")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose log-probs depend on all that it attends to; flex_attention needs heads of 16."""
    folder = tmp_path_factory.mktemp("model")
    fields = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tiny_model(initializer_range=0.2, **fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def command(model: Path, out: Path, *more: str) -> list[str]:
    """Four steps of eight pairs in several passes each, and a checkpoint after every second step."""
    run = "--max_steps 4 --logging_steps 1 --save_steps 2 --per_device_train_batch_size 8 --max_batch_tokens 400"
    given = {"--max_steps": "4", "--learning_rate": "1e-3", **dict(zip(run.split()[::2], run.split()[1::2]))}
    given |= dict(zip(more[::2], more[1::2]))
    kept = ("--train_data", str(PAIRS), "--output_dir", str(out), "--sample_prompts", "1", "--sample_tokens", "4")
    assert set(kept[::2]) <= set(options(out))
    return ["--model", str(model), *kept, *(word for option in given.items() for word in option)]


def figures(out: Path) -> list[float]:
    found = [row[name] for row in metrics(out) if "loss" in row for name in COMPARED]
    print(out.name, found)  # shown if the test fails, or by -rA
    return found


@pytest.fixture(scope="session")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory):
    """Returns the figures of a run in this process with the given options; each is run once."""
    known: dict[tuple[str, ...], list[float]] = {}

    def run(*more: str) -> list[float]:
        if more not in known:
            out = tmp_path_factory.mktemp("plain")
            main(command(model, out, *more))
            known[more] = figures(out)
        return known[more]

    return run


def resumed(out: Path) -> Path:
    """A copy of the run ``out`` as it was after its second step."""
    again = out.with_name(f"{out.name}_again")
    return shutil.copytree(out, again, ignore=shutil.ignore_patterns("final", "checkpoint-4"))


def environment() -> dict[str, str]:
    paths = [str(ROOT), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def call(*arguments: str, status: int = 0) -> None:
    ran = subprocess.run(
        [sys.executable, *arguments], env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=280
    )
    said = ran.stdout + ran.stderr
    assert ran.returncode == status, said[max(said.find("Traceback"), 0) :][:6000] or said[-6000:]


# --- Engines ---


def launch(engine: str, folder: Path, words: list[str]) -> None:
    """Train in one process of accelerate's launcher, with the shipped configuration of ``engine``."""
    if engine == "fsdp2":
        file = CONFIGS / "accelerate/fsdp2_8gpu.yaml"
    else:
        settings = CONFIGS / f"deepspeed_{engine}.json"
        words = [*words, "--deepspeed", str(settings)]
        text = (CONFIGS / "accelerate/deepspeed_8gpu.yaml").read_text()
        file = folder / "launch.yaml"
        file.write_text(text.replace("training/configs/deepspeed_zero2.json", str(settings)))
    port = ("--main_process_port", str(20000 + os.getpid() % 20000))  # of this pytest worker
    how = ("--config_file", str(file), "--num_processes", "1", *port)
    call("-m", "accelerate.commands.launch", *how, "-m", "training.train", *words)


@pytest.mark.parametrize(
    ("engine", "more", "tolerance"),
    [
        ("fsdp2", (), EXACT),
        ("zero3", (), EXACT),
        ("zero2", (), EXACT),
        ("fsdp2", (*BF16, *CHECKPOINTING, *LORA), ROUNDED),
        ("zero3", (*BF16, *CHECKPOINTING, *LORA), ROUNDED),
    ],
    ids=["fsdp2", "zero3", "zero2", "fsdp2-bf16-lora", "zero3-bf16-lora"],
)
def test_an_engine_computes_and_resumes_what_a_plain_process_does(engine, more, tolerance, model, plain, tmp_path):
    if engine != "fsdp2":
        need("deepspeed")
    out = tmp_path / "engine"
    launch(engine, tmp_path, command(model, out, *more))
    assert figures(out) == pytest.approx(plain(*more), rel=tolerance, abs=tolerance / 10)
    shapes = {name: tensor.shape for name, tensor in weights(out).items()}
    assert shapes and all(math.prod(shape) for shape in shapes.values())

    again = resumed(out)
    launch(engine, tmp_path, command(model, again, *more, "--resume_from_checkpoint", "auto"))
    assert figures(again) == pytest.approx(figures(out), rel=EXACT, abs=EXACT / 10)
    found, expected = weights(again), weights(out)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-4)


def weights(out: Path) -> dict[str, torch.Tensor]:
    """The weights in final/, of the model or of its adapter."""
    return load_file(next((out / "final").glob("*.safetensors")))


# --- One GPU without an engine ---

RUNS = {
    "rows": (("--layout", "rows"), EXACT),
    "eager trees": (("--attn_implementation", "eager", "--layout", "tree"), EXACT),
    "flex_attention": (("--attn_implementation", "flex_attention", "--layout", "tree"), EXACT),
    "activation checkpointing": (CHECKPOINTING, EXACT),
    "lora": (LORA, None),
    "bf16": (BF16, ROUNDED),
    "bf16 with checkpointing": ((*BF16, *CHECKPOINTING), ROUNDED),
    "bf16 flex_attention": ((*BF16, *CHECKPOINTING, "--attn_implementation", "flex_attention"), ROUNDED),
    "bfloat16": (("--dtype", "bfloat16"), ROUNDED),
    "adamw_torch": (("--optim", "adamw_torch"), EXACT),
    "adamw_bnb_8bit": (("--optim", "adamw_bnb_8bit"), ROUNDED),
    "paged_adamw_8bit": (("--optim", "paged_adamw_8bit"), ROUNDED),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_computes_and_resumes_what_the_plain_one_does(name, model, plain, tmp_path, capsys):
    more, tolerance = RUNS[name]
    if "8bit" in name:
        need("bitsandbytes")
    out = tmp_path / "run"
    main(command(model, out, *more))
    said = capsys.readouterr().out
    assert "on cuda" in said and "layout: rows, because" not in said and "WARNING" not in said, said
    if tolerance:
        assert figures(out) == pytest.approx(plain(), rel=tolerance, abs=tolerance / 10)
    again = resumed(out)
    main(command(model, again, *more, "--resume_from_checkpoint", "auto"))
    assert figures(again) == pytest.approx(figures(out), rel=EXACT, abs=EXACT / 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_a_quantised_base_trains_an_adapter_that_resumes(bits, dtype, model, tmp_path, capsys):
    need("bitsandbytes")
    more = ("--quantization", bits, "--dtype", dtype, "--conditioned", "false", *LORA, *CHECKPOINTING)
    out = tmp_path / "run"
    main(command(model, out, *more))
    losses = [row["loss"] for row in metrics(out) if "loss" in row]
    assert losses[0] == pytest.approx(math.log(2), abs=2e-2) and losses[-1] < losses[0], losses
    again = resumed(out)
    main(command(model, again, *more, "--resume_from_checkpoint", "auto"))
    assert figures(again) == pytest.approx(figures(out), rel=EXACT, abs=EXACT / 10)
    found, expected = weights(again), weights(out)
    assert found.keys() == expected.keys() and any(tensor.any() for name, tensor in found.items() if "lora_B" in name)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-4)
    capsys.readouterr()
    generate.main(["--model", str(out / "final"), "--prompt", "Why?", "--max_new_tokens", "4"])
    assert capsys.readouterr().out


def test_a_killed_run_resumes_with_the_same_figures(model, plain, tmp_path):
    out = tmp_path / "killed"
    patch = ["training.resumable.save_checkpoint", 2, "before"]
    code = f"import killed; killed.run({command(model, out)!r}, {patch!r}, None)"
    call("-c", code, status=-signal.SIGKILL)
    assert (out / "checkpoint-2").is_dir() and not (out / "checkpoint-4").exists() and not (out / "final").exists()
    main(command(model, out, "--resume_from_checkpoint", "auto"))
    assert figures(out) == pytest.approx(plain(), rel=EXACT, abs=EXACT / 10)

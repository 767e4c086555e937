"""Compare two real processes (gloo, CPU) with one: their results, and how they end together."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env
from forked_ranks import run_ranks
from helpers import PAIRS, metrics, options, tiny_model, token_pairs
from torch import nn

from training.adapters import add_lora
from training.config import TrainConfig
from training.engine import checkpointed
from training.errors import InputError
from training.train import main, train

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "training" / "configs" / "accelerate"


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do all runs one after the other in two processes, because starting processes takes longer than the runs."""
    folder = tmp_path_factory.mktemp("two")
    codes = run_ranks(processes.__file__, folder, timeout=900)
    (folder / "exit").write_text(repr(codes))
    missing = [name for name in (*processes.RUNS, *processes.FAILURES) if not (folder / f"{name}.0.pt").exists()]
    assert not missing, (folder / "output.0").read_text()[-3000:]
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Do the same runs in this process."""
    return {name: processes.run(name, tmp_path_factory.mktemp("one")) for name in processes.RUNS}


def of_two(two: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(two / f"{name}.{rank}.pt") for rank in range(2)]


def timeless(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of metrics without clock- and machine-dependent values, with the ends of intervals separated."""
    kept = [{name: row[name] for name in row if name.startswith(KEPT)} for row in rows]
    for row in kept:
        for name, value in list(row.items()):
            if isinstance(value, list):
                row |= {f"{name} {end}": value[end] for end in range(2)}
                del row[name]
    return kept


KEPT = ("step", "epoch", "loss", "rewards", "logps", "marginal", "eval", "grad_norm", "learning_rate", "num_tokens")


# In float32 the order of sums changes the last bits. Seen: 2e-7 of a gradient's largest entry in the first step, up to
# 1e-6 in later ones; margins and logps within 4e-6 nats (one unit in the last place at 50 nats). A mean of the
# processes' means would be off by a tenth of the loss in the ragged steps.
@pytest.mark.parametrize("name", [name for name in processes.RUNS if name != "bf16"])
def test_two_processes_equal_one(one: dict[str, dict[str, Any]], two: Path, name: str) -> None:
    first, second = of_two(two, name)
    expected = one[name]
    assert timeless(first["metrics"]) == timeless(second["metrics"])
    rows, expected_rows = timeless(first["metrics"]), timeless(expected["metrics"])
    assert len(rows) == 4 + 3  # training, and evaluation before, half-way and at the end
    for row, other in zip(rows, expected_rows, strict=True):
        assert row == pytest.approx(other, rel=1e-6, abs=1e-5)
    for got, wanted in zip(first["gradients"], expected["gradients"], strict=True):
        assert got.keys() == wanted.keys()
        atol = 5e-6 * max(gradient.abs().max().item() for gradient in wanted.values())
        for parameter in wanted:
            torch.testing.assert_close(got[parameter], wanted[parameter], rtol=0, atol=atol, msg=parameter)
    untrained = tiny_model(**{k: v for k, v in processes.RUNS[name].items() if k in processes.MODEL_FIELDS})
    if lora := processes.RUNS[name].get("lora"):
        add_lora(untrained, lora, 0)
    start = untrained.state_dict()
    assert first["weights"].keys() == expected["weights"].keys()
    moved, apart = (
        math.sqrt(sum((a[k] - b[k]).square().sum().item() for k in expected["weights"]))
        for a, b in ((expected["weights"], start), (expected["weights"], first["weights"]))
    )
    assert apart < 5e-5 * moved and moved > 0.1


def test_bf16_matmuls_keep_float64_sums_and_weights(one: dict[str, dict[str, Any]], two: Path) -> None:
    """Sums and references stay float64 throughout."""
    first, _ = of_two(two, "bf16")
    assert {tensor.dtype for tensor in first["weights"].values()} == {torch.float32}
    assert {gradient.dtype for step in first["gradients"] for gradient in step.values()} == {torch.float32}
    for row, expected in zip(timeless(first["metrics"]), timeless(one["bf16"]["metrics"]), strict=True):
        for key in ("loss", "eval_loss", "logps/chosen", "marginal/logps/rejected"):
            if key in expected:
                assert row[key] == pytest.approx(expected[key], rel=2e-3)
    # Before step 1 the reference is the policy: rounded to bfloat16, it would be off by 0.1 nats.
    assert abs(first["metrics"][0]["eval_marginal/rewards/margins"]) < 1e-4


@pytest.mark.parametrize(
    ("name", "messages"),
    [
        ("nan", ["NonFiniteError: step 1: loss nan.*cause it: train_data pair 4\\."] * 2),
        ("other_pairs", ["InputError: model or data in process 1 differ"] * 2),
        ("other_weights", ["InputError: model or data in process 1 differ"] * 2),
        ("one_fails", ["OSError: in process 1: the disk of process 1", "OSError: the disk of process 1"]),
        (
            "bad_data_in_one",
            ["InputError: in process 1: train_data pair 2: token id 999", "InputError: train_data pair 2"],
        ),
        ("occupied_folder", ["InputError: .*output_dir .* holds a finished run"] * 2),
    ],
)
def test_an_error_in_one_process_fails_all(two: Path, name: str, messages: list[str]) -> None:
    for outcome, message in zip(of_two(two, name), messages, strict=True):
        assert re.match(message, outcome["error"]), outcome["error"]


def test_no_process_waits_for_one_that_crashed(two: Path) -> None:
    assert "0" not in re.findall(r"\d+", (two / "exit").read_text())
    assert "MemoryError: only in process 1" in (two / "output.1").read_text()


ENDING = """
import atexit, sys
import torch.distributed as dist
from training.engine import end_processes
atexit.register(print, "the interpreter ends")
if sys.argv[1] == "several":
    dist.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=0, world_size=1)
print("all done")
end_processes(3)
"""


@pytest.mark.sweep
@pytest.mark.parametrize(("of", "status", "said"), [("several", 3, ""), ("one", 0, "the interpreter ends\n")])
def test_gloo_threads_end_before_the_interpreter(tmp_path: Path, of: str, status: int, said: str) -> None:
    """Otherwise they abort the process, in about one of thirty runs on a busy machine."""
    command = [sys.executable, "-c", ENDING, of, str(tmp_path / "store")]
    run = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stdout) == (status, f"all done\n{said}"), run.stderr


@pytest.mark.parametrize("name", processes.SHARDED)
def test_a_sharded_module_computes_the_same(two: Path, name: str, tmp_path: Path) -> None:
    first, second = of_two(two, f"sharded {name}")
    expected = processes.sharded(name, tmp_path)
    low = name == "bf16"  # FSDP2 gathers bfloat16 weights, here they are float32
    torch.testing.assert_close(first["logps"], expected["logps"], rtol=1e-2 if low else 1e-6, atol=1e-5)
    # The engine rounds to bfloat16 neither log-probs nor references: untrained, all pairs have their margin of 0.
    assert first["steps"][0]["loss"].item() == pytest.approx(expected["steps"][0]["loss"].item(), rel=1e-6)
    for got, again, wanted in zip(first["steps"], second["steps"], expected["steps"], strict=True):
        assert got.keys() == wanted.keys() and all(torch.equal(got[key], again[key]) for key in got)
        assert got["loss"].item() == pytest.approx(wanted["loss"].item(), rel=1e-2 if low else 1e-6)
        largest = max(wanted[key].abs().max().item() for key in wanted if key != "loss")
        for key in got.keys() - {"loss"}:
            assert got[key].dtype == torch.float32 or key == "loss"
            atol = largest * (0.1 if low else 5e-6)
            torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=atol, msg=key)


@pytest.mark.sweep
def test_accelerate_launch_runs_two_processes(tmp_path: Path) -> None:
    more = ("--max_batch_tokens", "400", "--logging_steps", "1", "--eval_data", str(PAIRS))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "ddp_8gpu.yaml")]
    program = ["-m", "training.train", *options(tmp_path / "two", *more, "--per_device_train_batch_size", "4")]
    run = subprocess.run(
        [*launch, "--num_processes", "2", *program],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    assert "2 processes" in run.stdout
    assert run.stdout.count("24 pairs read, 24 kept") == 2  # training and held out: one process speaks
    main(options(tmp_path / "one", *more, "--per_device_train_batch_size", "8"))
    for row, expected in zip(*(timeless(metrics(tmp_path / name)) for name in ("two", "one")), strict=True):
        assert row == pytest.approx(expected, rel=1e-6, abs=1e-4)  # sums of 300 nats


@pytest.mark.parametrize("name", ["one_gpu", "ddp_8gpu", "fsdp2_8gpu", "deepspeed_8gpu"])
def test_accelerate_takes_the_ready_configurations(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = CONFIGS / f"{name}.yaml"
    monkeypatch.setattr("torch.cuda.device_count", lambda: 8)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    given = launch_command_parser().parse_args(["--config_file", str(file), "-m", "training.train"])
    arguments, _, _ = _validate_launch_command(given)
    assert arguments.num_processes == (1 if name == "one_gpu" else 8)
    assert arguments.use_fsdp == (name == "fsdp2_8gpu") and not arguments.use_cpu
    assert arguments.use_deepspeed == (name == "deepspeed_8gpu")
    assert arguments.multi_gpu == (name == "ddp_8gpu")
    if name == "fsdp2_8gpu":
        found = prepare_multi_gpu_env(arguments)
        assert (found["ACCELERATE_USE_FSDP"], found["FSDP_VERSION"]) == ("true", "2")
        assert found["FSDP_STATE_DICT_TYPE"] == "SHARDED_STATE_DICT"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision=bf16, but bf16=False; set 'no' there"),
        ({"ACCELERATE_USE_FSDP": "true"}, "FSDP needs GPUs"),
    ],
)
def test_launches_that_would_do_something_else_are_refused(
    given: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        TrainConfig()


class Counter:
    def __init__(self, model: nn.Module) -> None:
        self.forwards = 0
        for layer in model.model.layers:
            layer.mlp.register_forward_pre_hook(self)  # computing again stops within the last part

    def __call__(self, *_: Any) -> None:
        self.forwards += 1


def test_checkpointing_computes_each_layer_again_and_changes_nothing() -> None:
    results = {}
    for enabled in (False, True):
        model = tiny_model(num_hidden_layers=3, attention_dropout=0.5)  # on, it would change the loss
        counter = Counter(model)
        config = TrainConfig(max_steps=2, learning_rate=1e-3, logging_steps=1, activation_checkpointing=enabled)
        result = train(config, token_pairs(), model=model, quiet=True)
        assert not any("forward" in vars(part) for part in model.modules())
        results[enabled] = counter.forwards, timeless(result.metrics), model.state_dict()
    assert results[True][0] == results[False][0] + 2 * 3  # two steps, three layers; scoring keeps nothing anyway
    assert results[True][1] == results[False][1]
    assert all(torch.equal(results[True][2][name], tensor) for name, tensor in results[False][2].items())


def test_checkpointing_keeps_forwards_replaced_by_hooks() -> None:
    layer = nn.Linear(2, 2)
    replacement = lambda x: 2 * x  # noqa: E731
    layer.forward = replacement  # type: ignore[method-assign]
    with checkpointed([layer]):
        assert layer(torch.ones(2, requires_grad=True)).tolist() == [2, 2]
    assert layer.forward is replacement

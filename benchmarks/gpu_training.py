"""Run the GPU benchmark's steps that use the loss as training does: autocast, statistics, trees, a whole run."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import inspo_kernels as ik

from .batches import ModelShape, PairBatch, dtype_of
from .contenders import BETA, ours
from .gpu_plan import Plan
from .gpu_processes import run_in_group
from .harness import compared, reason, seconds_behind_work, spread
from .measure import TRAIN, products_of

Rows = Iterator[tuple[str, dict[str, Any]]]
STATISTICS = ("entropy", "mean_logit", "is_top1", "logsumexp")


# --- autocast and marginals ---


def autocast(batch: PairBatch, rounds: int, seconds: float) -> Rows:
    """Loss and gradients of float32 hidden states and weights under bfloat16 autocast, beside bfloat16 matmuls.

    Marginals are the same rows once more, scored given the prompt alone: monitored (weight 0) or part of the loss.
    """
    device = batch.hidden.device
    hidden, weight = batch.hidden.float(), batch.weight.float()
    pairs = len(batch.ref_logps) // 2
    twice = torch.cat([batch.segment_ids, batch.segment_ids + 2 * pairs])
    forms: dict[str, tuple[Tensor, Tensor, Tensor, float]] = {
        "autocast": (hidden, batch.targets, batch.segment_ids, 0.0),
        "autocast, marginals monitored": (torch.cat([hidden] * 2), batch.targets.repeat(2), twice, 0.0),
        "autocast, marginals in the loss": (torch.cat([hidden] * 2), batch.targets.repeat(2), twice, 0.5),
    }

    def step(x: Tensor, labels: Tensor, segment_ids: Tensor, marginal_weight: float, accumulated: int = 1) -> None:
        leaf, head = x.detach().requires_grad_(), weight.detach().requires_grad_()
        for _ in range(accumulated):
            with torch.autocast(device.type, torch.bfloat16):
                out = ik.fused_inspo_loss(
                    leaf,
                    head,
                    labels,
                    segment_ids=segment_ids,
                    num_pairs=pairs,
                    ref_logps=batch.ref_logps,
                    objective=ik.DPO(beta=BETA),
                    marginal_weight=marginal_weight,
                    softcap=batch.softcap,
                )
            out.loss.backward()

    runs: dict[str, Callable[[], Any]] = {"floor": products_of(batch, TRAIN)}
    runs |= {name: partial(step, *form) for name, form in forms.items()}
    runs["autocast, 4 micro-batches: 12 matmuls"] = partial(step, *forms["autocast"], accumulated=4)
    yield from compared(runs, "floor", str(device), rounds, seconds=seconds / 2, clock=seconds_behind_work).items()


# --- statistics ---


def statistics(batch: PairBatch, rounds: int, seconds: float) -> Rows:
    """Log-probs and loss with and without entropy and the other statistics of the same pass."""

    def log_probs(**options: Any) -> None:
        with torch.no_grad():
            ik.linear_logps(batch.hidden, batch.weight, batch.targets, softcap=batch.softcap, **options)

    def loss(**options: Any) -> None:
        hidden, weight = batch.hidden.detach().requires_grad_(), batch.weight.detach().requires_grad_()
        value, _ = ours("auto", **options)(hidden, weight, batch)
        value.backward()

    device = str(batch.hidden.device)
    for what, run in (("log-probs", log_probs), ("loss", loss)):
        runs: dict[str, Callable[[], Any]] = {"plain": run, "statistics": partial(run, statistics=STATISTICS)}
        rows = compared(runs, "plain", device, rounds, seconds=seconds / 4, clock=seconds_behind_work)
        yield from ((f"{what}, {name}", row) for name, row in rows.items())


# --- trees ---


def trees(plan: Plan, device: torch.device, seconds: float) -> Rows:
    """Forward and backward of a llama over conditioned pairs: rows, and trees with either attention."""
    prompt, response = plan.tree_lengths
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(3, plan.tree_model.vocab, (count,), generator=generator).tolist()

    examples = [tuple(map(ids, (prompt, response, response))) for _ in range(plan.tree_pairs)]
    runs: dict[str, Callable[[], Any]] = {}
    for layout, attention in (("rows", "sdpa"), ("tree", "sdpa"), ("packed_tree", "flex_attention")):
        name = f"{layout}, {attention}".replace("packed_tree", "packed tree")
        if attention == "flex_attention" and device.type != "cuda":
            yield name, {"status": "needs a GPU"}
            continue
        try:
            runs[name] = tree_run(plan.tree_model, examples, layout, attention, device)
        except Exception as error:
            yield name, {"status": reason(error)}
    yield from compared(runs, "rows, sdpa", str(device), 5, seconds=seconds / 3, clock=seconds_behind_work).items()


def tree_run(
    shape: ModelShape, examples: list[tuple[list[int], ...]], layout: str, attention: str, device: torch.device
) -> Callable[[], None]:
    """Return one step, forward and backward, of a random llama over the pairs in a layout."""
    from .step_jobs import layout_loss, moved

    model = shape.build(dtype_of(device), device, attention)
    batch = moved(ik.condition_pairs(examples, pad_token_id=0, layout=layout), device)
    ref_logps = torch.zeros(2 * len(examples), device=device)

    def run() -> None:
        layout_loss(model, batch, ref_logps=ref_logps).loss.backward()
        model.zero_grad()

    return run


# --- a training run ---


def training_run(plan: Plan, device: torch.device, seconds: float) -> dict[str, Any]:
    """Train a random model on random pairs through the command line, and return the speed that its log shows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", plan.trained_model, device)
        config = write_training_config(folder, plan, device)
        command = [sys.executable, "-m", "training.train", "--config", str(config)]
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {})
        start, limit = time.perf_counter(), seconds - 5
        code = run_in_group(command, folder / "log", limit, environment)
        end_of_log = (folder / "log").read_text().strip().splitlines()[-5:]
        status = f"stopped after {limit:.0f} s" if code is None else "measured"
        if code:
            missing = re.fullmatch(r"ModuleNotFoundError: No module named '(\w+).*", "".join(end_of_log[-1:]))
            status = f"not available: {missing[1]} is not installed" if missing else f"failed: exit status {code}"
        result = {"status": status, "seconds": time.perf_counter() - start, **training_figures(folder / "run", plan)}
        if status != "measured":
            result["end_of_log"] = end_of_log
        return result


def save_model(folder: Path, shape: ModelShape, device: torch.device) -> None:
    """Save a random llama, made on the device, with a byte-level tokenizer."""
    from training.model import byte_tokenizer

    shape.build(dtype_of(device), device).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # leaves the memory to the run, which is another process


def write_training_config(folder: Path, plan: Plan, device: torch.device) -> Path:
    """Write pairs of random letters and the run's options; only here are the trainer's option names known."""
    generator = torch.Generator().manual_seed(0)
    prompt, response = plan.trained_lengths

    def text(count: int) -> str:
        return "".join(chr(97 + i) for i in torch.randint(26, (count,), generator=generator).tolist())

    pairs = [{"prompt": text(prompt), "chosen": text(response), "rejected": text(response)} for _ in range(128)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    on_gpu = device.type == "cuda"
    options = {
        "model": str(folder / "model"),
        "train_data": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "run"),
        "max_length": 4096,
        "max_steps": plan.training_steps,
        "per_device_train_batch_size": 8 if on_gpu else 2,
        "max_batch_tokens": 16384,
        "dtype": "float32",
        "bf16": on_gpu,
        "learning_rate": 1e-6,
        "logging_steps": max(1, plan.training_steps // 10),
        "keep_best": False,
        "save_strategy": "no",  # only the steps are measured
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(options))  # JSON is YAML
    return path


def training_figures(run: Path, plan: Plan) -> dict[str, Any]:
    """Read from its log the speed of a run's later half, when it is warm. Only this function knows the log's format.

    ``tflops``: matmuls with the weights, 6 operations per weight and token, without attention. A step's tokens are
    those of its trees; the head takes the scored tokens alone.
    """
    file = run / "metrics.jsonl"
    rows = [json.loads(text) for text in file.read_text().splitlines()] if file.exists() else []
    rows = [row for row in rows if "tokens_per_second" in row]
    later = rows[len(rows) // 2 :]
    found: dict[str, Any] = {"steps": rows[-1]["step"] if rows else 0}
    for name in ("tokens_per_second", "peak_memory_gib"):
        if values := [row[name] for row in later if name in row]:
            found[name] = spread(values)
    if "tokens_per_second" in found:
        shape, (prompt, response) = plan.trained_model, plan.trained_lengths
        projections = 2 * shape.hidden**2 * (1 + (shape.kv_heads or shape.heads) / shape.heads)
        body = shape.layers * (projections + 3 * shape.hidden * shape.intermediate)
        scored = 2 * response / (prompt + 4 * response)
        operations = 6 * (body + scored * shape.hidden * shape.vocab)
        found["tflops"] = operations * found["tokens_per_second"]["median"] / 1e12
    return found

"""Run the GPU benchmark's steps that use the loss as training does: autocast, statistics, trees, a whole run."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import inspo_kernels as ik

from .batches import ModelShape, PairBatch, dtype_of
from .contenders import Contender, ours
from .gpu_plan import Plan
from .harness import compared, reason, seconds_behind_work, spread
from .measure import TRAIN, products_of, step

Rows = Iterator[tuple[str, dict[str, Any]]]
STATISTICS = ("entropy", "mean_logit", "is_top1", "logsumexp")


# --- autocast and marginals ---


def autocast(batch: PairBatch, rounds: int, seconds: float) -> Rows:
    """Loss and gradients of float32 hidden states and weights under bfloat16 autocast, beside bfloat16 matmuls.

    Marginals are the same rows once more, scored given the prompt alone: monitored (weight 0) or part of the loss.
    """
    device, weight, pairs = batch.hidden.device, batch.weight.float(), len(batch.ref_logps) // 2
    single, double = copy.copy(batch), copy.copy(batch)
    single.hidden, double.hidden = batch.hidden.float(), torch.cat([batch.hidden.float()] * 2)
    double.targets = batch.targets.repeat(2)
    double.segment_ids = torch.cat([batch.segment_ids, batch.segment_ids + 2 * pairs])
    forms = {
        "autocast": (single, 0.0),
        "autocast, marginals monitored": (double, 0.0),
        "autocast, marginals in the loss": (double, 0.5),
    }

    def train(form: PairBatch, marginal_weight: float, accumulated: int = 1) -> None:
        loss_of = ours("auto", num_pairs=pairs, marginal_weight=marginal_weight)
        leaf, head = form.hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        for _ in range(accumulated):
            with torch.autocast(device.type, torch.bfloat16):
                loss, _ = loss_of(leaf, head, form)
            loss.backward()

    runs: dict[str, Callable[[], Any]] = {"floor": products_of(batch, TRAIN)}
    runs |= {name: partial(train, *form) for name, form in forms.items()}
    runs["autocast, 4 micro-batches: 12 matmuls"] = partial(train, *forms["autocast"], accumulated=4)
    yield from compared(runs, "floor", str(device), rounds, seconds=seconds / 2, clock=seconds_behind_work).items()


# --- statistics ---


def statistics(batch: PairBatch, rounds: int, seconds: float) -> Rows:
    """Log-probs and loss with and without entropy and the other statistics of the same pass."""

    def log_probs(**options: Any) -> None:
        with torch.no_grad():
            ik.linear_logps(batch.hidden, batch.weight, batch.targets, softcap=batch.softcap, **options)

    def loss(**options: Any) -> None:
        step(batch, TRAIN, Contender("ours", loss=ours("auto", **options)))

    device = str(batch.hidden.device)
    for what, run in (("log-probs", log_probs), ("loss", loss)):
        runs: dict[str, Callable[[], Any]] = {"plain": run, "statistics": partial(run, statistics=STATISTICS)}
        rows = compared(runs, "plain", device, rounds, seconds=seconds / 4, clock=seconds_behind_work)
        yield from ((f"{what}, {name}", row) for name, row in rows.items())


# --- trees ---


def trees(plan: Plan, device: torch.device, seconds: float) -> Rows:
    """Forward and backward of a llama over conditioned pairs: rows, and trees with either attention."""
    from .step_jobs import random_pairs

    prompt, response = plan.tree_lengths
    examples = random_pairs([(prompt, response, response)] * plan.tree_pairs, plan.tree_model.vocab)
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
    shape: ModelShape, examples: Sequence[tuple[list[int], ...]], layout: str, attention: str, device: torch.device
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
    """Train a random model on random pairs with the training loop, and return the speed of the later half of its logs.

    ``tflops``: matmuls with the weights, 6 operations per weight and token, without attention. A step's tokens are
    those of its trees; the head takes the scored tokens alone. A run ends early rather than exceed ``seconds``.
    """
    from training.config import TrainConfig
    from training.train import train

    from .step_jobs import random_pairs
    from .step_trainers import StopAfter

    on_gpu, shape, (prompt, response) = device.type == "cuda", plan.trained_model, plan.trained_lengths
    config = TrainConfig(
        max_length=4096,
        max_steps=plan.training_steps,
        per_device_train_batch_size=8 if on_gpu else 2,
        max_batch_tokens=16384,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        learning_rate=1e-6,
        logging_steps=max(1, plan.training_steps // 10),
        keep_best=False,
        save_strategy="no",  # only the steps are measured
    )
    pairs, model = random_pairs([(prompt, response, response)] * 128, shape.vocab), shape.build(torch.float32, device)
    ending = [StopAfter(seconds - 10)]
    trained = train(config, pairs, model=model, pad_token_id=model.config.pad_token_id, callbacks=ending)
    rows = [row for row in trained.metrics if "tokens_per_second" in row]
    if not rows:
        return {"status": "not measured: out of time before the first log"}
    found: dict[str, Any] = {"status": "measured", "steps": rows[-1]["step"]}
    for name in ("tokens_per_second", "peak_memory_gib"):
        if values := [row[name] for row in rows[len(rows) // 2 :] if name in row]:
            found[name] = spread(values)
    projections = 2 * shape.hidden**2 * (1 + (shape.kv_heads or shape.heads) / shape.heads)
    body = shape.layers * (projections + 3 * shape.hidden * shape.intermediate)
    scored = 2 * response / (prompt + 4 * response)
    operations = 6 * (body + scored * shape.hidden * shape.vocab)
    return found | {"tflops": operations * found["tokens_per_second"]["median"] / 1e12}

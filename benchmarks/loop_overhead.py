"""What the training loop costs beside the bare steps: metrics, logs, finite checks and checkpoints.

    python -m benchmarks.loop_overhead --pairs FILE.jsonl --json benchmarks/results/loop_overhead.json

Both train the same small model on the same pairs in the same order and forward passes, with AdamW. The loop is
``training.train.train`` with a metrics row and a line every 10 steps and a checkpoint every 100; its set-up, and the
first step, are left out. The bare loop is forward, backward, clipping, the optimizer's step and
nothing else: it reads nothing from the device. Runs alternate, and the ratio is taken within each round.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import training.train
from training.config import TrainConfig
from training.data import Pair, load_pairs, select_pairs
from training.model import load_model
from training.scoring import Batcher, PairModel, score

from .harness import provenance, spread, write_json

MODEL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def loop_seconds(config: TrainConfig, pairs: list[Pair]) -> float:
    """Of the steps of ``train`` from the second to ``config.max_steps``, and the checkpoint after them."""
    marks: list[float] = []
    model, tokenizer = load_model(config)
    plan = training.train.batch_indices

    def marked(*arguments: Any) -> list[int]:
        marks.append(time.perf_counter())
        return plan(*arguments)

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        training.train.batch_indices = marked
        try:
            run = dataclasses.replace(
                config, output_dir=f"{folder}/run", max_steps=config.max_steps + 1, save_every=config.max_steps
            )
            training.train.train(run, pairs, model=model, tokenizer=tokenizer)
        finally:
            training.train.batch_indices = plan
    # The loop asks for the pairs of a step when it begins; before that, the reference asks for those of all steps.
    steps = marks[-(config.max_steps + 1) :]
    return steps[-1] - steps[1]


def bare_seconds(config: TrainConfig, pairs: list[Pair]) -> float:
    """The same steps by hand."""
    model, tokenizer = load_model(config)
    module = PairModel(model.eval(), config.make_objective())
    batcher = Batcher(tokenizer.pad_token_id, torch.device("cpu"), config.max_batch_tokens)
    reference = score(module, pairs, batcher, conditioned=False, progress=None).logps
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=0.0)

    def step(number: int) -> None:
        batch = training.train.batch_indices(len(pairs), config.batch_size, number, config.seed)
        some = [pairs[i] for i in batch]
        for part in batcher.plan(some, conditioned=True):
            inputs = batcher([some[i] for i in part.pairs], conditioned=True)
            ref: Tensor = reference[:, [batch[i] for i in part.pairs]].reshape(-1)
            loss, _ = module(inputs, ref)
            (loss / len(batch)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step(1)
    began = time.perf_counter()
    for number in range(2, config.max_steps + 1):
        step(number)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loop_overhead", description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--json", required=True, type=Path, help="result file")
    parser.add_argument("--steps", type=int, default=100, help="steps of a run, with a checkpoint after them")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    config = TrainConfig(
        model=MODEL, max_length=512, truncation="drop", batch_size=8, max_batch_tokens=4096, learning_rate=1e-4,
        max_steps=options.steps, log_every=10, layout="rows", keep_best=False,
    )  # fmt: skip
    _, tokenizer = load_model(config)
    pairs = select_pairs(
        load_pairs(options.pairs, tokenizer), "pairs", config, vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id, log=lambda line: None,
    )  # fmt: skip
    bare, loop = [], []
    for number in range(options.rounds):
        for times, run in ((bare, bare_seconds), (loop, loop_seconds)):
            times.append(run(config, pairs))
        print(
            f"round {number + 1}: bare {bare[-1]:.2f} s, loop {loop[-1]:.2f} s, {loop[-1] / bare[-1]:.4f}", flush=True
        )
    words = [Path(word).name if word == options.pairs else word for word in sys.argv[1:]]
    result = {
        **provenance(shlex.join(["python", "-m", "benchmarks.loop_overhead", *words])),
        "model": MODEL, "pairs": len(pairs), "pairs_per_step": config.batch_size, "steps": options.steps,
        "log_every": config.log_every, "save_every": config.max_steps,
        "seconds": {"bare": bare, "loop": loop},
        "loop_over_bare": spread([a / b for a, b in zip(loop, bare, strict=True)]),
    }  # fmt: skip
    write_json(options.json, result)
    shown = result["loop_over_bare"]
    print(f"loop / bare: {shown['median']:.4f} ({shown['q1']:.4f}-{shown['q3']:.4f}); results in {options.json}")


if __name__ == "__main__":
    main()

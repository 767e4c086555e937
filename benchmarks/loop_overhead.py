"""Measure the training loop's overhead over its bare steps: metrics, logs, finite checks and checkpoints.

    python -m benchmarks.loop_overhead --pairs FILE.jsonl --json benchmarks/results/loop_overhead.json

Both loops train the same small model with AdamW on the same pairs, in the same order and the same forward passes. The
full loop is ``training.train.train`` with a metrics row and a log line every 10 steps and a checkpoint after the last
of ``--steps``. Its set-up and its first step are not timed. The bare loop runs only forward, backward, clipping and the
optimizer's step, and reads nothing from the device. Each round runs both loops, in alternating order. The result is the
median and quartiles of the ratios within rounds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from training.batching import EpochBatches
from training.config import TrainConfig
from training.data import Pair
from training.model import load_model
from training.scoring import Batch, Batcher, PairModel, score
from training.train import train

from .harness import interleaved_times, ratios, spread
from .real_pairs import command_of, pairs_of, pairs_parser
from .result_files import positive, provenance, write_json
from .step_trainers import Clock

MODEL = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}


def loop_seconds(config: TrainConfig, pairs: list[Pair], steps: int) -> float:
    """Return the seconds of ``train``'s steps 2 to ``steps`` and of the checkpoint after them."""
    clock, (model, tokenizer) = Clock(torch.device("cpu")), load_model(config)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        run = dataclasses.replace(config, output_dir=f"{folder}/run", max_steps=steps + 1, save_steps=steps)
        train(run, pairs, model=model, tokenizer=tokenizer, callbacks=[clock])
    return clock.begins[steps] - clock.begins[1]


def bare_seconds(config: TrainConfig, pairs: list[Pair], steps: int) -> float:
    """Return the seconds of the same steps in a hand-written loop."""
    model, tokenizer = load_model(config)
    module = PairModel(model.eval(), config.make_objective())
    batcher = Batcher(tokenizer.pad_token_id, torch.device("cpu"), config.max_batch_tokens)
    reference = score(module, pairs, batcher, conditioned=False).logps
    assert config.learning_rate is not None
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    size, seed = config.pairs_per_step, config.seed
    batches = itertools.chain.from_iterable(_epoch(len(pairs), size, seed, epoch) for epoch in itertools.count())

    def step(batch: list[int]) -> None:
        some = [pairs[i] for i in batch]
        for part in batcher.plan(some, conditioned=True):
            tensors = batcher([some[i] for i in part.pairs], conditioned=True, marginals=False)
            ref: Tensor = reference[:, [batch[i] for i in part.pairs]].reshape(-1)
            loss, _ = module(Batch(tensors, ref, scale=1 / len(batch)))
            loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()

    step(next(batches))
    began = time.perf_counter()
    for _ in range(2, steps + 1):
        step(next(batches))
    return time.perf_counter() - began


def _epoch(num_pairs: int, size: int, seed: int, epoch: int) -> EpochBatches:
    batches = EpochBatches(num_pairs, size, seed)
    batches.set_epoch(epoch)
    return batches


RUNS: dict[str, Callable[[TrainConfig, list[Pair], int], float]] = {"bare": bare_seconds, "loop": loop_seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = pairs_parser("loop_overhead", __doc__)
    parser.add_argument(
        "--steps", type=positive, default=100, help="steps of a run, which ends with a checkpoint [100]"
    )
    parser.add_argument("--rounds", type=positive, default=5, help="rounds; each runs both loops once [5]")
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps 1: the first step is not timed, so give at least 2")
    config = TrainConfig(
        model=MODEL,
        max_length=512,
        truncation="drop",
        per_device_train_batch_size=8,
        max_batch_tokens=4096,
        learning_rate=1e-4,
        max_steps=options.steps,
        logging_steps=10,
        layout="rows",
        keep_best=False,
    )
    pairs = pairs_of(parser, options.pairs, config, load_model(config)[1], lambda line: None)
    runs = {name: partial(run, config, pairs, options.steps) for name, run in RUNS.items()}

    def show(seconds: dict[str, list[float]]) -> None:
        bare, loop = seconds["bare"][-1], seconds["loop"][-1]
        print(f"bare {bare:.2f} s, loop {loop:.2f} s, {loop / bare:.4f}", flush=True)

    # The runs measure themselves.
    seconds = interleaved_times(runs, options.rounds, warmup=0, clock=lambda run, _: run(), after_round=show)
    ratio = ratios(seconds, "bare")["loop"]
    result = {
        **provenance(command_of("benchmarks.loop_overhead", arguments, options)),
        "model": MODEL,
        "pairs": len(pairs),
        "pairs_per_step": config.pairs_per_step,
        "steps": options.steps,
        "log_every": config.logging_steps,
        "save_every": options.steps,
        "seconds": seconds,
        "loop_over_bare": ratio,
    }
    write_json(options.json, result)
    shown = {f"{name}, s": spread(values) for name, values in seconds.items()} | {"loop / bare": ratio}
    for name, row in shown.items():
        print(f"{name}: {row['median']:.4g} (quartiles {row['q1']:.4g}-{row['q3']:.4g})")
    print(f"results in {options.json}")


if __name__ == "__main__":
    main()

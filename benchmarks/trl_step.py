"""A training step inside TRL: InSPOTrainer against DPOTrainer, which reads the same conditioned pairs.

    python -m benchmarks.trl_step --json benchmarks/results/trl_step_cpu.json

Both trainers make the same SGD updates of the same Llama-shaped model (random weights) on the same pairs, with the
reference's log-probs computed before and token metrics at every step. ``DPOTrainer`` gets conditioned rows from a
collator and sends the scored positions alone through its own fused head, as it does on a GPU. InSPOTrainer scores
marginals at the last step, which is logged. Peak memory is what ``train()`` takes above the model in a fresh process.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm

from .contenders import BETA
from .harness import (
    add_common_options,
    cell_of,
    checked_device,
    checked_result,
    command,
    kept_on_interrupt,
    lacks,
    own_peak,
    peak_memory_in_fresh_process,
    positive,
    provenance,
    ratios,
    reason,
    release_freed_memory,
    spread,
    write_json,
)
from .step import MODELS, job_of
from .step_contenders import ConditioningCollator, Job, _id_tokenizer, _quiet, now

TITLES = {
    "trl": "DPOTrainer, conditioned rows, its own head on scored positions",
    "rows": "InSPOTrainer, rows",
    "auto": "InSPOTrainer, the layout it chooses",
}
BASE = "trl"


class TrainerRun:
    """One trainer on one job; ``train`` starts from the model's present weights."""

    def __init__(self, name: str, job: Job) -> None:
        from datasets import Dataset, disable_progress_bars
        from transformers import TrainerCallback
        from transformers.trainer_callback import PrinterCallback
        from trl import DPOConfig, DPOTrainer

        from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

        disable_progress_bars()
        self.name, self.job, self.seconds = name, job, 0.0
        self.losses: list[torch.Tensor] = []
        self.folder = tempfile.TemporaryDirectory()
        run, device = self, job.model.device

        class Clock(TrainerCallback):
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == 0:
                    run.seconds = -now(device)

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step == state.max_steps:
                    run.seconds += now(device)

        def text(ids: list[int]) -> str:
            return "".join(f" {i}" for i in ids)

        # The trainers append the end-of-sequence token.
        rows = [{"prompt": text(x), "chosen": text(w[:-1]), "rejected": text(l[:-1])} for x, w, l in job.pairs]
        collator = ConditioningCollator(job.model.config.pad_token_id) if name == BASE else None
        config: Any = DPOConfig if name == BASE else InSPOConfig
        options = {} if name == BASE else {"layout": name}
        trainer_class: Any = DPOTrainer if name == BASE else InSPOTrainer
        with self._around():
            self.trainer = trainer_class(
                job.model,
                args=config(
                    self.folder.name,
                    beta=BETA,
                    per_device_train_batch_size=len(job.batches[0]),
                    max_steps=len(job.batches),
                    learning_rate=job.learning_rate,
                    lr_scheduler_type="constant",
                    optim="sgd",
                    max_grad_norm=0.0,
                    max_length=None,
                    precompute_ref_log_probs=True,
                    gradient_checkpointing=False,
                    train_sampling_strategy="sequential",
                    bf16=False,
                    use_cpu=device.type == "cpu",
                    save_strategy="no",
                    logging_steps=len(job.batches),
                    disable_tqdm=True,
                    report_to=[],
                    **options,
                ),
                data_collator=collator,
                train_dataset=Dataset.from_list(rows),
                processing_class=_id_tokenizer(job.model.config.vocab_size),
                callbacks=[Clock()],
            )
        self.trainer.remove_callback(PrinterCallback)
        if collator is not None:
            collator.conditioned = True
        loss_of = self.trainer.compute_loss

        def recorded(*arguments: Any, **named: Any) -> Any:
            loss = loss_of(*arguments, **named)
            self.losses.append(loss.detach())
            return loss

        self.trainer.compute_loss = recorded  # to see the losses it trains on

    @contextlib.contextmanager
    def _around(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_quiet())
            if self.name == BASE:  # picks the scored positions first where this says that there is a GPU
                stack.enter_context(mock.patch("trl.trainer.utils._use_triton", lambda device: True))
            yield

    def train(self) -> float:
        """Return seconds a step."""
        self.losses = []
        with self._around():
            self.trainer.train()
        self.job.model.zero_grad()
        return self.seconds / len(self.job.batches)


def measure(job: Job, rounds: int) -> tuple[int, dict[str, Any]]:
    """Interleave the trainers; return how many rounds were run and what each gave."""
    start = copy.deepcopy(job.model.state_dict())
    runs = {name: TrainerRun(name, Job(copy.deepcopy(job.model), job.batches, job.learning_rate)) for name in TITLES}
    times: dict[str, list[float]] = {name: [] for name in TITLES}
    for i in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=not sys.stderr.isatty()):
        for name, run in runs.items():
            run.job.model.load_state_dict(start)
            seconds = run.train()
            if i:
                times[name].append(seconds)
    losses = {name: [loss.item() for loss in run.losses] for name, run in runs.items()}
    worst = {name: max(abs(a / b - 1) for a, b in zip(values, losses[BASE])) for name, values in losses.items()}
    relative = ratios(times, BASE)
    return rounds, {
        name: {
            "status": "measured",
            "seconds": spread(times[name]),
            f"times_{BASE}": relative[name],
            "losses": losses[name],
            "largest_difference_of_losses": worst[name],
        }
        for name in TITLES
    }


def peak(what: dict[str, Any], name: str, device: torch.device) -> dict[str, Any]:
    """Peak memory of ``train`` above what the process held before; on a CPU to be called in a fresh process."""
    try:
        TrainerRun(name, job_of("quick", "0.3", 1, 2, 16, torch.float32, device)).train()
        run = TrainerRun(name, job_of(**what, dtype=torch.float32, device=device))
        release_freed_memory()
        return {"status": "measured", "peak_bytes": own_peak(run.train, str(device))}
    except Exception as error:
        return {"status": reason(error)}


def table(cell: dict[str, Any]) -> str:
    base = cell["contenders"][BASE]
    lines = [cell["name"]]
    for name, row in cell["contenders"].items():
        ratio = row.get(f"times_{BASE}")
        memory = row["peak_bytes"] / base["peak_bytes"] if row.get("peak_bytes") and base.get("peak_bytes") else None
        lines.append(
            f"  {name:<6}{row['seconds']['median']:8.3f} s {ratio['median']:6.2f} ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
            + (f" of the time, {memory:.2f} of the memory" if memory else " of the time")
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["--peak-of"]:
        what = json.loads(arguments[1])
        print(json.dumps(peak(what, what.pop("name"), torch.device("cpu"))))
        return
    parser = argparse.ArgumentParser("python -m benchmarks.trl_step", description=__doc__.splitlines()[0])
    add_common_options(parser, rounds=5)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, metavar="MODEL", help=f"of {', '.join(MODELS)} [small trunk]"
    )
    parser.add_argument("--shares", nargs="+", default=["0.5"], metavar="SHARE", help='of the prompt, or "real" [0.5]')
    parser.add_argument("--pairs", type=positive, default=4, help="a step [4]")
    parser.add_argument("--tokens", type=positive, default=512, help="of a pair, at most [512]")
    parser.add_argument("--updates", type=positive, default=4, help="timed together, the last one logged [4]")
    options = parser.parse_args(arguments)
    device = checked_device(parser, options.device)
    models = options.models or (["quick"] if options.quick else ["small", "trunk"])
    tokens = min(options.tokens, 48) if options.quick else options.tokens
    result: dict[str, Any] = {
        **provenance(command("benchmarks.trl_step", arguments, options.json), ["trl", "datasets"]),
        "dtype": "float32",
        "models": {},
        "titles": TITLES,
        "finished": False,
        "cells": [],
    }
    result = checked_result(parser, options, result)
    result["models"] |= {name: asdict(MODELS[name]) for name in models}

    def save() -> None:
        if options.json:
            write_json(options.json, result)

    with kept_on_interrupt(save):
        for model, share in [(model, share) for model in models for share in options.shares]:
            what = {"model": model, "share": share, "updates": options.updates, "pairs": options.pairs}
            what |= {"tokens": tokens}
            name = f"{model}, {share}, {options.pairs} pairs of {tokens} tokens{' at most' * (share == 'real')}"
            cell = cell_of(result, {"name": name, **what, "contenders": {}})
            rows = cell["contenders"]
            for contender in TITLES if options.only != "time" else ():
                if lacks(rows.get(contender), "peak_bytes"):
                    given = json.dumps(what | {"name": contender})
                    found = (
                        peak(what, contender, device)
                        if device.type == "cuda"
                        else peak_memory_in_fresh_process("benchmarks.trl_step", ["--peak-of", given])
                    )
                    rows[contender] = rows.get(contender, {}) | found
                    save()
            if "rounds" in cell or options.only == "memory":
                continue
            cell["rounds"], measured = measure(job_of(**what, dtype=torch.float32, device=device), options.rounds)
            for contender, row in measured.items():
                rows[contender] = rows.get(contender, {}) | row
            save()
            print(table(cell))
        result["finished"] = True
        save()
    if options.json:
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()

"""Fine-tunes a causal language model on preference pairs: ``python -m training.train --config FILE.yaml``.

Read ``_train`` from top to bottom: it is the whole of training. What it works on comes from ``inputs.py``, and one
step of it is ``update.py``.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .checkpoint import (
    SaveError,
    check_resumed,
    clear_for,
    load_checkpoint,
    rotate,
    save_checkpoint,
    way_on,
)
from .config import InputError, TrainConfig, help_text, parse_config
from .data import Pair
from .dry_run import dry_run
from .engine import (
    all_finite,
    end_processes,
    from_first_process,
    is_sharded,
    process_count,
    process_index,
    start_processes,
    together,
    wrap,
)
from .evaluation import evaluate, is_better, sample_answers, starting_report
from .inputs import TokenPairs, load_inputs
from .layouts import check_layout, choose_layout
from .memory import graded_tokens, report_memory, tokens_of_pass
from .model import size_text
from .output import CURVES, RunLog, Window, check_output, evaluation_line, locked, training_line
from .references import References
from .save_model import save_model
from .scoring import Batcher, PairModel, Scores, score, unwrap
from .stopping import EXIT_CODE, Stopped, StopRequested, stop_requests
from .update import NonFiniteError, Update, learning_rate
from .usage import usage_of
from .watch import Watch, evaluation_warnings, training_warnings

STARTING_SAMPLE = 32  # pairs that the report before step 1 looks at


@dataclass
class Progress:
    """How far a run is: what a checkpoint holds of it besides weights, optimizer and random states.

    ``tokens``: read by the model so far. ``window``: since the last logged line. ``best``: the row of the evaluation
    whose model is in ``best/``.
    """

    step: int = 0
    tokens: int = 0
    window: Window = field(default_factory=Window)
    best: dict[str, Any] | None = None

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        return cls(state["step"], state["tokens"], Window(**state["window"]), state["best"])

    def to_state(self) -> dict[str, Any]:
        """JSON types; the fields by their names."""
        return asdict(self)


@dataclass
class TrainResult:
    """``model`` is the trained one (passed in: trained in place; FSDP2: this process's share).

    ``metrics`` holds the rows of ``metrics.jsonl``, the same in each process.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    metrics: list[dict[str, Any]]
    final: Path | None


def train(
    config: TrainConfig,
    pairs: TokenPairs | None = None,
    *,
    eval_pairs: TokenPairs | None = None,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    pad_token_id: int = 0,
    quiet: bool = False,
) -> TrainResult:
    """Runs ``config``.

    ``pairs`` and ``eval_pairs`` (prompt ids, chosen ids, rejected ids; each response with its EOS) and a ``model`` in
    memory take the place of ``train_data``, ``eval_data`` and ``model``. ``pad_token_id`` counts where there is no
    tokenizer. Without ``output_dir`` nothing is written. Dropout stays off, as for the reference.

    Several processes that a launcher has started share the work: each calls this function with the same arguments. The
    pairs of a step do not depend on their number. The first one alone prints and writes.

    Raises InputError for what the user can mend, NonFiniteError where training diverged, SaveError where the trained
    model could not be written, and Stopped after SIGTERM.
    """
    accelerator = start_processes()
    with ExitStack() as stack:
        with together():
            stack.enter_context(locked(config.folder if process_index() == 0 else None))
        return _train(config, accelerator, pairs, eval_pairs, model, tokenizer, pad_token_id, quiet)


def _train(
    config: TrainConfig,
    accelerator: Accelerator,
    pairs: TokenPairs | None,
    eval_pairs: TokenPairs | None,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    pad_token_id: int,
    quiet: bool,
) -> TrainResult:
    main, world, folder = process_index() == 0, process_count(), config.folder
    quiet = quiet or not main
    log = RunLog(folder if main else None, quiet, config.report_to)
    objective = config.make_objective()
    log.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in asdict(config).items() if v is not None), 118))

    with together():
        found = check_output(config, log.say) if main else None
    found = from_first_process(found)
    inputs = load_inputs(config, pairs, eval_pairs, model, tokenizer, pad_token_id, log.say)
    model, tokenizer, train_pairs, held_out = inputs.model, inputs.tokenizer, inputs.train_pairs, inputs.held_out
    steps_per_epoch, total_steps = config.steps_per_epoch(len(train_pairs)), config.total_steps(len(train_pairs))
    if found is not None:
        check_resumed(*found, inputs.digests, total_steps, config, log.say)

    log.say(f"{type(model).__name__}, {size_text(model)}, on {accelerator.device}; {config.title}")
    processes = f", {world} processes ({'FSDP2' if is_sharded() else 'DDP'})" if world > 1 else ""
    log.say(f"{total_steps} steps of {config.batch_size} pairs, {steps_per_epoch} an epoch{processes}")
    bf16 = "bf16" in config.mixed_precision or config.param_dtype == "bfloat16"
    usage = usage_of(model, accelerator.device, bf16=bf16, processes=world)
    # A resumed run goes on in the layout that it began with.
    layout = found[1].get("layout", config.layout) if found is not None and config.layout == "auto" else config.layout
    batcher = Batcher(inputs.pad_token_id, accelerator.device, config.max_batch_tokens, inputs.separator)
    batcher = choose_layout(
        layout, model, batcher, [*train_pairs, *held_out], conditioned=config.conditioned, log=log.say
    )
    sizes = [batcher.padded(pair, conditioned=config.conditioned) for pair in train_pairs]
    if large := sum(one > config.max_batch_tokens for one in sizes):
        log.say(f"note: {large} pairs take more than max_batch_tokens alone (the largest {max(sizes)})")
    longest_pair = max(graded_tokens(pair, config) for pair in train_pairs)
    report_memory(model, config, accelerator.device, tokens_of_pass(max(sizes), config, world), longest_pair, log.say)

    # Model and loss are one module, in eval mode throughout: dropout would make policy and reference differ at step 1.
    model.eval()
    pair_model = PairModel(
        model, objective, config.marginal_weight, gradient_checkpointing=config.gradient_checkpointing,
        autocast=config.mixed_precision == "bf16" and not is_sharded(),
    )  # fmt: skip
    module = wrap(pair_model, accelerator, config)
    batcher = check_layout(batcher, module, train_pairs, bf16=bf16, required=layout == "tree", log=log.say)
    optimizer = accelerator.prepare(adamw(module, config))

    def scores_of(some: Sequence[Pair], progress: str, stop_requested: Callable[[], bool] | None = None) -> Scores:
        return score(
            module, some, batcher, conditioned=True, progress=None if quiet else progress,
            stop_requested=stop_requested,
        )  # fmt: skip

    used = used_indices(len(train_pairs), config.batch_size, total_steps, config.seed)
    references = References.settle(
        config, inputs, module, batcher, used, needed=objective.needs_reference, quiet=quiet, log=log.say
    )

    progress, texts, compared_from = Progress(), {}, 0
    if found is None:
        sample = [train_pairs[i] for i in used[:STARTING_SAMPLE]]
        starting_report(scores_of(sample, "start"), references.train, config, log.say)
    else:
        resume_from, state = found
        texts = load_checkpoint(resume_from, unwrap(module), optimizer.optimizer, log.say)
        progress = Progress.from_state(state)
        if state["inputs"]["eval_data"] != inputs.digests["eval_data"]:  # then earlier evaluations are of others
            progress.best, compared_from = None, progress.step
        if from_first_process(folder is None or not (folder / "best").is_dir()):
            progress.best = None  # its model stayed in another folder, or is lost
        log.say(f"resumed from {resume_from} after step {progress.step}")
    with together():
        if folder and main:
            clear_for(folder, progress.step, log.say)
            (folder / "config.yaml").write_text(config.to_yaml())
        log.start(config, texts)
    watch = Watch(log.say)
    prompts = list(dict.fromkeys(tuple(pair.prompt) for pair in held_out))[: config.sample_prompts] if tokenizer else []

    def evaluations() -> list[dict[str, Any]]:
        return [row for row in log.rows if "eval_loss" in row and row["step"] >= compared_from]

    def evaluate_now(stop_requested: Callable[[], bool]) -> bool:
        """False where it was broken off, because a process was asked to stop: nothing of it is kept then."""
        if not held_out:
            return True
        try:
            scores = scores_of(held_out, "eval", stop_requested)
        except StopRequested:
            return False
        metrics = evaluate(
            scores, references.held_out, held_out, objective, conditioned=config.conditioned,
            marginal_weight=config.marginal_weight, marginal_ref_logps=references.held_out_marginal,
        )  # fmt: skip
        if tokenizer is not None and prompts:
            ends = {tokenizer.eos_token_id, *(pair.chosen[-1] for pair in held_out)}
            samples = sample_answers(unwrap(module), prompts, tokenizer, ends=ends, max_new_tokens=config.sample_tokens)
            log.add_samples([{"step": progress.step, **sample} for sample in samples])
            for name in ("tokens", "ended"):
                metrics[f"eval_samples/{name}"] = sum(sample[name] for sample in samples) / len(samples)
        log.add({"step": progress.step, "epoch": progress.step / steps_per_epoch, **metrics})
        row = log.rows[-1]
        log.say(evaluation_line(row))
        watch(evaluation_warnings(row, evaluations()[0]), last=progress.step == total_steps)
        if folder and config.keep_best and is_better(row, progress.best):
            try:
                write_model(folder / "best")
                progress.best = row
            except SaveError as error:
                log.say(f"WARNING: {error}; the run goes on")
        log.draw(config.title)
        return True

    def write_model(to: Path) -> None:
        save_model(
            to, module, tokenizer, config, title=str(objective), step=progress.step, steps=total_steps,
            pairs=len(train_pairs), evaluations=evaluations(),
        )  # fmt: skip

    def save() -> bool:
        """Whether there was a folder, and space. A checkpoint that no run could go on from must not displace one."""
        if folder is None:
            return False
        if not all_finite(module):
            raise NonFiniteError(f"after step {progress.step} the model's parameters are not finite; {way_on(folder)}")
        state = {**progress.to_state(), "inputs": inputs.digests,
                 "layout": "rows" if batcher.layout == "rows" else "tree", "config": asdict(config)}  # fmt: skip
        try:
            save_checkpoint(folder, progress.step, unwrap(module), optimizer.optimizer, state, log.texts())
        except SaveError as error:
            log.say(f"WARNING: {error}; the run goes on. If it ended now: {way_on(folder)}")
            return False
        if main:
            rotate(folder, progress.step, config.save_total, log.say)
        return True

    def is_due(every: int | None) -> bool:
        return (every is not None and progress.step % every == 0) or progress.step == total_steps

    with stop_requests() as stop_requested, closing(log):
        update = Update(
            module, optimizer, batcher, train_pairs, references.of_batch, config, total_steps, stop_requested
        )  # fmt: skip
        # A checkpoint is saved before the evaluation of its step, which a resumed run therefore makes again.
        if progress.step == 0 or is_due(config.eval_every):
            if not evaluate_now(stop_requested):
                raise Stopped(f"stopped by SIGTERM before step {progress.step + 1}: {way_on(folder)}")
        bar = tqdm(total=total_steps, initial=progress.step, desc="training", disable=True if quiet else None)
        for step in range(progress.step + 1, total_steps + 1):
            batch = batch_indices(len(train_pairs), config.batch_size, step, config.seed)
            began = time.perf_counter()
            row, stop = update(step, batch)
            of_batch = [train_pairs[i] for i in batch]
            read = sum(batcher.tokens(pair, conditioned=config.conditioned) for pair in of_batch)
            facts = batch_facts(of_batch, None if config.reference_conditioned else references.of_batch(batch))
            scored = sum(len(pair.chosen) + len(pair.rejected) for pair in of_batch)
            progress.step, progress.tokens = step, progress.tokens + read
            window = progress.window
            window.add(row | facts, len(batch), read, scored, time.perf_counter() - began)
            bar.update()
            if is_due(config.log_every):
                log.add({
                    "step": step, "epoch": step / steps_per_epoch, **window.means(), "num_tokens": progress.tokens,
                    "learning_rate": learning_rate(config, step, total_steps),
                    **usage.metrics(window.tokens, window.scored, window.seconds),
                })  # fmt: skip
                log.say(training_line(log.rows[-1], total_steps))
                watch(training_warnings(log.rows[-1]), last=step == total_steps)
                progress.window = Window()
            saved = False
            if stop or (config.save_every and step % config.save_every == 0):
                saved = save()
            if not stop and is_due(config.eval_every) and not evaluate_now(stop_requested):
                stop, saved = True, saved or save()
            if stop:
                kept = way_on(folder) if saved else f"its state could not be kept, {way_on(folder)}"
                raise Stopped(f"stopped by SIGTERM after step {step}: {kept}")
        bar.close()
        if folder:
            try:
                write_model(folder / "final")
            except SaveError as error:
                raise SaveError(f"{error}; {way_on(folder)}") from error
            if not held_out:  # an evaluation draws them
                log.draw(config.title)
            log.say(f"the model is in {folder / 'final'}, the curves in {folder / CURVES}")
    return TrainResult(unwrap(module).model, tokenizer, log.rows, folder / "final" if folder else None)


def adamw(module: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Weights decay, biases and the scales of norms do not."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def batch_facts(pairs: Sequence[Pair], ref_logps: Tensor | None) -> dict[str, float]:
    """What is known of a step's pairs beforehand: mean lengths in tokens, and mean log-probs under the reference."""
    facts = {"tokens/chosen": sum(len(pair.chosen) for pair in pairs) / len(pairs),
             "tokens/rejected": sum(len(pair.rejected) for pair in pairs) / len(pairs)}  # fmt: skip
    if ref_logps is not None:
        chosen, rejected = ref_logps.view(2, -1).mean(1).tolist()
        facts |= {"ref_logps/chosen": chosen, "ref_logps/rejected": rejected}
    return facts


def batch_indices(num_pairs: int, step_pairs: int, step: int, seed: int) -> list[int]:
    """The pairs of a step (from 1): each epoch is a permutation that follows from seed and epoch alone."""
    epoch, position = divmod(step - 1, math.ceil(num_pairs / step_pairs))
    order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
    return order[position * step_pairs : (position + 1) * step_pairs].tolist()


def used_indices(num_pairs: int, step_pairs: int, total_steps: int, seed: int) -> list[int]:
    """The pairs that some step uses, ascending; fewer than all of them only in a run shorter than an epoch."""
    return sorted(batch_indices(num_pairs, min(num_pairs, total_steps * step_pairs), 1, seed))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on bad input, 1 where training diverged or the disk is full, 130 on Ctrl-C, 143
    on SIGTERM once a checkpoint is saved.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return
    logging.disable_progress_bar()  # bars for each file read or written hide the run's own
    try:
        config = parse_config(arguments)
        if not config.dry_run:
            train(config)
            end_processes(0)
        elif os.environ.get("RANK", "0") == "0":
            dry_run(config, print)
    except (InputError, NonFiniteError, SaveError, Stopped, OSError) as error:  # raised in all processes alike
        if os.environ.get("RANK", "0") == "0":
            print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        status = EXIT_CODE if isinstance(error, Stopped) else 2 if isinstance(error, InputError) else 1
        end_processes(status)
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted; what --save_every kept goes on with --resume auto", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

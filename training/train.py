"""Fine-tunes a causal language model on preference pairs: ``python -m training.train --config FILE.yaml``.

Read ``_train`` from top to bottom: it is the whole of training, and ``train_step`` inside it the whole of a step.
"""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .config import InputError, TrainConfig, help_text, parse_config
from .data import Pair, check_pairs, check_source, load_pairs, select_pairs
from .engine import (
    accumulating,
    check_same,
    clip_gradients,
    is_sharded,
    process_count,
    process_index,
    start_processes,
    sum_over_processes,
    together,
    unwrap,
    whole_weights,
    wrap,
)
from .evaluation import evaluate, starting_report
from .model import check_architecture, load_model, padding_id
from .output import (
    RunLog,
    Window,
    evaluation_line,
    locked,
    marginal_warning,
    plot_curves,
    prepare_folder,
    training_line,
    whole_folder,
)
from .scoring import Batcher, PairModel, Scores, reference_logps, score, weights_digest

TokenPairs = Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]
STARTING_SAMPLE = 32  # pairs that the report before step 1 looks at


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step was not finite; the step's update was not made."""


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

    Raises InputError for what the user can mend, NonFiniteError where training diverged.
    """
    accelerator = start_processes()
    folder = Path(config.output_dir) if config.output_dir else None
    with ExitStack() as stack:
        with together():
            stack.enter_context(locked(folder if process_index() == 0 else None))
        return _train(config, accelerator, folder, pairs, eval_pairs, model, tokenizer, pad_token_id, quiet)


def _train(
    config: TrainConfig,
    accelerator: Accelerator,
    folder: Path | None,
    pairs: TokenPairs | None,
    eval_pairs: TokenPairs | None,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    pad_token_id: int,
    quiet: bool,
) -> TrainResult:
    main, world = process_index() == 0, process_count()
    quiet = quiet or not main
    log = RunLog(folder if main else None, quiet)
    objective = config.make_objective()
    log.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in asdict(config).items() if v is not None), 118))

    # Model and data.
    with together():
        resume_from = prepare_folder(folder, config)
        for source in (config.train_data if pairs is None else None, config.eval_data if eval_pairs is None else None):
            if source is not None:
                check_source(source)
        if model is None:
            model, tokenizer = load_model(config)
        check_architecture(model)
        if model.dtype != getattr(torch, config.param_dtype):
            raise InputError(f"the model is in {model.dtype}, but param_dtype={config.param_dtype}; make them agree")
        if tokenizer is not None:
            pad_token_id = padding_id(tokenizer, log.say)
        bos_token_id = None if tokenizer is None else tokenizer.bos_token_id

        def select(given: TokenPairs | None, source: str | None, name: str) -> list[Pair]:
            if given is None:
                if tokenizer is None or source is None:
                    raise InputError(f"{name}: give {name}, or tokenised pairs in memory")
                given = load_pairs(source, tokenizer)
            vocab_size = model.get_output_embeddings().weight.shape[0]
            return select_pairs(given, name, config, vocab_size=vocab_size, bos_token_id=bos_token_id, log=log.say)

        train_pairs = select(pairs, config.train_data, "train_data")
        held_out = select(eval_pairs, config.eval_data, "eval_data") if eval_pairs or config.eval_data else []
        check_pairs(train_pairs, held_out, model, config, log.say)
    weights = weights_digest(model)
    check_same((weights, train_pairs, held_out), "model or data")

    steps_per_epoch = math.ceil(len(train_pairs) / config.batch_size)
    total_steps = config.max_steps or config.num_epochs * steps_per_epoch
    title = f"{objective}, {'each response given the other one' if config.conditioned else 'plain'}"
    size = sum(p.numel() for p in model.parameters()) / 1e6
    log.say(f"{type(model).__name__}, {size:.2f}M parameters, on {accelerator.device}; {title}")
    processes = f", {world} processes ({'FSDP2' if is_sharded() else 'DDP'})" if world > 1 else ""
    log.say(f"{total_steps} steps of {config.batch_size} pairs, {steps_per_epoch} an epoch{processes}")
    batcher = Batcher(pad_token_id, accelerator.device, config.max_batch_tokens)
    sizes = [batcher.padded(pair, conditioned=config.conditioned) for pair in train_pairs]
    if large := sum(one > config.max_batch_tokens for one in sizes):
        log.say(f"note: {large} pairs take more than max_batch_tokens alone (the largest {max(sizes)})")

    # Model and loss are one module, in eval mode throughout: dropout would make policy and reference differ at step 1.
    model.eval()
    autocast = config.mixed_precision == "bf16" and not is_sharded()
    module = wrap(PairModel(model, objective, config.marginal_weight, autocast=autocast), accelerator, config)
    matrices = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = accelerator.prepare(torch.optim.AdamW(groups, lr=config.learning_rate))

    def scores_of(some: Sequence[Pair], progress: str) -> Scores:
        return score(module, some, batcher, conditioned=True, progress=None if quiet else progress)

    def reference_of(some: Sequence[Pair]) -> Tensor | None:
        if not objective.needs_reference or not some:
            return None
        return reference_logps(
            module, weights, some, batcher, conditioned=config.reference_conditioned,
            mixed_precision=config.mixed_precision,
            cache=Path(config.reference_cache) if config.reference_cache else folder,
            progress=None if quiet else "reference", log=log.say,
        )  # fmt: skip

    # The reference is the model as loaded: its log-probs are settled before a checkpoint replaces the weights.
    used = used_indices(len(train_pairs), config.batch_size, total_steps, config.seed)
    of_used, held_out_reference = reference_of([train_pairs[i] for i in used]), reference_of(held_out)
    row_of = {pair: row for row, pair in enumerate(used)}

    def reference_of_batch(batch: Sequence[int]) -> Tensor | None:
        return None if of_used is None else of_used[:, [row_of[i] for i in batch]].reshape(-1)

    start, tokens, window, warning = 0, 0, Window(), None
    if resume_from is None:
        sample = [train_pairs[i] for i in used[:STARTING_SAMPLE]]
        starting_report(scores_of(sample, "start"), of_used, config, log.say)
    else:
        accelerator.load_state(str(resume_from))
        state = json.loads((resume_from / "state.json").read_text())
        start, tokens, window = state["step"], state["tokens"], Window(**state["window"])
        log.say(f"resumed from {resume_from} after step {start}")
    if folder and main:
        (folder / "config.yaml").write_text(config.to_yaml())
    log.start(start)

    def evaluate_now(step: int) -> None:
        if held_out:
            scores = scores_of(held_out, "eval")
            metrics = evaluate(
                scores, held_out_reference, held_out, objective,
                conditioned=config.conditioned, marginal_weight=config.marginal_weight,
            )  # fmt: skip
            log.add({"step": step, "epoch": step / steps_per_epoch, **metrics})
            log.say(evaluation_line(log.rows[-1]))

    def forward(batch: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics summed over pairs."""
        inputs = batcher([train_pairs[i] for i in batch], conditioned=config.conditioned)
        return module(inputs, reference_of_batch(batch))

    def train_step(step: int, batch: list[int]) -> dict[str, float]:
        """One update on the pairs ``batch``; metrics are means over them. Reads from the device once."""
        totals: Tensor | float = 0.0
        passes = batcher.plan([train_pairs[i] for i in batch], conditioned=config.conditioned)
        for number, part in enumerate(passes, 1):
            with accumulating(module, last=number == len(passes)):
                loss, metrics = forward([batch[i] for i in part.pairs])
                # The mean is over all pairs of the step, in whichever process; engines average over the processes.
                (loss * (part.weight * world / len(batch))).backward()
            totals = totals + part.weight * torch.stack(list(metrics.values()))
        norm = clip_gradients(module, config.max_grad_norm)
        mine = torch.cat([totals / len(batch), norm.double().view(1) / world])
        row = dict(zip([*metrics, "grad_norm"], sum_over_processes(mine).tolist(), strict=True))
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise NonFiniteError(
                f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; stopped before the update. "
                f"Pairs that cause it: {culprits(batch)}. Look at these pairs, or lower learning_rate"
            )
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, total_steps)
        optimizer.step()
        optimizer.zero_grad()
        return row

    def culprits(batch: list[int]) -> str:
        """Of a step that went wrong: the pairs that go wrong alone. Every process looks at every pair."""
        guilty = []
        for i in batch:
            optimizer.zero_grad()
            loss, _ = forward([i])
            loss.backward()
            if not sum_over_processes(loss.detach() + clip_gradients(module, math.inf)).isfinite():
                guilty.append(i)
        optimizer.zero_grad()
        named = ", ".join(train_pairs[i].origin for i in (guilty or batch)[:8])
        if len(guilty or batch) > 8:
            named += f" and {len(guilty or batch) - 8} more"
        if not guilty:
            return f"none alone, only all together ({named})"
        return named + (" (all pairs of the step)" if len(guilty) == len(batch) > 1 else "")

    if start == 0:
        evaluate_now(0)
    bar = tqdm(total=total_steps, initial=start, desc="training", disable=True if quiet else None)
    for step in range(start + 1, total_steps + 1):
        batch = batch_indices(len(train_pairs), config.batch_size, step, config.seed)
        began = time.perf_counter()
        row = train_step(step, batch)
        read = sum(batcher.tokens(train_pairs[i], conditioned=config.conditioned) for i in batch)
        window.add(row, len(batch), read, time.perf_counter() - began)
        tokens += read
        bar.update()
        if step % config.log_every == 0 or step == total_steps:
            log.add({
                "step": step, "epoch": step / steps_per_epoch, **window.means(), "num_tokens": tokens,
                "learning_rate": learning_rate(config, step, total_steps),
                "tokens_per_second": window.tokens / window.seconds,
            })  # fmt: skip
            log.say(training_line(log.rows[-1], total_steps))
            warning, warned = marginal_warning(log.rows[-1]), warning is not None
            if warning and (not warned or step == total_steps):
                log.say(warning)
            window = Window()
        if (config.eval_every and step % config.eval_every == 0) or step == total_steps:
            evaluate_now(step)
        if config.save_every and step % config.save_every == 0:
            with whole_folder(folder / f"checkpoint-{step}") as to:
                accelerator.save_state(str(to))
                state = {"step": step, "tokens": tokens, "window": asdict(window), "config": asdict(config)}
                (to / "state.json").write_text(json.dumps(state))
    bar.close()

    model = unwrap(module).model
    final = folder / "final" if folder else None
    if folder:
        state_dict = {name.removeprefix("model."): tensor for name, tensor in whole_weights(module).items()}
        with together():
            if main:
                with whole_folder(final) as to:
                    model.save_pretrained(to, state_dict=state_dict)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(to)
                plot_curves(log.rows, title, folder / "curves.png")
        log.say(f"the model is in {final}, the curves in {folder / 'curves.png'}")
    return TrainResult(model, tokenizer, log.rows, final)


def batch_indices(num_pairs: int, step_pairs: int, step: int, seed: int) -> list[int]:
    """The pairs of a step (from 1): each epoch is a permutation that follows from seed and epoch alone."""
    epoch, position = divmod(step - 1, math.ceil(num_pairs / step_pairs))
    order = np.random.default_rng([seed, epoch]).permutation(num_pairs)
    return order[position * step_pairs : (position + 1) * step_pairs].tolist()


def used_indices(num_pairs: int, step_pairs: int, total_steps: int, seed: int) -> list[int]:
    """The pairs that some step uses, ascending; fewer than all of them only in a run shorter than an epoch."""
    steps = range(1, min(total_steps, math.ceil(num_pairs / step_pairs)) + 1)
    return sorted({i for step in steps for i in batch_indices(num_pairs, step_pairs, step, seed)})


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up from above 0 to the peak, then the scheduler's shape towards 0; steps count from 1."""
    warmup = int(config.warmup * total_steps)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    done = (step - 1 - warmup) / (total_steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shapes[config.lr_scheduler]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on bad input, 1 where training diverged, 130 on Ctrl-C."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return
    logging.disable_progress_bar()  # bars for each file read or written hide the run's own
    try:
        train(parse_config(arguments))
    except (InputError, NonFiniteError) as error:  # raised in all processes alike
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted; what --save_every kept goes on with --resume auto", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

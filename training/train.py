"""Fine-tunes a causal language model on preference pairs: ``python -m training.train --config FILE.yaml``.

Read ``_train`` from top to bottom: it is the whole of training, and ``train_step`` inside it the whole of a step.
"""

from __future__ import annotations

import json
import math
import sys
import textwrap
import time
from collections.abc import Sequence
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
from .data import Pair, check_pairs, load_pairs, select_pairs
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
from .scoring import Batcher, PairModel, Scores, reference_logps, score

TokenPairs = Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]
STARTING_SAMPLE = 32  # pairs that the report before step 1 looks at


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step was not finite; the step's update was not made."""


@dataclass
class TrainResult:
    """``model`` is the trained one (passed in: trained in place); ``metrics`` holds the rows of ``metrics.jsonl``."""

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

    Raises InputError for what the user can mend, NonFiniteError where training diverged.
    """
    folder = Path(config.output_dir) if config.output_dir else None
    with locked(folder):
        return _train(config, folder, pairs, eval_pairs, model, tokenizer, pad_token_id, quiet)


def _train(
    config: TrainConfig,
    folder: Path | None,
    pairs: TokenPairs | None,
    eval_pairs: TokenPairs | None,
    model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None,
    pad_token_id: int,
    quiet: bool,
) -> TrainResult:
    resume_from = prepare_folder(folder, config)
    log = RunLog(folder, quiet)
    # Apple's GPUs have no float64, which sums and objectives need.
    accelerator = Accelerator(mixed_precision=config.mixed_precision, cpu=not torch.cuda.is_available())
    if accelerator.num_processes > 1:
        raise InputError(f"{accelerator.num_processes} processes were launched, but training.train runs in one")
    objective = config.make_objective()
    log.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in asdict(config).items() if v is not None), 118))

    # Model and data.
    if model is None:
        model, tokenizer = load_model(config)
    check_architecture(model)
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

    # Model and loss are one module, in eval mode throughout: dropout would make policy and reference differ at step 1.
    model.eval()
    module = PairModel(model, objective, config.marginal_weight)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate)
    module, optimizer = accelerator.prepare(module, optimizer)
    batcher = Batcher(pad_token_id, accelerator.device)

    step_pairs = config.per_device_batch_size * config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train_pairs) / step_pairs)
    total_steps = config.max_steps or config.num_epochs * steps_per_epoch
    title = f"{objective}, {'each response given the other one' if config.conditioned else 'plain'}"
    size = sum(p.numel() for p in model.parameters()) / 1e6
    log.say(f"{type(model).__name__}, {size:.2f}M parameters, on {accelerator.device}; {title}")
    log.say(f"{total_steps} steps of {step_pairs} pairs, {steps_per_epoch} an epoch")

    def scores_of(some: Sequence[Pair], progress: str) -> Scores:
        return score(
            module, some, batcher, conditioned=True, batch_size=config.per_device_batch_size,
            progress=None if quiet else progress,
        )  # fmt: skip

    def reference_of(some: Sequence[Pair]) -> Tensor | None:
        if not objective.needs_reference or not some:
            return None
        return reference_logps(
            module, model, some, batcher, conditioned=config.reference_conditioned,
            mixed_precision=config.mixed_precision, batch_size=config.per_device_batch_size,
            cache=Path(config.reference_cache) if config.reference_cache else folder,
            progress=None if quiet else "reference", log=log.say,
        )  # fmt: skip

    # The reference is the model as loaded: its log-probs are settled before a checkpoint replaces the weights.
    reference, held_out_reference = reference_of(train_pairs), reference_of(held_out)

    start, tokens, window, warning = 0, 0, Window(), None
    if resume_from is None:
        starting_report(scores_of(train_pairs[:STARTING_SAMPLE], "start"), reference, config, log.say)
    else:
        accelerator.load_state(str(resume_from))
        state = json.loads((resume_from / "state.json").read_text())
        start, tokens, window = state["step"], state["tokens"], Window(**state["window"])
        log.say(f"resumed from {resume_from} after step {start}")
    if folder:
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

    def train_step(step: int, batch: list[int]) -> dict[str, float]:
        """One update on the pairs ``batch``; metrics are means over them. Reads from the device once."""
        totals: Tensor | float = 0.0
        for first in range(0, len(batch), config.per_device_batch_size):
            part = batch[first : first + config.per_device_batch_size]
            ref = None if reference is None else reference[:, part].reshape(-1)
            out = module(batcher([train_pairs[i] for i in part], conditioned=config.conditioned), ref)
            accelerator.backward(out.loss / len(batch))  # out.loss is a sum: the mean is over all pairs of the step
            metrics = {"loss": out.losses.double().mean(), **out.metrics()}
            totals = totals + torch.stack(list(metrics.values())) * len(part)
        norm = accelerator.clip_grad_norm_(module.parameters(), config.max_grad_norm)
        values = torch.cat([totals / len(batch), norm.double().view(1)]).tolist()
        row = dict(zip([*metrics, "grad_norm"], values, strict=True))
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
        """Of a step that went wrong: the pairs that go wrong alone."""
        guilty = []
        for i in batch:
            optimizer.zero_grad()
            ref = None if reference is None else reference[:, [i]].reshape(-1)
            loss = module(batcher([train_pairs[i]], conditioned=config.conditioned), ref).loss
            accelerator.backward(loss)
            if not (loss + accelerator.clip_grad_norm_(module.parameters(), math.inf)).isfinite():
                guilty.append(train_pairs[i].origin)
        optimizer.zero_grad()
        if not guilty:
            return f"none alone, only all together ({', '.join(train_pairs[i].origin for i in batch[:8])}, ...)"
        more = f" and {len(guilty) - 8} more" if len(guilty) > 8 else ""
        return ", ".join(guilty[:8]) + more + (" (all pairs of the step)" if len(guilty) == len(batch) else "")

    if start == 0:
        evaluate_now(0)
    bar = tqdm(total=total_steps, initial=start, desc="training", disable=True if quiet else None)
    for step in range(start + 1, total_steps + 1):
        batch = batch_indices(len(train_pairs), step_pairs, step, config.seed)
        began = time.perf_counter()
        row = train_step(step, batch)
        read = sum(batch_tokens(train_pairs[i], config.conditioned) for i in batch)
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

    model = accelerator.unwrap_model(module).model
    final = folder / "final" if folder else None
    if folder:
        with whole_folder(final) as to:
            model.save_pretrained(to)
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


def batch_tokens(pair: Pair, conditioned: bool) -> int:
    """Tokens that the model reads for a pair, without padding."""
    return 2 * pair.tokens if conditioned else pair.tokens + len(pair.prompt)


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
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except NonFiniteError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted; what --save_every kept goes on with --resume auto", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

"""Fine-tune a causal language model on preference pairs: ``python -m training.train --config FILE.yaml``.

``train`` shows the order of a run. A step is in ``trainer.py``, an evaluation in ``reporting.py``.
"""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from .batching import Batcher, choose_layout
from .checkpoint import Resumed, check_resumed, discard_later_checkpoints, find_checkpoint, resume_hint
from .config import TrainConfig
from .engine import end_processes, from_first_process, process_count, process_index, raise_on_all_ranks
from .errors import InputError, Log, NonFiniteError, SaveError, Stopped
from .inputs import Given, Inputs, TokenPairs, load_inputs
from .memory import report_disk, report_memory, report_precision
from .model import has_weights, size_text
from .options import help_text, parse_config
from .output import CURVES, LOCK, RunLog, check_folder, escape_unprintable, locked
from .resumable import check_optimizer
from .save_model import check_saving
from .sources import local_path
from .trainer import PairTrainer

STOPPED = 128 + signal.SIGTERM  # 143, as a shell reports a process that SIGTERM ended
SHARED_BY = 8  # processes of the FSDP2 launch whose memory a dry run also estimates


@dataclass
class TrainResult:
    """The trained ``model`` (passed in: trained in place; FSDP2: this rank's shard) and where it is (``final``).

    ``metrics`` holds the rows of ``metrics.jsonl``, the same on each rank.
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
    callbacks: Iterable[TrainerCallback] = (),
) -> TrainResult:
    """Train as ``config`` says, and return the trained model with its metrics.

    ``pairs`` and ``eval_pairs`` (prompt ids, chosen ids, rejected ids; each response with its EOS) and a ``model`` in
    memory replace ``train_data``, ``eval_data`` and ``model``. ``pad_token_id`` is used if there is no tokenizer.
    Without ``output_dir`` nothing is written. Dropout stays off, as for the reference. ``callbacks`` are transformers'
    callbacks.

    Under a launcher each rank calls this with the same arguments, and the ranks share the work. Only the first rank
    prints and writes.

    Raises InputError for bad input, NonFiniteError if training diverged, SaveError if the trained model could not be
    written, and Stopped after SIGTERM.
    """
    folder, main = config.folder, process_index() == 0
    log = RunLog(folder if main else None, quiet or not main)
    given = Given(pairs, eval_pairs, model, tokenizer, pad_token_id)
    with ExitStack() as stack:
        with raise_on_all_ranks():
            stack.enter_context(locked(folder if main else None))
        stop_requested = stack.enter_context(stop_requests())
        log.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in config.settings().items() if v is not None), 118))
        inputs, batcher, found = prepare(config, given, log.say)
        report_precision(inputs.model, config.learning_rate or 0.0, log.say)
        with raise_on_all_ranks():
            if folder:
                check_saving(inputs.model, inputs.tokenizer, config)
            if folder and main:
                discard_later_checkpoints(folder, found.state["step"] if found else 0, log.say)
                log.open(config.to_yaml())
        trainer = PairTrainer(
            config, inputs, batcher, log, resumed=found, stop_requested=stop_requested, callbacks=callbacks
        )
        run(trainer, found)
    rows = trainer.state.log_history
    return TrainResult(inputs.model, inputs.tokenizer, rows, folder / "final" if folder else None)


def dry_run(config: TrainConfig, say: Log) -> None:
    """Check what can be checked without weights, and describe the run. The model takes no memory.

    All ranks call this. Raises InputError as the run would.
    """
    say("dry run: no weights are loaded, and nothing is written")
    with raise_on_all_ranks():
        if config.folder is not None and process_index() == 0:
            check_folder(config.folder)
            if (config.folder / LOCK).exists():
                with locked(config.folder):
                    pass
    inputs, batcher, found = prepare(config, Given(), say, meta=True)
    if isinstance(config.model, str) and Path(folder := local_path(config.model)).is_dir() and not has_weights(folder):
        say(f"note: {folder} has no weights; a run needs them")
    if found is not None:
        say(f"continues from {found.path} after step {found.state['step']}")
    report_memory(config, inputs, batcher, say, SHARED_BY)


def prepare(
    config: TrainConfig, given: Given, say: Log, *, meta: bool = False
) -> tuple[Inputs, Batcher, Resumed | None]:
    """Find the checkpoint to resume from, read model and pairs (``meta``: no weights), and describe the run.

    The Batcher has the layout of the run. Raises InputError, in all processes, for what the run cannot use.
    """
    with raise_on_all_ranks():
        found = find_checkpoint(config.folder, config, say) if config.folder and process_index() == 0 else None
    found = from_first_process(found)
    inputs = load_inputs(config, given, say, meta=meta)
    if found is not None:
        check_resumed(found, inputs.digests, config.total_steps(len(inputs.train_pairs)), config, say)
    batcher = plan(config, inputs, found, say)
    report_memory(config, inputs, batcher, say, process_count() if config.sharded else 1)
    return inputs, batcher, found


def plan(config: TrainConfig, inputs: Inputs, found: Resumed | None, say: Log) -> Batcher:
    """Describe the run, and return what makes its batches, with the layout of the run."""
    model, lengths = inputs.model, inputs.train_pairs.lengths
    head, tied = model.get_output_embeddings().weight, " (tied)" if model.config.tie_word_embeddings else ""
    size = f"{type(model).__name__}, {size_text(model)}, in {config.dtype}, on {config.device}"
    say(f"{size}; output head of {head.shape[0]} x {head.shape[1]}{tied}")
    say(config.title)
    steps, totals = config.total_steps(len(lengths)), lengths.sum(1)
    check_optimizer(config, model, steps)
    several = f", {process_count()} processes" if process_count() > 1 else ""
    say(
        f"{steps} steps of {config.pairs_per_step} pairs, {config.steps_per_epoch(len(lengths))} an epoch{several}; a "
        f"pair has {totals.mean():.0f} tokens on average, the longest {totals.max()}"
    )
    report_disk(model, config, steps, say)
    if torch.cuda.device_count() > process_count():
        say(f"note: {torch.cuda.device_count()} GPUs, one is used; `accelerate launch` starts a process for each")
    # A resumed run keeps its layout.
    layout = found.state["layout"] if found is not None and config.layout == "auto" else config.layout
    batcher = Batcher(inputs.pad_token_id, config.device, config.max_batch_tokens, inputs.separator)
    batcher = choose_layout(layout, model, batcher, lengths, conditioned=config.sees_alternative, log=say)
    sizes = batcher.padded(lengths, conditioned=config.sees_alternative)
    if large := int((sizes > config.max_batch_tokens).sum()):
        say(f"note: {large} pairs take more than max_batch_tokens alone (the largest {sizes.max()})")
    return batcher


def run(trainer: PairTrainer, found: Resumed | None) -> None:
    """Train to the end, and write the model. Raises Stopped if SIGTERM came first."""
    config, log = trainer.config, trainer.run_log
    trainer.train(resume_from_checkpoint=str(found.path) if found else None)
    step, folder = trainer.state.global_step, config.folder
    if trainer.stopping:
        when = f"after step {step}" if step else "before step 1"
        raise Stopped(f"stopped by SIGTERM {when}: {resume_hint(folder)}")
    if folder is None:
        return
    try:
        trainer.write("final")
    except SaveError as error:
        raise SaveError(f"{error}; {resume_hint(folder)}") from error
    if not trainer.inputs.held_out:  # an evaluation draws them
        log.draw(trainer.state.log_history, config.title)
    log.say(f"the model is in {folder / 'final'}, the curves in {folder / CURVES}")
    if config.push_to_hub and config.should_save:
        trainer.upload()


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM back in the block, and yield a function that returns whether one has come.

    Python allows handlers in the main thread only. In other threads SIGTERM keeps its effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda number, frame: came.set())
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 on bad input, 1 where training diverged or the disk is full, 130 on Ctrl-C,
    143 on SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return
    escape_unprintable()
    logging.disable_progress_bar()  # bars for each file read or written hide the run's own lines
    logging.set_verbosity_error()
    try:
        config = parse_config(arguments)
        if config.dry_run:
            dry_run(config, print if process_index() == 0 else lambda line: None)
        else:
            train(config)
        end_processes(0)
    except (InputError, NonFiniteError, SaveError, Stopped, OSError) as error:  # raised in all processes alike
        if os.environ.get("RANK", "0") == "0":
            print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        status = STOPPED if isinstance(error, Stopped) else 2 if isinstance(error, InputError) else 1
        end_processes(status)
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint auto continues from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

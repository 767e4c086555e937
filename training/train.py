"""Fine-tunes a causal language model on preference pairs: ``python -m training.train --config FILE.yaml``.

``train`` says in which order things happen; a step, an evaluation and a checkpoint are in ``trainer.py``.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from .checkpoint import Resumed, check_resumed, discard_later_checkpoints, find_checkpoint, resume_hint
from .config import TrainConfig
from .dry_run import dry_run
from .engine import end_processes, from_first_process, process_count, process_index, raise_on_all_ranks
from .errors import InputError, NonFiniteError, SaveError, Stopped
from .inputs import Given, Inputs, TokenPairs, load_inputs
from .layouts import choose_layout
from .memory import report_disk, report_memory
from .model import size_text
from .options import help_text, parse_config
from .output import CURVES, RunLog, locked
from .save_model import check_saving
from .scoring import Batcher, lengths_of
from .stopping import EXIT_CODE, stop_requests
from .trainer import PairTrainer


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
    callbacks: Iterable[TrainerCallback] = (),
) -> TrainResult:
    """Run ``config``.

    ``pairs`` and ``eval_pairs`` (prompt ids, chosen ids, rejected ids; each response with its EOS) and a ``model`` in
    memory take the place of ``train_data``, ``eval_data`` and ``model``. ``pad_token_id`` counts where there is no
    tokenizer. Without ``output_dir`` nothing is written. Dropout stays off, as for the reference. ``callbacks`` are
    transformers' own.

    Several processes that a launcher has started share the work: each calls this function with the same arguments. The
    first one alone prints and writes.

    Raises InputError for what the user can mend, NonFiniteError where training diverged, SaveError where the trained
    model could not be written, and Stopped after SIGTERM.
    """
    folder, main = config.folder, process_index() == 0
    log = RunLog(folder if main else None, quiet or not main)
    given = Given(pairs, eval_pairs, model, tokenizer, pad_token_id)
    with ExitStack() as stack:
        with raise_on_all_ranks():
            stack.enter_context(locked(folder if main else None))
        stop_requested = stack.enter_context(stop_requests())
        log.say(textwrap.fill(" ".join(f"{k}={v}" for k, v in config.settings().items() if v is not None), 118))
        with raise_on_all_ranks():
            found = find_checkpoint(folder, config, log.say) if main and folder else None
        found = from_first_process(found)
        inputs = load_inputs(config, given, log.say)
        steps = config.total_steps(len(inputs.train_pairs))
        if found is not None:
            check_resumed(found, inputs.digests, steps, config, log.say)
        if folder is not None:
            with raise_on_all_ranks():
                check_saving(inputs.model, inputs.tokenizer, config)
        batcher = plan(config, inputs, steps, found, log.say)
        with raise_on_all_ranks():
            if folder and main:
                discard_later_checkpoints(folder, found.state["step"] if found else 0, log.say)
                (folder / "config.yaml").write_text(config.to_yaml())
                log.open()
        trainer = PairTrainer(
            config, inputs, batcher, log, resumed=found, stop_requested=stop_requested, callbacks=callbacks
        )
        run(trainer, found)
    return TrainResult(inputs.model, inputs.tokenizer, log.rows, folder / "final" if folder else None)


def plan(
    config: TrainConfig, inputs: Inputs, steps: int, found: Resumed | None, say: Callable[[str], None]
) -> Batcher:  # fmt: skip
    """Say what the run will be, and return how it lays its pairs out."""
    model, device = inputs.model, config.device
    say(f"{type(model).__name__}, {size_text(model)}, on {device}; {config.title}")
    processes = f", {process_count()} processes" if process_count() > 1 else ""
    in_epoch = config.steps_per_epoch(len(inputs.train_pairs))
    say(f"{steps} steps of {config.pairs_per_step} pairs, {in_epoch} an epoch{processes}")
    if torch.cuda.device_count() > process_count():
        say(f"note: {torch.cuda.device_count()} GPUs, one is used; `accelerate launch` starts a process for each")
    # A resumed run goes on in the layout that it began with.
    layout = found.state["layout"] if found is not None and config.layout == "auto" else config.layout
    batcher = Batcher(inputs.pad_token_id, device, config.max_batch_tokens, inputs.separator)
    lengths = lengths_of(inputs.train_pairs)
    batcher = choose_layout(layout, model, batcher, lengths, conditioned=config.sees_alternative, log=say)
    sizes = batcher.padded(lengths, conditioned=config.sees_alternative)
    if large := int((sizes > config.max_batch_tokens).sum()):
        say(f"note: {large} pairs take more than max_batch_tokens alone (the largest {sizes.max()})")
    report_memory(model, config, device, int(sizes.max()), lengths, say)
    report_disk(model, config, steps, say)
    return batcher


def run(trainer: PairTrainer, found: Resumed | None) -> None:
    """Train to the end, and write the model. Raises Stopped where SIGTERM came before it."""
    config, log = trainer.config, trainer.run_log
    trainer.train(resume_from_checkpoint=str(found.path) if found else None)
    step, folder = trainer.state.global_step, config.folder
    if trainer.stopping:
        if step == 0:
            raise Stopped(f"stopped by SIGTERM before step 1: {resume_hint(folder)}")
        saved = folder is not None and (folder / f"checkpoint-{step}").is_dir()
        hint = resume_hint(folder) if saved else f"its state could not be kept, {resume_hint(folder)}"
        raise Stopped(f"stopped by SIGTERM after step {step}: {hint}")
    if folder is None:
        return
    try:
        trainer.write("final")
    except SaveError as error:
        raise SaveError(f"{error}; {resume_hint(folder)}") from error
    if not trainer.inputs.held_out:  # an evaluation draws them
        log.draw(config.title)
    log.say(f"the model is in {folder / 'final'}, the curves in {folder / CURVES}")
    if config.push_to_hub and config.should_save:
        trainer.upload()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 on bad input, 1 where training diverged or the disk is full, 130 on Ctrl-C,
    143 on SIGTERM.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(help_text())
        return
    logging.disable_progress_bar()  # bars for each file read or written hide the run's own lines
    logging.set_verbosity_error()
    try:
        config = parse_config(arguments)
        if not config.dry_run:
            train(config)
            end_processes(0)
        elif process_index() == 0:
            dry_run(config, print)
    except (InputError, NonFiniteError, SaveError, Stopped, OSError) as error:  # raised in all processes alike
        if os.environ.get("RANK", "0") == "0":
            print(error if isinstance(error, Stopped) else f"error: {error}", file=sys.stderr)
        status = EXIT_CODE if isinstance(error, Stopped) else 2 if isinstance(error, InputError) else 1
        end_processes(status)
        sys.exit(status)
    except KeyboardInterrupt:
        print("interrupted; --resume_from_checkpoint auto goes on from the newest checkpoint", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

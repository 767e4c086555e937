"""What a run would be, before anything heavy happens: ``python -m training.train --config FILE --dry_run true``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from transformers import PreTrainedModel

from .adapters import add_lora
from .checkpoint import check_resumed, find_checkpoint
from .config import TrainConfig
from .errors import NotAtHandError
from .inputs import Given, Inputs, check_sources, read_inputs
from .memory import estimate_memory, graded_tokens, report_disk, tokens_of_pass
from .model import byte_tokenizer, check_architecture, load_tokenizer, meta_model, size_text
from .output import check_folder
from .scoring import lengths_of

SHARED_BY = 8  # processes of the FSDP2 launch whose memory is told beside that of one process


def dry_run(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Checks what can be checked without weights, and says what the run would be.

    The architecture is built without memory. Raises InputError as the run itself would, but for a tokenizer and data
    that are not at hand: these it says.
    """
    say("dry run: no weights are loaded, and nothing is written")
    found = None
    if config.folder is not None:
        check_folder(config.folder)
        found = find_checkpoint(config.folder, config, say)
    check_sources(config, Given())
    model = meta_model(config)
    check_architecture(model)
    if config.lora is not None:
        add_lora(model, config.lora, config.seed)
    head = model.get_output_embeddings().weight
    positions = getattr(model.config, "max_position_embeddings", None)
    tied = " (tied)" if model.config.tie_word_embeddings else ""
    say(
        f"{type(model).__name__}, {size_text(model)}, in {config.dtype}; output head of {head.shape[0]} x "
        f"{head.shape[1]}{tied}; {positions or 'any number of'} positions"
    )
    say(config.title)

    lengths = np.array([[0, config.max_length, 0]])
    if inputs := _inputs(config, model, say):
        lengths = lengths_of(inputs.train_pairs)
        steps = config.total_steps(len(lengths))
        report_disk(model, config, steps, say)
        if found is not None:
            check_resumed(found, inputs.digests, steps, config, say)
        totals = lengths.sum(1)
        say(
            f"{steps} steps of {config.pairs_per_step} pairs; a pair has {totals.mean():.0f} tokens on average, the "
            f"longest {totals.max()}"
        )
    elif positions and config.max_length > positions:
        say(f"note: max_length={config.max_length}, but pairs of more than {positions} tokens would be refused")
    if found is not None:
        say(f"goes on from {found.path} after step {found.state['step']}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for processes in (1, SHARED_BY):
        tokens = tokens_of_pass(2 * int(lengths.sum(1).max()), config, processes)  # in rows; trees take no more
        memory = estimate_memory(
            model, config, device, tokens=tokens, longest_pair=graded_tokens(lengths, config),
            processes=processes, sharded=processes > 1,
        )  # fmt: skip
        name = "one process" if processes == 1 else f"each of {processes} processes that share the model (FSDP2)"
        say(f"{name}: {memory.text(tokens)}")


def _inputs(config: TrainConfig, model: PreTrainedModel, say: Callable[[str], None]) -> Inputs | None:
    try:
        tokenizer = byte_tokenizer() if isinstance(config.model, dict) else load_tokenizer(config.model)
        return read_inputs(config, model, Given(tokenizer=tokenizer), say)
    except NotAtHandError as error:
        say(f"note: tokenizer and data are not checked: {error}")
        return None

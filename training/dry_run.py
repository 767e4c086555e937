"""What a run would be, before anything heavy happens: ``python -m training.train --config FILE --dry_run true``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from .checkpoint import check_resumed
from .config import NotAtHandError, TrainConfig
from .data import Pair
from .inputs import Inputs, check_sources, read_inputs
from .memory import estimate_memory, graded_tokens, tokens_of_pass
from .model import add_lora, byte_tokenizer, check_architecture, load_tokenizer, meta_model, size_text
from .output import check_output

SHARED_BY = 8  # processes of the FSDP2 launch whose memory is told beside that of one process


def dry_run(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Checks what can be checked without weights, and says what the run would be.

    The architecture is built without memory. Raises InputError as the run itself would, but for a tokenizer and data
    that are not at hand: these it says.
    """
    say("dry run: no weights are loaded, and nothing is written")
    found = check_output(config, say)
    check_sources(config.train_data, config.eval_data)
    model = meta_model(config)
    check_architecture(model)
    if config.lora:
        add_lora(model, config.lora, config.seed)
    head = model.get_output_embeddings().weight
    positions = getattr(model.config, "max_position_embeddings", None)
    tied = " (tied)" if model.config.tie_word_embeddings else ""
    say(
        f"{type(model).__name__}, {size_text(model)}, in {config.param_dtype}; output head of {head.shape[0]} x "
        f"{head.shape[1]}{tied}; {positions or 'any number of'} positions"
    )
    say(config.title)

    longest, most_tokens = Pair([], [0] * config.max_length, []), config.max_length
    if inputs := _inputs(config, model, say):
        pairs = inputs.train_pairs
        steps = config.total_steps(len(pairs))
        if found is not None:
            check_resumed(*found, inputs.digests, steps, config, say)
        most_tokens = max(pair.tokens for pair in pairs)
        say(
            f"{steps} steps of {config.batch_size} pairs; a pair has "
            f"{sum(pair.tokens for pair in pairs) / len(pairs):.0f} tokens on average, the longest "
            f"{most_tokens}"
        )
        longest = max(pairs, key=lambda pair: graded_tokens(pair, config))
    elif positions and config.max_length > positions:
        say(f"note: max_length={config.max_length}, but pairs of more than {positions} tokens would be refused")
    if found is not None:
        say(f"goes on from {found[0]} after step {found[1]['step']}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for processes in (1, SHARED_BY):
        tokens = tokens_of_pass(2 * most_tokens, config, processes)  # in rows; trees take no more
        memory = estimate_memory(
            model, config, device, tokens=tokens, longest_pair=graded_tokens(longest, config),
            processes=processes, sharded=processes > 1,
        )  # fmt: skip
        name = "one process" if processes == 1 else f"each of {processes} processes that share the model (FSDP2)"
        say(f"{name}: {memory.text(tokens)}")


def _inputs(config: TrainConfig, model: PreTrainedModel, say: Callable[[str], None]) -> Inputs | None:
    try:
        tokenizer = byte_tokenizer() if isinstance(config.model, dict) else load_tokenizer(config.model)
        return read_inputs(config, model, tokenizer, say)
    except NotAtHandError as error:
        say(f"note: tokenizer and data are not checked: {error}")
        return None

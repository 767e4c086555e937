"""What a run would be, before anything heavy happens: ``python -m training.train --config FILE --dry_run true``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .chat import separator_ids, set_template_kwargs
from .config import InputError, TrainConfig
from .data import Pair, check_pairs, check_source, load_pairs, select_pairs
from .memory import estimate_memory, graded_tokens
from .model import add_lora, byte_tokenizer, check_architecture, load_tokenizer, meta_model, padding_id, size_text

SHARED_BY = 8  # processes of the FSDP2 launch whose memory is told beside that of one process


def plan(config: TrainConfig, say: Callable[[str], None]) -> None:
    """Checks what can be checked without weights, and says what the run would be.

    The architecture is built without memory. Tokenizer and data are read if they can be had. Raises InputError as the
    run itself would, but for a tokenizer and a dataset of the hub that are out of reach: these it says.
    """
    say("dry run: no weights are loaded, and nothing is written")
    for source in (config.train_data, config.eval_data):
        if source:
            check_source(source)
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
    say(f"{config.make_objective()}, {'each response given the other one' if config.conditioned else 'plain'}")

    tokenizer = byte_tokenizer() if isinstance(config.model, dict) else _tokenizer(config.model, say)
    pairs = _pairs(config, model, tokenizer, say) if tokenizer else None
    if pairs is None:
        if positions and config.max_length > positions:
            say(f"note: max_length={config.max_length}, but pairs of more than {positions} tokens would be refused")
    else:
        tokens = sum(pair.tokens for pair in pairs)
        steps = config.max_steps or config.num_epochs * math.ceil(len(pairs) / config.batch_size)
        say(
            f"{steps} steps of {config.batch_size} pairs; a pair has {tokens / len(pairs):.0f} tokens on average, the "
            f"longest {max(pair.tokens for pair in pairs)}"
        )
    longest_pair = max(graded_tokens(pair, config) for pair in pairs or [Pair([], [0] * config.max_length, [])])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for processes in (1, SHARED_BY):
        memory = estimate_memory(
            model, config, device, tokens=config.max_batch_tokens, longest_pair=longest_pair, processes=processes,
            sharded=processes > 1,
        )  # fmt: skip
        name = "one process" if processes == 1 else f"each of {processes} processes that share the model (FSDP2)"
        say(f"{name}: {memory.text(config.max_batch_tokens)}")


def _tokenizer(name: str, say: Callable[[str], None]) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(name)
    except InputError as error:
        say(f"note: tokenizer and data are not checked: {error}")
        return None


def _pairs(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, say: Callable[[str], None]
) -> list[Pair] | None:
    """The pairs of ``train_data``, checked together with those of ``eval_data``; None where the hub has them."""
    set_template_kwargs(tokenizer, config.chat_template_kwargs or {})
    padding_id(tokenizer, say)
    between = len(separator_ids(tokenizer, config))
    read: list[list[Pair]] = []
    for name in ("train_data", "eval_data"):
        source = getattr(config, name)
        if source is None:
            read.append([])
            continue
        try:
            found = load_pairs(source, tokenizer, messages_only=config.alternative == "chat")
        except InputError as error:
            if Path(source).exists():
                raise
            say(f"note: {name} is not checked: {error}")
            return None
        selected = select_pairs(
            found, name, config, vocab_size=model.get_output_embeddings().weight.shape[0],
            bos_token_id=tokenizer.bos_token_id, log=say, separator_length=between,
        )  # fmt: skip
        read.append(selected)
    check_pairs(*read, model, config, say, separator_length=between)
    return read[0]

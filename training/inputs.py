"""What a run works on: the model with its tokenizer, and the pairs that it trains on and is evaluated on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .chat import separator_ids, set_template_kwargs
from .checkpoint import digest_of
from .config import InputError, TrainConfig
from .data import Pair, check_pairs, check_source, load_pairs, select_pairs
from .engine import check_same, together
from .model import add_lora, check_architecture, load_model, padding_id
from .scoring import weights_digest

# (prompt ids, chosen ids, rejected ids), each response with its EOS
TokenPairs = Sequence[Pair] | Sequence[tuple[Sequence[int], Sequence[int], Sequence[int]]]


@dataclass(frozen=True)
class Inputs:
    """``separator``: token ids between the other response and the one scored given it. ``digests`` name the contents:
    of the pairs and, in a run, of the weights as loaded.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    pad_token_id: int
    separator: tuple[int, ...]
    train_pairs: list[Pair]
    held_out: list[Pair]
    digests: dict[str, str]


def load_inputs(
    config: TrainConfig, pairs: TokenPairs | None, eval_pairs: TokenPairs | None, model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase | None, pad_token_id: int, log: Callable[[str], None],
) -> Inputs:  # fmt: skip
    """What is None is read as ``config`` says; adapters are added. The arguments are those of ``train``.

    Raises InputError, in all processes, for what does not fit together, or is not the same in all of them.
    """
    with together():
        check_sources(config.train_data if pairs is None else None, config.eval_data if eval_pairs is None else None)
        if model is None:
            model, tokenizer = load_model(config)
        check_architecture(model)
        if model.dtype != getattr(torch, config.param_dtype):
            raise InputError(f"the model is in {model.dtype}, but param_dtype={config.param_dtype}; make them agree")
        inputs = read_inputs(config, model, tokenizer, log, pairs, eval_pairs, pad_token_id)
        weights = weights_digest(model)
        if config.lora:
            add_lora(model, config.lora, config.seed)
    check_same((weights, inputs.train_pairs, inputs.held_out), "model or data")
    return replace(inputs, digests={"model": weights, **inputs.digests})


def check_sources(*sources: str | None) -> None:
    """Raises InputError for a local file that is not there."""
    for source in sources:
        if source is not None:
            check_source(source)


def read_inputs(
    config: TrainConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, log: Callable[[str], None],
    pairs: TokenPairs | None = None, eval_pairs: TokenPairs | None = None, pad_token_id: int = 0,
) -> Inputs:  # fmt: skip
    """The pairs, read as ``config`` says where they are None, and what follows from the tokenizer.

    Of ``model`` shapes alone are read. Raises InputError for what does not fit together.
    """
    if tokenizer is not None:
        set_template_kwargs(tokenizer, config.chat_template_kwargs or {})
        pad_token_id = padding_id(tokenizer, log)
    bos_token_id = None if tokenizer is None else tokenizer.bos_token_id
    separator = separator_ids(tokenizer, config)

    def select(given: TokenPairs | None, source: str | None, name: str) -> list[Pair]:
        found: Iterable[Pair | Sequence[Sequence[int]]]
        if given is not None:
            found = given
        elif tokenizer is not None and source is not None:
            found = load_pairs(source, tokenizer, messages_only=config.alternative == "chat")
        else:
            raise InputError(f"{name}: give {name}, or tokenised pairs in memory")
        return select_pairs(
            found, name, config, vocab_size=model.get_output_embeddings().weight.shape[0],
            bos_token_id=bos_token_id, log=log, separator_length=len(separator),
        )  # fmt: skip

    train_pairs = select(pairs, config.train_data, "train_data")
    held_out = select(eval_pairs, config.eval_data, "eval_data") if eval_pairs or config.eval_data else []
    check_pairs(train_pairs, held_out, model, config, log, separator_length=len(separator))
    digests = {"train_data": digest_of(train_pairs), "eval_data": digest_of(held_out)}
    return Inputs(model, tokenizer, pad_token_id, tuple(separator), train_pairs, held_out, digests)

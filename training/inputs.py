"""Load what a run works on: model, tokenizer, training pairs and held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .adapters import add_lora
from .architecture import check_architecture
from .chat import prepare_tokenizer, separator_ids
from .config import TrainConfig
from .data import Pair, Pairs, check_pairs, load_pairs, select_pairs
from .engine import check_same, raise_on_all_ranks
from .errors import InputError, Log
from .model import load_model, padding_id
from .scoring import weights_digest
from .sources import check_source, parse_sources

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
    train_pairs: Pairs
    held_out: Pairs
    digests: dict[str, str]


@dataclass(frozen=True)
class Given:
    """Hold what the caller of ``train`` passes in memory; the rest is read as the options say."""

    pairs: TokenPairs | None = None
    eval_pairs: TokenPairs | None = None
    model: PreTrainedModel | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    pad_token_id: int = 0


def load_inputs(config: TrainConfig, given: Given, log: Log, *, meta: bool = False) -> Inputs:
    """Read what is not given, and add the adapter. With ``meta``, a model that is read has shapes, but no weights.

    Raises InputError, in all processes, for what does not fit together, or is not the same in all of them.
    """
    model, tokenizer = given.model, given.tokenizer
    with raise_on_all_ranks():
        for source, held in ((config.train_data, given.pairs), (config.eval_data, given.eval_pairs)):
            for one in parse_sources(source) if source is not None and not held else []:
                check_source(one)  # a missing file is refused before anything is loaded
        if model is None:
            model, tokenizer = load_model(config, meta=meta)
        check_architecture(model)
        inputs = _read_inputs(config, model, replace(given, tokenizer=tokenizer), log)
        weights = {} if meta else {"model": weights_digest(model)}
        if config.lora is not None:
            add_lora(model, config.lora, config.seed)
    digests = {**weights, **inputs.digests}
    check_same(digests, "model or data")
    return replace(inputs, digests=digests)


def _read_inputs(config: TrainConfig, model: PreTrainedModel, given: Given, log: Log) -> Inputs:
    """Read the pairs, and what follows from the tokenizer. Of ``model`` shapes alone are read."""
    tokenizer, pad_token_id = given.tokenizer, given.pad_token_id
    vocab_size = model.get_output_embeddings().weight.shape[0]
    if tokenizer is not None:
        tokenizer = prepare_tokenizer(tokenizer, config, log)
        pad_token_id = padding_id(tokenizer, log)
        if pad_token_id >= vocab_size:
            log(f"the model has no row for the padding token {tokenizer.pad_token!r}; EOS is used (padding is masked)")
            pad_token_id = tokenizer.eos_token_id
    separator = separator_ids(tokenizer, config)
    if any(token >= vocab_size for token in separator):
        raise InputError(f"alternative=chat: the chat template uses tokens that the model has no rows for: {separator}")
    bos, between, found = getattr(tokenizer, "bos_token_id", None), len(separator), [Pairs.of_lists([], "")] * 2
    sources = (("train_data", config.train_data, given.pairs), ("eval_data", config.eval_data, given.eval_pairs))
    for i, (name, source, held) in enumerate(sources):
        if not held and source is not None and tokenizer is not None:
            held = load_pairs(source, tokenizer, config, log)
        if held:
            found[i] = select_pairs(
                held, name, config, vocab_size=vocab_size, bos_token_id=bos, log=log, separator_length=between
            )
        elif source is not None or name == "train_data":
            raise InputError(f"{name}: give {name}, or tokenised pairs in memory")
    train_pairs, held_out = found
    if config.eval_strategy != "no" and not held_out:
        raise InputError("eval_steps and eval_strategy need eval_data")
    check_pairs(train_pairs, held_out, model, log, separator_length=len(separator))
    digests = {"train_data": train_pairs.digest, "eval_data": held_out.digest}
    return Inputs(model, tokenizer, pad_token_id, tuple(separator), train_pairs, held_out, digests)

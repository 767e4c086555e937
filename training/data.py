"""Turn sources of preference pairs into token ids. Every pair that is left out or cut is counted and named."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .chat import TextEncoder
from .data_options import DataOptions
from .errors import InputError, Log, first_of
from .pairs import SCHEMA, Pair, Pairs, file_hash, kept_table
from .records import FAULTS, LEFT_OUT, PROMPT_PARTS, READ, REMARKS, REPEATS_PROMPT, draft, encode, missing
from .sources import Records, Source, files_of, parse_sources

__all__ = ["Pair", "Pairs", "check_pairs", "load_pairs", "select_pairs", "trained_ends"]

FORMAT = 3  # of what is kept; after a change of what is tokenised, another number makes all of it be done again
_BATCH = 256  # records tokenised together
_KEPT_FROM = 4_000_000  # bytes of a text file; a smaller one is tokenised again each time, within seconds


def load_pairs(
    source: Any, tokenizer: PreTrainedTokenizerBase, options: DataOptions | None = None, log: Log = lambda note: None
) -> Pairs:
    """Read and tokenise ``source``: what ``parse_sources`` takes, with the columns and weights it gives.

    Large sources are tokenised once a node and kept in the cache folder of ``datasets``. An empty response gives an
    empty list of ids. Raises InputError, naming file and line, for anything that is not a pair.
    """
    encoder, options = TextEncoder(tokenizer), options or DataOptions()
    tables: list[pa.Table] = []
    indices: list[np.ndarray] = []
    for one in parse_sources(source, options.columns):
        found = [_tokenised(file, encoder, options, log) for file in files_of(one)]
        start, size = sum(map(len, tables)), sum(map(len, found))
        if not size:
            raise InputError(f"{one.name}: holds no record")
        chosen = weighted(size, one.weight, options.seed)
        if not len(chosen):
            raise InputError(f"{one.name}: weight={one.weight} leaves none of its {size} pairs; raise it")
        tables += found
        indices.append(start + chosen)
    table = pa.concat_tables(tables)
    chat = pc.any(table.column("chat")).as_py()
    opening = encoder.written_first if chat else ""
    first = table.column("chosen")[:100].to_pylist() if opening else []
    if any(str(encoder.tokenizer.decode(ids)).lstrip().startswith(opening) for ids in first):
        switch = "enable_thinking" in encoder.columns
        remedy = "; chat_template_kwargs: {enable_thinking: false} makes it part of the prompt" if switch else ""
        log(f"note: the chat template begins plain answers with {opening!r}, which is scored like the rest{remedy}")
    if chat and encoder.reads_clock:
        log(
            "note: the chat template writes today's date, so on another day the data differ, and a run cannot be "
            "resumed. Fix it: chat_template_kwargs: {strftime_now: 26 Jul 2024}"
        )
    return Pairs(table, np.concatenate(indices))


def weighted(size: int, weight: float, seed: int) -> np.ndarray:
    """Indices of ``size`` pairs, each as often as ``weight`` says; which have the fraction, ``seed`` decides."""
    whole, part = divmod(weight, 1)
    drawn = np.random.default_rng([seed, size]).permutation(size)[: round(part * size)]
    return np.concatenate([*[np.arange(size)] * int(whole), np.sort(drawn)]).astype(np.int64)


def _tokenised(source: Source, encoder: TextEncoder, options: DataOptions, log: Log) -> pa.Table:
    """The pairs of ``source``. Those of large sources are kept, and one process of a node tokenises them."""
    records = Records(source)
    batches = partial(_batches, records, encoder, options, log)
    if not getattr(options, "dry_run", False) and (not records.is_text or records.total >= _KEPT_FROM):
        from datasets import config  # slow to import

        try:
            folder = Path(config.HF_DATASETS_CACHE, "tokenised_pairs")
            table, file = kept_table(folder, _key(records, encoder, options), batches, log)
        except OSError as error:
            log(f"WARNING: {records.name}: tokenised pairs cannot be kept ({error}); they are in memory")
        else:
            log(f"{records.name}: {len(table)} tokenised pairs are in {file}")
            return table
    return pa.Table.from_batches(batches(), SCHEMA)


def _key(records: Records, encoder: TextEncoder, options: DataOptions) -> str:
    """Hash of everything that the tokenised pairs depend on."""
    tokenizer = encoder.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    parts = [
        FORMAT,
        type(tokenizer).__name__,
        backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True),
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
        encoder.today(),
        asdict(records.source),
        options.alternative,
        file_hash(Path(records.source.path)) if records.is_text else records.identity,
    ]
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


def _batches(records: Records, encoder: TextEncoder, options: DataOptions, log: Log) -> Iterator[pa.RecordBatch]:
    messages_only, unread, lost = options.alternative == "chat", set[str](), dict[str, str]()
    with tqdm(
        total=records.total, unit=records.unit, unit_scale=True, desc=f"tokenising {records.name}", disable=None
    ) as bar:
        rows = iter(records)
        while batch := list(islice(rows, _BATCH)):
            drafts = [draft(values, encoder, origin, messages_only) for origin, values, _ in batch]
            encoder.prefetch(text for one in drafts for text in one.texts)
            for one, (_, values, _) in zip(drafts, batch):
                new = values.keys() - READ - (encoder.columns if one.chat else set())
                unread |= new | {f"{key} (in messages)" for key in one.unread}
                lost = {name: one.origin for name in new & PROMPT_PARTS if missing(values[name], one.prompt)} | lost
            encoded = [(*encode(one, encoder), one.chat) for one in drafts]
            yield pa.RecordBatch.from_pylist([pair.row(problem, chat) for pair, problem, chat in encoded], SCHEMA)
            bar.update(batch[-1][2] - bar.n)
    if unread:
        log(f"note: {records.name}: columns not read: {', '.join(map(repr, sorted(unread)))}")
    for name, origin in sorted(lost.items()):
        log(
            f"WARNING: {records.name}: {name!r} is not read, and its text is not in the prompts (the first: {origin}); "
            "write it into 'prompt'"
        )


def select_pairs(
    pairs: Iterable[Pair | Sequence[Sequence[int]]],
    name: str,
    options: DataOptions,
    *,
    vocab_size: int,
    bos_token_id: int | None,
    log: Log,
    separator_length: int = 0,
) -> Pairs:
    """Return the pairs that can be trained on; say how many were left out or cut, why, and where the first ones are.

    ``name`` is what messages call the collection. ``options.max_length`` bounds a pair's tokens together with the
    ``separator_length`` tokens between its responses. A prompt that is cut keeps its BOS and its end. Raises InputError
    where ``options.truncation`` or ``options.invalid_pairs`` is "error", for a token id outside the vocabulary, and if
    nothing is left.
    """
    given = Pairs.of_lists(pairs, name)
    reasons: dict[str, list[str]] = defaultdict(list)
    cuts: dict[int, int] = {}  # tokens that the prompt of each pair loses
    for index, (problem, sizes) in enumerate(zip(given.problems, given.lengths.tolist())):
        parts, origin = given.arrays(index), given.origin(index)
        ids = np.concatenate(parts)
        if len(wrong := ids[(ids < 0) | (ids >= vocab_size)]):
            raise InputError(
                f"{origin}: token id {wrong[0]}, but the model's vocabulary ends at {vocab_size - 1}; use the "
                "tokenizer that belongs to the model, or give the model rows for added tokens (resize_token_embeddings)"
            )
        excess = sum(sizes) + separator_length - options.max_length
        reason = _fault(parts, problem)
        if not reason and excess > 0:
            head = 1 if parts[0][0] == bos_token_id else 0
            fits = options.truncation == "prompt_left" and excess < sizes[0] - head
            reason = "truncated" if fits else "too long"
        if reason in ("", "truncated"):
            cuts[index] = max(0, excess)
        for one in {reason, problem} - {""}:
            reasons[one].append(origin)
    _report(reasons, name, len(given), len(cuts), options, separator_length, log)
    return given.cut(cuts, bos_token_id)


def _fault(parts: list[np.ndarray], problem: str) -> str:
    prompt, chosen, rejected = parts
    if not len(prompt):
        return "empty prompt"
    if problem in FAULTS:  # before what may follow from it
        return problem
    if not len(chosen) or not len(rejected):
        return "empty response"
    return "identical responses" if np.array_equal(chosen, rejected) else ""


def _report(
    reasons: dict[str, list[str]], name: str, read: int, kept: int, options: DataOptions, between: int, log: Log
) -> None:
    """Say what became of the pairs that were read; raise InputError where that must not be."""

    def named(keys: Iterable[str]) -> str:
        return ", ".join(f"{len(reasons[k])} {k} ({first_of(reasons[k])})" for k in keys if k in reasons)

    if options.truncation == "error" and "too long" in reasons:
        raise InputError(
            f"{named(['too long'])}: more than max_length={options.max_length} tokens of prompt, chosen and rejected"
            + (f" (and {between} between them)" if between else "")
            + "; raise max_length, or set truncation to prompt_left or drop"
        )
    invalid = named(["empty prompt", "empty response", "identical responses", *FAULTS])
    if options.invalid_pairs == "error" and invalid:
        raise InputError(f"{name}: {invalid}; remove these pairs or set invalid_pairs=drop")
    dropped = ", ".join(filter(None, [invalid, named(["too long"])]))
    also = named(["truncated", *REMARKS])
    log(f"{name}: {read} pairs read, {kept} kept; dropped: {dropped or 'none'}" + (f"; noted: {also}" if also else ""))
    if LEFT_OUT in reasons:
        log(f"note: {name}: to keep those, use a chat template that writes each role, thoughts and tool calls")
    if not kept:
        raise InputError(f"{name}: no pair is left to use" + (f"; dropped: {dropped}" if dropped else ""))
    if len(reasons.get(REPEATS_PROMPT, [])) == read:
        raise InputError(
            f"{name}: 'chosen' begins with the prompt, and so does 'rejected', in each pair "
            f"({first_of(reasons[REPEATS_PROMPT])}): it would be read twice, and scored. Remove it from both"
        )


def check_pairs(
    pairs: Sequence[Pair], held_out: Sequence[Pair], model: PreTrainedModel, log: Log, separator_length: int = 0
) -> None:
    """Raise InputError where the model does not fit the pairs; say how many held-out prompts are trained on."""
    given, unseen = (Pairs.of_lists(some, "") for some in (pairs, held_out))
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for some in (given, unseen):
        sizes = some.lengths.sum(1) + separator_length
        if positions and len(some) and sizes.max() > positions:
            raise InputError(
                f"{some.origin(int(sizes.argmax()))}: prompt, chosen and rejected have {sizes.max()} tokens, but the "
                f"model {positions} positions; set max_length={positions} and truncation to prompt_left or drop, or "
                "use another model"
            )
    known = set(given.prompt_hashes) if len(unseen) else set()
    if shared := sum(prompt in known for prompt in unseen.prompt_hashes):
        log(f"note: {shared} of {len(unseen)} eval_data pairs have a prompt of train_data; they are not held out")


def trained_ends(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase | None) -> set[int]:
    """Ids that end the responses of ``pairs``, out of those that ``tokenizer`` has for it: EOS and ends of turns."""
    if tokenizer is None:
        return set()
    return Pairs.of_lists(pairs, "").last_ids.intersection(TextEncoder(tokenizer).all_ends)

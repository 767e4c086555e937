"""Preference pairs from a file or the hub to token ids, with every pair that is left out or cut counted and named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .chat import Messages, TextEncoder
from .config import InputError, NotAtHandError, TrainConfig


class Pair(NamedTuple):
    """Token ids of one pair. The prompt carries the BOS, each response its EOS. ``origin`` is what messages call it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    origin: str = ""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


def load_pairs(source: str, tokenizer: PreTrainedTokenizerBase, *, messages_only: bool = False) -> list[Pair]:
    """Reads and tokenises ``source``: a local JSONL file, or ``NAME[:SPLIT]`` of a dataset that ``datasets`` loads.

    Records hold ``prompt``, ``chosen`` and ``rejected`` as strings or as lists of messages ``{"role", "content"}``.
    Without ``prompt``, it is what ``chosen`` and ``rejected`` have in common at their beginning. An empty response
    gives an empty list of ids. Raises InputError, naming file and line, for anything that is not such a record, and
    with ``messages_only`` for strings.
    """
    encoder = TextEncoder(tokenizer)
    return [tokenize_record(record, encoder, origin, messages_only) for origin, record in read_records(source)]


def read_records(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (origin, record); origin is "FILE:LINE" for a local file."""
    check_source(source)
    path = Path(source)
    if not path.is_file():
        yield from _read_dataset(source)
        return
    yield from read_lines(path)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (FILE:LINE, JSON object) for each line of ``path`` that is not blank."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.strip())
            except ValueError as error:  # not JSON, or not UTF-8
                where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise InputError(f"{path}:{number}: not a line of JSON ({where}); one JSON object per line") from None
            if not isinstance(record, dict):
                raise InputError(f"{path}:{number}: must be a JSON object, one per line")
            yield f"{path}:{number}", record


def check_source(source: str) -> None:
    """Raises InputError for a local file that is not there; costs nothing, so that it can be asked first."""
    if Path(source).suffix in (".jsonl", ".json") and not Path(source).is_file():
        raise InputError(f"{source}: no such file (working directory: {Path.cwd()})")


def _read_dataset(source: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import datasets  # slow to import, and local files do without

    name, _, split = source.partition(":")
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # each way to fail has a class of its own: network, missing, gated, split, format
        raise NotAtHandError(
            f"{source}: neither a local file nor a dataset that could be loaded ({type(error).__name__}: {error}); "
            "offline, give a local .jsonl file"
        ) from None
    for row, record in enumerate(rows):
        yield f"{source} row {row}", record


def tokenize_record(record: dict[str, Any], encoder: TextEncoder, origin: str, messages_only: bool = False) -> Pair:
    """Prompt and responses are tokenised so that the prompt's ids are the same in front of either response."""
    prompt, chosen, rejected = (_field(record, name, origin) for name in ("prompt", "chosen", "rejected"))
    chat = isinstance(chosen, list)
    if isinstance(chosen, list) and isinstance(rejected, list):
        if not isinstance(prompt, list):
            shared = _shared(chosen[:-1], rejected[:-1])
            if not shared and prompt is None:
                raise InputError(
                    f"{origin}: no 'prompt', and 'chosen' and 'rejected' do not begin with the same messages"
                )
            # A string beside whole conversations repeats what they begin with; otherwise it is the user's message.
            prompt = chosen[:shared] or [{"role": "user", "content": prompt}]
            chosen, rejected = chosen[shared:], rejected[shared:]
        text, responses = encoder.render_pair(prompt, [chosen, rejected], origin)
    elif not isinstance(chosen, str) or not isinstance(rejected, str):
        raise InputError(f"{origin}: 'chosen' and 'rejected' must both be strings or both be lists of messages")
    elif isinstance(prompt, list):
        raise InputError(f"{origin}: 'prompt' is a list of messages, so 'chosen' and 'rejected' must be, too")
    elif messages_only:
        raise InputError(f"{origin}: holds strings; alternative=chat needs messages. Use those, or alternative=plain")
    elif prompt is None:
        text, *responses = _split_strings(chosen, rejected, origin)
    else:
        text, responses = prompt, [chosen, rejected]
    y_w, y_l = (encoder.response(response, text, chat=chat) for response in responses)
    pair = Pair(encoder.prompt(text) if text.strip() else [], y_w, y_l, origin)
    # Where BOS is EOS, too, it may stand anywhere.
    if (bos := encoder.tokenizer.bos_token_id) is not None and bos != encoder.tokenizer.eos_token_id:
        for name, ids in (("prompt", pair.prompt[1:2]), ("chosen", pair.chosen[:1]), ("rejected", pair.rejected[:1])):
            if ids == [bos]:
                raise InputError(
                    f"{origin}: a second {encoder.tokenizer.bos_token!r} stands at the beginning of {name!r}; take it "
                    "out of the text, or out of the chat template"
                )
    return pair


def _field(record: dict[str, Any], name: str, origin: str) -> str | Messages | None:
    value = record.get(name)
    if value is None:
        if name == "prompt" and name not in record:
            return None
        found = ", ".join(map(repr, record)) or "none"
        problem = "is null" if name in record else f"is missing (keys found: {found})"
        raise InputError(f"{origin}: {name!r} {problem}; a pair has prompt, chosen and rejected")
    is_messages = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not isinstance(value, str) and not (is_messages and value):
        raise InputError(
            f'{origin}: {name!r} must be a string or a list of messages {{"role": ..., "content": ...}} with string '
            f"values, got {json.dumps(value, default=str)[:80]}"
        )
    return value


def _split_strings(chosen: str, rejected: str, origin: str) -> tuple[str, str, str]:
    shared = chosen[: _shared(chosen, rejected)]
    shared = shared[: max(shared.rfind(" "), shared.rfind("\n"), 0)]  # neither all of a response nor half a word
    if not shared:
        raise InputError(f"{origin}: no 'prompt', and 'chosen' and 'rejected' do not begin with the same words")
    return shared, chosen[len(shared) :], rejected[len(shared) :]


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def select_pairs(
    pairs: Iterable[Pair | Sequence[Sequence[int]]], name: str, config: TrainConfig, *, vocab_size: int,
    bos_token_id: int | None, log: Callable[[str], None], separator_length: int = 0,
) -> list[Pair]:  # fmt: skip
    """The pairs that can be trained on; says how many were left out or cut, why, and where the first ones are.

    ``name`` is what messages call the collection. ``config.max_length`` bounds a pair's tokens together with the
    ``separator_length`` tokens between its responses. A prompt that is cut keeps its BOS and its end. Raises InputError
    where ``config.truncation`` or ``config.invalid_pairs`` is "error", for a token id outside the vocabulary, and if
    nothing is left.
    """
    kept: list[Pair] = []
    reasons: dict[str, list[str]] = {
        key: [] for key in ("empty prompt", "empty response", "identical responses", "too long", "truncated")
    }
    for number, item in enumerate(pairs):
        if isinstance(item, Pair):
            pair = item
        else:
            prompt, chosen, rejected = ([int(token) for token in ids] for ids in item)
            pair = Pair(prompt, chosen, rejected, f"{name} pair {number}")
        if not pair.prompt:
            reasons["empty prompt"].append(pair.origin)
        elif not pair.chosen or not pair.rejected:
            reasons["empty response"].append(pair.origin)
        elif pair.chosen == pair.rejected:
            reasons["identical responses"].append(pair.origin)
        elif (excess := pair.tokens + separator_length - config.max_length) > 0:
            head = 1 if pair.prompt[0] == bos_token_id else 0
            if config.truncation == "prompt_left" and excess < len(pair.prompt) - head:
                reasons["truncated"].append(pair.origin)
                kept.append(pair._replace(prompt=pair.prompt[:head] + pair.prompt[head + excess :]))
            else:
                reasons["too long"].append(pair.origin)
        else:
            kept.append(pair)
        if (top := max(max(ids, default=0) for ids in pair[:3])) >= vocab_size:
            raise InputError(f"{pair.origin}: token id {top}, but the model's vocabulary ends at {vocab_size - 1}")

    def named(keys: Iterable[str]) -> str:
        return ", ".join(f"{len(reasons[k])} {k} ({_first(reasons[k])})" for k in keys if reasons[k])

    if config.truncation == "error" and reasons["too long"]:
        raise InputError(
            f"{named(['too long'])}: more than max_length={config.max_length} tokens of prompt, chosen and rejected"
            + (f" (and {separator_length} between them)" if separator_length else "")
            + "; raise max_length, or set truncation to prompt_left or drop"
        )
    invalid = named(["empty prompt", "empty response", "identical responses"])
    if config.invalid_pairs == "error" and invalid:
        raise InputError(f"{name}: {invalid}; remove these pairs or set invalid_pairs=drop")
    read = len(kept) - len(reasons["truncated"]) + sum(map(len, reasons.values()))
    dropped = ", ".join(filter(None, [invalid, named(["too long"])]))
    log(f"{name}: {read} pairs read, {len(kept)} kept; dropped: {dropped or 'none'}"
        + (f"; {named(['truncated'])}" if reasons["truncated"] else ""))  # fmt: skip
    if not kept:
        raise InputError(f"{name}: no pair is left to use")
    return kept


def check_pairs(
    pairs: list[Pair], held_out: list[Pair], model: PreTrainedModel, config: TrainConfig, log: Callable[[str], None],
    separator_length: int = 0,
) -> None:  # fmt: skip
    """Raises InputError where model or options do not fit the pairs; says how many held-out prompts are trained on."""
    if config.eval_every and not held_out:
        raise InputError("eval_every needs eval_data")
    longest = max([*pairs, *held_out], key=lambda pair: pair.tokens)
    positions = getattr(model.config, "max_position_embeddings", None)
    tokens = longest.tokens + separator_length
    if positions and tokens > positions:
        raise InputError(
            f"{longest.origin}: prompt, chosen and rejected have {tokens} tokens, but the model {positions} "
            f"positions; set max_length={positions} and truncation to prompt_left or drop, or use another model"
        )
    known = {tuple(pair.prompt) for pair in pairs}
    if shared := sum(tuple(pair.prompt) in known for pair in held_out):
        log(f"note: {shared} of {len(held_out)} eval_data pairs have a prompt of train_data; they are not held out")


def _first(origins: list[str], most: int = 3) -> str:
    return ", ".join(origins[:most]) + (", ..." if len(origins) > most else "")

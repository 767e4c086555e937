"""Turn a record of a data source into the token ids of a pair, and name what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from .chat import TextEncoder
from .errors import InputError
from .messages import COMPARED, Messages, check_calls, check_text, given_texts, holds_all, kept_texts, read_messages
from .pairs import Pair

# Pairs with one of these faults are not used; of the others, they are counted.
LEFT_OUT, BEHIND_END = "text left out by the chat template", "text behind the end of an answer"
RENDERED, OTHERS = "messages that hold the chat template's own text", "turns of others in an answer"
FAULTS = (LEFT_OUT, BEHIND_END, RENDERED, OTHERS)
CUT_TURNS, ONE_REPEATS = "with turns after the answer, not read", "with one answer that begins with the prompt"
REPEATS_PROMPT, UNKNOWN = "with answers that begin with the prompt", "with text that the tokenizer does not know"
SPECIAL = "with special tokens in messages or answers"
REMARKS = (CUT_TURNS, ONE_REPEATS, REPEATS_PROMPT, UNKNOWN, SPECIAL)

_COLUMNS = ("prompt", "chosen", "rejected")
READ = {*_COLUMNS, "conversations", "tools", "chat_template_kwargs"}
# Columns that hold the prompt in many data sets. Without it, words that two answers begin with would be taken for it.
_PROMPTS = ("question", "instruction", "query", "input", "messages")
# Columns that hold a part of the prompt in data sets of other trainers.
PROMPT_PARTS = {"system", "system_prompt", "input", "history"}
_NO_TEXT = ("images", "image", "videos", "video", "audios", "audio")
# Text that holds messages. JSON of another kind, such as records with a key "from", is text as it stands.
_MESSAGES = re.compile(
    r"""\s*\[\s*\{(?=.*["'](?:role|from)["']\s*:)(?=.*["'](?:\w*content|value|tool_calls)["']\s*:)""", re.DOTALL
)
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"  # conversations in one string, as in Anthropic's data


class Draft(NamedTuple):
    """The texts of a pair. ``problem`` is one of the faults and remarks, or empty."""

    prompt: str
    responses: list[str]
    chat: bool
    origin: str
    problem: str
    unread: frozenset[str] = frozenset()  # keys of messages that the chat template does not read

    @property
    def texts(self) -> list[str]:
        """Return what is tokenised: the prompt, and the prompt with each response."""
        return [self.prompt, *(self.prompt + response for response in self.responses if response.strip())]


def draft(record: dict[str, Any], encoder: TextEncoder, origin: str, messages_only: bool = False) -> Draft:
    """Return the texts of ``record``: ``prompt``, ``chosen`` and ``rejected``, as strings or as lists of messages.

    ShareGPT's ``conversations`` are a prompt. Without any, it is what ``chosen`` and ``rejected`` have in common at
    their beginning. Raises InputError, naming ``origin``, for what is not such a record.
    """
    if "prompt" not in record and "conversations" in record:
        record = record | {"prompt": record["conversations"]}
    for name in _NO_TEXT:
        if record.get(name):
            raise InputError(f"{origin}: has {name!r}, which is not read; use pairs of text, or remove the column")
    prompt, chosen, rejected = (_field(record, name, origin) for name in _COLUMNS)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _draft_chat(record, prompt, chosen, rejected, encoder, origin)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise InputError(f"{origin}: 'chosen' and 'rejected' must both be strings or both be lists of messages")
    if isinstance(prompt, list):
        raise InputError(f"{origin}: 'prompt' is a list of messages, so 'chosen' and 'rejected' must be, too")
    if messages_only:
        raise InputError(f"{origin}: holds strings; use messages, which alternative=chat needs, or alternative=plain")
    if _from_json(record.get("tools"), "tools", list, origin):
        raise InputError(f"{origin}: 'tools' are read by a chat template, which needs messages instead of strings")
    for name in _COLUMNS:
        check_text(record.get(name) or "", f"{origin}: {name!r}")
    chosen, rejected = encoder.without_blank_end(chosen), encoder.without_blank_end(rejected)
    if prompt is None:
        return _split_strings(record, chosen, rejected, encoder, origin)
    problem = _repeats(prompt, chosen, rejected, origin)
    if _ASSISTANT in prompt and _HUMAN in chosen + rejected:
        problem = OTHERS
    return Draft(prompt, [chosen, rejected], False, origin, problem)


def _draft_chat(
    record: dict[str, Any],
    prompt: str | Messages | None,
    chosen: Messages,
    rejected: Messages,
    encoder: TextEncoder,
    origin: str,
) -> Draft:
    if isinstance(prompt, list):
        responses = [r[len(prompt) :] if r[: len(prompt)] == prompt else r for r in (chosen, rejected)]
    else:
        shared = _shared(chosen[:-1], rejected[:-1])
        if not shared and prompt is None:
            raise InputError(
                f"{origin}: no 'prompt', and 'chosen' and 'rejected' begin with different messages {_found(record)}"
            )
        if shared and prompt and not any(holds_all(m["content"], [prompt]) for m in chosen[:shared]):
            raise InputError(f"{origin}: what 'chosen' and 'rejected' begin with is not 'prompt'; leave that out")
        # A string beside whole conversations repeats what they begin with; otherwise it is the user's message.
        responses = [chosen[shared:], rejected[shared:]]
        prompt = chosen[:shared] or [{"role": "user", "content": prompt}]
    answers = [_answer(r, name, origin) for r, name in zip(responses, _COLUMNS[1:])]
    if prompt[-1]["role"] == "assistant":
        raise InputError(
            f"{origin}: the prompt ends with an assistant message, so the answer would be a second message; end the "
            "prompt with the message to answer, and put the assistant's beginning into both answers"
        )
    problem = CUT_TURNS if any(len(a) < len(r) for a, r in zip(answers, responses)) else ""
    y_w, y_l = (answer[0]["content"] for answer in answers)
    problem = _repeats(prompt[-1]["content"], y_w, y_l, origin) or problem
    opening, texts = encoder.render_pair(prompt, answers, origin, **template_columns(record, encoder, origin))
    for messages, text in [(prompt, opening), *zip(answers, texts)]:
        check_calls(messages, text, origin)
    said = [[text for message in prompt for text in kept_texts(message)]]
    said += [[*given_texts(answer[0])] if text else [] for answer, text in zip(answers, texts)]
    # An answer may repeat what the generation prompt begins it with, such as <think>.
    rendered = [opening, *(encoder.answer_opening + text for text in texts)]
    if not all(holds_all(text, given) for text, given in zip(rendered, said)):
        problem = LEFT_OUT
    elif encoder.cue and any(encoder.cue in text for given in said for text in given):
        problem = RENDERED
    elif any(encoder.special_text.search(text) for given in said for text in given):
        problem = problem or SPECIAL
    keys = {key for message in [*prompt, *answers[0], *answers[1]] for key in message}
    return Draft(opening, texts, True, origin, problem, frozenset(keys - COMPARED - encoder.words))


def _answer(response: Messages, name: str, origin: str) -> Messages:
    """The one message of the assistant that ``response`` is; what others say after it is not read by anything."""
    roles = [message["role"] for message in response]
    if roles[:1] == ["assistant"] and "assistant" not in roles[1:]:
        return response[:1]
    raise InputError(
        f"{origin}: {name!r} has the roles {', '.join(roles) or 'none'}; it must be one message with the role "
        "'assistant', because what others say would be scored. Put what precedes the last answer into 'prompt', or end "
        "it earlier"
    )


def missing(value: Any, prompt: str) -> bool:
    """Return whether ``value`` has content that the text ``prompt`` lacks."""
    return not holds_all(prompt, [value.strip()]) if isinstance(value, str) else bool(value)


def template_columns(record: dict[str, Any], encoder: TextEncoder, origin: str) -> dict[str, Any]:
    """The columns of ``record`` that the chat template reads."""
    columns = {name: record[name] for name in encoder.columns if record.get(name) is not None}
    columns |= _from_json(record.get("chat_template_kwargs"), "chat_template_kwargs", dict, origin) or {}
    columns.pop("tools", None)
    if not (tools := _from_json(record.get("tools"), "tools", list, origin)):
        return columns
    tools = [_from_json(tool, "tools", dict, origin) for tool in tools]
    if "tools" not in encoder.columns:
        raise InputError(f"{origin}: has 'tools', which the tokenizer's chat template does not read; use one that does")
    return columns | {"tools": tools}


def _from_json(value: Any, name: str, kind: type, origin: str) -> Any:
    """``value``, which may be text that holds JSON, as a ``kind``; None for nothing."""
    wanted = "a list of JSON objects" if kind is list else "a JSON object"
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except ValueError as error:
            raise InputError(f"{origin}: {name!r} is not JSON ({error}); write {wanted}") from None
    if value is not None and not isinstance(value, kind):
        raise InputError(f"{origin}: {name!r} must be {wanted}")
    return value


def encode(drafted: Draft, encoder: TextEncoder) -> tuple[Pair, str]:
    """Return the pair and what is wrong with it. Its prompt's ids are the same in front of either response."""
    text, origin, problem = drafted.prompt, drafted.origin, drafted.problem
    y_w, y_l = (encoder.response(response, text, chat=drafted.chat) for response in drafted.responses)
    pair = Pair(encoder.prompt(text) if text.strip() else [], y_w, y_l, origin)
    bos, eos, unknown = (getattr(encoder.tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk"))
    if bos is not None and bos != eos:  # where BOS is EOS, too, it may stand anywhere
        for name, ids in zip(_COLUMNS, (pair.prompt[1:], y_w, y_l)):
            if ids[:1] == [bos]:
                raise InputError(
                    f"{origin}: a second {encoder.tokenizer.bos_token!r} stands at the beginning of {name!r}; take it "
                    "out of the text, or out of the chat template"
                )
    if problem not in FAULTS and any(not encoder.ends.isdisjoint(ids[:-1]) for ids in (y_w, y_l)):
        problem = BEHIND_END
    if not problem and unknown not in (None, eos, bos) and any(unknown in ids for ids in pair[:3]):
        problem = UNKNOWN
    if not problem and not drafted.chat and any(not encoder.special_ids.isdisjoint(ids[:-1]) for ids in (y_w, y_l)):
        problem = SPECIAL
    return pair, problem


def _field(record: dict[str, Any], name: str, origin: str) -> str | Messages | None:
    value = record.get(name)
    if value is None:
        if name == "prompt" and name not in record:
            return None
        problem = "is null" if name in record else f"is missing {_found(record)}"
        raise InputError(f"{origin}: {name!r} {problem}; a pair has prompt, chosen and rejected")
    if isinstance(value, str) and _MESSAGES.match(value):
        value = _from_json(value, name, list, origin)
    if isinstance(value, str):
        return value
    if messages := read_messages(value, name, origin):
        return messages
    raise InputError(
        f'{origin}: {name!r} must be a string or a list of messages {{"role": ..., "content": ...}} with string '
        f"values, got {json.dumps(value, default=str)[:80]}"
    )


def _found(record: dict[str, Any]) -> str:
    return f"(keys found: {', '.join(map(repr, record)) or 'none'}); name its column in columns"


def _repeats(prompt: str, chosen: str, rejected: str, origin: str) -> str:
    """Return the remark that responses begin with the prompt. Raises InputError if both do, unless it is a greeting."""
    words = prompt.strip()
    if not words:
        return ""
    begin = [text.lstrip().startswith(words) for text in (chosen, rejected)]
    if all(begin) and len(words.split()) > 2:
        raise InputError(
            f"{origin}: 'chosen' begins with the prompt, and so does 'rejected': it would be read twice, and scored. "
            "Remove it from both"
        )
    return REPEATS_PROMPT if all(begin) else ONE_REPEATS if any(begin) else ""


def _split_strings(record: dict[str, Any], chosen: str, rejected: str, encoder: TextEncoder, origin: str) -> Draft:
    """The pair of two strings that begin alike: up to the last turn of a conversation, else up to a whole word."""
    shared = chosen[: _shared(chosen, rejected)]
    head, turn, _ = shared.rpartition(encoder.answer_opening if encoder.cue and encoder.cue in shared else _ASSISTANT)
    if not turn and (names := [name for name in _PROMPTS if record.get(name)]):
        raise InputError(f"{origin}: no 'prompt'; set columns.prompt={names[0]}, or take that column out")
    # Neither all of a response nor half a word.
    prompt = head + turn if turn else shared[: max(shared.rfind(" "), shared.rfind("\n"), 0)]
    if not prompt:
        raise InputError(
            f"{origin}: no 'prompt', and 'chosen' and 'rejected' begin with different words {_found(record)}"
        )
    responses = [text[len(prompt) :] for text in (chosen, rejected)]
    others = turn and any(_HUMAN in response for response in responses)
    return Draft(prompt, responses, False, origin, OTHERS if others else "")


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return how many items two sequences have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

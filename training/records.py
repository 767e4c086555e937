"""One record of a data source to the token ids of a pair, with what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from .chat import BEHIND_END, LEFT_OUT, TextEncoder
from .errors import InputError
from .messages import Messages, check_text, given_texts, is_left_out
from .pairs import Pair

# Remarks do not keep a pair from being used.
CUT_TURNS, ONE_REPEATS = "with turns after the answer, not read", "with one answer that begins with the prompt"
REPEATS_PROMPT = "with answers that begin with the prompt"
_COLUMNS = ("prompt", "chosen", "rejected")


class Draft(NamedTuple):
    """The texts of a pair. ``problem`` is one of the faults and remarks, or empty."""

    prompt: str
    responses: list[str]
    chat: bool
    origin: str
    problem: str

    @property
    def texts(self) -> list[str]:
        """What is tokenised: the prompt, and the prompt with each response."""
        return [self.prompt, *(self.prompt + response for response in self.responses if response.strip())]


def draft(record: dict[str, Any], encoder: TextEncoder, origin: str, messages_only: bool = False) -> Draft:
    """Return the texts of ``record``: ``prompt``, ``chosen`` and ``rejected``, as strings or as lists of messages.

    Without ``prompt``, it is what ``chosen`` and ``rejected`` have in common at their beginning. Raises InputError,
    naming ``origin``, for what is not such a record.
    """
    prompt, chosen, rejected = (_field(record, name, origin) for name in _COLUMNS)
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _draft_chat(record, prompt, chosen, rejected, encoder, origin)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise InputError(f"{origin}: 'chosen' and 'rejected' must both be strings or both be lists of messages")
    if isinstance(prompt, list):
        raise InputError(f"{origin}: 'prompt' is a list of messages, so 'chosen' and 'rejected' must be, too")
    if messages_only:
        raise InputError(f"{origin}: holds strings; alternative=chat needs messages. Use those, or alternative=plain")
    if record.get("tools"):
        raise InputError(f"{origin}: 'tools' are read by a chat template, which needs messages instead of strings")
    for name in _COLUMNS:
        check_text(record.get(name) or "", f"{origin}: {name!r}")
    problem = ""
    if prompt is None:
        prompt, chosen, rejected = _split_strings(chosen, rejected, origin)
    else:
        problem = _repeats(prompt, chosen, rejected, origin)
    return Draft(prompt, [chosen, rejected], False, origin, problem)


def _draft_chat(
    record: dict[str, Any], prompt: str | Messages | None, chosen: Messages, rejected: Messages, encoder: TextEncoder,
    origin: str,
) -> Draft:  # fmt: skip
    if isinstance(prompt, list):
        responses = [r[len(prompt) :] if r[: len(prompt)] == prompt else r for r in (chosen, rejected)]
    else:
        shared = _shared(chosen[:-1], rejected[:-1])
        if not shared and prompt is None:
            raise InputError(f"{origin}: no 'prompt', and 'chosen' and 'rejected' do not begin with the same messages")
        if shared and prompt and all(is_left_out(prompt, m["content"]) for m in chosen[:shared]):
            raise InputError(f"{origin}: what 'chosen' and 'rejected' begin with is not 'prompt'; leave that out")
        # A string beside whole conversations repeats what they begin with; otherwise it is the user's message.
        responses = [chosen[shared:], rejected[shared:]]
        prompt = chosen[:shared] or [{"role": "user", "content": prompt}]
    answers = [_answer(r, name, origin) for r, name in zip(responses, _COLUMNS[1:])]
    problem = CUT_TURNS if any(len(a) < len(r) for a, r in zip(answers, responses)) else ""
    if prompt[-1]["role"] != "assistant":
        said, (y_w, y_l) = prompt[-1]["content"], (answer[0]["content"] for answer in answers)
        problem = _repeats(said, y_w, y_l, origin) or problem
    opening, texts = encoder.render_pair(prompt, answers, origin, **_template_columns(record, encoder, origin))
    given = [(text, opening) for message in prompt for text in _kept_texts(message)]
    given += [(one, text) for answer, text in zip(answers, texts) if text for one in given_texts(answer[0])]
    if any(is_left_out(one, text) for one, text in given):
        problem = LEFT_OUT
    return Draft(opening, texts, True, origin, problem)


def _answer(response: Messages, name: str, origin: str) -> Messages:
    """The one message of the assistant that ``response`` is; what others say after it is not read by anything."""
    roles = [message["role"] for message in response]
    last = max((i for i, role in enumerate(roles) if role == "assistant"), default=None)
    if last == 0:
        return response[:1]
    if last is None:
        raise InputError(f"{origin}: {name!r} has no message of the assistant (roles: {', '.join(roles) or 'none'})")
    raise InputError(
        f"{origin}: {name!r} has the roles {', '.join(roles)}; it must be one message of the assistant, because what "
        "others say would be scored. Put what precedes the last answer into 'prompt', or end the response earlier"
    )


def _kept_texts(message: dict[str, Any]) -> list[str]:
    """What a template must write of an earlier message: all, but an assistant's thoughts, which many take out."""
    if message["role"] != "assistant":
        return list(given_texts(message))
    return [message["content"].rpartition("</think>")[2], *given_texts({"tool_calls": message.get("tool_calls")})]


def _template_columns(record: dict[str, Any], encoder: TextEncoder, origin: str) -> dict[str, Any]:
    """The columns of ``record`` that the chat template reads."""
    columns = {name: record[name] for name in encoder.columns if record.get(name) is not None}
    if isinstance(more := record.get("chat_template_kwargs"), dict):
        columns |= more
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise InputError(f"{origin}: 'tools' is not JSON ({error})") from None
    if not tools:
        return {name: value for name, value in columns.items() if name != "tools"}
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{origin}: 'tools' must be a list of JSON schemas, each an object")
    if "tools" not in encoder.columns:
        raise InputError(f"{origin}: has 'tools', which the tokenizer's chat template does not read; use one that does")
    return columns | {"tools": tools}


def encode(drafted: Draft, encoder: TextEncoder) -> tuple[Pair, str]:
    """Return the pair and what is wrong with it. Its prompt's ids are the same in front of either response."""
    text, origin = drafted.prompt, drafted.origin
    y_w, y_l = (encoder.response(response, text, chat=drafted.chat) for response in drafted.responses)
    pair = Pair(encoder.prompt(text) if text.strip() else [], y_w, y_l, origin)
    # Where BOS is EOS, too, it may stand anywhere.
    if (bos := encoder.tokenizer.bos_token_id) is not None and bos != encoder.tokenizer.eos_token_id:
        for name, ids in (("prompt", pair.prompt[1:2]), ("chosen", pair.chosen[:1]), ("rejected", pair.rejected[:1])):
            if ids == [bos]:
                raise InputError(
                    f"{origin}: a second {encoder.tokenizer.bos_token!r} stands at the beginning of {name!r}; take it "
                    "out of the text, or out of the chat template"
                )
    ends = encoder.ends(chat=drafted.chat)
    behind = any(not ends.isdisjoint(ids[:-1]) for ids in (y_w, y_l))
    return pair, BEHIND_END if behind else drafted.problem


def _field(record: dict[str, Any], name: str, origin: str) -> str | Messages | None:
    value = record.get(name)
    if value is None:
        if name == "prompt" and name not in record:
            return None
        found = ", ".join(map(repr, record)) or "none"
        problem = "is null" if name in record else f"is missing (keys found: {found}); name its column in columns"
        raise InputError(f"{origin}: {name!r} {problem}; a pair has prompt, chosen and rejected")
    if isinstance(value, str) and value.lstrip().startswith("[{") and "role" in value[:200]:
        try:
            value = json.loads(value)
        except ValueError:
            raise InputError(f"{origin}: {name!r} holds messages as text that is not JSON; write a JSON list") from None
    messages = [_message(m) for m in value] if isinstance(value, list) else []
    if not isinstance(value, str) and (not messages or None in messages):
        raise InputError(
            f'{origin}: {name!r} must be a string or a list of messages {{"role": ..., "content": ...}} with string '
            f"values, got {json.dumps(value, default=str)[:80]}"
        )
    return value if isinstance(value, str) else messages  # type: ignore[return-value]


def _message(given: Any) -> dict[str, Any] | None:
    """``given`` with a content, which may be left out beside a tool call or thoughts; None if it is no message."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        return None
    if given.get("content") is None and any(given_texts(given)):
        return {name: value for name, value in given.items() if value is not None} | {"content": ""}
    return given if isinstance(given.get("content"), str) else None


def _repeats(prompt: str, chosen: str, rejected: str, origin: str) -> str:
    """The remark that responses begin with the prompt. Raises InputError where both do, with more than one word."""
    words = prompt.strip()
    if not words:
        return ""
    begin = [text.lstrip().startswith(words) for text in (chosen, rejected)]
    if all(begin) and len(words.split()) > 1:
        raise InputError(
            f"{origin}: 'chosen' begins with the prompt, and so does 'rejected': it would be read twice, and scored. "
            "Take it out of both"
        )
    return REPEATS_PROMPT if all(begin) else ONE_REPEATS if any(begin) else ""


def _split_strings(chosen: str, rejected: str, origin: str) -> tuple[str, str, str]:
    shared = chosen[: _shared(chosen, rejected)]
    shared = shared[: max(shared.rfind(" "), shared.rfind("\n"), 0)]  # neither all of a response nor half a word
    if not shared:
        raise InputError(f"{origin}: no 'prompt', and 'chosen' and 'rejected' do not begin with the same words")
    return shared, chosen[len(shared) :], rejected[len(shared) :]


def _shared(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

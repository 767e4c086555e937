"""Read chat messages in the forms that data sets have, and check that a template keeps their text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any

from .errors import InputError

Messages = list[dict[str, Any]]
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Keys whose text is compared with what a template writes.
COMPARED = {"role", "content", "tool_calls", "function_call", *_THOUGHTS}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool"}


def read_messages(value: Any, name: str, origin: str) -> Messages | None:
    """Return the chat messages that ``value`` is, without nulls and empty lists; None if it is anything else.

    Reads one message or several, ShareGPT's ``from`` and ``value``, and contents that are a list of text parts. A
    message that calls tools or holds thoughts needs no content. Raises InputError for parts that are no text.
    """
    messages = [_message(one, name, origin) for one in (value if isinstance(value, list) else [value])]
    return [message for message in messages if message is not None] if messages and None not in messages else None


def _message(given: Any, name: str, origin: str) -> dict[str, Any] | None:
    if not isinstance(given, dict):
        return None
    message = {key: value for key, value in given.items() if value is not None and (value != [] or key == "content")}
    if "role" not in message and isinstance(role := message.pop("from", None), str):
        message = {"role": _SHAREGPT_ROLES.get(role, role), "content": message.pop("value", None), **message}
    if isinstance(parts := message.get("content"), list):
        message["content"] = "".join(_part(part, name, origin) for part in parts)
    if "content" not in message and any(given_texts(message)):
        message["content"] = ""
    return message if all(isinstance(message.get(key), str) for key in ("role", "content")) else None


def _part(part: Any, name: str, origin: str) -> str:
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InputError(f"{origin}: a message of {name!r} has a part of type {kind!r}; only text parts are read")
    return part["text"]


def given_texts(message: dict[str, Any]) -> Iterator[str]:
    """Return what a message says: content, thoughts, and names and arguments of the tools that it calls."""
    thoughts = {message[key] for key in _THOUGHTS if isinstance(message.get(key), str)}
    yield from filter(None, [message.get("content"), *thoughts])
    for name, arguments in _calls(message):
        if isinstance(arguments, str):  # JSON, which templates write as it stands or anew
            with suppress(ValueError):
                arguments = json.loads(arguments)
        yield from filter(None, _leaves([name, arguments]))


def kept_texts(message: dict[str, Any]) -> Iterator[str]:
    """Return what a template must write of an earlier message: all but thoughts, which many templates drop."""
    if message["role"] == "assistant":
        said = message["content"].rpartition("</think>")[2]
        message = {"content": said, **{key: message.get(key) for key in ("tool_calls", "function_call")}}
    return given_texts(message)


def _calls(message: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for call in [*(message.get("tool_calls") or []), message.get("function_call")]:
        function = call.get("function", call) if isinstance(call, dict) else {}
        yield function.get("name", ""), function.get("arguments", "")


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def holds_all(rendered: str, texts: Iterable[str]) -> bool:
    """Return whether ``rendered`` has each of ``texts`` in a different place, unchanged or escaped as in JSON.

    White space does not count. Templates may write the texts in any order.
    """
    rest = squeeze(rendered)
    for text in sorted(texts, key=len, reverse=True):
        found = next((form for form in _forms(text) if form in rest), None)
        if found is None:
            return False
        rest = rest.replace(found, "\0", 1) if found else rest
    return True


def _forms(text: str) -> Iterator[str]:
    yield squeeze(text)
    for ascii_only in (True, False):
        yield squeeze(json.dumps(text, ensure_ascii=ascii_only)[1:-1])


def squeeze(text: str) -> str:
    """``text`` without white space."""
    return "".join(text.split())


def check_calls(messages: Messages, rendered: str, origin: str) -> None:
    """Raise InputError where a template writes arguments as JSON within JSON, or as Python shows them."""
    for _, arguments in (call for message in messages for call in _calls(message)):
        if isinstance(arguments, str) and arguments.strip()[:1] == "{":
            twice = any(json.dumps(arguments, ensure_ascii=ascii_only) in rendered for ascii_only in (True, False))
            remedy = "within a string of JSON; give them as an object" if twice else ""
        else:
            as_python = isinstance(arguments, dict) and arguments and str(arguments) in rendered
            remedy = "as Python does, not as JSON; give them as a string of JSON" if as_python else ""
        if remedy:
            raise InputError(f"{origin}: the chat template writes the arguments of a tool's call {remedy}")


def check_text(text: str, origin: str) -> None:
    """Raise InputError for text that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: holds half a character ({text[error.start]!r}, a lone surrogate, after "
            f"{text[max(0, error.start - 20) : error.start]!r}), which no tokenizer reads; write the whole character"
        ) from None

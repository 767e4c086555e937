"""What chat messages say, whatever a template makes of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from .errors import InputError

Messages = list[dict[str, Any]]


def given_texts(message: dict[str, Any]) -> Iterator[str]:
    """What a message says: its content, its thoughts, and names and arguments of the tools that it calls."""
    for key in ("content", "reasoning_content", "reasoning", "thinking"):
        if isinstance(message.get(key), str):
            yield message[key]
    for call in message.get("tool_calls") or []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        arguments = function.get("arguments", "")
        if isinstance(arguments, str):  # JSON, which templates write as it stands or anew
            try:
                arguments = json.loads(arguments)
            except ValueError:
                pass
        yield from _leaves([function.get("name", ""), arguments])


def _leaves(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _leaves(one)
    elif isinstance(value, str):
        yield value


def is_left_out(text: str, rendered: str) -> bool:
    """Whether ``rendered`` lacks ``text``, apart from white space, and as it stands or escaped as in JSON."""
    squeezed = "".join(rendered.split())
    if "".join(text.split()) in squeezed:
        return False
    escaped = (json.dumps(text, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))
    return not any("".join(form.split()) in squeezed for form in escaped)


def check_text(text: str, origin: str) -> None:
    """Raise InputError for text that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: holds half a character ({text[error.start]!r}, a lone surrogate, after "
            f"{text[max(0, error.start - 20) : error.start]!r}), which no tokenizer reads; write the whole one"
        ) from None

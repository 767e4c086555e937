"""Read prompt files, and write the answer files that AlpacaEval, Arena-Hard and MT-Bench read.

What each tool reads, by its own source:

- ``alpaca_eval``, github.com/tatsu-lab/alpaca_eval, ``main.py`` (``model_outputs``): one JSON list of objects with
  ``instruction``, ``output`` and ``generator``; ``dataset`` is passed on.
- ``arena_hard``, github.com/lmarena/arena-hard-auto 2.0, ``gen_answer.py`` and ``gen_judgment.py``: JSON lines with
  ``uid``, ``ans_id``, ``model``, ``messages`` (the last one's content is ``{"answer": text}``) and ``tstamp``. Style
  control additionally needs what their ``utils/add_markdown_info.py`` adds, with a tokenizer of theirs.
- ``mt_bench``, github.com/lm-sys/FastChat, ``fastchat/llm_judge``: JSON lines with ``question_id``, ``answer_id``,
  ``model_id``, ``choices`` (``[{"index", "turns": [text, text]}]``) and ``tstamp``. The second answer follows the
  first. ``TEMPERATURES`` are those that ``common.py`` there has for the categories, ``DEFAULT_TEMPERATURE`` that of
  ``gen_model_answer.py`` for all others.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoint import whole_file
from .errors import InputError
from .messages import Messages, check_text, read_messages
from .records import PROMPT_PARTS
from .sources import Records, Source

FORMATS = ("alpaca_eval", "arena_hard", "mt_bench")
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0}
TEMPERATURES |= {"stem": 0.1, "humanities": 0.1}
DEFAULT_TEMPERATURE = 0.7


class Question(NamedTuple):
    """One record of a prompt file. ``origin`` is what messages call it."""

    origin: str
    record: dict[str, Any]
    text: str | None  # a prompt to be continued as it stands, or
    turns: list[Messages]  # what is said to the assistant before each of its answers

    @property
    def answers(self) -> int:
        return 1 if self.text is not None else len(self.turns)

    @property
    def asked(self) -> str:
        """Return the text or messages that the first answer replies to."""
        return self.text if self.text is not None else str(self.turns[0][-1]["content"])


def read_questions(file: str, form: str, *, chat: bool) -> list[Question]:
    """The records of ``file``, in any format that training data may have, each able to fill ``form``.

    A record holds ``messages`` (a conversation to be answered), ``turns`` (strings, each answered), ``instruction`` (a
    user's message) or ``prompt`` (text as it stands; a user's message with ``chat``, and in Arena-Hard's questions).
    Raises InputError, naming file and line.
    """
    if not Path(file).is_file():
        problem = "is a folder; give a file" if Path(file).is_dir() else "no such file"
        raise InputError(f"{file}: {problem} (working directory: {Path.cwd()})")
    questions = [_question(origin, values, form, chat) for origin, values, _ in Records(Source(file))]
    if not questions:
        raise InputError(f"{file}: holds no record")
    return questions


def _question(origin: str, record: dict[str, Any], form: str, chat: bool) -> Question:
    found = f"keys found: {', '.join(map(repr, record)) or 'none'}"
    needed = {"arena_hard": ("prompt", "uid"), "mt_bench": ("turns", "question_id")}.get(form, ())
    if missing := [name for name in needed if name not in record]:
        raise InputError(f"{origin}: {missing[0]!r} is missing, which {form} needs ({found})")
    for part in sorted(PROMPT_PARTS):
        if record.get(part):
            raise InputError(f"{origin}: {part!r} is not read; write it into what is to be answered")
    names = needed[:1] or ("messages", "conversations", "turns", "instruction", "prompt")
    name = next((name for name in names if name in record), None)
    if name is None:
        raise InputError(f"{origin}: neither messages, turns, instruction nor prompt ({found})")
    value = record[name]
    if name == "prompt" and isinstance(value, str) and not chat and form != "arena_hard":
        check_text(value, origin)
        return Question(origin, record, value, [])
    if name == "turns" and not (isinstance(value, list) and value):
        raise InputError(f"{origin}: 'turns' must be a list with at least one entry")
    turns = [_turn(one, name, origin) for one in (value if name == "turns" else [value])]
    if form == "alpaca_eval" and len(turns) > 1:
        raise InputError(f"{origin}: {len(turns)} turns, but alpaca_eval has one; use --format mt_bench")
    return Question(origin, record, None, turns)


def _turn(value: Any, name: str, origin: str) -> Messages:
    if isinstance(value, str) and name != "messages":
        value = {"role": "user", "content": value}
    messages = read_messages(value, name, origin)
    if messages is None:
        raise InputError(f"{origin}: {name!r} must hold text or messages; each message needs a role and a content")
    if messages[-1]["role"] == "assistant":
        raise InputError(f"{origin}: {name!r} ends with an assistant message; end it with the message to answer")
    for message in messages:
        check_text(message["content"], origin)
    return messages


def temperature(question: Question) -> float:
    """Return the temperature at which MT-Bench asks ``question``."""
    return TEMPERATURES.get(str(question.record.get("category")), DEFAULT_TEMPERATURE)


def write_answers(
    file: Path, form: str, questions: Sequence[Question], answers: Sequence[Sequence[str]], name: str
) -> None:
    """Write ``answers`` of the model ``name``, one list for each of ``questions``. ``file`` is never incomplete.

    ``form`` is one of ``FORMATS``, or "reflect" for JSON lines of prompt, draft and answer.
    """
    entries = [_entry(form, question, given, name) for question, given in zip(questions, answers, strict=True)]
    if form == "alpaca_eval":
        text = json.dumps(entries, ensure_ascii=False, indent=2) + "\n"
    else:
        text = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    with whole_file(file) as to:
        to.write_text(text, encoding="utf-8")


def _entry(form: str, question: Question, answers: Sequence[str], name: str) -> dict[str, Any]:
    record, now, answer_id = question.record, time.time(), uuid.uuid4().hex
    if form == "reflect":
        return {"prompt": question.asked, **dict(zip(("draft", "answer"), answers))}
    if form == "alpaca_eval":
        kept = {key: record[key] for key in ("dataset",) if key in record}
        instruction = record.get("instruction", question.asked)
        return {**kept, "instruction": instruction, "output": answers[0], "generator": name}
    if form == "arena_hard":
        reply = {"role": "assistant", "content": {"answer": answers[0]}}
        messages = [*question.turns[0], reply]
        return {"uid": record["uid"], "ans_id": answer_id, "model": name, "messages": messages, "tstamp": now}
    choices = [{"index": 0, "turns": answers}]
    ids = {"question_id": record["question_id"], "answer_id": answer_id, "model_id": name}
    return {**ids, "choices": choices, "tstamp": now}

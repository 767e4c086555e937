"""Find out what a tokenizer's chat template writes before and after an answer, and which data columns it reads."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from .errors import InputError
from .messages import Messages, check_text, given_texts

# Content that no template has a reason to change, and that appears nowhere else in what one writes.
_QUESTION, _ANSWER = "Quaestio", "Responsum"
ASKED: Messages = [{"role": "user", "content": _QUESTION}]
ANSWERED: Messages = [*ASKED, {"role": "assistant", "content": _ANSWER}]
SYSTEM: Messages = [{"role": "system", "content": "Iussum"}]
# Variables of a template that are no columns of the data: transformers sets them.
_OWN = {"messages", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "raise_exception"}
_OWN |= {"prompt", "chosen", "rejected"}
# A tag of transformers' own, which marks what the assistant says.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*[-+]?%\}")
ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}


class Turn(NamedTuple):
    """Hold what a chat template writes after an assistant's content at the end of a conversation."""

    closing: str  # belongs to the response: "<|im_end|>"
    after: str  # belongs to the next turn: "\n"
    end_id: int | None  # the id that ends the response; None where the template has no token for it


class ChatTemplate:
    """The chat template of ``tokenizer``, which may have none: then rendering raises InputError."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        given = tokenizer.chat_template or {}
        self.texts: list[str] = [given] if isinstance(given, str) else [*given.values()]

    def render(self, messages: Messages, *, answer_next: bool, origin: str, **columns: Any) -> str:
        """Return the chat template's text; ``answer_next`` lets it end where the assistant begins to answer.

        ``columns`` of the record are passed to the template.
        """
        for role in (message["role"] for message in messages):
            if role not in ROLES and not any(repr(role) in text or f'"{role}"' in text for text in self.texts):
                raise InputError(f"{origin}: the role {role!r} is not one of {', '.join(sorted(ROLES))}")
        text = self._render(messages, answer_next, origin, **columns)
        return text + (self.header if answer_next else "")

    def _render(self, messages: Messages, answer_next: bool, origin: str = "", **columns: Any) -> str:
        if not self.texts:
            raise InputError(f"{origin}: holds messages, but the tokenizer has no chat template; use strings")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=answer_next, **columns
            )
        except Exception as error:  # a template refuses with TemplateError, or breaks in any way of Python's
            roles = ", ".join(message["role"] for message in messages)
            problem = str(error) if isinstance(error, TemplateError | TypeError | ValueError) else repr(error)
            raise InputError(
                f"{origin}: the tokenizer's chat template cannot render these messages (roles: {roles}): {problem}"
            ) from None
        assert isinstance(text, str)  # of one conversation
        check_text(text, origin)
        return text

    def render_pair(
        self, prompt: Messages, responses: list[Messages], origin: str, **columns: Any
    ) -> tuple[str, list[str]]:
        """Prompt text, and each response as what the template adds to it; "" for a response that has no content."""
        opening = self.render(prompt, answer_next=True, origin=origin, **columns)
        texts = []
        for response in responses:
            whole = self.render(prompt + response, answer_next=False, origin=origin, **columns)
            if not whole.startswith(opening):
                at = next(i for i, (a, b) in enumerate(zip(opening + "\0", whole + "\0")) if a != b)
                raise InputError(
                    f"{origin}: the chat template writes the prompt in another way once it has an answer: "
                    f"{opening[at : at + 40]!r} becomes {whole[at : at + 40]!r}. Use a template that only appends, or "
                    "set its switches in chat_template_kwargs (for example {enable_thinking: false})"
                )
            empty = not any(text.strip() for message in response for text in given_texts(message))
            texts.append("" if empty else whole[len(opening) :].removesuffix(self.turn.after))
        return opening, texts

    @cached_property
    def columns(self) -> set[str]:
        """Names of the columns that the chat template reads beside the messages."""
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        names: set[str] = set()
        with suppress(TemplateError):  # one that is ill written says so when it renders
            for text in self.texts:
                names |= meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", text)))
        return names - _OWN - set(self.tokenizer.special_tokens_map)

    @cached_property
    def words(self) -> set[str]:
        """The words of the template's source, among which are the keys of messages that it reads."""
        return {word for text in self.texts for word in re.findall(r"\w+", text)}

    @cached_property
    def special(self) -> dict[str, int]:
        """The special tokens and their ids."""
        added = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return added | dict(zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids))

    @cached_property
    def special_ids(self) -> set[int]:
        return set(self.special.values())

    @cached_property
    def special_text(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self.special)) or "(?!)")

    @cached_property
    def start(self) -> Messages:
        """The messages without which the template renders no question: none, or one of the system."""
        for start in ([], SYSTEM):
            with suppress(InputError):
                self._render([*start, *ASKED], True)
                return start
        return []

    @cached_property
    def _opening(self) -> tuple[str, str]:
        """Return what the template writes before each answer: as its generation prompt, and without it.

        It belongs to the prompt. Blanks alone stay with the answer: the model writes them.
        """
        try:
            asked, prompted = (self._render([*self.start, *ASKED], answer_next) for answer_next in (False, True))
            whole = self._render([*self.start, *ANSWERED], False)
        except InputError:  # no template, or one that reads other conversations; whoever renders with it is told
            return "", ""
        if asked != prompted or not whole.startswith(asked) or _ANSWER not in whole:
            return prompted.removeprefix(asked), ""
        header = whole[len(asked) : whole.index(_ANSWER)]
        return "", header if header.strip() else ""

    @cached_property
    def written_first(self) -> str:
        """Text that the template writes between its generation prompt and an answer, such as an empty thought."""
        with suppress(InputError):
            prompted = self.render([*self.start, *ASKED], answer_next=True, origin="")
            whole = self._render([*self.start, *ANSWERED], False)
            if whole.startswith(prompted):
                return whole[len(prompted) :].partition(_ANSWER)[0].strip()
        return ""

    @property
    def header(self) -> str:
        """Return what the template writes before each answer although it has no generation prompt."""
        return self._opening[1]

    @property
    def answer_opening(self) -> str:
        """Return what precedes each answer, with or without a generation prompt."""
        return "".join(self._opening)

    @cached_property
    def cue(self) -> str:
        """``answer_opening``, if a special token is in it, so that no text of a person has it."""
        cue = self.answer_opening.strip()
        return cue if self.special_text.search(cue) else ""

    @cached_property
    def turn(self) -> Turn:
        """Return how the chat template closes an assistant's turn."""
        conversation = [*self.start, *ANSWERED]
        tail = self.after_answer(self.render(conversation, answer_next=False, origin="chat template"))
        known = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items()} | self.special
        first = min((t for t in known if t in tail), key=lambda t: (tail.index(t), -len(t)), default=None)
        closing = tail.rstrip("\n") if first is None else tail[: tail.index(first) + len(first)]
        return Turn(closing, tail[len(closing) :], None if first is None else known[first])

    def after_answer(self, text: str) -> str:
        """Return what follows the answer of ``ANSWERED`` in ``text``."""
        _, found, tail = text.rpartition(_ANSWER)
        if not found:
            raise InputError("the tokenizer's chat template leaves out what an assistant says; use another template")
        return tail

    @cached_property
    def reads_clock(self) -> bool:
        """Return whether the chat template writes the time at which it is rendered."""
        try:
            template = self.tokenizer.get_chat_template()
            clocks = [f"{{%- macro strftime_now(form) %}}{hour}{{%- endmacro %}}" + template for hour in (1, 2)]
            return len({self._render([*self.start, *ASKED], True, chat_template=text) for text in clocks}) > 1
        except (InputError, ValueError):  # no template, or one that reads other conversations
            return False

    def today(self) -> str:
        """The part of what the chat template writes that changes by itself."""
        return self._render([*self.start, *ASKED], True) if self.reads_clock else ""

"""Text and chat messages to token ids: where a prompt ends, how a response ends, what stands between two responses."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any, NamedTuple

from jinja2 import Environment, TemplateError, meta
from transformers import PreTrainedTokenizerBase

from .errors import InputError
from .messages import Messages, check_text, given_texts

# Content that no template has a reason to change, and that appears nowhere else in what one writes.
_QUESTION, _ANSWER = "Quaestio", "Responsum"
_ASKED: Messages = [{"role": "user", "content": _QUESTION}]
_ANSWERED: Messages = [*_ASKED, {"role": "assistant", "content": _ANSWER}]
_SYSTEM: Messages = [{"role": "system", "content": "Iussum"}]
# Variables of a template that are no columns of the data: transformers sets them.
_OWN = {"messages", "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "prompt", "chosen"}
# A tag of transformers' own, which marks what the assistant says.
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*[-+]?%\}")
ROLES = {"system", "developer", "user", "assistant", "tool", "function", "ipython"}


class Turn(NamedTuple):
    """What a chat template writes after an assistant's content at the end of a conversation."""

    closing: str  # belongs to the response: "<|im_end|>"
    after: str  # belongs to the next turn: "\n"
    end_id: int | None  # the id that ends the response; None where the template has no token for it


class TextEncoder:
    """Tokenises prompts and responses with ``tokenizer``, and presents one response after another.

    A response's ids are those that follow the prompt's ids when both texts are tokenised together: no space or token is
    added at the joint, and none that generation could not produce. Where the tokenizer would merge across the joint,
    the prompt's ids stay as they are and the response is tokenised by itself. So the prompt's ids are the same in front
    of any response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        bos = tokenizer.bos_token_id
        self._bos = bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None
        self._known: dict[str, list[int]] = {}
        self.is_used = False  # whether a pair was rendered by the chat template

    def prefetch(self, texts: Iterable[str]) -> None:
        """Tokenise ``texts`` together, on all cores; later calls look them up. Forgets those of the call before."""
        wanted = list(dict.fromkeys(texts))
        ids = self.tokenizer(wanted, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        self._known = dict(zip(wanted, ids, strict=True))

    def _encode(self, text: str) -> list[int]:
        if (ids := self._known.get(text)) is None:
            check_text(text, "text")
            ids = self._known[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def prompt(self, text: str) -> list[int]:
        """Ids of ``text`` with exactly one BOS in front, if the tokenizer uses one (a template may have put it)."""
        ids = list(self._encode(text))
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def response(self, text: str, prompt: str, *, chat: bool) -> list[int]:
        """Ids of ``text`` after ``prompt``, ended by EOS, or with ``chat`` by the template's end of turn if it has one.

        A text that is blank apart from its end gives [].
        """
        ids = self.continuation(text, prompt) if text.strip() else []
        ends = self.ends(chat=chat)
        if all(token in ends for token in ids):
            return []
        return ids if ids[-1] in ends else [*ids, self.tokenizer.eos_token_id]

    def ends(self, *, chat: bool) -> set[int]:
        """Ids that end a response: EOS, and with ``chat`` the template's end of turn."""
        end_of_turn = None
        if chat:
            with suppress(InputError):  # a template that cannot be used at all, beside strings
                end_of_turn = self.turn.end_id
        return {i for i in (self.tokenizer.eos_token_id, end_of_turn) if i is not None}

    def continuation(self, text: str, before: str) -> list[int]:
        """Ids of ``text`` where it follows the text ``before``, whose own ids stay as they are."""
        # If not together, then by itself, but not at the very beginning, where some tokenizers put a space in front.
        # Tokens seldom cross from a newline to a word, or from a letter to white space.
        for left in (before, "a" if text[:1].isspace() else "\n", ""):
            head, joint = self._encode(left), self._encode(left + text)
            if joint[: len(head)] == head:
                break
        return list(joint[len(head) :])

    def render(self, messages: Messages, *, answer_next: bool, origin: str, **columns: Any) -> str:
        """Return the chat template's text; ``answer_next`` lets it end where the assistant begins to answer.

        ``columns`` of the record are passed to the template.
        """
        text = self._render(messages, answer_next, origin, **columns)
        return text + (self.header if answer_next else "")

    def _render(self, messages: Messages, answer_next: bool, origin: str, **columns: Any) -> str:
        if not self.tokenizer.chat_template:
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
        self.is_used = True
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
    def _templates(self) -> list[str]:
        given = self.tokenizer.chat_template or {}
        return [given] if isinstance(given, str) else [*given.values()]

    @cached_property
    def columns(self) -> set[str]:
        """Names of the columns that the chat template reads beside the messages."""
        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        names: set[str] = set()
        with suppress(TemplateError):  # one that is ill written says so when it renders
            for text in self._templates:
                names |= meta.find_undeclared_variables(environment.parse(_GENERATION.sub("", text)))
        return names - _OWN - {"rejected", *self.tokenizer.special_tokens_map}

    def knows(self, role: str) -> bool:
        """Whether ``role`` is a usual one, or one that the chat template asks for; many write any role as it stands."""
        return role in ROLES or any(repr(role) in text or f'"{role}"' in text for text in self._templates)

    @cached_property
    def special(self) -> re.Pattern[str]:
        """Matches any special token."""
        return re.compile("|".join(map(re.escape, self.tokenizer.all_special_tokens)) or "(?!)")

    @cached_property
    def _start(self) -> Messages:
        """The messages without which the template renders no question: none, or one of the system."""
        for start in ([], _SYSTEM):
            with suppress(InputError):
                self._render([*start, *_ASKED], True, "")
                return start
        return []

    @cached_property
    def _opening(self) -> tuple[str, str]:
        """What the template writes before each answer: with its generation prompt, and without any.

        It belongs to the prompt. Blanks alone stay with the answer: the model writes them.
        """
        try:
            asked, prompted = (self._render([*self._start, *_ASKED], answer_next, "") for answer_next in (False, True))
            whole = self._render([*self._start, *_ANSWERED], False, "")
        except InputError:  # no template, or one that reads other conversations; whoever renders with it is told
            return "", ""
        if asked != prompted:
            return prompted.removeprefix(asked), ""
        if not whole.startswith(asked) or _ANSWER not in whole:
            return "", ""
        header = whole[len(asked) : whole.index(_ANSWER)]
        return "", header if header.strip() else ""

    @property
    def header(self) -> str:
        """What the template writes before each answer although it has no generation prompt."""
        return self._opening[1]

    @cached_property
    def cue(self) -> str:
        """What precedes each answer, if a special token is in it, so that no text of a person has it."""
        cue = "".join(self._opening).strip()
        return cue if self.special.search(cue) else ""

    @cached_property
    def turn(self) -> Turn:
        """How the chat template closes an assistant's turn."""
        tail = self._after_answer(self.render([*self._start, *_ANSWERED], answer_next=False, origin="chat template"))
        known = {token.content: i for i, token in self.tokenizer.added_tokens_decoder.items()}
        known |= {token: i for i, token in zip(self.tokenizer.all_special_ids, self.tokenizer.all_special_tokens)}
        first = min((t for t in known if t in tail), key=lambda t: (tail.index(t), -len(t)), default=None)
        if first is None:
            closing = tail.rstrip("\n")
            return Turn(closing, tail[len(closing) :], None)
        closing = tail[: tail.index(first) + len(first)]
        return Turn(closing, tail[len(closing) :], known[first])

    def separator(self, instruction: str) -> list[int]:
        """Ids of a turn between two responses: a user's ``instruction`` and the opening of the assistant's next answer.

        They come from the chat template: what it writes between the end of the first answer and the beginning of the
        second. Raises InputError where it has no such text, or one that depends on the conversation.
        """
        if not instruction.strip():
            raise InputError("alternative_instruction is empty; say what the next answer should do better")
        if not self.tokenizer.chat_template:
            raise InputError(
                "alternative=chat: the tokenizer has no chat template; use alternative=plain, or give it a template"
            )
        check_text(instruction, "alternative_instruction")
        ask = {"role": "user", "content": instruction}
        texts = [
            self._after_answer(self.render([*self._start, *messages, ask], answer_next=True, origin="alternative=chat"))
            for messages in (_ANSWERED, [*_ASKED, {"role": "assistant", "content": "a"}, *_ANSWERED])
        ]
        if texts[0] != texts[1]:
            raise InputError(
                f"alternative=chat: what the chat template writes after an answer depends on the conversation "
                f"({texts[0]!r}, then {texts[1]!r}); use alternative=plain"
            )
        if instruction.strip() not in texts[0]:
            raise InputError("alternative=chat: the chat template leaves out alternative_instruction; use another text")
        if not texts[0].startswith(self.turn.closing):
            raise InputError(
                f"alternative=chat: the chat template ends an answer with {self.turn.closing!r}, but not in front of "
                f"another turn ({texts[0][:40]!r}); use alternative=plain"
            )
        end = self.turn.closing if self.turn.end_id is not None else self.tokenizer.eos_token
        return self.continuation(texts[0].removeprefix(self.turn.closing), end)

    def _after_answer(self, text: str) -> str:
        _, found, tail = text.rpartition(_ANSWER)
        if not found:
            raise InputError("the tokenizer's chat template leaves out what an assistant says; use another template")
        return tail

    @cached_property
    def reads_clock(self) -> bool:
        """Whether the chat template writes the time at which it is rendered."""
        try:
            template = self.tokenizer.get_chat_template()
            clocks = [f"{{%- macro strftime_now(form) %}}{hour}{{%- endmacro %}}" + template for hour in (1, 2)]
            return len({self._render([*self._start, *_ASKED], True, "", chat_template=text) for text in clocks}) > 1
        except (InputError, ValueError):  # no template, or one that reads other conversations
            return False

    def today(self) -> str:
        """The part of what the chat template writes that changes by itself."""
        return self._render([*self._start, *_ASKED], True, "") if self.reads_clock else ""


def separator_ids(tokenizer: PreTrainedTokenizerBase | None, options: Any) -> list[int]:
    """What stands between the other response and the one that is scored given it, by ``options.alternative``."""
    if options.alternative == "plain":
        return []
    if tokenizer is None:
        raise InputError("alternative=chat needs a tokenizer, whose chat template it follows")
    return TextEncoder(tokenizer).separator(options.alternative_instruction)


def prepare_tokenizer(
    tokenizer: PreTrainedTokenizerBase, options: Any, log: Callable[[str], None]
) -> PreTrainedTokenizerBase:
    """Return a copy of ``tokenizer`` with ``options.chat_template_kwargs`` and a generation prompt in its template."""
    tokenizer = copy.deepcopy(tokenizer)
    set_template_kwargs(tokenizer, options.chat_template_kwargs or {})
    encoder = TextEncoder(tokenizer)
    if header := encoder.header:
        log(
            f"the chat template has no generation prompt: {header!r}, which it writes before each answer, belongs to "
            "the prompt, and is added to the template as its generation prompt"
        )
        ending = f"{{% if add_generation_prompt %}}{{{{ {json.dumps(header)} }}}}{{% endif %}}"
        _edit_template(tokenizer, lambda text: text.removesuffix("\n") + ending)
    return tokenizer


def set_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    """Fixes ``kwargs``, switches of the chat template, within the template itself, so that a saved tokenizer has them.

    ``strftime_now`` is the date that a template writes as today's. Raises InputError for a tokenizer without a template
    and for values that are not str, bool, int, float or None.
    """
    if not kwargs:
        return
    if not tokenizer.chat_template:
        raise InputError("chat_template_kwargs: the tokenizer has no chat template")
    for name, value in kwargs.items():
        if not name.isidentifier() or not isinstance(value, str | bool | int | float | None):
            raise InputError(
                f"chat_template_kwargs: {name}={value!r} is not a name with a string, number or truth value"
            )
    values = {name: "none" if value is None else json.dumps(value) for name, value in kwargs.items()}
    lines = "".join(
        f"{{%- macro {name}(form) %}}{{{{ {value} }}}}{{%- endmacro %}}"
        if name == "strftime_now"
        else f"{{%- set {name} = {value} %}}"
        for name, value in values.items()
    )
    _edit_template(tokenizer, lambda text: text if text.startswith(lines) else lines + text)


def _edit_template(tokenizer: PreTrainedTokenizerBase, edit: Callable[[str], str]) -> None:
    """Changes the chat template, or each of several by name."""
    given = tokenizer.chat_template
    if isinstance(given, str):
        tokenizer.chat_template = edit(given)
    elif given:
        tokenizer.chat_template = {name: edit(text) for name, text in given.items()}

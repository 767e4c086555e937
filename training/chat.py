"""Turn text and chat messages into token ids, with the ends of prompts and responses and the text between responses."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from .errors import InputError, Log
from .messages import check_text
from .templates import ANSWERED, ASKED, SYSTEM, ChatTemplate


class TextEncoder(ChatTemplate):
    """Tokenises prompts and responses with ``tokenizer``, and presents one response after another.

    A response's ids are those that follow the prompt's ids when both texts are tokenised together: no space or token is
    added at the joint, and none that generation could not produce. Where the tokenizer would merge across the joint,
    the prompt's ids stay as they are and the response is tokenised by itself. So the prompt's ids are the same in front
    of any response.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        bos = tokenizer.bos_token_id
        self._bos = bos if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else None
        self._known: dict[str, list[int]] = {}

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

        A text that is blank apart from its end gives []. Some templates end a call of a tool in a way of its own.
        """
        ids = self.continuation(text, prompt) if text.strip() else []
        if all(token in self.ends for token in ids):
            return []
        return ids if ids[-1] in (self.all_ends if chat else self.ends) else [*ids, self.tokenizer.eos_token_id]

    @cached_property
    def lacks_bos(self) -> bool:
        """Whether the tokenizer begins text with a BOS, but the chat template writes none, with a system or without."""
        first = set()
        for start in ([], SYSTEM) if self._bos is not None else []:
            with suppress(InputError):  # no template, or one that reads other conversations
                first.update(self._encode(self._render([*start, *ASKED], True))[:1])
        return bool(first) and self._bos not in first

    @cached_property
    def ends(self) -> set[int]:
        """Ids that end a response: EOS, and the chat template's end of turn, which text may hold without it."""
        return {i for i in (self.tokenizer.eos_token_id, self._end_of_turn) if i is not None}

    @cached_property
    def _end_of_turn(self) -> int | None:
        with suppress(InputError):  # a template that cannot be used at all, beside strings
            return self.turn.end_id
        return None

    @cached_property
    def all_ends(self) -> set[int]:
        """Ids that end what a template writes: where it ends turns with a special token, any of these."""
        return {*self.ends, *self.special_ids} if self._end_of_turn is not None else self.ends

    def without_blank_end(self, text: str) -> str:
        """``text`` without white space behind the token that ends it, which templates write before the next turn."""
        cut = text.rstrip()
        return cut if cut.endswith(tuple(self.tokenizer.convert_ids_to_tokens([*self.ends]))) else text

    def continuation(self, text: str, before: str) -> list[int]:
        """Ids of ``text`` where it follows the text ``before``, whose own ids stay as they are."""
        # If not together, then by itself, but not at the very beginning, where some tokenizers put a space in front.
        # Tokens seldom cross from a newline to a word, or from a letter to white space.
        for left in (before, "a" if text[:1].isspace() else "\n", ""):
            head, joint = self._encode(left), self._encode(left + text)
            if joint[: len(head)] == head:
                break
        return list(joint[len(head) :])

    def separator(self, instruction: str) -> list[int]:
        """Ids of a turn between two responses: a user's ``instruction`` and the opening of the assistant's next answer.

        They come from the chat template: what it writes between the end of the first answer and the beginning of the
        second. Raises InputError where it has no such text, or one that depends on the conversation.
        """
        if not instruction.strip():
            raise InputError("alternative_instruction is empty; say what the next answer should do better")
        check_text(instruction, "alternative_instruction")
        ask = {"role": "user", "content": instruction}
        texts = [
            self.after_answer(self.render([*self.start, *messages, ask], answer_next=True, origin="alternative=chat"))
            for messages in (ANSWERED, [*ASKED, {"role": "assistant", "content": "a"}, *ANSWERED])
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


def separator_ids(tokenizer: PreTrainedTokenizerBase | None, options: Any) -> list[int]:
    """Return the ids between the other response and the scored response, by ``options.alternative``."""
    if options.alternative == "plain":
        return []
    if tokenizer is None:
        raise InputError("alternative=chat needs a tokenizer, whose chat template it follows")
    return TextEncoder(tokenizer).separator(options.alternative_instruction)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, options: Any, log: Log) -> PreTrainedTokenizerBase:
    """Return a copy of ``tokenizer`` with ``options.chat_template_kwargs``, BOS and generation prompt in its template.

    A BOS is added only if the tokenizer begins other text with one. Servers add none to what a template writes.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if TextEncoder(tokenizer).lacks_bos:
        log(
            f"the chat template writes no {tokenizer.bos_token!r}, with which the tokenizer begins other text: it is "
            "added to the template, so that the saved model is served as it was trained"
        )
        _edit_template(tokenizer, lambda text: "{{ bos_token }}" + text)
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
    template, lines = ChatTemplate(tokenizer), ""
    for name, value in kwargs.items():
        if not name.isidentifier() or not isinstance(value, str | bool | int | float | None):
            raise InputError(
                f"chat_template_kwargs: {name}={value!r} is not a name with a string, number or truth value"
            )
        text = "none" if value is None else json.dumps(value)
        macro = f"{{%- macro {name}(form) %}}{{{{ {text} }}}}{{%- endmacro %}}"
        lines += macro if name == "strftime_now" else f"{{%- set {name} = {text} %}}"
    if all(text.startswith(lines) for text in template.texts):
        return  # they were fixed before
    if unread := kwargs.keys() - template.columns:
        known = ", ".join(sorted(template.columns)) or "none"
        raise InputError(f"chat_template_kwargs: the chat template reads no {min(unread)!r} (it reads: {known})")
    _edit_template(tokenizer, lambda text: lines + text)


def _edit_template(tokenizer: PreTrainedTokenizerBase, edit: Callable[[str], str]) -> None:
    """Changes the chat template, or each of several by name."""
    given = tokenizer.chat_template
    if isinstance(given, str):
        tokenizer.chat_template = edit(given)
    elif given:
        tokenizer.chat_template = {name: edit(text) for name, text in given.items()}

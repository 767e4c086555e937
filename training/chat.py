"""Text and chat messages to token ids: where a prompt ends, how a response ends, what stands between two responses."""

from __future__ import annotations

import json
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .config import InputError, TrainConfig

Messages = list[dict[str, Any]]
# Content that no template has a reason to change, and that appears nowhere else in what one writes.
_QUESTION, _ANSWER = "Quaestio", "Responsum"


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
        # A prompt is read once for itself and once for each response.
        self._encode = lru_cache(maxsize=8)(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def prompt(self, text: str) -> list[int]:
        """Ids of ``text`` with exactly one BOS in front, if the tokenizer uses one (a template may have put it)."""
        ids = list(self._encode(text))
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def response(self, text: str, prompt: str, *, chat: bool) -> list[int]:
        """Ids of ``text`` after ``prompt``, ended by EOS, or with ``chat`` by the template's end of turn if it has one.

        A text that is blank apart from its end gives [].
        """
        ids = self.continuation(text, prompt) if text.strip() else []
        ends = {self.tokenizer.eos_token_id, *([self.turn.end_id] if chat else [])}
        if all(token in ends for token in ids):
            return []
        return ids if ids[-1] in ends else [*ids, self.tokenizer.eos_token_id]

    def continuation(self, text: str, before: str) -> list[int]:
        """Ids of ``text`` where it follows the text ``before``, whose own ids stay as they are."""
        # If not together, then by itself, but not at the very beginning, where some tokenizers put a space in front.
        # Tokens seldom cross from a newline to a word, or from a letter to white space.
        for left in (before, "a" if text[:1].isspace() else "\n", ""):
            head, joint = self._encode(left), self._encode(left + text)
            if joint[: len(head)] == head:
                break
        return list(joint[len(head) :])

    def render(self, messages: Messages, *, answer_next: bool, origin: str) -> str:
        """The chat template's text; ``answer_next`` lets it end where the assistant begins to answer."""
        if not self.tokenizer.chat_template:
            raise InputError(f"{origin}: holds messages, but the tokenizer has no chat template; use strings")
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_next)
        except (TemplateError, TypeError, ValueError) as error:  # a template refuses with TemplateError, or breaks
            roles = ", ".join(message["role"] for message in messages)
            raise InputError(
                f"{origin}: the tokenizer's chat template cannot render these messages (roles: {roles}): {error}"
            ) from None
        assert isinstance(text, str)  # of one conversation
        return text

    def render_pair(self, prompt: Messages, responses: list[Messages], origin: str) -> tuple[str, list[str]]:
        """Prompt text, and each response as what the template adds to it; "" for a response without content."""
        opening = self.render(prompt, answer_next=True, origin=origin)
        texts = []
        for response in responses:
            whole = self.render(prompt + response, answer_next=False, origin=origin)
            if not whole.startswith(opening):
                at = next(i for i, (a, b) in enumerate(zip(opening + "\0", whole + "\0")) if a != b)
                raise InputError(
                    f"{origin}: the chat template writes the prompt in another way once it has an answer: "
                    f"{opening[at : at + 40]!r} becomes {whole[at : at + 40]!r}. Use a template that only appends, or "
                    "set its switches in chat_template_kwargs (for example {enable_thinking: false})"
                )
            empty = not any(message["content"].strip() for message in response)
            texts.append("" if empty else whole[len(opening) :].removesuffix(self.turn.after))
        return opening, texts

    @cached_property
    def turn(self) -> Turn:
        """How the chat template closes an assistant's turn."""
        messages = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        tail = self._after_answer(self.render(messages, answer_next=False, origin="chat template"))
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
        first = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
        ask = {"role": "user", "content": instruction}
        texts = [
            self._after_answer(self.render([*messages, ask], answer_next=True, origin="alternative=chat"))
            for messages in (first, [first[0], {"role": "assistant", "content": "a"}, *first])
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


def separator_ids(tokenizer: PreTrainedTokenizerBase | None, config: TrainConfig) -> list[int]:
    """What stands between the other response and the one that is scored given it, by ``config.alternative``."""
    if config.alternative == "plain":
        return []
    if tokenizer is None:
        raise InputError("alternative=chat needs a tokenizer, whose chat template it follows")
    return TextEncoder(tokenizer).separator(config.alternative_instruction)


def set_template_kwargs(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> None:
    """Fixes ``kwargs``, switches of the chat template, within the template itself, so that a saved tokenizer has them.

    Raises InputError for a tokenizer without a template and for values that are not str, bool, int, float or None.
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
    lines = "".join(
        f"{{%- set {name} = {'none' if value is None else json.dumps(value)} %}}" for name, value in kwargs.items()
    )
    given = tokenizer.chat_template
    templates = {"default": given} if isinstance(given, str) else given
    fixed = {name: text if text.startswith(lines) else lines + text for name, text in templates.items()}
    tokenizer.chat_template = fixed["default"] if isinstance(given, str) else fixed

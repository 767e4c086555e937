"""Experimental: answers given the model's own draft, in the layout that training conditions on.

A model trained with ``conditioned: true`` has seen prompt + other response + response. ``reflect_batch`` lets it write
a draft and then answer after prompt + draft. Whether that helps is to be measured for each model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from .chat import TextEncoder
from .errors import InputError
from .exports import Question
from .generate import answer_ends, answer_text, generate_batch, prompt_ids


class Reflection(NamedTuple):
    """Token ids of a draft, and of the answer given it; each ends with its end token, unless it was cut."""

    draft: list[int]
    answer: list[int]


def reflect_batch(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    separator: Sequence[int] = (),
    max_new_tokens: int,
    seeds: Sequence[Sequence[int]],
    chat: bool,
    **more: Any,
) -> list[Reflection]:
    """Answer each prompt of token ids, then again after prompt + draft + ``separator``.

    A draft is what ``generate_batch`` returns for the same options. A draft that was cut gets an end token, because
    every response in training has one. ``separator`` is what training puts between two responses.

    Raises InputError for a prompt that does not leave the model's positions room for both.
    """
    longest, positions = max(map(len, prompts)), getattr(model.config, "max_position_embeddings", None)
    needed = longest + 2 * max_new_tokens + len(separator) + 1
    if positions and needed > positions:
        raise InputError(
            f"--reflect: a prompt of {longest} tokens with a draft and an answer may take {needed} tokens, above the "
            f"model's {positions} positions; lower --max_new_tokens, or leave the prompt out"
        )
    ends = answer_ends(model, encoder, chat=chat)
    more |= {"max_new_tokens": max_new_tokens, "chat": chat}
    drafts = generate_batch(model, encoder, prompts, seeds=seeds, **more)
    end = encoder.turn.end_id if chat and encoder.turn.end_id is not None else encoder.tokenizer.eos_token_id
    given = [
        [*prompt, *draft, *([] if draft[-1] in ends else [end]), *separator] for prompt, draft in zip(prompts, drafts)
    ]
    answers = generate_batch(model, encoder, given, seeds=[[*seed, 1] for seed in seeds], **more)
    return [Reflection(draft, answer) for draft, answer in zip(drafts, answers)]


def reflect_questions(
    model: PreTrainedModel,
    encoder: TextEncoder,
    questions: Sequence[Question],
    *,
    temperature: float,
    batch_size: int,
    seed: int,
    **more: Any,
) -> list[dict[str, str]]:
    """Return prompt, draft and answer of each question, as text; ``more`` is for ``reflect_batch``.

    Raises InputError for a question of several turns.
    """
    for question in questions:
        if question.answers > 1:
            raise InputError(f"{question.origin}: {question.answers} turns, but --reflect answers one")
    rows = []
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        found = reflect_batch(
            model,
            encoder,
            [prompt_ids(encoder, question, []) for question in some],
            temperatures=[temperature] * len(some),
            seeds=[[seed, start + i, 0] for i in range(len(some))],
            chat=any(one.text is None for one in some),
            **more,
        )
        for question, reflection in zip(some, found):
            texts = {name: answer_text(ids, encoder.tokenizer).strip() for name, ids in reflection._asdict().items()}
            rows.append({"prompt": question.asked, **texts})
    return rows

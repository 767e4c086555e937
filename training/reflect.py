"""Experimental: answers given the model's own draft, in the layout that training conditions on.

A model trained with ``conditioned: true`` has seen prompt + other response + response. ``reflect_batch`` lets it write
a draft and then answer after prompt + draft. ``best_of_two`` spends as many generations on two drafts and keeps the
likelier one. Whether either helps is to be measured for each model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import inspo_kernels as ik

from .chat import TextEncoder
from .errors import InputError
from .exports import Question
from .generate import answer_ends, answer_text, generate_batch, prompt_ids
from .model import padding_id


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
    temperatures: Sequence[float],
    seeds: Sequence[Sequence[int]],
    chat: bool,
) -> list[Reflection]:
    """Answer each prompt of token ids, then again after prompt + draft + ``separator``.

    A draft is what ``generate_batch`` returns for the same arguments. A draft that was cut gets an end token, because
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
    common = {"max_new_tokens": max_new_tokens, "temperatures": temperatures, "chat": chat}
    drafts = generate_batch(model, encoder, prompts, seeds=seeds, **common)  # type: ignore[arg-type]
    end = encoder.turn.end_id if chat and encoder.turn.end_id is not None else encoder.tokenizer.eos_token_id
    given = [
        [*prompt, *draft, *([] if draft[-1] in ends else [end]), *separator] for prompt, draft in zip(prompts, drafts)
    ]
    answers = generate_batch(model, encoder, given, seeds=[[*seed, 1] for seed in seeds], **common)  # type: ignore[arg-type]
    return [Reflection(draft, answer) for draft, answer in zip(drafts, answers)]


def best_of_two(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperatures: Sequence[float],
    seeds: Sequence[Sequence[int]],
    chat: bool,
) -> list[list[int]]:
    """Answer each prompt twice and return the answer with the higher mean log-prob a token, given the prompt alone.

    The first answer is the draft that ``reflect_batch`` writes for the same arguments. At temperature 0 both are equal.
    """
    common = {"max_new_tokens": max_new_tokens, "temperatures": temperatures, "chat": chat}
    tries = [
        generate_batch(model, encoder, prompts, seeds=given, **common)  # type: ignore[arg-type]
        for given in (seeds, [[*seed, 2] for seed in seeds])
    ]
    pad = padding_id(encoder.tokenizer, lambda note: None)
    scores = torch.stack([mean_logps(model, prompts, answers, pad_token_id=pad) for answers in tries])
    return [tries[best][i] for i, best in enumerate(scores.argmax(0).tolist())]


@torch.no_grad()
def mean_logps(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, pad_token_id: int
) -> Tensor:
    """Return (n,) float64: the mean log-prob a token of each answer given its prompt, in nats."""
    rows = [[*prompt, *answer] for prompt, answer in zip(prompts, answers, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
    at, lengths = torch.arange(width), torch.tensor([[len(prompt), len(row)] for prompt, row in zip(prompts, rows)])
    scored = (at >= lengths[:, :1]) & (at < lengths[:, 1:])
    hidden, head = ik.hidden_and_head(
        model, input_ids=ids.to(model.device), attention_mask=(at < lengths[:, 1:]).long().to(model.device)
    )
    targets = ids.masked_fill(~scored, -100)[:, 1:].to(model.device)
    logps = ik.linear_logps(hidden[:, :-1], targets=targets, **head)
    assert isinstance(logps, Tensor)  # as no statistics are asked for
    return logps.double().sum(1).cpu() / scored.sum(1)


def reflect_questions(
    model: PreTrainedModel,
    encoder: TextEncoder,
    questions: Sequence[Question],
    *,
    separator: Sequence[int],
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> Iterator[dict[str, str]]:
    """Yield prompt, draft and answer of each question, as text. Raises InputError for one of several turns."""
    for question in questions:
        if question.answers > 1:
            raise InputError(f"{question.origin}: {question.answers} turns, but --reflect answers one")
    for start in range(0, len(questions), batch_size):
        some = questions[start : start + batch_size]
        found = reflect_batch(
            model,
            encoder,
            [prompt_ids(encoder, question, []) for question in some],
            separator=separator,
            max_new_tokens=max_new_tokens,
            temperatures=[temperature] * len(some),
            seeds=[[seed, start + i, 0] for i in range(len(some))],
            chat=any(one.text is None for one in some),
        )
        for question, reflection in zip(some, found):
            texts = {name: answer_text(ids, encoder.tokenizer).strip() for name, ids in reflection._asdict().items()}
            yield {"prompt": question.asked, **texts}

"""Generate answers to batches of prompts, and answers given the model's own draft.

Drafts are an experiment. A model trained with ``conditioned: true`` has seen prompt + other response + response.
``reflect_batch`` lets it write a draft and then answer after prompt + draft. Measure for each model whether that helps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from .chat import TextEncoder
from .errors import InputError
from .exports import Question
from .messages import Messages, holds_all, kept_texts
from .records import template_columns


def generate_batch(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperatures: Sequence[float],
    seeds: Sequence[Sequence[int]],
    chat: bool,
) -> list[list[int]]:
    """Answer prompts of token ids; return each answer's ids, including its end token if it ends.

    Each row has its own temperature (0: greedy) and its own seed, so an answer does not depend on the other prompts of
    the batch, except for rounding. Only the end tokens of the model's generation_config are used.
    """
    words = cast(Tensor, model.get_input_embeddings().weight).shape[0]
    if (largest := max(max(row) for row in prompts)) >= words:
        raise InputError(
            f"the prompt has the token {encoder.tokenizer.convert_ids_to_tokens(largest)!r} with the id {largest}, but "
            f"the model's vocabulary ends at {words - 1}; use the tokenizer that belongs to the model"
        )
    ends, noise = answer_ends(model, encoder, chat=chat), _Noise(temperatures, seeds, model.device)
    return continue_prompts(model, prompts, ends, max_new_tokens, noise=noise)


@torch.no_grad()
def continue_prompts(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    ends: set[int],
    max_new_tokens: int,
    *,
    noise: LogitsProcessor | None = None,
    generate: Callable[..., Tensor] | None = None,
) -> list[list[int]]:
    """Continue prompts of token ids greedily, up to and including an id in ``ends``.

    ``noise`` changes the scores. ``generate`` replaces ``model.generate``, for a module that an engine has wrapped.
    """
    pad = min(ends)  # padding is masked, so any token of the vocabulary works
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    # Replace the model's own config, because ``generate`` takes options that are not set here from it.
    own = model.generation_config
    model.generation_config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(ends)
    )
    try:
        processors = LogitsProcessorList([] if noise is None else [noise])
        out = cast(Any, generate or model.generate)(ids, attention_mask=mask, logits_processor=processors)
    finally:
        model.generation_config = own
    answers = []
    for row in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        answers.append(row[:end])
    return answers


class _Noise(LogitsProcessor):
    """Turn greedy search into sampling: the argmax of score / temperature + Gumbel noise is a draw from the softmax."""

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[Sequence[int]], device: torch.device) -> None:
        self.rows = []
        for row, (temperature, seed) in enumerate(zip(temperatures, seeds, strict=True)):
            if temperature > 0:
                mixed = int(np.random.SeedSequence(seed).generate_state(1)[0])
                self.rows.append((row, temperature, torch.Generator(device).manual_seed(mixed)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float().clone()
        for row, temperature, generator in self.rows:
            noise = torch.empty_like(scores[row]).exponential_(generator=generator)
            scores[row] = scores[row] / temperature - noise.log()
        return scores


def reflect_batch(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompts: Sequence[Sequence[int]],
    separator: Sequence[int] = (),
    *,
    max_new_tokens: int,
    seeds: Sequence[Sequence[int]],
    chat: bool,
    **more: Any,
) -> list[tuple[list[int], list[int]]]:
    """Answer each prompt of token ids, then again after prompt + draft + ``separator``; return (draft, answer) of each.

    The draft is the answer that ``generate_batch`` returns for the same options. A draft that was cut gets an end
    token, because every response in training has one. Training puts the same ``separator`` between two responses.
    """
    ends = answer_ends(model, encoder, chat=chat)
    more |= {"max_new_tokens": max_new_tokens, "chat": chat}
    drafts = generate_batch(model, encoder, prompts, seeds=seeds, **more)
    end = encoder.turn.end_id if chat and encoder.turn.end_id is not None else encoder.tokenizer.eos_token_id
    given = [
        [*prompt, *draft, *([] if draft[-1] in ends else [end]), *separator] for prompt, draft in zip(prompts, drafts)
    ]
    answers = generate_batch(model, encoder, given, seeds=[[*seed, 1] for seed in seeds], **more)
    return [*zip(drafts, answers)]


def answer_questions(
    model: PreTrainedModel,
    encoder: TextEncoder,
    questions: Sequence[Question],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    separator: Sequence[int] | None = None,
) -> list[list[str]]:
    """Return all answers to each question. With a ``separator``, return a draft and the answer given the draft."""
    # Batch similar lengths, the longest first: if memory is too small, the run fails at once.
    order = sorted(range(len(questions)), key=lambda i: -len(prompt_ids(encoder, questions[i], [])))
    answers: list[list[str]] = [[] for _ in questions]
    cut = 0
    with tqdm(total=len(questions), desc="answers", disable=None if len(questions) > 1 else True) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            while left := [i for i in batch if len(answers[i]) < questions[i].answers]:
                prompts = [prompt_ids(encoder, questions[i], answers[i]) for i in left]
                settings: dict[str, Any] = {
                    "max_new_tokens": max_new_tokens,
                    "temperatures": [temperatures[i] for i in left],
                    "seeds": [[seed, i, len(answers[i])] for i in left],
                    "chat": any(questions[i].text is None for i in left),
                }
                if separator is None:
                    outputs = [[ids] for ids in generate_batch(model, encoder, prompts, **settings)]
                else:
                    outputs = [[*pair] for pair in reflect_batch(model, encoder, prompts, separator, **settings)]
                for i, some in zip(left, outputs):
                    answers[i] += [answer_text(ids, encoder.tokenizer).strip() for ids in some]
                    cut += sum(len(ids) >= max_new_tokens for ids in some)
            bar.update(len(batch))
    if cut:
        print(f"note: {cut} answers have --max_new_tokens={max_new_tokens} tokens and may be cut off", file=sys.stderr)
    return answers


def answer_length(
    model: PreTrainedModel,
    encoder: TextEncoder,
    questions: Sequence[Question],
    separator: Sequence[int] | None,
    wanted: int | None,
) -> int:
    """Return the limit of tokens per answer: ``wanted``, or as many as the model's positions allow, at most 1024.

    With a ``separator``, draft and answer may have that many each. An end token and the separator follow the draft.
    Raises InputError for a question that leaves too few positions.
    """
    positions, most = getattr(model.config, "max_position_embeddings", None) or math.inf, wanted or 1024
    for question in questions:
        count, taken = question.answers, len(prompt_ids(encoder, question, [""] * (question.answers - 1)))
        if separator is not None:
            if count > 1:
                raise InputError(f"{question.origin}: {count} turns, but --reflect answers a single turn")
            count, taken = 2, taken + 1 + len(separator)
        room = (positions - taken) // count
        if room < (wanted or 1):
            raise InputError(
                f"{question.origin}: the prompt has {taken} tokens, which leaves fewer than {wanted or 1} of the "
                f"model's {positions} positions for {'each' if count > 1 else 'the'} answer; lower --max_new_tokens, "
                "or remove the prompt"
            )
        most = int(min(most, room))
    return most


def prompt_ids(encoder: TextEncoder, question: Question, answers: Sequence[str]) -> list[int]:
    """Return the prompt of the next answer as ids, given the ``answers`` to the question's first turns."""
    text = question.text
    if text is None:
        messages: Messages = []
        for turn, answer in zip(question.turns, [*answers, None]):
            messages = [*messages, *turn, *([] if answer is None else [{"role": "assistant", "content": answer}])]
        columns = template_columns(question.record, encoder, question.origin)
        text = encoder.render(messages, answer_next=True, origin=question.origin, **columns)
        asked = question.turns[: len(answers) + 1]
        if not holds_all(text, [said for turn in asked for message in turn for said in kept_texts(message)]):
            raise InputError(f"{question.origin}: the chat template drops text of a message; use another template")
    ids = encoder.prompt(text)
    if not ids:
        raise InputError(f"{question.origin}: the prompt is empty, and the tokenizer has no BOS token to start from")
    return ids


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of an answer, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def answer_ends(model: PreTrainedModel, encoder: TextEncoder, *, chat: bool) -> set[int]:
    """Return the ids that end an answer: EOS, the model's end ids, and with ``chat`` the template's end of turn."""
    own = model.generation_config.eos_token_id
    ends = {*(own if isinstance(own, list) else [own]), encoder.tokenizer.eos_token_id} - {None}
    ends |= {encoder.turn.end_id} - {None} if chat else set()
    if not ends:
        raise InputError("neither the tokenizer nor generation_config.json has an EOS token; set it and save the model")
    return ends

"""Answer prompts with a trained model.

    python -m training.generate --model DIR --prompt TEXT
    python -m training.generate --model DIR --prompts FILE --out FILE --format NAME

The second form writes a file for AlpacaEval, Arena-Hard or MT-Bench (``exports.py``). The model sees the prompt alone:
there is no other response at inference, and no extra cost.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

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
from transformers.utils import logging

from . import exports
from .chat import TextEncoder, separator_ids
from .data_options import DataOptions
from .errors import InputError
from .exports import Question
from .messages import Messages, holds_all, kept_texts
from .model import load_model
from .records import template_columns


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 1024,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Return the answer's text. Temperature 0 is greedy. ``chat``: ``prompt`` is a user message for the template."""
    encoder = TextEncoder(tokenizer)
    ids = prompt_ids(encoder, _asked(prompt, chat), [])
    (answer,) = generate_batch(
        model, encoder, [ids], max_new_tokens=max_new_tokens, temperatures=[temperature], seeds=[[seed]], chat=chat
    )
    return answer_text(answer, tokenizer)


def _asked(prompt: str, chat: bool) -> Question:
    return Question("--prompt", {}, None if chat else prompt, [[{"role": "user", "content": prompt}]] if chat else [])


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

    Each row is sampled at its own temperature (0: greedy) with its own seed. So an answer does not depend on the other
    prompts of the batch, except for rounding. Of the model's generation_config, only the end tokens are used.
    """
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
    """Continue prompts of token ids greedily, up to an id in ``ends``, which is returned, too.

    ``noise`` changes the scores. An engine's module may bring its own ``generate`` for ``model``.
    """
    pad = min(ends)  # it is masked, so any token of the vocabulary will do
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + list(row) for row in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=model.device)
    # Replace the model's own config: ``generate`` would take options from it that are not set here.
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
    """Make greedy search sample: the argmax of score / temperature + Gumbel noise is a draw from the softmax."""

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


def answer_questions(
    model: PreTrainedModel,
    encoder: TextEncoder,
    questions: Sequence[Question],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> list[list[str]]:
    """Return all answers to each question. Raises InputError for one that leaves no room in the model's positions."""
    openings = [prompt_ids(encoder, question, []) for question in questions]
    positions = getattr(model.config, "max_position_embeddings", None)
    for question, ids in zip(questions, openings):
        if positions and len(ids) + max_new_tokens > positions:
            raise InputError(
                f"{question.origin}: the prompt has {len(ids)} tokens, which leaves fewer than {max_new_tokens} of "
                f"the model's {positions} positions to the answer; lower --max_new_tokens, or leave the prompt out"
            )
    # Batch similar lengths, the longest first: if memory is too small, the run fails at once.
    order = sorted(range(len(questions)), key=lambda i: -len(openings[i]))
    answers: list[list[str]] = [[] for _ in questions]
    cut = 0
    with tqdm(total=len(questions), desc="answers", disable=None if len(questions) > 1 else True) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            while left := [i for i in batch if len(answers[i]) < questions[i].answers]:
                turn = len(answers[left[0]])
                outputs = generate_batch(
                    model,
                    encoder,
                    [prompt_ids(encoder, questions[i], answers[i]) for i in left],
                    max_new_tokens=max_new_tokens,
                    temperatures=[temperatures[i] for i in left],
                    seeds=[[seed, i, turn] for i in left],
                    chat=any(questions[i].text is None for i in left),
                )
                for i, ids in zip(left, outputs):
                    answers[i].append(answer_text(ids, encoder.tokenizer).strip())
                    cut += len(ids) >= max_new_tokens
            bar.update(len(batch))
    if cut:
        print(f"note: {cut} answers have --max_new_tokens={max_new_tokens} tokens and may be cut off", file=sys.stderr)
    return answers


def prompt_ids(encoder: TextEncoder, question: Question, answers: Sequence[str]) -> list[int]:
    """Return the ids that the next answer follows, given the ``answers`` to the question's first turns."""
    text = question.text
    if text is None:
        messages: Messages = []
        for turn, answer in zip(question.turns, [*answers, None]):
            messages = [*messages, *turn, *([] if answer is None else [{"role": "assistant", "content": answer}])]
        columns = template_columns(question.record, encoder, question.origin)
        text = encoder.render(messages, answer_next=True, origin=question.origin, **columns)
        asked = question.turns[: len(answers) + 1]
        if not holds_all(text, [said for turn in asked for message in turn for said in kept_texts(message)]):
            raise InputError(f"{question.origin}: the chat template leaves out what a message says; use another one")
    ids = encoder.prompt(text)
    if not ids:
        raise InputError(f"{question.origin}: the prompt is empty, and the tokenizer has no BOS token to begin with")
    return ids


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of an answer, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True))


def answer_ends(model: PreTrainedModel, encoder: TextEncoder, *, chat: bool) -> set[int]:
    """Return the ids that end an answer: EOS, the model's end ids, and with ``chat`` the template's end of turn."""
    turn = encoder.turn.end_id if chat else None
    ends = {*_ints(encoder.tokenizer.eos_token_id), *_ints(model.generation_config.eos_token_id), *_ints(turn)}
    if not ends:
        raise InputError(
            "neither the tokenizer nor generation_config.json has an EOS token; set it, and save the model"
        )
    return ends


def _ints(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.generate", description="Answer from the prompt alone.")
    add, form = parser.add_argument, exports.FORMATS[0]
    add("--model", required=True, help="model or adapter: a folder such as a run's final/, or a hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text, in the form of the training data's prompts")
    source.add_argument("--prompts", help="data file with prompt, instruction, messages or turns; needs --out")
    add("--out", help="answer file")
    add("--format", choices=exports.FORMATS, default=form, help=f"format of --out [{form}]")
    add("--name", help="the model's name in --out [--model]")
    add("--chat", action="store_true", help="make each prompt a user's message of the chat template")
    add("--max_new_tokens", type=int, help="most tokens of an answer [1024, or what the model's positions leave]")
    add("--temperature", type=float, help="0: greedy [0; mt_bench: by category, as in FastChat]")
    add("--seed", type=int, default=0, help="seed of the sampling [0]")
    add("--batch_size", type=int, default=16, help="prompts answered together [16]")
    add("--dtype", choices=("float32", "bfloat16"), help="[bfloat16 on a GPU, float32 on a CPU]")
    add("--reflect", action="store_true", help="experimental: answer, then answer again given that draft")
    alternatives = ("plain", "chat")
    add("--alternative", choices=alternatives, default="plain", help="--reflect: what precedes the answer [plain]")
    instruction = DataOptions.alternative_instruction
    add("--alternative_instruction", default=instruction, help="--alternative chat: what the user says in that turn")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 on bad input, 130 on Ctrl-C."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not 0 <= (options.temperature or 0) < math.inf or options.seed < 0:
        parser.error("--temperature and --seed must be at least 0, and finite")
    if min(options.max_new_tokens or 1, options.batch_size) < 1 or options.max_new_tokens == 0:
        parser.error("--max_new_tokens and --batch_size must be at least 1")
    if (options.prompts is None) != (options.out is None):
        parser.error("--prompts and --out belong together: give both or neither")
    if options.reflect and options.format != exports.FORMATS[0]:
        parser.error("--reflect writes JSON lines of its own: leave --format out")
    if not options.reflect and options.alternative != "plain":
        parser.error("--alternative is for --reflect: without it the model sees the prompt alone")
    logging.disable_progress_bar()  # a progress bar for loading the weights would precede the answer
    try:
        _run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _longest_answer(
    model: PreTrainedModel, encoder: TextEncoder, questions: Sequence[Question], parts: int, between: int
) -> int:
    """Return the most tokens of an answer where none are given: 1024, or what the model's positions leave for it.

    ``parts`` generations follow the prompt, each with an end token and ``between`` tokens of a separator.
    """
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    longest = max(len(prompt_ids(encoder, question, [])) for question in questions)
    return int(max(1, min(1024, (positions - longest - (parts - 1) * (1 + between)) // parts)))


def _run(options: argparse.Namespace) -> None:
    if options.out:
        out = Path(options.out)
        if out.exists():
            raise InputError(f"--out {out} exists; choose another file, or move or delete this file")
        if not out.parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {out.parent}")
        questions = exports.read_questions(options.prompts, options.format, chat=options.chat)
    else:
        questions = [_asked(options.prompt, options.chat)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: Literal["float32", "bfloat16"] = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, tokenizer = load_model(DataOptions(model=options.model, dtype=dtype), training=False)
    model.to(device).eval()  # type: ignore[arg-type]  # transformers' decorator hides the signature
    temperature, encoder = options.temperature or 0.0, TextEncoder(tokenizer)
    separator = separator_ids(tokenizer, options) if options.reflect else ()
    if options.max_new_tokens is None:
        parts = 2 if options.reflect else max(question.answers for question in questions)
        options.max_new_tokens = _longest_answer(model, encoder, questions, parts, len(separator))
    common = {name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "seed")}
    if options.reflect:
        from .reflect import reflect_questions  # here, because it imports this module

        entries = reflect_questions(model, encoder, questions, separator=separator, temperature=temperature, **common)
        said = f"draft: {entries[0]['draft']}\n\nanswer given the draft: {entries[0]['answer']}"
    else:
        temperatures = [temperature] * len(questions)
        if options.temperature is None and options.format == "mt_bench":
            temperatures = [exports.temperature(question) for question in questions]
        answers = answer_questions(model, encoder, questions, temperatures=temperatures, **common)
        said = answers[0][0]
        if options.out:
            entries = exports.answer_entries(options.format, questions, answers, options.name or options.model)
    if options.out:
        exports.write_entries(out, entries, one_list=options.format == "alpaca_eval" and not options.reflect)
        print(f"{len(questions)} prompts answered in {out}", file=sys.stderr)
    else:
        print(said)


if __name__ == "__main__":
    main()

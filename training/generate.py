"""Answers prompts with a trained model: ``python -m training.generate --model DIR --prompt TEXT``, or a file of prompts
into a file that AlpacaEval, Arena-Hard or MT-Bench reads: ``--prompts FILE --out FILE --format NAME`` (``exports.py``).

The model sees the prompt alone. Training conditions on the other response; inference has none, and costs nothing more.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

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

from .chat import TextEncoder
from .data_options import DataOptions
from .errors import InputError
from .exports import DEFAULT_TEMPERATURE, FORMATS, TEMPERATURES, Answer, Question, read_questions, write_answers
from .messages import Messages
from .model import load_model


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
    """The answer's text. Temperature 0 is greedy. ``chat`` makes ``prompt`` a user's message of the chat template."""
    encoder = TextEncoder(tokenizer)
    if chat:
        prompt = encoder.render([{"role": "user", "content": prompt}], answer_next=True, origin="--chat")
    ids = encoder.prompt(prompt)
    if not ids:
        raise InputError("--prompt is empty, and the tokenizer has no BOS token to begin with")
    (answer,) = generate_batch(
        model, encoder, [ids], max_new_tokens=max_new_tokens, temperatures=[temperature], seeds=[[seed]], chat=chat
    )
    return answer_text(answer, tokenizer)


@torch.no_grad()
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
    """Answers to prompts of token ids: ids up to and with the end of the answer, if it ends.

    Each row is sampled at its own temperature (0: greedy) with random numbers from its own seed, so an answer does not
    depend on the prompts beside it, rounding aside. Nothing in the model's generation_config but its ends is used.
    """
    ends = answer_ends(model, encoder, chat=chat)
    pad = min(ends)  # masked, so that any token of the model's vocabulary does
    width = max(map(len, prompts))
    rows = [[pad] * (width - len(ids)) + list(ids) for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, eos_token_id=sorted(ends)
    )
    with _settings(model, settings):
        out = cast(Callable[..., torch.Tensor], model.generate)(
            torch.tensor(rows, device=model.device), attention_mask=torch.tensor(mask, device=model.device),
            logits_processor=LogitsProcessorList([_Noise(temperatures, seeds, model.device)]),
        )  # fmt: skip
    answers = []
    for ids in out[:, width:].tolist():
        end = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
        answers.append(ids[:end])
    return answers


def answer_ends(model: PreTrainedModel, encoder: TextEncoder, *, chat: bool) -> set[int]:
    """Return the ids that end an answer: EOS, the model's own, and with ``chat`` the template's end of turn."""
    ends = {encoder.tokenizer.eos_token_id, *_ints(model.generation_config.eos_token_id)}
    return ends | set(_ints(encoder.turn.end_id)) if chat else ends


class _Noise(LogitsProcessor):
    """Makes greedy search sample: the largest of (score / temperature + Gumbel noise) is a draw from the softmax."""

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[Sequence[int]], device: torch.device) -> None:
        self.rows = [
            (
                row,
                temperature,
                torch.Generator(device).manual_seed(int(np.random.SeedSequence(seed).generate_state(1)[0])),
            )
            for row, (temperature, seed) in enumerate(zip(temperatures, seeds, strict=True))
            if temperature > 0
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float().clone()
        for row, temperature, generator in self.rows:
            noise = torch.empty_like(scores[row]).exponential_(generator=generator)
            scores[row] = scores[row] / temperature - noise.log()
        return scores


def answer_questions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    batch_size: int,
    seed: int,
    journal: Path,
    key: str,
) -> list[list[Answer]]:
    """All answers of each question. ``journal`` keeps them meanwhile; one with the same ``key`` is resumed."""
    encoder = TextEncoder(tokenizer)
    done = _read_journal(journal, key)
    if done:
        print(f"{len(done)} of {len(questions)} prompts are already answered in {journal}", file=sys.stderr)
    openings = {i: prompt_ids(encoder, q, []) for i, q in enumerate(questions) if i not in done}
    positions = getattr(model.config, "max_position_embeddings", None)
    for i, ids in openings.items():
        if positions and len(ids) + max_new_tokens > positions:
            raise InputError(
                f"{questions[i].origin}: the prompt has {len(ids)} tokens, which leaves fewer than {max_new_tokens} of "
                f"the model's {positions} positions to the answer; lower --max_new_tokens, or leave the prompt out"
            )
    # Similar lengths together, the longest first: if memory does not suffice, it shows at once.
    order = sorted(openings, key=lambda i: -len(openings[i]))
    with tqdm(total=len(questions), initial=len(done), desc="answers", disable=None) as bar, journal.open("a") as file:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            answers: dict[int, list[Answer]] = {i: [] for i in batch}
            while left := [i for i in batch if len(answers[i]) < questions[i].answers]:
                turn = len(answers[left[0]])
                outputs = generate_batch(
                    model, encoder, [prompt_ids(encoder, questions[i], answers[i]) for i in left],
                    max_new_tokens=max_new_tokens, temperatures=[temperatures[i] for i in left],
                    seeds=[[seed, i, turn] for i in left], chat=any(questions[i].text is None for i in left),
                )  # fmt: skip
                for i, ids in zip(left, outputs):
                    answers[i].append(Answer(answer_text(ids, tokenizer).strip(), len(ids)))
            for i in batch:
                done[i] = answers[i]
                file.write(json.dumps({"index": i, "answers": answers[i]}) + "\n")
            file.flush()
            bar.update(len(batch))
    cut = sum(answer.tokens >= max_new_tokens for given in done.values() for answer in given)
    if cut:
        print(f"note: {cut} answers have --max_new_tokens={max_new_tokens} tokens and may be cut off", file=sys.stderr)
    return [done[i] for i in range(len(questions))]


def prompt_ids(encoder: TextEncoder, question: Question, answers: Sequence[Answer]) -> list[int]:
    """Return the ids that the next answer follows, ``answers`` being those to the question's first turns."""
    if question.text is not None:
        text = question.text
    else:
        messages: Messages = []
        for turn, answer in zip(question.turns, [*answers, None]):
            messages = [*messages, *turn, *([] if answer is None else [{"role": "assistant", "content": answer.text}])]
        text = encoder.render(messages, answer_next=True, origin=question.origin)
    ids = encoder.prompt(text)
    if not ids:
        raise InputError(f"{question.origin}: the prompt is empty, and the tokenizer has no BOS token to begin with")
    return ids


def _read_journal(journal: Path, key: str) -> dict[int, list[Answer]]:
    """Answers of an interrupted run with the same ``key``; any other journal begins anew."""
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True) if journal.exists() else []
    whole = [json.loads(line) for line in lines if line.endswith("}\n")]  # an interrupted run may leave half a line
    if not whole or whole[0] != {"key": key}:
        whole = [{"key": key}]
    journal.write_text("".join(json.dumps(line) + "\n" for line in whole), encoding="utf-8")
    return {line["index"]: [Answer(*answer) for answer in line["answers"]] for line in whole[1:]}


def answer_text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of an answer, without special tokens."""
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    assert isinstance(text, str)  # of one answer
    return text


def _ints(value: int | list[int] | None) -> list[int]:
    return [] if value is None else value if isinstance(value, list) else [value]


@contextmanager
def _settings(model: PreTrainedModel, settings: GenerationConfig) -> Iterator[None]:
    """For the time being ``settings`` alone: what they leave open, ``generate`` would take from the model's own."""
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own


def _fingerprint(prompts: Path, folder: Path, options: dict[str, object]) -> str:
    """What answers depend on: prompts, options, and the model by its files' names, sizes and times."""
    digest = hashlib.blake2b(prompts.read_bytes(), digest_size=16)
    files = (
        sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in folder.glob("*")) if folder.is_dir() else []
    )
    digest.update(json.dumps([files, sorted(options.items())]).encode())
    return digest.hexdigest()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on bad input, 130 on Ctrl-C."""
    from . import reflect  # here, because it imports this module

    parser = argparse.ArgumentParser(prog="python -m training.generate", description="Answers from the prompt alone.")
    parser.add_argument("--model", required=True, help="folder (final/ of a run, also an adapter's) or hub id")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text as in the training data")
    source.add_argument("--prompts", help="JSONL or JSON file: prompt, instruction, messages or turns; needs --out")
    parser.add_argument("--out", help="answer file; an interrupted run goes on from OUT.partial")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0], help=f"of --out [{FORMATS[0]}]")
    parser.add_argument("--name", help="the model's name in --out [--model]")
    parser.add_argument("--chat", action="store_true", help="make each prompt a user's message of the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest answer [1024]")
    parser.add_argument("--temperature", type=float, help="0: greedy [0; mt_bench: by category, as FastChat does]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")
    parser.add_argument("--batch_size", type=int, default=16, help="prompts answered together [16]")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="[bfloat16 on a GPU, float32 elsewhere]")
    reflect.add_options(parser)
    options = parser.parse_args(arguments)
    if (options.temperature or 0) < 0 or min(options.max_new_tokens, options.batch_size) < 1 or options.seed < 0:
        parser.error("--temperature and --seed must be at least 0, --max_new_tokens and --batch_size at least 1")
    if (options.prompts is None) != (options.out is None):
        parser.error("--prompts and --out belong together")
    reflect.check_options(parser, options)
    logging.disable_progress_bar()  # a bar for reading the weights would stand before the answer
    try:
        _run(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted" + (": the same command goes on from here" if options.out else ""), file=sys.stderr)
        sys.exit(130)


def _run(options: argparse.Namespace) -> None:
    from . import reflect

    if options.out:
        out = Path(options.out)
        if out.exists():
            raise InputError(f"--out {out} exists; choose another file, or move or delete that one")
        if not out.parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {out.parent}")
        questions = read_questions(options.prompts, options.format, chat=options.chat)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: Literal["float32", "bfloat16"] = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, tokenizer = load_model(DataOptions(model=options.model, dtype=dtype), training=False)
    model.to(device).eval()  # type: ignore[arg-type]  # transformers' decorator hides the signature
    if options.reflect:
        reflect.answer(model, tokenizer, options)
        return
    if not options.out:
        print(generate(
            model, tokenizer, options.prompt, max_new_tokens=options.max_new_tokens,
            temperature=options.temperature or 0.0, seed=options.seed, chat=options.chat,
        ))  # fmt: skip
        return
    if options.temperature is None and options.format == "mt_bench":
        temperatures = [TEMPERATURES.get(q.record.get("category", ""), DEFAULT_TEMPERATURE) for q in questions]
    else:
        temperatures = [options.temperature or 0.0] * len(questions)
    settings = {n: getattr(options, n) for n in ("model", "format", "chat", "max_new_tokens", "temperature", "seed")}
    answers = answer_questions(
        model, tokenizer, questions, temperatures=temperatures, max_new_tokens=options.max_new_tokens,
        batch_size=options.batch_size, seed=options.seed, journal=out.with_name(out.name + ".partial"),
        key=_fingerprint(Path(options.prompts), Path(options.model), settings | {"dtype": dtype}),
    )  # fmt: skip
    write_answers(out, options.format, questions, answers, options.name or options.model)
    out.with_name(out.name + ".partial").unlink()
    print(f"{len(questions)} prompts answered in {out}", file=sys.stderr)


if __name__ == "__main__":
    main()

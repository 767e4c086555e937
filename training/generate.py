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
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from . import exports
from .answers import answer_length, answer_questions, answer_text, generate_batch, prompt_ids
from .architecture import check_causal, check_finite, rounds_by_batch
from .chat import TextEncoder, separator_ids
from .data_options import DataOptions
from .errors import InputError, SaveError, as_input_error
from .exports import Question
from .model import load_model
from .output import escape_unprintable


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
    add("--chat", action="store_true", help="turn each prompt into a user message of the chat template")
    add("--max_new_tokens", type=int, help="maximum tokens of an answer [1024, or what fits the model's positions]")
    add("--temperature", type=float, help="0: greedy [0; mt_bench: by category, as in FastChat]")
    add("--seed", type=int, default=0, help="seed of the sampling [0]")
    add("--batch_size", type=int, default=16, help="prompts answered together [16]")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of the weights [bfloat16 on a GPU, float32 on a CPU]")
    add("--reflect", action="store_true", help="experimental: write a draft, then an answer given the draft")
    alternatives = ("plain", "chat")
    add("--alternative", choices=alternatives, default="plain", help="--reflect: what follows the draft [plain]")
    instruction = DataOptions.alternative_instruction
    add("--alternative_instruction", default=instruction, help="--alternative chat: text of that user turn")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exit with 2 on bad input, 1 where the disk is full, 130 on Ctrl-C."""
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
    escape_unprintable()
    logging.disable_progress_bar()  # a progress bar for loading the weights would precede the answer
    logging.set_verbosity_error()
    try:
        _run(options)
    except (InputError, SaveError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _run(options: argparse.Namespace) -> None:
    form = "reflect" if options.reflect else options.format
    if options.out:
        out = Path(options.out)
        if out.exists():
            raise InputError(f"--out {out} exists; choose another file, or move or delete this file")
        if not out.parent.is_dir():
            raise InputError(f"--out {out}: there is no folder {out.parent}")
        with as_input_error(f"--out {out}: cannot be written to: ", "; choose another file"):
            tempfile.TemporaryFile(dir=out.parent).close()
        questions = exports.read_questions(options.prompts, form, chat=options.chat)
    else:
        questions = [_asked(options.prompt, options.chat)]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: Literal["float32", "bfloat16"] = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    model, tokenizer = load_model(DataOptions(model=options.model, dtype=dtype), training=False)
    check_finite(model)
    check_causal(model, rounds_by_batch=rounds_by_batch(model))
    model.to(device).eval()  # type: ignore[arg-type]  # transformers' decorator hides the signature
    encoder, temperature = TextEncoder(tokenizer), options.temperature or 0.0
    separator = separator_ids(tokenizer, options) if options.reflect else None
    options.max_new_tokens = answer_length(model, encoder, questions, separator, options.max_new_tokens)
    temperatures = [temperature] * len(questions)
    if options.temperature is None and options.format == "mt_bench":
        temperatures = [exports.temperature(question) for question in questions]
    common = {name: getattr(options, name) for name in ("max_new_tokens", "batch_size", "seed")}
    answers = answer_questions(model, encoder, questions, temperatures=temperatures, separator=separator, **common)
    if options.out:
        try:
            exports.write_answers(out, form, questions, answers, options.name or options.model)
        except OSError as error:
            raise SaveError(f"--out {out} could not be written: {error}") from error
        print(f"{len(questions)} prompts answered in {out}", file=sys.stderr)
    elif options.reflect:
        print(f"draft: {answers[0][0]}\n\nanswer given the draft: {answers[0][1]}")
    else:
        print(answers[0][0])


if __name__ == "__main__":
    main()

"""Answers a prompt with a trained model: ``python -m training.generate --model DIR --prompt TEXT``.

The model sees the prompt alone. Training conditions on the other response; inference has none, and costs nothing more.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .chat import TextEncoder
from .config import InputError, TrainConfig
from .model import load_model, padding_id


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """The answer's text. Temperature 0 is greedy. ``chat`` makes ``prompt`` a user's message of the chat template."""
    if chat:
        if not tokenizer.chat_template:
            raise InputError("--chat: the tokenizer has no chat template")
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([TextEncoder(tokenizer).prompt(prompt)], device=model.device)
    if not ids.numel():
        raise InputError("--prompt is empty, and the tokenizer has no BOS token to begin with")
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_new_tokens,
            pad_token_id=padding_id(tokenizer, lambda note: None), **sampling,
        )  # fmt: skip
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; exits with 2 on bad input."""
    parser = argparse.ArgumentParser(prog="python -m training.generate", description="Answers from the prompt alone.")
    parser.add_argument("--model", required=True, help="folder (final/ of a run) or hub id")
    parser.add_argument("--prompt", required=True, help="text as in the training data")
    parser.add_argument("--chat", action="store_true", help="make the prompt a user's message of the chat template")
    parser.add_argument("--max_new_tokens", type=int, default=256, help="longest answer [256]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy [0]")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling [0]")
    options = vars(parser.parse_args(arguments))
    if options["temperature"] < 0 or options["max_new_tokens"] < 1:
        parser.error("--temperature must be at least 0, and --max_new_tokens at least 1")
    logging.disable_progress_bar()  # a bar for reading the weights would stand before the answer
    try:
        model, tokenizer = load_model(TrainConfig(model=options.pop("model")))
        print(generate(model.eval(), tokenizer, options.pop("prompt"), **options))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

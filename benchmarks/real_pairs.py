"""Fine-tune a small model on real preference pairs with several objectives, conditioned and plain.

    python -m benchmarks.real_pairs --pairs FILE.jsonl --json benchmarks/results/real_pairs.json

A byte-level model is first fitted to the responses of the training prompts. Half of them follow the prompt alone, half
follow the prompt and the other response, so that the model can handle the conditioned layout. Each run starts from that
model. Whole prompts are held out. Their pairs are scored with the other response and given the prompt alone, with 95%
intervals that treat the pairs of a prompt as one cluster. The model is far too small to answer anything. The run shows
that real data passes through the whole pipeline, and reports rewards on unseen prompts.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from training.config import TrainConfig
from training.data import Pair, load_pairs, select_pairs
from training.errors import InputError
from training.generate import generate
from training.model import load_model
from training.train import train

from .fitting import fit
from .result_files import command, make_parser, positive, provenance, result_file, write_json

MODEL = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
OBJECTIVES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.1},
    "simpo": {"beta": 2.0, "gamma": 0.5},
    "ipo": {"tau": 0.1},
    "rdpo": {"beta": 0.1, "alpha": 0.005},
    "orpo": {"lam": 1.0},
}
REPORTED = [
    f"eval_{layout}/rewards/{what}"
    for layout in ("conditioned", "marginal")
    for what in ("accuracies", "accuracies_ci", "margins", "margins_ci")
]


def split_by_prompt(pairs: list[Pair], share: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return training pairs and held-out pairs that share no prompt."""
    prompts = sorted({tuple(p.prompt) for p in pairs})
    held_out = set(random.Random(seed).sample(prompts, round(share * len(prompts))))
    return [p for p in pairs if tuple(p.prompt) not in held_out], [p for p in pairs if tuple(p.prompt) in held_out]


def fit_base(
    model: PreTrainedModel, pairs: list[Pair], pad: int, *, steps: int, rows: int, lr: float, seed: int
) -> float:
    """Fit both responses, in every other step after the other response. Return the last mean loss."""
    rng = random.Random(seed)

    def batch(step: int) -> Iterator[tuple[list[int], list[int]]]:
        for pair in rng.choices(pairs, k=rows):
            answer, draft = rng.sample([pair.chosen, pair.rejected], 2)
            yield pair.prompt + (draft if step % 2 else []), answer

    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps)
    return fit(model, (list(batch(i)) for i in tqdm(range(steps), "fitting the base", disable=None)), pad, schedule)


def pairs_parser(module: str, doc: str) -> argparse.ArgumentParser:
    """Return a parser with the options ``--pairs`` and ``--json``."""
    parser = make_parser(module, doc)
    parser.add_argument("--pairs", required=True, help="JSONL with prompt, chosen, rejected")
    parser.add_argument("--json", required=True, type=result_file, help="result file")
    return parser


def pairs_of(
    parser: argparse.ArgumentParser, source: str, config: TrainConfig, tokenizer: Any, log: Callable[[str], None]
) -> list[Pair]:
    """Return the pairs in ``--pairs`` that ``config`` can train on, or exit with the parser's error."""
    try:
        return list(
            select_pairs(
                load_pairs(source, tokenizer, config),
                "pairs",
                config,
                vocab_size=len(tokenizer),
                bos_token_id=tokenizer.bos_token_id,
                log=log,
            )
        )
    except InputError as error:
        parser.error(f"--pairs: {error}")


def command_of(module: str, arguments: Sequence[str], options: argparse.Namespace) -> str:
    """Return the command for a result file, without the folder names of the data and of the file itself."""
    name = Path(options.pairs).name
    shown = {options.pairs: name, f"--pairs={options.pairs}": f"--pairs={name}"}
    return command(module, [shown.get(word, word) for word in arguments], options.json)


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = pairs_parser("real_pairs", __doc__)
    parser.add_argument(
        "--max_length", type=positive, default=512, help="most tokens (bytes) of a pair; longer pairs are dropped"
    )
    parser.add_argument("--base_steps", type=positive, default=300, help="fitting steps of 8 responses [300]")
    parser.add_argument("--steps", type=positive, default=40, help="fine-tuning steps of 8 pairs [40]")
    parser.add_argument("--learning_rate", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    began = time.perf_counter()

    common = TrainConfig(
        model=MODEL,
        max_length=options.max_length,
        truncation="drop",
        max_steps=options.steps,
        per_device_train_batch_size=8,
        save_strategy="no",
        learning_rate=options.learning_rate,
        seed=options.seed,
    )
    base, tokenizer = load_model(common)
    said: list[str] = []
    pairs = pairs_of(parser, options.pairs, common, tokenizer, lambda line: said.append(line.split("(")[0].strip()))
    training, held_out = split_by_prompt(pairs, 0.3, options.seed)
    if not held_out:
        parser.error(f"--pairs: all usable pairs of {options.pairs} have the same prompt, so none can be held out")
    base_loss = fit_base(
        base, training, tokenizer.pad_token_id, steps=options.base_steps, rows=8, lr=3e-3, seed=options.seed
    )
    print(f"{said[0]}; {len(training)} pairs to train on, {len(held_out)} held out; base {base_loss:.3f} nats a byte")

    runs = []
    for objective, parameters in OBJECTIVES.items():
        for conditioned in (True, False):
            config = dataclasses.replace(common, objective=objective, conditioned=conditioned, **parameters)
            runs.append(one_run(config, base, tokenizer, training, held_out) | {"parameters": parameters})
            print(line(runs[-1]), flush=True)

    result = {
        **provenance(command_of("benchmarks.real_pairs", arguments, options)),
        "seconds": round(time.perf_counter() - began),
        "model": {**MODEL, "parameters": sum(p.numel() for p in base.parameters()), "tokenizer": "bytes"},
        "data": {
            "selection": said[0],
            "train_pairs": len(training),
            "train_prompts": len({tuple(p.prompt) for p in training}),
            "held_out_pairs": len(held_out),
            "held_out_prompts": len({tuple(p.prompt) for p in held_out}),
            "held_out_share_of_longer_chosen": sum(len(p.chosen) > len(p.rejected) for p in held_out) / len(held_out),
        },
        "base": {"steps": options.base_steps, "nats_per_byte": base_loss},
        "fine_tuning": {"pairs_per_step": 8} | {n: getattr(options, n) for n in ("steps", "learning_rate", "seed")},
        "runs": runs,
    }
    write_json(options.json, result)
    print(f"{result['seconds']} s; results in {options.json}")


def one_run(
    config: TrainConfig, base: PreTrainedModel, tokenizer: Any, training: list[Pair], held_out: list[Pair]
) -> dict[str, Any]:
    """Train a copy of ``base``, reload the saved model and answer a held-out prompt with it."""
    began, given = time.perf_counter(), {"model": copy.deepcopy(base), "tokenizer": tokenizer}
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(config, output_dir=f"{folder}/run")
        result = train(config, training, eval_pairs=held_out, quiet=True, **given)
        seconds = time.perf_counter() - began
        assert result.final is not None  # there is an output folder
        reloaded = AutoModelForCausalLM.from_pretrained(result.final).eval()
        saved_tokenizer = AutoTokenizer.from_pretrained(result.final)
    assert all(torch.equal(a, b) for a, b in zip(reloaded.parameters(), result.model.parameters(), strict=True))
    prompt = tokenizer.decode(held_out[0].prompt, skip_special_tokens=True)
    answer = generate(reloaded, saved_tokenizer, prompt, max_new_tokens=100)
    before, after = (
        {name: row[name] for name in ("eval_loss", *REPORTED)} for row in result.metrics if "eval_loss" in row
    )
    return {
        "objective": config.objective,
        "conditioned": config.conditioned,
        "seconds": round(seconds, 1),
        "reloaded_and_generated_bytes": len(answer.encode()),
        "before": before,
        "after": after,
    }


def line(run: dict[str, Any]) -> str:
    text = f"{run['objective']:6}{'conditioned' if run['conditioned'] else 'plain':12}{run['seconds']:6.1f} s"
    return text + "".join(f", {name.removeprefix('eval_')} {run['after'][name]}" for name in REPORTED)


if __name__ == "__main__":
    main()

"""Small runs that tests compare between one process and several; the program of each of the several.

``processes.py FOLDER`` leaves FOLDER/ENGINE/NAME.RANK.pt with what each run gave in each process, and then crashes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_model, token_pairs
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

import training.train
import training.update
from training.config import LoraOptions, TrainConfig
from training.engine import clip_gradients, process_index, together
from training.scoring import PairModel

# Steps of 5, 3, 5 and 3 pairs (7 and 1), with 60 tokens a forward pass: several passes in each process, ragged steps,
# and a last step of one pair, which two processes cannot share.
COMMON = {"max_steps": 4, "learning_rate": 1e-2, "warmup": 0.0, "log_every": 1, "eval_every": 2, "batch_size": 5,
          "max_batch_tokens": 60, "max_grad_norm": 0.3}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {
    "ragged": {},
    "tied": {"tie_word_embeddings": True, "batch_size": 7, "marginal_weight": 0.5},
    "plain": {"objective": "simpo", "conditioned": False, "batch_size": 7, "weight_decay": 0.1},
    "checkpointed": {"gradient_checkpointing": True, "num_hidden_layers": 3},
    "tree": {"layout": "tree", "marginal_weight": 0.5, "gradient_checkpointing": True, "num_hidden_layers": 2},
    "frozen head": {"freeze": "lm_head.weight"},
    "lora": {"lora": LoraOptions(r=2, alpha=4.0), "max_grad_norm": 3.0},
    "bf16": {"mixed_precision": "bf16", "learning_rate": 1e-3},
}


MODEL_FIELDS = ("tie_word_embeddings", "num_hidden_layers")


def run(name: str, folder: Path) -> dict[str, Any]:
    """Metrics, gradients before clipping of each step (from all processes), final weights, and all lines written."""
    fields = {key: RUNS[name][key] for key in MODEL_FIELDS if key in RUNS[name]}
    options = {key: value for key, value in RUNS[name].items() if key not in (*fields, "freeze")}
    model = tiny_model(**fields)
    if "freeze" in RUNS[name]:
        model.get_parameter(RUNS[name]["freeze"]).requires_grad_(False)
    gradients: list[dict[str, torch.Tensor]] = []

    def spy(module: torch.nn.Module, max_norm: float) -> torch.Tensor:
        found = {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}
        gradients.append({name.removeprefix("module."): grad.clone() for name, grad in found.items()})
        return clip_gradients(module, max_norm)

    training.update.clip_gradients = spy
    out = folder / name if name in ("ragged", "tied") else None
    config = TrainConfig(**{**COMMON, **options, "output_dir": out and str(out)})
    try:
        result = training.train.train(
            config, token_pairs(8), eval_pairs=token_pairs(3, seed=5), model=model, quiet=True
        )
    finally:
        training.update.clip_gradients = clip_gradients
    weights = {name: whole(tensor).detach() for name, tensor in result.model.state_dict().items()}
    if out and process_index() == 0:
        weights = LlamaForCausalLM.from_pretrained(out / "final").state_dict()
    return {"metrics": result.metrics, "gradients": gradients, "weights": weights}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def nan(folder: Path) -> dict[str, Any]:
    """A pair, which one of the processes has in its forward pass, makes the loss NaN."""
    pairs, model = token_pairs(6), tiny_model()
    pairs[4][1].insert(0, 200)  # a token of this pair alone
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = float("nan")
    config = TrainConfig(objective="simpo", batch_size=6, max_batch_tokens=60, max_steps=1)
    training.train.train(config, pairs, model=model, quiet=True)
    return {}


def other_pairs(folder: Path) -> dict[str, Any]:
    training.train.train(TrainConfig(max_steps=1), token_pairs(4, seed=process_index()), model=tiny_model(), quiet=True)
    return {}


def other_weights(folder: Path) -> dict[str, Any]:
    training.train.train(TrainConfig(max_steps=1), token_pairs(4), model=tiny_model(seed=process_index()), quiet=True)
    return {}


def one_fails(folder: Path) -> dict[str, Any]:
    with together():
        if process_index() == 1:
            raise OSError("the disk of process 1")
    return {}


def bad_data_in_one(folder: Path) -> dict[str, Any]:
    pairs = token_pairs(4)
    pairs[2][1][:] = [999] if process_index() == 1 else pairs[2][1]
    training.train.train(TrainConfig(max_steps=1), pairs, model=tiny_model(), quiet=True)
    return {}


def occupied_folder(folder: Path) -> dict[str, Any]:
    (folder / "occupied" / "final").mkdir(parents=True, exist_ok=True)
    config = TrainConfig(max_steps=1, output_dir=str(folder / "occupied"))
    training.train.train(config, token_pairs(4), model=tiny_model(), quiet=True)
    return {}


FAILURES: dict[str, Callable[[Path], dict[str, Any]]] = {
    f.__name__: f for f in (nan, other_pairs, other_weights, one_fails, bad_data_in_one, occupied_folder)
}


def crash() -> None:
    """Something breaks in one process alone, which the others cannot know of."""
    forward = PairModel.forward

    def broken(self: PairModel, *args: Any, **kwargs: Any) -> Any:
        if process_index() == 1 and torch.is_grad_enabled():
            raise MemoryError("only in process 1")
        return forward(self, *args, **kwargs)

    PairModel.forward = broken  # type: ignore[method-assign]
    training.train.train(TrainConfig(max_steps=1), token_pairs(4), model=tiny_model(), quiet=True)


def main() -> None:
    folder = Path(sys.argv[1])
    logging.disable_progress_bar()
    for engine, environment in (("DDP", {}), ("FSDP2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"})):
        os.environ |= environment
        (folder / engine).mkdir(exist_ok=True)
        for name in [*RUNS, *FAILURES]:
            try:
                outcome = FAILURES[name](folder) if name in FAILURES else run(name, folder / engine)
            except Exception as error:
                if name in RUNS:
                    raise
                outcome = {"error": f"{type(error).__name__}: {error}"}
            torch.save(outcome, folder / engine / f"{name}.{os.environ['RANK']}.pt")
    crash()


if __name__ == "__main__":
    main()

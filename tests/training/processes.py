"""Define small runs that tests compare between one process and several, and the program of each process.

``main`` writes each run's results in each process to FOLDER/NAME.RANK.pt, and then crashes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from helpers import tiny_model, token_pairs
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaForCausalLM
from transformers.utils import logging

import training.architecture
import training.output
import training.train
from training.adapters import add_lora
from training.batching import Batcher
from training.config import TrainConfig
from training.data import Pair
from training.engine import decoder_layers, process_count, process_index, raise_on_all_ranks
from training.scoring import Batch, PairModel, score
from training.trainer import PairTrainer

# Steps of 6, 2, 6 and 2 pairs (8 and 8), with 60 tokens a forward pass: several passes in each process, ragged steps.
COMMON = {
    "max_steps": 4,
    "learning_rate": 1e-2,
    "warmup_steps": 0,
    "logging_steps": 1,
    "eval_steps": 2,
    "max_batch_tokens": 60,
    "max_grad_norm": 0.3,
    "seed": 0,
}
RUNS: dict[str, dict[str, Any]] = {
    "ragged": {},
    "accumulated": {"gradient_accumulation_steps": 3, "pairs": 2},
    "tied": {"tie_word_embeddings": True, "pairs": 8, "marginal_weight": 0.5},
    "plain": {"objective": "simpo", "conditioned": False, "pairs": 8, "weight_decay": 0.1},
    "checkpointed": {"activation_checkpointing": True, "num_hidden_layers": 3},
    "tree": {"layout": "tree", "marginal_weight": 0.5, "activation_checkpointing": True, "num_hidden_layers": 2},
    "dropout": {"alternative_dropout": 0.5, "reference_conditioned": True},
    "dropout in trees": {"alternative_dropout": 0.5, "layout": "tree", "gradient_accumulation_steps": 3, "pairs": 2},
    "frozen head": {"freeze": "lm_head.weight"},
    "lora": {"lora": {"r": 2, "alpha": 4.0}, "max_grad_norm": 3.0},
    "bf16": {"bf16": True, "learning_rate": 1e-3},
}
# torch's own FSDP2 shards here, because accelerate does not start FSDP2 on a CPU.
SHARDED = ("ragged", "tied", "tree", "frozen head", "lora", "bf16")
MODEL_FIELDS = ("tie_word_embeddings", "num_hidden_layers")


def model_of(name: str) -> LlamaForCausalLM:
    model = tiny_model(**{key: RUNS[name][key] for key in MODEL_FIELDS if key in RUNS[name]})
    if "freeze" in RUNS[name]:
        model.get_parameter(RUNS[name]["freeze"]).requires_grad_(False)
    return model


def config_of(name: str, folder: Path | None = None) -> TrainConfig:
    """Return the options of a run. The processes share the ``pairs`` of a micro-step."""
    options = {key: value for key, value in RUNS[name].items() if key not in (*MODEL_FIELDS, "freeze", "pairs")}
    pairs = RUNS[name].get("pairs", 6)
    config = TrainConfig(**{**COMMON, **options, "output_dir": folder and str(folder)})
    config.per_device_train_batch_size = pairs // config.world_size
    return config


def run(name: str, folder: Path) -> dict[str, Any]:
    """Return metrics, each step's gradients before clipping (from all processes), and final weights."""
    gradients: list[dict[str, torch.Tensor]] = []
    clip = PairTrainer._clip_grad_norm

    def spy(self: PairTrainer, model: nn.Module) -> Any:
        gradients.append(gradients_of(model))
        return clip(self, model)

    out = folder / name if name in ("ragged", "tied") else None
    config = config_of(name, out)
    PairTrainer._clip_grad_norm = spy  # type: ignore[method-assign]
    try:
        result = training.train.train(
            config, token_pairs(8), eval_pairs=token_pairs(3, seed=5), model=model_of(name), quiet=True
        )
    finally:
        PairTrainer._clip_grad_norm = clip  # type: ignore[method-assign]
    weights = result.model.state_dict()
    if out and process_index() == 0:
        weights = LlamaForCausalLM.from_pretrained(out / "final").state_dict()
    return {"metrics": result.metrics, "gradients": gradients, "weights": weights}


def sharded(name: str, folder: Path) -> dict[str, Any]:
    """Return log-probs, losses and gradients of two updates by hand. Two processes shard the model with FSDP2."""
    config, model, pairs = config_of(name), model_of(name), [Pair(*ids) for ids in token_pairs(7)]
    if config.lora is not None:
        add_lora(model, config.lora, 0)
    module: nn.Module = PairModel(model.eval(), config.make_objective(), config.marginal_weight)
    if process_count() > 1:
        mesh = init_device_mesh("cpu", (process_count(),))
        low = torch.bfloat16 if config.bf16 else None  # and output_dtype as in accelerate's own policy
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, output_dtype=low)
        for layer in decoder_layers(module, "FSDP2"):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
    batcher = Batcher(0, torch.device("cpu"), 60, layout="tree" if config.layout == "tree" else "rows")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    scores, found = score(module, pairs, batcher, conditioned=True), []
    for _ in range(2):
        total = torch.zeros((), dtype=torch.float64)
        for part in batcher.plan(pairs, conditioned=True):
            ref = scores.logps[:, part.pairs].reshape(-1) + 0.1
            tensors = batcher([pairs[i] for i in part.pairs], conditioned=True)
            loss, report = module(Batch(tensors, ref, part.weight * process_count() / len(pairs)))
            loss.backward()
            total += part.weight * report.metrics["loss"]
        if process_count() > 1:
            torch.distributed.all_reduce(total)
        found.append({"loss": total, **gradients_of(module)})
        optimizer.step()
        optimizer.zero_grad()
    return {"logps": scores.logps, "steps": found}


def gradients_of(module: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: whole(p.grad) for name, p in module.named_parameters() if p.grad is not None}
    return {name.removeprefix("module."): grad.clone() for name, grad in found.items()}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def nan(folder: Path) -> dict[str, Any]:
    """Make the loss NaN with a pair that only one process has in its forward pass."""
    pairs, model = token_pairs(6), tiny_model()
    pairs[4][1].insert(0, 200)  # a token that only this pair has
    training.architecture.check_finite = lambda model: None  # as if training did it
    with torch.no_grad():
        model.model.embed_tokens.weight[200] = float("nan")
    config = TrainConfig(objective="simpo", per_device_train_batch_size=3, max_batch_tokens=60, max_steps=1)
    training.train.train(config, pairs, model=model, quiet=True)
    return {}


def other_pairs(folder: Path) -> dict[str, Any]:
    training.train.train(TrainConfig(max_steps=1), token_pairs(4, seed=process_index()), model=tiny_model(), quiet=True)
    return {}


def other_weights(folder: Path) -> dict[str, Any]:
    training.train.train(TrainConfig(max_steps=1), token_pairs(4), model=tiny_model(seed=process_index()), quiet=True)
    return {}


def one_fails(folder: Path) -> dict[str, Any]:
    with raise_on_all_ranks():
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
    """Raise an error in one process, without the knowledge of the others."""
    forward = PairModel.forward

    def broken(self: PairModel, *args: Any, **kwargs: Any) -> Any:
        if process_index() == 1 and torch.is_grad_enabled():
            raise MemoryError("only in process 1")
        return forward(self, *args, **kwargs)

    PairModel.forward = broken  # type: ignore[method-assign]
    training.train.train(TrainConfig(max_steps=1), token_pairs(4), model=tiny_model(), quiet=True)


def main(folder: Path) -> None:
    training.output.plot_curves = lambda *what: None
    logging.disable_progress_bar()
    programs = {name: run for name in RUNS} | {f"sharded {name}": sharded for name in SHARDED}
    for name, act in {**programs, **FAILURES}.items():
        try:
            outcome = act(name.removeprefix("sharded "), folder) if name in programs else FAILURES[name](folder)
        except Exception as error:
            if name in programs:
                raise
            outcome = {"error": f"{type(error).__name__}: {error}"}
        torch.save(outcome, folder / f"{name}.{os.environ['RANK']}.pt")
    crash()

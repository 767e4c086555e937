"""Write FOLDER/RANK.pt for test_trl_processes.py, which runs ``main`` in two gloo processes."""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import ParallelismConfig
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl_setup import LENGTHS, VOCAB, model, pairs, run

import inspo_kernels as ik
from inspo_kernels.integrations.pair_layouts import conditioned
from inspo_kernels.integrations.pair_metrics import STATISTICS
from inspo_kernels.integrations.pair_pass import PairPass, accept_pair_pass, pair_loss
from inspo_kernels.integrations.trl import InSPOConfig, InSPOTrainer

# Lengths are equal within each rank's batch, so that ranks have different numbers of tokens.
RUNS = {
    "theirs": (DPOTrainer, DPOConfig, {}),
    "ours": (InSPOTrainer, InSPOConfig, {"conditioned": False}),
    "conditioned": (InSPOTrainer, InSPOConfig, {}),
    "dropout": (InSPOTrainer, InSPOConfig, {"alternative_dropout": 0.5}),
    "dropping": (InSPOTrainer, InSPOConfig, {"max_length": 16, "layout": "rows", "max_steps": 1}),
}


def sharded(layout: str, head_by_itself: bool) -> dict[str, float]:
    """Return how far loss and gradients of a model that FSDP2 shards are from those of a whole one.

    Accelerate shards nothing on a CPU, so torch does it here, as accelerate would.
    """
    generator = torch.Generator().manual_seed(dist.get_rank())
    names, lengths = ("prompt_ids", "chosen_ids", "rejected_ids"), ((3, 4, 5), (5, 2, 3))
    draw = lambda count: torch.randint(VOCAB - 2, (count,), generator=generator).tolist()  # noqa: E731
    examples = [dict(zip(names, map(draw, triple))) for triple in lengths]
    batch = DataCollatorForPreference(pad_token_id=VOCAB - 2)(examples)
    laid_out = conditioned(batch, layout, pad_token_id=VOCAB - 2, separator_ids=[])
    terms = {"ref_logps": torch.full((4,), -15.0), "marginal_weight": 0.5, "statistics": STATISTICS}

    def loss_of(policy: torch.nn.Module) -> torch.Tensor:
        finish = partial(pair_loss, objective=ik.DPO(), **terms)
        loss = policy(**laid_out["inputs"], pair_pass=PairPass(laid_out, finish, marginals=True))["loss"]
        loss.backward()
        return loss.detach()

    whole, parts = model(), model()
    for policy in (whole, parts):
        accept_pair_pass(policy)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in [*parts.model.layers, *([parts.lm_head] if head_by_itself else []), parts]:
        fully_shard(module, mesh=mesh)
    difference = {"loss": (loss_of(parts) - loss_of(whole)).abs().item()}
    for (name, parameter), found in zip(whole.named_parameters(), parts.parameters()):
        dist.all_reduce(parameter.grad)
        mean = parameter.grad / dist.get_world_size()
        difference[name] = ((found.grad.full_tensor() - mean).norm() / mean.norm()).item()
    return difference


def tensor_parallel(folder: Path) -> dict[str, Any]:
    """Train a policy and a reference that transformers splits over both processes, each of which sees all pairs."""
    models = {"policy": folder / "policy", "reference": folder / "reference"}
    if dist.get_rank() == 0:
        model().save_pretrained(models["policy"])
        model(seed=5).save_pretrained(models["reference"])
    dist.barrier()
    # Accelerate allows tensor parallelism only on accelerators, although CPUs compute the same results.
    ParallelismConfig._validate_accelerator = lambda *_: None
    config = DistributedConfig(tp_plan="auto")
    loaded = {k: AutoModelForCausalLM.from_pretrained(v, distributed_config=config) for k, v in models.items()}
    made = run(InSPOTrainer, InSPOConfig, folder / "tensor parallel", **loaded)
    gradients = [{k: g.full_tensor() if isinstance(g, DTensor) else g for k, g in s.items()} for s in made.gradients]
    return {"losses": made.losses, "gradients": gradients, "logs": made.logs}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    outcome = {}
    for name, (trainer, config, options) in RUNS.items():
        made = run(
            trainer,
            config,
            folder / name,
            policy=model(),
            reference=model(seed=5),
            data=pairs(LENGTHS),
            **{"per_device_train_batch_size": 2} | options,
        )
        outcome[name] = {"losses": made.losses, "gradients": made.gradients, "logs": made.logs}
    outcome["tensor parallel"] = tensor_parallel(folder)
    for layout in ("rows", "packed_tree"):
        for head_by_itself in (False, True):
            outcome[f"sharded {layout} {head_by_itself}"] = {"difference": sharded(layout, head_by_itself)}
    torch.save(outcome, folder / f"{os.environ['RANK']}.pt")
    sys.stdout.flush()
    os._exit(0)  # gloo's threads must not outlive the interpreter

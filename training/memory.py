"""Estimate the memory and disk space that a run needs, and the updates that bfloat16 weights would lose."""

from __future__ import annotations

import math
import shutil

import psutil
import torch
from transformers import PreTrainedModel

import inspo_kernels as ik

from .batching import Batcher
from .config import TrainConfig
from .errors import Log
from .inputs import Inputs
from .output import existing

GIB = 2**30
LOST_UPDATES_WARNING = 0.5  # share of weights that updates of the learning rate's size leave unchanged
SAMPLE = 10_000  # weights of each matrix that are examined


def estimate_memory(
    model: PreTrainedModel, config: TrainConfig, device: torch.device, *, tokens: int, longest_pair: int, share: int = 1
) -> dict[str, int]:
    """Estimate the bytes of a process that trains ``model`` with AdamW in forward passes of ``tokens`` tokens, by use.

    The loss gives gradients for all of them, and one pair has at most ``longest_pair``. ``share``: the number of
    processes among which FSDP2 shards the model. The activations are those of a gated decoder layer (Llama): the
    inputs that the matmuls of the backward pass need, and the norms.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters, gradients = (sum(p.nbytes for p in some) for some in (list(model.parameters()), trained))
    compute = 2 if config.bf16 else model.dtype.itemsize
    residual = compute if share > 1 else model.dtype.itemsize  # autocast leaves the residual stream as it is

    fields = model.config.get_text_config()
    hidden, layers, heads = fields.hidden_size, fields.num_hidden_layers, getattr(fields, "num_attention_heads", None)
    attention = heads * (getattr(fields, "head_dim", None) or hidden // heads) if heads else hidden
    inner = getattr(fields, "intermediate_size", None) or 4 * hidden
    # Two norms in float32 (input, normalised), each with the input of a matmul. Queries, keys and values (repeated for
    # all heads), the output of attention and its copy. Gate, its activation, up and their product.
    layer = tokens * (2 * (4 * 2 * hidden + compute * hidden) + compute * (5 * attention + 4 * inner))
    activations = layers * tokens * residual * hidden + layer if config.activation_checkpointing else layers * layer
    weight = model.get_output_embeddings().weight
    gathered = 0
    if share > 1:
        of_layers = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name or ".h." in name)
        whole = sum(p.numel() for p in model.parameters()) - of_layers
        # Embeddings and head throughout, in the matmuls' dtype and with their gradients; two layers at a time.
        gathered = compute * (2 * whole + 2 * 2 * of_layers // layers)
    elif config.bf16:  # autocast's copies of the matrices, which the backward pass needs
        activations += sum(2 * p.numel() for p in model.parameters() if p.ndim > 1) - 2 * weight.numel()
    head = ik.workspace_bytes(
        tokens,
        weight.shape[1],
        weight.shape[0],
        dtype=torch.bfloat16 if compute == 2 else model.dtype,
        device=device,
        longest_pair=longest_pair,
        frozen=not weight.requires_grad,
    )
    return {
        "parameters": parameters // share,
        "gradients": gradients // share,
        "optimizer": 2 * gradients // share,
        "gathered": gathered,
        "activations": activations,
        "head": head,
    }


def report_memory(config: TrainConfig, inputs: Inputs, batcher: Batcher, log: Log, share: int) -> None:
    """Log the memory a process needs for the training pairs, and a warning if its GPU has less."""
    model, lengths = inputs.model, inputs.train_pairs.lengths
    longest, device = int(batcher.padded(lengths, conditioned=config.sees_alternative).max()), batcher.device
    tokens = min(max(config.max_batch_tokens, longest), longest * config.per_device_train_batch_size)
    longest_pair = int(lengths[:, 1:].sum(1).max()) * (2 if config.marginal_weight else 1)
    memory = estimate_memory(model, config, device, tokens=tokens, longest_pair=longest_pair, share=share)
    name = f"each of {share} processes that share the model (FSDP2)" if share > 1 else "a process"
    listed, total = (f"{what} {size / GIB:.2f}" for what, size in memory.items() if size), sum(memory.values())
    log(
        f"{name} needs, estimated: {' + '.join(listed)} = {total / GIB:.2f} GiB of memory. Activations: a rough\n"
        f"figure for a pass of {tokens} tokens without attention matrices (flash attention keeps none). Not counted: "
        "the framework, fragmentation"
    )
    if device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
        if total > capacity:
            log(
                f"WARNING: that is more than the device has ({capacity / GIB:.2f} GiB). What helps: a smaller "
                "max_batch_tokens, activation_checkpointing: true, lora, or more processes that share the model (FSDP2)"
            )


def report_disk(model: PreTrainedModel, config: TrainConfig, steps: int, log: Log) -> None:
    """Log how much a run writes at most, with AdamW's state in float32, and a warning if the disk has less."""
    if config.folder is None:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    one = sum(p.nbytes + 8 * p.numel() for p in trained)
    every = config.save_steps if config.save_steps >= 1 else max(1, round(config.save_steps * steps))
    saved = 0 if config.save_strategy == "no" else math.ceil(steps / every)
    kept = min(saved, (config.save_total_limit or saved) + 1)  # the oldest one is deleted after the newest is written
    finals = sum(p.nbytes for p in trained) * (2 if config.keep_best and config.eval_data else 1)
    total, place = kept * one + finals, existing(config.folder)
    listed = f"checkpoints {kept} x {one / GIB:.2f} GiB + models {finals / GIB:.2f}"
    log(f"disk space, estimated: {listed} = {total / GIB:.2f} GiB")
    free = shutil.disk_usage(place).free
    if total > free:
        log(f"WARNING: that is more than {place} has ({free / GIB:.2f} GiB). What helps: a smaller save_total_limit")


def report_precision(model: PreTrainedModel, learning_rate: float, log: Log) -> None:
    """Warn if an AdamW step of size ``learning_rate`` leaves most of the bfloat16 weights unchanged.

    A step below half the distance to the next number is rounded away: 1/512 to 1/256 of the weight.
    """
    trained = [p for p in model.parameters() if p.dtype == torch.bfloat16 and p.requires_grad and p.ndim > 1]
    samples = [p.detach().flatten()[:: max(1, p.numel() // SAMPLE)] for p in trained]
    weights = torch.cat([torch.empty(0), *(some.float().cpu() for some in samples)])
    lost = ((weights + learning_rate).bfloat16() == weights).float().mean().item()  # NaN without such weights
    if lost >= LOST_UPDATES_WARNING:
        log(
            f"WARNING: at learning_rate={learning_rate:g}, a step of AdamW is rounded away on {lost:.0%} of the "
            "bfloat16\nweights: they would stay as they are. Use dtype: float32 with bf16: true (master weights)."
        )


def in_use(device: torch.device) -> dict[str, float]:
    """Return the memory this process takes: the peak on a GPU, or resident memory."""
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB}
    return {"rss_gib": psutil.Process().memory_info().rss / GIB}

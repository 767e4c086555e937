"""How much memory a process of a run needs, estimated before it starts, and what bfloat16 parameters lose."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import psutil
import torch
from torch import Tensor
from transformers import PreTrainedModel

from inspo_kernels.backends import resolve_backend
from inspo_kernels.gradients import DeferredGradients, Needs
from inspo_kernels.head import LMHead
from inspo_kernels.pair_loss import PairTerms
from inspo_kernels.prepare import PAIR_GROWTH

from .config import TrainConfig
from .engine import process_count
from .scoring import Lengths

GIB = 2**30
LOST_UPDATES_WARNING = 0.5  # share of weights that steps of the learning rate's size leave as they are
SAMPLE = 10_000  # weights of a matrix that are looked at


@dataclass(frozen=True)
class Memory:
    """Bytes of one process. ``gathered``: weights and gradients that FSDP2 has whole for a while."""

    parameters: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def text(self, tokens: int) -> str:
        parts = {name: size for name, size in vars(self).items() if size}
        listed = " + ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items())
        return (
            f"memory a process needs, estimated: {listed} = {self.total / GIB:.2f} GiB. Activations: of a pass of "
            f"{tokens} tokens,\nroughly, without attention matrices (kernels like flash attention have none). Not "
            "counted: the framework itself, fragmentation"
        )

    def warning(self, capacity: int, config: TrainConfig, processes: int) -> str | None:
        """What to change where a device of ``capacity`` bytes is too small."""
        if self.total <= capacity:
            return None
        changes = ["a smaller max_batch_tokens"] if self.activations + self.head > 0.1 * self.total else []
        changes += [] if config.activation_checkpointing else ["activation_checkpointing: true"]
        changes += [] if self.gathered else ["several processes that share the model (FSDP2)"]
        changes += [] if config.lora is not None else ["lora"]
        return (
            f"WARNING: that is more than the device has ({capacity / GIB:.2f} GiB). What helps: {', '.join(changes)}"
            + ("" if processes == 1 or not self.gathered else ", or more processes")
        )


def graded_tokens(lengths: Lengths, config: TrainConfig) -> int:
    """Return the most scored tokens of a pair that the loss is differentiated in, in each context anew."""
    terms = PairTerms(config.make_objective(), None, None, marginal_weight=config.marginal_weight, mean=False)
    kinds = terms.gradient_kinds(4 if config.sees_alternative else 2)
    return int(sum(lengths[:, 1 + kind % 2] for kind in kinds).max())


def estimate_memory(
    model: PreTrainedModel, config: TrainConfig, device: torch.device, *, tokens: int, longest_pair: int,
    processes: int, sharded: bool,
) -> Memory:  # fmt: skip
    """Of a process that trains ``model`` with AdamW in steps of several forward passes of ``tokens`` tokens each.

    It is as if the loss were differentiated in all of them; ``longest_pair``: in so many of one pair.
    The activations' formula is that of a gated decoder layer (Llama); its largest tensors are those that the products
    of the backward pass need.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    parameters, gradients = (sum(p.nbytes for p in some) for some in (list(model.parameters()), trained))
    share = processes if sharded else 1
    bf16 = config.bf16
    compute = 2 if bf16 else model.dtype.itemsize
    residual = compute if sharded else model.dtype.itemsize  # autocast leaves the residual stream as it is

    fields = model.config.get_text_config()
    hidden, layers = fields.hidden_size, fields.num_hidden_layers
    heads = fields.num_attention_heads
    attention = heads * (getattr(fields, "head_dim", None) or hidden // heads)
    inner = getattr(fields, "intermediate_size", None) or 4 * hidden
    # Two norms in float32 (input, normalised) with the products' input behind each; queries, keys, values (repeated for
    # all heads), what attention returns and its copy; gate, its activation, up and their product.
    norms = 2 * (4 * 2 * hidden + compute * hidden)
    layer = tokens * (norms + compute * (5 * attention + 4 * inner))
    kept = tokens * residual * hidden
    activations = layers * kept + layer if config.activation_checkpointing else layers * layer
    weight = model.get_output_embeddings().weight
    if bf16 and not sharded:  # autocast's copies of the matrices, which the backward pass needs
        activations += sum(2 * p.numel() for p in model.parameters() if p.ndim > 1) - 2 * weight.numel()

    gathered = 0
    if sharded:
        layer_weights = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name or ".h." in name)
        whole = sum(p.numel() for p in model.parameters()) - layer_weights
        # Embeddings and head throughout, in the products' dtype and with their gradients; two layers at a time.
        gathered = compute * (2 * whole + 2 * 2 * layer_weights // layers)

    dtype = torch.bfloat16 if compute == 2 else model.dtype
    like = torch.empty(weight.shape, dtype=dtype if sharded else weight.dtype, device="meta")
    lm_head = LMHead(like, None, None, 1.0, dtype)
    # Scored rows, and their gradients.
    head = tokens * hidden * (compute + 4) + _head_memory(
        lm_head, device, tokens, longest_pair, trained=weight.requires_grad, others=0 if sharded else like.nbytes
    )
    return Memory(parameters // share, gradients // share, 2 * gradients // share, gathered, activations, head)


def _head_memory(
    head: LMHead, device: torch.device, rows: int, longest_pair: int, *, trained: bool, others: int
) -> int:
    """Workspace of a pass of ``rows`` rows and, of a ``trained`` head, what dW takes beside the gradient of the passes
    before it, whose bytes are ``others`` unless they are counted elsewhere.
    """
    backend = resolve_backend("auto", head, device)
    assert backend is not None
    most = backend.default_workspace_bytes(head, device)
    capacity = backend.capacity(head, device, most)
    kept = min(rows, capacity)
    if trained:  # the rows of a pair stay in the workspace together
        kept = min(max(kept, longest_pair), capacity * PAIR_GROWTH)
    fitting = min(kept, capacity)
    workspace = min(backend.kept_bytes(head, fitting), most) + backend.kept_bytes(head, kept - fitting)
    if not trained:
        return workspace
    accumulated = head.vocab_size * head.hidden_size * head.accumulate_dtype.itemsize
    needs = Needs(x=True, weight=True, bias=False)
    if rows > kept or not DeferredGradients.worth_deferring(backend, head, rows, needs):
        return accumulated + max(workspace, others)  # in the accumulate dtype first, and then, in its own, beside it
    direct = backend.name == "triton" or head.weight.dtype == head.accumulate_dtype
    return workspace + others + (0 if direct else accumulated)


def tokens_of_pass(longest: int, config: TrainConfig, processes: int) -> int:
    """The most that a forward pass of one process reads, where the largest pair takes ``longest`` tokens."""
    return min(max(config.max_batch_tokens, longest), longest * math.ceil(config.pairs_per_micro_step / processes))


def report_memory(
    model: PreTrainedModel, config: TrainConfig, device: torch.device, longest: int, lengths: Lengths,
    log: Callable[[str], None],
) -> None:  # fmt: skip
    """Says what a process of this run will need, and warns where that, or the parameters' precision, will not do."""
    tokens = tokens_of_pass(longest, config, process_count())
    memory = estimate_memory(
        model, config, device, tokens=tokens, longest_pair=graded_tokens(lengths, config),
        processes=process_count(), sharded=config.sharded,
    )  # fmt: skip
    log(memory.text(tokens))
    if device.type == "cuda":
        capacity = torch.cuda.get_device_properties(device).total_memory
        if warning := memory.warning(capacity, config, process_count()):
            log(warning)
    if warning := precision_warning(model, config.learning_rate):
        log(warning)


def report_disk(model: PreTrainedModel, config: TrainConfig, steps: int, log: Callable[[str], None]) -> None:
    """Say how much a run will write at most, and warn where that is not free. AdamW's state is taken as float32."""
    if config.folder is None:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    one = sum(p.nbytes + 8 * p.numel() for p in trained)
    every = config.save_steps if config.save_steps >= 1 else max(1, round(config.save_steps * steps))
    saved = 0 if config.save_strategy == "no" else math.ceil(steps / every)
    kept = min(saved, (config.save_total_limit or saved) + 1)  # the oldest one goes after the newest is there
    finals = sum(p.nbytes for p in trained) * (2 if config.keep_best and config.eval_data else 1)
    total, place = kept * one + finals, config.folder
    log(
        f"disk a run takes, estimated: {kept} checkpoints of {one / GIB:.2f} GiB + models {finals / GIB:.2f} = "
        f"{total / GIB:.2f} GiB"
    )
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if total > free:
        log(f"WARNING: that is more than {place} has ({free / GIB:.2f} GiB). What helps: a smaller save_total_limit")


def lost_updates(model: PreTrainedModel, learning_rate: float) -> float:
    """Share of bfloat16 weights that one step of size ``learning_rate``, AdamW's, leaves as they are.

    A step that is less than half the distance to the next number is rounded away: 1/512 to 1/256 of the weight.
    """
    shares: list[Tensor] = []
    for parameter in model.parameters():
        if parameter.dtype == torch.bfloat16 and parameter.requires_grad and parameter.ndim > 1:
            values = parameter.detach().flatten()
            some = values[:: max(1, len(values) // SAMPLE)]
            shares.append(((some.float() + learning_rate).bfloat16() == some).float().mean().cpu())
    return torch.stack(shares).mean().item() if shares else 0.0


def precision_warning(model: PreTrainedModel, learning_rate: float) -> str | None:
    """Where bfloat16 parameters would not move."""
    lost = lost_updates(model, learning_rate)
    if lost < LOST_UPDATES_WARNING:
        return None
    return (
        f"WARNING: at learning_rate={learning_rate:g}, a step of AdamW is rounded away on {lost:.0%} of the bfloat16\n"
        "weights: they would stay as they are. Use dtype: float32 with bf16: true (master weights)."
    )


def in_use(device: torch.device) -> dict[str, float]:
    """Return what this process takes: the peak of a GPU, or its resident memory."""
    if device.type == "cuda":
        return {"peak_memory_gib": torch.cuda.max_memory_allocated(device) / GIB}
    return {"rss_gib": psutil.Process().memory_info().rss / GIB}

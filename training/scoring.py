"""Model and loss as one module, and the log-probs of many pairs: one code path for policy, reference and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import PreTrainedModel

import inspo_kernels as ik

from .batching import MicroBatch, micro_batches
from .data import Pair
from .engine import (
    checkpointed,
    decoder_layers,
    in_any_process,
    process_count,
    process_index,
    sum_over_processes,
)
from .stopping import StopRequested

_SCORED_OF_ROWS, _SCORED_OF_TREES = ("labels", "marginal_labels"), ("labels", "segment_ids", "num_pairs")
_READ_BY_MODEL = ("input_ids", "attention_mask", "position_ids", "tree_ends", "paths", "path_of", "rows")
TIE = 1e-4  # margins this small are rounding: before training all of them are 0 where there is a reference


class PairModel(nn.Module):
    """A causal LM whose forward takes a batch of pairs and returns the loss summed over them, with all that is logged.

    Training engines wrap this module, not the model inside: the head's weight is read within the wrapped forward.
    ``autocast`` runs that forward in bfloat16 autocast; ``gradient_checkpointing`` keeps one activation a layer.
    """

    def __init__(
        self, model: PreTrainedModel, objective: ik.Objective, marginal_weight: float = 0.0, *,
        autocast: bool = False, gradient_checkpointing: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.loss = ik.InSPOLoss(objective, marginal_weight=marginal_weight, reduction="sum")
        # Any objective without a reference would do: of its output only the sums are read.
        self.sums = ik.InSPOLoss(ik.SimPO(), reduction="sum")
        self.autocast = autocast
        self.checkpointed = tuple(decoder_layers(model, "gradient_checkpointing")) if gradient_checkpointing else ()

    def forward(
        self, batch: dict[str, Any], ref_logps: Tensor | None = None, *, sums_only: bool = False
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Plain tensors, which every engine looks into: (loss, metrics summed over the pairs).

        With ``sums_only``: (table of summed log-probs and lengths as ``Scores`` has them, {}).
        """
        if ref_logps is not None and ref_logps.dtype != torch.float64:
            raise TypeError(f"ref_logps came as {ref_logps.dtype}: the engine must not cast the inputs of PairModel")
        is_tree = "tree_ends" in batch
        inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
        scored = {name: batch[name] for name in (_SCORED_OF_TREES if is_tree else _SCORED_OF_ROWS)}
        mask = ik.tree_attention_mask(batch, self.model) if is_tree else batch["attention_mask"]
        autocast = torch.autocast(inputs["input_ids"].device.type, torch.bfloat16, enabled=self.autocast)
        with autocast, checkpointed(self.checkpointed if torch.is_grad_enabled() else ()):
            hidden, head = ik.hidden_and_head(self.model, attention_mask=mask, **inputs)
            if is_tree:
                hidden = hidden.flatten(0, 1).index_select(0, batch["rows"])
            if not sums_only:
                out = self.loss(hidden, **scored, ref_logps=ref_logps, **head)
                return out.loss, {"loss": out.losses.double().sum(), **summed_metrics(out)}
            out = self.sums(hidden, **scored, **head)
        marginals = [] if out.marginal_logps is None else [out.marginal_logps.view(2, -1)]
        return torch.cat([out.logps.view(2, -1), out.lengths.view(2, -1), *marginals]), {}

    def answer(self, input_ids: Tensor, **settings: Any) -> Tensor:
        """The ids of ``input_ids`` (1, T) with what the model generates after them; an entry of its own for engines."""
        with torch.autocast(input_ids.device.type, torch.bfloat16, enabled=self.autocast):
            generate = cast(Callable[..., Tensor], self.model.generate)  # as any causal language model has it
            return generate(input_ids, attention_mask=torch.ones_like(input_ids), **settings)


def unwrap(module: nn.Module) -> PairModel:
    """The PairModel in ``module``, which is one in its engine."""
    inner = module.module if isinstance(module, DistributedDataParallel) else module
    assert isinstance(inner, PairModel)
    return inner


def summed_metrics(out: ik.InSPOOutput) -> dict[str, Tensor]:
    """Sums over the pairs, float64, under TRL's names; behind "marginal/" the same given the prompt alone."""
    kinds = [("", out.chosen_rewards, out.rejected_rewards, out.logps)]
    if out.marginal_logps is not None:
        assert out.marginal_chosen_rewards is not None and out.marginal_rejected_rewards is not None
        kinds.append(("marginal/", out.marginal_chosen_rewards, out.marginal_rejected_rewards, out.marginal_logps))
    metrics: dict[str, Tensor] = {}
    for name, chosen, rejected, logps in kinds:
        columns = {
            "rewards/chosen": chosen, "rewards/rejected": rejected, "rewards/accuracies": correct(chosen - rejected),
            "rewards/margins": chosen - rejected, "logps/chosen": logps.view(2, -1)[0],
            "logps/rejected": logps.view(2, -1)[1],
        }  # fmt: skip
        metrics |= {name + key: column.double().sum() for key, column in columns.items()}
    return metrics


def correct(margins: Tensor) -> Tensor:
    """1 where the chosen response has the higher reward, 0 where the rejected one has it, 1/2 for a tie; float64."""
    return ((margins > TIE).double() + (margins >= -TIE).double()) / 2


@dataclass(frozen=True)
class Batcher:
    """Pairs to the tensors ``PairModel`` takes; the one place that knows how sequences lie in them.

    Labels stay on the CPU, where planning needs no synchronisation. ``max_tokens`` bounds a forward pass.
    ``separator_ids`` stand between the other response and the one that is scored given it. ``layout`` is one of
    ``condition_pairs``: rows, tree or packed_tree.
    """

    pad_token_id: int
    device: torch.device
    max_tokens: int
    separator_ids: tuple[int, ...] = ()
    layout: str = "rows"

    def __call__(self, pairs: Sequence[Pair], *, conditioned: bool) -> dict[str, Any]:
        batch = ik.condition_pairs(
            [p[:3] for p in pairs], pad_token_id=self.pad_token_id, conditioned=conditioned,
            separator_ids=self.separator_ids, layout=self.layout,
        )  # fmt: skip
        return batch | {name: batch[name].to(self.device) for name in _READ_BY_MODEL if name in batch}

    def tokens(self, pair: Pair, *, conditioned: bool) -> int:
        """Tokens that the model reads for a pair, without padding."""
        in_rows = 2 * (pair.tokens + len(self.separator_ids)) if conditioned else pair.tokens + len(pair.prompt)
        return in_rows if self.layout == "rows" else in_rows - len(pair.prompt)

    def padded(self, pair: Pair, *, conditioned: bool) -> int:
        """Tokens that a pair takes in a forward pass of which it is the largest."""
        if self.layout != "rows":
            return self.tokens(pair, conditioned=conditioned)
        longest = max(len(pair.chosen), len(pair.rejected))
        return 2 * (pair.tokens + len(self.separator_ids) if conditioned else len(pair.prompt) + longest)

    def plan(self, pairs: Sequence[Pair], *, conditioned: bool) -> list[MicroBatch]:
        """The forward passes of this process, as many in each process."""
        sizes = [self.padded(pair, conditioned=conditioned) for pair in pairs]
        packed = self.layout == "packed_tree"
        return micro_batches(sizes, self.max_tokens, process_count(), packed=packed)[process_index()]


@dataclass(frozen=True)
class Scores:
    """Summed log-probs of n pairs, float64 on the CPU, (2, n) each: row 0 the chosen, row 1 the rejected responses."""

    logps: Tensor
    lengths: Tensor
    marginal_logps: Tensor | None


@torch.no_grad()
def score(
    module: nn.Module, pairs: Sequence[Pair], batcher: Batcher, *, conditioned: bool, progress: str | None,
    stop_requested: Callable[[], bool] | None = None,
) -> Scores:  # fmt: skip
    """Log-probs of all pairs; conditioned ones bring the marginals along. ``progress`` names the bar, None hides it.

    The processes share the work, and each returns all of it. Raises StopRequested in all of them before the next pass
    where ``stop_requested`` has become true in one.
    """
    table = torch.zeros(6 if conditioned else 4, len(pairs), dtype=torch.float64, device=batcher.device)
    plan = batcher.plan(pairs, conditioned=conditioned)
    for part in tqdm(plan, desc=progress, disable=progress is None or None, leave=False):
        if stop_requested is not None and in_any_process(stop_requested(), batcher.device):
            raise StopRequested
        rows, _ = module(batcher([pairs[i] for i in part.pairs], conditioned=conditioned), sums_only=True)
        if part.weight:
            table[:, part.pairs] = rows.double()
    table = sum_over_processes(table).cpu()
    return Scores(table[:2], table[2:4], table[4:] if conditioned else None)


def weights_digest(model: PreTrainedModel) -> str:
    """Of configuration and weights, before an engine takes the model."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

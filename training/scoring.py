"""Wrap model and loss in one module, and score many pairs: one path for policy, reference and evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import inspo_kernels as ik

from .batching import Batcher
from .engine import checkpointed, decoder_layers, in_any_process, sum_over_processes
from .errors import InputError, Log, Stopped
from .pairs import Pair

_SCORED_OF_ROWS, _SCORED_OF_TREES = ("labels", "marginal_labels"), ("labels", "segment_ids", "num_pairs")
# Largest difference of trees and rows in nats per token, in bfloat16 or not. Rounding stays far below.
_TOLERANCE = {True: 5e-2, False: 2e-4}
TIE = 1e-4  # smaller margins are rounding: before training, all margins from a reference are 0


class Batch:
    """Hold the input of a forward pass of ``PairModel``.

    It must not be a dataclass, because FSDP2 rounds a dataclass's tensors to bfloat16.

    ``tensors``: from ``condition_pairs``. ``ref_logps``: (2B,) float64. The loss is ``scale`` times the sum over the
    pairs; with ``sums_only`` there is no loss. With ``marginals`` the report has the log-probs given the prompt alone
    for every pair, plain pairs included.
    """

    def __init__(
        self,
        tensors: dict[str, Any],
        ref_logps: Tensor | None = None,
        scale: float = 1.0,
        *,
        sums_only: bool = False,
        marginals: bool = False,
    ) -> None:
        self.tensors, self.ref_logps, self.scale = tensors, ref_logps, scale
        self.sums_only, self.marginals = sums_only, marginals


class Report:
    """Hold the result of a forward pass: metrics as float64 sums over the pairs, or the ``table`` of ``sums_only``.

    It must not be a dataclass either.
    """

    def __init__(self, metrics: dict[str, Tensor], table: Tensor | None = None) -> None:
        self.metrics, self.table = metrics, table


class PairModel(nn.Module):
    """A causal LM whose forward takes a batch of pairs and returns the summed loss with the metrics to log.

    Training engines wrap this module, not the model in it: the head's weight is read within the wrapped forward.
    """

    def __init__(self, model: PreTrainedModel, objective: ik.Objective, marginal_weight: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.loss = ik.InSPOLoss(objective, marginal_weight=marginal_weight, reduction="sum")
        self.checkpointed: tuple[Any, ...] = ()
        # Trainer and accelerate read these attributes.
        self.config = model.config
        self.quantization_method = getattr(model, "quantization_method", None)
        self._no_split_modules = list(model._no_split_modules or ())

    def forward(self, batch: Batch) -> tuple[Tensor, Report]:
        tensors = batch.tensors
        is_tree = "tree_ends" in tensors
        scored = {name: tensors[name] for name in (_SCORED_OF_TREES if is_tree else _SCORED_OF_ROWS)}
        mask = ik.tree_attention_mask(tensors, self.model) if is_tree else tensors["attention_mask"]
        with checkpointed(self.checkpointed if torch.is_grad_enabled() else ()):
            hidden, head = ik.hidden_and_head(
                self.model, attention_mask=mask, input_ids=tensors["input_ids"], position_ids=tensors["position_ids"]
            )
            if is_tree:
                hidden = hidden.flatten(0, 1).index_select(0, tensors["rows"])
            if batch.sums_only:
                sums, lengths = ik.pair_logps(hidden, **scored, **head)
                return sums.new_zeros(()), Report({}, torch.cat([sums[:2], lengths[:2].to(sums), sums[2:]]))
            out = self.loss(hidden, **scored, ref_logps=batch.ref_logps, **head)
        metrics = {"loss": out.losses.double().sum(), **summed_metrics(out, batch.marginals)}
        return out.loss * batch.scale, Report(metrics)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Any = None, every_n_layers: int = 1, offload: bool = False
    ) -> None:
        """Checkpoint the activations of every ``every_n_layers``-th decoder layer; Trainer calls this."""
        self.checkpointed = tuple(decoder_layers(self.model, "activation_checkpointing"))[::every_n_layers]

    def generate(self, *given: Any, **settings: Any) -> Tensor:
        """Call the model's own ``generate``."""
        return cast(Any, self.model.generate)(*given, **settings)


def summed_metrics(out: ik.InSPOOutput, marginals: bool = False) -> dict[str, Tensor]:
    """Return float64 sums over the pairs under TRL's names, and under "marginal/" those given the prompt alone.

    With ``marginals`` the latter are included even if no pair has marginals: they are a plain pair's own log-probs.
    """
    own = out.chosen_rewards, out.rejected_rewards, out.logps
    kinds = [("", *own)]
    if out.marginal_logps is not None:
        assert out.marginal_chosen_rewards is not None and out.marginal_rejected_rewards is not None
        plain = out.marginal_chosen_rewards.isnan()
        alone = out.marginal_chosen_rewards, out.marginal_rejected_rewards, out.marginal_logps.view(2, -1)
        chosen, rejected, logps = (torch.where(plain, mine.view_as(a), a) for mine, a in zip(own, alone))
        kinds.append(("marginal/", chosen, rejected, logps))
    elif marginals:
        kinds.append(("marginal/", *own))
    metrics: dict[str, Tensor] = {}
    for name, chosen, rejected, logps in kinds:
        columns = pair_metrics(chosen, rejected, *logps.view(2, -1))
        metrics |= {name + key: column.double().sum() for key, column in columns.items()}
    return metrics


def pair_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, chosen_logps: Tensor, rejected_logps: Tensor
) -> dict[str, Tensor]:
    """Return the metrics of each pair, (n,), under TRL's names."""
    margins = chosen_rewards - rejected_rewards
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": correct(margins),
        "rewards/margins": margins,
        "logps/chosen": chosen_logps,
        "logps/rejected": rejected_logps,
    }


def correct(margins: Tensor) -> Tensor:
    """Return 1 where the chosen response has the higher reward, 0 where the rejected one, 1/2 for a tie; float64."""
    return ((margins > TIE).double() + (margins >= -TIE).double()) / 2


@dataclass(frozen=True)
class Scores:
    """Summed log-probs of n pairs, float64 on the CPU, (2, n) each: row 0 the chosen, row 1 the rejected responses."""

    logps: Tensor
    lengths: Tensor
    marginal_logps: Tensor | None


@torch.no_grad()
def score(
    module: nn.Module,
    pairs: Sequence[Pair],
    batcher: Batcher,
    *,
    conditioned: bool,
    stop_requested: Callable[[], bool] | None = None,
) -> Scores:
    """Score all pairs; conditioned scores include the marginals.

    The ranks share the work, and each returns all scores. Once ``stop_requested`` is true on one rank, all ranks raise
    Stopped before the next pass.
    """
    table = torch.zeros(6 if conditioned else 4, len(pairs), dtype=torch.float64, device=batcher.device)
    for part in batcher.plan(pairs, conditioned=conditioned):
        if stop_requested is not None and in_any_process(stop_requested(), batcher.device):
            raise Stopped("stopped by SIGTERM")
        batch = Batch(batcher([pairs[i] for i in part.pairs], conditioned=conditioned), sums_only=True)
        _, report = module(batch)
        if part.weight:
            assert report.table is not None
            table[:, part.pairs] = report.table.double()
    table = sum_over_processes(table).cpu()
    return Scores(table[:2], table[2:4], table[4:] if conditioned else None)


def check_layout(
    batcher: Batcher, module: nn.Module, pairs: Sequence[Pair], *, bf16: bool, required: bool, log: Log
) -> Batcher:
    """Return ``batcher`` if ``module`` scores two small pairs as in rows; otherwise a batcher of rows.

    Raises InputError instead if the tree is ``required``. All ranks call this and get the same result.
    """
    if batcher.layout == "rows":
        return batcher
    # Ragged on purpose: masks must hide padding or another pair.
    small = [
        Pair(pairs[0].prompt[-24:], pairs[0].chosen[-12:], pairs[0].rejected[-9:]),
        Pair(pairs[-1].prompt[-5:], pairs[-1].chosen[-3:], pairs[-1].rejected[-7:]),
    ]
    rows = replace(batcher, layout="rows")
    differences = []
    for conditioned in (True, False):
        expected, found = (score(module, small, b, conditioned=conditioned) for b in (rows, batcher))
        for one, other in ((found.logps, expected.logps), (found.marginal_logps, expected.marginal_logps)):
            if one is not None and other is not None:
                differences.append((one - other) / expected.lengths)
    worst = torch.cat(differences).abs().max().item()  # NaN stays NaN and fails the comparison
    if worst <= _TOLERANCE[bf16]:
        return batcher
    message = f"this model scores a small pair differently as a tree and in rows: {worst:.1e} nats per token"
    if required:
        raise InputError(f"layout=tree: {message}; set layout=rows")
    log(f"WARNING: {message}. layout: rows")
    return rows


def weights_digest(model: PreTrainedModel) -> str:
    """Hash configuration and weights, before an engine takes the model."""
    digest = hashlib.blake2b(digest_size=16)
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

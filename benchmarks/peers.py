"""Other ways to the same pairwise loss, each in one function of ``(x, weight, batch)`` -> (loss, summed log-probs).

All get the scored rows only, as a user who compacts them would pass them. What is not installed, cannot run on a device
or lacks a soft-cap is named as such by ``Peer.unavailable``, so that a table can say why a figure is missing.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BETA = 0.1
# Tile width that TRL's own trainer passes.
TRL_VOCAB_CHUNK = 32_768


@dataclass(frozen=True)
class HeadShape:
    """An LM head: hidden size, vocabulary, soft-cap of the logits if any."""

    hidden: int
    vocab: int
    softcap: float | None = None


class PairBatch:
    """Scored rows of ``tokens / (2 * response)`` pairs, chosen before rejected, every response of the same length.

    x (N, H), weight (V, H), labels (N,), segment_ids (N,), ref_logps (2B,). Logits are standard normal but for the
    label's, which is raised by 0 to 20: label probabilities range from 1/V to 1, as a trained model's do, alike within
    a pair, so that the loss does not saturate. The two reference log-probs of a pair are equal: the loss is then the
    same for a peer that knows no precomputed reference.
    """

    def __init__(
        self,
        shape: HeadShape,
        tokens: int,
        response: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weight: Tensor | None = None,
    ) -> None:
        if tokens % (2 * response):
            raise ValueError(f"{tokens} tokens are no whole number of pairs of two responses of {response} tokens")
        g = torch.Generator(device).manual_seed(tokens)
        sequences = tokens // response
        self.shape, self.response = shape, response
        self.weight = random_head(shape, dtype=dtype, device=device) if weight is None else weight
        self.labels = torch.randint(shape.vocab, (tokens,), generator=g, device=device)
        self.segment_ids = torch.arange(sequences, device=device).repeat_interleave(response)
        self.ref_logps = torch.full((sequences,), -response * math.log(shape.vocab), device=device)
        label_rows = self.weight[self.labels].float()
        raised = 20 * torch.rand(tokens // 2, 1, generator=g, device=device).repeat(2, 1)
        x = torch.randn(tokens, shape.hidden, generator=g, device=device)
        x += raised * label_rows / label_rows.square().sum(1, keepdim=True)
        self.x = x.to(dtype)
        self.host_labels, self.host_segment_ids = self.labels.cpu(), self.segment_ids.cpu()

    @property
    def softcap(self) -> float | None:
        return self.shape.softcap


def random_head(shape: HeadShape, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(V, H), normal with variance 1/H."""
    g = torch.Generator(device).manual_seed(0)
    return torch.randn(shape.vocab, shape.hidden, generator=g, device=device).div_(shape.hidden**0.5).to(dtype)


Loss = Callable[[Tensor, Tensor, PairBatch], tuple[Tensor, Tensor]]


def dpo(logps: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    """DPO by torch autograd from per-token log-probs (N,)."""
    sums = logps.view(-1, batch.response).sum(1)
    chosen, rejected = (sums - batch.ref_logps).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean(), sums.detach()


def log_softmax(x: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    return dpo(plain_logps(x, weight, batch), batch)


def plain_logps(x: Tensor, weight: Tensor, batch: PairBatch) -> Tensor:
    """Logits in the input dtype, log_softmax in float32 (float64 for float64): the way it is usually written."""
    logits = F.linear(x, weight)
    if batch.softcap is not None:
        logits = batch.softcap * torch.tanh(logits / batch.softcap)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(1, batch.labels[:, None]).squeeze(1)


def trl_chunked(x: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    from trl.kernels import ChunkedLogProbFunction

    logps, *_ = ChunkedLogProbFunction.apply(
        x, weight, None, batch.labels, 1.0, TRL_VOCAB_CHUNK, batch.softcap, 1.0, ()
    )
    return dpo(logps, batch)


def liger_dpo(x: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    rows = (-1, batch.response)
    loss, (chosen, rejected, *_) = loss_of(weight, x.view(*rows, batch.shape.hidden), batch.labels.view(rows))
    return loss, torch.cat([chosen, rejected]).detach()


def cut_cross_entropy(x: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    return dpo(-linear_cross_entropy(x, weight, batch.labels, softcap=batch.softcap, reduction="none"), batch)


def torch_linear_cross_entropy(x: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    options = torch.nn.LinearCrossEntropyOptions()  # without options nothing is chunked
    return dpo(-F.linear_cross_entropy(x, weight, batch.labels, reduction="none", options=options).float(), batch)


@dataclass(frozen=True)
class Peer:
    """A contender and what it needs. ``package`` is its distribution's name, ``module`` what to import."""

    run: Loss
    package: str = "torch"
    module: str = "torch"
    softcap: bool = True
    needs_gpu: bool = False
    compiles_per_shape: bool = False

    def unavailable(self, device: torch.device, softcap: float | None) -> str | None:
        """Why there can be no figure here, or None."""
        if importlib.util.find_spec(self.module) is None:
            return "not installed"
        if self.run is torch_linear_cross_entropy and not hasattr(F, "linear_cross_entropy"):
            return f"not installed: torch {torch.__version__} has no F.linear_cross_entropy, 2.13 has"
        if self.needs_gpu and device.type != "cuda":
            return "needs a GPU"
        if softcap is not None and not self.softcap:
            return "has no soft-cap"
        return None


PEERS = {
    "log_softmax": Peer(log_softmax),
    "trl": Peer(trl_chunked, "trl", "trl"),
    "liger": Peer(liger_dpo, "liger-kernel", "liger_kernel", softcap=False, compiles_per_shape=True),
    "cut_cross_entropy": Peer(cut_cross_entropy, "cut-cross-entropy", "cut_cross_entropy", needs_gpu=True),
    "torch_linear_cross_entropy": Peer(torch_linear_cross_entropy, softcap=False),
}
TITLES = {
    "floor": "bare products, preallocated",
    "triton": "fused_inspo_loss, triton",
    "triton, labels on the CPU": "fused_inspo_loss, triton, labels on the CPU",
    "torch": "fused_inspo_loss, torch",
    "log_softmax": "log_softmax of the scored rows",
    "trl": "TRL ChunkedLogProbFunction",
    "liger": "Liger fused linear DPO",
    "cut_cross_entropy": "Cut Cross-Entropy",
    "torch_linear_cross_entropy": "torch F.linear_cross_entropy",
}

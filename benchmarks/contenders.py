"""Define every measured implementation of the pairwise loss and per-token log-probs, ours and others'.

A contender computes per-token log-probs of the scored rows (``logps``), a loss of the whole batch (``loss``), or both.
If it has only log-probs, its loss is DPO by torch autograd. ``Contender.unavailable`` says why a contender cannot run:
it is not installed, does not support the device or lacks a soft-cap. Tables show this reason instead of a figure.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import inspo_kernels as ik

from .batches import PairBatch
from .harness import reason

BETA = 0.1
# Tile width that TRL's own trainer passes, and the outputs that its DPO trainer requests in addition to log-probs.
TRL_VOCAB_CHUNK = 32_768
TRL_TRAINER_OUTPUTS = ("entropy", "mean_logits", "is_top1")

Logps = Callable[[Tensor, Tensor, PairBatch], Tensor]
Loss = Callable[[Tensor, Tensor, PairBatch], tuple[Tensor, Tensor]]


def dpo(logps: Tensor, batch: PairBatch, ref_logps: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return loss and detached sums (2B,) from per-token log-probs (N,), by torch autograd."""
    sums = batch.sums(logps)
    chosen, rejected = (sums - (batch.ref_logps if ref_logps is None else ref_logps)).chunk(2)
    return -F.logsigmoid(BETA * (chosen - rejected)).mean(), sums.detach()


def ours(backend: str, *, on_host: bool = False, **options: Any) -> Loss:
    """Call ``fused_inspo_loss`` as a training loop does: with every position if the batch has every position."""

    def run(hidden: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        if batch.labels is not None:
            assert not on_host
            labels, segment_ids = batch.labels, None
        else:
            labels, segment_ids = batch.on_host if on_host else (batch.targets, batch.segment_ids)
        out = ik.fused_inspo_loss(
            hidden,
            weight,
            labels,
            segment_ids=segment_ids,
            ref_logps=batch.ref_logps,
            objective=ik.DPO(beta=BETA),
            softcap=batch.softcap,
            backend=backend,
            **options,
        )
        return out.loss, out.logps

    return run


def our_logps(backend: str) -> Logps:
    return lambda x, weight, batch: ik.linear_logps(x, weight, batch.targets, softcap=batch.softcap, backend=backend)


def log_probs(x: Tensor, weight: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """Compute logits in the input dtype and log_softmax in float32 (float64 for float64), as most code does."""
    logits = F.linear(x, weight)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def plain_logps(x: Tensor, weight: Tensor, batch: PairBatch) -> Tensor:
    return log_probs(x, weight, batch.targets, batch.softcap)


def full_log_softmax(hidden: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    assert batch.labels is not None and batch.scored_mask is not None
    targets = batch.labels[:, 1:].clamp(min=0)
    targets = F.pad(targets, (0, 1))  # unused label of the last position
    return dpo(log_probs(hidden, weight, targets, batch.softcap)[batch.scored_mask], batch)


def compiled_logps(x: Tensor, weight: Tensor, batch: PairBatch) -> Tensor:
    # Beyond this number of shapes the compiler only warns and runs the function eagerly: we would time eager mode.
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        return _compiled()(x, weight, batch.targets, batch.softcap)


@cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(log_probs, dynamic=False)


def trl_chunked(outputs: tuple[str, ...]) -> Logps:
    def run(x: Tensor, weight: Tensor, batch: PairBatch) -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        logps, *_ = ChunkedLogProbFunction.apply(
            x, weight, None, batch.targets, 1.0, TRL_VOCAB_CHUNK, batch.softcap, 1.0, outputs
        )
        return logps

    return run


def liger_dpo(hidden: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    if batch.labels is not None:
        hidden, labels = hidden[:, :-1], batch.labels[:, 1:]
    else:
        hidden = hidden.view(*batch.response_mask.shape, -1)
        labels = batch.targets.view(batch.response_mask.shape)
    loss_of = LigerFusedLinearDPOLoss(beta=BETA, use_ref_model=False)
    loss, (chosen, rejected, *_) = loss_of(weight, hidden, labels)
    return loss, torch.cat([chosen, rejected]).detach()


def cut_cross_entropy(x: Tensor, weight: Tensor, batch: PairBatch) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(x, weight, batch.targets, softcap=batch.softcap, reduction="none")


def torch_linear_cross_entropy(x: Tensor, weight: Tensor, batch: PairBatch) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()  # without options nothing is chunked
    logps = -F.linear_cross_entropy(x, weight, batch.targets, reduction="none", options=options)
    return logps if logps.dtype == torch.float64 else logps.float()


def not_installed(package: str) -> str | None:
    """Return how to install a package that is missing, or None."""
    missing = importlib.util.find_spec(package.replace("-", "_")) is None
    return f"not installed: pip install {package}" if missing else None


@dataclass(frozen=True)
class Contender:
    """A contender: its code and its requirements. ``package`` is the distribution's name.

    ``variant_of`` names the contender whose code is called in another way. Variants are measured only on GPUs.
    """

    title: str
    logps: Logps | None = None
    loss: Loss | None = None
    package: str = "torch"
    backend: str | None = None
    variant_of: str | None = None
    softcap: bool = True
    needs_gpu: bool = False
    needs_every_position: bool = False
    needs_scored_positions: bool = False
    takes_padded_rows: bool = False
    compiles_per_shape: bool = False
    knows_reference: bool = True

    def loss_of(self, hidden: Tensor, weight: Tensor, batch: PairBatch) -> tuple[Tensor, Tensor]:
        if self.loss is not None:
            return self.loss(hidden, weight, batch)
        return dpo(self.logps_of(hidden, weight, batch), batch)

    def logps_of(self, hidden: Tensor, weight: Tensor, batch: PairBatch) -> Tensor:
        assert self.logps is not None
        return self.logps(batch.scored_rows(hidden), weight, batch)

    def unavailable(self, batch: PairBatch, *, per_token: bool = False) -> str | None:
        """Return why this contender cannot be measured here, or None."""
        if why := not_installed(self.package):
            return why
        if self.package == "torch" and self.logps is torch_linear_cross_entropy:
            if not hasattr(F, "linear_cross_entropy"):
                return f"not installed: torch {torch.__version__} has no F.linear_cross_entropy, 2.13 has"
        if self.needs_gpu and batch.hidden.device.type != "cuda":
            return "needs a GPU"
        if batch.softcap is not None and not self.softcap:
            return "has no soft-cap"
        if per_token and self.logps is None:
            return "gives no per-token log-probs"
        if self.needs_every_position and batch.labels is None:
            return "not measured: the batch has only scored positions"
        if self.needs_scored_positions and batch.labels is not None:
            return "not measured: the batch has every position"
        if self.takes_padded_rows and batch.labels is None and not batch.response_mask.all():
            return "not measured: needs padded rows, but the batch has only scored positions"
        return None if self.backend is None else _backend_unavailable(self.backend, batch.hidden.device)


@cache
def _backend_unavailable(backend: str, device: torch.device) -> str | None:
    """Return the package's reason why one of our backends cannot run on the device, or None."""
    one = torch.zeros(1, 1, device=device)
    try:
        ik.linear_logps(one, one, torch.zeros(1, dtype=torch.int64), backend=backend)
    except ValueError as error:
        return f"not available: {error}"
    except Exception as error:  # such as Triton without a compiler: the other contenders can still run
        return reason(error)
    return None


def _our_contender(backend: str, title: str = "", *, on_host: bool = False) -> Contender:
    return Contender(
        f"inspo_kernels ({backend}{title})",
        None if on_host else our_logps(backend),
        ours(backend, on_host=on_host),
        backend=backend,
        variant_of=backend if on_host else None,
        needs_gpu=backend == "triton",
        needs_scored_positions=on_host,
    )


CONTENDERS = {
    "triton": _our_contender("triton"),
    "triton, labels on the CPU": _our_contender("triton", ", labels on the CPU", on_host=True),
    "torch": _our_contender("torch"),
    "full_log_softmax": Contender("log_softmax at every position", loss=full_log_softmax, needs_every_position=True),
    "log_softmax": Contender("log_softmax of the scored rows", plain_logps),
    "compiled_log_softmax": Contender(
        "torch.compile of log_softmax of the scored rows", compiled_logps, compiles_per_shape=True
    ),
    "trl": Contender("TRL ChunkedLogProbFunction", trl_chunked(()), package="trl"),
    "trl_trainer": Contender(
        "TRL ChunkedLogProbFunction, with the outputs its trainer asks for",
        trl_chunked(TRL_TRAINER_OUTPUTS),
        package="trl",
    ),
    "liger": Contender(
        "Liger fused linear DPO (every position, no reference)",
        loss=liger_dpo,
        package="liger-kernel",
        softcap=False,
        takes_padded_rows=True,
        compiles_per_shape=True,
        knows_reference=False,
    ),
    "cut_cross_entropy": Contender(
        "Cut Cross-Entropy",
        cut_cross_entropy,
        package="cut-cross-entropy",
        needs_gpu=True,
    ),
    "torch_linear_cross_entropy": Contender("torch F.linear_cross_entropy", torch_linear_cross_entropy, softcap=False),
}
OURS = tuple(name for name, c in CONTENDERS.items() if c.backend is not None)
PEERS = tuple(name for name in CONTENDERS if name not in OURS)
PEER_PACKAGES = tuple(dict.fromkeys(c.package for c in CONTENDERS.values() if c.package != "torch"))

Outcome = Contender | str


def chosen(names: Iterable[str], batch: PairBatch, *, per_token: bool = False) -> dict[str, Outcome]:
    """Return, by name, the contender, or the reason why it cannot run."""
    return {name: CONTENDERS[name].unavailable(batch, per_token=per_token) or CONTENDERS[name] for name in names}

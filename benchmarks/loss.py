"""The pairwise loss, forward and backward, beside its floor and the way it is usually written.

    python -m benchmarks.loss --json benchmarks/results/loss_cpu.json

Contenders, all on the same double-conditioned batch (prompt, alternative, response; only the response is scored):

- ``floor``: the three products of the scored rows with the head, X W^T, E W and E^T X, into preallocated outputs. Any
  loss that computes dX and dW must do these.
- ``fused``: ``fused_inspo_loss`` and ``backward()``, as a training loop calls them, outputs allocated by the call.
- ``full log_softmax``: logits and log_softmax at every position, labels gathered, DPO by torch autograd.

Each contender's loss and gradients are compared with float64 in the same run. Time is the median over interleaved
rounds, ratios are taken within rounds, and peak memory is measured in a fresh process per contender.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import inspo_kernels as ik

from .harness import interleaved_times, own_peak, peak_memory_in_fresh_process, provenance, ratios, spread, write_json


@dataclass(frozen=True)
class Shape:
    """A batch of ``pairs`` pairs of one length; ``hidden`` and ``vocab`` are the head's."""

    pairs: int = 4
    prompt: int = 128
    response: int = 256
    hidden: int = 512
    vocab: int = 32_000

    @property
    def scored(self) -> int:
        return 2 * self.pairs * self.response

    @property
    def positions(self) -> int:
        return 2 * self.pairs * (self.prompt + 2 * self.response)


SHAPES = {"reference": Shape(), "quick": Shape(pairs=2, prompt=16, response=32, hidden=64, vocab=1000)}


class Batch:
    """Random hidden states and head of a shape, float32, the same for every contender."""

    def __init__(self, shape: Shape) -> None:
        g = torch.Generator().manual_seed(0)
        rows, length = 2 * shape.pairs, shape.prompt + 2 * shape.response
        self.shape = shape
        self.hidden = torch.randn(rows, length, shape.hidden, generator=g).requires_grad_()
        self.weight = torch.randn(shape.vocab, shape.hidden, generator=g).div_(shape.hidden**0.5).requires_grad_()
        self.labels = torch.full((rows, length), -100)
        self.labels[:, -shape.response :] = torch.randint(shape.vocab, (rows, shape.response), generator=g)
        self.ref_logps = torch.randn(rows, generator=g) - shape.response * torch.log(torch.tensor(shape.vocab))

    def scored_rows(self) -> Tensor:
        response = self.shape.response
        return self.hidden.detach()[:, -response - 1 : -1].flatten(0, 1).contiguous()


def floor(batch: Batch) -> Callable[[], None]:
    x, weight = batch.scored_rows(), batch.weight.detach()
    logits = torch.empty(len(x), len(weight))
    dx, dweight = torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        torch.mm(x, weight.t(), out=logits)
        torch.mm(logits, weight, out=dx)
        torch.mm(logits.t(), x, out=dweight)

    return run


def fused(batch: Batch) -> Callable[[], Tensor]:
    def run() -> Tensor:
        batch.hidden.grad = batch.weight.grad = None
        loss = ik.fused_inspo_loss(batch.hidden, batch.weight, batch.labels, ref_logps=batch.ref_logps).loss
        loss.backward()
        return loss.detach()

    return run


def full_log_softmax(batch: Batch) -> Callable[[], Tensor]:
    def run() -> Tensor:
        batch.hidden.grad = batch.weight.grad = None
        logps = F.linear(batch.hidden, batch.weight).float().log_softmax(-1)
        labels = batch.labels[:, 1:]
        scored = labels != -100
        token_logps = logps[:, :-1].gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        chosen, rejected = ((token_logps * scored).sum(-1) - batch.ref_logps).chunk(2)
        loss = -F.logsigmoid(0.1 * (chosen - rejected)).mean()
        loss.backward()
        return loss.detach()

    return run


CONTENDERS: dict[str, Callable[[Batch], Callable[[], object]]] = {
    "floor": floor,
    "fused": fused,
    "full log_softmax": full_log_softmax,
}


def errors(shape: Shape) -> dict[str, dict[str, float]]:
    """Relative errors of loss, dhidden and dweight of each contender against the reference in float64."""
    batch = Batch(shape)
    hidden, weight = (t.detach().double().requires_grad_() for t in (batch.hidden, batch.weight))
    truth = ik.reference.fused_inspo_loss(hidden, weight, batch.labels, ref_logps=batch.ref_logps)
    truth.loss.backward()
    result = {}
    for name, contender in CONTENDERS.items():
        if name == "floor":
            continue
        loss = contender(batch)()
        assert isinstance(loss, Tensor)
        got = {"loss": loss, "dhidden": batch.hidden.grad, "dweight": batch.weight.grad}
        want = {"loss": truth.loss.detach(), "dhidden": hidden.grad, "dweight": weight.grad}
        result[name] = {k: ((got[k] - want[k]).norm() / want[k].norm()).item() for k in got}
    return result


def measure_memory(shape_name: str, name: str) -> None:
    """Run in the fresh process: print this contender's peak above its inputs."""
    Batch(SHAPES["quick"])  # loads what the first call of anything loads
    fused(Batch(SHAPES["quick"]))()
    batch = Batch(SHAPES[shape_name])
    print(own_peak(lambda: CONTENDERS[name](batch)()))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.loss", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="result file to write")
    parser.add_argument("--shape", choices=SHAPES, default="reference")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds after one of warm-up (default 15)")
    parser.add_argument("--memory-of", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.memory_of:
        measure_memory(options.shape, options.memory_of)
        return

    shape = SHAPES[options.shape]
    print(f"shape {options.shape}: {asdict(shape)}, {shape.scored} scored of {shape.positions} positions", flush=True)
    error = errors(shape)
    batch = Batch(shape)
    times = interleaved_times({name: make(batch) for name, make in CONTENDERS.items()}, options.rounds)
    to_floor, to_full = ratios(times, "floor"), ratios(times, "full log_softmax")
    memory = {
        name: peak_memory_in_fresh_process("benchmarks.loss", ["--shape", options.shape, "--memory-of", name])
        for name in CONTENDERS
    }
    result = {
        **provenance(f"python -m benchmarks.loss --shape {options.shape} --rounds {options.rounds} --json FILE"),
        "dtype": "float32",
        "shape": asdict(shape),
        "scored_tokens": shape.scored,
        "positions": shape.positions,
        "contenders": {
            name: {
                "seconds": spread(times[name]),
                "times_floor": to_floor[name],
                "times_full_log_softmax": to_full[name],
                "peak_bytes": memory[name],
                "relative_error": error.get(name),
            }
            for name in CONTENDERS
        },
    }
    for name, row in result["contenders"].items():
        peak = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:6.0f} MiB"
        error_text = f"  worst error {max(row['relative_error'].values()):.1e}" if row["relative_error"] else ""
        print(
            f"{name:>18}: {row['seconds']['median']:6.3f} s, {row['times_floor']['median']:5.2f}x floor "
            f"({row['times_floor']['q1']:.2f}-{row['times_floor']['q3']:.2f}), peak {peak}{error_text}"
        )
    if options.json:
        write_json(options.json, result)
        print(f"written to {options.json}")


if __name__ == "__main__":
    main()

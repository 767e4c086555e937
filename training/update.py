"""One update of a run: the loss of the step's pairs in passes of bounded size, their gradients, one optimizer step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from .checkpoint import way_on
from .config import TrainConfig
from .data import Pair
from .engine import accumulating, clip_gradients, process_count, sum_over_processes
from .scoring import Batcher


class NonFiniteError(RuntimeError):
    """The loss or the gradient norm of a step was not finite; the step's update was not made."""


class Update:
    """Updates ``module`` (a PairModel in its engine) on some of ``pairs``, which it takes by their indices.

    ``ref_logps`` gives the reference's log-probs of such indices as the loss takes them; ``stop_requested`` says
    whether this process was asked to stop.
    """

    def __init__(
        self, module: nn.Module, optimizer: AcceleratedOptimizer, batcher: Batcher, pairs: Sequence[Pair],
        ref_logps: Callable[[Sequence[int]], Tensor | None], config: TrainConfig, total_steps: int,
        stop_requested: Callable[[], bool],
    ) -> None:  # fmt: skip
        self._module, self._optimizer, self._batcher, self._pairs = module, optimizer, batcher, pairs
        self._ref_logps, self._config, self._total_steps = ref_logps, config, total_steps
        self._stop_requested = stop_requested

    def __call__(self, step: int, batch: Sequence[int]) -> tuple[dict[str, float], bool]:
        """Metrics, means over the pairs of all processes, and whether some process was asked to stop.

        Reads from the device once. Raises NonFiniteError, before the update, with the pairs that cause it.
        """
        config, world = self._config, process_count()
        totals: Tensor | None = None
        passes = self._batcher.plan([self._pairs[i] for i in batch], conditioned=config.conditioned)
        for number, part in enumerate(passes, 1):
            with accumulating(self._module, last=number == len(passes)):
                loss, metrics = self._forward([batch[i] for i in part.pairs])
                # The mean is over all pairs of the step, in whichever process; engines average over the processes.
                (loss * (part.weight * world / len(batch))).backward()
            sums = part.weight * torch.stack(list(metrics.values()))
            totals = sums if totals is None else totals + sums
        assert totals is not None  # each process has a pass of each step
        norm = clip_gradients(self._module, config.max_grad_norm)
        # Signals reach the processes at different times: the sum says to all at the same step that one has come.
        stop = norm.new_full((1,), float(self._stop_requested()), dtype=torch.float64)
        mine = torch.cat([totals / len(batch), norm.double().view(1) / world, stop])
        row = dict(zip([*metrics, "grad_norm", "stop"], sum_over_processes(mine).tolist(), strict=True))
        stopping = row.pop("stop") > 0
        if config.reference_conditioned:  # rewards from the prompt alone would need another reference
            row = {name: value for name, value in row.items() if not name.startswith("marginal/rewards")}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise NonFiniteError(
                f"step {step}: loss {row['loss']}, gradient norm {row['grad_norm']}; stopped before the update. "
                f"Pairs that cause it: {self._culprits(batch)}. Look at these pairs, or lower learning_rate; "
                f"{way_on(config.folder)}, with other settings if --resume_changed true is given"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(config, step, self._total_steps)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return row, stopping

    def _forward(self, batch: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics summed over pairs."""
        inputs = self._batcher([self._pairs[i] for i in batch], conditioned=self._config.conditioned)
        return self._module(inputs, self._ref_logps(batch))

    def _culprits(self, batch: Sequence[int]) -> str:
        """Of a step that went wrong: the pairs that go wrong alone. Every process looks at every pair."""
        guilty = []
        for i in batch:
            self._optimizer.zero_grad()
            loss, _ = self._forward([i])
            loss.backward()
            if not sum_over_processes(loss.detach() + clip_gradients(self._module, math.inf)).isfinite():
                guilty.append(i)
        self._optimizer.zero_grad()
        named = ", ".join(self._pairs[i].origin for i in (guilty or batch)[:8])
        if len(guilty or batch) > 8:
            named += f" and {len(guilty or batch) - 8} more"
        if not guilty:
            return f"none alone, only all together ({named})"
        return named + (" (all pairs of the step)" if len(guilty) == len(batch) > 1 else "")


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up from above 0 to the peak, then the scheduler's shape towards 0; steps count from 1."""
    warmup = int(config.warmup * total_steps)
    if step <= warmup:
        return config.learning_rate * step / (warmup + 1)
    done = (step - 1 - warmup) / (total_steps - warmup)
    shapes = {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}
    return config.learning_rate * shapes[config.lr_scheduler]

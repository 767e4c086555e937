"""``PairTrainer``: transformers' ``Trainer`` for preference pairs; a step and its order are in this file.

The pairs of a step go through the model in passes of bounded size, as rows or trees, and their mean is exact. The
reference is scored before anything is trained. A step that is not finite stops the run before its update, and SIGTERM
stops all ranks after the same step.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback

from inspo_kernels.layouts.alternative_dropout import keeps_alternative
from inspo_kernels.objectives import Objective

from .architecture import rounds_by_batch
from .batching import Batcher, Conditioned, EpochBatches, used_indices
from .checkpoint import Resumed, resume_hint, settings_to_keep
from .config import TrainConfig
from .engine import process_count, sum_over_processes, whole
from .errors import NonFiniteError
from .evaluation import starting_report
from .inputs import Inputs
from .output import RunLog, Window
from .references import References
from .reporting import Progress, ReportingTrainer, RunFlow
from .scoring import Batch, PairModel, check_layout

STARTING_SAMPLE = 32  # pairs scored for the report before step 1


class PairTrainer(ReportingTrainer):
    """Trains the model of ``inputs`` as ``config`` says, from step 1 or from the checkpoint ``resumed``.

    ``stop_requested`` returns whether this rank was asked to stop. After ``train``, ``stopping`` is true if the run
    ended because of that. ``callbacks`` are transformers' callbacks.
    """

    def __init__(
        self,
        config: TrainConfig,
        inputs: Inputs,
        batcher: Batcher,
        log: RunLog,
        *,
        resumed: Resumed | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        callbacks: Iterable[TrainerCallback] = (),
    ) -> None:
        self.config, self.inputs, self.batcher, self.run_log = config, inputs, batcher, log
        self.resumed, self.stop_requested, self.stopping = resumed, stop_requested, False
        self.objective: Objective = config.make_objective()
        self.progress, self.warned = Progress(), set()
        self.step_pairs: list[int] = []  # indices of the step's pairs so far
        self.step_sums: dict[str, Tensor] = {}  # their metrics, summed over the pairs of this rank
        # Model and loss are one module, always in eval mode: dropout would make policy and reference differ.
        use_cache = inputs.model.config.use_cache
        module = PairModel(inputs.model.eval(), self.objective, config.marginal_weight)
        super().__init__(
            module,
            config,
            train_dataset=range(len(inputs.train_pairs)),
            eval_dataset=inputs.held_out or None,  # type: ignore[arg-type]
            callbacks=[RunFlow(self), *callbacks],
        )
        inputs.model.config.use_cache = use_cache  # Trainer changes it, and it would be saved with the model
        if config.sharded and config.bf16:  # accelerate's policy would also sum gradients and round the loss in bf16
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = policy
        self.remove_callback(PrinterCallback)
        self.began = time.monotonic()

    # ---- a step ----

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of indices: on each rank, the pairs of a micro-step on all ranks."""
        indices = range(len(self.inputs.train_pairs))
        batches = EpochBatches(len(indices), self.config.pairs_per_micro_step, self.config.seed)
        loader: DataLoader = DataLoader(indices, batch_sampler=batches, collate_fn=list)  # type: ignore[arg-type]
        loader.set_epoch = batches.set_epoch  # type: ignore[attr-defined]  # Trainer calls it
        return loader

    def _get_num_items_in_batch(self, batch_samples: list[list[int]], device: torch.device) -> int:
        return sum(map(len, batch_samples))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Backpropagate the part of the step's mean loss that the pairs ``inputs`` contribute, pass by pass.

        Returns this rank's part of the mean, multiplied by the number of ranks because Trainer averages over them.
        """
        indices: list[int] = inputs
        marginals = self.is_logged(self.state.global_step + 1)
        syncs, share = self.accelerator.sync_gradients, torch.zeros((), device=self.args.device)
        batcher = replace(self.batcher, max_tokens=sys.maxsize) if self.config.couples_pairs else self.batcher
        # DeepSpeed would divide by the number of micro-steps; ``scale`` accounts for them already.
        engine_options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        passes = batcher.plan([self.inputs.train_pairs[i] for i in indices], conditioned=self.conditioned(indices))
        for number, part in enumerate(passes, 1):
            last = number == len(passes)
            scale = part.weight * process_count() / num_items_in_batch  # engines average over the ranks
            with self._syncing(model, only_if=last and syncs):
                loss, report = model(self._batch([indices[i] for i in part.pairs], scale, marginals))
                self.accelerator.backward(loss, **engine_options)
            share += loss.detach()
            for name, value in report.metrics.items():
                self.step_sums[name] = self.step_sums.get(name, 0.0) + part.weight * value
        self.accelerator.gradient_state._set_sync_gradients(syncs)
        self.step_pairs += indices
        return share

    def _batch(self, indices: Sequence[int], scale: float, marginals: bool) -> Batch:
        """Return the pairs' tensors, with log-probs given the prompt alone if the loss or the log needs them."""
        needed = marginals or self.config.marginal_weight > 0 or self.objective.needs_marginals
        pairs, conditioned = [self.inputs.train_pairs[i] for i in indices], self.conditioned(indices)
        tensors = self.batcher(pairs, conditioned=conditioned, marginals=needed)
        references = self.references.of_batch(indices, conditioned)
        return Batch(tensors, references, scale, marginals=needed and self.config.sees_alternative)

    def conditioned(self, indices: Sequence[int]) -> Conditioned:
        """Return which of these training pairs are conditioned in this epoch: all, none, or one flag per pair.

        The draws follow from seed, epoch and pair. Neither resuming nor the number of ranks changes them.
        """
        config = self.config
        if not 0 < config.alternative_dropout < 1:
            return config.sees_alternative
        epoch = self.state.global_step // config.steps_per_epoch(len(self.inputs.train_pairs))
        return [keeps_alternative(config.alternative_dropout, config.seed, epoch, index) for index in indices]

    def _syncing(self, model: nn.Module, only_if: bool) -> AbstractContextManager[Any]:
        """Return a context for one forward and backward. DDP averages gradients only in the last one of a step.

        FSDP2 averages in each: whole gradients would take the memory that sharding saves.
        """
        self.accelerator.gradient_state._set_sync_gradients(only_if)
        keep = only_if or self.accelerator.distributed_type == DistributedType.FSDP
        return nullcontext() if keep else self.accelerator.no_sync(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Check the step before its update and return the gradient norm; this is the one device read of a step.

        Raises NonFiniteError, naming the pairs that cause it.
        """
        norm = whole(super()._get_grad_norm(model, grad_norm))
        indices, self.step_pairs, sums, self.step_sums = self.step_pairs, [], self.step_sums, {}
        norm_tensor = torch.as_tensor(norm, device=self.args.device, dtype=torch.float64).view(1)
        stop = torch.tensor([float(self.stop_requested())], device=self.args.device, dtype=torch.float64)
        # Signals reach the ranks at different times. The sum tells all ranks at the same step.
        mine = torch.cat([torch.stack(list(sums.values())) / len(indices), norm_tensor / process_count(), stop])
        row = dict(zip([*sums, "grad_norm", "stop"], sum_over_processes(mine).tolist(), strict=True))
        self.stopping = row.pop("stop") > 0 or self.stopping
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}; stopped "
                f"before the update. Pairs that cause it: {self._culprits(model, indices)}. Look at these pairs, or "
                f"lower learning_rate; {resume_hint(self.config.folder, changed=True)}"
            )
        self._record(row, indices)
        return norm

    def _record(self, row: dict[str, float], indices: Sequence[int]) -> None:
        """Add the metrics ``row`` of a step on the pairs ``indices`` to the window that is logged next."""
        if self.config.reference_sees_alternative:  # rewards from the prompt alone would need another reference
            row = {name: value for name, value in row.items() if not name.startswith("marginal/rewards")}
        lengths = self.inputs.train_pairs.lengths[indices]
        row["tokens/chosen"], row["tokens/rejected"] = lengths[:, 1:].mean(0).tolist()
        tokens = int(self.batcher.tokens(lengths, conditioned=self.conditioned(indices)).sum())
        self.progress.window.add(row, len(indices), tokens)
        self.progress.tokens += tokens

    def _culprits(self, model: nn.Module, indices: Sequence[int]) -> str:
        """Name the pairs of a failed step that are not finite alone. Every rank tries every pair."""
        guilty = []
        for i in indices:
            model.zero_grad()
            loss, _ = model(self._batch([i], 1.0, False))
            loss.backward()
            norm = whole(self.accelerator.clip_grad_norm_(model.parameters(), math.inf))
            if not sum_over_processes(loss.detach() + torch.as_tensor(norm)).isfinite():
                guilty.append(i)
        model.zero_grad()
        named, more = guilty or list(indices), len(guilty or indices) - 8
        text = ", ".join(self.inputs.train_pairs[i].origin for i in named[:8]) + (f" and {more} more" * (more > 0))
        if not guilty:
            return f"none alone, only all together ({text})"
        return text + (" (all pairs of the step)" if len(guilty) == len(indices) > 1 else "")

    # ---- before step 1, and resuming ----

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Wrap the module in its engine as Trainer does, then score the reference and load the checkpoint, if any."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        config, pairs, say = self.config, self.inputs.train_pairs, self.run_log.say
        coarse = config.bf16 or config.dtype == "bfloat16" or rounds_by_batch(self.inputs.model)
        self.batcher = check_layout(
            self.batcher, self.model_wrapped, pairs, bf16=coarse, required=config.layout == "tree", log=say
        )
        used = used_indices(len(pairs), max_steps * config.pairs_per_step, config.seed)
        self.references = References.compute(
            config, self.inputs, self.model_wrapped, self.batcher, used, log=say, stop_requested=self.stop_requested
        )
        if self.resumed is not None:
            self._restore(self.resumed)
        self.run_log.metrics.write(self.state.log_history, anew=True)
        self.run_log.samples.write(self.progress.samples, anew=True)
        if self.resumed is None:
            first = used[:STARTING_SAMPLE]
            references = self.references.of_batch(first, True)
            own = None if references is None else references.view(2, -1)
            starting_report(self.scores_of([pairs[i] for i in first]), own, config, say, coarse=coarse)
        self.began = time.monotonic()
        return prepared

    def _restore(self, resumed: Resumed) -> None:
        """Load the checkpoint and the progress of its run. Raises InputError if it does not fit the model."""
        path, state = resumed
        self.restore(path)
        self.progress = Progress(state["tokens"], Window(**state["window"]), state["best"], state["samples"])
        if state["inputs"]["eval_data"] != self.inputs.digests["eval_data"]:  # earlier evaluations are not comparable
            self.state.log_history[:] = [row for row in self.state.log_history if "eval_loss" not in row]
            self.progress.best = None
        if self.config.folder is None or not (self.config.folder / "best").is_dir():
            self.progress.best = None  # its model is in another folder, or lost
        self.run_log.say(f"resumed from {path} after step {state['step']}")

    def _run_epoch(self, *args: Any, **arguments: Any) -> None:
        """Run an epoch as Trainer does, unless the run is over before its first step."""
        if self.stopping or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **arguments)

    def run_state(self) -> dict[str, Any]:
        return {
            **asdict(self.progress),
            "step": self.state.global_step,
            "inputs": self.inputs.digests,
            "settings": settings_to_keep(self.config),
            "layout": "rows" if self.batcher.layout == "rows" else "tree",
        }

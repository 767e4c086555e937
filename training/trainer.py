"""``PairTrainer``: transformers' ``Trainer`` for preference pairs, with what it lacks for them.

A step's pairs go through the model in passes of bounded size, laid out as rows or trees, and the mean over them is
exact. The reference is scored before anything is trained. Checkpoints are whole or not there. What is not finite stops
the run before the update, and SIGTERM stops all processes after the same step.
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
from transformers import PrinterCallback, TrainerCallback

from inspo_kernels.objectives import Objective

from .batching import EpochLoader, used_indices
from .config import TrainConfig
from .dropout import conditioned_pairs
from .engine import process_count, sum_over_processes
from .errors import NonFiniteError, SaveError
from .evaluation import evaluate, is_better, sample_answers, starting_report
from .flow import Progress, RunFlow
from .inputs import Inputs
from .layouts import check_layout
from .memory import in_use
from .model import rounds_by_batch
from .output import RunLog, Window, evaluation_line, training_line
from .references import References
from .resumable import ResumableTrainer
from .resume import Resumed, resume_hint, settings_to_keep
from .save_model import write_model
from .scoring import Batch, Batcher, Conditioned, PairModel, StopRequested, lengths_of, score
from .watch import Watch, evaluation_warnings, training_warnings

STARTING_SAMPLE = 32  # pairs that the report before step 1 looks at


class PairTrainer(ResumableTrainer):
    """Trains the model of ``inputs`` as ``config`` says; ``train`` runs from ``resumed`` on, or from the beginning.

    ``stop_requested`` says whether this process was asked to stop; after ``train``, ``stopping`` says whether the run
    ended for that. ``callbacks`` are transformers' own kind.
    """

    objective: Objective

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
        self.objective, self.progress, self.watch = config.make_objective(), Progress(), Watch(log.say)
        self.compared_from = 0  # the step from which evaluations are of these held-out pairs
        self.step_pairs: list[int] = []  # indices of the step's pairs so far
        self.step_sums: dict[str, Tensor] = {}  # their metrics, summed over the pairs of this process
        # Model and loss are one module, in eval mode throughout: dropout would make policy and reference differ.
        use_cache = inputs.model.config.use_cache
        module = PairModel(inputs.model.eval(), self.objective, config.marginal_weight)
        super().__init__(
            module,
            config,
            train_dataset=range(len(inputs.train_pairs)),
            eval_dataset=inputs.held_out or None,  # type: ignore[arg-type]
            callbacks=[RunFlow(self), *callbacks],
        )
        inputs.model.config.use_cache = use_cache  # Trainer's setting would be saved with the model
        self.remove_callback(PrinterCallback)
        self.began = time.monotonic()

    # ---- a step ----

    def get_train_dataloader(self) -> EpochLoader:  # type: ignore[override]
        """Yield the indices of a micro-step's pairs, of all processes, in each of them."""
        return EpochLoader(len(self.inputs.train_pairs), self.config.pairs_per_micro_step, self.config.seed)

    def _get_num_items_in_batch(self, batch_samples: list[list[int]], device: torch.device) -> int:
        return sum(map(len, batch_samples))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """Differentiate the mean loss over the step's pairs in those of ``inputs``, pass by pass.

        Returns this process's part of the mean, times the number of processes, which Trainer divides by.
        """
        indices: list[int] = inputs
        marginals = self.is_logged(self.state.global_step + 1)
        syncs, share = self.accelerator.sync_gradients, torch.zeros((), device=self.args.device)
        batcher = replace(self.batcher, max_tokens=sys.maxsize) if self.config.couples_pairs else self.batcher
        # DeepSpeed would divide by the number of micro-steps, which ``scale`` has done.
        engine_options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        passes = batcher.plan([self.inputs.train_pairs[i] for i in indices], conditioned=self.conditioned(indices))
        for number, part in enumerate(passes, 1):
            last = number == len(passes)
            # Engines average over the processes.
            scale = part.weight * process_count() / num_items_in_batch
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
        """The pairs' tensors; log-probs given the prompt alone only where loss or log need them."""
        needed = marginals or self.config.marginal_weight > 0 or self.objective.needs_marginals
        pairs, conditioned = [self.inputs.train_pairs[i] for i in indices], self.conditioned(indices)
        tensors = self.batcher(pairs, conditioned=conditioned, marginals=needed)
        references = self.references.of_batch(indices, conditioned)
        return Batch(tensors, references, scale, marginals=needed and self.config.sees_alternative)

    def conditioned(self, indices: Sequence[int]) -> Conditioned:
        """Return which of these training pairs are conditioned in the present epoch."""
        epoch = self.state.global_step // self.config.steps_per_epoch(len(self.inputs.train_pairs))
        return conditioned_pairs(self.config, epoch, indices)

    def _syncing(self, model: nn.Module, only_if: bool) -> AbstractContextManager[Any]:
        """Around a forward and backward: DDP averages gradients in the last of a step alone.

        FSDP2 does so in each, because gradients of the whole model would take the memory that sharding saves.
        """
        self.accelerator.gradient_state._set_sync_gradients(only_if)
        keep = only_if or self.accelerator.distributed_type == DistributedType.FSDP
        return nullcontext() if keep else self.accelerator.no_sync(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the gradient norm after checking the step, before its update; this reads the device once a step.

        Raises NonFiniteError, with the pairs that cause it.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        indices, self.step_pairs, sums, self.step_sums = self.step_pairs, [], self.step_sums, {}
        norm_tensor = torch.as_tensor(norm, device=self.args.device, dtype=torch.float64).view(1)
        stop = torch.tensor([float(self.stop_requested())], device=self.args.device, dtype=torch.float64)
        # Signals reach the processes at different times: the sum tells all at the same step that one has come.
        mine = torch.cat([torch.stack(list(sums.values())) / len(indices), norm_tensor / process_count(), stop])
        row = dict(zip([*sums, "grad_norm", "stop"], sum_over_processes(mine).tolist(), strict=True))
        self.stopping = row.pop("stop") > 0 or self.stopping
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: loss {row['loss']}, gradient norm {row['grad_norm']}; stopped "
                f"before the update. Pairs that cause it: {self._culprits(model, indices)}. Look at these pairs, or "
                f"lower learning_rate; {resume_hint(self.config.folder)}, with other settings if --resume_changed true "
                "is given"
            )
        if self.config.reference_sees_alternative:  # rewards from the prompt alone would need another reference
            row = {name: value for name, value in row.items() if not name.startswith("marginal/rewards")}
        elif (references := self.references.of_batch(indices, False)) is not None:
            row["ref_logps/chosen"], row["ref_logps/rejected"] = references.view(2, -1).mean(1).tolist()
        lengths = lengths_of([self.inputs.train_pairs[i] for i in indices])
        row["tokens/chosen"], row["tokens/rejected"] = lengths[:, 1:].mean(0).tolist()
        tokens = int(self.batcher.tokens(lengths, conditioned=self.conditioned(indices)).sum())
        self.progress.window.add(row, len(indices), tokens)
        self.progress.tokens += tokens
        return norm

    def _culprits(self, model: nn.Module, indices: Sequence[int]) -> str:
        """Name, of a step that went wrong, the pairs that go wrong alone. Every process looks at every pair."""
        guilty = []
        for i in indices:
            model.zero_grad()
            loss, _ = model(self._batch([i], 1.0, False))
            loss.backward()
            norm = self.accelerator.clip_grad_norm_(model.parameters(), math.inf)
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
        """Hand the module to its engine, as Trainer does. Then score the reference, and load the checkpoint, if any."""
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        config, pairs, say = self.config, self.inputs.train_pairs, self.run_log.say
        small = [pairs[0], pairs[len(pairs) - 1]]
        coarse = config.bf16 or config.dtype == "bfloat16" or rounds_by_batch(self.inputs.model)
        self.batcher = check_layout(
            self.batcher, self.model_wrapped, small, bf16=coarse, required=config.layout == "tree", log=say
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
            starting_report(self._scores([pairs[i] for i in first]), own, config, say, coarse=coarse)
        self.began = time.monotonic()
        return prepared

    def _restore(self, resumed: Resumed) -> None:
        """Put the checkpoint into module, optimizer and schedule. Raises InputError where it does not fit the model."""
        path, state = resumed
        self.restore(path)
        self.progress = Progress.from_state(state)
        if state["inputs"]["eval_data"] != self.inputs.digests["eval_data"]:  # then earlier evaluations are of others
            step = self.compared_from = state["step"]
            rows = self.state.log_history
            rows[:] = [row for row in rows if not (row["step"] == step and "eval_loss" in row)]
            self.progress.best = None
        if self.config.folder is None or not (self.config.folder / "best").is_dir():
            self.progress.best = None  # its model stayed in another folder, or is lost
        if state["processes"] != process_count():
            self.run_log.say(f"note: {path} was written by {state['processes']} processes; random states may differ")
        self.run_log.say(f"resumed from {path} after step {state['step']}")

    def _run_epoch(self, *args: Any, **arguments: Any) -> None:
        """Trainer's, unless the run is over before its first step."""
        if self.stopping or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **arguments)

    # ---- evaluation and logs ----

    def is_logged(self, step: int) -> bool:
        """Whether a line is logged after ``step``."""
        if step == self.state.max_steps or (step == 1 and self.args.logging_first_step):
            return True
        every = {"steps": self.state.logging_steps, "epoch": self.config.steps_per_epoch(len(self.inputs.train_pairs))}
        return self.args.logging_strategy in every and step % every[self.args.logging_strategy] == 0

    def _scores(self, pairs: Sequence, stop_requested: Callable[[], bool] | None = None) -> Any:
        return score(self.model_wrapped, pairs, self.batcher, conditioned=True, stop_requested=stop_requested)

    def evaluations(self) -> list[dict[str, Any]]:
        """Rows of evaluations of the present held-out pairs, the first one before step 1."""
        return [row for row in self.state.log_history if "eval_loss" in row and row["step"] >= self.compared_from]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out pairs and log what comes out; keep the model if it is the best so far.

        Where some process is asked to stop meanwhile, nothing of it is kept, and the run stops.
        """
        config, step, held_out = self.config, self.state.global_step, self.inputs.held_out
        self.control.should_evaluate = False
        try:
            scores = self._scores(held_out, self.stop_requested)
        except StopRequested:
            self.stopping = self.control.should_training_stop = True
            self.control.should_save = step > 0
            return {"eval_loss": math.nan}
        metrics = evaluate(
            scores,
            self.references.held_out,
            held_out,
            self.objective,
            conditioned=config.sees_alternative,
            marginal_weight=config.marginal_weight,
            marginal_ref_logps=self.references.held_out_marginal,
        )
        metrics |= self._sample()
        self.log(metrics)
        row = self.state.log_history[-1]
        self.watch(evaluation_warnings(row, self.evaluations()[0]), last=step == self.state.max_steps)
        if config.folder and config.keep_best and is_better(row, self.progress.best):
            try:
                self.write("best")
                self.progress.best = row
            except SaveError as error:
                self.run_log.say(f"WARNING: {error}; the run goes on")
        self.run_log.draw(self.state.log_history, config.title)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _sample(self) -> dict[str, float]:
        """Answer some held-out prompts, for samples.jsonl; their mean length, and the share that ended."""
        prompts = list(dict.fromkeys(tuple(pair.prompt) for pair in self.inputs.held_out))[: self.config.sample_prompts]
        tokenizer = self.inputs.tokenizer
        if tokenizer is None or not prompts:
            return {}
        ends = {tokenizer.eos_token_id, *(pair.chosen[-1] for pair in self.inputs.held_out)}
        with self.accelerator.autocast():
            samples = sample_answers(
                self.model,
                prompts,
                tokenizer,
                ends=ends,
                max_new_tokens=self.config.sample_tokens,
                pad_token_id=self.inputs.pad_token_id,
                device=self.args.device,
            )
        self.progress.samples += [{"step": self.state.global_step, **sample} for sample in samples]
        self.run_log.samples.write(self.progress.samples)
        return {f"eval_samples/{k}": sum(sample[k] for sample in samples) / len(samples) for k in ("tokens", "ended")}

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log a row of metrics: in training the means of the window, in place of Trainer's; else ``logs``."""
        if "train_runtime" in logs:  # Trainer's last row holds nothing that the others lack
            return
        step, total, training = self.state.global_step, self.state.max_steps, "eval_loss" not in logs
        if training:
            window, self.progress.window = self.progress.window, Window()
            logs = {
                **window.means(),
                "num_tokens": self.progress.tokens,
                "learning_rate": logs["learning_rate"],
                "tokens_per_second": window.tokens / window.seconds,
                **in_use(self.args.device),
            }
        epoch = step / self.config.steps_per_epoch(len(self.inputs.train_pairs))
        row = {"step": step, "epoch": epoch, "time": time.strftime("%Y-%m-%dT%H:%M:%S"), **logs}
        self.state.log_history.append(row)
        self.run_log.metrics.write(self.state.log_history)
        if training:
            elapsed, made = time.monotonic() - self.began, step - self._initial_global_step
            self.run_log.say(training_line(row, total, elapsed, elapsed / made * (total - step)))
            self.watch(training_warnings(row), last=step == total)
        else:
            self.run_log.say(evaluation_line(row))
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        try:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, numbers)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            self._drop_trackers(error)

    def _drop_trackers(self, error: Exception) -> None:
        """Go on without trackers after one has failed: no network, no space, a run that was deleted."""
        problem = f"failed ({type(error).__name__}: {error}); the run goes on without it"
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__module__.startswith("transformers.integrations"):
                self.remove_callback(callback)
                self.run_log.say(f"WARNING: {type(callback).__name__} {problem}")

    # ---- saving ----

    def run_state(self) -> dict[str, Any]:
        return {
            **asdict(self.progress),
            "step": self.state.global_step,
            "processes": process_count(),
            "inputs": self.inputs.digests,
            "settings": settings_to_keep(self.config),
            "layout": "rows" if self.batcher.layout == "rows" else "tree",
        }

    def write(self, name: str) -> None:
        """Write the model to ``output_dir/name`` with its card. Raises SaveError on all processes."""
        assert self.config.folder is not None
        write_model(
            self.config.folder / name,
            self.accelerator.get_state_dict(self.model_wrapped),
            self.inputs,
            self.config,
            step=self.state.global_step,
            steps=self.state.max_steps,
            evaluations=self.evaluations(),
            log=self.run_log.say,
        )

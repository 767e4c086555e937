"""``ReportingTrainer``: evaluations, logs, sample answers and the best model of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from torch import Tensor
from transformers import TrainerCallback

from .batching import Batcher
from .checkpoint import whole_folder
from .data import trained_ends
from .engine import process_index, raise_on_all_ranks
from .errors import SaveError, Stopped
from .evaluation import evaluate, is_better, sample_answers, warnings
from .inputs import Inputs
from .memory import in_use
from .output import Window, evaluation_line, training_line
from .pairs import Pair
from .references import References
from .resumable import ResumableTrainer
from .save_model import model_card, save_final
from .scoring import PairModel, Scores, score


@dataclass
class Progress:
    """State of a run that a checkpoint keeps beside model, optimizer and random states.

    ``tokens``: read by the model so far. ``window``: since the last logged line. ``best``: the row of the evaluation
    whose model is in ``best/``. ``samples``: rows of ``samples.jsonl``.
    """

    tokens: int = 0
    window: Window = field(default_factory=Window)
    best: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)


class ReportingTrainer(ResumableTrainer):
    """Evaluates pairs, logs rows and keeps the best model, in place of Trainer's own evaluation and log."""

    inputs: Inputs
    batcher: Batcher
    references: References
    progress: Progress
    stop_requested: Callable[[], bool]
    stopping: bool  # whether the run ends because of SIGTERM
    warned: set[str]  # kinds of warnings of the last evaluation
    began: float

    def is_logged(self, step: int) -> bool:
        if step == self.state.max_steps or (step == 1 and self.args.logging_first_step):
            return True
        every = {"steps": self.state.logging_steps, "epoch": self.config.steps_per_epoch(len(self.inputs.train_pairs))}
        return self.args.logging_strategy in every and step % every[self.args.logging_strategy] == 0

    def scores_of(self, pairs: Sequence[Pair], stop_requested: Callable[[], bool] | None = None) -> Scores:
        """Score ``pairs`` under the present weights, conditioned and from the prompt alone."""
        return score(self.model_wrapped, pairs, self.batcher, conditioned=True, stop_requested=stop_requested)

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the rows of all evaluations, the evaluation before step 1 first."""
        return [row for row in self.state.log_history if "eval_loss" in row]

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the held-out pairs, log the metrics, and keep the model if it is the best so far.

        If any rank is asked to stop meanwhile, the evaluation is dropped and the run stops.
        """
        config, step, held_out = self.config, self.state.global_step, self.inputs.held_out
        self.control.should_evaluate = False
        try:
            scores = self.scores_of(held_out, self.stop_requested)
        except Stopped:
            self.stopping = self.control.should_training_stop = True
            self.control.should_save = step > 0
            return {}
        metrics = evaluate(scores, self.references.held_out, held_out, config) | self._sample()
        self.log(metrics)
        row = self.state.log_history[-1]
        found = warnings(row, self.evaluations()[0])
        for kind, text in found.items():  # each once, again after it has cleared, and at the end
            if kind not in self.warned or step == self.state.max_steps:
                self.run_log.say(f"WARNING: {text}")
        self.warned = set(found)
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
        """Answer some held-out prompts for samples.jsonl; return their mean length and the share that ended."""
        prompts = list(dict.fromkeys(tuple(pair.prompt) for pair in self.inputs.held_out))[: self.config.sample_prompts]
        tokenizer = self.inputs.tokenizer
        if tokenizer is None or not prompts:
            return {}
        ends = {tokenizer.eos_token_id, *(pair.chosen[-1] for pair in self.inputs.held_out)}
        with self.accelerator.autocast():
            samples = sample_answers(
                cast(PairModel, self.model), prompts, tokenizer, ends=ends, max_new_tokens=self.config.sample_tokens
            )
        self.progress.samples += [{"step": self.state.global_step, **sample} for sample in samples]
        self.run_log.samples.write(self.progress.samples)
        return {f"eval_samples/{k}": sum(sample[k] for sample in samples) / len(samples) for k in ("tokens", "ended")}

    def log(self, logs: dict[str, Any], start_time: float | None = None) -> None:
        """Log a row: an evaluation's metrics, or in training the means since the last row in place of Trainer's."""
        if "train_runtime" in logs:  # Trainer's last row adds nothing to the others
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
        else:
            self.run_log.say(evaluation_line(row))
        numbers = {name: value for name, value in row.items() if isinstance(value, int | float) and name != "step"}
        try:
            self.control = self.callback_handler.on_log(self.args, self.state, self.control, numbers)
        except (OSError, RuntimeError, ValueError, TypeError) as error:
            self._drop_trackers(error)

    def _drop_trackers(self, error: Exception) -> None:
        """Continue without trackers after one has failed: no network, no space, a run deleted on the server."""
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__module__.startswith("transformers.integrations"):
                self.remove_callback(callback)
                problem = f"failed ({type(error).__name__}: {error}); the run goes on without it"
                self.run_log.say(f"WARNING: {type(callback).__name__} {problem}")

    def write(self, name: str) -> None:
        """Write the model with its card to ``output_dir/name``. Raises SaveError on all ranks."""
        assert self.config.folder is not None
        folder, weights = self.config.folder / name, self.accelerator.get_state_dict(self.model_wrapped)
        inputs, title = self.inputs, f"{folder.parent.name}/{name}"
        with whole_folder(folder) as to, raise_on_all_ranks():
            if process_index() == 0:
                tensors = {n.removeprefix("model."): t.cpu() for n, t in weights.items() if isinstance(t, Tensor)}
                ends = trained_ends(inputs.train_pairs, inputs.tokenizer)
                save_final(to, inputs.model, inputs.tokenizer, tensors, self.config, ends, self.run_log.say)
                steps = self.state.global_step, self.state.max_steps
                model_card(self.config, inputs, title, *steps, self.evaluations()).save(to / "README.md")


class RunFlow(TrainerCallback):
    """Decides when a run logs, evaluates, saves and stops, where that differs from Trainer."""

    def __init__(self, trainer: ReportingTrainer) -> None:
        self.trainer, self.began = trainer, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate before step 1, and repeat an evaluation that was interrupted."""
        trainer = self.trainer
        done = any(row["step"] == state.global_step for row in trainer.evaluations())
        every = state.eval_steps if args.eval_strategy == "steps" else 0
        due = state.global_step in (0, state.max_steps) or (every and state.global_step % every == 0)
        if trainer.inputs.held_out and due and not done:
            trainer.evaluate()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.progress.window.seconds += time.perf_counter() - self.began
        control.should_log = self.trainer.is_logged(state.global_step)
        if state.global_step >= state.max_steps:
            control.should_evaluate = bool(self.trainer.inputs.held_out)
        if self.trainer.stopping:
            control.should_training_stop = control.should_save = True
            control.should_evaluate = False

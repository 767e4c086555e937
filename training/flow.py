"""How far a run is, and when it logs, evaluates, saves and stops."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .output import Window

if TYPE_CHECKING:
    from .trainer import PairTrainer


@dataclass
class Progress:
    """What a checkpoint holds of a run besides model, optimizer and random states.

    ``tokens``: read by the model so far. ``window``: since the last logged line. ``best``: the row of the evaluation
    whose model is in ``best/``. ``samples``: rows of ``samples.jsonl``.
    """

    tokens: int = 0
    window: Window = field(default_factory=Window)
    best: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        return cls(state["tokens"], Window(**state["window"]), state["best"], state["samples"])


class RunFlow(TrainerCallback):
    """When a run logs, evaluates, saves and stops, where that differs from Trainer's."""

    def __init__(self, trainer: PairTrainer) -> None:
        self.trainer, self.began = trainer, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate before step 1, and where an evaluation was broken off."""
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

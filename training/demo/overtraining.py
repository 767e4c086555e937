"""Over-long runs: plain DPO and InSPO pass many times over few pairs, and answer after several steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..train import train
from .answers import compare, sample_answers
from .settings import FEW_PAIRS, PAIRS, Settings, long_config
from .world import World

LONG = ("dpo", "inspo")


class GreedyAccuracy(TrainerCallback):
    """Answers the unseen prompts after each of ``long_steps``; ``found`` holds step, accuracy and its 95% interval."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.world, self.tokenizer, self.settings = world, tokenizer, settings
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step not in self.settings.long_steps:
            return
        model, unseen = kwargs["model"].model, self.world.unseen
        answers = sample_answers(model, self.tokenizer, unseen, count=1, greedy=True, seed=self.settings.seed)
        judged = compare(self.world, answers, None)
        entry = {name: judged[name] for name in ("accuracy", "accuracy_ci")}
        self.found.append({"step": state.global_step, **entry})


def over_train(
    world: World, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Train both arms on the first pairs of ``folder``; return what ``GreedyAccuracy`` finds in each run."""
    lines = (folder / PAIRS).read_text().splitlines(keepends=True)[: settings.long_pairs]
    (folder / FEW_PAIRS).write_text("".join(lines))
    found = {}
    for name in LONG:
        callback = GreedyAccuracy(world, tokenizer, settings)
        train(long_config(name, settings, folder), quiet=True, callbacks=[callback])
        found[name] = callback.found
    return found

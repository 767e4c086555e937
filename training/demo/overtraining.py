"""Over-long runs: plain DPO and InSPO pass many times over few pairs, and answer at several steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from ..train import train
from .answers import compare, sample_answers
from .settings import FEW_PAIRS, PAIRS, Settings, long_config
from .world import World

LONG = ("dpo", "inspo")


def over_train(
    world: World, tokenizer: PreTrainedTokenizerBase, settings: Settings, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Train both arms on the first pairs of ``folder``; return greedy accuracy on unseen prompts after some steps.

    Each entry has ``step``, ``accuracy`` and ``accuracy_ci``.
    """
    lines = (folder / PAIRS).read_text().splitlines(keepends=True)[: settings.long_pairs]
    (folder / FEW_PAIRS).write_text("".join(lines))
    found: dict[str, list[dict[str, Any]]] = {}
    for name in LONG:
        config = long_config(name, settings, folder)
        train(config, quiet=True)
        found[name] = []
        for step in settings.long_steps:
            model = AutoModelForCausalLM.from_pretrained(Path(config.output_dir) / f"checkpoint-{step}").eval()
            answers = sample_answers(model, tokenizer, world.unseen, count=1, greedy=True, seed=settings.seed)
            judged = compare(world, answers, None)
            found[name].append({"step": step, "accuracy": judged["accuracy"], "accuracy_ci": judged["accuracy_ci"]})
    return found

"""Set the sizes and rates of the demo, and configure each of its training runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import TrainConfig

PAIRS, UNSEEN_PAIRS, FEW_PAIRS = "pairs.jsonl", "unseen_pairs.jsonl", "few_pairs.jsonl"

# SFT is ORPO without its odds ratio: the mean log-prob of the chosen answer, given the prompt alone.
FINE_TUNES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "orpo", "lam": 0.0, "conditioned": False},
    "dpo": {"objective": "dpo", "conditioned": False},
    "inspo": {"objective": "dpo", "conditioned": True},
}


@dataclass(frozen=True)
class Settings:
    """Sizes and rates of a demo.

    ``beta``, ``learning_rate`` and ``steps`` were chosen once, by the accuracy of DPO and InSPO together, and serve all
    fine-tunes. Tried were beta 0.1, 0.3, 0.5, 1 and 2, learning rates 5e-5 to 5e-4, and 60 and 150 steps (not every
    combination, each on one or two of the seeds 100-103). Small beta and many steps lose accuracy again with either:
    mass leaves the rejected answers for others that are wrong, too.
    """

    seed: int = 0
    letters: int = 12
    lengths: tuple[int, ...] = (3, 4)
    unseen_per_kind: int = 100
    hidden_size: int = 96
    layers: int = 2
    fit_steps: int = 450
    fit_rows: int = 128
    fit_learning_rate: float = 3e-3
    draft_share: float = 0.5
    pairs: int = 960
    samples: int = 8
    steps: int = 60
    step_pairs: int = 64
    learning_rate: float = 1e-4
    beta: float = 1.0
    # Runs that are too long for their few pairs: 40 passes, with the rate and beta of docs/study_protocol.md.
    long_pairs: int = 64
    long_step_pairs: int = 16
    long_steps: tuple[int, ...] = (20, 40, 80, 160)
    long_learning_rate: float = 3e-4
    long_beta: float = 0.1
    # Fixed, because the number of threads changes the order of sums and so the last bits of every result. One, because
    # two gain little on matrices this small, and lose much where another process wants a core.
    threads: int = 1

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """The whole path in seconds, with a model too small to learn much."""
        return cls(
            seed=seed,
            letters=4,
            lengths=(3,),
            unseen_per_kind=12,
            hidden_size=64,
            layers=1,
            fit_steps=150,
            fit_rows=64,
            pairs=48,
            samples=32,
            steps=6,
            step_pairs=8,
            long_pairs=8,
            long_step_pairs=4,
            long_steps=(2, 4),
        )


def fine_tune_config(name: str, settings: Settings, folder: Path) -> TrainConfig:
    """Return one arm of ``FINE_TUNES``; all have the same base, pairs, order of the pairs, steps and learning rate."""
    return _config(
        FINE_TUNES[name] | {"beta": settings.beta if name != "sft" else None},
        folder,
        train_data=str(folder / PAIRS),
        eval_data=str(folder / UNSEEN_PAIRS),
        output_dir=str(folder / name),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.step_pairs,
        seed=settings.seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="linear",
        logging_steps=max(1, settings.steps // 10),
        eval_steps=max(1, settings.steps // 10),
    )


def long_config(name: str, settings: Settings, folder: Path) -> TrainConfig:
    """Return the over-long run of one arm of ``FINE_TUNES``: few pairs, many passes, constant learning rate.

    The rate is constant so that the model after some steps is what a shorter run would have ended with.
    """
    return _config(
        FINE_TUNES[name] | {"beta": settings.long_beta},
        folder,
        train_data=str(folder / FEW_PAIRS),
        output_dir=str(folder / f"{name}_long"),
        max_steps=settings.long_steps[-1],
        per_device_train_batch_size=settings.long_step_pairs,
        seed=settings.seed,
        learning_rate=settings.long_learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=8,
        logging_steps=settings.long_steps[-1],
    )


def _config(objective: dict[str, Any], folder: Path, **options: Any) -> TrainConfig:
    base: dict[str, Any] = {"model": str(folder / "base" / "final"), "reference_cache": str(folder), "max_length": 64}
    return TrainConfig(**base, **objective, **options, save_strategy="no", keep_best=False, sample_prompts=0)

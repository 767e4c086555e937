"""The output folder of a run, and what it tells: lines on the screen, metrics.jsonl and curves.png."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from .config import InputError, TrainConfig

# Options that a resumed run may change: they decide what is shown and kept, not what is computed.
MAY_CHANGE = {"output_dir", "resume", "log_every", "eval_every", "save_every", "eval_data", "reference_cache"}


def prepare_folder(folder: Path | None, config: TrainConfig) -> Path | None:
    """Refuses a folder that another run would be lost in; returns the checkpoint to resume from.

    A checkpoint goes on only with the settings it was made with, those of ``MAY_CHANGE`` apart.
    """
    if folder is None:
        return None
    if (folder / "final").exists():
        raise InputError(f"output_dir {folder} holds a finished run; choose another one, or move or delete that folder")
    checkpoints = sorted(folder.glob("checkpoint-*[0-9]"), key=lambda path: int(path.name.split("-")[1]))
    if config.resume == "auto":
        resume_from = checkpoints[-1] if checkpoints else None
    elif config.resume:
        resume_from = Path(config.resume)
        if not (resume_from / "state.json").is_file():
            raise InputError(f"--resume {config.resume}: no checkpoint there; give a checkpoint-* folder or 'auto'")
    elif checkpoints:
        raise InputError(
            f"output_dir {folder} holds an unfinished run with {checkpoints[-1].name}; continue it with --resume auto, "
            "or choose another output_dir"
        )
    else:
        resume_from = None
    if resume_from is not None:
        then, now = json.loads((resume_from / "state.json").read_text())["config"], asdict(config)
        changed = [name for name in now if name not in MAY_CHANGE and now[name] != then.get(name)]
        if changed:
            differences = "; ".join(f"{name} was {then.get(name)!r}, is {now[name]!r}" for name in changed)
            raise InputError(
                f"{resume_from} belongs to a run with other settings ({differences}); resume with the old ones, or "
                "start a new run in another output_dir"
            )
    return resume_from


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """One run at a time in ``folder``. The lock ends with the process, however that ends."""
    if folder is None:
        yield
        return
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; choose a folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"output_dir {folder}: another run is writing there; choose another one") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write to, renamed to ``folder`` at the end: a folder of that name is complete."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    if folder.exists():  # a checkpoint of this step, from before the run was taken back to an earlier one
        shutil.rmtree(folder)
    os.replace(partial, folder)


class RunLog:
    """Rows of metrics, in memory and (with a folder) in ``metrics.jsonl``; lines on the screen unless ``quiet``."""

    def __init__(self, folder: Path | None, quiet: bool) -> None:
        self.file = folder / "metrics.jsonl" if folder else None
        self.quiet = quiet
        self.rows: list[dict[str, Any]] = []

    def say(self, text: str) -> None:
        if not self.quiet:
            tqdm.write(text)

    def start(self, step: int) -> None:
        """Begins the file anew, or keeps its rows up to ``step``, from where a resumed run goes on."""
        if self.file is None:
            return
        lines = self.file.read_text().splitlines() if step and self.file.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]  # a killed run may leave half a line
        self.rows = [row for row in rows if row["step"] <= step]
        self.file.write_text("".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.file is not None:
            with self.file.open("a") as file:
                file.write(json.dumps(row) + "\n")


@dataclass
class Window:
    """Sums of the steps since the last logged line, so that a line shows means over them. Survives a checkpoint."""

    sums: dict[str, float] | None = None
    pairs: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def add(self, row: dict[str, float], count: int, tokens: int, seconds: float) -> None:
        old = self.sums or {}
        self.sums = {name: old.get(name, 0.0) + value * count for name, value in row.items()}
        self.pairs += count
        self.tokens += tokens
        self.seconds += seconds

    def means(self) -> dict[str, float]:
        return {name: total / self.pairs for name, total in (self.sums or {}).items()}


def training_line(row: dict[str, Any], total_steps: int) -> str:
    """One logged step for a reader."""
    alone = ""
    if "marginal/rewards/margins" in row:
        alone = (
            f" | prompt alone: margin {row['marginal/rewards/margins']:+.3f}"
            f" acc {row['marginal/rewards/accuracies']:.2f}"
        )
    return (
        f"step {row['step']:>5}/{total_steps} | loss {row['loss']:.4f} | margin {row['rewards/margins']:+.3f} "
        f"acc {row['rewards/accuracies']:.2f}{alone} | grad {row['grad_norm']:.2f} | lr {row['learning_rate']:.1e} "
        f"| {row['tokens_per_second']:.0f} tok/s"
    )


def marginal_warning(row: dict[str, Any]) -> str | None:
    """Where training goes one way and what inference uses the other way."""
    conditioned, alone = row["rewards/margins"], row.get("marginal/rewards/margins", 0.0)
    if not alone < 0.0 < conditioned:
        return None
    return (
        f"WARNING: given the other response the margin is {conditioned:+.3f}, but from the prompt alone, which\n"
        f"inference uses, it is {alone:+.3f}: there the model prefers the rejected responses. Set marginal_weight\n"
        "(0.1 to 1), lower learning_rate, or fit the base to prompt + draft + answer sequences first."
    )


def evaluation_line(row: dict[str, Any]) -> str:
    """One evaluation for a reader."""
    parts = [f"eval at step {row['step']}: loss {row['eval_loss']:.4f}"]
    for layout, name in (("conditioned", "conditioned"), ("marginal", "prompt alone")):
        accuracy, margin = (row[f"eval_{layout}/rewards/{what}"] for what in ("accuracies", "margins"))
        low, high = row[f"eval_{layout}/rewards/accuracies_ci"]
        around = row[f"eval_{layout}/rewards/margins_ci"]
        parts.append(
            f"{name}: acc {accuracy:.3f} [{low:.3f}, {high:.3f}] margin {margin:+.3f}"
            + (f" [{around[0]:+.3f}, {around[1]:+.3f}]" if around else "")
        )
    return " | ".join(parts)


def plot_curves(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Loss, reward accuracy, reward margin and chosen log-prob over steps; conditioned and prompt-alone together."""
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display and no global state

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    panels = (
        ("Loss", "loss", "loss", "eval_loss"),
        ("Reward accuracy", "share of pairs", "rewards/accuracies", "rewards/accuracies"),
        ("Reward margin (chosen - rejected)", "reward", "rewards/margins", "rewards/margins"),
        ("Log-prob of the chosen response", "nats per response", "logps/chosen", "logps/chosen"),
    )
    plain = not any(key.startswith("marginal/") for row in rows for key in row)
    for axes, (heading, unit, train_key, eval_key) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        if train_key == "loss":
            series = [("training", "tab:gray", "loss", "", "-"), ("held-out", "black", "", "eval_loss", "o-")]
        else:
            own = "training, prompt alone" if plain else "training, given the other response"
            own_color = "tab:orange" if plain else "tab:blue"
            series = [
                (own, own_color, train_key, "", "-"),
                ("training, prompt alone", "tab:orange", f"marginal/{train_key}", "", "-"),
                ("held-out, given the other response", "tab:blue", "", f"eval_conditioned/{eval_key}", "o--"),
                ("held-out, prompt alone", "tab:orange", "", f"eval_marginal/{eval_key}", "o--"),
            ]
        for label, color, key, held_out_key, style in series:
            key = key or held_out_key
            points = [(row["step"], row[key], row.get(f"{key}_ci")) for row in rows if key in row]
            if not points:
                continue
            steps, values, intervals = zip(*points, strict=True)
            axes.plot(steps, values, style, color=color, label=label, alpha=1.0 if held_out_key else 0.6, markersize=4)
            if intervals[0] is not None:
                axes.fill_between(steps, *zip(*intervals, strict=True), color=color, alpha=0.15, linewidth=0)
        axes.set(title=heading, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    figure.savefig(file, dpi=110)

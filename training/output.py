"""Write a run's output: lines on the screen and in log.txt, metrics.jsonl, samples.jsonl and curves.png."""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from .checkpoint import whole_file
from .errors import InputError, Log

METRICS, SAMPLES, CURVES = "metrics.jsonl", "samples.jsonl", "curves.png"
CONFIG, LOG, LOCK = "config.yaml", "log.txt", ".lock"


def escape_unprintable() -> None:
    """Make stdout escape characters that its encoding lacks, instead of failing."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Hold a lock on ``folder``, which admits one run at a time and ends with the process.

    Raises InputError if another run holds it, or the folder cannot be written to.
    """
    if folder is None:
        yield
        return
    check_folder(folder)
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"output_dir {folder}: another run is writing there; choose another folder") from None
    except OSError as error:
        raise InputError(f"output_dir {folder}: cannot be written to ({error}); choose another folder") from None
    try:
        yield
    finally:
        lock.release()


def check_folder(folder: Path) -> None:
    """Raise InputError for an ``output_dir`` that is a file, or lies in a folder that cannot be written to."""
    place = existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        problem = "no permission in" if place.is_dir() else "not a folder:"
        raise InputError(f"output_dir {folder}: cannot be written to ({problem} {place}); choose another folder")


def existing(folder: Path) -> Path:
    """Return the nearest folder above ``folder``, or itself, that is there; a link that leads nowhere is there."""
    return next(place for place in (folder, *folder.absolute().parents) if place.exists() or place.is_symlink())


class JsonLines:
    """A file with one JSON object per line. While the disk is full, the run goes on and rows wait for space."""

    def __init__(self, file: Path | None, say: Log) -> None:
        self.file, self._say = file, say
        self._written = 0  # rows that the file holds
        self._behind = False

    def write(self, rows: Sequence[dict[str, Any]], *, anew: bool = False) -> None:
        """Append the rows that the file lacks. With ``anew``, replace its content with all ``rows``."""
        if self.file is None:
            return
        anew = anew or self._behind
        try:
            self._put(self.file, rows if anew else rows[self._written :], "w" if anew else "a")
            self._written, self._behind = len(rows), False
        except OSError as error:
            if not self._behind:
                self._say(f"WARNING: {self.file} cannot be written ({error}); the run goes on, and tries again")
            self._behind = True

    def _put(self, file: Path, rows: Sequence[dict[str, Any]], mode: str) -> None:
        with file.open(mode, encoding="utf-8") as lines:
            lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class RunLog:
    """Prints lines with the time of day unless ``quiet``; with a ``folder``, also keeps lines and rows in files."""

    def __init__(self, folder: Path | None, quiet: bool) -> None:
        self.quiet, self.folder = quiet, folder
        self._opened, self._waiting = False, []  # type: ignore[var-annotated]
        self.metrics = JsonLines(folder and folder / METRICS, self.say)
        self.samples = JsonLines(folder and folder / SAMPLES, self.say)

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}\n"
        # A full disk or a closed pipe must not end the run, and log.txt gets what the terminal cannot show.
        with suppress(OSError, ValueError):
            if not self.quiet:
                sys.stdout.write(line)
                sys.stdout.flush()  # a redirected warning is also visible at once
        with suppress(OSError):
            self._waiting.append(f"{time.strftime('%Y-%m-%d')} {line}")
            if self._opened and self.folder is not None:
                lines, self._waiting = self._waiting, []
                with (self.folder / LOG).open("a", encoding="utf-8") as file:
                    file.writelines(lines)

    def open(self, settings: str) -> None:
        """Write ``settings`` to config.yaml, and from now on all lines to log.txt: a refused run writes nothing."""
        assert self.folder is not None
        (self.folder / CONFIG).write_text(settings, encoding="utf-8")
        self._opened = True

    def draw(self, rows: list[dict[str, Any]], title: str) -> None:
        if self.folder is not None:
            try:
                plot_curves(rows, title, self.folder / CURVES)
            except Exception as error:  # a broken installation or font must not end a run, either
                self.say(f"WARNING: {CURVES} could not be written: {error}")


@dataclass
class Window:
    """Sums over the steps since the last logged row, which shows their means. A checkpoint keeps them.

    ``sums`` has (total, pairs) for each metric, because some metrics are computed on logged steps only.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, row: dict[str, float], pairs: int, tokens: int) -> None:
        self.tokens += tokens
        for name, value in row.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value * pairs, count + pairs]

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}


def training_line(row: dict[str, Any], total_steps: int, elapsed: float, left: float) -> str:
    """Describe one logged step, with the run's elapsed and remaining time."""
    parts = [f"step {row['step']:>5}/{total_steps}", f"loss {row['loss']:.4f}"]
    for layout, name in (("", ""), ("marginal/", "prompt alone: ")):
        if f"{layout}rewards/margins" in row:
            margin, accuracy = row[f"{layout}rewards/margins"], row[f"{layout}rewards/accuracies"]
            parts.append(f"{name}margin {margin:+.3f} acc {accuracy:.2f}")
    parts += [f"grad {row['grad_norm']:.2f}", f"lr {row['learning_rate']:.1e}", f"{row['tokens_per_second']:.0f} tok/s"]
    return " | ".join([*parts, f"{tqdm.format_interval(elapsed)} elapsed, {tqdm.format_interval(left)} left"])


def evaluation_line(row: dict[str, Any]) -> str:
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


PANELS = (
    ("Loss", "loss", None),
    ("Reward accuracy", "share of pairs", "rewards/accuracies"),
    ("Reward margin (chosen - rejected)", "reward", "rewards/margins"),
    ("Log-prob of the chosen response", "nats per response", "logps/chosen"),
)


def plot_curves(rows: list[dict[str, Any]], title: str, file: Path) -> None:
    """Draw loss, reward accuracy, margin and chosen log-prob over steps, conditioned and from the prompt alone."""
    from matplotlib.figure import Figure  # slow to import; a separate Figure needs no display and no global state

    figure = Figure(figsize=(11, 7.5), layout="constrained")
    figure.suptitle(title)
    plain = not any(key.startswith("marginal/") for row in rows for key in row)
    own = ("prompt alone", "tab:orange") if plain else ("given the other response", "tab:blue")
    for axes, (heading, unit, metric) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        curves = [("loss", "training", "gray", "-"), ("eval_loss", "held-out", "black", "o-")]
        if metric:
            curves = [
                (metric, f"training, {own[0]}", own[1], "-"),
                (f"marginal/{metric}", "training, prompt alone", "tab:orange", "-"),
                (f"eval_conditioned/{metric}", "held-out, given the other response", "tab:blue", "o--"),
                (f"eval_marginal/{metric}", "held-out, prompt alone", "tab:orange", "o--"),
            ]
        for key, label, color, style in curves:
            points = [(row["step"], row[key], row.get(f"{key}_ci")) for row in rows if key in row]
            if not points:
                continue
            steps, values, intervals = zip(*points, strict=True)
            axes.plot(steps, values, style, color=color, label=label, markersize=4, alpha=1 if "o" in style else 0.6)
            if intervals[0] is not None:
                axes.fill_between(steps, *zip(*intervals, strict=True), color=color, alpha=0.15, linewidth=0)
        axes.set(title=heading, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    with whole_file(file) as to:
        figure.savefig(to, dpi=110, format="png")

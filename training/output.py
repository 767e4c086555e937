"""What a run tells: lines on the screen and in log.txt, metrics.jsonl, samples.jsonl, and curves.png."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .errors import InputError

METRICS, SAMPLES, CURVES, LOG = "metrics.jsonl", "samples.jsonl", "curves.png", "log.txt"


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """Admit one run at a time to ``folder``. The lock ends with the process, however that ends."""
    if folder is None:
        yield
        return
    check_folder(folder)
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise InputError(f"output_dir {folder}: another run is writing there; choose another one") from None
    except OSError as error:
        raise InputError(f"output_dir {folder}: cannot be written to ({error}); choose another one") from None
    try:
        yield
    finally:
        lock.release()


def check_folder(folder: Path) -> None:
    """Raise InputError for an ``output_dir`` that is a file."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; choose a folder")


def duration(seconds: float) -> str:
    """Return 75 s as "1m15s", 4,000 s as "1h06m"."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


class JsonLines:
    """Rows in memory and, where there is a file, one JSON object a line in it.

    A disk that is full does not end the run: the file is written whole as soon as there is space.
    """

    def __init__(self, file: Path | None, say: Callable[[str], None]) -> None:
        self.file, self._say = file, say
        self.rows: list[dict[str, Any]] = []
        self._behind = False

    def start(self, text: str) -> None:
        """Begins with the rows that ``text`` holds."""
        self.rows = [json.loads(line) for line in text.split("\n") if line]  # splitlines would also split at U+2028
        if self.file is not None:
            self._write_all(self.file)

    def add(self, *rows: dict[str, Any]) -> None:
        self.rows.extend(rows)
        if self.file is None:
            return
        try:
            if self._behind:
                self._write_all(self.file)
            else:
                self._append(self.file, rows)
            self._behind = False
        except OSError as error:
            if not self._behind:
                self._say(f"WARNING: {self.file} cannot be written ({error}); the run goes on, and tries again")
            self._behind = True

    def _append(self, file: Path, rows: Iterable[dict[str, Any]]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(_json_lines(rows))

    def text(self) -> str:
        return _json_lines(self.rows)

    def _write_all(self, file: Path) -> None:
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(self.text(), encoding="utf-8")
        os.replace(partial, file)


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


class RunLog:
    """What a run tells: metrics, sample answers and, unless ``quiet``, lines with the time of day.

    With a folder, metrics are in ``metrics.jsonl`` and lines in ``log.txt``, too.
    """

    def __init__(self, folder: Path | None, quiet: bool) -> None:
        self.quiet, self.folder = quiet, folder
        self._opened, self._waiting = False, []  # type: ignore[var-annotated]
        self._metrics = JsonLines(folder and folder / METRICS, self.say)
        self._samples = JsonLines(folder and folder / SAMPLES, self.say)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._metrics.rows

    def say(self, text: str) -> None:
        line = f"{time.strftime('%H:%M:%S')} {text}\n"
        with suppress(OSError):  # a line that a full disk or a closed pipe does not take is not worth a run
            if not self.quiet:
                sys.stdout.write(line)
                sys.stdout.flush()  # in a file, too, a warning is seen at once
            self._waiting.append(f"{time.strftime('%Y-%m-%d')} {line}")
            if self._opened and self.folder is not None:
                lines, self._waiting = self._waiting, []
                with (self.folder / LOG).open("a", encoding="utf-8") as file:
                    file.writelines(lines)

    def open(self) -> None:
        """Keep lines in ``log.txt`` from the next one on, and those before it: a run that is refused writes nothing."""
        self._opened = True

    def start(self, texts: dict[str, str]) -> None:
        """Begin anew, or with what ``texts`` of the checkpoint hold from which a run is resumed."""
        self._metrics.start(texts.get(METRICS, ""))
        self._samples.start(texts.get(SAMPLES, ""))

    def forget_evaluation(self, step: int) -> None:
        """Take back the evaluation of ``step``, which is made again with other pairs."""
        rows = [row for row in self.rows if not (row["step"] == step and "eval_loss" in row)]
        self._metrics.start("".join(json.dumps(row) + "\n" for row in rows))

    def texts(self) -> dict[str, str]:
        """The files as they should be now; a checkpoint keeps them, so that it is resumed with the rows up to it."""
        return {METRICS: self._metrics.text(), SAMPLES: self._samples.text()}

    def add(self, row: dict[str, Any]) -> None:
        self._metrics.add(row)

    def add_samples(self, rows: Sequence[dict[str, Any]]) -> None:
        self._samples.add(*rows)

    def draw(self, title: str) -> None:
        if self.folder is not None:
            try:
                plot_curves(self.rows, title, self.folder / CURVES)
            except OSError as error:  # a picture is not worth a run
                self.say(f"WARNING: {CURVES} could not be written: {error}")


@dataclass
class Window:
    """Sums of the steps since the last logged line, so that a line shows means over them. Survives a checkpoint.

    ``sums`` has (total, pairs) of each metric: what is computed on logged steps alone is a mean over their pairs.
    """

    sums: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, row: dict[str, float], pairs: int) -> None:
        for name, value in row.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + value * pairs, count + pairs]

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}


def training_line(row: dict[str, Any], total_steps: int, elapsed: float, left: float) -> str:
    """Describe one logged step, and the time that the run has taken and will take."""
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
        + f" | {duration(elapsed)} gone, {duration(left)} left"
    )  # fmt: skip


def evaluation_line(row: dict[str, Any]) -> str:
    """Describe one evaluation."""
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
    """Draw loss, reward accuracy, margin and chosen log-prob over steps; conditioned and prompt-alone together."""
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
    partial = file.with_name(f"{file.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, file)

"""What a run tells: lines on the screen, metrics.jsonl, samples.jsonl, curves.png, and a tracker that shows them."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, get_available_trackers
from filelock import FileLock, Timeout
from tqdm import tqdm

from .checkpoint import find_checkpoint
from .config import InputError, TrainConfig

METRICS, SAMPLES, CURVES = "metrics.jsonl", "samples.jsonl", "curves.png"


@contextmanager
def locked(folder: Path | None) -> Iterator[None]:
    """One run at a time in ``folder``. The lock ends with the process, however that ends."""
    if folder is None:
        yield
        return
    _check_folder(folder)
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


def check_output(config: TrainConfig, log: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run goes on from, with its state, if it does.

    Raises InputError where the run cannot write as it is told to. Nothing is written.
    """
    check_tracker(config.report_to)
    if config.folder is None:
        return None
    _check_folder(config.folder)
    return find_checkpoint(config.folder, config, log)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"output_dir {folder} is a file; choose a folder")


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
    """What a run tells: metrics, sample answers and, unless ``quiet``, lines on the screen.

    Metrics are kept in memory and, with a folder, in ``metrics.jsonl``; with ``report_to`` a tracker gets them, too.
    """

    def __init__(self, folder: Path | None, quiet: bool, report_to: str | None = None) -> None:
        self.quiet = quiet
        self._folder, self._report_to = folder, report_to
        self._tracker: GeneralTracker | None = None
        self._metrics = JsonLines(folder and folder / METRICS, self.say)
        self._samples = JsonLines(folder and folder / SAMPLES, self.say)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return self._metrics.rows

    def say(self, text: str) -> None:
        if not self.quiet:
            with suppress(OSError):  # a line that a full disk or a closed pipe does not take is not worth a run
                tqdm.write(text)
                sys.stdout.flush()  # in a file, too, a warning is seen at once

    def start(self, config: TrainConfig, texts: dict[str, str]) -> None:
        """Begins anew, or with what ``texts`` of the checkpoint hold from which a run is resumed."""
        self._metrics.start(texts.get(METRICS, ""))
        self._samples.start(texts.get(SAMPLES, ""))
        if self._folder is not None and self._report_to is not None:
            self._tracker = start_tracker(self._report_to, self._folder, config)
            for row in self.rows:  # a tracker knows nothing of checkpoints: it is told everything again
                self._track(row)

    def texts(self) -> dict[str, str]:
        """The files as they should be now; a checkpoint keeps them, so that it is resumed with the rows up to it."""
        return {METRICS: self._metrics.text(), SAMPLES: self._samples.text()}

    def add(self, row: dict[str, Any]) -> None:
        self._metrics.add(row)
        self._track(row)

    def add_samples(self, rows: Sequence[dict[str, Any]]) -> None:
        self._samples.add(*rows)

    def draw(self, title: str) -> None:
        if self._folder is not None:
            try:
                plot_curves(self.rows, title, self._folder / CURVES)
            except OSError as error:  # a picture is not worth a run
                self.say(f"WARNING: {CURVES} could not be written: {error}")

    def close(self) -> None:
        if self._tracker is not None:
            self._try_tracker(self._tracker.finish)

    def _track(self, row: dict[str, Any]) -> None:
        if self._tracker is not None:
            numbers = {name: value for name, value in row.items() if name != "step" and isinstance(value, (int, float))}
            self._try_tracker(functools.partial(self._tracker.log, numbers, step=row["step"]))

    def _try_tracker(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # each tracker has classes of its own: no network, no space, a run that was deleted
            self._tracker = None
            self.say(
                f"WARNING: {self._report_to} failed ({type(error).__name__}: {error}); the run goes on without it. A "
                "resumed run shows it everything again"
            )


def check_tracker(name: str | None) -> None:
    """Raises InputError for a ``report_to`` whose package is not installed; costs nothing, so that it is asked first.

    A folder ``wandb`` in the working directory, as its runs leave it, is no package.
    """
    if name is not None and name not in map(str, get_available_trackers()):
        raise InputError(f"report_to={name}: the package is not installed; pip install {name}")


def start_tracker(name: str, folder: Path, config: TrainConfig) -> GeneralTracker:
    """TensorBoard writes to ``folder/tensorboard``; wandb and trackio name their project inspo."""
    if name == "tensorboard":
        shutil.rmtree(folder / name, ignore_errors=True)  # of the part of the run that is told again
        tracker = LOGGER_TYPE_TO_CLASS[name](name, logging_dir=str(folder))
    else:
        tracker = LOGGER_TYPE_TO_CLASS[name]("inspo", name=folder.resolve().name)
    tracker.start()
    settings = asdict(config).items()
    tracker.store_init_configuration({k: v if isinstance(v, (bool, int, float)) else str(v) for k, v in settings})
    return tracker


@dataclass
class Window:
    """Sums of the steps since the last logged line, so that a line shows means over them. Survives a checkpoint."""

    sums: dict[str, float] | None = None
    pairs: int = 0
    tokens: int = 0
    scored: int = 0
    seconds: float = 0.0

    def add(self, row: dict[str, float], count: int, tokens: int, scored: int, seconds: float) -> None:
        old = self.sums or {}
        self.sums = {name: old.get(name, 0.0) + value * count for name, value in row.items()}
        self.pairs += count
        self.tokens += tokens
        self.scored += scored
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
        f"| {row['tokens_per_second']:.0f} tok/s" + (f" | mfu {row['mfu']:.1%}" if "mfu" in row else "")
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
    partial = file.with_name(f"{file.name}.partial")
    figure.savefig(partial, dpi=110, format="png")
    os.replace(partial, file)

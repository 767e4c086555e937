"""Draw the report's pictures from ``study.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .arms import OBJECTIVES, VARIANTS
from .runs import base_name

NAMES = {"plain": "plain", "inspo": "InSPO", "anchored": "anchored InSPO"}
AXIS_LABELS = {
    "label noise": "share of flipped labels",
    "own alternative": "probability of the pair's own alternative",
    "learning rate": "factor of the tuned value",
    "beta": "factor of the tuned value",
    "marginal weight": "weight of the loss on the marginals",
}
COLORS = {"plain": "tab:orange", "inspo": "tab:blue", "anchored": "tab:green"}


def draw_arms(result: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display and no global state

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    quality, contrast = figure.subplots(1, 2)
    arms = result["arms"]
    for x, key in enumerate(OBJECTIVES):
        for shift, variant in zip((-0.22, 0, 0.22), VARIANTS):
            if row := arms.get(f"{key} {variant}"):
                label = NAMES[variant] if x == 0 else None
                _point(quality, x + shift, row["quality"], COLORS[variant], label)
    quality.axhline(result["bases"][base_name(True)]["quality"], color="gray", ls=":", label="base")
    if sft := arms.get("sft"):
        quality.axhline(sft["quality"]["mean"], color="black", ls="--", lw=1, label="SFT on the chosen")
    quality.set_xticks(range(len(OBJECTIVES)), list(OBJECTIVES.values()))
    quality.set(title="Exact quality, answers from the prompt alone", ylabel="mean over seeds, 95%")
    for x, entry in enumerate(entry for entry in result["contrasts"] if entry["kind"] == "inspo - plain"):
        for shift, measure, color, title in (
            (-0.12, "quality", "tab:blue", "exact quality"),
            (0.12, "lc_win_rate", "tab:purple", "length-controlled win rate"),
        ):
            _point(contrast, x + shift, entry[measure], color, title if x == 0 else None)
    contrast.axhline(0, color="gray", lw=1)
    contrast.set_xticks(range(len(OBJECTIVES)), list(OBJECTIVES.values()))
    contrast.set(title="InSPO - plain, paired by seed", ylabel="difference, 95%")
    for axes in (quality, contrast):
        axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3)  # below the points
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _point(axes: Any, x: float, value: Mapping[str, float], color: str, label: str | None) -> None:
    error = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
    axes.errorbar(x, value["mean"], yerr=error, fmt="o", color=color, label=label, capsize=3, markersize=4)


def draw_curves(result: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    grid = figure.subplots(2, len(OBJECTIVES), sharex=True, sharey="row")
    for column, (key, title) in zip(grid.T, OBJECTIVES.items()):
        for variant in VARIANTS:
            curve = result["curves"].get(f"{key} {variant}", [])
            steps = [point["step"] for point in curve]
            for layout, style in (("conditioned", "--"), ("marginal", "-")):
                for axes, what in zip(column, ("accuracy", "chosen")):
                    # Before training, margins relative to the reference are all 0, so there is no accuracy yet.
                    values = [p[f"{layout} {what}"] if p["step"] or what == "chosen" else float("nan") for p in curve]
                    label = (
                        f"{NAMES[variant]}, {'given the other response' if layout == 'conditioned' else 'prompt alone'}"
                    )
                    axes.plot(steps, values, style, color=COLORS[variant], label=label)
        column[0].set(title=title)
        column[1].set(xlabel="update")
        for axes in column:
            axes.grid(alpha=0.3)
    grid[0, 0].set(ylabel="reward accuracy")
    grid[1, 0].set(ylabel="log-prob of chosen,\nnats per token")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def draw_ablations(result: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    groups = [(group, rows) for group, rows in result["ablations"].items() if rows]
    figure = Figure(figsize=(13, 6), layout="constrained")
    for place, (group, rows) in enumerate(groups):
        axes = figure.add_subplot(2, 3, place + 1)
        numeric = all(isinstance(row["level"], (int, float)) for row in rows)
        for line in dict.fromkeys(row["line"] for row in rows):
            points = [row for row in rows if row["line"] == line]
            if numeric:
                points = sorted(points, key=lambda row: row["level"])
            xs = [row["level"] for row in points] if numeric else range(len(points))
            color = COLORS[line.split()[1]]
            axes.plot(xs, [row["gain"]["mean"] for row in points], color=color, lw=1 if numeric else 0)
            for i, (x, row) in enumerate(zip(xs, points)):
                _point(axes, x, row["gain"], color, NAMES[line.split()[1]] if i == 0 else None)
            if not numeric:
                axes.set_xticks(list(xs), [str(row["level"]).replace(" ", "\n") for row in points], fontsize=7)
        if group in ("learning rate", "beta"):
            axes.set_xscale("log")
            levels = sorted({row["level"] for row in rows})
            axes.set_xticks(levels, [f"{level:g}" for level in levels])
            axes.minorticks_off()
        axes.axhline(0, color="gray", lw=1)
        axes.set(title=group, xlabel=AXIS_LABELS.get(group, ""))
        axes.grid(alpha=0.3)
        low, high = axes.get_ylim()
        axes.set_ylim(low, high + 0.2 * (high - low))  # the legend stands above the points
        axes.legend(fontsize=7, loc="upper right", ncols=3)
        if place % 3 == 0:
            axes.set(ylabel="gain in quality over base")
    figure.savefig(file, dpi=100, metadata={"Software": None})


AXIS_COLORS = {
    "plain": "tab:orange",
    "inspo": "tab:blue",
    "other": "tab:purple",
    "conditioned reference": "tab:cyan",
    "dropout": "tab:red",
    "anchored": "tab:green",
    "sft": "black",
}


def draw_axis(result: Mapping[str, Any], titles: Mapping[str, str], file: Path) -> None:
    """Plot gain over the base by number of updates, one panel per number of pairs, dashed for arms with fewer seeds."""
    from matplotlib.figure import Figure

    cells = {pairs: arms for pairs, arms in result["cells"].items() if any("best" in cell for cell in arms.values())}
    figure = Figure(figsize=(2.5 + 3.5 * len(cells), 4.8), layout="constrained")
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    most = max(cell["seeds"] for arms in cells.values() for cell in arms.values())
    for axes, (pairs, arms) in zip(panels, cells.items()):
        shown = [(arm, cell) for arm, cell in arms.items() if "best" in cell]
        for place, (arm, cell) in enumerate(shown):
            gains = [row["greedy"]["minus base"] for row in cell["updates"].values()]
            shift = 1.03 ** (place - len(shown) / 2)  # next to each other, not on top of each other
            few = cell["seeds"] < most
            axes.errorbar(
                [int(updates) * shift for updates in cell["updates"]],
                [gain["mean"] for gain in gains],
                yerr=[[gain["mean"] - gain["low"] for gain in gains], [gain["high"] - gain["mean"] for gain in gains]],
                fmt="o--" if few else "o-",
                color=AXIS_COLORS[arm],
                label=titles[arm],
                markersize=4,
                capsize=2,
                lw=1 if few else 2,
                elinewidth=0.6 if few else 1.2,
            )
        axes.axhline(0, color="gray", ls=":", label="base")
        axes.set_xscale("log", base=2)
        ticks = [int(updates) for updates in result["plan"]["checkpoints"]]
        size = result["plan"]["size"]["update_pairs"]
        axes.set_xticks(ticks, [f"{n}\n({n * size / int(pairs):g})" for n in ticks])
        axes.minorticks_off()
        seeds = sorted({cell["seeds"] for _, cell in shown})
        axes.set(title=f"{pairs} pairs ({' or '.join(map(str, seeds))} seeds)", xlabel="updates (passes over pairs)")
        axes.grid(alpha=0.3)
    panels[0].set(ylabel="gain in exact quality over base, 95%")
    figure.suptitle("Greedy answers from the prompt alone, constant learning rate", fontsize=11)
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.savefig(file, dpi=100, metadata={"Software": None})


PICTURES: dict[str, Callable[[Mapping[str, Any], Path], None]] = {
    "arms": draw_arms,
    "curves": draw_curves,
    "ablations": draw_ablations,
}

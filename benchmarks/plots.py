"""Draw figures from result files."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from . import tables

TITLES = tables.TITLES | {"floor": "bare matmuls, preallocated"}


def plot_scaling(result: dict[str, Any]) -> Figure:
    """Plot time above and memory below, one column per sweep, with the workspace sweep last."""
    sweeps = list(result["fits"])
    figure = Figure(figsize=(3.2 * (len(sweeps) + 1), 5.6), layout="constrained")
    panels = figure.subplots(2, len(sweeps) + 1, squeeze=False)
    handles: dict[str, Any] = {}
    for column, sweep in enumerate(sweeps):
        cells = [cell for cell in result["cells"] if cell["sweep"] == sweep]
        for axes, value, label, key in (
            (panels[0][column], lambda row: row.get("seconds") and row["seconds"]["median"], "seconds", "seconds"),
            (panels[1][column], lambda row: row.get("peak_bytes") and row["peak_bytes"] / 2**20, "MiB", "peak_bytes"),
        ):
            for i, name in enumerate(dict.fromkeys(n for cell in cells for n in cell["contenders"])):
                points = [(cell["value"], value(cell["contenders"].get(name, {}))) for cell in cells]
                points = [(n, v) for n, v in points if v]
                fit = result["fits"][sweep].get(name, {}).get(key)
                if points:
                    exponent = f"{fit['exponent']:.2f}" if fit else None
                    (handles[name],) = axes.plot(*zip(*points), marker="o", markersize=3, color=f"C{i}", label=exponent)
            _log_log(axes, [cell["value"] for cell in cells])
            axes.legend(fontsize=7, handlelength=1, labelspacing=0.2)
            axes.set_xlabel(sweep)
            axes.set_ylabel(label)
    axes, table = panels[0][-1], sorted(result["workspace"].values(), key=lambda row: row["rows"])
    if table:
        rows = [row["rows"] for row in table]
        middle, low, high = ([row["seconds"][key] for row in table] for key in ("median", "q1", "q3"))
        axes.plot(rows, middle, marker="o", markersize=3, color="k")
        axes.fill_between(rows, low, high, alpha=0.2)
        axes.set_xscale("log", base=2)
        axes.set_xticks(rows[::2], [f"{n:,}" for n in rows[::2]], fontsize=7)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("rows of the workspace")
        axes.set_ylabel("seconds, reference shape")
    panels[1][-1].axis("off")
    panels[1][-1].legend(
        handles.values(),
        [TITLES[n] for n in handles],
        fontsize=7,
        loc="center",
        title="numbers in the panels: exponents",
    )
    return figure


def plot_step(result: dict[str, Any]) -> Figure:
    """Plot time / four forwards over prompt share, one panel per model, and all float64 losses in one panel."""
    models = list(dict.fromkeys(cell["model"] for cell in result["cells"]))
    figure = Figure(figsize=(4.2 * (len(models) + 1), 3.8), layout="constrained")
    panels = figure.subplots(1, len(models) + 1)
    for axes, model in zip(panels, models):
        cells = [cell for cell in result["cells"] if cell["model"] == model]
        ticks = [f"{cell['share']}\n{cell['pairs']} x {cell['tokens']}" for cell in cells]
        for i, (name, title) in enumerate(result["titles"].items()):
            rows = [cell["contenders"].get(name, {}).get("times_four_forwards") for cell in cells]
            points = [(at, row) for at, row in enumerate(rows) if row]
            if points:
                at, ratios = zip(*points)
                middle = [ratio["median"] for ratio in ratios]
                errors = [[r["median"] - r["q1"] for r in ratios], [r["q3"] - r["median"] for r in ratios]]
                style: dict[str, Any] = {"marker": "o", "capsize": 2, "color": f"C{i}", "linestyle": ""}
                axes.errorbar(at, middle, errors, label=title, **style)
        axes.set_xticks(range(len(ticks)), ticks)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{model}: time / four forwards", fontsize=9)
        axes.set_xlabel("prompt share; pairs x tokens")
        axes.tick_params(axis="x", labelsize=7)
        axes.grid(alpha=0.3)
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), fontsize=7, loc="outside lower center", ncols=3)
    axes = panels[-1]
    for i, name in enumerate(result["titles"]):
        row = result["same_work"]["contenders"].get(name, {})
        if "losses" in row:
            # Lines get narrower, so that all are visible where they coincide.
            width = 12 * (1 - i / len(result["titles"]))
            axes.plot(range(1, len(row["losses"]) + 1), row["losses"], linewidth=width, alpha=0.6, color=f"C{i}")
    axes.set_title(f"losses in {result['same_work']['dtype']}, before each update", fontsize=9)
    axes.set_xlabel("update")
    return figure


def _log_log(axes: Any, ticks: list[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{n:,}" for n in ticks], fontsize=7)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3, which="both", linewidth=0.4)

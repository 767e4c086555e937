"""Write the tables of the README and docs/ and the plots from the result files: ``python -m benchmarks.report``.

Section NAME fills the lines between ``<!-- generated: NAME -->`` and ``<!-- end -->`` from its file. To add a section,
write a function from the parsed file to Markdown and list it in ``SECTIONS``; plots are listed in ``PLOTS``.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import parallel, plots
from .contenders import CONTENDERS
from .measure import PRODUCTS
from .study import axis_report, code_report
from .study.report import against_plain, finding

TITLES = {name: contender.title for name, contender in CONTENDERS.items()}
RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
BLOCK_START = "<!-- generated: "
PAGES = tuple(page for page in (README, *sorted(DOCS.glob("*.md"))) if BLOCK_START in page.read_text())
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def loss(result: dict[str, Any]) -> str:
    """Tabulate time beside the floor and memory of the pairwise loss at each shape, and the worst error."""
    cells = result["cells"]
    lines = [f"The pairwise loss, {result['dtype']}, forward + backward:", ""]
    lines += [
        f"- {cell['shape']}: {cell['pairs']} pairs, prompt {cell['mean_prompt']:.0f}, responses "
        f"{cell['mean_response']:.0f}{'' if cell['shape'] == 'reference' else ' on average'}, H = {cell['hidden']}, "
        f"V = {cell['vocab']:,}: {cell['scored_tokens']:,} scored of {cell['positions']:,} positions"
        for cell in cells
    ]
    titles = [f"{cell['shape']}: {what}" for cell in cells for what in ("time / floor (quartiles)", "peak memory")]
    lines += ["", "| | " + " | ".join(titles) + " | worst error against float64 |", "|---" * (len(titles) + 2) + "|"]
    for name in cells[0]["contenders"]:
        texts, errors = [], []
        for cell in cells:
            row = cell["contenders"].get(name, {"status": "not yet measured"})
            if row["status"] == "measured":
                time = _ratio(row["times_floor"], name == "floor") if row.get("times_floor") else "not yet timed"
                texts += [time, _mebibytes(row)]
                errors += row.get("relative_error", {}).values()
            else:
                texts += [row["status"], ""]
        error = f"{max(errors):.0e}" if errors else ""
        lines.append(f"| {_title(name)} | " + " | ".join([*texts, error]) + " |")
    peak = "Peak memory is what a fresh process takes above its inputs."
    return "\n".join([*lines, "", peak, "", _source(result, "loss_cpu.json")])


SAVINGS = ("floor", "torch", "full_log_softmax", "log_softmax", "trl", "liger")


def savings(result: dict[str, Any]) -> str:
    """Tabulate time and memory of the best-known implementations at the first shape, for the README."""
    cell = result["cells"][0]
    lines = [
        f"The pairwise loss, {result['dtype']}, forward + backward, {cell['pairs']} pairs (prompt "
        f"{cell['mean_prompt']:.0f}, responses {cell['mean_response']:.0f}), H = {cell['hidden']}, V = "
        f"{cell['vocab']:,}. Peak memory is what a fresh process takes above its inputs.",
        "",
        "| | time / bare matmuls (quartiles) | peak memory |",
        "|---|---|---|",
    ]
    for name in SAVINGS:
        row = cell["contenders"][name]
        lines.append(f"| {_title(name)} | {_ratio(row['times_floor'], name == 'floor')} | {_mebibytes(row)} |")
    return "\n".join([*lines, "", _source(result, "loss_cpu.json")])


def _title(name: str) -> str:
    return "floor: the bare matmuls, outputs preallocated" if name == "floor" else TITLES[name]


def _cell_table(cell: dict[str, Any], base: str) -> list[str]:
    lines = [
        f"| | time / {base} (quartiles) | seconds | peak memory above inputs | worst error against float64 |",
        "|---|---|---|---|---|",
    ]
    for name, row in cell["contenders"].items():
        title = _title(name)
        if row["status"] != "measured":
            lines.append(f"| {title} | {row['status']} | | | |")
            continue
        if not row.get(f"times_{base}"):
            lines.append(f"| {title} | not yet timed | | {_mebibytes(row)} | |")
            continue
        errors = row.get("relative_error")
        error = f"{max(errors.values()):.0e}" if errors else ""
        ratio, seconds = _ratio(row[f"times_{base}"], name == base), f"{row['seconds']['median']:.2f}"
        lines.append(f"| {title} | {ratio} | {seconds} | {_mebibytes(row)} | {error} |")
    return lines


def _ratio(ratio: dict[str, float], is_base: bool = False) -> str:
    around = "one round" if ratio["q1"] == ratio["q3"] else f"{ratio['q1']:.2f}-{ratio['q3']:.2f}"
    return f"{ratio['median']:.2f}" + ("" if is_base else f" ({around})")


def _mebibytes(row: dict[str, Any]) -> str:
    return "not measured" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"


def logps(result: dict[str, Any]) -> str:
    """Tabulate time / floor of the per-token op in its modes, at the first shape."""
    cells = [cell for cell in result["cells"] if cell["shape"] == result["cells"][0]["shape"]]
    first = cells[0]
    lines = [
        f"`linear_logps` under any upstream gradient, {first['scored_tokens']:,} tokens, H = {first['hidden']}, "
        f"V = {first['vocab']:,}, {result['dtype']}; time / bare matmuls of that mode (their number), peak memory:",
        "",
        "| | " + " | ".join(f"{cell['mode']} ({PRODUCTS[cell['mode']]})" for cell in cells) + " |",
        "|---" * (len(cells) + 1) + "|",
    ]
    for name in first["contenders"]:
        if name == "floor":
            continue
        texts = []
        for cell in cells:
            row = cell["contenders"].get(name, {"status": "not yet measured"})
            time = _ratio(row["times_floor"]) if row.get("times_floor") else "not yet timed"
            texts.append(f"{time}, {_mebibytes(row)}" if row["status"] == "measured" else row["status"])
        lines.append(f"| {TITLES[name]} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", _source(result, "logps_cpu.json")])


def scaling(result: dict[str, Any]) -> str:
    """Tabulate the fitted growth of time and memory."""
    sweeps = result["fits"]
    names = list(dict.fromkeys(name for fit in sweeps.values() for name in fit))
    lines = [
        "Growth of time, and of peak memory, as the exponent of a fitted power (1 is linear, 0 constant), one thing "
        "changed at a time:",
        "",
        "| | " + " | ".join(sweeps) + " |",
        "|---" * (len(sweeps) + 1) + "|",
    ]
    for name in names:
        cells = []
        for fit in sweeps.values():
            figures = [fit.get(name, {}).get(key) for key in ("seconds", "peak_bytes")]
            cells.append(", ".join("-" if f is None else f"{f['exponent']:.2f}" for f in figures))
        lines.append(f"| {_title(name)} | " + " | ".join(cells) + " |")
    best = min(result["workspace"].items(), key=lambda item: item[1]["seconds"]["median"])
    default = next(item for item in result["workspace"].items() if item[0].startswith("default"))
    share = default[1]["seconds"]["median"] / best[1]["seconds"]["median"]
    lines += [
        "",
        f"At the reference shape, the default workspace of {default[1]['rows']} rows "
        f"({default[1]['bytes'] / 2**20:.0f} MiB) takes {share:.2f} times as long as the fastest one tried, of "
        f"{best[1]['rows']} rows ({best[1]['bytes'] / 2**20:.0f} MiB).",
        "",
        "![time and memory](docs/scaling_cpu.png)",
    ]
    return "\n".join([*lines, "", _source(result, "scaling_cpu.json")])


def step(result: dict[str, Any]) -> str:
    """Tabulate whole steps by prompt share, and say that the work is the same."""
    titles = result["titles"]
    lines = [
        f"A whole training step, {result['dtype']}: time / four forwards (quartiles) and peak memory, by the prompt's "
        "share of prompt + chosen + rejected, or with the lengths of real pairs. The baseline runs four forwards in "
        "every step: policy and reference, chosen and rejected. The others pass each pair through the reference once, before "
        "training; the figure after the + is what this adds in a run of one epoch. For TRL it is left out, because it "
        "was not timed apart from building the trainer.",
        "",
        "| model, prompt share | " + " | ".join(titles.values()) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for cell in result["cells"]:
        texts = []
        for name in titles:
            row = cell["contenders"].get(name, {"status": "not measured"})
            texts.append(_step_time(name, row, cell) if row["status"] == "measured" else row["status"])
        lines.append(f"| {cell['name']} | " + " | ".join(texts) + " |")
    models = "; ".join(
        f"{name}: {m['layers']} layers, H = {m['hidden']}, V = {m['vocab']:,}" for name, m in result["models"].items()
    )
    padding = [
        f"{cell['name']}: {loop['positions_per_step']:,.0f} positions against {tree['positions_per_step']:,.0f}"
        for cell in result["cells"]
        for loop, tree in [[cell["contenders"].get(name, {}) for name in ("loop", "tree")]]
        if loop.get("positions_per_step", 0) < 0.9 * tree.get("positions_per_step", 0)
    ]
    if padding:
        lines += [
            "",
            f"The training loop groups pairs of similar length ({'; '.join(padding)}). The others take a step's pairs "
            "as one batch. TRL would also pad less in smaller batches.",
        ]
    return "\n".join(
        [
            *lines,
            "",
            f"Models (Llama-shaped, random weights): {models}.",
            "",
            _same_work(result),
            "",
            _source(result, "step_cpu.json"),
        ]
    )


def _step_time(name: str, row: dict[str, Any], cell: dict[str, Any]) -> str:
    """Format a step / four forwards, its share of the reference pass that is made once, and memory."""
    memory = "" if row.get("peak_bytes") is None else f", {_mebibytes(row)}"
    if "times_four_forwards" not in row:
        return f"not yet timed{memory}"
    text = _ratio(row["times_four_forwards"], name == "four_forwards")
    if name not in ("four_forwards", "trl", "trl_compact") and row["reference_seconds_per_step"]:
        base = cell["contenders"]["four_forwards"]["seconds"]["median"]
        text += f" + {row['reference_seconds_per_step'] / base:.2f}"
    return text + memory


def _same_work(result: dict[str, Any]) -> str:
    work = result["same_work"]
    parts = []
    for name, row in work["contenders"].items():
        if name == "four_forwards":
            continue
        if "errors" not in row:
            parts.append(f"{result['titles'][name]}: {row['status']}")
            continue
        verdict = "" if row["same"] else ", NOT THE SAME"
        parts.append(
            f"{result['titles'].get(name, name)}: losses differ by at most {row['errors']['loss']:.0e}, weights by "
            f"{row['errors']['weights']:.0e} of the distance that they moved{verdict}"
        )
    return f"After {work['updates']} updates in {work['dtype']}, relative to four forwards: {'; '.join(parts)}."


def trainers(result: dict[str, Any]) -> str:
    """Tabulate a step of InSPOTrainer beside one of TRL's DPOTrainer."""
    titles, first = dict(result["titles"]), result["cells"][0]
    titles["trl_compact"] = "DPOTrainer, conditioned rows, head on scored positions"
    lines = [
        f"A step inside TRL, {result['dtype']}: time / DPOTrainer (quartiles) and peak memory. Both trainers make the "
        f"same updates. The last of {first['updates']} steps is logged, and there InSPOTrainer also scores the "
        "marginals.",
        "",
        "| model, prompt share | " + " | ".join(titles.values()) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for cell in result["cells"]:
        rows = ((name, cell["contenders"].get(name, {"status": "not measured"})) for name in titles)
        texts = [
            f"{_ratio(row['times_trl_compact'], name == 'trl_compact')}, {_mebibytes(row)}"
            if "times_trl_compact" in row
            else row["status"]
            for name, row in rows
        ]
        lines.append(f"| {cell['name']} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", _source(result, "trl_step_cpu.json")])


def gpu(result: dict[str, Any]) -> str:
    """Tabulate time / floor at the main shape, and the targets."""
    cells = [cell for cell in result["cells"] if (cell["model"], cell["tokens"]) == ("llama3-8b", 8192)] or [
        result["cells"][0]
    ]
    lines = []
    for cell in cells:
        lines += [f"{cell['name']}, {result['dtype']}:", "", *_cell_table(cell, "floor"), ""]
    lines += [
        f"- {row['target']} <= {row['limit']:g}: "
        + ("" if row["measured"] is None else f"{row['measured']:.4g}, ")
        + row["verdict"]
        for row in result["targets"]
    ]
    return "\n".join([*lines, "", _source(result, "gpu.json")])


def demo(result: dict[str, Any]) -> str:
    """Tabulate the accuracy of the demo's four models over its seeds."""
    summary = result["summary"]
    lines = [
        f"The demo's world (answers judged exactly, unseen prompts, from the prompt alone), {summary['seeds']} seeds, "
        "each with its own base, data and initialisation:",
        "",
        "| | greedy: right | gain over base | sampled: right | gain over base | seeds with gain > 0 (95%) |",
        "|---|---|---|---|---|---|",
    ]
    for name, title in (("base", "base"), ("sft", "SFT on the chosen"), ("dpo", "DPO"), ("inspo", "InSPO-DPO")):
        cells = [title]
        for how in ("greedy", "sampled"):
            row = summary[how][name]
            cells += [f"{row['accuracy']['mean']:.2f}", _gain(row)]
        above = [summary[how][name].get("seeds_with_gain_interval_above_0") for how in ("greedy", "sampled")]
        cells.append("" if name == "base" else f"{above[0]} greedy, {above[1]} sampled")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _demo_ranking(summary), "", _source(result, "demo_seeds.json")])


def _demo_ranking(summary: dict[str, Any]) -> str:
    """Say in a sentence what the table says; it is computed from the numbers."""
    names = {"base": "the base", "sft": "SFT", "dpo": "DPO", "inspo": "InSPO"}
    ranked = sorted(names, key=lambda name: -summary["sampled"][name]["accuracy"]["mean"])
    inspo = summary["sampled"]["inspo"]
    return (
        f"InSPO's gain over the base is above 0 on {inspo['seeds_with_gain_interval_above_0']} of {summary['seeds']} "
        f"seeds, sampled. By mean sampled accuracy the order is {', '.join(names[name] for name in ranked)}"
        + ("." if ranked[0] == "inspo" else ": InSPO is not first here.")
    )


def real_pairs(result: dict[str, Any]) -> str:
    """Tabulate held-out reward accuracies of the fine-tunes on real pairs."""
    data = result["data"]
    lines = [
        f"A byte-level model of {result['model']['parameters'] / 1e6:.2f}M parameters on real preference pairs "
        f"({data['train_pairs']:,} to train on, {data['held_out_pairs']} held out, of other prompts). "
        "Every objective runs from data to a saved model that generates; the table shows the held-out reward accuracy. "
        "Such a model is far too small to answer anything.",
        "",
        "| | conditioned accuracy (95%) | marginal accuracy (95%) |",
        "|---|---|---|",
    ]
    for run in result["runs"]:
        after = run["after"]
        cells = [f"{run['objective']}, {'InSPO' if run['conditioned'] else 'plain'}"]
        for layout in ("conditioned", "marginal"):
            accuracy, ends = (after[f"eval_{layout}/rewards/{what}"] for what in ("accuracies", "accuracies_ci"))
            cells.append(f"{accuracy:.2f} ({ends[0]:.2f}-{ends[1]:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _beside_chance(result["runs"]), "", _source(result, "real_pairs.json")])


def _beside_chance(runs: list[dict[str, Any]]) -> str:
    """Say in a sentence which marginal accuracies differ from one half."""
    above: list[str] = []
    below: list[str] = []
    for run in runs:
        name = f"{run['objective']}, {'InSPO' if run['conditioned'] else 'plain'}"
        low, high = run["after"]["eval_marginal/rewards/accuracies_ci"]
        (above if low > 0.5 else below if high < 0.5 else []).append(name)
    return (
        "From the prompt alone (marginal), by intervals of one seed that are not adjusted for their number, better "
        f"than chance: {'; '.join(above) or 'none'}; worse: {'; '.join(below) or 'none'}. This shows that the "
        "pipeline works, not that any objective is good."
    )


def no_drafts(result: dict[str, Any]) -> str:
    """Report a base that has never seen the conditioned layout."""
    summary, gaps = result["summary"], [seed["conditioning_gap"] for seed in result["seeds"].values()]
    gap = min(value for seed in gaps for value in seed.values())
    gains = {name: summary["sampled"][name]["gain"] for name in ("inspo", "dpo", "sft")}
    inspo = gains["inspo"]
    return (
        f"In the demo's world, with a base fitted without drafts ({summary['seeds']} seeds), y after the other answer "
        f"is up to {-gap:.1f} nats a token less likely, and InSPO changes the sampled prompt-only accuracy by "
        f"{inspo['mean']:+.2f} ({inspo['min']:+.2f} to {inspo['max']:+.2f}), plain DPO by "
        f"{gains['dpo']['mean']:+.2f}, SFT by {gains['sft']['mean']:+.2f}.\n\n" + _source(result, "demo_no_drafts.json")
    )


def helps(result: dict[str, Any]) -> str:
    """Say in three sentences whether InSPO helped in the project's studies: the README's answer."""
    few_passes = json.loads((RESULTS / "study" / "study.json").read_text())
    many_passes, best_stop, _ = axis_report.sentences(result)
    return (
        f"InSPO against the plain objective, after two passes over the pairs: {against_plain(few_passes)}. "
        f"{many_passes} {best_stop}"
    )


def loop_overhead(result: dict[str, Any]) -> str:
    """Say in one sentence what the loop adds to its bare steps."""
    rounds = len(result["seconds"]["loop"])
    return (
        f"Metrics, logs, finite checks and a checkpoint every {result['save_every']} steps: the loop took "
        f"{_ratio(result['loop_over_bare'])} times as long as its bare steps (median and quartiles of {rounds} "
        f"rounds of {result['steps']} steps).\n\n" + _source(result, "loop_overhead.json")
    )


def split_heads(result: dict[str, Any]) -> str:
    """Tabulate a head split over ranks: measured on CPUs, and calculated for GPUs."""
    return f"{parallel.tables(result)}\n\n{_source(result, 'parallel_cpu.json')}"


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "savings": ("loss_cpu.json", savings),
    "loss": ("loss_cpu.json", loss),
    "logps": ("logps_cpu.json", logps),
    "scaling": ("scaling_cpu.json", scaling),
    "step": ("step_cpu.json", step),
    "trainers": ("trl_step_cpu.json", trainers),
    "gpu": ("gpu.json", gpu),
    "split_heads": ("parallel_cpu.json", split_heads),
    "loop_overhead": ("loop_overhead.json", loop_overhead),
    "study": ("study/study.json", finding),
    "helps": ("study_axis/axis.json", helps),
    "axis": ("study_axis/axis.json", axis_report.finding),
    "code": ("study_code/study_code.json", code_report.finding),
    "demo": ("demo_seeds.json", demo),
    "no_drafts": ("demo_no_drafts.json", no_drafts),
    "real_pairs": ("real_pairs.json", real_pairs),
}


PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "scaling_cpu.png": ("scaling_cpu.json", plots.plot_scaling),
    "step_cpu.png": ("step_cpu.json", plots.plot_step),
}


def render(page: Path) -> str:
    """Return the page's text with every generated block written anew, links relative to its folder."""
    in_docs = page.parent == DOCS

    def block(match: re.Match[str]) -> str:
        file, section = SECTIONS[match[2]]
        path = RESULTS / file
        body = section(json.loads(path.read_text())) if path.exists() else "Not yet measured."
        if in_docs:
            body = body.replace("](benchmarks/", "](../benchmarks/").replace("](docs/", "](")
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(block, page.read_text())


def _gain(row: dict[str, Any]) -> str:
    if "gain" not in row:
        return ""
    gain = row["gain"]
    ends = f" ({gain['mean_ci'][0]:+.2f} to {gain['mean_ci'][1]:+.2f})" if "mean_ci" in gain else ""
    return f"{gain['mean']:+.2f}{ends}"


def _source(result: dict[str, Any], file: str) -> str:
    """Name hardware, versions and date of a measurement; the full command is in the file."""
    hardware, versions = result["hardware"], result["versions"]
    where, packages = f"{hardware['cpu']}, {hardware['cores']} cores", ["torch"]
    if gpu := result.get("device", {}).get("name"):
        where, packages = gpu, ["torch", "triton"]
    used = ", ".join(f"{package} {versions[package]}" for package in packages)
    commit = result.get("package", {}).get("commit")
    at = f", commit {commit}" if commit else ""
    return (
        f"<sub>{where}, {used}, {result['date'][:10]}{at}; command and all figures: "
        f"[{file}](benchmarks/results/{file})</sub>"
    )


def main(arguments: list[str] | None = None) -> None:
    argparse.ArgumentParser("python -m benchmarks.report", description=__doc__.splitlines()[0]).parse_args(arguments)
    for page in PAGES:
        page.write_text(render(page))
    written = []
    for image, (file, plot) in PLOTS.items():
        if (RESULTS / file).exists():
            plot(json.loads((RESULTS / file).read_text())).savefig(DOCS / image, dpi=110)
            written.append(image)
    pages = ", ".join(str(page.relative_to(ROOT)) for page in PAGES)
    print(f"wrote the generated parts of {pages}, and {', '.join(written) or 'no plots: no results'}")


if __name__ == "__main__":
    main()

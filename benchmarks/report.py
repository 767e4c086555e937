"""Write the README's tables from the committed result files: ``python -m benchmarks.report``.

Between ``<!-- generated: NAME -->`` and ``<!-- end -->`` stands what section NAME makes of its file. To add a section,
write a function from the parsed file to Markdown and list it in ``SECTIONS``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def loss(result: dict[str, Any]) -> str:
    """Time, memory and error of the pairwise loss beside the floor."""
    shape, contenders = result["shape"], result["contenders"]
    titles = {
        "floor": "floor: the three bare products, outputs preallocated",
        "fused": "`fused_inspo_loss`, forward + backward",
        "full log_softmax": "log_softmax at every position, forward + backward",
    }
    lines = [
        f"{shape['pairs']} pairs, prompt {shape['prompt']}, responses {shape['response']}, H = {shape['hidden']}, "
        f"V = {shape['vocab']:,}, {result['dtype']}: {result['scored_tokens']:,} scored of {result['positions']:,} "
        f"positions.",
        "",
        "| | time / floor (quartiles) | seconds | peak memory above inputs | worst error against float64 |",
        "|---|---|---|---|---|",
    ]
    for name, row in contenders.items():
        ratio = row["times_floor"]
        quartiles = "" if name == "floor" else f" ({ratio['q1']:.2f}-{ratio['q3']:.2f})"
        memory = "not measured" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"
        error = "" if row["relative_error"] is None else f"{max(row['relative_error'].values()):.0e}"
        seconds = f"{row['seconds']['median']:.2f}"
        lines.append(f"| {titles[name]} | {ratio['median']:.2f}{quartiles} | {seconds} | {memory} | {error} |")
    return "\n".join([*lines, "", _source(result, "loss_cpu.json")])


def demo(result: dict[str, Any]) -> str:
    """Accuracy of the demo's four models over its seeds."""
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
    """What the table says, in a sentence that cannot say anything else."""
    names = {"base": "the base", "sft": "SFT", "dpo": "DPO", "inspo": "InSPO"}
    ranked = sorted(names, key=lambda name: -summary["sampled"][name]["accuracy"]["mean"])
    inspo = summary["sampled"]["inspo"]
    return (
        f"InSPO's gain over the base is above 0 on {inspo['seeds_with_gain_interval_above_0']} of {summary['seeds']} "
        f"seeds, sampled. By mean sampled accuracy the order is {', '.join(names[name] for name in ranked)}"
        + ("." if ranked[0] == "inspo" else ": InSPO is not first here.")
    )


def real_pairs(result: dict[str, Any]) -> str:
    """Held-out reward accuracies of the fine-tunes on real pairs."""
    data = result["data"]
    lines = [
        f"A byte-level model of {result['model']['parameters'] / 1e6:.2f}M parameters on real preference pairs "
        f"({data['train_pairs']:,} to train on, {data['held_out_pairs']} held out with prompts of their own): "
        "does every objective go all the way through, and where does the held-out reward accuracy end up? Such a model "
        "is far too small to answer anything.",
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
    """Which marginal accuracies differ from one half, in a sentence."""
    above, below = [], []
    for run in runs:
        name = f"{run['objective']}, {'InSPO' if run['conditioned'] else 'plain'}"
        low, high = run["after"]["eval_marginal/rewards/accuracies_ci"]
        (above if low > 0.5 else below if high < 0.5 else []).append(name)
    return (
        f"From the prompt alone (marginal), significantly better than chance: {'; '.join(above) or 'none'}. Worse: "
        f"{'; '.join(below) or 'none'}. So this shows that the path works, not that any objective is good."
    )


def no_drafts(result: dict[str, Any]) -> str:
    """What happens to a base that has never seen the conditioned layout."""
    summary, gaps = result["summary"], [seed["conditioning_gap"] for seed in result["seeds"].values()]
    gap = min(value for seed in gaps for value in seed.values())
    gains = {name: summary["sampled"][name]["gain"] for name in ("inspo", "dpo", "sft")}
    inspo = gains["inspo"]
    return (
        f"In the demo's world, with a base fitted without drafts ({summary['seeds']} seeds), that difference is as low "
        f"as {gap:.1f} nats a token, and InSPO changes the sampled prompt-only accuracy by {inspo['mean']:+.2f} "
        f"({inspo['min']:+.2f} to {inspo['max']:+.2f}), plain DPO by {gains['dpo']['mean']:+.2f}, SFT by "
        f"{gains['sft']['mean']:+.2f}.\n\n" + _source(result, "demo_no_drafts.json")
    )


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "loss": ("loss_cpu.json", loss),
    "demo": ("demo_seeds.json", demo),
    "no_drafts": ("demo_no_drafts.json", no_drafts),
    "real_pairs": ("real_pairs.json", real_pairs),
}


def render(text: str) -> str:
    """``text`` with every generated block written anew."""

    def block(match: re.Match[str]) -> str:
        file, section = SECTIONS[match[2]]
        path = RESULTS / file
        body = section(json.loads(path.read_text())) if path.exists() else "Not yet measured."
        return f"{match[1]}{body}\n{match[3]}"

    return BLOCK.sub(block, text)


def _gain(row: dict[str, Any]) -> str:
    if "gain" not in row:
        return ""
    gain = row["gain"]
    ends = f" ({gain['mean_ci'][0]:+.2f} to {gain['mean_ci'][1]:+.2f})" if "mean_ci" in gain else ""
    return f"{gain['mean']:+.2f}{ends}"


def _source(result: dict[str, Any], file: str) -> str:
    hardware, versions = result["hardware"], result["versions"]
    return (
        f"<sub>{hardware['cpu']}, {hardware['cores']} cores, torch {versions['torch']}, {result['date'][:10]}, "
        f"`{result['command']}`, [{file}](benchmarks/results/{file})</sub>"
    )


def main() -> None:
    README.write_text(render(README.read_text()))
    print(f"wrote the generated parts of {README.name}: {', '.join(SECTIONS)}")


if __name__ == "__main__":
    main()

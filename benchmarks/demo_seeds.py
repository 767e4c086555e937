"""Run the demo on several seeds: does InSPO improve every seed's base, and how does it compare with SFT and DPO?

    python -m benchmarks.demo_seeds --json benchmarks/results/demo_seeds.json

This command calls the demo's own function. It saves the file after each seed, so an interrupted run can continue.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import scipy.stats
import torch
from tqdm import tqdm
from transformers.utils import logging

from training.demo.report import NAMES, table
from training.demo.settings import Settings
from training.demo.stages import run_demo

from .result_files import command, make_parser, provenance, result_file, resumed, write_json
from .tables import markdown, paragraphs


def over_seeds(values: list[float]) -> dict[str, Any]:
    """Return mean, range and, for at least five seeds, the mean's 95% t interval. Seeds are the observations."""
    summary: dict[str, Any] = {"mean": statistics.fmean(values), "min": min(values), "max": max(values)}
    if len(values) >= 5:
        half = scipy.stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        summary["mean_ci"] = [summary["mean"] - half, summary["mean"] + half]
    return summary


def summarize(seeds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Summarize accuracies and gains over the seeds, and count seeds whose gain has an interval above 0."""
    summary: dict[str, Any] = {"seeds": len(seeds)}
    for how in ("greedy", "sampled"):
        for name in NAMES:
            rows = [results["models"][name][how] for results in seeds.values()]
            entry: dict[str, Any] = {"accuracy": over_seeds([row["accuracy"] for row in rows])}
            if name != "base":
                entry["gain"] = over_seeds([row["gain"] for row in rows])
                entry["seeds_with_gain_interval_above_0"] = sum(row["gain_ci"][0] > 0 for row in rows)
            summary.setdefault(how, {})[name] = entry
    return summary


def demo(result: dict[str, Any]) -> str:
    """Tabulate the accuracy of the demo's four models over its seeds."""
    summary, table = result["summary"], []
    for name, title in (("base", "base"), ("sft", "SFT on the chosen"), ("dpo", "DPO"), ("inspo", "InSPO-DPO")):
        rows = [summary[how][name] for how in ("greedy", "sampled")]
        above = [row.get("seeds_with_gain_interval_above_0") for row in rows]
        texts = [text for row in rows for text in (f"{row['accuracy']['mean']:.2f}", _gain(row))]
        table.append([title, *texts, "" if name == "base" else f"{above[0]} greedy, {above[1]} sampled"])
    titles = ["greedy: right", "gain over base", "sampled: right", "gain over base", "seeds with gain > 0 (95%)"]
    return paragraphs(
        f"Answers to unseen prompts in the demo's world, given the prompt alone and graded exactly; {summary['seeds']} "
        "seeds, each with its own base, data and initialisation:",
        markdown(["", *titles], table),
        _demo_ranking(summary),
    )


def _demo_ranking(summary: dict[str, Any]) -> str:
    """Return a sentence that ranks the methods by the table's numbers."""
    names = {"base": "the base", "sft": "SFT", "dpo": "DPO", "inspo": "InSPO"}
    ranked = sorted(names, key=lambda name: -summary["sampled"][name]["accuracy"]["mean"])
    inspo = summary["sampled"]["inspo"]
    return (
        "With sampled answers, the 95% interval of InSPO's gain over the base is above 0 on "
        f"{inspo['seeds_with_gain_interval_above_0']} of {summary['seeds']} seeds. By mean sampled accuracy, the "
        f"order is {', '.join(names[name] for name in ranked)}"
        + ("." if ranked[0] == "inspo" else ": InSPO is not first here.")
    )


def _gain(row: dict[str, Any]) -> str:
    if "gain" not in row:
        return ""
    gain = row["gain"]
    ends = f" ({gain['mean_ci'][0]:+.2f} to {gain['mean_ci'][1]:+.2f})" if "mean_ci" in gain else ""
    return f"{gain['mean']:+.2f}{ends}"


def main() -> None:
    parser = make_parser("demo_seeds", __doc__)
    parser.add_argument("--json", type=result_file, required=True, help="result file; finished seeds in it are kept")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)), help="seeds to run [0 to 9]")
    parser.add_argument("--quick", action="store_true", help="use the demo's quick sizes")
    parser.add_argument("--draft_share", type=float, help="share of the base's rows with a draft before the answer")
    options = parser.parse_args()
    logging.disable_progress_bar()

    def make(seed: int = 0) -> Settings:
        settings = Settings.quick(seed) if options.quick else Settings(seed)
        return settings if options.draft_share is None else replace(settings, draft_share=options.draft_share)

    torch.set_num_threads(make().threads)  # the demo's own defaults, which the result file names
    settings = json.loads(json.dumps({k: v for k, v in asdict(make()).items() if k != "seed"}))
    given = command("benchmarks.demo_seeds", sys.argv[1:], options.json)
    result = {**provenance(given), "settings": settings, "summary": {}, "seeds": {}}
    result = resumed(parser, "--json", options.json, result, ("settings", "versions", "hardware"), table="seeds")

    for seed in tqdm(options.seeds, desc="seeds", unit="seed"):
        if str(seed) in result["seeds"]:
            continue
        with tempfile.TemporaryDirectory() as folder:
            results = run_demo(make(seed=seed), Path(folder) / "demo", say=lambda line: None)
        tqdm.write(f"seed {seed}, {results['seconds']['total']:.0f} s\n{table(results)}")
        del results["settings"]
        result["seeds"][str(seed)] = results
        write_json(options.json, result | {"summary": summarize(result["seeds"])})
    result["summary"] = summarize(result["seeds"])
    write_json(options.json, result)
    print(demo(result))


if __name__ == "__main__":
    main()

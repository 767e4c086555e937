"""Write the tables in README.md and docs/, and the plots, from the result files: ``python -m benchmarks.report``.

Section NAME fills the lines between ``<!-- generated: NAME -->`` and ``<!-- end -->`` from its file. To add a section,
write a function that turns the parsed file into Markdown, and list it in ``SECTIONS``. ``PLOTS`` lists the plots.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from . import demo_seeds, parallel, plots
from .result_files import make_parser
from .speed_tables import gpu, gpu_form, gpu_savings, logps, loss, savings, scaling, step, trainers
from .study import axis_report, code_report
from .study.report import against_plain, finding
from .tables import markdown, paragraphs, ratio_text, source

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCS = ROOT / "docs"
BLOCK_START = "<!-- generated: "
PAGES = tuple(page for page in (README, *sorted(DOCS.glob("*.md"))) if BLOCK_START in page.read_text())
BLOCK = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def real_pairs(result: dict[str, Any]) -> str:
    """Tabulate held-out reward accuracies of the fine-tunes on real pairs."""
    data, table = result["data"], []
    for run in result["runs"]:
        texts = []
        for layout in ("conditioned", "marginal"):
            accuracy, ends = (run["after"][f"eval_{layout}/rewards/{what}"] for what in ("accuracies", "accuracies_ci"))
            texts.append(f"{accuracy:.2f} ({ends[0]:.2f}-{ends[1]:.2f})")
        table.append([_run_name(run), *texts])
    return paragraphs(
        f"We fine-tuned a byte-level model with {result['model']['parameters'] / 1e6:.2f}M parameters on "
        f"{data['train_pairs']:,} real preference pairs and held out {data['held_out_pairs']} pairs of other prompts. "
        "Every objective runs from data to a saved model that generates. The table shows the held-out reward accuracy. "
        "Such a model is far too small to answer anything.",
        markdown(["", "conditioned accuracy (95%)", "marginal accuracy (95%)"], table),
        _against_chance(result["runs"]),
    )


def _run_name(run: dict[str, Any]) -> str:
    return f"{run['objective']}, {'InSPO' if run['conditioned'] else 'plain'}"


def _against_chance(runs: list[dict[str, Any]]) -> str:
    """Return a sentence that lists the marginal accuracies that differ from one half."""
    above: list[str] = []
    below: list[str] = []
    for run in runs:
        low, high = run["after"]["eval_marginal/rewards/accuracies_ci"]
        (above if low > 0.5 else below if high < 0.5 else []).append(_run_name(run))
    return (
        "Given the prompt alone (marginal), by the intervals of one seed, not adjusted for their number: better "
        f"than chance: {'; '.join(above) or 'none'}; worse: {'; '.join(below) or 'none'}. This shows that the "
        "pipeline works, not that any objective is good."
    )


def no_drafts(result: dict[str, Any]) -> str:
    """Report results for a base that has never seen the conditioned layout."""
    summary, gaps = result["summary"], [seed["conditioning_gap"] for seed in result["seeds"].values()]
    gap = min(value for seed in gaps for value in seed.values())
    gains = {name: summary["sampled"][name]["gain"] for name in ("inspo", "dpo", "sft")}
    inspo = gains["inspo"]
    return paragraphs(
        f"In the demo's world, on bases fitted without drafts ({summary['seeds']} seeds), an answer after the other "
        f"answer has a log-prob that is up to {-gap:.1f} nats per token lower. InSPO changes the sampled prompt-only "
        f"accuracy by {inspo['mean']:+.2f} ({inspo['min']:+.2f} to {inspo['max']:+.2f}), plain DPO by "
        f"{gains['dpo']['mean']:+.2f}, SFT by {gains['sft']['mean']:+.2f}.",
    )


def helps(result: dict[str, Any]) -> str:
    """Return the README's sentences on whether InSPO helped in the project's studies."""
    few_passes = json.loads((RESULTS / "study" / "study.json").read_text())
    return (
        "We compared answers to the prompt alone in small worlds where a program grades every answer. After two passes "
        f"over the pairs, {against_plain(few_passes)}. {axis_report.short_finding(result)} "
        "All of this holds for tiny models."
    )


def loop_overhead(result: dict[str, Any]) -> str:
    """Return a sentence on the loop's overhead over its bare steps."""
    rounds = len(result["seconds"]["loop"])
    return paragraphs(
        f"With metrics, logs, finite checks and a checkpoint every {result['save_every']} steps, the loop took "
        f"{ratio_text(result['loop_over_bare'])} times as long as its bare steps (median and quartiles of {rounds} "
        f"rounds of {result['steps']} steps).",
    )


SECTIONS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "savings": ("loss_cpu.json", savings),
    "loss": ("loss_cpu.json", loss),
    "logps": ("logps_cpu.json", logps),
    "scaling": ("scaling_cpu.json", scaling),
    "step": ("step_cpu.json", step),
    "trainers": ("trl_step_cpu.json", trainers),
    "gpu": ("gpu.json", gpu),
    "gpu_savings": ("gpu.json", gpu_savings),
    "gpu_form": ("gpu_library_form.json", gpu_form),
    "split_heads": ("parallel_cpu.json", parallel.tables),
    "loop_overhead": ("loop_overhead.json", loop_overhead),
    "study": ("study/study.json", finding),
    "helps": ("study_axis/axis.json", helps),
    "axis": ("study_axis/axis.json", axis_report.finding),
    "code": ("study_code/study_code.json", code_report.finding),
    "demo": ("demo_seeds.json", demo_seeds.demo),
    "no_drafts": ("demo_no_drafts.json", no_drafts),
    "real_pairs": ("real_pairs.json", real_pairs),
}
# Their own text or page names the source of their figures.
UNSOURCED = ("savings", "study", "helps", "axis", "code")


PLOTS: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "scaling_cpu.png": ("scaling_cpu.json", plots.plot_scaling),
    "step_cpu.png": ("step_cpu.json", plots.plot_step),
}


def body(name: str) -> str:
    """Return a section's text and the source of its figures."""
    file, text_of = SECTIONS[name]
    if not (RESULTS / file).exists():
        return "Not yet measured."
    result = json.loads((RESULTS / file).read_text())
    return text_of(result) if name in UNSOURCED else paragraphs(text_of(result), source(result, file))


def render(page: Path) -> str:
    """Return the page's text with every generated block updated and links relative to the page's folder."""
    in_docs = page.parent == DOCS

    def block(match: re.Match[str]) -> str:
        text = body(match[2])
        if in_docs:
            text = text.replace("](benchmarks/", "](../benchmarks/").replace("](docs/", "](")
        return f"{match[1]}{text}\n{match[3]}"

    return BLOCK.sub(block, page.read_text())


def main(arguments: list[str] | None = None) -> None:
    make_parser("report", __doc__).parse_args(arguments)
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

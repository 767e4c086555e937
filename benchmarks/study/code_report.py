# ruff: noqa: RUF001  (minus signs, primes and Greek letters are meant)
"""Write ``study_code.md`` and its picture from the summary that ``benchmarks.study.code_study`` computes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .code_runs import ARMS, Size
from .markdown import filled, item, listed, mean_text, p_value, signed, table
from .report import DOCS

RESULTS = Path(__file__).parent.parent / "results" / "study_code"
COLORS = {"plain": "tab:orange", "inspo": "tab:blue", "dropout": "tab:green", "shuffled": "tab:purple", "sft": "black"}
# Deviations that the code cannot detect.
DEVIATIONS = [
    "While the base was fitted, answers were sampled 256 rows at a time; the code now uses 512. This may change the "
    "rounding of the drafts' log-probs, so a newly fitted base may differ.",
]
CLAIMS = {
    ("H1", "better"): "After {epochs} passes over the pairs, InSPO answered better than plain DPO.",
    ("H1", "worse"): "After {epochs} passes over the pairs, InSPO answered worse than plain DPO.",
    ("H1", "equivalent"): "After {epochs} passes over the pairs, InSPO and plain DPO did equally well.",
    (
        "H1",
        "undecided",
    ): "After {epochs} passes over the pairs, we found neither a difference between InSPO and plain "
    "DPO nor equivalence.",
    ("H2", "better"): "When each stopped at its best epoch by validation, InSPO answered better than plain DPO.",
    ("H2", "worse"): "When each stopped at its best epoch by validation, InSPO answered worse than plain DPO.",
    ("H2", "equivalent"): "When each stopped at its best epoch by validation, InSPO and plain DPO did equally well.",
    ("H2", "undecided"): "When each stopped at its best epoch by validation, we found neither a difference nor "
    "equivalence.",
    ("H3", "better"): "The pair's own other response served better than another pair's.",
    ("H3", "worse"): "Another pair's response served better than the pair's own.",
    ("H3", "equivalent"): "Another pair's response served as well as the pair's own: no sign of reflection.",
    ("H3", "undecided"): "We cannot tell whether the pair's own other response matters.",
}


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report and its picture to ``folder``, or to ``docs`` for the committed results. Return the files."""
    folder = DOCS if folder.resolve() == RESULTS.resolve() else folder
    page, picture = folder / "study_code.md", folder / "study_code.png"
    page.write_text(text(result))
    draw(result, picture)
    return [page, picture]


def finding(result: Mapping[str, Any]) -> str:
    """Return the protocol's conclusions in words."""
    epochs = result["arms"]["plain"][-1]["epoch"]
    claims = [CLAIMS[name, test["decision"]] for name, test in result["hypotheses"].items()]
    for place, (name, test) in zip(("first", "second", "third"), _tests_again(result)):
        if test["decision"] != result["hypotheses"][name]["decision"]:
            claims.append(
                f"A repeat with a newly fitted base did not confirm the {place} of these findings: it decided "
                f'"{test["decision"]}".'
            )
    return " ".join(claim.format(epochs=epochs) for claim in claims)


def _tests_again(result: Mapping[str, Any]) -> list[tuple[str, Any]]:
    repeat = result.get("repeat")
    return list(repeat["hypotheses"].items()) if repeat else []


def text(result: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    sections = [
        "# Does InSPO help on real text? A second study",
        "<!-- written by python -m benchmarks.study.code_study; do not edit -->",
        *_warnings(result),
        filled(_opening(result)),
        "![quality over epochs](study_code.png)",
        _world(result),
        _hypotheses(result),
        *_repeat(result),
        _arms(result),
        _others(result),
        _limits(result),
        _deviations(result),
        _rerun(result),
    ]
    return "\n\n".join(sections) + "\n"


def _warnings(result: Mapping[str, Any]) -> list[str]:
    if result["settings"]["size"]["hidden_size"] < Size().hidden_size:
        return ["**Tiny sizes: everything runs, nothing is learned, and nothing follows from these numbers.**"]
    return []


def _learned(result: Mapping[str, Any]) -> str:
    """Say whether anything was learned and whether plain was over-trained, as the protocol requires."""

    def among(gains: Mapping[str, Mapping[str, float]], sign: int) -> str:
        return listed([ARMS[arm].title for arm, g in gains.items() if (g["low"] > 0 if sign > 0 else g["high"] < 0)])

    chosen = {arm: found["gain"] for arm, found in result["chosen"].items()}
    last = {arm: result["arms"][arm][-1]["gain"] for arm in ARMS}
    better, worse = among(chosen, 1), among(last, -1)
    drop = result["others"]["plain, last epoch - plain, chosen epoch"]["quality"]
    learned = f"At the chosen epoch, quality was above the base's for {better}."
    if not better:
        learned = """At the chosen epoch, no arm's quality was measurably above the base's: nothing was learned. Equal
            quality there therefore says little."""
    words = [
        f"Plain DPO was {'' if drop['high'] < 0 else 'not measurably '}over-trained after the last epoch: "
        f"its quality changed by {signed(drop)} from its chosen epoch.",
        f"After the last epoch, quality was below the base's for {worse}." if worse else "",
        learned,
    ]
    return " ".join(filter(None, words))


def _opening(result: Mapping[str, Any]) -> str:
    size = result["settings"]["size"]
    return f"""
        A small model completes functions of the Python standard library. Its answers are graded by whether they compile
        and whether the names that they read are bound. {finding(result)}
        {_learned(result)} These results come from {len(result["seeds"])} seeds of one base with {size["pairs"]} pairs
        each, and hold for this world alone. [The protocol](study_protocol_code.md) fixed the rules beforehand."""


def _world(result: Mapping[str, Any]) -> str:
    size, judge, started = result["settings"]["size"], result["settings"]["judge"], result["started"]
    base, library, pairs = result["arms"]["base"][0], started["library"], result["pairs"]

    def mean(name: str) -> float:
        return float(np.mean([pair[name] for pair in pairs]))

    gap, lengths = np.mean([p["gap"] for p in pairs], 0), np.mean([p["lengths"] for p in pairs], 0)
    grading = filled(f"""
        **Prompt:** a function's header and the first line of its docstring. **Answer:** its body. **Quality:** 0 if the
        function does not compile or the answer does not end. Otherwise ½ + ½ · (share of the names read by the body
        that are bound), or ½ if the body reads no name. **Judge:** P(first preferred) = σ({judge["a"]:g} Δquality +
        {judge["b"]:g} Δlength in tokens). {judge["noise"]:.0%} of its labels are flipped. Training sees only these
        labels.""")
    data = filled(f"""
        **Text:** {library["files"]} files of the standard library of Python {started["versions"]["python"]}.
        `ast.unparse` rewrites each function. Modules are split by name, so no module is in two splits. The study uses
        functions whose prompt and body fit in {size["most_tokens"]} tokens each: {library["training"][0]:,} for
        training, of which {library["training"][1]:,} have a docstring and serve as prompts;
        {library["validation"][1]:,} validation and {library["test"][1]:,} test prompts. Tokens come from a byte-pair
        encoding of size {size["vocabulary"]:,}, trained on the training split.""")
    model = filled(f"""
        **Base:** a Llama with {started["base"]["parameters"] / 1e6:.2f}M parameters, fitted once and shared by all
        seeds. {size["draft_share"]:.0%} of its rows have a draft between prompt and body: a corrupted body, or late in
        training also the model's own answer. **Pairs:** of four sampled answers, the two with the judge's highest and
        lowest score. The chosen answer is better in {mean("chosen_better"):.0%} of the pairs and worse in
        {mean("chosen_worse"):.0%}. On average the chosen answer has {lengths[0]:.1f} tokens and the rejected answer
        {lengths[1]:.1f}. The base's log π(y|x,y′) − log π(y|x) is {gap[0]:+.2f} nats per token for chosen and
        {gap[1]:+.2f} for rejected answers.""")
    reward = filled(f"""
        **Does the reward vary?** The base's sampled answers to test prompts have quality
        {base["quality"]["mean"]:.3f}, and {base["compiles"]["mean"]:.0%} of them compile. Greedy answers have quality
        {base["greedy"]["mean"]:.3f}.""")
    return "\n\n".join(["## The world", grading, data, model, reward])


COLUMNS = ["hypothesis", "difference (95%)", "p", "Holm p", "90% interval", "decision"]


def _test_row(name: str, test: Mapping[str, Any]) -> list[str]:
    return [
        f"{name}: {test['claim']}",
        signed(test["quality"]),
        p_value(test["quality"]["p"]),
        p_value(test["holm_p"]),
        f"{test['narrow']['low']:+.3f} to {test['narrow']['high']:+.3f}",
        test["decision"],
    ]


def _repeat(result: Mapping[str, Any]) -> list[str]:
    """Return the section on a repeat of the study, if there is one."""
    if not (tests := _tests_again(result)):
        return []
    repeat = result["repeat"]
    now, then = (which["base"]["fit_loss"] for which in (repeat, result["started"]))
    note = f"""
        All runs were repeated on {repeat["date"]} with commit {repeat["package"]["commit"]} and the same seeds. The
        base was fitted anew ({now:.4f} nats per token, {then:.4f} before), so the pairs differ, too. The conclusions
        above rest on the first runs. The repeat decides:"""
    rows = [_test_row(*test) for test in tests]
    lines = "Its runs are in [repeat.jsonl](../benchmarks/results/study_code/repeat.jsonl)."
    return ["\n".join(["## A repeat", "", filled(note), "", *table(COLUMNS, rows), "", lines])]


def _hypotheses(result: Mapping[str, Any]) -> str:
    rows = [_test_row(*test) for test in result["hypotheses"].items()]
    chosen = "; ".join(
        f"{ARMS[arm].title} {', '.join(map(str, found['epochs']))}" for arm, found in result["chosen"].items()
    )
    note = f"""
        These are differences in quality of sampled answers to test prompts, paired by seed, with t intervals over
        {len(result["seeds"])} seeds. Better or worse means Holm p < 0.05. Equivalent means that the 90% interval lies
        within ±{result["margin"]:g}. Undecided means neither. Epochs chosen on validation prompts, in order of the
        seeds: {chosen}."""
    return "\n".join(["## The hypotheses", "", *table(COLUMNS, rows), "", filled(note)])


def _arms(result: Mapping[str, Any]) -> str:
    columns = [
        "",
        "epoch",
        "quality (95%)",
        "gain over base (95%)",
        "greedy",
        "greedy gain (95%)",
        "compiles",
        "tokens",
        "judge: wins over base",
    ]
    rows = []
    for arm, epochs in result["arms"].items():
        chosen = [] if arm == "base" else [{"epoch": "chosen", **result["chosen"][arm]}]
        for row in [*epochs, *chosen]:
            title = "base" if arm == "base" else ARMS[arm].title
            gains = ["" if arm == "base" else signed(row[what]) for what in ("gain", "greedy_gain")]
            rows.append(
                [
                    title,
                    row["epoch"],
                    mean_text(row["quality"]),
                    gains[0],
                    f"{row['greedy']['mean']:.3f}",
                    gains[1],
                    f"{row['compiles']['mean']:.3f}",
                    f"{row['length']['mean']:.1f}",
                    f"{row['win_rate']['mean']:.3f}",
                ]
            )
    tokens = "; ".join(f"{ARMS[arm].title} {count:,.0f}" for arm, count in result["tokens"].items())
    size = result["settings"]["size"]
    note = f"""
        All answers are given from the prompt alone. Each of a seed's {size["test_prompts"]} test prompts gets
        {size["samples"]} answers sampled at temperature 1 and one greedy answer. Gains are paired by seed. "Chosen" is
        the epoch chosen on validation prompts. A run makes {listed([str(u) for u in result["updates"]])} updates.
        Tokens processed per run: {tokens}."""
    return "\n".join(["## All arms", "", *table(columns, rows), "", filled(note)])


def _others(result: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            signed(other["quality"]),
            signed(other["greedy"]),
            signed(other["win_rate"]),
            f"{other['length']['mean']:+.1f}",
        ]
        for name, other in ({n: h for n, h in result["hypotheses"].items()} | dict(result["others"])).items()
    ]
    columns = ["", "quality (95%)", "greedy quality (95%)", "judge: wins over base (95%)", "tokens"]
    note = "These 95% t intervals are descriptive and not adjusted for their number. No conclusion rests on them."
    return "\n".join(["## Other differences", "", *table(columns, rows), "", note])


def _limits(result: Mapping[str, Any]) -> str:
    size = result["settings"]["size"]
    points = [
        "All seeds share one base. The intervals cover pairs, prompts and sampling, not another base.",
        """Quality does not measure whether a body does what its docstring says. A short body with bound names has
        quality 1.""",
        """The base was fitted to the functions behind the pairs' prompts, so its answers to these prompts may be better
        than its answers to validation and test prompts, which come from other modules.""",
        f"""{size["pairs"]} pairs are few. All DPO arms use the learning rate {size["learning_rate"]:g}, which was not
        tuned for any arm.""",
    ]
    return "\n".join(["## Limits", "", *(item(point) for point in points)])


def _deviations(result: Mapping[str, Any]) -> str:
    found = []
    if len(result["seeds"]) < result["planned_seeds"]:
        found.append(f"{len(result['seeds'])} of {result['planned_seeds']} seeds are finished; the others are missing.")
    found += DEVIATIONS
    items = [item(one) for one in found] or ["None."]
    return "\n".join(["## Deviations from the protocol", "", *items])


def _rerun(result: Mapping[str, Any]) -> str:
    hardware, started = result["hardware"], result["started"]
    note = filled(f"""
        The first run started on {started["date"]} with commit {started["package"]["commit"]}. All runs took
        {result["run_seconds"] / 60:.0f} minutes, after {started["base"]["seconds"] / 60:.0f} minutes of fitting, on one
        thread of {hardware["cpu"]}, shared with other work; torch {result["versions"]["torch"]}. Every run is a line of
        [runs.jsonl](../benchmarks/results/study_code/runs.jsonl) with the quality and length of its answers.
        [study_code.json](../benchmarks/results/study_code/study_code.json) and this page are computed from these
        lines.""")
    return f"""## Rerun it

```bash
python -m benchmarks.study.code_study --json FILE           # continues after an interruption
python -m benchmarks.study.code_study --quick --json FILE   # tiny sizes
```

{note}"""


def draw(result: Mapping[str, Any], file: Path) -> None:
    """Draw gains over the base by epoch, sampled and greedy."""
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display and no global state

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, what, title in zip(
        figure.subplots(1, 2, sharey=True), ("gain", "greedy_gain"), ("sampled at temperature 1", "greedy")
    ):
        for place, arm in enumerate(ARMS):
            rows = result["arms"][arm]
            xs = np.array([row["epoch"] for row in rows]) * 1.04 ** (place - 2)
            values = [row[what] for row in rows]
            means = np.array([value["mean"] for value in values])
            spread = [means - [v["low"] for v in values], [v["high"] for v in values] - means]
            axes.errorbar(
                xs, means, yerr=spread, fmt="o-", ms=4, lw=1, capsize=2, color=COLORS[arm], label=ARMS[arm].title
            )
        axes.axhline(0, color="gray", ls=":", label="base")
        axes.set_xscale("log")
        epochs = [row["epoch"] for row in result["arms"]["plain"]]
        axes.set_xticks(epochs, [str(epoch) for epoch in epochs], minor=False)
        axes.minorticks_off()
        axes.set(title=f"Answers from the prompt alone, {title}", xlabel="passes over the pairs")
        axes.grid(alpha=0.3, axis="y")
    figure.axes[0].set(ylabel="quality - base's, paired by seed, 95%")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), fontsize=8, ncols=3, loc="outside lower center")
    figure.savefig(file, dpi=100, metadata={"Software": None})

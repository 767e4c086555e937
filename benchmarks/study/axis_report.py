# ruff: noqa: RUF001  (minus signs and multiplication signs are meant)
"""Write ``docs/study_axis.md`` and its picture from ``axis.json``: ``python -m benchmarks.study.axis_report``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .axis import AXIS_PLANS, BASE
from .axis_summary import LEVEL, MARGIN, TITLES
from .markdown import filled, item, p_value, signed, table
from .pictures import draw_axis
from .report import DOCS

RESULTS = Path(__file__).parent.parent / "results" / "study_axis"
HYPOTHESES = {
    "H1": "InSPO − plain, both after {updates} updates",
    "H2": "InSPO − plain, each at its best number of updates",
    "H3": "own − another pair's alternative, both after {updates} updates",
}


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report and its picture to ``folder``. Return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    page, picture = folder / "study_axis.md", folder / "study_axis.png"
    page.write_text(text(result))
    draw_axis(result, TITLES, picture)
    return [page, picture]


def finding(result: Mapping[str, Any]) -> str:
    """Return one sentence each on the outcomes of H1, H2 and H3."""
    return " ".join(sentences(result))


def short_finding(result: Mapping[str, Any]) -> str:
    """Return one sentence on the outcome of H1."""
    plan, test = result["plan"], result["hypotheses"]["H1"]
    updates, pairs = plan["tested_updates"], plan["pairs"][0]
    found = {
        "supported": "InSPO-DPO scored higher than plain DPO",
        "contradicted": "InSPO-DPO scored lower than plain DPO",
        "neither": "InSPO-DPO did not differ significantly from plain DPO",
    }[test["verdict"]]
    fallen = "; both scored lower than their base" if _both_fell(result) else ""
    passes = updates * plan["size"]["update_pairs"] // pairs
    return f"After {passes} passes over {pairs} pairs, {found} ({_interval(test)}){fallen}."


def _both_fell(result: Mapping[str, Any]) -> bool:
    """Return whether InSPO and plain DPO are below their base after the tested updates, by their 95% intervals."""
    plan = result["plan"]
    arms, updates = result["cells"][str(plan["pairs"][0])], str(plan["tested_updates"])
    return all(arms[arm]["updates"][updates]["greedy"][f"minus {BASE}"]["high"] < 0 for arm in ("plain", "inspo"))


def sentences(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the sentences on H1, H2 and H3."""
    plan, tests = result["plan"], result["hypotheses"]
    updates, pairs = plan["tested_updates"], plan["pairs"][0]
    passes = updates * plan["size"]["update_pairs"] // pairs
    h1, h2, h3 = (_interval(tests[name]) for name in ("H1", "H2", "H3"))
    first = {
        "supported": f"InSPO-DPO answered better from the prompt alone than plain DPO did ({h1})",
        "contradicted": f"InSPO-DPO answered worse from the prompt alone than plain DPO did ({h1})",
        "neither": f"we found no significant difference between InSPO-DPO and plain DPO ({h1})",
    }
    second = {
        "supported": f"InSPO-DPO was also better when each stopped at its best number of updates ({h2})",
        "contradicted": f"Plain DPO was better when each stopped at its best number of updates ({h2})",
        "equal": f"When each stopped at its best number of updates, the two were equally good within {MARGIN:g} ({h2})",
        "neither": f"When each stopped at its best number of updates, we found no significant difference ({h2}), but "
        "could not show them equally good either",
    }
    third = {
        "supported": f"Another pair's response as the alternative served less well than the pair's own ({h3})",
        "contradicted": f"Another pair's response as the alternative served better than the pair's own ({h3})",
        "equal": f"Another pair's response as the alternative served as well as the pair's own within {MARGIN:g} "
        f"({h3})",
        "neither": f"Between the pair's own alternative and another pair's we found no significant difference ({h3}), "
        "but could not show them equally good either",
    }
    verdicts = [tests[name]["verdict"] for name in HYPOTHESES]
    fallen = ", both below the base that they started from" if _both_fell(result) else ""
    return (
        f"In a world of tiny models with exact grades, after {passes} passes over {pairs} pairs "
        f"({tests['H1']['n']} seeds), {first[verdicts[0]]}{fallen}.",
        f"{second[verdicts[1]]}.",
        f"{third[verdicts[2]]}.",
    )


def _interval(value: Mapping[str, float]) -> str:
    return f"{value['mean']:+.3f} in quality, 95% interval {value['low']:+.3f} to {value['high']:+.3f}"


def text(result: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    sections = [
        "# Does conditioning help after many passes over the pairs?",
        "<!-- written by python -m benchmarks.study; do not edit -->",
        *_warnings(result),
        filled(finding(result)),
        filled(
            "The [protocol](study_protocol.md) fixed the rules beforehand. It also describes world, arms and training. "
            "[The first study](study.md) compares objectives and controls with few passes."
        ),
        "![gain over the base by updates](study_axis.png)",
        _hypotheses(result),
        _deviations(result),
        *_cells(result),
        *_decodings(result),
        _rerun(result),
    ]
    return "\n\n".join(sections) + "\n"


def _warnings(result: Mapping[str, Any]) -> Iterator[str]:
    if result["plan"]["size"]["hidden_size"] < AXIS_PLANS["full"].size.hidden_size:
        yield "**Tiny sizes: everything runs, nothing is learned, and nothing follows from these numbers.**"
    elif result["runs"] < result["planned"]:
        yield f"**Not finished: {result['runs']} of {result['planned']} runs.**"


def _hypotheses(result: Mapping[str, Any]) -> str:
    plan, tests = result["plan"], result["hypotheses"]
    rows = [
        [
            name,
            HYPOTHESES[name].format(updates=plan["tested_updates"]),
            test["n"],
            signed(test),
            f"{test['sd']:.3f}",
            p_value(test["holm_p"]),
            {"neither": "not significant", "equal": "not significant"}.get(test["verdict"], test["verdict"]),
            test["conclusion"],
        ]
        for name, test in tests.items()
    ]
    columns = [
        "",
        "difference in exact quality, greedy",
        "seeds",
        "mean (95%)",
        "sd",
        "Holm p",
        "verdict",
        "conclusion",
    ]
    names = HYPOTHESES | {"dropout": "50% dropout − InSPO, both after {updates} updates"}
    equal = [
        [
            names[name].format(updates=plan["tested_updates"]),
            test["n"],
            signed(test),
            p_value(test["p"]),
            "yes" if test["equivalent"] else "not shown",
        ]
        for name, test in result["equivalence"].items()
    ]
    over, stopping = result["over_trained"], result["stopping"]
    training = f"""
        Plain DPO after {plan["tested_updates"]} updates − plain DPO at its best number of updates:
        {signed(over)}, p {p_value(over["p"]) or "not defined"}, so this cell
        {"is over-trained" if over["over_trained"] else "is not shown to be over-trained"}. InSPO after
        {plan["tested_updates"]} updates − plain DPO at its best number of updates: {signed(stopping)}.
        {_edge(result)}"""
    intro = f"""
        All three use {plan["pairs"][0]} pairs. Differences are paired by seed. Holm's method adjusts H1 to H3 together,
        at level {LEVEL:g}."""
    return "\n".join(
        [
            "## The three hypotheses",
            "",
            filled(intro),
            "",
            *table(columns, rows),
            "",
            f"Equally good within ±{MARGIN:g}, by two one-sided tests at level {LEVEL:g}:",
            "",
            *table(["difference", "seeds", "mean (90%)", "p", "as good"], equal),
            "",
            filled(training),
        ]
    )


def _edge(result: Mapping[str, Any]) -> str:
    """Describe plain DPO's best stop, and whether stopping before the first checkpoint might have been better."""
    plan = result["plan"]
    best = result["cells"][str(plan["pairs"][0])]["plain"]["best"]
    fewest = str(plan["checkpoints"][0])
    words = f"""At its best number of updates, plain DPO's greedy quality differs from the base's by
        {signed(best["greedy"][f"minus {BASE}"])}."""
    if at_edge := best["chosen"][fewest]:
        words += f""" This number is {fewest}, the smallest allowed, on {at_edge} of {sum(best["chosen"].values())}
            seeds. An even earlier stop might be better, so H2 compares the arms at an early stop, not necessarily at
            the best stop."""
    return words


def _deviations(result: Mapping[str, Any]) -> str:
    found = result["deviations"]
    return "\n".join(["## Deviations from the protocol", "", *(map(item, found) if found else ["None."])])


def _cells(result: Mapping[str, Any]) -> Iterator[str]:
    plan = result["plan"]
    checkpoints = [str(updates) for updates in plan["checkpoints"]]
    for pairs, arms in result["cells"].items():
        passes = [int(updates) * plan["size"]["update_pairs"] / int(pairs) for updates in checkpoints]
        columns = ["", "seeds", *(f"{u} updates ({p:g} passes)" for u, p in zip(checkpoints, passes)), "at its best"]
        gains, against = [], []
        for arm, cell in arms.items():
            if "best" in cell:
                rows = [*(cell["updates"][updates]["greedy"] for updates in checkpoints), cell["best"]["greedy"]]
                name = [TITLES[arm], str(cell["seeds"])]
                gains.append([*name, *(signed(row[f"minus {BASE}"]) for row in rows)])
                if arm != "plain" and "minus plain" in rows[0]:
                    against.append([*name, *(signed(row["minus plain"]) for row in rows)])
        if gains:
            yield "\n".join(
                [
                    f"## {pairs} pairs",
                    "",
                    "Gain in exact quality of greedy answers over the base (95%, not adjusted):",
                    "",
                    *table(columns, gains),
                    "",
                    "Difference from plain DPO, with equal updates or each arm at its best:",
                    "",
                    *table(columns, against),
                    "",
                    filled(_chosen(arms)),
                ]
            )


def _chosen(arms: Mapping[str, Any]) -> str:
    parts = []
    for arm, cell in arms.items():
        if "best" in cell:
            counts = ", ".join(f"{u} on {n}" for u, n in cell["best"]["chosen"].items() if n)
            parts.append(f"{TITLES[arm]} {counts}")
    return f"Best number of updates on validation prompts, with the number of seeds: {'; '.join(parts)}."


def _decodings(result: Mapping[str, Any]) -> Iterator[str]:
    plan, base = result["plan"], result["base"]
    few, updates = str(plan["pairs"][0]), str(plan["tested_updates"])
    columns = ["", *(f"{how}: {what}" for how in _DECODINGS for what in ("quality", "tokens"))]
    note = """Rows with fewer seeds use the first seeds, so compare arms by the differences, not by the means. "Sampled"
        means at temperature 1. Right answers have 3 to 8 tokens, without fillers."""
    for where, at in ((f"after {updates} updates", updates), ("each arm at its best number of updates", None)):
        rows = [["base", *(f"{base[d][w]:.{3 if w == 'quality' else 1}f}" for d in _DECODINGS for w in _WHAT)]]
        differences = []
        for arm, cell in result["cells"][few].items():
            if "best" not in cell:
                continue
            row = cell["best"] if at is None else cell["updates"][at]
            means = ((f"{row[d]['quality']['mean']:.3f}", f"{row[d]['length']:.1f}") for d in _DECODINGS)
            rows.append([TITLES[arm], *(value for pair in means for value in pair)])
            for other in ("plain", BASE):
                if f"minus {other}" in row["greedy"]:
                    name = f"{TITLES[arm]} − {TITLES[other]}"
                    differences.append([name, *(signed(row[d][f"minus {other}"]) for d in _DECODINGS)])
        yield "\n".join(
            [
                f"## Other decodings, {few} pairs, {where}",
                "",
                *table(columns, rows),
                "",
                *([filled(note), ""] if at else []),  # once is enough
                f"Differences in exact quality, {where}, paired by seed (95%, not adjusted):",
                "",
                *table(["", *_DECODINGS], differences),
            ]
        )


_DECODINGS, _WHAT = ("greedy", "sampled", "T=0.7"), ("quality", "length")


def _rerun(result: Mapping[str, Any]) -> str:
    hardware = result["hardware"]
    note = filled(f"""
        {result["runs"]} runs took {result["run_seconds"] / 60:.0f} minutes, summed over the runs, on
        {hardware["cpu"]}, {hardware["cores"]} cores shared with other work, torch {result["versions"]["torch"]},
        {result["date"]}. Every run is a line of a .jsonl file in
        [results/study_axis](../benchmarks/results/study_axis), with the edits of its greedy answers. Each number of
        pairs has its own file. [axis.json](../benchmarks/results/study_axis/axis.json) and this page are computed from
        these lines.""")
    return f"""## Rerun it

```bash
python -m benchmarks.study --part axis            # continues after an interruption
python -m benchmarks.study --part axis --quick    # tiny sizes, under a minute
```

{note}"""


def main() -> None:
    for file in write(json.loads((RESULTS / "axis.json").read_text()), DOCS):
        print(f"wrote {file.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()

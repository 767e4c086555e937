"""``docs/study.md`` and its pictures, from the result files alone: ``python -m benchmarks.study.report``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .arms import ARMS, FIXED, OBJECTIVES, VARIANTS
from .plan import SFT_LEARNING_RATES, STEP, TUNING_SEED
from .runs import base_name
from .statistics import RIDGE_ARM, RIDGE_PROMPT
from .summary import COLLAPSED_BELOW, COLLAPSED_UNENDED

RESULTS = Path(__file__).parent.parent / "results" / "study"
TABULAR = Path(__file__).parent.parent / "results" / "study_tabular.json"
DOCS = Path(__file__).parent.parent.parent / "docs"
NAMES = {"plain": "plain", "inspo": "InSPO", "anchored": "anchored InSPO"}
COLORS = {"plain": "tab:orange", "inspo": "tab:blue", "anchored": "tab:green"}
LEVEL = 0.05


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """The report and its pictures in ``folder``; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "study.md"]
    files[0].write_text(text(result, json.loads(TABULAR.read_text())))
    for name, draw in (("arms", _draw_arms), ("curves", _draw_curves), ("ablations", _draw_ablations)):
        files.append(folder / f"study_{name}.png")
        draw(result, files[-1])
    return files


def finding(result: Mapping[str, Any]) -> str:
    """What was found, in one sentence for the README; it says what the numbers say, whichever way they go."""
    main = _contrasts(result, "inspo - plain")
    seeds = result["seeds"]
    parts = []
    for verdict, names in _verdicts(main, "quality").items():
        if names:
            parts.append(f"{verdict} for {_list(names)}")
    anchored = _verdicts(_contrasts(result, "anchored - twice"), "quality", adjusted=False)
    rest = [f"{verdict} for {_list(names)}" for verdict, names in anchored.items() if names]
    return (
        f"In a small world whose answers are graded exactly ({seeds} seeds), InSPO's answers from the prompt alone are, "
        f"beside its plain twin's, {', '.join(parts)} (p < {LEVEL}, Holm); the anchored objective's, beside plain's at "
        f"twice the updates, {', '.join(rest) or 'not measured'}."
    )


def _verdicts(contrasts: Sequence[Mapping[str, Any]], measure: str, adjusted: bool = True) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {"better": [], "worse": [], "not told apart": []}
    for entry in contrasts:
        value = entry[measure]
        p = value.get("holm_p", value["p"]) if adjusted else value["p"]
        told = p is not None and p < LEVEL
        found["not told apart" if not told else "better" if value["mean"] > 0 else "worse"].append(entry["objective"])
    return found


def text(result: Mapping[str, Any], tabular: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    sections = [
        "# Does InSPO help? A controlled study",
        "<!-- written by python -m benchmarks.study; do not edit -->",
        finding(result),
        "![quality by arm](study_arms.png)",
        _world(result),
        _arms(result),
        _main_contrasts(result),
        _controls(result),
        _length(result),
        _mechanism(result),
        _invariance(tabular),
        _doubts(result),
        _rerun(result),
    ]
    return "\n\n".join(sections) + "\n"


def _world(result: Mapping[str, Any]) -> str:
    base, size, judge = result["bases"][base_name(True)], result["plan"]["size"], result["judge"]
    return f"""## The world

One character is a token, an answer ends with `$`. Four tasks on words of {_or(size["word_lengths"])} letters:

    Rabcd=  ->  dcba$      Nabcd=  ->  bcde$      Sdbca=  ->  abcd$      Dabc=  ->  aabbcc$
    reverse                next letters           sort                   double

Quality is 1 − edits to the right answer / its length, exactly computed; 0 for an answer without end. `~` is filler that
demonstrations often have behind the answer: `dcba~~$` is as good as `dcba$`. The judge, whose labels are all that training
sees, likes it: P(first preferred) = σ({judge["a"]:g} Δquality + {judge["b"]:g} Δlength), and {judge["noise"]:.0%} of its labels are turned round. So
length can be gamed.

A base (a Llama, {size["layers"]} layers, hidden size {size["hidden_size"]}, 0.2M parameters at the full size) is fitted to imperfect demonstrations; {size["draft_share"]:.0%} of
the rows are prompt + draft + answer. It answers each training prompt four times; the answers that the judge scores
highest and lowest make the pair, which the judge then labels. The mean base has quality {base["quality"]:.3f} ({base["right"]:.0%} right), {base["length"]:.1f} tokens
an answer. In {base["chosen_better"]:.0%} of its {base["pairs"]:.0f} pairs the chosen answer is the better one, in {base["chosen_worse"]:.0%} the worse one; it is {base["chosen_longer"]:.1f} tokens
longer. log π(y|x,y′) − log π(y|x) of the base is {base["conditioning_gap"]:+.2f} nats a token (lowest seed {base["lowest_gap"]:+.2f}).

Training, validation and test prompts are disjoint. Every fine-tune of a seed starts from the same base and sees the same
pairs in the same order: {size["updates"]} updates of {size["update_pairs"]} pairs, AdamW, linear decay, gradients clipped at 1. Answers are sampled at
temperature 1 **from the prompt alone**, {size["samples"]} to each of {size["test_prompts"]} test prompts, all models on the same random draws. A seed draws
prompts, demonstrations, initialisation, pairs and labels anew."""


def _arms(result: Mapping[str, Any]) -> str:
    base = result["bases"][base_name(True)]
    lines = [
        "## All arms",
        "",
        "| | seeds | exact quality (95%) | right | tokens | judge: wins over base | over plain twin | "
        "length-controlled (95%) | reward accuracy, prompt alone | collapsed |",
        "|---|---|---|---|---|---|---|---|---|---|",
        f"| base | {base['seeds']} | {base['quality']:.3f} | {base['right']:.2f} | {base['length']:.1f} | 0.500 | | 0.500 | | |",
    ]
    for name, row in result["arms"].items():
        cells = [
            ARMS[name].title, str(row["seeds"]), _mean(row["quality"]), f"{row['right']:.2f}", f"{row['length']:.1f}",
            f"{row['win_rate']['mean']:.3f}",
            f"{row['win_rate_twin']['mean']:.3f}" if "win_rate_twin" in row else "",
            _mean(row["lc_win_rate"]) if "lc_win_rate" in row else "",
            f"{row['marginal_accuracy']:.2f}", f"{row['collapsed']} of {row['seeds']}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    taste = result["length_taste"]
    without = [f"{_title(name)} ({row['quality']:.3f})" for name, row in result["bases"].items() if name != "base"]
    lines += [
        "",
        f"Intervals of quality: t over seeds. The judge's win rates are its mean probability, without label noise (a tie "
        f"counts ½). Length-controlled: logistic regression on arm + φ·tanh(Δlength/{taste['scale']:.2f}) + difficulty of the "
        f"prompt, fitted jointly over all arms and seeds with ridge {RIDGE_PROMPT:g} on the difficulties and {RIDGE_ARM:g} on the "
        f"rest, predicted with the length term at 0; φ = {taste['coefficient']:.2f}; its intervals refit everything to {_list(['seeds', 'prompts'])} "
        "drawn again. Reward accuracy: held-out pairs of test prompts, the judge's noiseless preference. Collapsed, fixed "
        f"beforehand: more than {COLLAPSED_BELOW:g} below the base in quality, over {COLLAPSED_UNENDED:.0%} of answers without end, or a loss "
        f"that is not finite. Arms without drafts start from another base: {_list(without) or 'none here'}.",
    ]
    return "\n".join(lines)


def _main_contrasts(result: Mapping[str, Any]) -> str:
    lines = [
        "## InSPO − plain, paired by seed",
        "",
        "| | exact quality (95%) | Holm p | win rate over base (95%) | Holm p | length-controlled (95%) | Holm p |",
        "|---|---|---|---|---|---|---|",
    ]
    for entry in _contrasts(result, "inspo - plain"):
        cells = [entry["objective"]]
        for measure in ("quality", "win_rate", "lc_win_rate"):
            cells += [_signed(entry[measure]), _p(entry[measure].get("holm_p"))]
        lines.append("| " + " | ".join(cells) + " |")
    main = _contrasts(result, "inspo - plain")
    said = []
    for measure, name in (("quality", "exact quality"), ("lc_win_rate", "length-controlled win rate")):
        verdicts = _verdicts(main, measure)
        said.append(f"In {name}, InSPO is " + "; ".join(f"{v} for {_list(n)}" for v, n in verdicts.items() if n) + ".")
    return "\n".join([*lines, "", *said, "", "The paper claims consistent gains of both win rates."])


def _controls(result: Mapping[str, Any]) -> str:
    kinds = {
        "anchored - plain": "anchored InSPO − plain",
        "anchored - twice": "anchored InSPO − plain at twice the updates",
        "inspo - shuffled": "InSPO − InSPO with another pair's alternative",
        "plain - sft": "plain − SFT on the chosen answers",
        "inspo - sft": "InSPO − SFT on the chosen answers",
        "inspo - plain with sft": "InSPO − plain + SFT term",
    }
    columns = list(OBJECTIVES.values())
    lines = [
        "## Controls",
        "",
        "Differences in exact quality, paired by seed, 95% t intervals, not adjusted for their number:",
        "",
        "| | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for kind, title in kinds.items():
        cells = {entry["objective"]: _signed(entry["quality"]) for entry in _contrasts(result, kind)}
        if cells:
            lines.append(f"| {title} | " + " | ".join(cells.get(column, "") for column in columns) + " |")
    for entry in _contrasts(result, "no drafts"):
        base = result["bases"].get(base_name(False))
        gap = f" ({base['conditioning_gap']:+.2f} nats a token)" if base else ""
        lines += ["", f"On bases fitted without drafts{gap}, InSPO-DPO − DPO is {_signed(entry['quality'])}."]
    lines += [
        "",
        "ORPO has an SFT term of its own, which needs the pair's own marginals: no shuffled alternative, no further term.",
    ]
    return "\n".join(lines)


def _length(result: Mapping[str, Any]) -> str:
    tracking = result["tracking"]
    if not tracking:
        return "## Which win rate tracks quality?\n\nToo few arms to say."
    difference = tracking["difference"]
    told = difference["p"] is not None and difference["p"] < LEVEL
    better = "length-controlled" if difference["mean"] > 0 else "plain"
    verdict = (
        f"The {better} win rate tracks exact quality better" if told else "The two are not told apart"
    ) + f": the difference of the correlations is {_signed(difference)}."
    return f"""## Which win rate tracks quality?

Rank correlation with exact quality over {tracking["arms"]["n"]} arms, within a seed, then over seeds: the judge's win rate {_mean(tracking["win_rate"])},
its length-controlled win rate {_mean(tracking["lc_win_rate"])}, mean length {_signed(tracking["length"])}. {verdict}"""


def _mechanism(result: Mapping[str, Any]) -> str:
    lines = ["## What is trained, and what is used", "", "![curves](study_curves.png)", ""]
    for name in ("dpo plain", "dpo inspo", "dpo anchored"):
        if curve := result["curves"].get(name):
            last = curve[-1]
            lines.append(
                f"- {ARMS[name].title}: reward accuracy on held-out pairs {last['conditioned accuracy']:.2f} given the other "
                f"response, {last['marginal accuracy']:.2f} from the prompt alone; log-prob of a chosen answer, nats a token, "
                f"{curve[0]['conditioned chosen']:.2f} → {last['conditioned chosen']:.2f} and {curve[0]['marginal chosen']:.2f} → {last['marginal chosen']:.2f}."
            )
    lines += ["", "## One thing changed at a time (DPO)", "", "![ablations](study_ablations.png)", ""]
    lines += ["| | | gain in quality over the base (95%) | tokens | collapsed |", "|---|---|---|---|---|"]
    for group, rows in result["ablations"].items():
        for row in rows:
            gain = row["gain"]
            lines.append(
                f"| {group}: {_level(row['level'])} | {ARMS[row['line']].title} | {_signed(gain)} | {row['length']:.1f} | "
                f"{row['collapsed']} of {gain['n']} |"
            )
    lines += [
        "",
        "Learning rate and beta: factors of the tuned values. Own alternative: probability that a response is conditioned "
        "on the other response of its own pair, else on that of another pair of the same kind. Marginal weight 0 is InSPO, "
        "1 the anchored arm. Label noise 0.5 means labels that say nothing: a gain there would betray a leak.",
    ]
    random_labels = [r for r in result["ablations"].get("label noise", []) if r["level"] == 0.5]
    if random_labels:
        gains = "; ".join(f"{ARMS[r['line']].title} {_signed(r['gain'])}" for r in random_labels)
        lines += ["", f"With such labels the gains over the base are {gains}."]
    return "\n".join(lines)


def _invariance(tabular: Mapping[str, Any]) -> str:
    lines = [
        "## Is the optimum invariant? Exactly, in a tabular world",
        "",
        f"{tabular['responses']} responses, every log π(y|y′) a free parameter, float64, {tabular['worlds']} random preference matrices each without and with "
        "cycles, 0 < P < 1; for each, another reference and other pair weights. u(y,y′) = [log π(y|y′) − log ref(y)] − "
        "[log π(y′|y) − log ref(y′)]. Largest values over the worlds:",
        "",
        "| preferences | training | scalarization | excess over the Bayes risk (relative) | error of link⁻¹(u) | "
        "link⁻¹(u) moves with ref, weights | policy moves |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, title in (("bradley_terry", "Bradley-Terry"), ("cyclic", "any, with cycles")):
        for training in ("conditioned", "plain"):
            for name, row in tabular[kind][training].items():
                values = [
                    f"{row[key]:.0e}" if row[key] < 1e-3 else f"{row[key]:.2f}"
                    for key in ("gap_to_bayes", "error_of_decoded_preferences", "decoded_moves_with_ref_and_weights",
                                "policy_moves_with_ref_and_weights")
                ]  # fmt: skip
                lines.append(f"| {title} | {training} | {name} | " + " | ".join(values) + " |")
    alone = {
        (kind, training): tabular[kind]["prompt_only"][training]
        for kind in ("bradley_terry", "cyclic")
        for training in ("conditioned", "plain")
    }
    echo = tabular["echo"]["least_probability_of_the_alternative"]
    same = ", ".join(
        f"{row['same_for_other_ref_and_weights']:.2f} ({training}, {'cyclic' if kind == 'cyclic' else 'Bradley-Terry'})"
        for (kind, training), row in alone.items()
    )
    lines += [
        "",
        "- (i) The un-regularised target argmax_y P(y≻y′) depends on P alone, by definition.",
        "- (ii) The decoded preferences link⁻¹(u): the conditioned loss reaches its Bayes risk for every P, cycles included, and "
        "decodes P whatever the scalarization, reference and weights. The plain loss does so only where link(P) is additive "
        "(Bradley-Terry with the logistic or exponential link); elsewhere its decoded preferences move with the weights.",
        f"- (iii) The conditioned policy is not determined: the optima are a family of dimension {tabular['dimension_of_optima']} = K(K−1)/2, one of "
        f"which repeats the alternative with probability at least {echo:.4f}.",
        "- (iv) The prompt-only policy is what a parametrisation and an optimizer make of it. With shared logits and gradient "
        f"descent, its favourite answer stays the same under another reference and other weights in a share of {same}.",
        "",
        "So (ii) being invariant implies nothing about (iii) and (iv), and (iv) is what answers.",
    ]
    return "\n".join(lines)


def _doubts(result: Mapping[str, Any]) -> str:
    checks = result["checks"]
    tokens = checks["tokens"]
    edges = [
        f"{ARMS[name].title} ({best['learning_rate']:.0e}"
        + (f", {best['parameter']:.2g})" if best["parameter"] else ")")
        for name, best in result["tuning"].items()
        if best["edge"]
    ]
    fixed = "; ".join(f"{OBJECTIVES[k]} {n} = {v:g}" for k, options in FIXED.items() for n, v in options.items())
    lines = [
        "## Reasons to doubt it, and checks",
        "",
        f"- Unequal training? Every arm of the table made {_or(checks['updates'])} updates; all arms of a seed saw the same pairs: "
        f"{'yes' if checks['pairs_equal'] else 'no'}. Conditioned sequences are longer: a run passes {tokens['plain']:,.0f} tokens plain and {tokens['inspo']:,.0f} "
        "conditioned, which is why plain training at twice the updates is a control.",
        f"- A broken judge or comparison? The base judged against itself wins {checks['base_against_itself']:.3f}. The regression is tested "
        "on planted coefficients, grading on known answers, the alternatives' order on the batches themselves; losses are "
        "the package's, tested against a float64 oracle.",
        "- A leak? See label noise 0.5. Test prompts are in no demonstration and no pair.",
        f"- Tuned unfairly? Each arm of the table, SFT and plain + SFT got its own grid on one seed ({TUNING_SEED}, used for nothing else), "
        f"by exact quality on validation prompts: the middle, then learning rate and one parameter at a {STEP:g}rd and {STEP:g} times; SFT "
        f"{len(SFT_LEARNING_RATES)} learning rates. The middles come from a look at a few runs on another seed. Not tuned: {fixed}. "
        + (
            f"Winners at the edge of their grid, which a wider one might move: {_list(edges)}."
            if edges
            else "No edges."
        ),
        f"- Chance? Seeds are the observations ({result['seeds']} for the table, {result['fewer_seeds']} for most controls and the ablations). Only the "
        "five InSPO − plain contrasts are adjusted for their number. One tuning seed can pick a wrong setting for an arm.",
        "- Far from practice: models of 0.2M parameters, one right answer a prompt, a synthetic judge with one bias, fewer than "
        "100 updates. A base of billions of parameters takes drafts in its context better. That InSPO does or does not help "
        "here says how the objective behaves, not how large models do.",
    ]
    if result["unfinished"]:
        lines.append(f"- Not finished, and left out: {_list(result['unfinished'])}.")
    return "\n".join(lines)


def _rerun(result: Mapping[str, Any]) -> str:
    hardware, versions = result["hardware"], result["versions"]
    minutes = result["run_seconds"] / 60
    return f"""## Rerun it

```bash
python -m benchmarks.study            # all of it; says how long, continues where it was interrupted
python -m benchmarks.study --quick    # tiny sizes, minutes
python -m benchmarks.study.tabular --json FILE
```

{result["runs"]} runs, {minutes:.0f} minutes of one core in all, on {hardware["cpu"]} ({hardware["cores"]} cores, shared with other work), torch {versions["torch"]}, {result["date"]}. Every run is a line of
[runs.jsonl](../benchmarks/results/study/runs.jsonl) with the edits and lengths of its answers, from which
[study.json](../benchmarks/results/study/study.json) and this page are computed. `--large --device cuda` is a larger model with more seeds; it has
not been run."""


# --- pictures ---


def _draw_arms(result: Mapping[str, Any], file: Path) -> None:
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
    for x, entry in enumerate(_contrasts(result, "inspo - plain")):
        for shift, measure, color, title in (
            (-0.12, "quality", "tab:blue", "exact quality"), (0.12, "lc_win_rate", "tab:purple", "length-controlled win rate"),
        ):  # fmt: skip
            _point(contrast, x + shift, entry[measure], color, title if x == 0 else None)
    contrast.axhline(0, color="gray", lw=1)
    contrast.set_xticks(range(len(OBJECTIVES)), list(OBJECTIVES.values()))
    contrast.set(title="InSPO − plain, paired by seed", ylabel="difference, 95%")
    for axes in (quality, contrast):
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3, axis="y")
    figure.savefig(file, dpi=110, metadata={"Software": None})


def _point(axes: Any, x: float, value: Mapping[str, float], color: str, label: str | None) -> None:
    error = [[value["mean"] - value["low"]], [value["high"] - value["mean"]]]
    axes.errorbar(x, value["mean"], yerr=error, fmt="o", color=color, label=label, capsize=3, markersize=4)


def _draw_curves(result: Mapping[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5), layout="constrained")
    grid = figure.subplots(2, len(OBJECTIVES), sharex=True, sharey="row")
    for column, (key, title) in zip(grid.T, OBJECTIVES.items()):
        for variant in VARIANTS:
            curve = result["curves"].get(f"{key} {variant}", [])
            steps = [point["step"] for point in curve]
            for layout, style in (("conditioned", "--"), ("marginal", "-")):
                for axes, what in zip(column, ("accuracy", "chosen")):
                    # Before training, where margins are measured from the reference, they are all 0: no accuracy yet.
                    values = [p[f"{layout} {what}"] if p["step"] or what == "chosen" else float("nan") for p in curve]
                    label = f"{NAMES[variant]}, {'given the other' if layout == 'conditioned' else 'prompt alone'}"
                    axes.plot(steps, values, style, color=COLORS[variant], label=label)
        column[0].set(title=title)
        column[1].set(xlabel="update")
        for axes in column:
            axes.grid(alpha=0.3)
    grid[0, 0].set(ylabel="reward accuracy")
    grid[1, 0].set(ylabel="log-prob of chosen, nats a token")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), fontsize=8, ncols=6, loc="outside lower center")
    figure.savefig(file, dpi=100, metadata={"Software": None})


def _draw_ablations(result: Mapping[str, Any], file: Path) -> None:
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
        axes.axhline(0, color="gray", lw=1)
        axes.set(title=group)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
        if place % 3 == 0:
            axes.set(ylabel="gain in quality over base")
    figure.savefig(file, dpi=100, metadata={"Software": None})


# --- words ---


def _contrasts(result: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in result["contrasts"] if entry["kind"] == kind]


def _mean(value: Mapping[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"


def _signed(value: Mapping[str, float]) -> str:
    return f"{value['mean']:+.3f} ({value['low']:+.3f} to {value['high']:+.3f})"


def _p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _list(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), *names[-1:]]))


def _or(values: Iterable[Any]) -> str:
    return " or ".join(map(str, values))


def _level(level: float | str) -> str:
    return level if isinstance(level, str) else f"{level:g}"


def _title(base: str) -> str:
    return "the base without drafts" if base == base_name(False) else base


def main() -> None:
    for file in write(json.loads((RESULTS / "study.json").read_text()), DOCS):
        print(f"wrote {file.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()

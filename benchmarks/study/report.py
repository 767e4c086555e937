# ruff: noqa: RUF001  (minus signs, primes and Greek letters are meant)
"""Write ``docs/study.md`` and its pictures from the result files: ``python -m benchmarks.study.report``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import pictures
from .arms import ARMS, FIXED, OBJECTIVES, VARIANTS
from .markdown import either, filled, item, listed, mean_text, p_value, signed, table
from .plan import SFT_LEARNING_RATES, STEP, TUNING_SEED
from .runs import Size, base_name
from .statistics import RIDGE_ARM, RIDGE_PROMPT
from .summary import COLLAPSED_BELOW, COLLAPSED_UNENDED
from .tabular_report import invariance

RESULTS = Path(__file__).parent.parent / "results" / "study"
TABULAR = Path(__file__).parent.parent / "results" / "study_tabular.json"
DOCS = Path(__file__).parent.parent.parent / "docs"
LEVEL = 0.05


def write(result: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write the report and its pictures to ``folder``. Return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / "study.md"]
    files[0].write_text(text(result, json.loads(TABULAR.read_text())))
    for name, draw in pictures.PICTURES.items():
        files.append(folder / f"study_{name}.png")
        draw(result, files[-1])
    return files


NO_DIFFERENCE = "no significant difference"


def finding(result: Mapping[str, Any]) -> str:
    """Return sentences that state the findings, computed from the numbers."""

    def words(kind: str, p: str = "p") -> str:
        return _in_words(_verdicts(_contrasts(result, kind), "quality", p))

    sentences = [
        "In a small world whose answers are graded exactly, we compared answers from the prompt alone.",
        f"InSPO against the plain objective: {words('inspo - plain', 'holm_p')} ({result['seeds']} seeds, p < {LEVEL}, "
        "Holm).",
        f"InSPO against InSPO with another pair's answer as the alternative: {words('inspo - shuffled')} "
        f"({result['fewer_seeds']} seeds, not adjusted).",
        "Anchored InSPO, which adds the plain loss on the marginals, against InSPO: "
        f"{words('anchored - inspo')}; against the plain objective: {words('anchored - plain')} ({result['seeds']} "
        "seeds, not adjusted).",
    ]
    if row := result["arms"].get("dpo inspo, no drafts"):
        sentences.append(
            f"On bases that never saw a draft before an answer, InSPO-DPO collapses on {row['collapsed']} of "
            f"{row['seeds']} seeds."
        )
    return " ".join([*sentences, "All of this holds for tiny models and one synthetic judge."])


def against_plain(result: Mapping[str, Any]) -> str:
    """Say for which objectives InSPO scored higher or lower than the plain objective, after Holm's adjustment."""
    found = _verdicts(_contrasts(result, "inspo - plain"), "quality", "holm_p")
    said = [
        f"scored {how} than the plain objective for {listed(found[verdict])}"
        for verdict, how in (("better", "higher"), ("worse", "lower"))
        if found[verdict]
    ]
    if found[NO_DIFFERENCE]:
        said.append(f"did not differ significantly for {listed(found[NO_DIFFERENCE])}")
    return f"InSPO {' and '.join(said)}" if said else "InSPO was not compared"


def _verdicts(contrasts: Sequence[Mapping[str, Any]], measure: str, p: str) -> dict[str, list[str]]:
    """Group objectives by the sign of their contrast, if its ``p`` ("p" or "holm_p") is below the level."""
    found: dict[str, list[str]] = {"better": [], "worse": [], NO_DIFFERENCE: []}
    for entry in contrasts:
        value = entry[measure]
        told = value[p] is not None and value[p] < LEVEL
        found[NO_DIFFERENCE if not told else "better" if value["mean"] > 0 else "worse"].append(entry["objective"])
    return found


def _in_words(verdicts: Mapping[str, Sequence[str]]) -> str:
    said = ", ".join(f"{verdict} for {listed(names)}" for verdict, names in verdicts.items() if names)
    return said or "not measured"


def text(result: Mapping[str, Any], tabular: Mapping[str, Any]) -> str:
    """Return the report in Markdown."""
    sections = [
        "# Does InSPO help? A controlled study",
        "<!-- written by python -m benchmarks.study; do not edit -->",
        *_warnings(result),
        filled(finding(result)),
        filled(
            "A separate study, whose protocol was fixed beforehand, makes [many passes over few pairs](study_axis.md)."
        ),
        "![quality by arm](study_arms.png)",
        _world(result),
        _arms(result),
        _main_contrasts(result),
        _controls(result),
        _length(result),
        _curves(result),
        *([_ablations(result)] if result["ablations"] else []),
        invariance(tabular),
        _doubts(result),
        _rerun(result),
    ]
    return "\n\n".join(sections) + "\n"


def _warnings(result: Mapping[str, Any]) -> list[str]:
    """Return warnings for tiny sizes and for unfinished studies."""
    if result["plan"]["size"]["hidden_size"] < Size().hidden_size:
        return ["**Tiny sizes: everything runs, nothing is learned, and nothing follows from these numbers.**"]
    if result["runs"] >= result["planned"]:
        return []
    note = f"""
        **Unfinished: {result["runs"]} of {result["planned"]} runs.** This page covers the arms that are complete and
        lists the missing arms at the end. `python -m benchmarks.study` runs the rest."""
    return [filled(note)]


def _world(result: Mapping[str, Any]) -> str:
    base, size, judge = result["bases"][base_name(True)], result["plan"]["size"], result["judge"]
    grading = filled(f"""
        Quality is 1 − edits to the right answer / its length, computed exactly. An answer that does not end has quality
        0. Demonstrations often have filler, `~`, after the answer: `dcba~~$` is as good as `dcba$`. Training sees only
        the judge's labels, and the judge likes filler: P(first preferred) = σ({judge["a"]:g} Δquality +
        {judge["b"]:g} Δlength). {judge["noise"]:.0%} of its labels are flipped. A model can therefore game length.""")
    bases = filled(f"""
        A base (a Llama with {size["layers"]} layers and hidden size {size["hidden_size"]}; 0.23M parameters at full
        size) is fitted to imperfect demonstrations. {size["draft_share"]:.0%} of the rows are prompt + draft + answer.
        The base answers each training prompt four times. The answers with the judge's highest and lowest score form the
        pair, which the judge then labels. Averaged over seeds, the base has quality {base["quality"]:.3f}
        ({base["right"]:.0%} of its answers are right) and {base["length"]:.1f} tokens per answer. The chosen answer is
        better in {base["chosen_better"]:.0%} of its {base["pairs"]:.0f} pairs and worse in
        {base["chosen_worse"]:.0%}. On average it is {base["chosen_longer"]:.1f} tokens longer. The base's
        log π(y|x,y′) − log π(y|x) is {base["conditioning_gap"]:+.2f} nats per token (lowest seed
        {base["lowest_gap"]:+.2f}).""")
    training = filled(f"""
        Training, validation and test prompts are disjoint. Every fine-tune of a seed starts from the same base and
        sees the same pairs in the same order: {size["updates"]} updates of {size["update_pairs"]} pairs, AdamW, linear
        decay, gradients clipped at 1. Answers are sampled at temperature 1 **from the prompt alone**,
        {size["samples"]} for each of {size["test_prompts"]} test prompts, with the same random draws for all models.
        Each seed has its own prompts, demonstrations, initialisation, pairs and labels.""")
    return f"""## The world

Each character is one token. An answer ends with `$`. Four tasks use words of {either(size["word_lengths"])} letters:

    Rabcd=  ->  dcba$      Nabcd=  ->  bcde$      Sdbca=  ->  abcd$      Dabc=  ->  aabbcc$
    reverse                next letters           sort                   double

{grading}

{bases}

{training}"""


def _arms(result: Mapping[str, Any]) -> str:
    base = result["bases"][base_name(True)]
    columns = [
        "",
        "seeds",
        "exact quality (95%)",
        "right",
        "tokens",
        "judge: wins over base",
        "over plain",
        "length-controlled (95%)",
        "reward accuracy, prompt alone",
        "collapsed",
    ]
    rows = [
        [
            "base",
            base["seeds"],
            f"{base['quality']:.3f}",
            f"{base['right']:.2f}",
            f"{base['length']:.1f}",
            "0.500",
            "",
            "0.500",
            "",
            "",
        ]
    ]
    for name, row in result["arms"].items():
        rows.append(
            [
                ARMS[name].title,
                row["seeds"],
                mean_text(row["quality"]),
                f"{row['right']:.2f}",
                f"{row['length']:.1f}",
                f"{row['win_rate']['mean']:.3f}",
                f"{row['win_rate_twin']['mean']:.3f}" if "win_rate_twin" in row else "",
                mean_text(row["lc_win_rate"]) if "lc_win_rate" in row else "",
                # SFT's objective gives no rewards.
                "" if ARMS[name].objective == "sft" else f"{row['marginal_accuracy']:.2f}",
                f"{row['collapsed']} of {row['seeds']}",
            ]
        )
    taste = result["length_taste"]
    note = f"""
        Intervals of quality are t intervals over seeds. The judge's win rate is its mean probability of preferring the
        arm, without label noise; a tie counts ½. The length-controlled win rate comes from a logistic regression on
        arm + φ·tanh(Δlength/{taste["scale"]:.2f}) + difficulty of the prompt. The regression is fitted jointly over all
        arms and seeds, with ridge {RIDGE_PROMPT:g} on the difficulties and {RIDGE_ARM:g} on the rest, and predicts with
        the length term at 0. φ = {taste["coefficient"]:.2f}. Its intervals come from a bootstrap that resamples seeds,
        and prompts within seeds, and repeats the whole fit. Reward accuracy is measured on held-out pairs of test
        prompts, with labels drawn from P without flips. An arm counts as collapsed, by a rule fixed beforehand, if its
        quality is more than {COLLAPSED_BELOW:g} below the base, if over {COLLAPSED_UNENDED:.0%} of its answers do not
        end, or if its loss is not finite. Rows with {result["fewer_seeds"]} seeds use the first
        {result["fewer_seeds"]}, so compare them with other rows by the paired differences below, not by this table."""
    if "simpo plain" in result["curves"]:
        before = result["curves"]["simpo plain"][0]["marginal accuracy"]
        note += f""" SimPO and ORPO reward log-probs per token, and the base's own log-probs rank a share of
            {before:.2f} of the pairs correctly. All other objectives reward the change from the base."""
    if other := result["bases"].get(base_name(False)):
        note += f" Arms on a base without drafts are compared with that base (quality {other['quality']:.3f})."
    return "\n".join(["## All arms", "", *table(columns, rows), "", filled(note)])


def _main_contrasts(result: Mapping[str, Any]) -> str:
    measures = {"quality": "exact quality", "win_rate": "win rate over base", "lc_win_rate": "length-controlled"}
    main = _contrasts(result, "inspo - plain")
    rows = [
        [entry["objective"], *(cell for m in measures for cell in (signed(entry[m]), p_value(entry[m]["holm_p"])))]
        for entry in main
    ]
    columns = ["", *(cell for name in measures.values() for cell in (f"{name} (95%)", "Holm p"))]
    verdicts: dict[str, list[str]] = {}
    for measure, name in measures.items():
        verdicts.setdefault(_in_words(_verdicts(main, measure, "holm_p")), []).append(name)
    said = " ".join(f"InSPO, by {listed(names)}: {verdict}." for verdict, names in verdicts.items())
    claim = """The paper claims consistent gains in win rate and in length-controlled win rate. Holm's method adjusts
        the five tests of each measure."""
    if len(main) < len(OBJECTIVES):
        claim = f"Holm's method covers the {len(main)} finished contrasts. {claim}"
    return "\n".join(["## InSPO − plain, paired by seed", "", *table(columns, rows), "", filled(f"{claim} {said}")])


def _controls(result: Mapping[str, Any]) -> str:
    kinds = {
        "anchored - inspo": "anchored InSPO − InSPO",
        "anchored - plain": "anchored InSPO − plain",
        "anchored - twice": "anchored InSPO − plain at twice the updates",
        "inspo - shuffled": "InSPO − InSPO with another pair's alternative",
        "plain - sft": "plain − SFT on the chosen answers",
        "inspo - sft": "InSPO − SFT on the chosen answers",
        "inspo - plain with sft": "InSPO − plain + SFT term",
        "plain with sft - plain": "plain + SFT term − plain",
    }
    columns = list(OBJECTIVES.values())
    rows = []
    for kind, title in kinds.items():
        cells = {entry["objective"]: signed(entry["quality"]) for entry in _contrasts(result, kind)}
        if cells:
            rows.append([title, *(cells.get(column, "") for column in columns)])
    lines = [
        "## Controls",
        "",
        "Differences in exact quality, paired by seed, with 95% t intervals that are not adjusted for their number:",
    ]
    lines += ["", *table(["", *columns], rows)] if rows else ["", "No control is finished."]
    for entry in _contrasts(result, "no drafts"):
        gap = result["bases"][base_name(False)]["conditioning_gap"]
        lines += [
            "",
            filled(f"""
            On bases fitted without drafts, log π(y|x,y′) − log π(y|x) is {gap:+.2f} nats per token, and InSPO-DPO −
            DPO is {signed(entry["quality"])}."""),
        ]
    alone = """Every variant of ORPO has its own SFT term on the pair's own marginals, so we ran it without a shuffled
        alternative and without a further SFT term. IPO's loss is a square of nats, so an SFT term of weight 1 has
        little effect."""
    lines += ["", filled(alone)]
    return "\n".join(lines)


def _length(result: Mapping[str, Any]) -> str:
    tracking = result["tracking"]
    if not tracking:
        return "## Which win rate tracks quality?\n\nToo few arms, or no differences, to say."
    difference = tracking["difference"]
    told = difference["p"] is not None and difference["p"] < LEVEL
    better = "length-controlled" if difference["mean"] > 0 else "plain"
    verdict = (
        f"The {better} win rate tracks exact quality better"
        if told
        else "We found no significant difference between the two"
    )
    return "## Which win rate tracks quality?\n\n" + filled(f"""
        Rank correlations with exact quality, over {tracking["arms"]["n"]} arms within a seed and then averaged over
        seeds: the judge's win rate {mean_text(tracking["win_rate"])}, its length-controlled win rate
        {mean_text(tracking["lc_win_rate"])}, mean length {signed(tracking["length"])}. {verdict}: the difference of the
        correlations is {signed(difference)}. This is expected almost by construction: the judge's preference for
        length has the form that the regression removes.""")


def _curves(result: Mapping[str, Any]) -> str:
    rows = []
    for key in OBJECTIVES:
        for name in (f"{key} {variant}" for variant in VARIANTS):
            if curve := result["curves"].get(name):
                first, last = curve[0], curve[-1]
                rows.append(
                    [
                        ARMS[name].title,
                        *(
                            cell
                            for layout in ("conditioned", "marginal")
                            for cell in (
                                f"{last[f'{layout} accuracy']:.2f}",
                                f"{first[f'{layout} chosen']:.2f} → {last[f'{layout} chosen']:.2f}",
                            )
                        ),
                    ]
                )
    columns = [
        "",
        "reward accuracy, given the other response",
        "log π(y_w|x,y_l)",
        "reward accuracy, prompt alone",
        "log π(y_w|x)",
    ]
    return "\n".join(
        [
            "## Conditioned training, prompt-only inference",
            "",
            "![curves](study_curves.png)",
            "",
            "On held-out pairs: reward accuracies, and log-probs of chosen answers in nats per token before and after "
            "training.",
            "",
            *table(columns, rows),
        ]
    )


def _ablations(result: Mapping[str, Any]) -> str:
    rows = [
        [
            f"{group}: {_level(row['level'])}",
            ARMS[row["line"]].title,
            signed(row["gain"]),
            f"{row['length']:.1f}",
            f"{row['collapsed']} of {row['gain']['n']}",
        ]
        for group, members in result["ablations"].items()
        for row in members
    ]
    note = """
        Learning rate and beta are factors of the tuned values. "Own alternative" is the probability that a response is
        conditioned on the other response of its own pair; otherwise the response comes from another pair of the same
        prompt kind. The marginal weights use InSPO's tuned settings. With label noise 0.5 the labels carry no
        information, so a gain would reveal a leak."""
    silent = [row for row in result["ablations"].get("label noise", []) if row["level"] == 0.5]
    if silent:
        note += " With these labels the gains over the base are "
        note += "; ".join(f"{ARMS[row['line']].title} {signed(row['gain'])}" for row in silent) + "."
    return "\n".join(
        [
            "## One thing changed at a time (DPO)",
            "",
            "![ablations](study_ablations.png)",
            "",
            *table(["", "", "gain in quality over the base (95%)", "tokens", "collapsed"], rows),
            "",
            filled(note),
        ]
    )


def _doubts(result: Mapping[str, Any]) -> str:
    checks, size = result["checks"], result["plan"]["size"]
    tokens = checks["tokens"]
    edges = [
        f"{ARMS[name].title} ({best['learning_rate']:.0e}"
        + (f", {best['parameter']:.2g})" if best["parameter"] else ")")
        for name, best in result["tuning"].items()
        if best["edge"]
    ]
    fixed = "; ".join(f"{OBJECTIVES[k]} {n} {v:g}" for k, options in FIXED.items() for n, v in options.items())
    points = [
        f"""Unequal training? Every arm of the table made {either(checks["updates"])} updates. All arms of a seed
        used the same number of pairs: {"yes" if checks["pairs_equal"] else "no"}. Tests check that they are the same
        pairs. Conditioned sequences are longer: a plain run processes {tokens["plain"]:,.0f} tokens, a conditioned run
        {tokens["inspo"]:,.0f}. Plain training with twice the updates is therefore a control.""",
        """A broken judge or comparison? A second implementation computes every number of the summary. We test the
        regression on planted coefficients, grading on known answers, the order of the alternatives on real batches, and
        marginal rewards after training that must separate them. The losses are the package's own, which are tested
        against a plain implementation in float64.""",
        "A leak? No demonstration and no training pair contains a test prompt. "
        + ("See label noise 0.5." if "label noise" in result["ablations"] else "Label noise 0.5 is not finished."),
        f"""Unfair tuning? Each arm of the table, SFT and plain + SFT had its own grid on one seed ({TUNING_SEED}, used
        for nothing else), scored by exact quality on validation prompts. A grid has a centre, plus the learning rate
        and one parameter divided and multiplied by {STEP:g}; for SFT it has {len(SFT_LEARNING_RATES)} learning rates.
        The centres come from about thirty runs on another seed. Not tuned: {fixed}; the weight of the SFT term, 1; the
        marginal weight of the anchored arms, 1. For these arms the best setting is at the edge of the grid, so a
        wider grid might change them: {listed(edges) if edges else "none"}.""",
        f"""Chance? Seeds are the observations: {result["seeds"]} for the table, {result["fewer_seeds"]} for most
        controls and the ablations. Only the InSPO − plain contrasts are adjusted for their number. With one tuning
        seed, an arm may get a poor setting by chance.""",
        f"""Far from practice? Yes: models with 0.23M parameters, one right answer per prompt, a synthetic judge with
        one bias, {size["updates"]} updates. The results show how the objectives behave in this world, not what they do
        to large models and human preferences.""",
    ]
    if result["unfinished"]:
        points.append(f"Unfinished and left out: {'; '.join(result['unfinished'])}.")
    return "\n".join(["## Reasons to doubt it, and checks", "", *(item(point) for point in points)])


def _rerun(result: Mapping[str, Any]) -> str:
    hardware = result["hardware"]
    note = filled(f"""
        {result["runs"]} runs took {result["run_seconds"] / 60:.0f} minutes, summed over the runs, on
        {hardware["cpu"]}, {hardware["cores"]} cores shared with other work, torch {result["versions"]["torch"]},
        {result["date"]}. Every run is a line of [runs.jsonl](../benchmarks/results/study/runs.jsonl) with the edits and
        lengths of its answers. [study.json](../benchmarks/results/study/study.json) and this page are computed from
        these lines. `--large --device cuda` runs a larger model and more seeds; this has not been done.""")
    return f"""## Rerun it

```bash
python -m benchmarks.study            # everything; prints an estimate first, continues after an interruption
python -m benchmarks.study --quick    # tiny sizes, minutes
python -m benchmarks.study.tabular --json FILE
```

{note}"""


def _contrasts(result: Mapping[str, Any], kind: str) -> list[dict[str, Any]]:
    return [entry for entry in result["contrasts"] if entry["kind"] == kind]


def _level(level: float | str) -> str:
    return level if isinstance(level, str) else f"{level:g}"


def main() -> None:
    for file in write(json.loads((RESULTS / "study.json").read_text()), DOCS):
        print(f"wrote {file.relative_to(DOCS.parent)}")


if __name__ == "__main__":
    main()

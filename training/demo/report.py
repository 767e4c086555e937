"""Report the demo: a table with intervals, examples, what InSPO assumes, and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..evaluation import CONDITIONING_GAP_WARNING

NAMES = {"base": "base", "sft": "SFT on the chosen", "dpo": "DPO", "inspo": "InSPO"}
COLORS = {"base": "tab:gray", "sft": "tab:green", "dpo": "tab:orange", "inspo": "tab:blue"}


def table(results: dict[str, Any]) -> str:
    """Return the four models side by side: accuracy and gain over the base with 95% intervals, mean answer length."""
    lines = []
    for how, title in (("greedy", "greedy"), ("sampled", f"sampled, {results['settings']['samples']} a prompt")):
        lines.append(
            f"{title:<22}{'right':>6}  {'95% interval':<16}{'gain over base':>15}  {'95% interval':<18}{'tokens':>8}"
        )
        for name, models in results["models"].items():
            lines.append(f"{_row(NAMES[name], models[how]):<81}{models[how]['mean_length']:>8.2f}")
    return "\n".join(lines)


def _row(title: str, row: dict[str, Any]) -> str:
    (low, high), gain = row["accuracy_ci"], ""
    if "gain" in row:
        ends = row["gain_ci"]
        gain = f"{row['gain']:>+15.3f}  [{ends[0]:+.3f}, {ends[1]:+.3f}]"
    return f"  {title:<20}{row['accuracy']:>6.3f}  {f'[{low:.3f}, {high:.3f}]':<16}{gain}"


def examples(results: dict[str, Any]) -> str:
    """Return greedy answers of the four models; a star marks right answers."""
    rows = results["examples"]
    lines = [f"{'unseen prompt':<16}{'right':<8}" + "".join(f"{name:<19}" for name in NAMES.values())]
    for row in rows:
        answers = (row[name] + (" *" if row[name] == row["right"] else "") for name in NAMES)
        lines.append(f"{row['prompt']:<16}{row['right']:<8}" + "".join(f"{answer:<19}" for answer in answers))
    return "\n".join(line.rstrip() for line in lines)


def ranking(results: dict[str, Any]) -> str:
    """Rank the models in words, and say why this world favours SFT."""
    sampled = {name: models["sampled"]["accuracy"] for name, models in results["models"].items()}
    order = sorted(sampled, key=sampled.__getitem__, reverse=True)
    text = "Sampled, from best to worst: " + ", ".join(f"{NAMES[name]} {sampled[name]:.3f}" for name in order) + "."
    if order[0] == "sft":
        text += (
            "\nEach prompt here has a single right answer, the chosen answer. Imitating such answers is hard to beat.\n"
            "Preferences are for data whose chosen answers are only better than the rejected answers."
        )
    return text


def over_training(results: dict[str, Any]) -> str:
    """Tabulate the greedy accuracy of the over-long runs by step, next to the base's."""
    settings, runs = results["settings"], results["over_trained"]
    steps = "".join(f"{step:>8}" for step in settings["long_steps"])
    passes = "".join(
        f"{step * settings['long_step_pairs'] / settings['long_pairs']:>8g}" for step in settings["long_steps"]
    )
    lines = [
        f"Trained too long, on {settings['long_pairs']} pairs: right answers, greedy (base "
        f"{results['models']['base']['greedy']['accuracy']:.3f}). One seed; docs/study_axis.md has many.",
        f"{'  steps':<22}{steps}",
        f"{'  passes':<22}{passes}",
    ]
    for name, points in runs.items():
        lines.append(f"  too long, {NAMES[name]:<10}" + "".join(f"{point['accuracy']:>8.3f}" for point in points))
    return "\n".join(lines)


def reflection(results: dict[str, Any]) -> str:
    """Tabulate InSPO's answers from two generations each: given its draft, and the likelier of two drafts."""
    rows = results["reflection"]
    titles = {"draft": "one draft", "reflected": "given the draft", "best_of_two": "likelier of two"}
    lines = [f"{'InSPO, sampled':<22}{'right':>6}  {'95% interval':<16}{'gain over draft':>15}  95% interval"]
    lines += [_row(titles[way], row).rstrip() for way, row in rows.items()]
    return "\n".join([*lines, "Experimental: two generations an answer (training.generate --reflect)."])


def assumption(results: dict[str, Any]) -> str:
    """Say what InSPO needs of a base, and whether this base has it."""
    gap, share = results["conditioning_gap"], results["settings"]["draft_share"]
    verdict = (
        "This base does not: what InSPO teaches it there may not reach the prompt alone."
        if min(gap.values()) < CONDITIONING_GAP_WARNING
        else f"This base does: {share:.0%} of the rows it was fitted to are prompt + draft + answer."
    )
    return (
        "InSPO trains pi(answer | prompt, other answer) and is used as pi(answer | prompt). So the base must find an\n"
        "answer about as likely after another answer as right after the prompt. Before training, its\n"
        f"log pi(y|x,other) - log pi(y|x) is {gap['chosen']:+.3f} nats per token for the chosen answers and "
        f"{gap['rejected']:+.3f} for the\nrejected answers. {verdict}"
    )


def draw_picture(results: dict[str, Any], inspo_metrics: list[dict[str, Any]], file: Path) -> None:
    """Draw the accuracy of the four models and the over-long runs, and InSPO's log-probs in both contexts."""
    from matplotlib.figure import Figure  # slow to import; a Figure of its own needs no display and no global state

    figure = Figure(figsize=(18, 4.6), layout="constrained")
    bars, long, margins, logps = figure.subplots(1, 4)

    models = results["models"]
    for position, (name, how) in enumerate((name, how) for how in ("greedy", "sampled") for name in models):
        row = models[name][how]
        low, high = row["accuracy_ci"]
        x = position + (position >= len(models))
        error = [[max(row["accuracy"] - low, 0)], [max(high - row["accuracy"], 0)]]
        label = NAMES[name] if how == "greedy" else None
        bars.bar(x, row["accuracy"], yerr=error, color=COLORS[name], capsize=3, label=label)
    bars.set(title="Right answers, from the prompt alone", ylabel="share of unseen prompts", ylim=(0, 1.05))
    bars.set_xticks([(len(models) - 1) / 2, len(models) + 1 + (len(models) - 1) / 2], ["greedy", "sampled"])

    rows = [row for row in inspo_metrics if "eval_loss" in row]
    steps = [row["step"] for row in rows]
    for layout, label, color in (
        ("conditioned", "given the other answer (trained)", "tab:blue"),
        ("marginal", "prompt alone (used)", "tab:orange"),
    ):
        name = f"eval_{layout}/rewards/margins"
        margins.plot(steps, [row[name] for row in rows], "o-", color=color, label=label, markersize=3)
        ends = [row[f"{name}_ci"] or [row[name]] * 2 for row in rows]
        margins.fill_between(steps, *zip(*ends), color=color, alpha=0.15, linewidth=0)
        for what, style in (("chosen", "o-"), ("rejected", "o--")):
            values = [row[f"eval_{layout}/logps/{what}"] for row in rows]
            logps.plot(steps, values, style, color=color, label=f"{what}, {label.partition(' (')[0]}", markersize=3)
    margins.set(title="InSPO: reward margin", ylabel="chosen - rejected, pairs of unseen prompts", xlabel="step")
    logps.set(title="InSPO: log-probs of answers", ylabel="nats, pairs of unseen prompts", xlabel="step")
    _draw_over_training(long, results)
    for axes in (bars, long, margins, logps):
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    for axes in (long, margins, logps):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def _draw_over_training(axes: Any, results: dict[str, Any]) -> None:
    """Draw the greedy accuracy by step of the runs that are too long for their few pairs."""
    settings = results["settings"]
    for name, points in results["over_trained"].items():
        steps, middle = [point["step"] for point in points], [point["accuracy"] for point in points]
        axes.plot(steps, middle, "o-", color=COLORS[name], label=NAMES[name], markersize=3)
        axes.fill_between(steps, *zip(*(p["accuracy_ci"] for p in points)), color=COLORS[name], alpha=0.15, linewidth=0)
    base = results["models"]["base"]["greedy"]["accuracy"]
    axes.axhline(base, color=COLORS["base"], ls=":", label=NAMES["base"])
    axes.set_xscale("log", base=2)
    axes.set_xticks(settings["long_steps"], [str(step) for step in settings["long_steps"]])
    pairs, size = settings["long_pairs"], settings["long_step_pairs"]
    axes.set(
        title=f"Trained too long on {pairs} pairs",
        ylabel="share of right answers, greedy",
        ylim=(0, None),
        xlabel=f"step of {size} pairs, constant learning rate",
    )

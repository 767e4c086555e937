"""Format the tables of time and memory from result files, for ``benchmarks.report``."""

from __future__ import annotations

from typing import Any

from .contenders import CONTENDERS
from .measure import FORWARD, PRODUCTS, TRAIN

TITLES = {name: contender.title for name, contender in CONTENDERS.items()}
SAVINGS = {
    "torch": "inspo_kernels",
    "full_log_softmax": "log_softmax at every position",
    "log_softmax": "log_softmax of the scored rows",
    "trl": "TRL",
    "liger": "Liger",
}


def loss(result: dict[str, Any]) -> str:
    """Tabulate the pairwise loss at each shape: time relative to the floor, memory, and the worst error."""
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
                time = ratio_text(row["times_floor"], name == "floor") if row.get("times_floor") else "not yet timed"
                texts += [time, _mebibytes(row)]
                errors += row.get("relative_error", {}).values()
            else:
                texts += [row["status"], ""]
        error = f"{max(errors):.0e}" if errors else ""
        lines.append(f"| {_title(name)} | " + " | ".join([*texts, error]) + " |")
    peak = "Peak memory is measured in a fresh process, above the inputs."
    return "\n".join([*lines, "", peak, "", source(result, "loss_cpu.json")])


def savings(result: dict[str, Any]) -> str:
    """Return a line for the README: time and memory of the loss and of the best-known implementations on a CPU."""
    cell = result["cells"][0]
    texts = (
        f"{title} {row['times_floor']['median']:.2f}, {_mebibytes(row)}"
        for name, title in SAVINGS.items()
        if (row := cell["contenders"][name])
    )
    return (
        f"Forward + backward relative to the floor, and peak memory, on {result['hardware']['cores']} CPU cores "
        f"({result['dtype']}, {cell['pairs']} pairs, H = {cell['hidden']}, V = {cell['vocab']:,}): {'; '.join(texts)} "
        f"({result['date']}, commit {result['package']['commit']}: "
        "[loss_cpu.json](benchmarks/results/loss_cpu.json))."
    )


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
        ratio, seconds = ratio_text(row[f"times_{base}"], name == base), f"{row['seconds']['median']:.2f}"
        lines.append(f"| {title} | {ratio} | {seconds} | {_mebibytes(row)} | {error} |")
    return lines


def ratio_text(ratio: dict[str, float], is_base: bool = False) -> str:
    around = "one round" if ratio["q1"] == ratio["q3"] else f"{ratio['q1']:.2f}-{ratio['q3']:.2f}"
    return f"{ratio['median']:.2f}" + ("" if is_base else f" ({around})")


def _mebibytes(row: dict[str, Any]) -> str:
    return "not measured" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 2**20:,.0f} MiB"


def logps(result: dict[str, Any]) -> str:
    """Tabulate time / floor of the per-token op at the first shape, by mode."""
    cells = [cell for cell in result["cells"] if cell["shape"] == result["cells"][0]["shape"]]
    first = cells[0]
    lines = [
        f"Time relative to the bare matmuls of each mode (their number in parentheses), and peak memory, for "
        f"{first['scored_tokens']:,} tokens, H = {first['hidden']}, V = {first['vocab']:,}, {result['dtype']}:",
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
            time = ratio_text(row["times_floor"]) if row.get("times_floor") else "not yet timed"
            texts.append(f"{time}, {_mebibytes(row)}" if row["status"] == "measured" else row["status"])
        lines.append(f"| {TITLES[name]} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", source(result, "logps_cpu.json")])


def scaling(result: dict[str, Any]) -> str:
    """Tabulate the fitted growth of time and memory."""
    sweeps = result["fits"]
    names = list(dict.fromkeys(name for fit in sweeps.values() for name in fit))
    lines = [
        "Exponents of power laws fitted to time and to peak memory (1 is linear growth, 0 is constant). Each column "
        "changes one quantity:",
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
        f"({default[1]['bytes'] / 2**20:.0f} MiB) takes {share:.2f} times as long as the fastest workspace that we "
        f"tried: {best[1]['rows']} rows ({best[1]['bytes'] / 2**20:.0f} MiB).",
        "",
        "![time and memory](docs/scaling_cpu.png)",
    ]
    return "\n".join([*lines, "", source(result, "scaling_cpu.json")])


def step(result: dict[str, Any]) -> str:
    """Tabulate whole steps by prompt share, with the evidence that all contenders do the same work."""
    titles = result["titles"]
    lines = [
        f"Time of a whole training step relative to four forwards (quartiles), and peak memory, in {result['dtype']}. "
        "Rows differ in the prompt's share of prompt + chosen + rejected, or use the lengths of real pairs. The "
        "baseline runs four forwards in every step: policy and reference, chosen and rejected. All others compute the "
        "reference once, before training. The figure after the + is this cost in a run of one epoch. TRL lacks this "
        "figure, because its reference pass was not timed separately from building the trainer.",
        "",
        "| model, prompt share | " + " | ".join(titles.values()) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for cell in result["cells"]:
        texts = []
        for name in titles:
            row = cell["contenders"].get(name, {"status": "not measured"})
            texts.append(step_time(name, row, cell) if row["status"] == "measured" else row["status"])
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
            f"The training loop groups pairs of similar length ({'; '.join(padding)}). All other contenders process a "
            "step's pairs as one batch. TRL would also pad less with smaller batches.",
        ]
    return "\n".join(
        [
            *lines,
            "",
            f"Models (Llama-shaped, random weights): {models}.",
            "",
            _same_work(result),
            "",
            source(result, "step_cpu.json"),
        ]
    )


def step_time(name: str, row: dict[str, Any], cell: dict[str, Any]) -> str:
    """Format a step's time / four forwards, its share of the one reference pass, and memory."""
    memory = "" if row.get("peak_bytes") is None else f", {_mebibytes(row)}"
    if "times_four_forwards" not in row:
        return f"not yet timed{memory}"
    text = ratio_text(row["times_four_forwards"], name == "four_forwards")
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
            f"{row['errors']['weights']:.0e} of the distance they moved{verdict}"
        )
    return f"After {work['updates']} updates in {work['dtype']}, relative to four forwards: {'; '.join(parts)}."


def trainers(result: dict[str, Any]) -> str:
    """Tabulate steps of InSPOTrainer relative to TRL's DPOTrainer."""
    titles, first = dict(result["titles"]), result["cells"][0]
    titles["trl_compact"] = "DPOTrainer, conditioned rows, head on scored positions"
    lines = [
        f"Time of a step relative to DPOTrainer (quartiles), and peak memory, in {result['dtype']}. Both trainers make "
        f"the same updates. The last of {first['updates']} steps is logged. On this step InSPOTrainer also scores the "
        "marginals.",
        "",
        "| model, prompt share | " + " | ".join(titles.values()) + " |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for cell in result["cells"]:
        rows = ((name, cell["contenders"].get(name, {"status": "not measured"})) for name in titles)
        texts = [
            f"{ratio_text(row['times_trl_compact'], name == 'trl_compact')}, {_mebibytes(row)}"
            if "times_trl_compact" in row
            else row["status"]
            for name, row in rows
        ]
        lines.append(f"| {cell['name']} | " + " | ".join(texts) + " |")
    return "\n".join([*lines, "", source(result, "trl_step_cpu.json")])


# Contenders of the GPU tables, in order, with shorter titles than in the tables for a CPU.
GPU_ROWS = {
    "floor": "floor: the bare matmuls, outputs preallocated",
    "triton, labels on the CPU": "inspo_kernels, labels on the CPU",
    "triton": "inspo_kernels, labels on the GPU",
    "log_softmax": "log_softmax of the scored rows",
    "trl": "TRL ChunkedLogProbFunction",
    "trl_trainer": "the same, with the outputs its trainer asks for",
    "cut_cross_entropy": "Cut Cross-Entropy",
}

MAIN_SHAPE = ("llama3-8b", 8192)


def _main_cells(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cells of the main shape by mode, or the first cell if the main shape was not measured."""
    cells = [cell for cell in result["cells"] if (cell["model"], cell["tokens"]) == MAIN_SHAPE]
    return {cell["mode"]: cell for cell in cells or result["cells"][:1]}


def _sequence_error(result: dict[str, Any], name: str) -> str:
    """Return the largest error of a contender's summed log-probs, without a soft-cap, in the dtype that is timed."""
    found = [
        row["errors"]["sequence_nat"]
        for row in result["accuracy"]
        if (row["contender"], row["dtype"], row["softcap"]) == (name, result["dtype"], None)
        and "sequence_nat" in row.get("errors", {})
    ]
    return f"{max(found):.1g}" if found else ""


def _gpu_cell(row: dict[str, Any], name: str) -> str:
    if row.get("status") != "measured":
        return "not measured"
    ratio = ratio_text(row["times_floor"], name == "floor")
    memory = "" if name == "floor" else f", {_mebibytes(row)}"
    return f"{ratio}, {1e3 * row['seconds']['median']:.1f} ms{memory}"


def _gpu_about(result: dict[str, Any]) -> str:
    cell = next(iter(_main_cells(result).values()))
    return f"{cell['scored_tokens']:,} scored tokens, H = {cell['hidden']:,}, V = {cell['vocab']:,}, {result['dtype']}"


def gpu_savings(result: dict[str, Any]) -> str:
    """Tabulate the loss on a GPU for the README: time and memory of training, time of scoring, and error."""
    cells = _main_cells(result)
    train, score = cells[TRAIN]["contenders"], cells[FORWARD]["contenders"]
    lines = [
        f"The pairwise loss on an {result['device']['name']}, for {_gpu_about(result)} (Llama-3-8B's head). Times are "
        f"relative to the floor: the LM head's matmuls alone, {PRODUCTS[TRAIN]} for forward + backward and "
        f"{PRODUCTS[FORWARD]} for a forward without gradients. Each call is queued behind other GPU work, as "
        f"in training. If `labels` is a CPU tensor, the call need not wait for that work. "
        f"{_least_memory(train)}The last column is the largest error of a response's log-prob (512 tokens) against "
        "float64.",
        "",
        "| | forward + backward (quartiles) | its peak memory, gradients included | forward only | error, nats |",
        "|---|---|---|---|---|",
    ]
    for name, title in GPU_ROWS.items():
        if name == "trl_trainer" or train.get(name, {}).get("status") != "measured":
            continue
        plain = name == "floor"
        memory = "" if plain else _mebibytes(train[name])
        forward = (
            ratio_text(score[name]["times_floor"], True) if plain else f"{score[name]['times_floor']['median']:.2f}"
        )
        ratio = ratio_text(train[name]["times_floor"], plain)
        lines.append(f"| {title} | {ratio} | {memory} | {forward} | {_sequence_error(result, name)} |")
    return "\n".join([*lines, "", source(result, "gpu.json")])


def _least_memory(rows: dict[str, dict[str, Any]]) -> str:
    """Return a sentence on the contender with the least memory in forward + backward, or "" if it is ours."""
    found = {n: rows[n] for n in GPU_ROWS if n != "floor" and rows.get(n, {}).get("status") == "measured"}
    name = min(found, key=lambda n: found[n]["peak_bytes"])
    if CONTENDERS[name].backend:
        return ""
    longest = found[name] is max(found.values(), key=lambda row: row["times_floor"]["median"])
    time = "and the most time" if longest else f"and {found[name]['times_floor']['median']:.2f} times the floor's time"
    return f"In forward + backward, {GPU_ROWS[name]} needs the least memory {time}. "


def gpu(result: dict[str, Any]) -> str:
    """Tabulate time / floor at the main shape in every mode; add other shapes, options of the call, and the targets."""
    cells = _main_cells(result)
    lines = [
        f"The pairwise loss, for {_gpu_about(result)}. A cell gives the time relative to the bare matmuls of its mode "
        "(their number is in the title; quartiles follow), the time, and the peak memory above the inputs. Each call "
        "is queued behind other GPU work, as in training. The last column is the largest error of a response's "
        "log-prob (512 tokens) against float64, in nats.",
        "",
        "| | " + " | ".join(f"{mode} ({PRODUCTS[mode]})" for mode in cells) + " | error |",
        "|---" * (len(cells) + 2) + "|",
    ]
    for name, title in GPU_ROWS.items():
        found = [cell["contenders"].get(name, {}) for cell in cells.values()]
        if any(row.get("status") == "measured" for row in found):
            columns = " | ".join(_gpu_cell(row, name) for row in found)
            lines.append(f"| {title} | {columns} | {_sequence_error(result, name)} |")
    idle = [
        f"{mode} {row['from_idle']['times_floor']['median']:.2f}"
        for mode, cell in cells.items()
        if (row := cell["contenders"].get("triton", {})).get("from_idle")
    ]
    if idle:
        lines += [
            "",
            "On an idle GPU nothing hides the time that Python takes for launches. Relative to the bare matmuls, "
            f"inspo_kernels with labels on the GPU then takes: {', '.join(idle)}.",
        ]
    others = [
        f"{cell['tokens']:,} tokens of {cell['model']}, {cell['mode']}: {row['times_floor']['median']:.2f}"
        + (f" (log_softmax of the scored rows {plain['median']:.2f})" if plain else "")
        for cell in result["cells"]
        if cell not in cells.values() and (row := cell["contenders"].get("triton", {})).get("status") == "measured"
        for plain in [cell["contenders"].get("log_softmax", {}).get("times_floor")]
    ]
    if others:
        lines += ["", f"Other shapes, inspo_kernels with labels on the GPU: {'; '.join(others)}."]
    for key, what in (
        ("statistics", "With entropy and all other statistics from the same pass, relative to the plain call"),
        ("autocast", "Under autocast, as in training with float32 master weights, relative to the floor"),
        (
            "trees",
            "Four layers of a 1B model and the loss, forward and backward, 8 pairs (prompt 1,024, responses 256), "
            "relative to rows",
        ),
    ):
        rows = result.get(key, {})
        texts = [
            f"{name} {row['seconds']['median'] * 1e3:.1f} ms ({beside['median']:.2f})"
            for name, row in rows.items()
            if row["status"] == "measured"
            and (beside := next((v for k, v in row.items() if k.startswith("times_") and v), None))
        ]
        if texts:
            lines += ["", f"{what}: {'; '.join(texts)}."]
    lines += [
        "",
        *(
            f"- {row['target']}, target {row['limit']:g}: "
            + ("" if row["measured"] is None else f"{row['measured']:.4g}, ")
            + row["verdict"]
            for row in result["targets"]
        ),
    ]
    return "\n".join([*lines, "", source(result, "gpu.json")])


def gpu_form(result: dict[str, Any]) -> str:
    """Give the times of the library's matmuls with the row pass on the same GPU."""
    cells = _main_cells(result)
    texts = [f"{mode} {cell['contenders']['triton']['times_floor']['median']:.2f}" for mode, cell in cells.items()]
    return (
        "Other GPUs and dtypes use the library's matmuls, with a kernel that reads the logits between them. With an "
        f"idle {result['device']['name']} and labels on the GPU, this form of the loss took, relative to the bare "
        f"matmuls: {', '.join(texts)}."
        "\n\n" + source(result, "gpu_library_form.json")
    )


def source(result: dict[str, Any], file: str) -> str:
    """Return the line with a measurement's hardware, versions and date. The file holds the full command."""
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

"""Format the tables of time and memory from result files, for ``benchmarks.report``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from .contenders import CONTENDERS
from .gpu_accuracy import sequence_errors
from .measure import FORWARD, PRODUCTS, TRAIN
from .tables import TITLES, markdown, mebibytes, paragraphs, ratio_text

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
    shapes = [
        f"- {cell['shape']}: {cell['pairs']} pairs, prompt {cell['mean_prompt']:.0f}, responses "
        f"{cell['mean_response']:.0f}{'' if cell['shape'] == 'reference' else ' on average'}, H = {cell['hidden']}, "
        f"V = {cell['vocab']:,}: {cell['scored_tokens']:,} scored of {cell['positions']:,} positions"
        for cell in cells
    ]
    titles = [f"{cell['shape']}: {what}" for cell in cells for what in ("time / floor (quartiles)", "peak memory")]
    table = []
    for name in cells[0]["contenders"]:
        rows = rows_of(name, cells)
        texts = [text for row in rows for text in _time_and_memory(row, name)]
        errors = [error for row in rows for error in row.get("relative_error", {}).values()]
        table.append([TITLES[name], *texts, f"{max(errors):.0e}" if errors else ""])
    return paragraphs(
        f"The pairwise loss, {result['dtype']}, forward + backward:",
        "\n".join(shapes),
        markdown(["", *titles, "worst error against float64"], table),
        "Peak memory is measured in a fresh process, above the inputs.",
    )


def rows_of(name: str, cells: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a contender's row in each cell."""
    return [cell["contenders"].get(name, {"status": "not yet measured"}) for cell in cells]


def _time_and_memory(row: dict[str, Any], name: str) -> tuple[str, str]:
    if row["status"] != "measured":
        return row["status"], ""
    ratio = row.get("times_floor")
    return ratio_text(ratio, name == "floor") if ratio else "not yet timed", mebibytes(row)


def savings(result: dict[str, Any]) -> str:
    """Return a line for the README: time and memory of the loss and of the best-known implementations on a CPU."""
    cell = result["cells"][0]
    texts = (
        f"{title} {row['times_floor']['median']:.2f}, {mebibytes(row)}"
        for name, title in SAVINGS.items()
        if (row := cell["contenders"][name])
    )
    return (
        f"Forward + backward relative to the floor, and peak memory, on {result['hardware']['cores']} CPU cores "
        f"({result['dtype']}, {cell['pairs']} pairs, H = {cell['hidden']}, V = {cell['vocab']:,}): {'; '.join(texts)} "
        f"({result['date']}, commit {result['package']['commit']}: "
        "[loss_cpu.json](benchmarks/results/loss_cpu.json))."
    )


def logps(result: dict[str, Any]) -> str:
    """Tabulate time / floor of the per-token op at the first shape, by mode."""
    cells = [cell for cell in result["cells"] if cell["shape"] == result["cells"][0]["shape"]]
    first = cells[0]
    table = []
    for name in first["contenders"]:
        if name != "floor":
            texts = (_time_and_memory(row, name) for row in rows_of(name, cells))
            table.append([TITLES[name], *(", ".join(filter(None, pair)) for pair in texts)])
    return paragraphs(
        f"Time relative to the bare matmuls of each mode (their number in parentheses), and peak memory, for "
        f"{first['scored_tokens']:,} tokens, H = {first['hidden']}, V = {first['vocab']:,}, {result['dtype']}:",
        markdown(["", *(f"{cell['mode']} ({PRODUCTS[cell['mode']]})" for cell in cells)], table),
    )


def scaling(result: dict[str, Any]) -> str:
    """Tabulate the fitted growth of time and memory."""
    sweeps = result["fits"]
    table = []
    for name in dict.fromkeys(name for fit in sweeps.values() for name in fit):
        found = [[fit.get(name, {}).get(key) for key in ("seconds", "peak_bytes")] for fit in sweeps.values()]
        texts = (", ".join("-" if one is None else f"{one['exponent']:.2f}" for one in pair) for pair in found)
        table.append([TITLES[name], *texts])
    return paragraphs(
        "Exponents of power laws fitted to time and to peak memory (1 is linear growth, 0 is constant). Each column "
        "changes one quantity:",
        markdown(["", *sweeps], table),
        _default_workspace(result["workspace"]),
        "![time and memory](docs/scaling_cpu.png)",
    )


def _default_workspace(rows: dict[str, dict[str, Any]]) -> str:
    if not rows:
        return ""
    best = min(rows.values(), key=lambda row: row["seconds"]["median"])
    default = next(row for name, row in rows.items() if name.startswith("default"))
    share = default["seconds"]["median"] / best["seconds"]["median"]
    return (
        f"At the reference shape, the default workspace of {default['rows']} rows "
        f"({default['bytes'] / 2**20:.0f} MiB) takes {share:.2f} times as long as the fastest workspace that we "
        f"tried: {best['rows']} rows ({best['bytes'] / 2**20:.0f} MiB)."
    )


def step(result: dict[str, Any]) -> str:
    """Tabulate whole steps by prompt share, with the evidence that all contenders do the same work."""
    models = "; ".join(
        f"{name}: {m['layers']} layers, H = {m['hidden']}, V = {m['vocab']:,}" for name, m in result["models"].items()
    )
    padding = [
        f"{cell['name']}: {loop['positions_per_step']:,.0f} positions against {tree['positions_per_step']:,.0f}"
        for cell in result["cells"]
        for loop, tree in [[cell["contenders"].get(name, {}) for name in ("loop", "tree")]]
        if loop.get("positions_per_step", 0) < 0.9 * tree.get("positions_per_step", 0)
    ]
    grouped = (
        f"The training loop groups pairs of similar length ({'; '.join(padding)}). All other contenders process a "
        "step's pairs as one batch. TRL would also pad less with smaller batches."
    )
    return paragraphs(
        f"Time of a whole training step relative to four forwards (quartiles), and peak memory, in {result['dtype']}. "
        "Rows differ in the prompt's share of prompt + chosen + rejected, or use the lengths of real pairs. The "
        "baseline runs four forwards in every step: policy and reference, chosen and rejected. All others compute the "
        "reference once, before training. The figure after the + is this cost in a run of one epoch. TRL lacks this "
        "figure, because its reference pass was not timed separately from building the trainer.",
        _step_table(result, result["titles"], step_time),
        grouped if padding else "",
        f"Models (Llama-shaped, random weights): {models}.",
        _same_work(result),
    )


def _step_table(
    result: dict[str, Any], titles: Mapping[str, str], text_of: Callable[[str, dict[str, Any], dict[str, Any]], str]
) -> str:
    """Tabulate whole steps: one row per cell, one column per contender."""
    table = []
    for cell in result["cells"]:
        rows = {name: cell["contenders"].get(name, {"status": "not measured"}) for name in titles}
        texts = (text_of(n, row, cell) if row["status"] == "measured" else row["status"] for n, row in rows.items())
        table.append([cell["name"], *texts])
    return markdown(["model, prompt share", *titles.values()], table)


def step_time(name: str, row: dict[str, Any], cell: dict[str, Any]) -> str:
    """Format a step's time / four forwards, its share of the one reference pass, and memory."""
    memory = "" if row.get("peak_bytes") is None else f", {mebibytes(row)}"
    if not row.get("times_four_forwards"):
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
        found = row["status"]
        if "errors" in row:
            found = (
                f"losses differ by at most {row['errors']['loss']:.0e}, weights by {row['errors']['weights']:.0e} of "
                f"the distance they moved{'' if row['same'] else ', NOT THE SAME'}"
            )
        if name != "four_forwards":
            parts.append(f"{result['titles'].get(name, name)}: {found}")
    return f"After {work['updates']} updates in {work['dtype']}, relative to four forwards: {'; '.join(parts)}."


def trainers(result: dict[str, Any]) -> str:
    """Tabulate steps of InSPOTrainer relative to TRL's DPOTrainer."""
    titles = result["titles"] | {"trl_compact": "DPOTrainer, conditioned rows, head on scored positions"}

    def text(name: str, row: dict[str, Any], cell: dict[str, Any]) -> str:
        ratio = row.get("times_trl_compact")
        return f"{ratio_text(ratio, name == 'trl_compact') if ratio else 'not yet timed'}, {mebibytes(row)}"

    return paragraphs(
        f"Time of a step relative to DPOTrainer (quartiles), and peak memory, in {result['dtype']}. Both trainers make "
        f"the same updates. The last of {result['cells'][0]['updates']} steps is logged. On this step InSPOTrainer "
        "also scores the marginals.",
        _step_table(result, titles, text),
    )


# Contenders of the GPU tables, in order, with shorter titles than in the tables for a CPU.
GPU_ROWS = {
    "floor": "floor: the bare matmuls, outputs preallocated",
    "triton, labels on the CPU": "inspo_kernels, labels on the CPU",
    "triton": "inspo_kernels, labels on the GPU",
    "log_softmax": "log_softmax of the scored rows",
    "compiled_log_softmax": "the same, compiled by torch.compile",
    "trl": "TRL ChunkedLogProbFunction",
    "trl_trainer": "the same, with the outputs its trainer asks for",
    "liger": "Liger fused linear DPO, without a reference",
    "cut_cross_entropy": "Cut Cross-Entropy",
}

GPU_OPTIONS = {
    "statistics": "With entropy and all other statistics from the same pass, relative to the plain call",
    "autocast": "Under autocast, as in training with float32 master weights, relative to the floor",
    "trees": "Four layers of a 1B model and the loss, forward and backward, 8 pairs (prompt 1,024, responses 256), "
    "relative to rows",
}
SHAPE_ROWS = ("triton, labels on the CPU", "triton", "log_softmax", "trl", "cut_cross_entropy")
MAIN_SHAPE = ("llama3-8b", 8192)


def _main_cells(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the cells of the main shape by mode."""
    return {c["mode"]: c for c in result["cells"] if (c["model"], c["tokens"]) == MAIN_SHAPE}


def _sequence_error(result: dict[str, Any], name: str) -> str:
    """Return the largest error of a contender's summed log-probs, without a soft-cap, in the dtype that is timed."""
    found = sequence_errors([row for row in result["accuracy"] if row["softcap"] is None], name, result["dtype"])
    return f"{max(found):.1g}" if found else ""


def _gpu_cell(row: dict[str, Any], name: str) -> str:
    if row.get("status") != "measured":
        return "not measured"
    ratio, memory = _time_and_memory(row, name)
    return f"{ratio}, {1e3 * row['seconds']['median']:.1f} ms" + ("" if name == "floor" else f", {memory}")


def _gpu_about(result: dict[str, Any]) -> str:
    cell = next(iter(_main_cells(result).values()))
    return f"{cell['scored_tokens']:,} scored tokens, H = {cell['hidden']:,}, V = {cell['vocab']:,}, {result['dtype']}"


def gpu_savings(result: dict[str, Any]) -> str:
    """Tabulate the loss on a GPU for the README: time and memory of training, time of scoring, and error."""
    cells = _main_cells(result)
    train, score = cells[TRAIN]["contenders"], cells[FORWARD]["contenders"]
    table = []
    for name, title in GPU_ROWS.items():
        if name != "trl_trainer" and train.get(name, {}).get("status") == "measured":
            ratio, memory = _time_and_memory(train[name], name)
            forward = ratio_text(score[name]["times_floor"], is_base=True)
            table.append([title, ratio, "" if name == "floor" else memory, forward, _sequence_error(result, name)])
    titles = ("forward + backward (quartiles)", "its peak memory, gradients included", "forward only", "error, nats")
    return paragraphs(
        f"The pairwise loss on an {result['device']['name']}, for {_gpu_about(result)} (Llama-3-8B's head). Times are "
        f"relative to the floor: the LM head's matmuls alone, {PRODUCTS[TRAIN]} for forward + backward and "
        f"{PRODUCTS[FORWARD]} for a forward without gradients. Each call is queued behind other GPU work, as "
        f"in training. If `labels` is a CPU tensor, the call need not wait for that work. "
        f"{_least_memory(train)}The last column is the largest error of a response's log-prob (512 tokens) against "
        "float64.",
        markdown(["", *titles], table),
    )


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
    table = []
    for name, title in GPU_ROWS.items():
        found = [cell["contenders"].get(name, {}) for cell in cells.values()]
        if any(row.get("status") == "measured" for row in found):
            table.append([title, *(_gpu_cell(row, name) for row in found), _sequence_error(result, name)])
    targets = (
        f"- {row['target']}, target {row['limit']:g}: "
        + ("" if row["measured"] is None else f"{row['measured']:.4g}, ")
        + row["verdict"]
        for row in result["targets"]
    )
    return paragraphs(
        f"The pairwise loss, for {_gpu_about(result)}. A cell gives the time relative to the bare matmuls of its mode "
        "(their number is in the title; quartiles follow), the time, and the peak memory above the inputs. Each call "
        "is queued behind other GPU work, as in training. The last column is the largest error of a response's "
        "log-prob (512 tokens) against float64, in nats.",
        markdown(["", *(f"{mode} ({PRODUCTS[mode]})" for mode in cells), "error"], table),
        _from_idle(cells),
        _other_shapes(result, cells),
        *(_options(result.get(key, {}), what) for key, what in GPU_OPTIONS.items()),
        _training(result, cells),
        "\n".join(targets),
    )


def _training(result: dict[str, Any], cells: dict[str, dict[str, Any]]) -> str:
    found = result.get("training") or {}
    if found.get("status") != "measured":
        return ""
    cell = cells[TRAIN]
    operations = 2 * PRODUCTS[TRAIN] * cell["scored_tokens"] * cell["hidden"] * cell["vocab"]
    floor = operations / cell["contenders"]["floor"]["seconds"]["median"] / 1e12
    return (
        f"A training run of a 1B model (8 pairs a step, prompts of 512 and responses of 256 tokens, trees, mixed "
        f"precision) trains on {found['tokens_per_second']['median']:,.0f} tokens per second. Its matmuls with weights "
        f"alone are {found['tflops']:.0f} TFLOP/s, {found['tflops'] / floor:.0%} of what the bare matmuls above reach. "
        f"Peak memory is {found['peak_memory_gib']['median']:.0f} GiB."
    )


def _from_idle(cells: dict[str, dict[str, Any]]) -> str:
    idle = [
        f"{mode} {row['from_idle']['times_floor']['median']:.2f}"
        for mode, cell in cells.items()
        if (row := cell["contenders"].get("triton", {})).get("from_idle")
    ]
    about = (
        "On an idle GPU nothing hides the time that Python takes for launches. Relative to the bare matmuls, "
        f"inspo_kernels with labels on the GPU then takes: {', '.join(idle)}."
    )
    return about if idle else ""


def _other_shapes(result: dict[str, Any], cells: dict[str, dict[str, Any]]) -> str:
    """Tabulate time / floor of all shapes but the main one."""
    names = {name: title for name, title in GPU_ROWS.items() if name in SHAPE_ROWS}
    table = []
    for cell in result["cells"]:
        rows = cell["contenders"]
        if cell in cells.values() or rows.get("triton", {}).get("status") != "measured":
            continue
        found = [rows.get(name, {}).get("times_floor") for name in names]
        ratios = [f"{ratio['median']:.2f}" if ratio else "not measured" for ratio in found]
        table.append([f"{cell['model']}, {cell['tokens']:,}", cell["mode"], *ratios])
    if not table:
        return ""
    return "Other models and numbers of scored tokens:\n\n" + markdown(["", "mode", *names.values()], table)


def _options(rows: dict[str, dict[str, Any]], what: str) -> str:
    texts = [
        f"{name} {row['seconds']['median'] * 1e3:.1f} ms ({beside['median']:.2f})"
        for name, row in rows.items()
        if (beside := next((v for k, v in row.items() if k.startswith("times_") and v), None))
    ]
    return f"{what}: {'; '.join(texts)}." if texts else ""


def gpu_form(result: dict[str, Any]) -> str:
    """Give the times of the library's matmuls with the row pass on the same GPU."""
    cells = _main_cells(result)
    texts = [f"{mode} {cell['contenders']['triton']['times_floor']['median']:.2f}" for mode, cell in cells.items()]
    return paragraphs(
        "Other GPUs and dtypes use the library's matmuls, with a kernel that reads the logits between them. With an "
        f"idle {result['device']['name']} and labels on the GPU, this form of the loss took, relative to the bare "
        f"matmuls: {', '.join(texts)}.",
    )

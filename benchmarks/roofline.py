"""Predict the time of one pass on GPUs where it has not been measured, line by line.

    python -m benchmarks.roofline                              Llama-3-8B's head, 8,192 tokens
    python -m benchmarks.roofline --chips H200 --grid          every model, length and mode
    python -m benchmarks.roofline --measured gpu.json          beside what ``benchmarks.gpu`` measured

Every line of a pass is a count (operations, bytes, launches) over a rate of ``benchmarks.chips``, so a measurement that
differs names the line that is wrong. Three forms of the pass are predicted: ``staged``, whole rows of float32 logits in
memory, 1,024 at a time; ``cached``, tiles of 1,024 rows by some 8,000 words that stay in the cache; and ``fused``,
logits in registers alone. For bfloat16 the backend uses ``fused`` on sm_90 and ``cached`` elsewhere. A pass's floor is
its bare matmuls with bfloat16 output. No figure in this file is a measured time of a pass.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inspo_kernels.kernels import config

from .batches import MODELS, HeadShape
from .chips import CHIPS, Chip
from .measure import FORWARD, FROZEN, MODES, PRODUCTS, TRAIN
from .result_files import add_names, make_parser, positive
from .tables import markdown

STAGED, CACHED, FUSED = "staged", "cached", "fused"
FORMS = (STAGED, CACHED, FUSED)
ORDER = (FORWARD, FROZEN, TRAIN)
TOKENS = (1024, 2048, 4096, 8192, 16384)

# --- assumptions: change one here and every prediction follows ---

# Rows of logits at a time in the staged and the cached form.
TILE_ROWS = 1024
# Rows of E that one workspace holds. Further rows read and write dW in float32 once more.
WORKSPACE_ROWS = 8192
# A matmul works in tiles of 128 x 256, one a multiprocessor at a time: a last wave that is not full costs a whole one.
MATMUL_TILE = (128, 256)
# Storing float32 logits instead of bfloat16 ones slows their matmul by this share: 0 to 6 % are possible. In the cache
# the stores cost nothing.
WIDE_OUTPUT = {STAGED: 0.01, CACHED: 0.0}
# Instructions of one element of the row pass (compile report, sm_90): with and without E, with a soft-cap.
INSTRUCTIONS = {(True, False): 16.6, (False, False): 15.9, (True, True): 41.9, (False, True): 37.1}
SPECIAL = {False: 1, True: 3}
# Instructions per logit of the fused pass, without and with a soft-cap (counted in machine code, sm_90). It computes E
# between two tiles of its matmul.
FUSED_INSTRUCTIONS = {False: 11, True: 36}
# From the call to the first matmul on the device, and between two kernels of a queue that never runs empty.
START_SECONDS = 0.4e-3
GAP_SECONDS = 1.5e-6
# What the host takes to queue a kernel. Where the device is faster than that, the host decides.
HOST_SECONDS = 20e-6


@dataclass(frozen=True)
class Line:
    """Hold the seconds of one part of a pass, and the count and rate behind them."""

    name: str
    seconds: float
    why: str
    launches: int = 1


def tile_words(chip: Chip) -> int:
    """Return the words of a tile of logits on the chip, as the backend chooses them."""
    return config.tile_in_cache(chip.target, chip.cache_bytes, chip.multiprocessors, 4).words


def matmul_seconds(chip: Chip, m: int, n: int, k: int, moved: float) -> float:
    """Predict an (m, k) by (k, n) matmul: its operations in whole waves, or the bytes moved if they take longer."""
    tiles = -(-m // MATMUL_TILE[0]) * -(-n // MATMUL_TILE[1])
    full = -(-tiles // chip.multiprocessors) * chip.multiprocessors / tiles
    return max(2 * m * n * k / chip.matmul * full, moved / chip.memory)


def floor(chip: Chip, head: HeadShape, tokens: int, mode: str) -> float:
    """Predict the seconds of the bare matmuls of a mode, each one call over all rows in bfloat16."""
    moved = 2 * (tokens * head.hidden + head.vocab * head.hidden + tokens * head.vocab)
    shapes = [(tokens, head.vocab, head.hidden), (tokens, head.hidden, head.vocab), (head.vocab, head.hidden, tokens)]
    return sum(matmul_seconds(chip, m, n, k, moved) for m, n, k in shapes[: PRODUCTS[mode]])


def row_pass_seconds(chip: Chip, head: HeadShape, elements: float, store: bool, form: str) -> tuple[float, str]:
    """Predict the pass over the logits and its bound: memory, cache, instruction issue or special functions."""
    cap = head.softcap is not None
    stored = 2 if store else 0
    # Reads of the cache and stores to memory share the way out of a multiprocessor.
    memory, cache = (stored, 4 + stored) if form == CACHED else (4 + stored, 0)
    times = chip.limits(memory, cache, INSTRUCTIONS[store, cap], SPECIAL[cap])
    worst = max(times, key=lambda limit: times[limit])
    return elements * times[worst], worst


def lines(chip: Chip, head: HeadShape, tokens: int, mode: str, form: str) -> list[Line]:
    """Return the parts of a pass, named as in the step ``decomposition`` of ``benchmarks.gpu``."""
    h, v, n, logits = head.hidden, head.vocab, tokens, tokens * head.vocab
    store = mode != FORWARD
    start = Line("start", START_SECONDS, "host work before the first matmul", 0)
    if form == FUSED:
        product = matmul_seconds(chip, n, v, h, 2 * (n * h + v * h) + (2 * logits if store else 0))
        registers = logits * FUSED_INSTRUCTIONS[head.softcap is not None] / chip.lanes
        name = "fused pass with E" if store else "fused pass, sums alone"
        fused = Line(name, product + registers, "the matmul, then E in registers, bound by issue", 3)
        return with_gradients([start, fused], chip, head, tokens, mode)
    rows = min(n, TILE_ROWS)
    words = v if form == STAGED else min(v, tile_words(chip))
    calls = -(-n // rows) * -(-v // words)
    moved = 2 * (rows * h + words * h) + (4 * rows * words if form == STAGED else 0)
    one = matmul_seconds(chip, rows, words, h, moved)
    share = logits / (calls * rows * words)  # a last tile that is cut short
    first = calls * one * share * (1 + WIDE_OUTPUT[form])
    seconds, bound = row_pass_seconds(chip, head, logits, store, form)
    shape = f"{calls} x ({rows} x {words})"
    why = f"{shape}, whole waves, {WIDE_OUTPUT[form]:.0%} for float32"
    passes = [
        start,
        Line("logits matmul, float32 output", first, why, calls),
        Line("row pass", seconds, f"{logits:.3g} logits, bound by {bound}", calls),
    ]
    return with_gradients(passes, chip, head, tokens, mode)


def with_gradients(passes: list[Line], chip: Chip, head: HeadShape, tokens: int, mode: str) -> list[Line]:
    """Add the label logits, the gradient matmuls and the time between kernels, which are the same in every form."""
    h, v, n, logits = head.hidden, head.vocab, tokens, tokens * head.vocab
    result = [*passes, Line("label logits", 4 * n * h / chip.memory, "X and W[y] read")]
    if mode != FORWARD:
        e_bytes = 2 * logits + 2 * v * h
        result.append(Line("dX matmul", matmul_seconds(chip, n, h, v, e_bytes + 4 * n * h), "one call over all rows"))
        result.append(Line("scaling of dX", 6 * n * h / chip.memory, "float32 read, bfloat16 written"))
        result.append(Line("placing of dX", 6 * n * h / chip.memory, "read and written in bfloat16, zeros before"))
    if mode == TRAIN:
        e_bytes = 2 * logits + 2 * n * h
        result.append(Line("dW matmul", matmul_seconds(chip, v, h, n, e_bytes + 2 * v * h), "one call over all rows"))
        result.append(Line("scaling of X", 4 * n * h / chip.memory, "read and written in bfloat16"))
        groups = -(-n // WORKSPACE_ROWS)
        if groups > 1:  # dW is then float32 until the last group: 2 x 4 bytes a group, and rounded once
            again = (8 * groups - 4 + 6) * v * h / chip.memory
            result.append(Line("dW over several groups", again, f"{groups} groups"))
    launches = sum(line.launches for line in result)
    result.append(Line("gaps between kernels", launches * GAP_SECONDS, f"{launches} launches", 0))
    device = sum(line.seconds for line in result) - START_SECONDS
    waiting = max(0.0, launches * HOST_SECONDS - device)
    result.append(Line("waiting for the host", waiting, f"{launches} launches at {1e6 * HOST_SECONDS:.0f} us", 0))
    return result


def predicted(chip: Chip, head: HeadShape, tokens: int, mode: str, form: str) -> tuple[float, float]:
    """Return the seconds of a pass, and their ratio to the floor."""
    seconds = sum(line.seconds for line in lines(chip, head, tokens, mode, form))
    return seconds, seconds / floor(chip, head, tokens, mode)


# --- measured beside predicted ---


def measured_lines(result: dict[str, Any]) -> dict[str, float]:
    """Return seconds by line, from the busy device, of a result file's decomposition."""
    found = {
        name: row["busy"]["median"]
        for name, row in result.get("decomposition", {}).items()
        if row.get("status") == "measured"
    }
    for name in (f"row pass with E, stages of {TILE_ROWS}", f"logits matmul in stages of {TILE_ROWS}"):
        if name in found:
            found["row pass" if "pass" in name else "logits matmul, float32 output"] = found[name]
    return found


def measured_cell(result: dict[str, Any], model: str, tokens: int, mode: str) -> tuple[float, float] | None:
    """Return the seconds of the Triton backend and their ratio to the floor, or None."""
    for cell in result.get("cells", []):
        if (cell["model"], cell["tokens"], cell["mode"]) == (model, tokens, mode):
            row = cell["contenders"].get("triton", {})
            if row.get("times_floor"):
                return row["seconds"]["median"], row["times_floor"]["median"]
    return None


def chip_of(result: dict[str, Any]) -> str | None:
    """Return the chip that a result file was measured on."""
    name = result.get("device", {}).get("name", "")
    return next((chip for chip in CHIPS if chip in name), None)


# --- tables ---


def line_table(chip: Chip, model: str, tokens: int, mode: str, form: str, result: dict[str, Any] | None = None) -> str:
    """Format one pass line by line, beside the measured times of a result file if given."""
    head = MODELS[model]
    beside = measured_lines(result) if result else {}
    if mode == FORWARD and "row pass, statistics alone" in beside:
        beside["row pass"] = beside["row pass, statistics alone"]
    below = floor(chip, head, tokens, mode)
    total, ratio = predicted(chip, head, tokens, mode, form)
    text = [
        f"{chip.name}, {model}, {tokens} tokens, {mode}, {form}: predicted {1e3 * total:.2f} ms, {ratio:.3f} x floor"
    ]
    for line in lines(chip, head, tokens, mode, form):
        seen = f"{1e3 * beside[line.name]:9.3f} ms measured" if line.name in beside else ""
        text.append(
            f"  {line.name:<32}{1e3 * line.seconds:9.3f} ms {line.seconds / below:7.1%} of floor {seen:<22} {line.why}"
        )
    cell = measured_cell(result, model, tokens, mode) if result else None
    if cell:
        text.append(
            f"  measured: {1e3 * cell[0]:.2f} ms, {cell[1]:.3f} x floor; predicted {1e3 * total:.2f}, {ratio:.3f}"
        )
        known = sum(beside.get(line.name, line.seconds) for line in lines(chip, head, tokens, mode, form))
        text.append(f"  glue, measured in no line: {1e3 * (cell[0] - known):.3f} ms")
    return "\n".join(text)


def grid_table(chips: Sequence[str], form: str, result: dict[str, Any] | None = None) -> str:
    """Format the ratio to the floor by model, tokens and mode, measured ratios behind a slash."""
    text = [f"time / bare matmuls, {form}, predicted" + (" / measured" if result else "")]
    text.append(f"  {'':<34}" + "".join(f"{name:>16}" for name in chips))
    for model, head in MODELS.items():
        for tokens in TOKENS:
            for mode in MODES:
                cells = []
                for name in chips:
                    ratio = f"{predicted(CHIPS[name], head, tokens, mode, form)[1]:.3f}"
                    seen = measured_cell(result, model, tokens, mode) if result and chip_of(result) == name else None
                    cells.append(ratio + (f" / {seen[1]:.3f}" if seen else ""))
                text.append(f"  {f'{model}, {tokens}, {mode}':<34}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(text)


def summary() -> str:
    """Format the docs' table: ratio to the floor at Llama-3-8B's head and 8,192 tokens, staged / cached / fused."""
    table = []
    for chip in CHIPS.values():
        ratios = ([predicted(chip, MODELS["llama3-8b"], 8192, mode, form)[1] for form in FORMS] for mode in ORDER)
        table.append([chip.name, *(" / ".join(f"{ratio:.2f}" for ratio in row) for row in ratios)])
    return markdown(["predicted", "forward", "frozen head", "forward + backward"], table)


def assumptions(chips: Sequence[str]) -> str:
    """List every rate with its source, and the assumptions about the code."""
    text = ["assumptions"]
    for name in chips:
        chip = CHIPS[name]
        text.append(
            f"  {chip.name}: matmul {chip.matmul / 1e12:g} TFLOP/s, memory {chip.memory / 1e12:g} TB/s, "
            f"cache {chip.cache / 1e12:g} TB/s and {chip.cache_bytes >> 20} MB, "
            f"{chip.multiprocessors} multiprocessors at {chip.clock / 1e9:g} GHz"
        )
        text += [f"    {rate}: {source}" for rate, source in chip.sources.items()]
        text.append(f"    cached form: tiles of {TILE_ROWS} x {tile_words(chip)} words")
    text.append(
        f"  start {1e3 * START_SECONDS:g} ms, {1e6 * GAP_SECONDS:g} us between kernels, {1e6 * HOST_SECONDS:g} us of "
        f"the host a launch, float32 output {WIDE_OUTPUT[STAGED]:.0%}, workspace of {WORKSPACE_ROWS} rows"
    )
    return "\n".join(text)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = make_parser("roofline", __doc__)
    add_names(parser, "--chips", CHIPS, "chips to predict [all]")
    parser.add_argument("--model", choices=MODELS, default="llama3-8b", help="head of the line tables [llama3-8b]")
    parser.add_argument("--tokens", type=positive, default=8192, help="scored tokens of the line tables [8192]")
    parser.add_argument("--grid", action="store_true", help="ratios of every model, length and mode instead")
    parser.add_argument("--summary", action="store_true", help="the table of docs/benchmarks.md instead")
    parser.add_argument("--measured", type=Path, metavar="FILE", help="gpu.json to print beside")
    options = parser.parse_args(arguments)
    if options.summary:
        print(summary())
        return 0
    result = None
    if options.measured:
        try:
            result = json.loads(options.measured.read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--measured: {error}")
    chips = options.chips or list(CHIPS)
    if result is not None and options.chips is None:
        here = chip_of(result)
        if here is None:
            parser.error(
                f"--measured: measured on {result.get('device')}, none of {', '.join(CHIPS)}; name one by --chips"
            )
        chips = [here]
    print(assumptions(chips))
    for form in FORMS:
        if options.grid:
            print("\n" + grid_table(chips, form, result))
            continue
        for name in chips:
            for mode in ORDER:
                print("\n" + line_table(CHIPS[name], options.model, options.tokens, mode, form, result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

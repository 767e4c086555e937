"""Compile every Triton kernel ahead of time in every shipped configuration, and report facts of the machine code.

    python -m benchmarks.compile_report --json benchmarks/results/compile_report.json
    python -m benchmarks.compile_report --tests --json FILE     (also compile each launch of the GPU tests: an hour)

No GPU is needed. The package's own launchers run on dummy tensors, with a driver that compiles for a given
architecture and launches nothing. The compiled kernels are therefore those that a GPU would run, with the same
specialisation and options.

Registers, stack, instructions and access widths are read from the machine code. For NVIDIA chips the report adds the
hot loop: instructions and special functions (MUFU) per element, and the bottleneck on each chip. The exit code is 1
if a kernel

- does not compile or exceeds its budget (``BUDGETS``),
- has a stack frame (spilled registers) that its case does not allow,
- needs more shared memory than a program may have,
- multiplies a row stride in 32 bits, or
- accesses matrices with fewer than 16 bytes at a time although their layout allows 16.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from .launches import Case, cases, recorded
from .machine_code import bound, describe
from .result_files import add_names, make_parser, provenance, result_file, write_json

GPU_TESTS = ("tests/inspo_kernels/test_triton.py", "tests/inspo_kernels/test_triton_kernels.py")


@dataclass(frozen=True)
class Target:
    """An architecture. ``shared_limit`` is the shared memory in bytes that one program may have."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    may_spill: bool = False


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, may_spill=True),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "sm_120": Target("cuda", 120, 32, 99 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, may_spill=True),
    "gfx950": Target("hip", "gfx950", 64, 160 << 10, may_spill=True),
}


@dataclass(frozen=True)
class Budget:
    """Limits of a hot loop: most instructions and special functions per element, most registers, fewest residents."""

    instructions: float
    special: float
    registers: int
    residents: int


# Budgets for NVIDIA targets, by kernel, then by a regular expression over "configuration, target": the first match
# applies. With 32 registers, eight programs of 256 threads fit a multiprocessor, so that 1,024 rows are one wave on 132
# multiprocessors. sm_120 holds six programs in any case, and so do all chips with the 40 registers of a soft-cap (on
# sm_100 up to 44). A soft-cap's special functions are exp2 and a reciprocal for tanh and its derivative, and exp. The
# first tile of a row also finds its offset and may take more. float64 has no budget, because its speed does not matter.
# The figures hold for Triton 3.6 and 3.7, which differ slightly. Triton 3.8 needs up to 9 more registers
# (LATER_TRITON) for the same number of instructions.
BUDGETS = {
    "row_pass": {
        r"fp32 logits, statistics, plain": Budget(31, 1, 60, 4),
        r"fp32 logits, statistics, (bias|cap)": Budget(61, 3, 62, 4),
        r"fp32 logits, sums, plain.*sm_120": Budget(16.5, 1, 40, 6),
        r"fp32 logits, sums, plain": Budget(16.5, 1, 32, 8),
        r"fp32 logits, (\w+ )?E( in place)?, plain.*(word 0|sm_120)": Budget(18, 1, 40, 6),
        r"fp32 logits, (\w+ )?E( in place)?, plain": Budget(17.5, 1, 32, 8),
        r"fp32 logits, sums, cap": Budget(41, 3, 40, 6),
        r"fp32 logits, (\w+ )?E( in place)?, cap.*sm_100": Budget(43, 3, 48, 5),
        r"fp32 logits, (\w+ )?E( in place)?, cap": Budget(46.5, 3, 40, 6),
        r"fp32 logits, sums, bias": Budget(45, 3, 48, 5),
        r"fp32 logits, (\w+ )?E( in place)?, bias": Budget(50.5, 3, 48, 5),
    },
    "bias_gradient": {r"fp32 E|bf16 E|fp16 E": Budget(6, 0, 68, 3)},
}


# Additional registers and fewer resident programs from Triton 3.8 on. Limited to 32 registers, it spills one on sm_90.
LATER_TRITON = (3, 8)
LATER_REGISTERS, LATER_RESIDENTS = 10, 2


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Any]]:
    """Let every launch inside the context compile for ``target``, run nothing, and append its kernel to the list."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    # The device is the target, so each target has its own cache of compiled kernels.
    gpu = GPUTarget(target.backend, target.arch, target.warp_size)
    answers = {"target": lambda: gpu, "device": lambda: str(gpu), "stream": lambda device: 0}
    driver.set_active(SimpleNamespace(**{f"get_current_{what}": answer for what, answer in answers.items()}))
    JITFunction.run = compile_alone
    try:
        yield compiled
    finally:
        JITFunction.run = run


def budget_of(case: Case, target: Target) -> Budget | None:
    """Return the budget of a case's hot loop on a target under the installed Triton, or None."""
    import triton

    if case.elements is None or target.backend != "cuda":
        return None
    what = f"{case.configuration}, sm_{target.arch}"
    found = BUDGETS.get(case.kernel, {}).items()
    budget = next((budget for pattern, budget in found if re.search(pattern, what)), None)
    if budget and tuple(map(int, triton.__version__.split(".")[:2])) >= LATER_TRITON:
        registers, residents = budget.registers + LATER_REGISTERS, budget.residents - LATER_RESIDENTS
        budget = replace(budget, registers=registers, residents=residents)
    return budget


def over_budget(budget: Budget, row: dict[str, Any]) -> list[str]:
    """Return the ways in which a kernel exceeds its budget."""
    if "per_element" not in row:
        return ["no hot loop to compare with its budget"]
    found = []
    for what, value, limit in (
        ("instructions per element", row["per_element"]["instructions"], budget.instructions),
        ("special functions per element", row["per_element"]["special"], budget.special),
        ("registers", row["registers"], budget.registers),
    ):
        if value > limit:
            found.append(f"{round(value, 1):g} {what}, budget {limit:g}")
    if row["residents"] < budget.residents:
        found.append(f"{row['residents']} resident programs, budget {budget.residents}")
    return found


def problems(case: Case, target: Target, found: dict[str, Any]) -> list[str]:
    """Return the reasons why the report fails for this kernel."""
    checks = {
        f"{found['stack_bytes']} bytes of stack": found["stack_bytes"] > case.stack_bytes and not target.may_spill,
        f"shared memory above {target.shared_limit} bytes": found["shared_bytes"] > target.shared_limit,
        "row offsets in 32 bits": case.shipped and case.row_offsets and not found["rows_in_64_bits"],
        f"loads of {found['widest_load']} bytes": case.wide_loads and found["widest_load"] < 16,
        f"stores of {found['widest_store']} bytes": case.wide_stores and found["widest_store"] < 16,
    }
    budget = budget_of(case, target)
    return [what for what, bad in checks.items() if bad] + (over_budget(budget, found) if budget else [])


def compiled_row(case: Case, name: str, compiled: Any) -> dict[str, Any]:
    """Return the report's row of one compiled kernel."""
    kernel = compiled.metadata.name.strip("_").removesuffix("_kernel")
    row = {"kernel": kernel, "configuration": case.configuration, "target": name} | describe(compiled, name)
    if case.elements and row.get("loop"):
        elements, loop = case.elements(name), row["loop"]
        row["per_element"] = {what: loop[what] / elements for what in ("instructions", "special")}
        row["bound"] = bound(name, loop, elements, case.bytes, case.cache_bytes)
    return row | {"problems": problems(case, TARGETS[name], row)}


def report(chosen_targets: list[str], pattern: str, chosen_cases: Iterable[Case] | None = None) -> list[dict[str, Any]]:
    """Compile and judge every case that matches the pattern. A kernel that tests launch is compiled once per target."""
    results, seen = [], set()
    for case in cases() if chosen_cases is None else chosen_cases:
        if not re.search(pattern, f"{case.kernel}: {case.configuration}"):
            continue
        for name in chosen_targets:
            if not case.runs_on(name):
                continue
            try:
                with compiling_for(TARGETS[name]) as compiled:
                    case.launch(arch=name)
                rows = [
                    compiled_row(case, name, kernel)
                    for kernel in compiled
                    if case.shipped or (name, kernel.hash) not in seen
                ]
                seen |= {(name, kernel.hash) for kernel in compiled}
            except Exception as error:
                why = f"does not compile: {type(error).__name__}: {error}"
                rows = [{"kernel": case.kernel, "configuration": case.configuration, "target": name, "problems": [why]}]
            for row in rows:
                results.append(row)
                print(_line(row), flush=True)
    return results


def launches_of_tests(folder: Path) -> Path:
    """Run the GPU tests in Triton's interpreter and return the file of the launches that they made."""
    file = folder / "launches.jsonl"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "benchmarks.launches", *GPU_TESTS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "LAUNCHES": str(file)}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode or not file.exists():
        raise SystemExit(f"the tests do not pass in the interpreter:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return file


COLUMNS = ("registers", "stack_bytes", "shared_bytes", "widest_load", "widest_store", "residents")
HEADER = f"{'target':7} {'kernel':14} {' '.join(COLUMNS)} instructions special  configuration"


def _line(row: dict[str, Any]) -> str:
    counts = {name: round(value, 1) for name, value in row.get("per_element", {}).items()}
    figures = (f"{row.get(name, ''):>{len(name)}}" for name in COLUMNS)
    loop = (f"{counts.get(name, ''):>{width}}" for name, width in (("instructions", 12), ("special", 7)))
    line = f"{row['target']:7} {row['kernel']:14} {' '.join([*figures, *loop])}  {row['configuration']}"
    for chip, limit in row.get("bound", {}).items():
        line += f" [{chip}: {limit['bound']}, issue / moving bytes {limit['issue_of_moving']:.2f}]"
    if row.get("spills") and any(row["spills"].values()):
        line += f" [spills: {row['spills']}]"
    return line + "".join(f"\n        PROBLEM: {problem}" for problem in row["problems"])


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser("compile_report", __doc__)
    parser.add_argument("--json", type=result_file, help="write the results to this file")
    add_names(parser, "--targets", TARGETS, "architectures to compile for [all]", default=list(TARGETS))
    parser.add_argument("--only", default="", help="regular expression over 'kernel: configuration'")
    parser.add_argument("--tests", action="store_true", help="also compile each launch of the GPU tests")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")

    print(HEADER)
    with tempfile.TemporaryDirectory() as folder:
        launched = recorded(launches_of_tests(Path(folder))) if options.tests else ()
        results = report(options.targets, options.only, chain(cases(), launched))
    if not results:
        parser.error(f"--only {options.only!r} matches no kernel")
    bad = sum(bool(row["problems"]) for row in results)
    print(f"{len(results)} compilations, {bad} with problems")
    if options.json:
        command = " ".join(["python -m benchmarks.compile_report", *(arguments or sys.argv[1:])])
        write_json(options.json, provenance(command) | {"problems": bad, "kernels": results})
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())

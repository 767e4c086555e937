"""Compile the kernels for GPUs that need not exist, in separate processes, because Triton may be interpreting here."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import machine_code

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")


def python(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.sweep
def test_one_case_of_every_kernel_on_every_architecture(tmp_path):
    only = "|".join(
        (
            "row_pass: .*bf16 E, plain, V=1000",
            "label_logits: bf16, words in rows",
            "bias_gradient: bf16 E, written",
        )
    )
    done = python("-m", "benchmarks.compile_report", "--json", tmp_path / "report.json", "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == 0 and "--only" in report["command"]
    rows = {(row["kernel"], row["target"]): row for row in report["kernels"]}
    assert len(rows) == 3 * len(TARGETS) and {target for _, target in rows} == set(TARGETS)
    for (kernel, target), row in rows.items():
        assert row["widest_load"] == 16 and row["registers"] > 16 and row["rows_in_64_bits"], (kernel, target)
        assert row["stack_bytes"] == 0
        assert row["shared_bytes"] <= 48 << 10  # every GPU's default limit; sm_86 and sm_89 have little more
    for target in ("sm_80", "sm_90", "sm_100", "sm_120"):
        row = rows["row_pass", target]
        assert row["loop"]["loads"] == {"16": 2} and row["loop"]["stores"] == {"16": 1} and row["loop"]["special"] == 8
        assert row["per_element"]["special"] == 1 and 10 < row["per_element"]["instructions"] < 18
        assert row["residents"] >= 6
    assert rows["row_pass", "sm_90"]["bound"]["H200"]["bound"] == "memory"


TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.sweep
def test_hot_loops_stay_within_their_budgets():
    only = "row_pass: fp32 logits, (bf16 E|sums), (plain|cap).*V=128256|bias_gradient: bf16 E, written"
    nvidia = ("sm_80", "sm_90", "sm_100", "sm_120")
    done = python("-m", "benchmarks.compile_report", "--targets", *nvidia, "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith(" 0 with problems\n")


LISTING = """
        /*0000*/                   LDG.E R1, desc[UR4][R2.64] ;      /* 0x0 */
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;  /* 0x0 */
        /*0020*/                   MUFU.EX2 R1, R4 ;                 /* 0x0 */
        /*0030*/               @P0 STG.E.U16 desc[UR4][R2.64], R1 ;  /* 0x0 */
        /*0040*/                   FADD R1, R1, 1 ;                  /* 0x0 */
        /*0050*/              @!P1 BRA 0x10 ;                        /* 0x0 */
        /*0060*/                   LDG.E.64 R4, desc[UR4][R2.64] ;   /* 0x0 */
        /*0070*/               @P1 BRA 0x60 ;                        /* 0x0 */
        /*0080*/               @P2 BRA 0x0 ;                         /* 0x0 */
        /*0090*/                   EXIT ;                            /* 0x0 */
        /*00a0*/                   BRA 0xa0;                         /* 0x0 */
        /*00b0*/                   NOP;                              /* 0x0 */
"""


def test_hot_loop_is_the_innermost_that_stores():
    listing = machine_code.instructions(LISTING)
    assert len(listing) == 11  # without padding
    loop = machine_code.hot_loop(listing)
    assert loop == {"instructions": 5, "special": 1, "loads": {"16": 1}, "stores": {"2": 1}}
    assert machine_code.hot_loop(listing[6:])["loads"] == {"8": 1}
    assert machine_code.hot_loop(listing[:3]) is None


def test_residents_are_limited_by_registers_warps_and_programs():
    assert machine_code.residents("sm_90", 30, 8) == 8  # 64 warps
    assert machine_code.residents("sm_90", 40, 8) == 6  # 65,536 registers
    assert machine_code.residents("sm_90", 16, 1) == 32
    assert machine_code.residents("sm_120", 30, 8) == 6  # 48 warps


def test_bound_follows_from_the_counts():
    loop = {"instructions": 8 * 41, "special": 8 * 3}
    bounds = {target: machine_code.bound(target, loop, 8, 6, 6) for target in ("sm_80", "sm_100")}
    assert bounds["sm_80"]["A100"]["bound"] == "memory" and bounds["sm_100"]["B200"]["bound"] == "issue"
    assert machine_code.bound("sm_90", {"instructions": 8, "special": 80}, 8, 1, 1)["H100"]["bound"] == "special"


SABOTAGE = """
import json
from benchmarks import compile_report
from inspo_kernels.kernels import bias_gradient, config, label_logits, row_pass

def without_64_bits(kernel):
    kernel._unsafe_update_src(kernel.src.replace(".to(tl.int64)", ""))

def problems(target, only):
    (row,) = compile_report.report([target], only)
    return row["problems"]

found = []
row_pass_config = config.row_pass
config.row_pass = lambda *_: config.RowPass(1024, 8)
found += [problems("sm_90", "bf16 E, plain, V=1000")]
config.row_pass = lambda *_: config.RowPass(4096, 1)
found += [problems("sm_90", "bf16 E, bias.*V=128256, word 0")]
config.row_pass = row_pass_config
compile_report.BUDGETS["row_pass"] = {"bf16 E, plain": compile_report.Budget(14, 0.5, 20, 17)}
compile_report.LATER_REGISTERS = compile_report.LATER_RESIDENTS = 0  # what is planted holds for any version of Triton
found += [problems("sm_90", "bf16 E, plain, V=1000")]
del compile_report.BUDGETS["row_pass"]
without_64_bits(bias_gradient._bias_gradient_kernel)
found += [problems("sm_80", "bias_gradient: bf16 E, written")]
without_64_bits(row_pass._row_pass_kernel)
found += [problems("sm_80", "bf16 E, plain, V=1000")]
without_64_bits(label_logits._label_logits_kernel)
found += [problems("sm_80", "label_logits: bf16, words in rows")]
kernel = bias_gradient._bias_gradient_kernel
kernel._unsafe_update_src(kernel.src.replace("tl.zeros", "tl.nothing"))
found += [problems("sm_80", "bias_gradient: fp32 E, written")]
print(json.dumps(found))
"""


BUDGET_AT = 2  # lines that SABOTAGE prints


@pytest.mark.sweep
def test_report_detects_planted_problems():
    done = python("-c", SABOTAGE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = (
        "stores of 8 bytes",
        "bytes of stack",
        "row offsets in 32 bits",
        "row offsets in 32 bits",
        "row offsets in 32 bits",
        "does not compile",
    )
    over_budget = found.pop(BUDGET_AT)
    for what in ("instructions per element, budget 14", "special", "registers, budget 20", "programs, budget 17"):
        assert any(what in problem for problem in over_budget), (what, over_budget)
    for problems, words in zip(found, expected, strict=True):
        assert any(words in problem for problem in problems), (problems, words)


LENGTHS = """
import json
import torch
from benchmarks import compile_report
from inspo_kernels.kernels import bias_gradient, fused_pass, label_logits, row_pass, scale_rows

V, H = 1024, 64
x, weight = torch.empty(64, H, dtype=torch.bfloat16), torch.empty(V, H, dtype=torch.bfloat16)
raw, e = torch.empty(64, V), torch.empty(64, V, dtype=torch.bfloat16)
targets, vectors, out = torch.zeros(64, dtype=torch.int64), torch.empty(3, 64), torch.empty(V)
parts, raised = torch.empty(5, 64), torch.zeros(64, dtype=torch.int32)
with compile_report.compiling_for(compile_report.TARGETS["sm_90"]):
    for n, start in ((16, 0), (9, 0), (2, 0), (16, 1), (17, 2), (8, 3)):
        rows = slice(start, start + n)
        label_logits.label_logits(x[rows], weight, targets[rows], arch="sm_90")
        row_pass.row_pass(raw[rows], targets[rows], *vectors[:, rows], parts, raised[rows], first=0, vocab=V, e=e[rows],
                          bias=None, softcap=None, outer=1.0, scale=1.0, wanted=frozenset(), arch="sm_90")
        for stored in (e[rows], None):
            fused_pass.fused_pass(x[rows], weight, targets[rows], *vectors[:2, rows], vectors[2:, rows], raised[rows],
                                  e=stored, bias=None, softcap=None, outer=1.0, scale=1.0, wanted=frozenset(),
                                  arch="sm_90")
        bias_gradient.bias_gradient(e[rows], vectors[0, rows], out, accumulate=False, arch="sm_90")
        scale_rows.scale_rows(x[rows], vectors[0, rows], x[rows], arch="sm_90")
kernels = (label_logits._label_logits_kernel, row_pass._row_pass_kernel, bias_gradient._bias_gradient_kernel)
kernels += (fused_pass._fused_pass_kernel, fused_pass._combine_kernel, fused_pass._repair_kernel)
kernels += (scale_rows._scale_rows_kernel,)
print(json.dumps([sum(len(compiled) for compiled, *_ in k.device_caches.values()) for k in kernels]))
"""


def test_lengths_and_starts_do_not_recompile():
    """Lengths and starts change from batch to batch, and a compilation takes seconds."""
    done = python("-c", LENGTHS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 1, 1, 2, 1, 2, 1]  # with and without E


REPLAYED = """
import sys
from pathlib import Path
from benchmarks import compile_report
from benchmarks.launches import recorded
cases = list(recorded(Path(sys.argv[1])))
rows = compile_report.report(["sm_90", "gfx950"], "", cases)
print(len(cases), len(rows), sum(bool(row["problems"]) for row in rows), len({row["kernel"] for row in rows}))
"""


@pytest.mark.sweep
def test_launches_of_tests_are_recorded_and_compiled(tmp_path):
    file = tmp_path / "launches.jsonl"
    tests = ["tests/inspo_kernels/test_triton_kernels.py", "-k", "test_label_logits or test_row_pass", "-x", "-q"]
    done = python("-m", "pytest", "-p", "benchmarks.launches", *tests, TRITON_INTERPRET="1", LAUNCHES=str(file))
    assert done.returncode == 0, done.stdout
    done = python("-c", REPLAYED, str(file))
    assert done.returncode == 0, done.stderr
    launches, compiled, bad, kernels = map(int, done.stdout.splitlines()[-1].split())
    # Launches that are equal for the compiler are compiled once.
    assert kernels == 2 and bad == 0 and 10 < compiled < 2 * launches


@pytest.mark.sweep
def test_the_interpreter_and_an_empty_selection_are_errors():
    done = python("-m", "benchmarks.compile_report", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr
    done = python("-m", "benchmarks.compile_report", "--only", "nothing")
    assert done.returncode == 2 and "matches no kernel" in done.stderr

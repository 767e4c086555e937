"""The kernels compiled for GPUs that need not be there, in processes of their own: here Triton may be interpreting."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs the triton package")


def python(*arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_one_case_of_every_kernel_on_every_architecture(tmp_path):
    only = "|".join(
        (
            "row_pass: .*bf16 E, plain, V=1000",
            "label_logits: bf16, words in rows",
            "bias_gradient: bf16 E, written",
            "linear_logps: bf16, plain, H=4096",
        )
    )
    done = python("-m", "benchmarks.compile_report", "--json", tmp_path / "report.json", "--only", only)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["problems"] == 0 and "--only" in report["command"]
    rows = {(row["kernel"], row["target"]): row for row in report["kernels"]}
    assert len(rows) == 16
    for (kernel, target), row in rows.items():
        assert row["widest_load"] == 16 and row["registers"] > 16 and row["rows_in_64_bits"], (kernel, target)
        assert row["stack_bytes"] == 0 and bool(row["tensor_cores"]) == (kernel == "linear_logps")
    instruction = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}
    for target, name in instruction.items():
        assert rows["linear_logps", target]["tensor_cores"][0].startswith(name)


SABOTAGE = """
import json
from benchmarks import compile_report
from inspo_kernels.kernels import bias_gradient, config, label_logits, linear_logps, row_pass

def without_64_bits(kernel):
    kernel._unsafe_update_src(kernel.src.replace(".to(tl.int64)", ""))

def problems(target, only):
    (row,) = compile_report.report([target], only)
    return row["problems"]

found = []
row_pass_config, linear_logps_config = config.row_pass, config.linear_logps
config.row_pass = lambda *_: config.RowPass(1024, 8)
found += [problems("sm_90", "bf16 E, plain, V=1000")]
config.row_pass = lambda *_: config.RowPass(4096, 1)
found += [problems("sm_90", "bf16 E, bias.*V=128256")]
config.linear_logps = lambda *_: config.LinearLogps(128, 256, 64, 8, 4)
found += [problems("gfx942", "linear_logps: bf16, plain, H=4096")]
config.row_pass, config.linear_logps = row_pass_config, linear_logps_config
without_64_bits(bias_gradient._bias_gradient_kernel)
found += [problems("sm_80", "bias_gradient: bf16 E, written")]
without_64_bits(row_pass._row_pass_kernel)
found += [problems("sm_80", "bf16 E, plain, V=1000")]
without_64_bits(label_logits._label_logits_kernel)
found += [problems("sm_80", "label_logits: bf16, words in rows")]
without_64_bits(linear_logps._linear_logps_kernel)
found += [problems("sm_80", "linear_logps: bf16, plain, H=4096")]
kernel = bias_gradient._bias_gradient_kernel
kernel._unsafe_update_src(kernel.src.replace("tl.zeros", "tl.nothing"))
found += [problems("sm_80", "bias_gradient: fp32 E, written")]
print(json.dumps(found))
"""


def test_report_notices_what_it_is_for():
    done = python("-c", SABOTAGE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    expected = (
        "stores of 8 bytes",
        "bytes of stack",
        "shared memory above 65536 bytes",
        "row offsets in 32 bits",
        "row offsets in 32 bits",
        "row offsets in 32 bits",
        "row offsets in 32 bits",
        "does not compile",
    )
    for problems, words in zip(found, expected, strict=True):
        assert len(problems) == 1 and words in problems[0], (problems, words)


LENGTHS = """
import json
import torch
from benchmarks import compile_report
from inspo_kernels.kernels import bias_gradient, label_logits, linear_logps, row_pass

V, H = 1024, 64
x, weight = torch.empty(64, H, dtype=torch.bfloat16), torch.empty(V, H, dtype=torch.bfloat16)
raw, e = torch.empty(64, V), torch.empty(64, V, dtype=torch.bfloat16)
targets, vectors, out = torch.zeros(64, dtype=torch.int64), torch.empty(3, 64), torch.empty(V)
with compile_report.compiling_for(compile_report.TARGETS["sm_90"]):
    for n, start in ((16, 0), (9, 0), (2, 0), (16, 1), (17, 2), (8, 3)):
        rows = slice(start, start + n)
        label_logits.label_logits(x[rows], weight, targets[rows], arch="sm_90")
        row_pass.row_pass(raw[rows], targets[rows], *vectors[:, rows], vocab=V, e=e[rows], bias=None, softcap=None,
                          logit_scale=1.0, arch="sm_90")
        bias_gradient.bias_gradient(e[rows], vectors[0, rows], out, accumulate=False, arch="sm_90")
        linear_logps.linear_logps(x[rows], weight, targets[rows], bias=None, softcap=None, logit_scale=1.0,
                                  arch="sm_90", multiprocessors=132)
kernels = (label_logits._label_logits_kernel, row_pass._row_pass_kernel, bias_gradient._bias_gradient_kernel,
           linear_logps._linear_logps_kernel)
print(json.dumps([sum(len(compiled) for compiled, *_ in k.device_caches.values()) for k in kernels]))
"""


def test_lengths_and_starts_compile_nothing_anew():
    """They change from batch to batch, and a compilation takes seconds."""
    done = python("-c", LENGTHS)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [1, 1, 1, 1]


def test_interpreter_and_empty_selection_are_errors():
    done = python("-m", "benchmarks.compile_report", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "unset it" in done.stderr
    done = python("-m", "benchmarks.compile_report", "--only", "nothing")
    assert done.returncode == 2 and "matches no kernel" in done.stderr

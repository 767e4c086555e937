"""Compile every Triton kernel in every shipped configuration ahead of time, and report what the compilers made of it.

    python -m benchmarks.compile_report --json benchmarks/results/compile_report.json

No GPU is needed: the package's own launchers run, on tensors nobody reads, with a driver that compiles for a given
architecture and launches nothing, so what is reported is what a GPU would run: same specialisation, same options.

Registers, stack, instructions and access widths are read from the machine code (``cuobjdump``, AMDGCN). The exit code
is 1 if a kernel does not compile, has a stack frame (spilled registers) on sm_90 or sm_100, needs more shared memory
than a program may have, multiplies a row stride in 32 bits, reads or writes matrices in less than 16 bytes at a time
although their layout allows it, or a product of 16-bit operands does without tensor cores.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import provenance, write_json

VOCAB, HIDDEN, ROWS = 128256, 4096, 4
HALF, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
NAMES = {HALF: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}


@dataclass(frozen=True)
class Target:
    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int  # bytes that one program may have
    may_spill: bool = False


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163 << 10, may_spill=True),
    "sm_90": Target("cuda", 90, 32, 227 << 10),
    "sm_100": Target("cuda", 100, 32, 227 << 10),
    "gfx942": Target("hip", "gfx942", 64, 64 << 10, may_spill=True),
}


@dataclass(frozen=True)
class Case:
    kernel: str
    configuration: str
    launch: Callable[..., Any]  # given the architecture's name as ``arch``
    wide_loads: bool = True
    wide_stores: bool = False
    tensor_cores: bool = False


def cases() -> Iterator[Case]:
    """Every combination of dtypes and flags that the backend launches; values (cap 30, scale 0.5) stand for any."""
    from inspo_kernels.kernels import config
    from inspo_kernels.kernels.bias_gradient import bias_gradient
    from inspo_kernels.kernels.label_logits import label_logits
    from inspo_kernels.kernels.linear_logps import linear_logps
    from inspo_kernels.kernels.row_pass import row_pass

    targets = torch.zeros(ROWS, dtype=torch.int64)
    transforms = {"plain": (False, None, 1.0), "bias, cap, scale": (True, 30.0, 0.5)}

    def row_pass_case(dtype: torch.dtype, store: bool, transform: str, vocab: int) -> Case:
        with_bias, softcap, logit_scale = transforms[transform]
        accumulate_dtype = FP64 if dtype == FP64 else FP32
        raw = torch.empty(ROWS, config.padded_vocab(vocab), dtype=accumulate_dtype)
        in_place = dtype == accumulate_dtype
        e = None if not store else raw if in_place else torch.empty_like(raw, dtype=dtype)
        bias = torch.empty(raw.shape[1], dtype=dtype) if with_bias else None
        vectors = torch.empty(3, ROWS, dtype=accumulate_dtype)

        launch = partial(
            row_pass, raw, targets, *vectors, vocab=vocab, e=e, bias=bias, softcap=softcap, logit_scale=logit_scale
        )
        what = "E in place" if store and in_place else f"{NAMES[dtype]} E" if store else "statistics"
        name = f"{NAMES[accumulate_dtype]} logits, {what}, {transform}, V={vocab}"
        return Case("row_pass", name + (f", {NAMES[dtype]} bias" if with_bias else ""), launch, wide_stores=store)

    for transform in transforms:
        for dtype in (BF16, HALF, FP32, FP64):
            yield row_pass_case(dtype, True, transform, VOCAB)
            if transform != "plain" or dtype in (FP32, FP64):  # statistics see E's dtype through the bias alone
                yield row_pass_case(dtype, False, transform, VOCAB)
    for vocab in (1000, 50257):  # shorter blocks; a vocabulary that is no multiple of anything
        yield row_pass_case(BF16, True, "plain", vocab)

    for dtype in (BF16, HALF, FP32, FP64):
        for layout in ("words in rows", "words in columns"):
            x, weight = torch.empty(ROWS, HIDDEN, dtype=dtype), torch.empty(VOCAB, HIDDEN, dtype=dtype)
            weight = weight if layout == "words in rows" else weight.t().contiguous().t()
            yield Case(
                "label_logits",
                f"{NAMES[dtype]}, {layout}",
                partial(label_logits, x, weight, targets),
            )

    for dtype in (BF16, HALF, FP32, FP64):
        for accumulate in (False, True):
            e = torch.empty(ROWS, VOCAB, dtype=dtype)
            scale = torch.empty(ROWS, dtype=FP64 if dtype == FP64 else FP32)
            out = torch.empty(VOCAB, dtype=scale.dtype)
            yield Case(
                "bias_gradient",
                f"{NAMES[dtype]} E, {'added to' if accumulate else 'written'}",
                partial(bias_gradient, e, scale, out, accumulate=accumulate),
            )

    for dtype in (BF16, HALF, FP32):
        for transform, (with_bias, softcap, logit_scale) in transforms.items():
            for hidden in (HIDDEN, HIDDEN + 16):  # whole blocks of features, or a last one cut short
                x = torch.empty(ROWS, hidden, dtype=dtype)
                weight = torch.empty(VOCAB, hidden, dtype=dtype)
                bias = torch.empty(VOCAB, dtype=dtype) if with_bias else None
                options: dict[str, Any] = {"bias": bias, "softcap": softcap, "logit_scale": logit_scale}
                yield Case(
                    "linear_logps",
                    f"{NAMES[dtype]}, {transform}, H={hidden}",
                    partial(linear_logps, x, weight, targets, **options, multiprocessors=132),
                    tensor_cores=dtype != FP32,
                )


class CompileOnlyDriver:
    """Stands in for the GPU driver; the device is the target, so each has its own cache of compiled kernels."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)

    def get_current_stream(self, device: str) -> int:
        return 0


@contextmanager
def compiling_for(target: Target) -> Iterator[list[Any]]:
    """Every launch inside compiles for ``target``, starts nothing, and appends its compiled kernel to the list."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_alone(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    driver.set_active(CompileOnlyDriver(GPUTarget(target.backend, target.arch, target.warp_size)))
    JITFunction.run = compile_alone
    try:
        yield compiled
    finally:
        JITFunction.run = run


def describe(compiled: Any) -> dict[str, Any]:
    """Registers, spills, shared memory, access widths (bytes) and tensor-core instructions of a compiled kernel."""
    found = _nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])
    return found | {
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "rows_in_64_bits": rows_in_64_bits(compiled.asm["ttir"]),
    }


def _nvidia(cubin: bytes) -> dict[str, Any]:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, option, file], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    (registers,), (stack,) = (re.findall(rf"\b{name}:(\d+)", usage) for name in ("REG", "STACK"))

    def widest(*opcodes: str) -> int:
        suffixes = re.findall(rf"\b(?:{'|'.join(opcodes)})\.([\w.]+)", code)
        widths = [bits for s in suffixes for bits in re.findall(r"\b(?:U|S)?(8|16|64|128|256)\b", s) or ["32"]]
        return max((int(bits) // 8 for bits in widths), default=0)

    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": None,
        "widest_load": widest("LDG", "LDGSTS"),
        "widest_store": widest("STG"),
        "tensor_cores": sorted(set(re.findall(r"\b((?:HMMA|HGMMA|QGMMA|UTC\w*MMA|DMMA)[\w.]*)", code))),
    }


def _amd(code: str) -> dict[str, Any]:
    def metadata(name: str) -> int:
        (value,) = re.findall(rf"\.{name}:\s*(\d+)", code)
        return int(value)

    def widest(kind: str) -> int:
        words = re.findall(rf"\b(?:global|buffer)_{kind}_(?:lds_)?(\w+)", code)
        sizes = {"ubyte": 1, "ushort": 2, "byte": 1, "short": 2, "short_d16": 2, "short_d16_hi": 2}
        return max((sizes.get(w) or 4 * int(re.sub(r"\D", "", w) or 1) for w in words), default=0)

    return {
        "registers": metadata("vgpr_count"),  # architectural and accumulation registers together
        "stack_bytes": metadata("private_segment_fixed_size"),
        "spills": {kind: metadata(f"{kind}_spill_count") for kind in ("vgpr", "sgpr")},
        "widest_load": widest("load"),
        "widest_store": widest("store"),
        "tensor_cores": sorted(set(re.findall(r"\b(v_mfma\w+)", code))),
    }


def rows_in_64_bits(ttir: str) -> bool:
    """Whether every row stride is widened to 64 bits before it is multiplied."""
    strides = set(re.findall(r"(%stride\w*): i32", ttir))
    narrow, widened = set(strides), set()
    for name, operation, operands, types in re.findall(r"(%[\w#]+) = (\S+) (.*?) : (.*?) loc\(", ttir):
        used = narrow & set(re.findall(r"%[\w#]+", operands))
        if used and operation == "arith.muli":
            return False
        if used and operation in ("tt.splat", "tt.broadcast", "tt.expand_dims"):
            narrow.add(name)
        if used and operation == "arith.extsi" and types.endswith("i64"):
            widened |= used
    return bool(strides) and strides <= widened


def problems(case: Case, target: Target, found: dict[str, Any]) -> list[str]:
    """What this report fails for."""
    checks = {
        f"{found['stack_bytes']} bytes of stack": found["stack_bytes"] > 0 and not target.may_spill,
        f"shared memory above {target.shared_limit} bytes": found["shared_bytes"] > target.shared_limit,
        "row offsets in 32 bits": not found["rows_in_64_bits"],
        f"loads of {found['widest_load']} bytes": case.wide_loads and found["widest_load"] < 16,
        f"stores of {found['widest_store']} bytes": case.wide_stores and found["widest_store"] < 16,
        "no tensor-core instructions": case.tensor_cores and not found["tensor_cores"],
    }
    return [what for what, bad in checks.items() if bad]


def report(chosen_targets: list[str], pattern: str) -> list[dict[str, Any]]:
    results = []
    for case in cases():
        if not re.search(pattern, f"{case.kernel}: {case.configuration}"):
            continue
        for name in chosen_targets:
            row: dict[str, Any] = {"kernel": case.kernel, "configuration": case.configuration, "target": name}
            try:
                with compiling_for(TARGETS[name]) as compiled:
                    case.launch(arch=name)
                row |= describe(compiled[0])
                row["problems"] = problems(case, TARGETS[name], row)
            except Exception as error:
                row["problems"] = [f"does not compile: {type(error).__name__}: {error}"]
            results.append(row)
            print(_line(row), flush=True)
    return results


HEADER = f"{'target':7} {'kernel':14} {'regs':>4} {'stack':>5} {'shared':>7} {'load':>4} {'store':>5}  configuration"


def _line(row: dict[str, Any]) -> str:
    line = f"{row['target']:7} {row['kernel']:14} "
    if "registers" in row:
        line += (
            f"{row['registers']:>4} {row['stack_bytes']:>5} {row['shared_bytes']:>7} {row['widest_load']:>4} "
            f"{row['widest_store']:>5}  "
        )
    line += row["configuration"]
    if row.get("tensor_cores"):
        line += f" [{row['tensor_cores'][0]}]"
    if row.get("spills") and any(row["spills"].values()):
        line += f" [spills: {row['spills']}]"
    return line + "".join(f"\n        PROBLEM: {problem}" for problem in row["problems"])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="default: all")
    parser.add_argument("--only", default="", help="regular expression over 'kernel: configuration'")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 replaces the compiler by the interpreter: unset it")

    print(HEADER)
    results = report(options.targets, options.only)
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

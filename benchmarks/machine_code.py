"""Read facts from compiled kernels: registers, stack, access widths, and their hot loops.

NVIDIA's machine code is read with Triton's ``cuobjdump``, AMD's from the assembly that Triton keeps.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .chips import CHIPS

Instructions = list[tuple[int, str]]

# Limits on the programs that a multiprocessor holds at once: registers, warps, programs.
RESIDENCY = {
    "sm_80": (65536, 64, 32),
    "sm_90": (65536, 64, 32),
    "sm_100": (65536, 64, 32),
    "sm_120": (65536, 48, 24),
}


def describe(compiled: Any, target: str) -> dict[str, Any]:
    """Return registers, spills, shared memory and access widths (bytes) of a kernel.

    NVIDIA kernels also have ``residents``, the programs per multiprocessor, and ``loop`` (see ``hot_loop``).
    """
    warps, shared = compiled.metadata.num_warps, compiled.metadata.shared
    if "cubin" in compiled.asm:
        found = _nvidia(compiled.asm["cubin"])
        found["residents"] = residents(target, found["registers"], warps)
    else:
        found = _amd(compiled.asm["amdgcn"])
    return found | {"shared_bytes": shared, "warps": warps, "rows_in_64_bits": rows_in_64_bits(compiled.asm["ttir"])}


def residents(target: str, registers: int, warps: int) -> int:
    """Count the programs that fit one multiprocessor, by registers (allocated in 256s), warps and program slots."""
    register_file, most_warps, most_programs = RESIDENCY[target]
    per_warp = -(-registers * 32 // 256) * 256
    return min(register_file // (per_warp * warps), most_warps // warps, most_programs)


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
    listing = instructions(code)
    return {
        "registers": int(registers),
        "stack_bytes": int(stack),
        "spills": None,
        "instructions": len(listing),
        "widest_load": max(_widths(listing, "LDG", "LDGSTS"), default=0),
        "widest_store": max(_widths(listing, "STG"), default=0),
        "loop": hot_loop(listing),
    }


def instructions(sass: str) -> Instructions:
    """Yield the address and text of each instruction in order, without padding after the code."""
    found = [(int(at, 16), text.strip()) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;/]+?)\s*;", sass)]
    while found and found[-1][1] == "NOP":
        found.pop()
    return found


def hot_loop(listing: Instructions) -> dict[str, Any] | None:
    """Return the innermost loop that does a kernel's work, or None.

    This is the first innermost loop that stores to memory or, if none does, the first that loads. Fields:
    ``instructions``, ``special`` (MUFU), and ``loads`` and ``stores``, counts of global accesses by width in bytes.
    """
    ranges = [(target, at) for at, text in listing if (target := _branch(text)) is not None and target < at]
    inner = [r for r in ranges if not any(r != o and r[0] <= o[0] and o[1] <= r[1] for o in ranges)]
    bodies = [[(at, text) for at, text in listing if first <= at <= last] for first, last in sorted(inner)]
    for opcode in ("STG", "LDG", "LDGSTS"):
        for body in bodies:
            if _widths(body, opcode):
                loads, stores = _widths(body, "LDG", "LDGSTS"), _widths(body, "STG")
                return {
                    "instructions": len(body),
                    "special": sum(_opcode(text).startswith("MUFU") for _, text in body),
                    "loads": {str(width): count for width, count in Counter(loads).items()},
                    "stores": {str(width): count for width, count in Counter(stores).items()},
                }
    return None


def bound(
    target: str, loop: dict[str, Any], elements: int, memory_bytes: float, cache_bytes: float
) -> dict[str, dict[str, Any]]:
    """Return the bottleneck of the loop on each NVIDIA chip of a target, and its time for issue over that for bytes."""
    result = {}
    for name, chip in CHIPS.items():
        if chip.target == target:
            counts = (loop[what] / elements for what in ("instructions", "special"))
            times = chip.limits(memory_bytes, cache_bytes, *counts)
            moving = max(times["memory"], times["cache"])
            worst = max(times, key=lambda limit: times[limit])
            result[name] = {"bound": worst, "issue_of_moving": times["issue"] / moving}
    return result


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _branch(text: str) -> int | None:
    found = re.search(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\w+,\s*)?`?\(?(0x[0-9a-f]+)", text)
    return int(found[1], 16) if found else None


def _widths(listing: Instructions, *opcodes: str) -> list[int]:
    """Return the bytes per lane that each global access with one of the given opcodes moves."""
    widths = []
    for _, text in listing:
        name, *modifiers = _opcode(text).split(".")
        if name in opcodes:
            bits = [m.lstrip("US") for m in modifiers if re.fullmatch(r"[US]?(?:8|16|64|128|256)", m)]
            widths.append(int(bits[0]) // 8 if bits else 4)
    return widths


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
    }


def rows_in_64_bits(ttir: str) -> bool:
    """Return whether every row stride is widened to 64 bits before it is multiplied."""
    strides = {s for s in re.findall(r"(%stride\w*): i32", ttir) if re.search(rf"{s}\b(?!: i32)", ttir)}
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

"""Block sizes, warps and stages of every kernel on every architecture, chosen here and nowhere else.

Nothing is searched for at the first call: a search costs seconds, and its winner, hence the rounding of the result,
may change from run to run. Architectures are "sm_80", "sm_90", "sm_100", ..., "gfx942", ..., or "interpreter".
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Row strides of logits and E are multiples of this many elements: each row then starts on a 128-byte line at two bytes
# an element and on a 256-byte line at four, whatever V is, so that kernels and products use 16-byte accesses.
ROW_ALIGNMENT = 64


@dataclass(frozen=True)
class RowPass:
    """One program per row of logits, ``block`` columns at a time."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class LabelLogits:
    """One program per row, ``block`` features at a time."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class BiasGradient:
    """One program per ``block_cols`` columns of E, ``block_rows`` rows at a time."""

    block_rows: int
    block_cols: int
    num_warps: int


@dataclass(frozen=True)
class LinearLogps:
    """Tiles of ``block_rows`` tokens by ``block_vocab`` words, multiplied ``block_hidden`` features at a time."""

    block_rows: int
    block_vocab: int
    block_hidden: int
    num_warps: int
    num_stages: int


def architecture(device: torch.device) -> str:
    """Name of the device's architecture, "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def multiprocessors(device: torch.device) -> int:
    """Programs that the device runs side by side at least; two for the interpreter, so that its tests see a split."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def padded_vocab(vocab: int) -> int:
    """Row stride of logits and E over ``vocab`` columns."""
    return -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT


def row_pass(arch: str, vocab: int, accumulate_dtype: torch.dtype, softcap: float | None) -> RowPass:
    """For ``kernels.row_pass``, by vocabulary and the dtype of the logits."""
    if arch == "interpreter":
        return RowPass(block=256, num_warps=1)
    # 256 threads (AMD's warps have 64 lanes) handle 8 float32 columns each per step: two 16-byte loads and one 16-byte
    # store of E. On sm_90 that takes 30 registers, so eight programs are resident, and the 1,024 rows of a stage run in
    # one wave of an H200's 132 multiprocessors. 4096 columns take 40, which leaves 232 rows over for a second wave.
    block = 1024 if accumulate_dtype == torch.float64 else 2048
    # A short vocabulary: fewer threads, still eight columns each, which is 16 bytes of E.
    block = min(block, max(256, _next_power_of_2(padded_vocab(vocab))))
    threads = min(256, block // 8)
    return RowPass(block, num_warps=max(1, threads // (64 if arch.startswith("gfx") else 32)))


def label_logits(arch: str, hidden: int) -> LabelLogits:
    """For ``kernels.label_logits``, by hidden size."""
    if arch == "interpreter":
        return LabelLogits(block=64, num_warps=1)
    # 8 features a thread are 16 bytes at two bytes each. Few threads: there is one program per row, and little in each.
    block = min(2048, max(256, _next_power_of_2(hidden)))
    return LabelLogits(block, num_warps=max(1, min(4, block // 8 // (64 if arch.startswith("gfx") else 32))))


def bias_gradient(arch: str) -> BiasGradient:
    """For ``kernels.bias_gradient``, whatever the shape."""
    if arch == "interpreter":
        return BiasGradient(block_rows=4, block_cols=64, num_warps=1)
    # 32 lanes of 8 bfloat16 cover a row of the tile, four rows per thread: V=128256 gives 501 programs, about four per
    # multiprocessor of an H200, with 64 kB in flight each.
    return BiasGradient(block_rows=32, block_cols=256, num_warps=4 if arch.startswith("gfx") else 8)


def linear_logps(arch: str, compute_dtype: torch.dtype) -> LinearLogps:
    """For ``kernels.linear_logps``, by the dtype of its operands."""
    if arch == "interpreter":
        return LinearLogps(block_rows=16, block_vocab=32, block_hidden=16, num_warps=1, num_stages=1)
    if compute_dtype == torch.float32:
        # No tensor cores at full float32: a tile small enough for its accumulator and operands to stay in registers.
        return LinearLogps(block_rows=64, block_vocab=64, block_hidden=32, num_warps=8, num_stages=2)
    if arch.startswith("gfx"):
        # 64 kB of LDS: (128 + 128) * 64 * 2 bytes = 32 kB per stage.
        return LinearLogps(block_rows=128, block_vocab=128, block_hidden=64, num_warps=8, num_stages=2)
    if arch.startswith("sm_9"):
        # The widest tile whose accumulator (128 registers per thread of two warpgroups) leaves room for the epilogue;
        # (128 + 256) * 64 * 2 bytes = 48 kB per stage.
        return LinearLogps(block_rows=128, block_vocab=256, block_hidden=64, num_warps=8, num_stages=4)
    if arch.startswith("sm_10"):
        # At 256 words the epilogue, which takes the accumulator out of tensor memory, spills. 32 kB per stage.
        return LinearLogps(block_rows=128, block_vocab=128, block_hidden=64, num_warps=8, num_stages=4)
    # Ampere, Ada, consumer Blackwell: 16 kB per stage, under the 99 kB that the smallest of them have.
    return LinearLogps(block_rows=128, block_vocab=128, block_hidden=32, num_warps=8, num_stages=4)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()

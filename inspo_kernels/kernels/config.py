"""Block sizes, warps and stages of every kernel on every architecture, chosen here and nowhere else.

Nothing is searched for at the first call: a search costs seconds, and its winner, hence the rounding of the result,
may change from run to run. Architectures are "sm_80", "sm_90", "sm_100", ..., "gfx942", ..., or "interpreter".
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

# Row strides of logits and E are multiples of this many elements: each row then starts on a 128-byte line at two bytes
# an element and on a 256-byte line at four, whatever V is, so that kernels and products use 16-byte accesses.
ROW_ALIGNMENT = 64


@dataclass(frozen=True)
class RowPass:
    """One program per row, ``block`` columns of logits or features at a time."""

    block: int
    num_warps: int


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows x columns of E or features; ``bias_gradient`` runs one program per block of columns."""

    block_rows: int
    block_cols: int
    num_warps: int


@dataclass(frozen=True)
class LogitsTile:
    """Logits of ``rows`` rows and ``words`` words, which a matmul writes and ``row_pass`` reads from the cache."""

    rows: int
    words: int


@dataclass(frozen=True)
class FusedPass:
    """Hold the launch sizes: tiles of ``rows`` x ``words`` logits, whose matmul reads ``features`` at a time.

    ``group`` rows of tiles read the same words while these are in the cache. A tile is turned into E in ``parts``
    parts, so that one part and the next tile's operands fit into shared memory and registers. The two small kernels
    that follow handle ``combined_rows`` and ``repaired_rows`` rows per program.
    """

    rows: int
    words: int
    features: int
    parts: int
    group: int
    num_warps: int
    num_stages: int
    combined_rows: int = 32
    repaired_rows: int = 64


# Cached: a call asks a dozen times, and torch takes 10 us to answer.
@functools.cache
def architecture(device: torch.device) -> str:
    """Name of the device's architecture, "interpreter" for the CPU."""
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def padded_vocab(vocab: int) -> int:
    """Row stride of logits and E over ``vocab`` columns."""
    return -(-vocab // ROW_ALIGNMENT) * ROW_ALIGNMENT


def row_pass(
    arch: str, vocab: int, accumulate_dtype: torch.dtype, softcap: float | None, statistics: bool = False
) -> RowPass:
    """Return the launch sizes of ``kernels.row_pass``, by width and dtype of the tile and registers a thread."""
    if arch == "interpreter":
        return RowPass(block=256, num_warps=1)
    # 256 threads (AMD's warps have 64 lanes) handle 8 float32 columns each per step: two 16-byte loads and one 16-byte
    # store of E. On sm_90 that takes at most 32 registers, so eight programs are resident, and the 1,024 rows of a tile
    # run in one wave of an H200's 132 multiprocessors. 4 columns each where registers would run out.
    columns = 4 if accumulate_dtype == torch.float64 or statistics else 8
    # A short vocabulary: fewer threads, still as many columns each.
    block = min(256 * columns, max(256, _next_power_of_2(padded_vocab(vocab))))
    threads = min(256, block // columns)
    return RowPass(block, num_warps=max(1, threads // (64 if arch.startswith("gfx") else 32)))


def label_logits(arch: str, hidden: int) -> RowPass:
    """Return the launch sizes of ``kernels.label_logits``, by hidden size."""
    if arch == "interpreter":
        return RowPass(block=64, num_warps=1)
    # 8 features a thread are 16 bytes at two bytes each. Few threads: there is one program per row, and little in each.
    block = min(2048, max(256, _next_power_of_2(hidden)))
    return RowPass(block, num_warps=max(1, min(4, block // 8 // (64 if arch.startswith("gfx") else 32))))


def bias_gradient(arch: str) -> Blocks:
    """Return the launch sizes of ``kernels.bias_gradient``, the same for every shape."""
    if arch == "interpreter":
        return Blocks(block_rows=4, block_cols=64, num_warps=1)
    # 32 lanes of 8 bfloat16 cover a row of the tile, four rows per thread: V=128256 gives 501 programs, about four per
    # multiprocessor of an H200, with 64 kB in flight each.
    return Blocks(block_rows=32, block_cols=256, num_warps=4 if arch.startswith("gfx") else 8)


def scale_rows(arch: str, hidden: int) -> Blocks:
    """Return the launch sizes of ``kernels.scale_rows``, by hidden size."""
    if arch == "interpreter":
        return Blocks(block_rows=16, block_cols=64, num_warps=1)
    # 8 elements per thread: one access of 16 bytes for two-byte dtypes, two for float32. Short rows share a program.
    block = min(1024, _next_power_of_2(hidden))
    return Blocks(2048 // block, block, num_warps=4 if arch.startswith("gfx") else 8)


def fused_pass(arch: str, softcap: float | None, statistics: bool = False) -> FusedPass | None:
    """Return the launch sizes of ``kernels.fused_pass``, or None if it was not measured to be faster than ``row_pass``.

    On an H100 its matmul is as fast as the library's. Each of two warpgroups holds 64 x 256 logits, the largest result
    of one tensor-core instruction, in 128 registers per thread. Three stages of operands take 144 KiB of shared memory,
    and half a tile of E takes 32 KiB. A soft-cap and statistics need more registers, so fewer logits are turned into E
    at a time.
    """
    if arch == "interpreter":
        parts = 4 if statistics or softcap is not None else 2
        return FusedPass(16, 64, 32, parts, group=2, num_warps=1, num_stages=1, combined_rows=8, repaired_rows=16)
    if arch == "sm_90":
        parts = 8 if statistics or softcap is not None else 2
        return FusedPass(128, 256, 64, parts, group=16, num_warps=8, num_stages=3)
    return None


@functools.cache
def programs(device: torch.device) -> int:
    """Return how many programs of ``kernels.fused_pass`` run at once: one on each multiprocessor."""
    return 3 if device.type != "cuda" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def logits_tile(arch: str, device: torch.device, itemsize: int) -> LogitsTile:
    """Size of the tiles that logits pass through, by the device's cache and multiprocessors."""
    if arch == "interpreter":
        return LogitsTile(rows=16, words=64)
    properties = torch.cuda.get_device_properties(device)
    return tile_in_cache(arch, properties.L2_cache_size, properties.multi_processor_count, itemsize)


@functools.cache
def tile_in_cache(arch: str, cache_bytes: int, multiprocessors: int, itemsize: int) -> LogitsTile:
    """Tile of 1,024 rows that leaves 0.3 of the cache to the operands and whose matmul fills its waves best.

    A matmul of 1,024 rows reads the head once per 1,024 operations a byte, which any of these chips can feed. Libraries
    compute blocks of 128 x 256, one per multiprocessor at a time, so a tile is 8 blocks high. 33 blocks wide are two
    whole waves of 132 multiprocessors, and 35 MB in float32 of an H100's 50 MB of cache; 27 blocks are two of 108, and
    28 MB of an A100's 40. Of equally full tiles, the widest.

    A cache that holds less than four fifths of a wave (6 MB beside 72 multiprocessors, as in an A10) would leave
    multiprocessors idle, which costs more than memory traffic: the tile is then eight whole waves, and not cached.
    """
    if arch.startswith("gfx"):
        cache_bytes = max(cache_bytes, 256 << 20)  # CDNA 3 and 4: the last level, Infinity Cache, is not reported
    rows, width, high = 1024, 256, 8
    most = cache_bytes * 7 // 10 // (rows * itemsize)

    def filled(wide: int) -> float:
        waves = -(-high * wide // multiprocessors)
        return round(high * wide / (waves * multiprocessors), 3)

    best = max(range(1, most // width + 1), key=lambda wide: (filled(wide), wide), default=None)
    return LogitsTile(rows, width * (best if best and filled(best) >= 0.8 else multiprocessors))


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()

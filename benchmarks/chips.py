"""List the chips for which times are predicted, their rates, and the source of each rate.

"measured" rates were measured on one such card: bfloat16 matmuls of 8192 x 8192 x 8192 on random data, and a
device-to-device copy, counting bytes read and written. Other rates come from a data sheet, or are "assumed": a fraction
of the data sheet's figure.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One chip. ``target`` is its name in the compile report. ``matmul`` is in FLOP/s, memory rates in bytes/s."""

    name: str
    target: str
    matmul: float
    memory: float
    cache: float
    cache_bytes: int
    multiprocessors: int
    clock: float
    sources: dict[str, str]

    @property
    def lanes(self) -> float:
        """Return how many lane instructions the chip issues per second: 4 warps of 32 per clock and multiprocessor."""
        return 128 * self.multiprocessors * self.clock

    @property
    def special(self) -> float:
        """Return special functions (MUFU: exp2, reciprocal, logarithm) per second: 16 per clock and multiprocessor."""
        return 16 * self.multiprocessors * self.clock


CHIPS = {
    "A100": Chip(
        "A100 SXM 80 GB",
        "sm_80",
        265e12,
        1.75e12,
        4.5e12,
        40 << 20,
        108,
        1.41e9,
        {
            "matmul": "assumed: 0.85 of the data sheet's 312 TFLOP/s",
            "memory": "assumed: 0.86 of the data sheet's 2.04 TB/s",
            "cache": "assumed: 5,120 bytes a clock (white paper), 0.62 of it reached",
            "clock": "data sheet, boost",
        },
    ),
    "H100": Chip(
        "H100 SXM 80 GB",
        "sm_90",
        798e12,
        3.0e12,
        5.5e12,
        50 << 20,
        132,
        1.755e9,
        {
            "matmul": "measured",
            "memory": "measured",
            "cache": "assumed: 5,120 bytes a clock as in an A100, 0.62 of it reached",
            "clock": "assumed: under the 1.98 GHz that it may reach",
        },
    ),
    "H200": Chip(
        "H200 SXM 141 GB",
        "sm_90",
        790e12,
        4.3e12,
        5.5e12,
        60 << 20,
        132,
        1.755e9,
        {
            "matmul": "measured",
            "memory": "measured",
            "cache": "assumed, as the H100's",
            "clock": "assumed: under the 1.98 GHz that it may reach",
        },
    ),
    "B200": Chip(
        "B200 180 GB",
        "sm_100",
        1690e12,
        6.9e12,
        10e12,
        126 << 20,
        148,
        1.85e9,
        {
            "matmul": "assumed: 0.75 of the data sheet's 2,250 TFLOP/s",
            "memory": "assumed: 0.86 of the data sheet's 8 TB/s",
            "cache": "assumed",
            "clock": "assumed",
        },
    ),
    "MI300X": Chip(
        "MI300X 192 GB",
        "gfx942",
        640e12,
        4.1e12,
        9e12,
        256 << 20,
        304,
        2.1e9,
        {
            "matmul": "assumed: 0.49 of the data sheet's 1,307 TFLOP/s, as public benchmarks of libraries found",
            "memory": "assumed: 0.77 of the data sheet's 5.3 TB/s",
            "cache": "assumed: half of the Infinity Cache's 17 TB/s (data sheet)",
            "clock": "data sheet, peak",
        },
    ),
}

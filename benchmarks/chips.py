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

    def limits(self, memory: float, cache: float, instructions: float, special: float) -> dict[str, float]:
        """Return the seconds that an element's bytes (memory, cache), instructions and special functions take.

        A multiprocessor runs 16 special functions (MUFU: exp2, reciprocal, logarithm) per clock.
        """
        return {
            "memory": memory / self.memory,
            "cache": cache / self.cache,
            "issue": instructions / self.lanes,
            "special": 8 * special / self.lanes,
        }


def _chip(name: str, target: str, multiprocessors: int, cache_bytes: int, **rates: tuple[float, str]) -> Chip:
    """Return a chip from its rates, each with its source."""
    values = {rate: value for rate, (value, _) in rates.items()}
    sources = {rate: source for rate, (_, source) in rates.items()}
    return Chip(name, target, multiprocessors=multiprocessors, cache_bytes=cache_bytes, sources=sources, **values)


CHIPS = {
    "A100": _chip(
        "A100 SXM 80 GB",
        target="sm_80",
        multiprocessors=108,
        cache_bytes=40 << 20,
        matmul=(265e12, "assumed: 0.85 of the data sheet's 312 TFLOP/s"),
        memory=(1.75e12, "assumed: 0.86 of the data sheet's 2.04 TB/s"),
        cache=(4.5e12, "assumed: 5,120 bytes a clock (white paper), 0.62 of it reached"),
        clock=(1.41e9, "data sheet, boost"),
    ),
    "H100": _chip(
        "H100 SXM 80 GB",
        target="sm_90",
        multiprocessors=132,
        cache_bytes=50 << 20,
        matmul=(798e12, "measured"),
        memory=(3.0e12, "measured"),
        cache=(5.5e12, "assumed: 5,120 bytes a clock as in an A100, 0.62 of it reached"),
        clock=(1.755e9, "assumed: under the 1.98 GHz that it may reach"),
    ),
    "H200": _chip(
        "H200 SXM 141 GB",
        target="sm_90",
        multiprocessors=132,
        cache_bytes=60 << 20,
        matmul=(790e12, "measured"),
        memory=(4.3e12, "measured"),
        cache=(5.5e12, "assumed, as the H100's"),
        clock=(1.755e9, "assumed: under the 1.98 GHz that it may reach"),
    ),
    "B200": _chip(
        "B200 180 GB",
        target="sm_100",
        multiprocessors=148,
        cache_bytes=126 << 20,
        matmul=(1690e12, "assumed: 0.75 of the data sheet's 2,250 TFLOP/s"),
        memory=(6.9e12, "assumed: 0.86 of the data sheet's 8 TB/s"),
        cache=(10e12, "assumed"),
        clock=(1.85e9, "assumed"),
    ),
    "MI300X": _chip(
        "MI300X 192 GB",
        target="gfx942",
        multiprocessors=304,
        cache_bytes=256 << 20,
        matmul=(640e12, "assumed: 0.49 of the data sheet's 1,307 TFLOP/s, as public benchmarks of libraries found"),
        memory=(4.1e12, "assumed: 0.77 of the data sheet's 5.3 TB/s"),
        cache=(9e12, "assumed: half of the Infinity Cache's 17 TB/s (data sheet)"),
        clock=(2.1e9, "data sheet, peak"),
    ),
}

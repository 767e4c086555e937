"""Share the study sizes that take a second between the tests of the study."""

from __future__ import annotations

from benchmarks.study.runs import Size

MICRO_SIZE = Size(
    hidden_size=16,
    layers=1,
    word_lengths=(3,),
    fit_prompts=80,
    fit_steps=3,
    fit_rows=8,
    pairs=24,
    updates=2,
    update_pairs=8,
    validation_prompts=8,
    test_prompts=8,
    held_out_pairs=8,
    samples=2,
)

"""Test the roofline model: its counts against counts by hand, and its comparison with a measurement."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import roofline
from benchmarks.batches import MODELS
from benchmarks.chips import CHIPS
from benchmarks.measure import FORWARD, FROZEN, MODES, TRAIN
from inspo_kernels.kernels import config

LLAMA, H200 = MODELS["llama3-8b"], CHIPS["H200"]


def test_floor_is_three_matmuls_at_the_rate():
    operations = 2 * 8192 * 4096 * 128_256
    one = roofline.floor(H200, LLAMA, 8192, FORWARD)
    assert one == pytest.approx(operations / 790e12, rel=2e-3)  # with many tiles, incomplete waves cost little
    assert roofline.floor(H200, LLAMA, 8192, TRAIN) == pytest.approx(3 * one, rel=0.015)


def test_row_pass_moves_six_bytes_a_logit():
    (line,) = (line for line in roofline.lines(H200, LLAMA, 8192, TRAIN, "staged") if line.name == "row pass")
    assert line.seconds == pytest.approx(6 * 8192 * 128_256 / 4.3e12) and line.why.endswith("bound by memory")


def test_softcap_makes_the_row_pass_bound_by_issue():
    gemma = MODELS["gemma2-9b"]
    assert roofline.row_pass_seconds(CHIPS["B200"], gemma, 1e9, True, "staged")[1] == "issue"
    assert roofline.row_pass_seconds(CHIPS["A100"], gemma, 1e9, True, "staged")[1] == "memory"


@pytest.mark.parametrize("form", roofline.FORMS)
@pytest.mark.parametrize("chip", CHIPS)
def test_every_prediction_is_above_its_floor(chip, form):
    for head in MODELS.values():
        for tokens in roofline.TOKENS:
            ratios = {mode: roofline.predicted(CHIPS[chip], head, tokens, mode, form)[1] for mode in MODES}
            assert all(1 < ratio < 3 for ratio in ratios.values())
            if tokens <= roofline.WORKSPACE_ROWS:
                assert ratios[TRAIN] < ratios[FROZEN] < ratios[FORWARD]


def test_each_form_needs_less_than_the_one_before():
    for chip in CHIPS.values():
        staged, cached, fused = (roofline.predicted(chip, LLAMA, 8192, TRAIN, form)[0] for form in roofline.FORMS)
        assert fused < cached < staged


def test_tiles_of_the_cache_fill_whole_waves():
    for chip in CHIPS.values():
        words = roofline.tile_words(chip)
        tiles = roofline.TILE_ROWS * words / (128 * 256)
        assert 4 * roofline.TILE_ROWS * words <= 0.7 * chip.cache_bytes
        assert tiles / (-(-tiles // chip.multiprocessors) * chip.multiprocessors) > 0.96


def test_no_other_cache_tile_is_predicted_faster(monkeypatch):
    """Compare with the tiles that leave 0.3 of the cache to the operands."""
    for name in ("A100", "H100", "H200"):
        chip = CHIPS[name]
        shipped = roofline.predicted(chip, LLAMA, 8192, FORWARD, "cached")[0]
        for words in range(256, chip.cache_bytes * 7 // 10 // 4096, 256):
            with monkeypatch.context() as patch:
                patch.setattr(roofline, "tile_words", lambda _, words=words: words)
                assert roofline.predicted(chip, LLAMA, 8192, FORWARD, "cached")[0] >= shipped


@pytest.mark.parametrize("cache_bytes, multiprocessors", [(6 << 20, 72), (0, 40), (6 << 20, 82)])
def test_cache_below_a_wave_gets_whole_waves(cache_bytes, multiprocessors):
    tile = config.tile_in_cache("sm_86", cache_bytes, multiprocessors, 4)
    assert tile.rows * tile.words == 8 * multiprocessors * 128 * 256


def test_second_group_of_rows_reads_and_writes_dweight():
    names = {n: [line.name for line in roofline.lines(H200, LLAMA, n, TRAIN, "staged")] for n in (8192, 16384)}
    assert "dW over several groups" not in names[8192] and "dW over several groups" in names[16384]


@pytest.fixture
def measured(tmp_path):
    row = {"status": "measured", "seconds": {"median": 0.040}, "times_floor": {"median": 1.21}}
    cell = {"model": "llama3-8b", "tokens": 8192, "mode": TRAIN, "contenders": {"triton": row}}
    lines = {"row pass with E, stages of 1024": 0.002, "row pass, statistics alone": 0.0015, "dX matmul": 0.012}
    decomposition = {name: {"status": "measured", "busy": {"median": seconds}} for name, seconds in lines.items()}
    decomposition["label logits"] = {"status": "failed: x"}
    result = {"device": {"name": "NVIDIA H200"}, "cells": [cell], "decomposition": decomposition}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps(result))
    return file


def test_measurement_is_printed_line_by_line(measured, capsys):
    assert roofline.main(["--measured", str(measured)]) == 0
    text = capsys.readouterr().out
    tables = {table.splitlines()[0]: table for table in text.split("\n\n")}
    train = next(table for title, table in tables.items() if "forward+backward, staged" in title)
    (row_pass,) = (line for line in train.splitlines() if line.startswith("  row pass"))
    assert "1.466 ms" in row_pass and "2.000 ms measured" in row_pass
    assert "measured: 40.00 ms, 1.210 x floor" in train and "glue, measured in no line" in train
    (row_pass,) = (
        line
        for title, table in tables.items()
        if " forward, staged" in title
        for line in table.splitlines()
        if line.startswith("  row pass")
    )
    assert "1.500 ms measured" in row_pass and "A100" not in text


def test_grid_shows_measured_and_predicted_ratios(measured, capsys):
    assert roofline.main(["--grid", "--measured", str(measured)]) == 0
    text = capsys.readouterr().out
    assert text.count(" / 1.210") == 3 and text.count("qwen3-8b, 1024") == 3 * 3


def test_every_rate_names_its_source():
    for chip in CHIPS.values():
        assert set(chip.sources) == {"matmul", "memory", "cache", "clock"}
        assert all(source.startswith(("measured", "data sheet", "assumed")) for source in chip.sources.values())


def test_docs_show_the_predictions_of_today(capsys):
    assert roofline.main(["--summary"]) == 0
    docs = Path(__file__).parents[2] / "docs" / "benchmarks.md"
    assert capsys.readouterr().out in docs.read_text() + "\n"


def test_bad_arguments_say_what_to_do(tmp_path, capsys):
    (tmp_path / "other.json").write_text(json.dumps({"device": {"name": "L4"}}))
    for arguments, text in (
        (["--measured", str(tmp_path / "none.json")], "No such file"),
        (["--measured", str(tmp_path / "other.json")], "name one by --chips"),
        (["--tokens", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            roofline.main(arguments)
        assert text in capsys.readouterr().err

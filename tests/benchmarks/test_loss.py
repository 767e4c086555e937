"""Run the benchmark commands on small shapes, and check what they measure and write."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import inspo_kernels as ik
from benchmarks import compare, harness, logps, loss, measure, result_files, scaling, speed_tables
from benchmarks.contenders import CONTENDERS

ROOT = Path(__file__).parents[2]
ROW = {"status": "measured", "seconds": {"median": 1.0, "q1": 1.0, "q3": 1.0}}


@pytest.fixture
def no_processes(monkeypatch):
    """Replace memory measurements by fixed figures, which need no processes."""

    def peak(module, function, given):
        assert (module, function) == ("benchmarks.measure", "peak_of") and given["mode"]
        return {"status": "measured", "peak_bytes": 5 << 20}

    monkeypatch.setattr(measure, "peak_memory_in_fresh_process", peak)


@pytest.mark.sweep
def test_quick_loss_writes_a_complete_file(tmp_path, capsys):
    file = tmp_path / "loss.json"
    loss.main(
        [
            "--quick",
            "--shape",
            "quick",
            "--rounds",
            "3",
            "--contenders",
            "torch",
            "cut_cross_entropy",
            "--json",
            str(file),
        ]
    )
    result = json.loads(file.read_text())
    (cell,) = result["cells"]
    assert result["finished"] and cell["scored_tokens"] == 128
    assert set(cell["contenders"]) == {"floor", "torch", "cut_cross_entropy"}
    ours, floor = cell["contenders"]["torch"], cell["contenders"]["floor"]
    assert (
        ours["rounds"] == 3
        and ours["seconds"]["median"] > 0
        and all(error < 1e-5 for error in ours["relative_error"].values())
    )
    assert 1 << 16 < ours["peak_bytes"] < 1 << 26  # measured in a fresh process
    assert floor["times_floor"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert cell["contenders"]["cut_cross_entropy"] == {"status": "needs a GPU"}
    assert result["command"].endswith("--contenders torch cut_cross_entropy --json FILE")
    assert {"date", "versions", "hardware"} <= set(result) and "liger-kernel" in result["versions"]
    assert "torch" in capsys.readouterr().out
    assert "| inspo_kernels (torch)" in speed_tables.loss(result) and "needs a GPU" in speed_tables.loss(result)


def test_variants_are_not_separate_contenders(monkeypatch, capsys):
    assert [name for name, c in CONTENDERS.items() if c.variant_of] == ["triton, labels on the CPU"]
    monkeypatch.setitem(CONTENDERS, "other", dataclasses.replace(CONTENDERS["torch"], variant_of="torch"))
    with pytest.raises(SystemExit):
        loss.main(["--shape", "quick", "--contenders", "other"])
    assert "invalid choice: 'other'" in capsys.readouterr().err


def test_resume_adds_what_is_missing(tmp_path, no_processes, capsys):
    arguments = ["--shape", "quick", "--rounds", "1", "--json", str(tmp_path / "loss.json"), "--contenders"]
    loss.main([*arguments, "log_softmax"])
    before = json.loads((tmp_path / "loss.json").read_text())
    loss.main([*arguments, "torch", "log_softmax", "--resume"])
    after = json.loads((tmp_path / "loss.json").read_text())
    (cell,) = after["cells"]
    (cell_before,) = before["cells"]
    assert cell["contenders"]["log_softmax"]["peak_bytes"] == cell_before["contenders"]["log_softmax"]["peak_bytes"]
    assert cell["contenders"]["torch"]["seconds"]["median"] > 0
    loss.main([*arguments, "torch", "--resume"])
    assert json.loads((tmp_path / "loss.json").read_text())["cells"] == after["cells"]  # nothing was missing
    assert after["command"].count("python -m benchmarks.loss") == 2
    assert after["package"]["version"] == ik.__version__ and "commit" in after["package"]
    (tmp_path / "loss.json").write_text(json.dumps(after | {"dtype": "bfloat16"}))
    for wrong in (arguments, ["--contenders"]):
        with pytest.raises(SystemExit):
            loss.main([*wrong, "torch", "--resume"])
        assert "--resume: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "held, why",
    [
        ('{"command": "python -m benchmarks.logps --json FILE", "cells": []}', "is of benchmarks.logps, not of"),
        ('{"cells": []}', "has no cells or names no command"),
        ("[]", "has no cells or names no command"),
        ("half a fi", "is not JSON"),
    ],
)
def test_resume_refuses_other_files(held, why, tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text(held)
    with pytest.raises(SystemExit):
        loss.main(["--shape", "quick", "--json", str(file), "--resume"])
    assert f"--resume: {file} {why}" in capsys.readouterr().err and file.read_text() == held


@pytest.mark.parametrize("only, phase", [("memory", "peak_memory_in_fresh_process"), ("time", "interleaved_times")])
def test_an_interrupted_cell_has_no_rows_without_figures(only, phase, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(measure, phase, interrupt)
    file = tmp_path / "loss.json"
    with pytest.raises(SystemExit):
        loss.main(["--shape", "quick", "--contenders", "torch", "--only", only, "--json", str(file)])
    (cell,) = json.loads(file.read_text())["cells"]
    assert cell["contenders"] == {} and speed_tables.loss(json.loads(file.read_text()))
    assert compare.main([str(file)] * 2) == 0


def test_logps_measures_every_mode(tmp_path, no_processes):
    file = tmp_path / "logps.json"
    logps.main(["--shape", "quick-real", "--rounds", "2", "--contenders", "torch", "trl", "--json", str(file)])
    result = json.loads(file.read_text())
    assert [cell["mode"] for cell in result["cells"]] == ["forward+backward", "forward", "frozen head"]
    errors = [cell["contenders"]["torch"]["relative_error"] for cell in result["cells"]]
    gradients = ["dhidden", "dweight"]
    assert [set(e) for e in errors] == [{"logps", *gradients}, {"logps"}, {"logps", "dhidden"}]
    assert max(value for e in errors for value in e.values()) < 1e-5
    assert "liger" not in json.dumps([cell["contenders"] for cell in result["cells"]])


def test_scaling_fits_exponents(tmp_path, no_processes, capsys):
    file = tmp_path / "scaling.json"
    scaling.main(["--quick", "--rounds", "1", "--sweeps", "vocabulary", "workspace", "--json", str(file)])
    result = json.loads(file.read_text())
    assert [cell["value"] for cell in result["cells"]] == [2, 4] and len(result["workspace"]) == 7
    default, *others = result["workspace"].values()
    assert default["times_default"] == {"median": 1.0, "q1": 1.0, "q3": 1.0}
    assert all(row["times_default"]["median"] > 0 for row in others)
    assert result["finished"] and "the default workspace of" in capsys.readouterr().out
    assert "| floor: " in speed_tables.scaling(result) and "takes 1.00 times as long" in speed_tables.scaling(
        with_equal_times(result)
    )
    fit = scaling.exponent([(n, 3 * n**1.5) for n in (1, 2, 4, 8)])
    assert fit["exponent"] == pytest.approx(1.5) and fit["standard_error"] < 1e-6
    assert scaling.exponent([(1, 1.0), (2, 2.0)]) is None


def with_equal_times(result):
    workspace = {name: row | {"seconds": {"median": 1.0}} for name, row in result["workspace"].items()}
    return result | {"workspace": workspace}


@pytest.mark.sweep
def test_ctrl_c_keeps_what_is_done(tmp_path):
    file = tmp_path / "loss.json"
    command = [sys.executable, "-m", "benchmarks.loss", "--shape", "quick", "--rounds", "10000000"]
    process = subprocess.Popen(
        [*command, "--contenders", "torch", "--json", str(file)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores SIGINT for background jobs
    )
    try:
        deadline = time.monotonic() + 120
        while not (file.exists() and '"rounds"' in file.read_text()):
            assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    result = json.loads(file.read_text())
    assert process.returncode == 130 and "finished figures are kept" in said
    assert not result["finished"] and result["cells"][0]["contenders"]["torch"]["seconds"]["median"] > 0


def test_late_contenders_are_timed_with_the_others(tmp_path, no_processes):
    file = tmp_path / "loss.json"
    for rounds, words in (("1", ["torch"]), ("2", ["log_softmax", "--resume"])):
        loss.main(["--shape", "quick", "--json", str(file), "--rounds", rounds, "--contenders", *words])
    rows = json.loads(file.read_text())["cells"][0]["contenders"]
    assert {name: row["rounds"] for name, row in rows.items()} == {"floor": 2, "torch": 2, "log_softmax": 2}


def test_quartiles_lie_within_what_was_measured():
    assert harness.spread([3.0, 1.0]) == {"median": 2.0, "q1": 1.5, "q3": 2.5}
    assert harness.ratios({"a": [2, 4], "b": [1, 2]}, "b")["a"]["median"] == 2
    assert harness.spread([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0}


def result_of(**contenders):
    cells = [{"name": "reference", "contenders": contenders}]
    return {"command": "python -m benchmarks.loss --json FILE", "cells": cells}


def spread(median, half=0.01):
    return {"median": median, "q1": median - half, "q3": median + half}


def test_compare_tells_slower_from_noise(tmp_path, capsys):
    old = result_of(ours={**ROW, "times_floor": spread(1.08), "peak_bytes": 100 << 20}, peer=ROW)
    files = []
    for change in (
        {"times_floor": spread(1.09)},  # below the threshold
        {"times_floor": spread(1.30, 0.30)},  # more, but within the noise
        {"times_floor": spread(0.90, 0.30)},
        {"times_floor": spread(1.30)},
        {"times_floor": spread(0.90)},
        {"peak_bytes": 150 << 20},
        {"status": "out of memory"},
    ):
        new = copy.deepcopy(old)
        new["cells"][0]["contenders"]["ours"] |= change
        files.append(list(compare.compare(old, new, 0.03)))
    assert [[worse for worse, _ in found] for found in files] == [[], [], [], [True], [False], [True], [True]]
    assert "slower by 20%, times floor 1.08 (1.07-1.09) -> 1.3" in files[3][0][1]
    assert "faster by 17%" in files[4][0][1]
    paths = [tmp_path / "old.json", tmp_path / "new.json"]
    for path, result in zip(paths, (old, new)):
        path.write_text(json.dumps(result))
    assert compare.main(list(map(str, paths))) == 1 and "WORSE  reference, ours" in capsys.readouterr().out
    assert compare.main([str(paths[0])] * 2) == 0
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(SystemExit):
        compare.main([str(paths[0]), str(tmp_path / "other.json")])
    assert "has no cells" in capsys.readouterr().err
    (tmp_path / "other.json").write_text(json.dumps(old | {"command": "python -m benchmarks.step"}))
    with pytest.raises(SystemExit):
        compare.main([str(paths[0]), str(tmp_path / "other.json")])
    assert "give two files of one benchmark" in capsys.readouterr().err


def test_compare_reports_what_is_missing_and_compares_single_rounds():
    """With one round the quartiles equal the median, which does not make a row the base of the ratios."""
    ours = {**ROW, "times_floor": spread(1.0, 0.0)}
    old = result_of(floor=ROW, ours=ours, gone=ROW)
    new = result_of(floor=ROW, ours={**ours, "times_floor": spread(2.0, 0.0)})
    found = list(compare.compare(old, new, 0.03))
    assert [worse for worse, _ in found] == [True, True]
    assert "ours: slower by 100%, times floor" in found[0][1]
    assert found[1][1] == "reference, gone: missing from the new file"
    assert list(compare.compare(old, old | {"cells": []}, 0.03)) == [(True, "reference: missing from the new file")]
    floors = [result_of(floor={**ROW, "times_floor": spread(1.0, 0.0), "seconds": spread(s)}) for s in (1, 2)]
    assert "floor: slower by 100%, s" in next(compare.compare(*floors, 0.03))[1]


def test_own_peak_counts_allocated_and_freed_memory():
    def allocate():
        torch.ones(64 << 18)  # 64 MiB of float32

    peak = harness.own_peak(allocate)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs on this platform, so the benchmark reports memory as not measured")
    assert 60 << 20 < peak < 80 << 20
    torch.ones(256 << 18)  # freed before the run: this high-water mark must not count
    assert 60 << 20 < harness.own_peak(allocate) < 80 << 20


@pytest.mark.parametrize(
    "arguments, known",
    [
        (["--shape", "huge"], "'llama3-8b', 'qwen3-4b'"),
        (["--contenders", "quack"], "'full_log_softmax', 'log_softmax'"),
        (["--device", "tpu0"], "--device tpu0"),
        (["--device", "meta"], "--device meta: only cpu and cuda devices"),
        (["--device", "cpu:1"], "--device cpu:1: only cpu and cuda devices are supported, and one cpu"),
        (["--rounds", "0"], "--rounds: 0 is not a whole number of at least 1"),
        (["--rounds", "-3"], "--rounds: -3 is no"),
        (["--json", str(ROOT)], "is a folder; name a file in it"),
        (["--json", str(Path(__file__) / "x.json")], "cannot write to"),
    ],
)
def test_bad_arguments_list_the_known(arguments, known, capsys):
    with pytest.raises(SystemExit):
        loss.main(arguments)
    assert known in capsys.readouterr().err


def test_the_chosen_device_becomes_current(monkeypatch, capsys):
    """Events and memory counts of torch.cuda refer to the current device."""
    current = []

    def set_device(device):
        if device.index > 1:
            raise RuntimeError("CUDA error: invalid device ordinal\nand more")
        current.append(device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    parser = argparse.ArgumentParser()
    assert result_files.checked_device(parser, "cuda:1") == torch.device("cuda:1")
    with pytest.raises(SystemExit):
        result_files.checked_device(parser, "cuda:2")
    assert "--device cuda:2: CUDA error: invalid device ordinal\n" in capsys.readouterr().err and len(current) == 1


def test_interrupted_writing_leaves_the_old_file(tmp_path):
    file = tmp_path / "result.json"
    result_files.write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        result_files.write_json(file, {"new": object()})
    assert json.loads(file.read_text()) == {"old": 1}

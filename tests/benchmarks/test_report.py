"""Test that generated parts name their sources briefly, and that the Makefile can reproduce them all."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from benchmarks import report, tables

ROOT = report.README.parent


def measured():
    """Return the sections and their result files, if these exist."""
    return {name: file for name, (file, _) in report.SECTIONS.items() if (report.RESULTS / file).exists()}


@pytest.mark.parametrize("name", measured())
def test_source_lines_are_short_and_link_the_file(name):
    file, text = report.SECTIONS[name][0], report.body(name)
    result = json.loads((report.RESULTS / file).read_text())
    sources = re.findall("<sub>.*</sub>", text)
    if name in ("study", "axis", "code", "helps"):  # their pages give the source
        assert not sources
        return
    if name == "savings":  # one sentence
        sources = re.findall(r"\(\d{4}-.*\)\.", text)
        assert f"({result['date']}, commit {result['package']['commit']}: " in sources[0]
        return
    (source,) = sources
    assert len(source) < 200 and f"[{file}](benchmarks/results/{file})" in source
    commit = result.get("package", {}).get("commit")
    at = f", commit {commit}" if commit else ""
    used = f"torch {result['versions']['torch']}"
    if result.get("device"):
        used += f", triton {result['versions']['triton']}"
    assert f", {used}, {result['date']}{at};" in source


def test_figures_of_a_gpu_name_it_and_triton():
    hardware, versions = {"cpu": "a CPU", "cores": 2, "gpu": "a GPU"}, {"torch": "2.13", "triton": "3.7"}
    result = {"hardware": hardware, "versions": versions, "date": "2026-11-22"}
    assert "a CPU, 2 cores, torch 2.13, 2026-11-22;" in tables.source(result, "loss_cpu.json")
    result["device"] = {"type": "cuda", "name": "a GPU"}
    assert "<sub>a GPU, torch 2.13, triton 3.7, 2026-11-22;" in tables.source(result, "gpu.json")


# Recorded commands that the Makefile does not repeat, with the commands that replace them.
NOT_REPEATED = {
    # The second command reports what the first has run; the first also reports.
    "python -m benchmarks.study --report": "python -m benchmarks.study",
    # The command without --part also runs this part.
    "python -m benchmarks.study --part axis --workers 1": None,
}


def make(*words):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *words], cwd=ROOT, env=environment, capture_output=True, text=True)


def commands(target):
    """Return the benchmark commands of ``make target``, with FILE for result files, and all its commands."""
    done = make("-n", target, "PAIRS=preferences.jsonl")
    assert done.returncode == 0, done.stderr
    found = [line.rstrip() for line in re.findall(r"/bin/(python -m benchmarks\..*)", done.stdout)]
    return [re.sub(r"benchmarks/results/\S+\.json", "FILE", line) for line in found], done.stdout


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make here")


@needs_make
def test_make_benchmark_repeats_the_command_of_every_result_file():
    planned, shown = commands("benchmark")
    files = [str(path.relative_to(report.RESULTS)) for path in sorted(report.RESULTS.rglob("*.json"))]
    files = [file for file in files if not file.startswith("gpu")]  # from another machine: see below
    shown_files = {file for file, _ in (*report.SECTIONS.values(), *report.PLOTS.values())}
    assert {file for file in shown_files if not file.startswith("gpu")} <= set(files)
    repeated = []
    for file in files:
        recorded = json.loads((report.RESULTS / file).read_text())["command"]
        recorded = re.sub(r"benchmarks/results/\S+\.json", "FILE", recorded).split("; ")
        mine = [again for one in recorded if (again := NOT_REPEATED.get(one, one))]
        assert [one for one in planned if one in mine] == mine  # in the order in which they were measured
        assert file == "study/study.json" or shown.count(f"--json benchmarks/results/{file}") == len(mine)
        repeated += mine
    assert sorted([*repeated, "python -m benchmarks.report"]) == sorted(planned)
    assert planned[-1] == "python -m benchmarks.report"


@needs_make
def test_make_benchmark_gpu_makes_the_file_of_its_table():
    planned, shown = commands("benchmark-gpu")
    assert planned == ["python -m benchmarks.gpu --out runs/gpu"]
    assert f"cp runs/gpu/gpu.json benchmarks/results/{report.SECTIONS['gpu'][0]}" in shown


@needs_make
def test_make_help_names_every_part():
    said = make("help").stdout
    parts = re.findall(r"^(benchmark[\w-]*|tables):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert len(parts) == 11 and all(re.search(rf"\b{part} ", said) for part in parts)
    assert "hours" in said


@needs_make
@pytest.mark.parametrize("target", ["benchmark", "benchmark-pairs"])
@pytest.mark.parametrize("given", [[], ["PAIRS=none.jsonl"]])
def test_make_asks_for_the_pairs_before_it_measures(target, given):
    done = make(target, "--old-file=install", "BIN=/nowhere", *given)
    assert done.returncode != 0 and "PAIRS=FILE.jsonl" in done.stdout and "/nowhere" not in done.stdout + done.stderr

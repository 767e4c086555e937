"""The README's generated parts say briefly where their figures are from, and the Makefile can make all of them."""

from __future__ import annotations

import json
import re

import pytest

from benchmarks import report


def measured():
    """Sections with their files, where there is one."""
    return {name: file for name, (file, _) in report.SECTIONS.items() if (report.RESULTS / file).exists()}


@pytest.mark.parametrize("name", measured())
def test_source_lines_are_short_and_link_the_file(name):
    file, section = report.SECTIONS[name]
    result = json.loads((report.RESULTS / file).read_text())
    sources = re.findall("<sub>.*</sub>", section(result))
    if name == "study":  # whose page says it
        assert not sources
        return
    (source,) = sources
    assert len(source) < 200 and f"[{file}](benchmarks/results/{file})" in source
    assert f", torch {result['versions']['torch']}, {result['date']};" in source


def test_figures_of_a_gpu_name_it_and_triton():
    hardware, versions = {"cpu": "a CPU", "cores": 2, "gpu": "a GPU"}, {"torch": "2.13", "triton": "3.7"}
    result = {"hardware": hardware, "versions": versions, "date": "2026-11-22"}
    assert "a CPU, 2 cores, torch 2.13, 2026-11-22;" in report._source(result, "loss_cpu.json")
    result["device"] = {"type": "cuda", "name": "a GPU"}
    assert "<sub>a GPU, torch 2.13, triton 3.7, 2026-11-22;" in report._source(result, "gpu.json")

"""Check that ``pip install -e '.[benchmarks]'`` installs everything that the benchmarks import."""

from __future__ import annotations

import ast
import runpy
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def package():
    """Return the keywords of ``setup``."""
    given = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", given.update)
        runpy.run_path(str(ROOT / "setup.py"))
    return given


def names(requirements):
    return [Requirement(text).name.replace("_", "-").lower() for text in requirements]


def third_party(folder):
    """Return the third-party modules that the folder imports anywhere, including inside functions."""
    found = set()
    for file in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
                found.add(node.module.split(".")[0])
    return found - sys.stdlib_module_names - {path.name for path in ROOT.iterdir() if path.is_dir()}


@pytest.mark.parametrize("folder, extra", [("benchmarks", "benchmarks"), ("training", "training")])
def test_an_extra_brings_all_that_its_folder_imports(folder, extra, package):
    brought = {*names(package["install_requires"]), *names(package["extras_require"][extra])}
    distributions = packages_distributions()
    missing = {
        module
        for module in third_party(folder)
        if not brought & {name.replace("_", "-").lower() for name in distributions.get(module, [module])}
    }
    assert missing <= {"pytest"}  # pytest-benchmark depends on it


def test_no_extra_names_a_package_twice(package):
    for requirements in package["extras_require"].values():
        assert len(set(names(requirements))) == len(requirements)


def test_the_extra_for_tests_holds_the_benchmarks(package):
    extras = package["extras_require"]
    assert set(extras["training"]) < set(extras["benchmarks"]) < set(extras["test"])

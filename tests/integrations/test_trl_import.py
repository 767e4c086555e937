"""Test the errors for an unsuitable TRL, and what this integration imports from TRL."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

import trl

NAME = "inspo_kernels.integrations.trl"
SOURCES = Path(__file__).parents[2] / "inspo_kernels" / "integrations"


@pytest.mark.parametrize(
    ("module", "name"),
    [("trl.trainer.utils", "use_adapter"), ("trl.models.utils", "disable_gradient_checkpointing")],
)
def test_a_missing_name_says_which_trl(monkeypatch, module, name):
    monkeypatch.delattr(importlib.import_module(module), name)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=rf"needs TRL 1\.16: pip install 'trl>=1\.16,<1\.17'.*{name}"):
        importlib.import_module(NAME)


def test_a_missing_method_says_which_trl(monkeypatch):
    monkeypatch.delattr(trl.DPOTrainer, "compute_ref_log_probs")
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(ImportError, match=r"needs TRL 1\.16.*no DPOTrainer\.compute_ref_log_probs"):
        importlib.import_module(NAME)


def test_only_two_private_trl_names_are_used():
    """DPOConfig and DPOTrainer are public; the other two names are not."""
    imported = {
        f"{node.module}.{alias.name}"
        for path in SOURCES.glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("trl")
        for alias in node.names
    }
    assert imported == {
        "trl.DPOConfig",
        "trl.DPOTrainer",
        "trl.models.utils.disable_gradient_checkpointing",
        "trl.trainer.utils.use_adapter",
    }

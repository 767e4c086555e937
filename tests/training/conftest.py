"""Set up what the tests of the training loop share."""

import pytest

from training import output

PLOT = output.plot_curves


@pytest.fixture(autouse=True, scope="module")
def no_curves():
    """Skip drawing curves, which takes longer than the rest of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "plot_curves", lambda *what: None)
        yield


@pytest.fixture
def curves(monkeypatch):
    """Draw curves in this test."""
    monkeypatch.setattr(output, "plot_curves", PLOT)

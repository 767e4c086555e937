"""Set up the package's tests: stable test ids, ``--shuffle``, and ``--sanitize`` for the Triton kernels."""

from __future__ import annotations

import random
from collections import Counter

import pytest

COUNTS = pytest.StashKey[Counter]()


# The options exist only if the command line names this folder, hence the defaults below.
def pytest_addoption(parser):
    parser.addoption("--sanitize", action="store_true", help="check each access of interpreted kernels: sanitizer.py")
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and each one's tests, in random order")


def pytest_configure(config):
    config.stash[COUNTS] = Counter()
    if config.getoption("--sanitize", False):
        import triton_setup

        if not triton_setup.INTERPRETED:
            raise pytest.UsageError("--sanitize works in Triton's interpreter: hide the GPU with CUDA_VISIBLE_DEVICES=")


def pytest_collection_modifyitems(items, config):
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: an address changes from process to process: give the parameter an id"
            )
    if (seed := config.getoption("--shuffle", None)) is not None:
        items[:] = shuffled(items, random.Random(seed))


def shuffled(items, order):
    """Shuffle tests but keep those of a file together, because they share fixtures such as rank processes."""
    files = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    groups = list(files.values())
    order.shuffle(groups)
    for group in groups:
        order.shuffle(group)
    return [item for group in groups for item in group]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    # Other tests launch no kernels.
    if not item.config.getoption("--sanitize", False) or not hasattr(item.module, "triton_setup"):
        return (yield)
    import sanitizer

    with sanitizer.Sanitizer(seed=0) as checking:
        try:
            return (yield)
        finally:
            item.config.stash[COUNTS].update(checking.counts)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["sanitizer"] = dict(session.config.stash[COUNTS])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[COUNTS].update(getattr(node, "workeroutput", {}).get("sanitizer", {}))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--sanitize", False):
        import sanitizer

        terminalreporter.write_line(sanitizer.summary(config.stash[COUNTS]))

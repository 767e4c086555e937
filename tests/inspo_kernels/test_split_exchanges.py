"""Test the communication of ranks that share a loss, and the errors if ranks disagree or are missing."""

from __future__ import annotations

import time

import exchange_checks
import pytest
from cases import make_case
from rank_pool import ranks

import inspo_kernels as ik

three = ranks(3)
four = ranks(4)


@pytest.mark.parametrize("kind", ["labels", "hidden", "objective", "ref_logps", "requires_grad", "pairs", "refused"])
def test_disagreement_is_an_error_on_every_rank(three, kind):
    start = time.monotonic()
    errors = three.run(exchange_checks.error_of, kind, 1)
    assert time.monotonic() - start < 20  # none waits for the group's timeout
    argument = "hidden" if kind == "pairs" else kind
    for rank, error in enumerate(errors):
        if kind == "refused":
            wanted = "softcap must be positive" if rank == 1 else "rank 1 of process_group refused its arguments"
        else:
            wanted = f"process_group: rank 1 got a different {argument} than rank 0"
        assert error.startswith("ValueError") and wanted in error


def test_disagreement_within_a_mesh_reaches_every_rank(four):
    errors = four.run(exchange_checks.error_in_mesh, 3)
    assert all(error.startswith("ValueError") for error in errors), errors
    assert "a different objective" in errors[3] and "a different objective" in errors[2]


def test_missing_rank_is_an_error_within_the_timeout(three):
    start = time.monotonic()
    errors = three.run(exchange_checks.missing_rank, 1, 4)
    assert time.monotonic() - start < 4 + 20
    awaited = {
        "process_group": "the arguments of the other ranks of process_group",
        "sequence_group": "the arguments of the other ranks of sequence_group",
        "backward": "the gradient of hidden from the other ranks of process_group",
    }
    for rank in (0, 2):
        assert errors[rank].keys() == awaited.keys()
        for absent, what in awaited.items():
            assert f"waiting for {what}" in errors[rank][absent]


def test_bytes_sent(three):
    """A rank sends 12 bytes per row, 4 per statistic and one dX, and nothing of the vocabulary's size."""
    three.run(exchange_checks.bytes_sent)


def test_group_of_one_runs_the_operations_of_none(three):
    three.run(exchange_checks.group_of_one)


def test_other_objects_are_no_group():
    case = make_case([(1, 1, 1)])
    with pytest.raises(TypeError, match=r"sequence_group must be a torch\.distributed ProcessGroup or None, got str"):
        ik.pair_logps(case.hidden, case.weight, case.labels, sequence_group="sp")

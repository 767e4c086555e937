"""Test each claim of ``benchmarks.study.tabular`` on worlds with known answers."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.study import tabular
from benchmarks.study.tabular import SCALARIZATIONS, World, margins

CYCLE = torch.tensor([[0.5, 0.8, 0.3], [0.2, 0.5, 0.9], [0.7, 0.1, 0.5]], dtype=torch.float64)  # 0 > 1 > 2 > 0
OFF_DIAGONAL = ~torch.eye(3, dtype=torch.bool)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def world_of(preferences: torch.Tensor, generator: torch.Generator) -> World:
    size = len(preferences)
    return World(preferences, tabular.random_weights(size, generator), tabular.random_log_ref(size, generator))


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_conditioned_losses_reach_the_bayes_risk_of_cycles(name, generator):
    s = SCALARIZATIONS[name]
    for _ in range(2):
        world = world_of(CYCLE, generator)
        u = margins(tabular.conditioned_optimum(world, s), world.log_ref)
        assert tabular.risk(u, world, s.objective) - tabular.bayes_risk(world, s) < 1e-12
        torch.testing.assert_close(s.decode(u)[OFF_DIAGONAL], CYCLE[OFF_DIAGONAL], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_other_margins_exceed_the_bayes_risk(name, generator):
    s, world = SCALARIZATIONS[name], world_of(CYCLE, generator)
    for _ in range(20):
        noise = torch.randn(3, 3, generator=generator, dtype=torch.float64)
        u = s.link(CYCLE) + 0.1 * (noise - noise.T)
        assert tabular.risk(u, world, s.objective) > tabular.bayes_risk(world, s) + 1e-6


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_plain_losses_cannot_decode_a_cycle(name, generator):
    s = SCALARIZATIONS[name]
    decoded = []
    for _ in range(2):
        world = world_of(CYCLE, generator)
        u = margins(tabular.plain_optimum(world, s), world.log_ref)
        assert tabular.risk(u, world, s.objective) - tabular.bayes_risk(world, s) > 1e-2
        decoded.append(s.decode(u))
    assert (decoded[0] - decoded[1]).abs().max() > 1e-2


def test_plain_dpo_recovers_bradley_terry_strengths(generator):
    strengths = torch.tensor([1.0, -0.5, 0.3, 2.0], dtype=torch.float64)
    world = world_of(tabular.bradley_terry(strengths), generator)
    u = margins(tabular.plain_optimum(world, SCALARIZATIONS["logistic"]), world.log_ref)
    torch.testing.assert_close(u, strengths[:, None] - strengths[None], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [2, 3, 5])
def test_conditioned_optima_form_a_family_of_known_dimension(size, generator):
    world = tabular.random_world(size, generator, cyclic=True)
    optimum = tabular.conditioned_optimum(world, SCALARIZATIONS["logistic"])
    assert tabular.dimension_of_optima(optimum, world.log_ref) == size * (size - 1) // 2


def test_an_optimum_that_only_repeats_the_alternative_exists(generator):
    world = world_of(CYCLE, generator)
    optimum = tabular.conditioned_optimum(world, SCALARIZATIONS["squared"])
    echo = tabular.echoing(optimum, 10.0)
    torch.testing.assert_close(echo.exp().sum(0), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(margins(echo, world.log_ref), margins(optimum, world.log_ref))
    assert echo.diagonal().exp().min() > 0.999


def test_every_prompt_only_policy_belongs_to_some_optimum(generator):
    world, s = world_of(CYCLE, generator), SCALARIZATIONS["logistic"]
    optimum = tabular.conditioned_optimum(world, s)
    theta = torch.randn(3, generator=generator, dtype=torch.float64)
    phi = optimum - theta[:, None]
    u = margins(torch.log_softmax(theta[:, None] + phi, 0), world.log_ref)
    assert tabular.risk(u, world, s.objective) - tabular.bayes_risk(world, s) < 1e-12


@pytest.mark.parametrize("name", SCALARIZATIONS)
def test_shuffled_labels_teach_the_prompt_only_policy_nothing(name, generator):
    world = world_of(torch.full((3, 3), 0.5, dtype=torch.float64), generator)
    alone, excess = tabular.shared_descent(world, SCALARIZATIONS[name])
    assert excess < 1e-10
    torch.testing.assert_close(alone, world.log_ref, atol=1e-12, rtol=0)


def test_descent_moves_towards_a_clear_favourite(generator):
    preferences = tabular.bradley_terry(torch.tensor([2.0, 0.0, -2.0], dtype=torch.float64))
    world = world_of(preferences, generator)
    alone, excess = tabular.shared_descent(world, SCALARIZATIONS["logistic"])
    assert excess < 1e-9
    gain = (alone - world.log_ref).tolist()
    assert gain[0] > gain[1] > gain[2]


def test_an_anchor_pulls_towards_the_plain_optimum(generator):
    world, s = world_of(CYCLE, generator), SCALARIZATIONS["logistic"]
    alone, excess = tabular.shared_descent(world, s, anchor=1.0, gap=1e-14)
    assert excess < 1e-12
    torch.testing.assert_close(alone, tabular.plain_optimum(world, s), atol=1e-5, rtol=0)


@pytest.mark.sweep
def test_the_command_writes_what_it_prints(tmp_path, capsys):
    file = tmp_path / "tabular.json"
    tabular.main(["--json", str(file), "--worlds", "2", "--responses", "3"])
    result = json.loads(file.read_text())
    assert result["dimension_of_optima"] == result["dimension_expected"] == 3
    assert result["cyclic"]["conditioned"]["logistic"]["error_of_decoded_preferences"] < 1e-6
    assert "dimension of the conditioned optima: 3" in capsys.readouterr().out
    assert result["versions"]["torch"]

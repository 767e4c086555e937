"""Test the study's world: grading and judge on known answers, disjoint prompts, labels and their noise."""

from __future__ import annotations

import dataclasses
import math
import random
from collections import Counter

import pytest

from benchmarks.study import world
from benchmarks.study.runs import Candidates, label
from benchmarks.study.world import Judge, Prompt, decode, draw_prompts, edits, encode, quality, right_answer


@pytest.mark.parametrize(("prompt", "right"), [("Rabc", "cba"), ("Naij", "bja"), ("Sdbca", "abcd"), ("Dab", "aabb")])
def test_right_answers(prompt, right):
    assert right_answer(Prompt(prompt[0], prompt[1:])) == right


@pytest.mark.parametrize(
    ("answer", "wrong"),
    [
        ("dcba$", 0),
        ("~dc~ba~~$", 0),
        ("dcbb$", 1),
        ("dcb$", 1),
        ("dcbaa$", 1),
        ("cba$", 1),
        ("$", 4),
        ("~~~$", 4),
        ("abcd$", 4),
        ("aaaaaaaaaa$", 4),
        ("dcba", 4),
        ("R=dcba$", 2),
    ],
)
def test_quality_ignores_filler_and_requires_an_end(answer, wrong):
    prompt = Prompt("R", "abcd")
    assert edits(prompt, answer) == wrong
    assert quality(prompt, answer) == 1 - wrong / 4


def test_the_judge_weighs_quality_and_length():
    judge, prompt = Judge(a=6.0, b=0.2), Prompt("R", "abcd")
    assert judge.prefers(prompt, "dcba$", "dcba$") == 0.5
    assert judge.prefers(prompt, "dcba~~~$", "dcba$") == pytest.approx(1 / (1 + math.exp(-0.6)))
    assert judge.prefers(prompt, "dcbb$", "dcba~$") == pytest.approx(1 / (1 + math.exp(6 / 4 + 0.2)))


def test_labels_are_flipped_at_the_noise_rate():
    rng, judge = random.Random(0), Judge(noise=0.15)
    labels = [judge.label(0.8, rng.random(), rng.random()) for _ in range(20_000)]
    assert sum(labels) / len(labels) == pytest.approx(0.8 * 0.85 + 0.2 * 0.15, abs=0.01)
    assert dataclasses.replace(judge, noise=0.0).label(0.8, 0.79, 0.0)
    assert not judge.label(0.8, 0.79, 0.149)


def test_half_flipped_labels_carry_no_information():
    rng = random.Random(1)
    pairs = [
        Candidates(
            Prompt("R", "abcd"),
            ("dcba$", "abcd~$") if i % 2 else ("abcd~$", "dcba$"),
            (0.0, 0.0),
            (rng.random(), rng.random(), 0.0, 0),
        )
        for i in range(4000)
    ]
    for noise, expected in ((0.0, 1.0), (0.5, 0.5)):
        chosen = [decode(e.chosen) == "dcba$" for e in label(pairs, Judge(noise=noise))]
        assert sum(chosen) / len(chosen) == pytest.approx(expected, abs=0.03)


def test_prompt_splits_are_disjoint_and_balanced():
    prompts = draw_prompts((3, 4), training=160, validation=40, test=80, seed=3)
    parts = [prompts.training, prompts.validation, prompts.test]
    assert [len(part) for part in parts] == [160, 40, 80]
    assert len(set().union(*parts)) == 280
    for part in parts:
        assert set(Counter(prompt.kind for prompt in part).values()) == {len(part) // 8}
        assert all(right_answer(prompt) != prompt.word for prompt in part)
    assert draw_prompts((3, 4), training=160, validation=40, test=80, seed=4).test != prompts.test
    with pytest.raises(ValueError, match="too many"):
        draw_prompts((2,), training=400, validation=40, test=80, seed=0)


def test_demonstrations_have_systematic_errors_and_filler():
    rng, prompt = random.Random(2), Prompt("R", "abcd")
    shown = [world.demonstrate(prompt, rng) for _ in range(4000)]
    assert all(answer.endswith(world.END) and len(answer) > 1 for answer in shown)
    bare = [answer.replace(world.FILLER, "") for answer in shown]
    assert sum(answer == "dcba$" for answer in bare) / 4000 == pytest.approx(world.RIGHT, abs=0.05)
    assert sum(answer == "abcd$" for answer in bare) / 4000 == pytest.approx(world.ECHO, abs=0.05)
    assert sum(world.FILLER in answer for answer in shown) / 4000 == pytest.approx(world.FILLED, abs=0.05)
    assert decode(encode(shown[0])) == shown[0]

"""Test the study on the standard library's text: its world, batches, summary and page."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path

import pytest
import scipy.stats
import torch

import inspo_kernels as ik
from benchmarks.study import code_report, code_study
from benchmarks.study.code_runs import ARMS, Pair, Size, batch_of, build, sample, with_alternatives
from benchmarks.study.code_world import END_ID, PAD_ID, Function, Judge, Vocabulary, damaged, quality, read_library

RUNS = code_report.RESULTS / "runs.jsonl"
TINY = Size(vocabulary=280, hidden_size=16, layers=1)


def function(module="some.module", names=("json",)):
    return Function(module, 'def f(a, b):\n    """Add."""', "\n    return a + b", frozenset(names), True)


@pytest.mark.parametrize(
    ("answer", "grade"),
    [
        ("\n    return a + b", 1.0),
        ("\n    return json.dumps(len(a))", 1.0),  # a module's name, a builtin, a parameter
        ("\n    c = a\n    return c + d", 5 / 6),  # a and c of three names are bound
        ("\n    return [x for x in a if (y := x)]", 1.0),
        ("\n    try:\n        import os as z\n    except OSError as e:\n        z = e\n    return z", 1.0),
        ("\n    return unknown", 0.5),
        ("\n    pass", 0.5),
        ("\n    return a +", 0.0),
        ("\n  return a", 0.0),  # indented unlike the docstring
        ("\n    return a\ndef g():\n    return 1", 0.0),  # more than the function
        ("\n    continue", 0.0),  # parses, does not compile
        ("", 0.5),  # the docstring alone
        (None, 0.0),
    ],
)
def test_quality_of_known_answers(answer, grade):
    assert quality(function(), answer) == pytest.approx(grade)


def test_names_of_the_header_are_not_read():
    odd = Function("m", "def f(a: Unknown=missing):", "\n    return a", frozenset(), False)
    assert quality(odd, odd.body) == 1.0


def test_library_without_sources_says_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no sources of the standard library.*use a Python that ships"):
        read_library(tmp_path)


@pytest.fixture(scope="module")
def library():
    return read_library(most_files=120)


def test_splits_share_no_module_and_no_function(library):
    assert all(library.parts.values())
    modules = [{f.module.split(".")[0] for f in found} for found in library.parts.values()]
    texts = [{f.prompt + f.body for f in found} for found in library.parts.values()]
    for sets in (modules, texts):
        assert len(set().union(*sets)) == sum(map(len, sets))
    assert sum(map(len, texts)) == sum(map(len, library.parts.values()))


def test_own_bodies_compile_and_most_names_are_bound(library):
    grades = [quality(f, f.body) for found in library.parts.values() for f in found]
    assert min(grades) > 0 and statistics.mean(grades) > 0.95


def test_vocabulary_gives_the_text_back(library):
    vocabulary = Vocabulary(library.parts["training"], 300)
    assert len(vocabulary) == 300
    for one in library.parts["test"][:20]:
        assert vocabulary.text(vocabulary.body(one)) == one.body
    assert vocabulary.text(vocabulary.encode("\n    pass")) is None  # without end


def test_drafts_differ_from_the_body_and_end():
    body = [*range(2, 30), END_ID]
    drafts = [damaged(body, 40, random.Random(seed)) for seed in range(50)]
    assert all(draft[-1] == END_ID and len(draft) > 1 for draft in drafts)
    assert sum(draft != body for draft in drafts) >= 45
    assert damaged([5, END_ID], 40, random.Random(0))[-1] == END_ID


def some_pairs(count=4):
    rng = random.Random(0)
    ids = [[[rng.randrange(2, 280) for _ in range(rng.randint(2, 6))] for _ in range(3)] for _ in range(count)]
    return [Pair(p, [*a, END_ID], [*b, END_ID], (1.0, 0.0)) for p, a, b in ids]


@pytest.mark.parametrize("conditioned", [False, True])
def test_batches_are_those_of_condition_pairs(conditioned):
    pairs = with_alternatives(some_pairs(), own=True, seed=0)
    batch = batch_of(pairs, [conditioned] * len(pairs))
    ours = [(p.prompt, p.chosen, p.rejected) for p in pairs]
    expected = ik.condition_pairs(ours, pad_token_id=PAD_ID, conditioned=conditioned)
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(batch[name], expected[name]), name
    assert torch.equal(batch["position_ids"] * batch["attention_mask"], expected["position_ids"])


def test_dropped_pairs_are_laid_out_plain():
    pairs = with_alternatives(some_pairs(2), own=True, seed=0)
    mixed = batch_of(pairs, [True, False])
    for row, length in ((1, len(pairs[1].prompt + pairs[1].chosen)), (3, len(pairs[1].prompt + pairs[1].rejected))):
        assert mixed["attention_mask"][row].sum() == length
    assert mixed["attention_mask"][0].sum() == len(pairs[0].prompt + pairs[0].rejected + pairs[0].chosen)


def test_shuffled_alternatives_are_another_pairs_in_their_roles():
    pairs = some_pairs(6)
    shuffled = with_alternatives(pairs, own=False, seed=3)
    for i, pair in enumerate(shuffled):
        (other,) = [j for j, one in enumerate(pairs) if one.rejected == pair.alternatives[0]]
        assert other != i and pair.alternatives[1] == pairs[other].chosen
    assert len({tuple(pair.alternatives[0]) for pair in shuffled}) == len(pairs)


def test_greedy_answers_are_those_of_a_plain_loop():
    model = build(TINY)
    prompts = [[5, 9, 17], [8], [30, 31, 32, 33, 34]]
    answers = sample(model, prompts, 12, 1, seed=None)
    for prompt, answer in zip(prompts, answers):
        ids = list(prompt)
        while len(ids) < len(prompt) + 12 and END_ID not in ids:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]


def test_samples_depend_on_seed_prompt_and_position_alone():
    model = build(TINY)
    prompts = [[5, 9, 17], [8], [30, 31, 32, 33, 34]]
    answers = sample(model, prompts, 12, 2, seed=7)
    assert answers == sample(model, prompts, 12, 2, seed=7) != sample(model, prompts, 12, 2, seed=8)
    assert answers[:2] == sample(model, prompts[:1], 12, 2, seed=7)


@pytest.mark.parametrize(
    ("differences", "p", "expected"),
    [
        ((0.10, 0.11, 0.12), 0.01, "better"),
        ((-0.10, -0.11, -0.12), 0.01, "worse"),
        ((0.001, -0.001, 0.002), 0.9, "equivalent"),
        ((0.1, -0.1, 0.05), 0.9, "undecided"),
    ],
)
def test_decisions_follow_the_protocol(differences, p, expected):
    intervals = [code_study.t_interval(differences, level) for level in (0.95, 0.90)]
    assert code_study.decision(*intervals, p) == expected


def test_the_earliest_of_equal_epochs_is_chosen():
    rows = {1: [{"validation": 0.5}, {"validation": 0.4}], 3: [{"validation": 0.5}, {"validation": 0.6}]}
    assert code_study.chosen_epochs(rows) == [1, 3]


@pytest.mark.sweep
def test_quick_study_runs_and_resumes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "results" / "study_code.json"
    code_study.main(["--quick", "--json", str(file)])
    runs = (file.parent / "runs.jsonl").read_text()
    lines = runs.splitlines()
    assert len(lines) == 1 + 2 * (1 + len(ARMS))
    assert "Tiny sizes" in (file.parent / "study_code.md").read_text() and (file.parent / "study_code.png").exists()
    before = json.loads(file.read_text())
    # The last run's line is cut in the middle. The run is repeated with the same result.
    (file.parent / "runs.jsonl").write_text("\n".join(lines[:-1]) + "\n" + lines[-1][:50])
    capsys.readouterr()
    code_study.main(["--quick", "--json", str(file)])
    assert "0 of 1 runs done" in capsys.readouterr().out
    again = json.loads(file.read_text())
    assert {k: v for k, v in before.items() if k != "run_seconds"} == {
        k: v for k, v in again.items() if k != "run_seconds"
    }
    with pytest.raises(SystemExit):
        code_study.main(["--json", str(file)])
    assert "holds runs with other settings (size)" in capsys.readouterr().err


# --- the committed results, computed a second time in plain Python ---


def evaluations_of(file):
    _, *runs = map(json.loads, file.read_text().splitlines())
    return {(run["arm"], run["seed"]): run["evaluations"] for run in runs}


@pytest.fixture(scope="module")
def committed():
    return json.loads((code_report.RESULTS / "study_code.json").read_text()), evaluations_of(RUNS)


def mean_quality(evaluation, what="test"):
    return sum(evaluation[what]["quality"]) / len(evaluation[what]["quality"]) / 1000


def at_best(evaluations):
    best = max(mean_quality(e, "validation") for e in evaluations)
    return next(e for e in evaluations if mean_quality(e, "validation") == best)


@pytest.mark.parametrize("part", ["first", "repeat"])
def test_hypotheses_agree_with_a_plain_computation(committed, part):
    result, runs = committed
    margin = result["margin"]
    if part == "repeat":
        result, runs = result["repeat"], evaluations_of(RUNS.with_name("repeat.jsonl"))
    values = {
        "H1": [(runs["inspo", s][-1], runs["plain", s][-1]) for s in result["seeds"]],
        "H2": [(at_best(runs["inspo", s]), at_best(runs["plain", s])) for s in result["seeds"]],
        "H3": [(runs["inspo", s][-1], runs["shuffled", s][-1]) for s in result["seeds"]],
    }
    found = {}
    for name, pairs in values.items():
        one, other = ([mean_quality(e) for e in side] for side in zip(*pairs))
        test = scipy.stats.ttest_rel(one, other)
        low, high = test.confidence_interval(0.90)
        found[name] = (statistics.mean(one) - statistics.mean(other), test.pvalue, low, high)
    ordered = sorted(found, key=lambda name: found[name][1])
    worst = 0.0
    for rank, name in enumerate(ordered):
        mean, p, low, high = found[name]
        worst = max(worst, min(1.0, (3 - rank) * p))
        entry = result["hypotheses"][name]
        assert entry["quality"]["mean"] == pytest.approx(mean, abs=1e-9)
        assert (entry["quality"]["p"], entry["holm_p"]) == (pytest.approx(p), pytest.approx(worst))
        inside = -margin < low and high < margin
        decided = ("better" if mean > 0 else "worse") if worst < 0.05 else "equivalent" if inside else "undecided"
        assert entry["decision"] == decided


def test_table_agrees_with_a_plain_computation(committed):
    result, runs = committed
    judge = Judge()
    for arm, rows in result["arms"].items():
        for i, row in enumerate(rows):
            evaluations = [runs[arm, seed][i] for seed in result["seeds"]]
            assert [e["epoch"] for e in evaluations] == [row["epoch"]] * len(evaluations)
            assert row["quality"]["mean"] == pytest.approx(statistics.mean(map(mean_quality, evaluations)))
            gains = [mean_quality(e) - mean_quality(runs["base", s][0]) for s, e in zip(result["seeds"], evaluations)]
            assert row["gain"]["mean"] == pytest.approx(statistics.mean(gains), abs=1e-9)
            assert row["greedy"]["mean"] == pytest.approx(
                statistics.mean(mean_quality(e, "greedy") for e in evaluations)
            )
            assert row["length"]["mean"] == pytest.approx(
                statistics.mean(statistics.mean(e["test"]["length"]) for e in evaluations)
            )
            wins = []
            for seed, evaluation in zip(result["seeds"], evaluations):
                theirs = runs["base", seed][0]["test"]
                scores = zip(*evaluation["test"].values(), *theirs.values())
                wins.append(
                    statistics.mean(
                        1 / (1 + math.exp(judge.a * (b - q) / 1000 + judge.b * (m - n))) for q, n, b, m in scores
                    )
                )
            assert row["win_rate"]["mean"] == pytest.approx(statistics.mean(wins))


def test_page_is_what_the_results_say(committed):
    result, _ = committed
    page = (Path(code_report.DOCS) / "study_code.md").read_text()
    assert page == code_report.text(json.loads(json.dumps(result)))
    assert code_report.finding(result) in " ".join(page.split())


def test_committed_runs_follow_the_protocol(committed):
    result, runs = committed
    protocol = " ".join((Path(code_report.DOCS) / "study_protocol_code.md").read_text().split())
    size = Size(**{k: tuple(v) if isinstance(v, list) else v for k, v in result["settings"]["size"].items()})
    assert size == Size() and result["margin"] == code_study.MARGIN
    for words in (
        f"**{size.pairs} pairs a seed**",
        f"±{result['margin']:g}",
        f"each of {size.test_prompts} test prompts",
        f"each of {size.validation_prompts} validation prompts",
        f"learning rate is {size.learning_rate:g}",
        "Epochs 1, 3 and 10",
        f"encoding of {size.vocabulary:,}",
        f"{size.fit_steps:,} steps of {size.fit_rows} rows",
    ):
        assert words in protocol, words
    lengths = {len(e["test"]["quality"]) for evaluations in runs.values() for e in evaluations}
    assert lengths == {size.samples * size.test_prompts}

"""Test the demo: its world and judge, its sampled pairs, and the whole program in the quick size."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import generate
from training.demo.__main__ import main
from training.demo.answers import CUT, REFLECTED, compare, reflect_unseen, sample_answers, sample_pairs
from training.demo.settings import FINE_TUNES, Settings, fine_tune_config, long_config
from training.demo.stages import fit_base, run_demo
from training.demo.world import Prompt, World
from training.errors import InputError, SaveError, Stopped


@pytest.fixture(scope="module")
def world() -> World:
    return World(letters=4, lengths=(3, 4), unseen_per_kind=5, seed=0)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run a quick demo through the command line, and return its output folder and printed text."""
    folder = tmp_path_factory.mktemp("quick") / "demo"
    with pytest.MonkeyPatch.context() as patch:
        lines: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        patch.setattr("training.demo.__main__.run_demo", lambda *a: run_demo(*a, say=lines.append))
        main(["--quick", "--output_dir", str(folder)])
    return folder, "\n".join(lines)


def records(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def quick_world() -> World:
    s = Settings.quick()
    return World(s.letters, s.lengths, s.unseen_per_kind, s.seed)


class Parrot:
    """A fake model: it answers the n-th row of a batch with the n-th of ``answers``, or with the prompt's word."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, answers: list[str] | None = None) -> None:
        self.tokenizer, self.answers = tokenizer, answers

    def generate(self, ids: torch.Tensor, **_) -> torch.Tensor:
        answers = self.answers or [
            text[text.index(" ") + 1 : -1] + "<eos>" for text in self.tokenizer.batch_decode(ids)
        ]
        new = self.tokenizer(answers[: len(ids)], padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        return torch.cat([ids, new], 1)


def test_judge(world: World) -> None:
    assert str(Prompt("reverse", "abca")) == "reverse abca="
    assert world.is_right(Prompt("reverse", "abd"), "dba")
    assert world.is_right(Prompt("shift", "abd"), "bca")  # the letter after the last one is the first
    for answer in ("", "abd", "db", "dbaa", "dba" + CUT, "DBA", " dba"):
        assert not world.is_right(Prompt("reverse", "abd"), answer)


def test_training_and_unseen_prompts_are_disjoint_and_complete(world: World) -> None:
    training = [prompt for prompts in world.training.values() for prompt in prompts]
    assert not set(training) & set(world.unseen)
    # all words but the palindromes (4^2 of either length) for reversing, all words for shifting
    assert len({*training, *world.unseen}) == len(training) + len(world.unseen) == 2 * (4**3 + 4**4) - 2 * 4**2
    assert Counter((p.task, len(p.word)) for p in world.unseen) == dict.fromkeys(world.training, 5)
    assert {world.draw(random.Random(i)) for i in range(3000)} <= set(training)
    assert World(4, (3, 4), 5, seed=0).unseen == world.unseen != World(4, (3, 4), 5, seed=1).unseen


def test_demonstrations_have_the_stated_shares(world: World) -> None:
    rng = random.Random(0)
    kinds: Counter[str] = Counter()
    for _ in range(4000):
        prompt = world.draw(rng)
        answer = world.demonstrate(prompt, rng)
        kinds["right" if world.is_right(prompt, answer) else "echo" if answer == prompt.word else "other"] += 1
        assert len(answer) == len(prompt.word)
    # random letters are right or an echo now and then: 0.15 / 64 or / 256
    assert kinds["right"] / 4000 == pytest.approx(0.352, abs=0.025)
    assert kinds["echo"] / 4000 == pytest.approx(0.502, abs=0.025)


def test_tokenizer_has_one_token_per_letter(world: World, tmp_path: Path) -> None:
    tokenizer = world.tokenizer()
    ids = tokenizer("shift abca=")["input_ids"]
    assert len(ids) == 6 and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids) == "shift abca="
    assert tokenizer("z")["input_ids"] == [tokenizer.unk_token_id]


def test_default_model_is_small() -> None:
    s = Settings()
    world = World(s.letters, s.lengths, s.unseen_per_kind, s.seed)
    model = fit_base(world, world.tokenizer(), replace(s, fit_steps=3, fit_rows=2))
    assert 200_000 < sum(p.numel() for p in model.parameters()) <= 300_000


def test_base_is_fitted_to_answers_only(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[int], list[int]]] = []
    model_class = type(fit_base(world, world.tokenizer(), replace(Settings.quick(), fit_steps=3, fit_rows=2)))
    forward = model_class.forward

    def spy(self, input_ids, labels):
        seen.extend(zip(input_ids.tolist(), labels.tolist()))
        return forward(self, input_ids=input_ids, labels=labels)

    monkeypatch.setattr(model_class, "forward", spy)
    tokenizer = world.tokenizer()
    fit_base(world, tokenizer, replace(Settings.quick(), fit_steps=3, fit_rows=100))
    unseen, drafts = {str(prompt) for prompt in world.unseen}, 0
    for ids, labels in seen:
        text = tokenizer.decode(ids).replace("<pad>", "")
        prompt, answers = text[: text.index("=") + 1], text[text.index("=") + 1 :]
        assert prompt not in unseen
        assert tokenizer.decode([label for label in labels if label != -100]) == answers
        assert labels[: len(tokenizer(prompt)["input_ids"])] == [-100] * len(tokenizer(prompt)["input_ids"])
        drafts += answers.count("<eos>") - 1
    assert len(seen) == 300 and drafts / 300 == pytest.approx(0.5, abs=0.12)


def test_answers_stay_with_their_prompts(world: World) -> None:
    prompts = [Prompt("reverse", "abc"), Prompt("shift", "abcd"), Prompt("shift", "bcd"), Prompt("reverse", "dcba")]
    answers = sample_answers(Parrot(world.tokenizer()), world.tokenizer(), prompts, count=3, greedy=False, seed=0)
    assert answers == [[prompt.word] * 3 for prompt in prompts]


def test_answers_that_do_not_end_are_marked(world: World) -> None:
    model = Parrot(world.tokenizer(), ["ab<eos><pad>", "abcd"])
    prompts = [Prompt("reverse", "abc"), Prompt("shift", "abc")]
    answers = sample_answers(model, world.tokenizer(), prompts, count=1, greedy=True, seed=0)
    assert answers == [["ab"], ["abcd" + CUT]]


def test_sampling_follows_the_seed(world: World) -> None:
    model = fit_base(world, world.tokenizer(), replace(Settings.quick(), fit_steps=3))
    state = torch.get_rng_state()

    def sample(seed: int, greedy: bool = False) -> list[list[str]]:
        return sample_answers(model, world.tokenizer(), world.unseen, count=4, greedy=greedy, seed=seed)

    assert sample(1) == sample(1) != sample(2)
    assert sample(1, greedy=True) == sample(2, greedy=True)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("answers", "rejected"),
    [
        (["abd", "dba", "bbb", "dba"], "abd"),  # the first wrong one
        (["dba", "", "d=", "db<unk>", "aab"], "aab"),  # of those that are words
        (["dba", "dba"], None),  # never wrong
        (["dba", "", "="], None),
        (["abd", "bbb"], None),  # never right
    ],
)
def test_pair_of_a_prompt(world: World, answers: list[str], rejected: str | None) -> None:
    tokenizer = world.tokenizer()
    model = Parrot(tokenizer, [answer + "<eos>" for answer in answers])
    settings = replace(Settings(), samples=len(answers))
    pairs = sample_pairs(model, tokenizer, world, [Prompt("reverse", "abd")], 9, settings)
    expected = [] if rejected is None else [{"prompt": "reverse abd=", "chosen": "dba", "rejected": rejected}]
    assert pairs == expected


def test_fine_tunes_differ_only_in_method(tmp_path: Path) -> None:
    configs = {name: fine_tune_config(name, Settings(), tmp_path).settings() for name in FINE_TUNES}
    dpo, inspo = configs["dpo"], configs["inspo"]
    assert {key for key in dpo if dpo[key] != inspo[key]} == {"conditioned", "output_dir"}
    assert inspo["conditioned"] and not dpo["conditioned"]
    differing = {key for key in dpo if dpo[key] != configs["sft"][key]}
    assert differing == {"objective", "beta", "lam", "output_dir"}


def test_long_runs_have_few_pairs_and_a_constant_rate(tmp_path: Path) -> None:
    settings = Settings()
    configs = {name: long_config(name, settings, tmp_path).settings() for name in ("dpo", "inspo")}
    differing = {key for key in configs["dpo"] if configs["dpo"][key] != configs["inspo"][key]}
    assert differing == {"conditioned", "output_dir"}
    config = configs["dpo"]
    assert config["lr_scheduler_type"] == "constant_with_warmup" and config["train_data"].endswith("few_pairs.jsonl")
    passes = settings.long_steps[-1] * settings.long_step_pairs / settings.long_pairs
    assert config["max_steps"] == settings.long_steps[-1] and passes >= 40


def test_quick_demo_shows_accuracy_of_long_runs(demo: tuple[Path, str]) -> None:
    folder, text = demo
    results = json.loads((folder / "results.json").read_text())
    assert len(records(folder / "few_pairs.jsonl")) <= Settings.quick().long_pairs
    assert list(results["over_trained"]) == ["dpo", "inspo"]
    for title, points in zip(("DPO", "InSPO"), results["over_trained"].values()):
        assert [point["step"] for point in points] == list(Settings.quick().long_steps)
        shown = "".join(f"{point['accuracy']:>8.3f}" for point in points)
        assert f"  too long, {title:<10}{shown}" in text.splitlines()


def test_comparison_counts_prompts_and_pairs_them_with_the_base() -> None:
    world = World(letters=4, lengths=(3,), unseen_per_kind=2, seed=0)
    right = [world.right_answer(prompt) for prompt in world.unseen]
    base = [[right[0], "a"], ["", "abcdabcd" + CUT], ["a", "a"], ["a<unk>", "a"]]
    better = [[right[0], right[0]], [right[1], "a"], ["a", right[2]], ["a", "a"]]
    alone = compare(world, base, None)
    assert alone["accuracy"] == 1 / 8 and "gain" not in alone
    assert alone["mean_length"] == (3 + 1 + 0 + 8 + 5) / 8  # <unk> is one token
    result = compare(world, better, base)
    assert result["accuracy"] == 4 / 8 and result["gain"] == pytest.approx(3 / 8)
    # gains of the four prompts: 1/2, 1/2, 1/2, 0
    assert result["gain_ci"] == pytest.approx([3 / 8 - 1.96 * 0.25 / 2, 3 / 8 + 1.96 * 0.25 / 2], abs=1e-4)


def test_quick_demo_prints_what_it_measured(demo: tuple[Path, str]) -> None:
    folder, text = demo
    results = json.loads((folder / "results.json").read_text())
    assert list(results["models"]) == ["base", "sft", "dpo", "inspo"]
    for name, title in (("base", "base"), ("sft", "SFT"), ("dpo", "DPO"), ("inspo", "InSPO")):
        lines = [line for line in text.splitlines() if line.startswith(f"  {title}")]
        for line, how in zip(lines, ("greedy", "sampled"), strict=True):
            row = results["models"][name][how]
            assert f"{row['accuracy']:.3f}  [{row['accuracy_ci'][0]:.3f}, {row['accuracy_ci'][1]:.3f}]" in line
            assert f"{row['mean_length']:.2f}" in line
            assert name == "base" or f"{row['gain']:+.3f}  [{row['gain_ci'][0]:+.3f}, {row['gain_ci'][1]:+.3f}]" in line
    assert f"{results['conditioning_gap']['chosen']:+.3f} nats per token" in text
    for example in results["examples"]:
        assert any(line.startswith(example["prompt"]) and example["inspo"] in line for line in text.splitlines())
    assert str(folder / "picture.png") in text


def test_reflection_is_compared_at_equal_generations(demo: tuple[Path, str]) -> None:
    folder, text = demo
    rows = json.loads((folder / "results.json").read_text())["reflection"]
    titles = {"draft": "one draft", "reflected": "given the draft", "best_of_two": "likelier of two"}
    assert list(rows) == list(titles)
    for way, title in titles.items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"  {title}")]
        assert f"{rows[way]['accuracy']:.3f}" in line and ("gain" in rows[way]) == (way != "draft")
    model, tokenizer = (
        part.from_pretrained(folder / "inspo" / "final") for part in (AutoModelForCausalLM, AutoTokenizer)
    )
    world, drafts = quick_world(), reflect_unseen(model, tokenizer, quick_world().unseen, count=REFLECTED, seed=0)
    assert rows["draft"] == compare(world, drafts["draft"], None)
    assert rows["best_of_two"] == compare(world, drafts["best_of_two"], drafts["draft"])
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_quick_demo_trains_on_judged_pairs_of_training_prompts(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    world = quick_world()
    by_text = {str(prompt): prompt for prompts in world.training.values() for prompt in prompts}
    unseen = {str(prompt): prompt for prompt in world.unseen}
    for file, prompts in (("pairs.jsonl", by_text), ("unseen_pairs.jsonl", unseen)):
        pairs = records(folder / file)
        assert pairs
        assert len({pair["prompt"] for pair in pairs}) == len(pairs)
        for pair in pairs:
            prompt = prompts[pair["prompt"]]
            assert pair["chosen"] == world.right_answer(prompt)
            assert pair["rejected"].isalpha() and not world.is_right(prompt, pair["rejected"])
    results = json.loads((folder / "results.json").read_text())
    assert results["pairs"] == len(records(folder / "pairs.jsonl")) <= Settings.quick().pairs
    for name in FINE_TUNES:
        assert f"train_data: {folder / 'pairs.jsonl'}" in (folder / name / "config.yaml").read_text()


def test_fine_tuned_models_moved_and_answer_a_prompt(
    demo: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = demo
    weights = {}
    for name in ("base", *FINE_TUNES):
        model = AutoModelForCausalLM.from_pretrained(folder / name / "final")
        weights[name] = torch.cat([p.flatten() for p in model.parameters()])
    assert len({tuple(w.tolist()) for w in weights.values()}) == 4
    example = json.loads((folder / "results.json").read_text())["examples"][0]
    generate.main(["--model", str(folder / "inspo" / "final"), "--prompt", example["prompt"], "--max_new_tokens", "8"])
    assert capsys.readouterr().out.strip() == example["inspo"].removesuffix(CUT)


@pytest.mark.sweep
def test_same_seed_gives_same_results(demo: tuple[Path, str]) -> None:
    folder, _ = demo
    first = json.loads((folder / "results.json").read_text())
    (folder / "inspo" / "left over").touch()
    run_demo(Settings.quick(), folder, say=lambda line: None)
    again = json.loads((folder / "results.json").read_text())
    assert not (folder / "inspo" / "left over").exists()
    assert first.pop("seconds").keys() == again.pop("seconds").keys()
    assert first == again


def test_a_folder_with_other_files_is_not_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="choose another"):
        run_demo(Settings.quick(), tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["--quick", "--output_dir", str(tmp_path)])
    assert stop.value.code == 2 and str(tmp_path) in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.txt"]


def test_bad_settings_fail_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="seed=-1"):
        run_demo(Settings.quick(seed=-1), tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_folder_below_a_file_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        main(["--quick", "--output_dir", str(tmp_path / "file" / "demo")])
    assert "cannot be written to (not a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (OSError(28, "No space left on device"), 1, "error: [Errno 28] No space left on device"),
        (SaveError("base/final could not be written"), 1, "error: base/final could not be written"),
        (Stopped("stopped by SIGTERM after step 3"), 143, "stopped by SIGTERM after step 3"),
        (KeyboardInterrupt(), 130, "interrupted; the next run of the demo starts from the beginning"),
    ],
)
def test_an_interrupted_demo_says_so(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    status: int,
    said: str,
) -> None:
    def interrupted(*given: object) -> None:
        raise error

    monkeypatch.setattr("training.demo.__main__.run_demo", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["--quick"])
    assert stop.value.code == status and capsys.readouterr().err == said + "\n"

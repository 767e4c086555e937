"""The demo's work: fit a base model, sample and judge its answers, fine-tune on the pairs, evaluate on unseen prompts.

The fine-tuning is the main job: ``training.train`` on a folder with the base and a JSONL of pairs, which stay on disk.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import inspo_kernels as ik

from ..chat import TextEncoder
from ..config import TrainConfig
from ..data import load_pairs
from ..data_options import DataOptions
from ..errors import InputError
from ..evaluation import conditioning_gap, mean_interval, proportion_interval
from ..generate import answer_text
from ..reflect import best_of_two, reflect_batch
from ..scoring import Batcher, PairModel, score
from ..train import train
from .report import NAMES, draw_picture
from .world import Prompt, World

PICTURE, RESULTS, PAIRS, UNSEEN_PAIRS = "picture.png", "results.json", "pairs.jsonl", "unseen_pairs.jsonl"
MARKER = "demo.json"  # says that a folder is the demo's own, and may be written anew
MAX_NEW_TOKENS = 8
REFLECTED = 4  # drafts to each prompt, of which reflected answers and best-of-two are compared
CUT = "…"  # ends an answer that the model did not end

# SFT is ORPO without its odds ratio: the mean log-prob of the chosen answer, given the prompt alone.
FINE_TUNES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "orpo", "lam": 0.0, "conditioned": False},
    "dpo": {"objective": "dpo", "conditioned": False},
    "inspo": {"objective": "dpo", "conditioned": True},
}


@dataclass(frozen=True)
class Settings:
    """Sizes and rates of a demo.

    ``beta``, ``learning_rate`` and ``steps`` were chosen once, by the accuracy of DPO and InSPO together, and serve all
    fine-tunes. Tried were beta 0.1, 0.3, 0.5, 1 and 2, learning rates 5e-5 to 5e-4, and 60 and 150 steps (not every
    combination, each on one or two of the seeds 100-103). Small beta and many steps lose accuracy again with either:
    mass leaves the rejected answers for others that are wrong, too.
    """

    seed: int = 0
    letters: int = 12
    lengths: tuple[int, ...] = (3, 4)
    unseen_per_kind: int = 100
    hidden_size: int = 96
    layers: int = 2
    fit_steps: int = 450
    fit_rows: int = 128
    fit_learning_rate: float = 3e-3
    draft_share: float = 0.5
    pairs: int = 960
    samples: int = 8
    steps: int = 60
    step_pairs: int = 64
    learning_rate: float = 1e-4
    beta: float = 1.0
    # Fixed, because the number of threads changes the order of sums and so the last bits of every result. One, because
    # two gain little on matrices this small, and lose much where another process wants a core.
    threads: int = 1

    @classmethod
    def quick(cls, seed: int = 0) -> Settings:
        """The whole path in seconds, with a model too small to learn much."""
        return cls(
            seed=seed, letters=4, lengths=(3,), unseen_per_kind=12, hidden_size=64, layers=1, fit_steps=150,
            fit_rows=64, pairs=48, samples=32, steps=6, step_pairs=8,
        )  # fmt: skip


def run_demo(settings: Settings, output_dir: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Runs the demo and returns its results (JSON types), which ``output_dir`` keeps with models, pairs and a picture.

    The same settings give the same results on the same machine, ``seconds`` aside. An earlier demo in ``output_dir`` is
    replaced; raises InputError for any other folder with something in it.
    """
    started = time.perf_counter()
    for name in FINE_TUNES:
        fine_tune_config(name, settings, output_dir)  # bad settings fail here, not after the base is fitted
    _prepare(output_dir, settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        results = _run(settings, output_dir, say)
    finally:
        torch.set_num_threads(threads)
    results["seconds"]["total"] = time.perf_counter() - started
    (output_dir / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    return results


def _prepare(folder: Path, settings: Settings) -> None:
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise InputError(f"--output_dir {folder}: holds something that is not the demo's; choose another folder")
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps(asdict(settings), indent=1) + "\n")


def _run(settings: Settings, folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    seconds: dict[str, float] = {}
    clock = time.perf_counter()

    def done(stage: str, text: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage] = now - clock
        clock = now
        say(f"{text} ({seconds[stage]:.0f} s)")

    world = World(settings.letters, settings.lengths, settings.unseen_per_kind, settings.seed)
    tokenizer = world.tokenizer()
    base = fit_base(world, tokenizer, settings)
    base.save_pretrained(folder / "base" / "final")
    tokenizer.save_pretrained(folder / "base" / "final")
    size = sum(p.numel() for p in base.parameters())
    done("fit", f"1. fitted a model of {size / 1e6:.2f}M parameters to imperfect demonstrations")

    training = [prompt for prompts in world.training.values() for prompt in prompts]
    random.Random(f"pairs {settings.seed}").shuffle(training)
    pairs = sample_pairs(base, tokenizer, world, training, settings.pairs, settings)
    unseen_pairs = sample_pairs(base, tokenizer, world, world.unseen, len(world.unseen), settings)
    for name, records in ((PAIRS, pairs), (UNSEEN_PAIRS, unseen_pairs)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    gap = measure_gap(base, tokenizer, folder / PAIRS)
    done("pairs", f"2. sampled its answers, judged them: {len(pairs)} pairs, and {len(unseen_pairs)} of unseen prompts")

    models: dict[str, PreTrainedModel] = {"base": base}
    metrics: dict[str, list[dict[str, Any]]] = {}
    for name in FINE_TUNES:
        result = train(fine_tune_config(name, settings, folder), quiet=True)
        models[name], metrics[name] = result.model, result.metrics
        done(name, f"3. fine-tuned: {NAMES[name]}, {settings.steps} steps of {settings.step_pairs} pairs")

    answers = {name: answer_unseen(model, tokenizer, world.unseen, settings) for name, model in models.items()}
    ways = reflect_unseen(models["inspo"], tokenizer, world.unseen, count=REFLECTED, seed=settings.seed)
    results = {
        "settings": asdict(settings) | {"lengths": list(settings.lengths)},
        "parameters": size,
        "pairs": len(pairs),
        "unseen_pairs": len(unseen_pairs),
        "conditioning_gap": gap,
        "models": {
            name: {
                how: compare(world, texts[how], answers["base"][how] if name != "base" else None)
                for how in ("greedy", "sampled")
            }
            for name, texts in answers.items()
        },
        "examples": [
            {"prompt": str(prompt), "right": world.right_answer(prompt)}
            | {name: texts["greedy"][i][0] for name, texts in answers.items()}
            for i, prompt in enumerate(world.unseen)
            if i % (settings.unseen_per_kind // 2) == 0
        ],
        "reflection": {way: compare(world, texts, None if way == "draft" else ways["draft"])
                       for way, texts in ways.items()},
        "seconds": seconds,
    }  # fmt: skip
    draw_picture(results, metrics["inspo"], folder / PICTURE)
    done("evaluation", f"4. answered {len(world.unseen)} unseen prompts with each model")
    return results


def fit_base(world: World, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> LlamaForCausalLM:
    """A Llama fitted to demonstrations: prompt + answer and, for ``draft_share`` of the rows, prompt + draft + answer.

    Draft and answer are demonstrations of their own, both learned. Without such rows, a response that follows another
    one would be unlike anything the model has seen, and what InSPO teaches there would not reach the prompt alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer), hidden_size=settings.hidden_size, num_hidden_layers=settings.layers,
                intermediate_size=settings.hidden_size * 8 // 3, num_attention_heads=4, max_position_embeddings=64,
                bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
    rng = random.Random(f"demonstrations {settings.seed}")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    peak, steps = settings.fit_learning_rate, settings.fit_steps
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, steps, pct_start=0.1)
    for _ in tqdm(range(steps), desc="fitting", disable=None, leave=False):
        texts = []
        for _ in range(settings.fit_rows):
            prompt = world.draw(rng)
            answers = [world.demonstrate(prompt, rng) for _ in range(1 + (rng.random() < settings.draft_share))]
            texts.append(str(prompt) + "".join(answer + tokenizer.eos_token for answer in answers))
        ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")["input_ids"]
        # Right padding and causal attention: no mask is needed. Answers begin after the prompt's "=".
        prompt_end = (ids == tokenizer.convert_tokens_to_ids("=")).int().argmax(1, keepdim=True)
        unscored = (torch.arange(ids.shape[1]) <= prompt_end) | (ids == tokenizer.pad_token_id)
        model(input_ids=ids, labels=ids.masked_fill(unscored, -100)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, count: int, greedy: bool,
    seed: int,
) -> list[list[str]]:  # fmt: skip
    """``count`` answers to each prompt, from the prompt alone, at temperature 1 or ``greedy``.

    An answer that does not end within 8 tokens has "…" at its end.
    """
    answers: list[list[str]] = [[] for _ in prompts]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for length in sorted({len(prompt.word) for prompt in prompts}):  # equal lengths together: nothing to pad
            rows = [i for i, prompt in enumerate(prompts) if len(prompt.word) == length for _ in range(count)]
            ids = tokenizer([str(prompts[i]) for i in rows], return_tensors="pt")["input_ids"].to(model.device)
            out = cast(Callable[..., torch.Tensor], model.generate)(
                ids, attention_mask=torch.ones_like(ids), do_sample=not greedy, max_new_tokens=MAX_NEW_TOKENS
            )
            for i, text in zip(rows, tokenizer.batch_decode(out[:, ids.shape[1] :])):
                answer, end, _ = text.partition(tokenizer.eos_token)
                answers[i].append(answer if end else answer + CUT)
    return answers


def sample_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, world: World, prompts: Sequence[Prompt], most: int,
    settings: Settings,
) -> list[dict[str, str]]:  # fmt: skip
    """Up to ``most`` pairs, one for each prompt that ``model`` answers both right and wrong in ``samples`` tries.

    Chosen is the right answer, rejected the first wrong one that is a word (at least one letter, nothing but letters,
    ended by the model), so each kind of error is as frequent as the model makes it.
    """
    pairs: list[dict[str, str]] = []
    for start in range(0, len(prompts), 256):
        part = prompts[start : start + 256]
        seed = settings.seed + start + 1
        sampled = sample_answers(model, tokenizer, part, count=settings.samples, greedy=False, seed=seed)
        for prompt, answers in zip(part, sampled):
            right = [answer for answer in answers if world.is_right(prompt, answer)]
            wrong = [answer for answer in answers if answer.isalpha() and not world.is_right(prompt, answer)]
            if right and wrong and len(pairs) < most:
                pairs.append({"prompt": str(prompt), "chosen": right[0], "rejected": wrong[0]})
        if len(pairs) == most:
            break
    return pairs


def measure_gap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> dict[str, float]:
    """``conditioning_gap`` over the pairs in ``file``."""
    pairs = load_pairs(str(file), tokenizer, DataOptions(), lambda line: None)
    batcher = Batcher(tokenizer.pad_token_id, model.device, TrainConfig.max_batch_tokens)
    scores = score(PairModel(model, ik.DPO()), pairs, batcher, conditioned=True)
    chosen, rejected = conditioning_gap(scores)
    return {"chosen": chosen, "rejected": rejected}


def fine_tune_config(name: str, settings: Settings, folder: Path) -> TrainConfig:
    """One arm of ``FINE_TUNES``; all have the same base, pairs, order of the pairs, steps and learning rate."""
    options = FINE_TUNES[name]
    return TrainConfig(
        model=str(folder / "base" / "final"), train_data=str(folder / PAIRS), eval_data=str(folder / UNSEEN_PAIRS),
        output_dir=str(folder / name), reference_cache=str(folder), max_length=64,
        beta=settings.beta if options["objective"] == "dpo" else None, **options,
        max_steps=settings.steps, per_device_train_batch_size=settings.step_pairs, seed=settings.seed,
        learning_rate=settings.learning_rate, lr_scheduler_type="linear", logging_steps=max(1, settings.steps // 10),
        eval_steps=max(1, settings.steps // 10), save_strategy="no", keep_best=False, sample_prompts=0,
    )  # fmt: skip


def answer_unseen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], settings: Settings
) -> dict[str, list[list[str]]]:
    """The answers that are judged. All models draw from the same random numbers, so that differences are paired."""
    return {
        "greedy": sample_answers(model, tokenizer, prompts, count=1, greedy=True, seed=settings.seed),
        "sampled": sample_answers(model, tokenizer, prompts, count=settings.samples, greedy=False, seed=settings.seed),
    }


def reflect_unseen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, count: int, seed: int
) -> dict[str, list[list[str]]]:
    """``count`` sampled drafts to each prompt, the answers given them, and the likelier of two drafts each."""
    encoder, rows = TextEncoder(tokenizer), [(i, n) for i in range(len(prompts)) for n in range(count)]
    settings: dict[str, Any] = {
        "max_new_tokens": MAX_NEW_TOKENS, "temperatures": [1.0] * len(rows), "chat": False,
        "seeds": [[seed, i, n] for i, n in rows],
    }  # fmt: skip
    ids = [encoder.prompt(str(prompts[i])) for i, _ in rows]
    with torch.no_grad():
        found = reflect_batch(model, encoder, ids, **settings)
        best = best_of_two(model, encoder, ids, **settings)
    answers: dict[str, list[list[str]]] = {}
    ways = {"draft": [one.draft for one in found], "reflected": [one.answer for one in found], "best_of_two": best}
    for way, given in ways.items():
        texts = [answer_text(one, tokenizer) for one in given]
        whole = [text if one[-1] == tokenizer.eos_token_id else text + CUT for text, one in zip(texts, given)]
        answers[way] = [whole[at : at + count] for at in range(0, len(whole), count)]
    return answers


def compare(world: World, answers: list[list[str]], base: list[list[str]] | None) -> dict[str, Any]:
    """Accuracy on the unseen prompts, its 95% interval, mean length in tokens, and the paired gain over ``base``.

    A prompt is one observation in all intervals, however many answers it has.
    """

    def judge(all_answers: list[list[str]]) -> Tensor:
        judged = [[world.is_right(p, a) for a in texts] for p, texts in zip(world.unseen, all_answers)]
        return torch.tensor(judged, dtype=torch.float64)

    right = judge(answers)
    groups = torch.arange(len(right))
    # Tokens, not characters: a model may answer with tokens that are spelled with many letters, such as <unk>.
    flat = [answer.removesuffix(CUT) for texts in answers for answer in texts]
    lengths = [len(ids) for ids in world.tokenizer()(flat, add_special_tokens=False)["input_ids"]]
    result: dict[str, Any] = {
        "accuracy": right.mean().item(),
        "accuracy_ci": proportion_interval(right.flatten(), groups.repeat_interleave(right.shape[1])),
        "mean_length": sum(lengths) / len(lengths),
    }
    if base is not None:
        gains = (right - judge(base)).mean(1)
        result |= {"gain": gains.mean().item(), "gain_ci": mean_interval(gains, groups)}
    return result

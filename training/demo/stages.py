"""Run the demo: fit a base model, sample and judge its answers, fine-tune on the pairs, evaluate on unseen prompts.

The fine-tuning is the main job: ``training.train`` on a folder with the base and a JSONL of pairs, which stay on disk.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

import inspo_kernels as ik

from ..batching import Batcher
from ..config import TrainConfig
from ..data import load_pairs
from ..data_options import DataOptions
from ..errors import InputError
from ..evaluation import conditioning_gap
from ..output import check_folder
from ..scoring import PairModel, score
from ..train import train
from .answers import REFLECTED, answer_unseen, compare, reflect_unseen, sample_answers, sample_pairs
from .report import NAMES, draw_picture
from .settings import FEW_PAIRS, FINE_TUNES, PAIRS, UNSEEN_PAIRS, Settings, fine_tune_config, long_config
from .world import World

PICTURE, RESULTS = "picture.png", "results.json"
LONG = ("dpo", "inspo")  # the arms that also pass many times over few pairs
MARKER = "demo.json"  # says that a folder is the demo's own, and may be written anew


def run_demo(settings: Settings, output_dir: Path, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the demo and return its results (JSON types), which ``output_dir`` keeps with models, pairs and a picture.

    The same settings give the same results on the same machine, ``seconds`` aside. An earlier demo in ``output_dir`` is
    replaced; raises InputError for any other folder with something in it.
    """
    # Bad settings fail here, not after the base is fitted.
    configs = {name: fine_tune_config(name, settings, output_dir) for name in FINE_TUNES}
    long_configs = {name: long_config(name, settings, output_dir) for name in LONG}
    _prepare(output_dir, settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        results = _run(settings, configs, long_configs, output_dir, Clock(say))
    finally:
        torch.set_num_threads(threads)
    results["seconds"]["total"] = sum(results["seconds"].values())
    (output_dir / RESULTS).write_text(json.dumps(results, indent=1) + "\n")
    return results


def _prepare(folder: Path, settings: Settings) -> None:
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not (folder / MARKER).exists())):
        raise InputError(f"--output_dir {folder}: holds something that is not the demo's; choose another folder")
    check_folder(folder)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    (folder / MARKER).write_text(json.dumps(asdict(settings), indent=1) + "\n")


class Clock:
    """Measure the seconds of each stage, and say what it did."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.seconds, self.start = say, dict[str, float](), time.perf_counter()

    def done(self, stage: str, text: str) -> None:
        now = time.perf_counter()
        self.seconds[stage], self.start = now - self.start, now
        self.say(f"{text} ({self.seconds[stage]:.0f} s)")


def _run(
    settings: Settings,
    configs: dict[str, TrainConfig],
    long_configs: dict[str, TrainConfig],
    folder: Path,
    clock: Clock,
) -> dict[str, Any]:
    world = World(settings.letters, settings.lengths, settings.unseen_per_kind, settings.seed)
    tokenizer = world.tokenizer()
    base = fit_base(world, tokenizer, settings)
    for part in (base, tokenizer):
        part.save_pretrained(folder / "base" / "final")
    size = sum(p.numel() for p in base.parameters())
    clock.done("fit", f"1. fitted a model of {size / 1e6:.2f}M parameters to imperfect demonstrations")

    training = [prompt for prompts in world.training.values() for prompt in prompts]
    random.Random(f"pairs {settings.seed}").shuffle(training)
    pairs = sample_pairs(base, tokenizer, world, training, settings.pairs, settings)
    unseen_pairs = sample_pairs(base, tokenizer, world, world.unseen, len(world.unseen), settings)
    for name, records in ((PAIRS, pairs), (UNSEEN_PAIRS, unseen_pairs), (FEW_PAIRS, pairs[: settings.long_pairs])):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    results: dict[str, Any] = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "parameters": size,
        "pairs": len(pairs),
        "unseen_pairs": len(unseen_pairs),
        "conditioning_gap": measure_gap(base, tokenizer, folder / PAIRS),
        "seconds": clock.seconds,
    }
    said = f"{len(pairs)} pairs, and {len(unseen_pairs)} of unseen prompts"
    clock.done("pairs", f"2. sampled its answers, judged them: {said}")

    models: dict[str, PreTrainedModel] = {"base": base}
    for name, config in configs.items():
        result = train(config, quiet=True)
        models[name], metrics = result.model, result.metrics  # those of the last one, InSPO, are drawn
        clock.done(name, f"3. fine-tuned: {NAMES[name]}, {settings.steps} steps of {settings.step_pairs} pairs")
    results["over_trained"] = {}
    for name, config in long_configs.items():
        callback = GreedyAccuracy(world, tokenizer, settings)
        train(config, quiet=True, callbacks=[callback])
        results["over_trained"][name] = callback.found
    passes = settings.long_steps[-1] * settings.long_step_pairs / settings.long_pairs
    text = f"4. trained DPO and InSPO too long: {passes:g} passes over {settings.long_pairs} pairs"
    clock.done("over_training", text)

    results |= evaluated(world, tokenizer, models, settings)
    draw_picture(results, metrics, folder / PICTURE)
    clock.done("evaluation", f"5. answered {len(world.unseen)} unseen prompts with each model")
    return results


def evaluated(
    world: World, tokenizer: PreTrainedTokenizerBase, models: dict[str, PreTrainedModel], settings: Settings
) -> dict[str, Any]:
    """Let every model answer the unseen prompts, and compare the answers with the base's."""
    answers = {name: answer_unseen(model, tokenizer, world.unseen, settings) for name, model in models.items()}
    ways = reflect_unseen(models["inspo"], tokenizer, world.unseen, count=REFLECTED, seed=settings.seed)
    return {
        "models": {
            name: {how: compare(world, texts[how], answers["base"][how] if name != "base" else None) for how in texts}
            for name, texts in answers.items()
        },
        "examples": [
            {"prompt": str(prompt), "right": world.right_answer(prompt)}
            | {name: texts["greedy"][i][0] for name, texts in answers.items()}
            for i, prompt in enumerate(world.unseen)
            if i % (settings.unseen_per_kind // 2) == 0
        ],
        "reflection": {
            way: compare(world, texts, None if way == "draft" else ways["draft"]) for way, texts in ways.items()
        },
    }


def fit_base(world: World, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> LlamaForCausalLM:
    """A Llama fitted to demonstrations: prompt + answer and, for ``draft_share`` of the rows, prompt + draft + answer.

    Draft and answer are demonstrations of their own, both learned. Without such rows, a response that follows another
    one would be unlike anything the model has seen, and what InSPO teaches there would not reach the prompt alone.
    """
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=settings.hidden_size,
                num_hidden_layers=settings.layers,
                intermediate_size=settings.hidden_size * 8 // 3,
                num_attention_heads=4,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
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


class GreedyAccuracy(TrainerCallback):
    """Answers the unseen prompts after each of ``long_steps``; ``found`` holds step, accuracy and its 95% interval."""

    def __init__(self, world: World, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> None:
        self.world, self.tokenizer, self.settings = world, tokenizer, settings
        self.found: list[dict[str, Any]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step not in self.settings.long_steps:
            return
        model, unseen = kwargs["model"].model, self.world.unseen
        answers = sample_answers(model, self.tokenizer, unseen, count=1, greedy=True, seed=self.settings.seed)
        judged = compare(self.world, answers, None)
        entry = {name: judged[name] for name in ("accuracy", "accuracy_ci")}
        self.found.append({"step": state.global_step, **entry})


def measure_gap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, file: Path) -> dict[str, float]:
    """``conditioning_gap`` over the pairs in ``file``."""
    pairs = load_pairs(str(file), tokenizer, DataOptions(), lambda line: None)
    batcher = Batcher(tokenizer.pad_token_id, model.device, TrainConfig.max_batch_tokens)
    scores = score(PairModel(model, ik.DPO()), pairs, batcher, conditioned=True)
    chosen, rejected = conditioning_gap(scores)
    return {"chosen": chosen, "rejected": rejected}

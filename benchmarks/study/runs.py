"""Do one run of the study: fit the base and judge its answers (shared by a seed's arms), train, evaluate."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import string
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import inspo_kernels as ik

from .. import fitting
from . import model as models
from . import world
from .arms import Arm
from .world import END, IDS, PAD, Judge, Prompt, Prompts, decode, draw_prompts, encode, quality

TIE = 1e-4  # smaller margins are rounding: with a reference, all margins are 0 before training
DIGITS = string.digits + string.ascii_lowercase
# A cached base depends on this in addition to its settings.
_CODE = hashlib.sha256(
    b"".join(Path(str(file)).read_bytes() for file in (world.__file__, models.__file__, fitting.__file__, __file__))
).hexdigest()


@dataclass(frozen=True)
class Size:
    """All sizes of the study. Prompt counts are rounded to a multiple of the number of prompt kinds."""

    hidden_size: int = 96
    layers: int = 2
    word_lengths: tuple[int, ...] = (3, 4)
    fit_prompts: int = 3200
    fit_steps: int = 600
    fit_rows: int = 64
    fit_learning_rate: float = 3e-3
    draft_share: float = 0.5
    pairs: int = 1280
    updates: int = 80
    update_pairs: int = 32
    validation_prompts: int = 160
    test_prompts: int = 240
    held_out_pairs: int = 160
    samples: int = 4


@dataclass(frozen=True)
class Candidates:
    """A prompt with two of the base's answers, the base's log pi(answer | prompt), and the draws for its label."""

    prompt: Prompt
    answers: tuple[str, str]
    log_probs: tuple[float, float]
    dice: tuple[float, float, float, int]  # verdict, flipped, whether another alternative, which alternative


@dataclass(frozen=True)
class Start:
    """Everything that all arms of a seed share."""

    prompts: Prompts
    base: dict[str, Tensor]
    fit_loss: float
    training: list[Candidates]
    held_out: list[Candidates]  # of the test prompts
    answers: dict[str, list[list[str]]]  # the base's answers to validation and test prompts


@dataclass(frozen=True)
class Example:
    """Token ids of a labelled pair. Its chosen and rejected responses are conditioned on ``alternatives``.

    ``reference``: the base's log-probs of the chosen and the rejected response, given the prompt alone.
    """

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float]
    alternatives: tuple[list[int], list[int]]


def start(size: Size, seed: int, *, drafts: bool, cache: Path, device: str = "cpu") -> Start:
    """Return the fitted base of ``seed`` and its answers, from ``cache`` if it has them."""
    settings = json.dumps([_CODE, dataclasses.asdict(size), seed, drafts, device, torch.__version__])
    file = cache / f"base-{seed}{'' if drafts else '-no-drafts'}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.pt"
    if file.exists():
        return torch.load(file, weights_only=False)
    prompts = draw_prompts(
        size.word_lengths,
        training=max(size.fit_prompts, size.pairs),
        validation=size.validation_prompts,
        test=size.test_prompts,
        seed=seed,
    )
    base = models.build(size.hidden_size, size.layers, seed, device)
    loss = models.fit(
        base,
        prompts.training,
        steps=size.fit_steps,
        rows=size.fit_rows,
        learning_rate=size.fit_learning_rate,
        draft_share=size.draft_share if drafts else 0.0,
        seed=seed,
    )
    made = Start(
        prompts,
        {name: value.cpu() for name, value in base.state_dict().items()},
        loss,
        candidates(base, prompts.training, size.pairs, seed),
        candidates(base, prompts.test, size.held_out_pairs, seed + 1),
        {
            part: models.sample(base, getattr(prompts, part), count=size.samples, seed=_sampling_seed(seed, part))
            for part in ("validation", "test")
        },
    )
    cache.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    torch.save(made, partial)
    partial.replace(file)
    return made


def _sampling_seed(seed: int, part: str) -> int:
    return 2 * seed + (part == "test")


def candidates(base: PreTrainedModel, prompts: Sequence[Prompt], most: int, seed: int) -> list[Candidates]:
    """Sample four answers of ``base`` per prompt. Return those with the judge's highest and lowest score, shuffled.

    Answers without end are not candidates. Prompts whose answers all have the same score are skipped.
    """
    rng, judge = random.Random(f"dice {seed}"), Judge()
    found: list[Candidates] = []
    for prompt, answers in zip(prompts, models.sample(base, prompts, count=4, seed=10_000 + seed)):
        ended = sorted((a for a in answers if a.endswith(END)), key=lambda answer: judge.score(prompt, answer))
        swap, dice = rng.random() < 0.5, (rng.random(), rng.random(), rng.random(), rng.randrange(2**31))
        if ended and judge.score(prompt, ended[0]) < judge.score(prompt, ended[-1]) and len(found) < most:
            first, second = (ended[0], ended[-1]) if swap else (ended[-1], ended[0])
            found.append(Candidates(prompt, (first, second), (0.0, 0.0), dice))
    scored = log_probs_of([(encode(str(c.prompt)), encode(c.answers[0]), encode(c.answers[1])) for c in found], base)
    return [dataclasses.replace(c, log_probs=(a, b)) for c, a, b in zip(found, *scored.tolist())]


def log_probs_of(pairs: Sequence[tuple[list[int], list[int], list[int]]], model: PreTrainedModel) -> Tensor:
    """Return (2, pairs) float64: log pi(first | prompt), log pi(second | prompt)."""
    parts = []
    for at in range(0, len(pairs), 256):
        batch = ik.condition_pairs(pairs[at : at + 256], pad_token_id=IDS[PAD], conditioned=False)
        parts.append(models.log_probs(model, batch))
    return torch.cat(parts, 1)


def label(pairs: Sequence[Candidates], judge: Judge, own_alternative: float = 1.0) -> list[Example]:
    """Label the pairs with the judge, and choose the alternatives on which their responses are conditioned.

    With probability 1 - ``own_alternative`` these are the responses of another pair of the same prompt kind, in the
    same roles: chosen follows that pair's rejected response, rejected follows its chosen response.
    """
    ordered = []
    kinds: dict[tuple[str, int], list[int]] = {}
    for i, pair in enumerate(pairs):
        first = judge.label(judge.prefers(pair.prompt, *pair.answers), *pair.dice[:2])
        ordered.append((pair.answers, pair.log_probs) if first else (pair.answers[::-1], pair.log_probs[::-1]))
        kinds.setdefault(pair.prompt.kind, []).append(i)
    examples = []
    for i, pair in enumerate(pairs):
        kin = kinds[pair.prompt.kind]
        other = i
        if pair.dice[2] >= own_alternative and len(kin) > 1:
            other = kin[(kin.index(i) + 1 + pair.dice[3] % (len(kin) - 1)) % len(kin)]
        chosen, rejected = (encode(answer) for answer in ordered[i][0])
        ahead, behind = (encode(answer) for answer in ordered[other][0])
        examples.append(Example(encode(str(pair.prompt)), chosen, rejected, ordered[i][1], (behind, ahead)))
    return examples


def make_batch(examples: Sequence[Example], *, conditioned: bool, separator: str = "") -> dict[str, Any]:
    """Return the ``condition_pairs`` batch of ``examples``. Alternatives from other pairs have no marginals."""
    options: dict[str, Any] = {"pad_token_id": IDS[PAD], "separator_ids": encode(separator)}
    own = [(e.prompt, e.chosen, e.rejected) for e in examples]
    if not conditioned or all(e.alternatives == (e.rejected, e.chosen) for e in examples):
        return ik.condition_pairs(own, conditioned=conditioned, **options)
    # Each response with its own alternative forms a pair, and half of each such pair is not used.
    n = len(examples)
    behind = [(e.prompt, e.chosen, e.alternatives[0]) for e in examples]
    ahead = [(e.prompt, e.alternatives[1], e.rejected) for e in examples]
    batch = ik.condition_pairs(behind + ahead, **options)
    keep = torch.cat([torch.arange(n), torch.arange(3 * n, 4 * n)])
    kept = {name: batch[name][keep] for name in ("input_ids", "attention_mask", "position_ids", "labels")}
    return batch | kept | {"marginal_labels": None}


def drop_alternatives(batch: dict[str, Any], plain: dict[str, Any], dropped: Tensor) -> dict[str, Any]:
    """Return the conditioned ``batch`` with both rows of each ``dropped`` (pairs,) pair replaced from ``plain``."""
    rows = dropped.repeat(2)[:, None]
    fill = {"input_ids": IDS[PAD], "attention_mask": 0, "position_ids": 0, "labels": -100}
    mixed: dict[str, Any] = {"marginal_labels": None}
    for name, value in fill.items():
        missing = batch[name].shape[1] - plain[name].shape[1]
        padded = torch.nn.functional.pad(plain[name], (0, missing), value=value)
        mixed[name] = torch.where(rows, padded, batch[name])
    return batch | mixed


def training_batch(examples: Sequence[Example], arm: Arm, dropped: Sequence[bool]) -> dict[str, Any]:
    """Return ``arm``'s training batch of ``examples``. ``dropped`` pairs are laid out plain."""
    batch = make_batch(examples, conditioned=arm.conditioned, separator=arm.separator)
    if not any(dropped):
        return batch
    return drop_alternatives(batch, make_batch(examples, conditioned=False), torch.tensor(dropped))


def plain_reference(examples: Sequence[Example]) -> Tensor:
    """Return (2, pairs) float64: the base's log-probs of chosen and rejected responses, given the prompt alone."""
    return torch.tensor([e.reference for e in examples], dtype=torch.float64).T


def reference_log_probs(base: PreTrainedModel, examples: Sequence[Example], arm: Arm) -> Tensor:
    """Return (2, pairs) float64: the reference's log-probs of chosen and rejected, conditioned if ``arm`` says so."""
    if not arm.conditioned_reference:
        return plain_reference(examples)
    batch = make_batch(examples, conditioned=True, separator=arm.separator)
    return models.log_probs(base, batch)


def train(
    model: PreTrainedModel,
    examples: Sequence[Example],
    arm: Arm,
    objective: ik.Objective,
    *,
    learning_rate: float,
    updates: int,
    update_pairs: int,
    seed: int,
    watch: Any = None,
    watch_every: int | None = None,
    decay: bool = True,
) -> dict[str, Any]:
    """Train ``model`` in place. ``watch(step)`` runs before every ``watch_every``-th update and after the last update.

    ``watch_every=None`` means every fifth of the updates. The learning rate rises over 8 updates, then falls linearly
    to 0, or stays constant with ``decay=False``. The order of the pairs depends only on ``seed``. Returns counts of
    updates, pairs and tokens. ``finite`` is False if the loss became non-finite, which ended training.
    """
    reference = reference_log_probs(model, examples, arm) if objective.needs_reference else None
    every = max(1, updates // 5) if watch_every is None else watch_every
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1.0, (i + 1) / 8) * (1 - i / updates if decay else 1.0)
    )
    rng = random.Random(f"order {seed}")
    order: list[tuple[int, bool]] = []  # pairs, and whether this pass trains them plain
    tokens, done, passes = 0, 0, 0
    for step in range(updates):
        if watch is not None and step % every == 0:
            watch(step)
        if len(order) < update_pairs:
            again = rng.sample(range(len(examples)), len(examples))
            order += [(i, arm.drops_alternative(seed, passes, i)) for i in again]
            passes += 1
        taken, order = order[:update_pairs], order[update_pairs:]
        places, dropped = [i for i, _ in taken], [drop for _, drop in taken]
        batch = training_batch([examples[i] for i in places], arm, dropped)
        batch = models.on_device(batch, model.device)
        ref_logps = None
        if reference is not None:
            plain = plain_reference([examples[i] for i in places])
            ref_logps = torch.where(torch.tensor(dropped), plain, reference[:, places]).flatten().to(model.device)
        hidden, head = models.hidden_and_head(model, batch)
        out = ik.fused_inspo_loss(
            hidden,
            labels=batch["labels"],
            marginal_labels=batch["marginal_labels"] if arm.uses_marginals else None,
            ref_logps=ref_logps,
            objective=objective,
            marginal_weight=arm.marginal_weight,
            **head,
        )
        if not math.isfinite(out.loss.item()):
            return {"updates": done, "tokens": tokens, "finite": False}
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens, done = tokens + int(batch["attention_mask"].sum()), done + 1
    if watch is not None:
        watch(updates)
    return {"updates": done, "tokens": tokens, "finite": True}


def reward_accuracies(
    model: PreTrainedModel, examples: Sequence[Example], objective: ik.Objective, separator: str
) -> dict[str, float]:
    """Return the share of pairs whose chosen response has the higher reward, conditioned and prompt-only (ties 1/2).

    Also returns the chosen responses' mean log-prob in both layouts, in nats per token. The reference sees the prompt
    alone.
    """
    out = pair_output(model, examples, objective, separator)
    assert out.marginal_logps is not None
    assert out.marginal_chosen_rewards is not None and out.marginal_rejected_rewards is not None
    n = len(examples)
    result = {}
    for layout, margins, log_probs in (
        ("conditioned", out.margins, out.logps),
        ("marginal", out.marginal_chosen_rewards - out.marginal_rejected_rewards, out.marginal_logps),
    ):
        result[f"{layout} accuracy"] = (((margins > TIE).double() + (margins >= -TIE).double()) / 2).mean().item()
        result[f"{layout} chosen"] = (log_probs[:n] / out.lengths[:n]).mean().item()
    return {name: round(value, 4) for name, value in result.items()}


def pair_output(
    model: PreTrainedModel, examples: Sequence[Example], objective: ik.Objective, separator: str = ""
) -> ik.InSPOOutput:
    reference = torch.tensor([e.reference for e in examples], dtype=torch.float64).T
    return models.pair_output(model, make_batch(examples, conditioned=True, separator=separator), objective, reference)


def run(
    arm: Arm,
    size: Size,
    seed: int,
    *,
    learning_rate: float,
    parameter: float | None,
    part: str,
    cache: Path,
    device: str = "cpu",
) -> dict[str, Any]:
    """Train one arm on one seed, and let it answer the prompts of ``part`` ("validation" or "test").

    The result holds the facts of each answer that grading and judging need, so that every number follows from the
    result file. For "test" it also holds the rewards of held-out pairs during training.
    """
    began = time.perf_counter()
    begun = start(size, seed, drafts=arm.drafts, cache=cache, device=device)
    model = load(begun, size, seed, device)
    objective = arm.make_objective(parameter)
    examples = label(begun.training, dataclasses.replace(Judge(), noise=arm.noise), arm.own_alternative)
    held_out = label(begun.held_out, dataclasses.replace(Judge(), noise=0.0))
    curve: list[dict[str, float]] = []

    def watch(step: int) -> None:
        curve.append({"step": step} | reward_accuracies(model, held_out, objective, arm.separator))

    counts = train(
        model,
        examples,
        arm,
        objective,
        learning_rate=learning_rate * arm.learning_rate,
        updates=size.updates * arm.updates,
        update_pairs=size.update_pairs,
        seed=seed,
        watch=watch if part == "test" else None,
    )
    prompts = getattr(begun.prompts, part)
    answers = models.sample(model, prompts, count=size.samples, seed=_sampling_seed(seed, part))
    return {
        "arm": arm.name,
        "seed": seed,
        "part": part,
        "learning_rate": learning_rate,
        "parameter": parameter,
        "pairs": len(examples),
        **counts,
        **graded(prompts, answers),
        "curve": curve,
        "seconds": round(time.perf_counter() - began, 1),
    }


def describe_base(size: Size, seed: int, *, drafts: bool, cache: Path, device: str = "cpu") -> dict[str, Any]:
    """Return the record of a base: its answers to the test prompts, and statistics of its training pairs."""
    began = time.perf_counter()
    begun = start(size, seed, drafts=drafts, cache=cache, device=device)
    examples = label(begun.training, Judge())
    held_out = label(begun.held_out, dataclasses.replace(Judge(), noise=0.0))
    out = pair_output(load(begun, size, seed, device), held_out, ik.DPO())
    assert out.marginal_logps is not None
    gap = ((out.logps - out.marginal_logps) / out.lengths).view(2, -1).mean(1).tolist()
    better = [
        quality(c.prompt, decode(e.chosen)) - quality(c.prompt, decode(e.rejected))
        for c, e in zip(begun.training, examples)
    ]
    return {
        "arm": base_name(drafts),
        "seed": seed,
        "part": "test",
        "learning_rate": None,
        "parameter": None,
        "fit_loss": begun.fit_loss,
        "pairs": len(examples),
        "conditioning_gap": {"chosen": gap[0], "rejected": gap[1]},
        "chosen_better": sum(b > 0 for b in better) / len(better),
        "chosen_worse": sum(b < 0 for b in better) / len(better),
        "chosen_longer": sum(len(e.chosen) - len(e.rejected) for e in examples) / len(examples),
        **graded(begun.prompts.test, begun.answers["test"]),
        "right_lengths": "".join(str(len(world.right_answer(prompt))) for prompt in begun.prompts.test),
        "seconds": round(time.perf_counter() - began, 1),
    }


def base_name(drafts: bool) -> str:
    return "base" if drafts else "base, no drafts"


def load(begun: Start, size: Size, seed: int, device: str) -> PreTrainedModel:
    model = models.build(size.hidden_size, size.layers, seed, device)
    model.load_state_dict(begun.base)
    return model


def graded(prompts: Sequence[Prompt], answers: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Return mean quality and length, the shares of right and of unended answers, and each answer's edits and length.

    ``edits`` and ``lengths`` hold one base-36 digit per answer, prompt by prompt. Quality is 1 - edits / length of the
    right answer.
    """
    flat = [(prompt, answer) for prompt, given in zip(prompts, answers) for answer in given]
    return {
        "quality": sum(quality(p, a) for p, a in flat) / len(flat),
        "right": sum(world.edits(p, a) == 0 for p, a in flat) / len(flat),
        "length": sum(world.length(a) for _, a in flat) / len(flat),
        "unended": sum(not a.endswith(END) for _, a in flat) / len(flat),
        "edits": "".join(DIGITS[world.edits(p, a)] for p, a in flat),
        "lengths": "".join(DIGITS[world.length(a)] for _, a in flat),
    }

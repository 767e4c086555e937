"""Fit a base to the standard library's functions, draw pairs from it, train the arms, and grade their answers.

All seeds share the base. Each seed has its own prompts, base answers, labels, order of pairs and random draws for the
test. Every arm of a seed sees the same pairs in the same order and is graded on the same draws.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM

import inspo_kernels as ik

from .. import fitting
from .code_world import END_ID, PAD_ID, Function, Judge, Library, Vocabulary, damaged, quality

Ids = list[int]


@dataclass(frozen=True)
class Size:
    """All sizes of the study. ``most_tokens`` limits prompts, and bodies and answers including their end."""

    most_files: int | None = None  # library files to read; None reads all
    vocabulary: int = 1024
    hidden_size: int = 160
    layers: int = 3
    most_tokens: int = 64
    fit_steps: int = 1800
    fit_rows: int = 32
    fit_learning_rate: float = 3e-3
    draft_share: float = 0.5
    sampled_drafts: float = 0.4  # share of steps, at the end, in which half of the drafts are the model's own answers
    pairs: int = 64
    update_pairs: int = 8
    epochs: tuple[int, ...] = (1, 3, 10)  # after which answers are graded
    validation_prompts: int = 60
    test_prompts: int = 120
    samples: int = 2
    beta: float = 0.1
    learning_rate: float = 1e-4
    seeds: int = 5


@dataclass(frozen=True)
class Arm:
    """One way to train.

    own: whether the alternative is the other response of the same pair, or a response of another pair.
    reference_conditioned: whether the reference also sees the alternative.
    dropout: the probability that an epoch lays out a pair plain, without the alternative.
    learning_rate: factor of the learning rate in ``Size``.
    """

    title: str
    objective: str = "dpo"
    conditioned: bool = False
    own: bool = True
    reference_conditioned: bool = False
    dropout: float = 0.0
    learning_rate: float = 1.0


ARMS = {
    "plain": Arm("DPO"),
    "inspo": Arm("InSPO-DPO", conditioned=True),
    "dropout": Arm(
        "conditioned reference, 50% alternative dropout", conditioned=True, reference_conditioned=True, dropout=0.5
    ),
    "shuffled": Arm("InSPO-DPO, another pair's alternative", conditioned=True, own=False),
    "sft": Arm("SFT on the chosen answers", "sft", learning_rate=3.0),
}


@dataclass(frozen=True)
class Data:
    """The functions that fit, by split, and their vocabulary. Functions with a docstring are the study's prompts."""

    functions: dict[str, list[Function]]
    vocabulary: Vocabulary

    def prompts(self, part: str) -> list[Function]:
        return [function for function in self.functions[part] if function.documented]


@dataclass(frozen=True)
class Pair:
    """Token ids of a labelled pair, the qualities of its answers, and the alternatives of both responses."""

    prompt: Ids
    chosen: Ids
    rejected: Ids
    qualities: tuple[float, float]
    alternatives: tuple[Ids, Ids] = ([], [])


def fitting_data(library: Library, size: Size) -> Data:
    """Train the vocabulary on the training split and keep the functions that are short enough."""
    vocabulary = Vocabulary(library.parts["training"], size.vocabulary)

    def fits(function: Function) -> bool:
        return max(len(vocabulary.prompt(function)), len(vocabulary.body(function))) <= size.most_tokens

    return Data({part: list(filter(fits, found)) for part, found in library.parts.items()}, vocabulary)


def build(size: Size, seed: int = 0) -> LlamaForCausalLM:
    """Return a Llama with tied embeddings and random parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=size.vocabulary,
                hidden_size=size.hidden_size,
                num_hidden_layers=size.layers,
                intermediate_size=size.hidden_size * 8 // 3,
                num_attention_heads=4,
                tie_word_embeddings=True,
                max_position_embeddings=4 * size.most_tokens,
                bos_token_id=None,
                eos_token_id=END_ID,
                pad_token_id=PAD_ID,
            )
        ).eval()


def fit(model: LlamaForCausalLM, data: Data, size: Size, report: Callable[[int, float], None]) -> float:
    """Fit the base. Return the mean loss of the last steps, in nats per token.

    ``draft_share`` of the rows are prompt + draft + body, of which only the body is learned. A draft is a corrupted
    body, or in the last steps also one of the model's own answers. ``report`` gets steps and seconds.
    """
    rng = random.Random("fit")
    functions, vocabulary = data.functions["training"], data.vocabulary
    own: list[Ids] = []

    def row() -> tuple[Ids, Ids]:
        place = rng.randrange(len(functions))
        prompt, body = vocabulary.prompt(functions[place]), vocabulary.body(functions[place])
        if rng.random() >= size.draft_share:
            return prompt, body
        draft = own[place] if own and rng.random() < 0.5 else damaged(body, len(vocabulary), rng)
        return prompt + draft, body

    def batches() -> Iterator[list[tuple[Ids, Ids]]]:
        began, done = time.perf_counter(), 0
        while done < size.fit_steps:
            if not own and done >= (1 - size.sampled_drafts) * size.fit_steps:
                own.extend(sample(model, [vocabulary.prompt(f) for f in functions], size.most_tokens, 1, seed=0))
            # Rows of similar length share a batch, to save padding.
            rows = sorted((row() for _ in range(8 * size.fit_rows)), key=lambda one: len(one[0]) + len(one[1]))
            for start in rng.sample(range(0, len(rows), size.fit_rows), 8)[: size.fit_steps - done]:
                yield rows[start : start + size.fit_rows]
                done += 1
            report(done, time.perf_counter() - began)

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, size.fit_learning_rate, size.fit_steps, pct_start=0.1)
    return fitting.fit(model, batches(), PAD_ID, schedule)


@torch.no_grad()
def sample(model: LlamaForCausalLM, prompts: Sequence[Ids], most: int, count: int, *, seed: int | None) -> list[Ids]:
    """Return ``count`` answers per prompt, prompt by prompt, sampled at temperature 1. END is the last id.

    The random draw of each token depends only on ``seed``, prompt and position. If ``seed`` is None, decoding is
    greedy. An answer of ``most`` ids may lack its end.
    """
    total = len(prompts) * count
    generator = torch.Generator().manual_seed(seed or 0)
    draws = torch.rand(total, most, generator=generator, dtype=torch.float64)
    answers: list[Ids] = [[] for _ in range(total)]
    order = sorted(range(total), key=lambda i: len(prompts[i // count]))
    for at in range(0, total, 512):
        places = order[at : at + 512]
        rows = [torch.tensor(prompts[i // count]) for i in places]
        tokens = pad_sequence(rows, batch_first=True, padding_value=PAD_ID, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        cache = None
        for step in range(most):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            out = model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache, logits = out.past_key_values, out.logits[:, -1]
            if seed is None:
                chosen = logits.argmax(-1)
            else:
                cumulative = logits.double().softmax(-1).cumsum(-1)
                chosen = (cumulative < draws[places, step, None]).sum(-1).clamp(max=logits.shape[-1] - 1)
            for place, token in zip(places, chosen.tolist()):
                answers[place].append(token)
            going = (chosen != END_ID).nonzero().flatten()
            if not len(going):
                break
            if len(going) < len(places):
                places = [places[i] for i in going.tolist()]
                cache.batch_select_indices(going)
            mask = torch.cat([mask[going], torch.ones_like(mask[going][:, :1])], 1)
            tokens = chosen[going, None]
    return answers


@dataclass(frozen=True)
class Graded:
    """Qualities and lengths of answers, with all answers to one prompt before those to the next."""

    quality: list[float]
    length: list[int]

    def record(self) -> dict[str, list[int]]:
        """Return the values for a result file: qualities in thousandths, lengths in tokens."""
        return {"quality": [round(1000 * q) for q in self.quality], "length": self.length}


def graded(functions: Sequence[Function], answers: Sequence[Ids], vocabulary: Vocabulary) -> Graded:
    count = len(answers) // len(functions)
    grades = [quality(functions[i // count], vocabulary.text(answer)) for i, answer in enumerate(answers)]
    return Graded(grades, [len(answer) - (answer[-1] == END_ID) for answer in answers])


def evaluate(model: LlamaForCausalLM, data: Data, size: Size, seed: int) -> dict[str, Any]:
    """Grade answers from the prompt alone: sampled for validation and test prompts, greedy for test prompts."""
    result = {}
    for name, part, count in (
        ("validation", "validation", size.samples),
        ("test", "test", size.samples),
        ("greedy", "test", 1),
    ):
        functions = drawn_prompts(data, size, part, seed)
        draws = None if name == "greedy" else 2 * seed + (part == "test")
        prompts = [data.vocabulary.prompt(function) for function in functions]
        answers = sample(model, prompts, size.most_tokens, count, seed=draws)
        result[name] = graded(functions, answers, data.vocabulary).record()
    return result


def drawn_prompts(data: Data, size: Size, part: str, seed: int) -> list[Function]:
    """Draw the prompts of a seed. "training" has all training prompts, in random order."""
    found = data.prompts(part)
    count = {"validation": size.validation_prompts, "test": size.test_prompts}.get(part, len(found))
    return random.Random(f"{part} {seed}").sample(found, min(count, len(found)))


def draw_pairs(model: LlamaForCausalLM, data: Data, size: Size, seed: int, judge: Judge) -> list[Pair]:
    """Sample four answers per training prompt. Those with the judge's highest and lowest score form the labelled pair.

    Answers without end are not candidates. Prompts whose answers all have the same score are skipped.
    """
    rng = random.Random(f"pairs {seed}")
    functions, vocabulary = drawn_prompts(data, size, "training", seed), data.vocabulary
    found: list[Pair] = []
    at, step = 0, size.pairs + size.pairs // 8
    while len(found) < size.pairs and at < len(functions):
        some = functions[at : at + step]
        prompts = [vocabulary.prompt(function) for function in some]
        answers = sample(model, prompts, size.most_tokens, 4, seed=10_000 + 100 * seed + at // step)
        grades = graded(some, answers, vocabulary)
        for i, function in enumerate(some):
            scored = sorted(
                (judge.score(grades.quality[j], grades.length[j]), answers[j], grades.quality[j])
                for j in range(4 * i, 4 * i + 4)
                if answers[j][-1] == END_ID
            )
            verdict, turned = rng.random(), rng.random()
            if scored and scored[0][0] < scored[-1][0] and len(found) < size.pairs:
                low, high = scored[0], scored[-1]
                agrees = (verdict < judge.prefers(high[0], low[0])) != (turned < judge.noise)
                first, second = (high, low) if agrees else (low, high)
                pair = Pair(vocabulary.prompt(function), first[1], second[1], (first[2], second[2]))
                found.append(pair)
        at += step
    if len(found) < size.pairs:
        raise ValueError(f"seed {seed}: only {len(found)} of {size.pairs} pairs found in all {len(functions)} prompts")
    return found


def with_alternatives(pairs: Sequence[Pair], *, own: bool, seed: int) -> list[Pair]:
    """Set the alternative of each response: the pair's other response, or that of the next pair in a random cycle."""
    circle = random.Random(f"circle {seed}").sample(range(len(pairs)), len(pairs))
    following = {place: circle[(i + 1) % len(circle)] for i, place in enumerate(circle)}
    result = []
    for i, pair in enumerate(pairs):
        other = pair if own else pairs[following[i]]
        result.append(dataclasses.replace(pair, alternatives=(other.rejected, other.chosen)))
    return result


def batch_of(pairs: Sequence[Pair], conditioned: Sequence[bool]) -> dict[str, Tensor]:
    """Lay out pairs as ``condition_pairs`` does, but with each pair either conditioned or plain."""
    chosen = [(p.prompt + (p.alternatives[0] if c else []), p.chosen) for p, c in zip(pairs, conditioned)]
    rejected = [(p.prompt + (p.alternatives[1] if c else []), p.rejected) for p, c in zip(pairs, conditioned)]
    rows = chosen + rejected
    ids = [torch.tensor(context + answer) for context, answer in rows]
    labels = [torch.tensor([-100] * len(context) + answer) for context, answer in rows]
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=PAD_ID),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "position_ids": pad_sequence([torch.arange(len(row)) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }


def hidden_and_head(model: LlamaForCausalLM, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Any]]:
    read = {name: batch[name] for name in ("input_ids", "attention_mask", "position_ids")}
    return ik.hidden_and_head(model, **read)  # type: ignore[arg-type]


@torch.no_grad()
def log_probs(model: LlamaForCausalLM, pairs: Sequence[Pair], *, conditioned: bool) -> Tensor:
    """Return (2, pairs) float64: summed log-probs of the chosen and the rejected responses."""
    parts = []
    for at in range(0, len(pairs), 64):
        some = pairs[at : at + 64]
        batch = batch_of(some, [conditioned] * len(some))
        hidden, head = hidden_and_head(model, batch)
        logps = ik.linear_logps(hidden[:, :-1], targets=batch["labels"][:, 1:], **head)
        parts.append(logps.double().sum(1).view(2, -1))
    return torch.cat(parts, 1)


def pair_loss(
    model: LlamaForCausalLM, batch: Mapping[str, Tensor], objective: ik.Objective | None, reference: Tensor
) -> Tensor:
    """Return the objective's loss or, without an objective, the labels' mean negative log-prob per token."""
    if objective is None:
        return model(**batch).loss
    hidden, head = hidden_and_head(model, batch)
    out = ik.fused_inspo_loss(hidden, labels=batch["labels"], ref_logps=reference, objective=objective, **head)
    return out.loss


def train(
    model: LlamaForCausalLM, pairs: Sequence[Pair], arm: Arm, size: Size, seed: int, after_epoch: Callable[[int], None]
) -> dict[str, Any]:
    """Train ``model`` in place at a constant learning rate, and call ``after_epoch`` at each of ``size.epochs``.

    The order of the pairs and the dropout draws depend only on ``seed`` and epoch.
    """
    reference = torch.stack([log_probs(model, pairs, conditioned=False)] * 2)  # (layout, 2, pairs)
    if arm.reference_conditioned:
        reference[1] = log_probs(model, pairs, conditioned=True)
    objective = None if arm.objective == "sft" else ik.DPO(beta=size.beta)
    rate = size.learning_rate * arm.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1.0, (i + 1) / 4))
    tokens = updates = 0
    for epoch in range(1, max(size.epochs) + 1):
        rng = random.Random(f"epoch {seed} {epoch}")
        order = rng.sample(range(len(pairs)), len(pairs))
        layout = [int(arm.conditioned and rng.random() >= arm.dropout) for _ in pairs]
        for at in range(0, len(order), size.update_pairs):
            places = order[at : at + size.update_pairs]
            layouts = [layout[i] for i in places]
            batch = batch_of([pairs[i] for i in places], [bool(one) for one in layouts])
            if objective is None:
                batch = {name: values[: len(places)] for name, values in batch.items()}  # the chosen responses
            loss = pair_loss(model, batch, objective, reference[layouts, :, places].T.flatten())
            if not torch.isfinite(loss):
                raise ArithmeticError(f"the loss of seed {seed} is not finite in epoch {epoch}")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            tokens, updates = tokens + int(batch["attention_mask"].sum()), updates + 1
        if epoch in size.epochs:
            after_epoch(epoch)
    return {"updates": updates, "tokens": tokens}


def fitted_base(
    data: Data, digest: str, size: Size, cache: Path, say: Callable[[str], None]
) -> tuple[LlamaForCausalLM, dict[str, Any]]:
    """Return the base and facts about its fit, from ``cache`` if the library and sizes are those of an earlier fit."""
    fields = (
        "vocabulary",
        "hidden_size",
        "layers",
        "most_tokens",
        "fit_steps",
        "fit_rows",
        "fit_learning_rate",
        "draft_share",
        "sampled_drafts",
    )
    settings = json.dumps([digest, torch.__version__, *(getattr(size, name) for name in fields)])
    file = cache / f"base-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.pt"
    model = build(size)
    if not file.exists():
        began = time.perf_counter()
        loss = fit(model, data, size, lambda done, _: say(f"fitting: {done} of {size.fit_steps} steps"))
        facts = {"fit_loss": loss, "seconds": round(time.perf_counter() - began), "library": digest}
        facts["parameters"] = sum(p.numel() for p in model.parameters())
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        torch.save({"model": model.state_dict(), "facts": facts}, partial)
        partial.replace(file)
    saved = torch.load(file)
    model.load_state_dict(saved["model"])
    return model, saved["facts"]

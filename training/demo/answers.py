"""Sample the demo's answers, turn them into pairs, and judge answers to unseen prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import inspo_kernels as ik

from ..answers import answer_text, generate_batch, reflect_batch
from ..batching import Batcher
from ..chat import TextEncoder
from ..config import TrainConfig
from ..evaluation import mean_interval, proportion_interval
from ..pairs import Pair
from ..scoring import PairModel, score
from .settings import Settings
from .world import Prompt, World

MAX_NEW_TOKENS = 8
REFLECTED = 4  # drafts to each prompt, of which reflected answers and best-of-two are compared
CUT = "…"  # ends an answer that the model did not end


@torch.no_grad()
def sample_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    count: int,
    greedy: bool,
    seed: int,
) -> list[list[str]]:
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    world: World,
    prompts: Sequence[Prompt],
    most: int,
    settings: Settings,
) -> list[dict[str, str]]:
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
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperatures": [1.0] * len(rows),
        "chat": False,
        "seeds": [[seed, i, n] for i, n in rows],
    }
    ids = [encoder.prompt(str(prompts[i])) for i, _ in rows]
    with torch.no_grad():
        drafts, reflected = zip(*reflect_batch(model, encoder, ids, **settings))
        best = best_of_two(model, encoder, ids, **settings)
    answers: dict[str, list[list[str]]] = {}
    ways = {"draft": drafts, "reflected": reflected, "best_of_two": best}
    for way, given in ways.items():
        texts = [answer_text(one, tokenizer) for one in given]
        whole = [text if one[-1] == tokenizer.eos_token_id else text + CUT for text, one in zip(texts, given)]
        answers[way] = [whole[at : at + count] for at in range(0, len(whole), count)]
    return answers


@torch.no_grad()
def best_of_two(
    model: PreTrainedModel,
    encoder: TextEncoder,
    prompts: Sequence[Sequence[int]],
    *,
    seeds: Sequence[Sequence[int]],
    **more: Any,
) -> list[list[int]]:
    """Answer each prompt twice and return the answer with the higher mean log-prob per token, given the prompt alone.

    The first answer is the draft that ``reflect_batch`` writes for the same options. At temperature 0 both are equal.
    """
    firsts, seconds = (
        generate_batch(model, encoder, prompts, seeds=given, **more)
        for given in (seeds, [[*seed, 2] for seed in seeds])
    )
    pairs = [Pair([*prompt], first, second) for prompt, first, second in zip(prompts, firsts, seconds)]
    batcher = Batcher(encoder.tokenizer.eos_token_id, model.device, TrainConfig.max_batch_tokens)
    scores = score(PairModel(model, ik.DPO()), pairs, batcher, conditioned=False)
    means = scores.logps / scores.lengths
    return [(pair.chosen, pair.rejected)[best] for pair, best in zip(pairs, means.argmax(0).tolist())]


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

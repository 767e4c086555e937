"""Build the study's tiny models, fit them to demonstrations, sample answers and score pairs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import inspo_kernels as ik

from .. import fitting
from .world import END, IDS, PAD, VOCABULARY, Prompt, decode, demonstrate, encode

MOST_TOKENS = 20  # of an answer, including its end
_ROWS = ("input_ids", "attention_mask", "position_ids")


def build(hidden_size: int, layers: int, seed: int, device: str = "cpu") -> LlamaForCausalLM:
    """Return a Llama with random parameters drawn from ``seed``."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(VOCABULARY),
                hidden_size=hidden_size,
                num_hidden_layers=layers,
                intermediate_size=hidden_size * 8 // 3,
                num_attention_heads=4,
                max_position_embeddings=128,
                bos_token_id=None,
                eos_token_id=IDS[END],
                pad_token_id=IDS[PAD],
            )
        ).eval()
    return model.to(device)  # type: ignore[arg-type]  # transformers' wrapper of it hides self


def fit(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    *,
    steps: int,
    rows: int,
    learning_rate: float,
    draft_share: float,
    seed: int,
) -> float:
    """Fit ``model`` to demonstrations. Return the mean loss of the last steps, in nats per token.

    ``draft_share`` of the rows are prompt + draft + answer: two demonstrations, both learned. Without these rows, the
    model would never have seen a response after another response.
    """
    rng = random.Random(f"demonstrations {seed}")

    def row() -> tuple[list[int], list[int]]:
        prompt = rng.choice(prompts)
        answers = [demonstrate(prompt, rng) for _ in range(1 + (rng.random() < draft_share))]
        return encode(str(prompt)), encode("".join(answers))

    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.1)
    return fitting.fit(model, ([row() for _ in range(rows)] for _ in range(steps)), IDS[PAD], schedule)


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, count: int, seed: int, temperature: float = 1.0
) -> list[list[str]]:
    """Return ``count`` answers per prompt, given the prompt alone. An answer that ends has END as its last token.

    The uniform draw of each token depends only on ``seed``, prompt and position, so models are compared on the same
    draws. ``temperature`` 0 always takes the most likely token. Raises ValueError if ``temperature`` is negative.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or larger, got {temperature}")
    generator = torch.Generator().manual_seed(seed)
    draws = torch.rand(len(prompts), count, MOST_TOKENS, 1, generator=generator, dtype=torch.float64)
    answers: list[list[str]] = [[] for _ in prompts]
    for size in sorted({len(prompt.word) for prompt in prompts}):  # prompts of equal length together need no padding
        places = [i for i, prompt in enumerate(prompts) if len(prompt.word) == size]
        questions = torch.tensor([encode(str(prompts[i])) for i in places]).repeat_interleave(count, 0)
        uniform = draws[places].flatten(0, 1).to(model.device)
        tokens, cache = questions.to(model.device), None
        ended = torch.zeros(len(questions), dtype=torch.bool, device=model.device)
        answer: list[Tensor] = []
        for step in range(MOST_TOKENS):
            out = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            logits = out.logits[:, -1].double()
            if temperature == 0:
                tokens = logits.argmax(-1, keepdim=True)
            else:
                cumulative = (logits / temperature).softmax(-1).cumsum(-1)
                tokens = (cumulative < uniform[:, step]).sum(-1, keepdim=True).clamp(max=len(VOCABULARY) - 1)
            answer.append(tokens.masked_fill(ended[:, None], IDS[PAD]))
            ended |= tokens[:, 0] == IDS[END]
            if ended.all():
                break
        for row, ids in enumerate(torch.cat(answer, 1).tolist()):
            if IDS[END] in ids:
                ids = ids[: ids.index(IDS[END]) + 1]
            answers[places[row // count]].append(decode(ids))
    return answers


def on_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return a ``condition_pairs`` batch with the model's inputs on ``device``."""
    return batch | {name: batch[name].to(device) for name in _ROWS}


def hidden_and_head(model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    return ik.hidden_and_head(model, **{name: batch[name] for name in _ROWS})


@torch.no_grad()
def log_probs(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    """Return (2, pairs) float64: summed log-probs of the tokens that the batch's labels mark."""
    hidden, head = hidden_and_head(model, on_device(batch, model.device))
    targets = batch["labels"][:, 1:].to(model.device)
    return ik.linear_logps(hidden[:, :-1], targets=targets, **head).double().sum(1).cpu().view(2, -1)


@torch.no_grad()
def pair_output(
    model: PreTrainedModel, batch: dict[str, Any], objective: ik.Objective, reference: Tensor
) -> ik.InSPOOutput:
    """Return a conditioned batch's log-probs and rewards, conditioned and prompt-only, from the loss's own code."""
    hidden, head = hidden_and_head(model, on_device(batch, model.device))
    return ik.fused_inspo_loss(
        hidden,
        labels=batch["labels"],
        marginal_labels=batch["marginal_labels"],
        objective=objective,
        ref_logps=reference.flatten().to(model.device),
        **head,
    )

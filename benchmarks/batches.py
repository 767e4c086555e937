"""Define the measured shapes, and draw random batches of them.

Lengths are equal, or come from real preference pairs (``pair_lengths.json`` holds token counts, no text). Head sizes
are those of known models. Values are random, with the magnitude of a trained model's values.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inspo_kernels.layouts.conditioning import IGNORE_INDEX

Lengths = tuple[int, int, int]


@dataclass(frozen=True)
class HeadShape:
    """An LM head: hidden size, vocabulary size, and the logits' soft-cap, if any."""

    hidden: int
    vocab: int
    softcap: float | None = None


@dataclass(frozen=True)
class ModelShape:
    """A Llama-shaped model."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocab: int
    kv_heads: int | None = None
    tied: bool = False

    def build(self, dtype: torch.dtype, device: torch.device, attention: str = "sdpa") -> Any:
        """Build the model, always with the same random weights. The last two ids are padding and end of sequence."""
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            max_position_embeddings=32_768,
            pad_token_id=self.vocab - 2,
            eos_token_id=self.vocab - 1,
            bos_token_id=None,
            initializer_range=0.05,
            attn_implementation=attention,  # type: ignore[call-arg]  # transformers hides it
        )
        with device:  # a billion random numbers take a CPU long
            model = LlamaForCausalLM(config).eval()
        model.to(device, dtype)  # type: ignore[arg-type]  # transformers' wrapper of it hides self
        if dtype == torch.float64:
            _keep_float64(model)
        return model


def _keep_float64(model: torch.nn.Module) -> None:
    """Replace the library's norms, which round to float32, with torch's, which compute in the model's dtype."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)


MODELS = {
    "llama3-8b": HeadShape(4096, 128_256),
    "qwen3-4b": HeadShape(2560, 151_936),
    "qwen3-8b": HeadShape(4096, 151_936),
    "gemma2-9b": HeadShape(3584, 256_000, softcap=30.0),
}


@dataclass(frozen=True)
class Shape:
    """A head, and the token counts (prompt, chosen, rejected) of the pairs in one batch."""

    head: HeadShape
    lengths: tuple[Lengths, ...]

    @property
    def scored(self) -> int:
        return sum(w + l for _, w, l in self.lengths)

    @property
    def longest(self) -> int:
        return max(map(sum, self.lengths))

    @property
    def positions(self) -> int:
        """Count positions of the padded rows prompt + alternative + response."""
        return 2 * len(self.lengths) * self.longest

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self.head),
            "pairs": len(self.lengths),
            "mean_prompt": sum(x for x, _, _ in self.lengths) / len(self.lengths),
            "mean_response": self.scored / (2 * len(self.lengths)),
            "scored_tokens": self.scored,
            "positions": self.positions,
        }


def equal(head: HeadShape, pairs: int, prompt: int, response: int) -> Shape:
    return Shape(head, ((prompt, response, response),) * pairs)


def scored_tokens(head: HeadShape, tokens: int, response: int) -> Shape:
    """Return a shape with ``tokens`` scored tokens: responses of ``response`` tokens, prompts half as long."""
    if tokens % (2 * response):
        raise ValueError(f"{tokens} tokens are not a whole number of pairs with two responses of {response} tokens")
    return equal(head, tokens // (2 * response), max(1, response // 2), response)


@cache
def real_lengths() -> tuple[Lengths, ...]:
    """Return the token counts of real pairs."""
    table = json.loads((Path(__file__).parent / "pair_lengths.json").read_text())
    return tuple((x, w, l) for x, w, l in table["lengths"])


def sample_lengths(pairs: int, *, longest: int, seed: int = 0) -> tuple[Lengths, ...]:
    """Draw the lengths of ``pairs`` real pairs without replacement. Each pair has at most ``longest`` tokens."""
    fitting = [lengths for lengths in real_lengths() if sum(lengths) <= longest]
    return tuple(random.Random(seed).sample(fitting, pairs))


def shapes(device: torch.device) -> dict[str, Shape]:
    """Return shapes by name. On a CPU the models' heads get few tokens, because each token takes milliseconds."""
    reference = HeadShape(512, 32_000)
    models = {
        name: equal(head, 8, 256, 512) if device.type == "cuda" else equal(head, 1, 32, 64)
        for name, head in MODELS.items()
    }
    return {
        "reference": equal(reference, 4, 128, 256),
        "real": Shape(reference, sample_lengths(8, longest=1024)),
        "quick": equal(HeadShape(64, 1000), 2, 16, 32),
        "quick-real": Shape(HeadShape(48, 777, softcap=30.0), ((3, 5, 9), (7, 12, 4), (5, 8, 8))),
        **models,
    }


def dtype_of(device: torch.device) -> torch.dtype:
    """Return the dtype that is timed on a device."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def random_head(shape: HeadShape, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a random head (V, H), normal with variance 1/H."""
    g = torch.Generator(device).manual_seed(0)
    return torch.randn(shape.vocab, shape.hidden, generator=g, device=device).div_(shape.hidden**0.5).to(dtype)


class PairBatch:
    """Hidden states, head, labels and reference log-probs for a shape with B pairs and N scored tokens.

    The chosen responses come first. ``rows=True``: hidden (2B, T, H) has every position, and labels (2B, T) are aligned
    with it (hidden[t] predicts labels[t + 1]), as in ``condition_pairs``. ``rows=False``: hidden (N, H) has only the
    scored positions. In both cases ``scored_rows`` returns (N, H), which matches targets (N,) and segment_ids (N,).

    Logits are standard normal, except that the label's logit is raised by 0 to 20. Label probabilities thus range from
    1/V to 1, as in a trained model. Reference log-probs are within a few nats of the policy's, so no loss saturates.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: bool = False,
        weight: Tensor | None = None,
    ) -> None:
        g = torch.Generator(device).manual_seed(shape.scored)
        head, pairs = shape.head, len(shape.lengths)
        responses = [w for _, w, _ in shape.lengths] + [l for _, _, l in shape.lengths]
        self.shape, self.head = shape, head
        self.response_lengths = responses
        self.weight = random_head(head, dtype=dtype, device=device) if weight is None else weight
        lengths = torch.tensor(responses, device=device)
        self.segment_ids = torch.arange(2 * pairs, device=device).repeat_interleave(lengths)
        self.response_mask = torch.arange(max(responses), device=device) < lengths[:, None]
        self.targets = torch.randint(head.vocab, (shape.scored,), generator=g, device=device)
        label_rows = self.weight[self.targets].float()
        raised = 20 * torch.rand(shape.scored, 1, generator=g, device=device)
        x = torch.randn(shape.scored, head.hidden, generator=g, device=device)
        x += raised * label_rows / label_rows.square().sum(1, keepdim=True)
        self.ref_logps = self.sums(_estimated_logps(x, label_rows, head))
        self.ref_logps += 3 * torch.randn(2 * pairs, generator=g, device=device)
        self.hidden = x.to(dtype)
        self.scored_mask: Tensor | None = None
        self.labels: Tensor | None = None
        if rows:
            ends = torch.tensor([sum(lengths) for lengths in shape.lengths] * 2, device=device)
            self._spread_over_rows(shape, ends, lengths, g)

    def _spread_over_rows(self, shape: Shape, ends: Tensor, responses: Tensor, g: torch.Generator) -> None:
        x, rows = self.hidden, len(ends)
        device, at = x.device, torch.arange(shape.longest, device=x.device)
        # The token before each label predicts it.
        mask = (at >= (ends - responses - 1)[:, None]) & (at < (ends - 1)[:, None])
        self.hidden = torch.randn(rows, shape.longest, shape.head.hidden, generator=g, device=device).to(x.dtype)
        self.hidden[mask] = x
        labels = torch.full((rows, shape.longest), IGNORE_INDEX, device=device)
        labels[:, 1:][mask[:, :-1]] = self.targets
        self.scored_mask, self.labels = mask, labels

    @property
    def softcap(self) -> float | None:
        return self.head.softcap

    @cached_property
    def on_host(self) -> tuple[Tensor, Tensor]:
        """Return targets and segment ids on the CPU."""
        return self.targets.cpu(), self.segment_ids.cpu()

    def scored_rows(self, hidden: Tensor) -> Tensor:
        """Return the scored rows (N, H) of ``hidden``, which has the batch's layout. Gradients flow through."""
        return hidden if self.scored_mask is None else hidden[self.scored_mask]

    def sums(self, logps: Tensor) -> Tensor:
        """Sum per-token log-probs (N,) to (2B,) over padded rows, as trainers do. The dtype stays the same."""
        padded = logps.new_zeros(self.response_mask.shape).masked_scatter(self.response_mask, logps)
        return padded.sum(1)


def _estimated_logps(x: Tensor, label_rows: Tensor, head: HeadShape) -> Tensor:
    """Estimate log-probs, assuming that all logits but the label's are standard normal."""
    label_logit = (x * label_rows).sum(1)
    if head.softcap is not None:
        label_logit = head.softcap * torch.tanh(label_logit / head.softcap)
    others = torch.tensor(head.vocab, dtype=x.dtype, device=x.device).log() + 0.5
    return label_logit - torch.logaddexp(others, label_logit)

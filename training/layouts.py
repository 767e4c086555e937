"""How a run lays its pairs out for the model: as two sequences in rows, or as a tree that holds the prompt once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

import inspo_kernels as ik
from inspo_kernels.tree import MAX_DENSE_TOKENS

from .config import InputError
from .data import Pair
from .scoring import Batcher, score

# Nats a token by which trees and rows may differ before a tree is thought wrong: rounding stays far below.
_TOLERANCE = {True: 5e-2, False: 2e-4}  # computed in bfloat16 or not


def choose_layout(
    wanted: str, model: PreTrainedModel, batcher: Batcher, pairs: Sequence[Pair], *, conditioned: bool,
    log: Callable[[str], None],
) -> Batcher:  # fmt: skip
    """``batcher`` with the layout that ``wanted`` ("auto", "tree" or "rows") means for this model and these pairs.

    "auto" is a tree where the model can read one and it costs less than rows. Raises InputError where a tree is wanted
    and the model cannot read it. One line of ``log`` says which layout it is, and why.
    """
    rows = dataclasses.replace(batcher, layout="rows")
    if wanted == "rows":
        log("layout: rows, as set")
        return rows
    attention = model.config.get_text_config()._attn_implementation
    packed = attention == "flex_attention"
    tree = dataclasses.replace(batcher, layout="packed_tree" if packed else "tree")
    reason = ik.tree_unsupported(model)
    if reason is None and attention == "eager":
        # Log-probs of held-out pairs are taken conditioned, too.
        longest = max(tree.tokens(pair, conditioned=True) for pair in pairs)
        if longest > MAX_DENSE_TOKENS:
            reason = (
                f"the longest pair takes {longest} tokens as a tree, above the {MAX_DENSE_TOKENS} of eager attention's "
                "mask; lower max_length, or set attn_implementation=sdpa or layout=rows"
            )
    if reason is not None and wanted == "tree":
        raise InputError(f"layout=tree: {reason}")
    if reason is not None:
        log(f"layout: rows, because {reason}")
        return rows
    costs = [operations(model, some, pairs, conditioned=conditioned) for some in (tree, rows)]
    ratio = costs[0] / costs[1]
    if wanted == "auto" and ratio >= 1:
        log(f"layout: rows, because eager attention over trees would take {ratio:.2f} times their operations")
        return rows
    form = "many in a row" if packed else "one in a row"
    log(f"layout: tree, prompts read once a pair ({form}): {ratio:.2f} times the operations of rows")
    return tree


def operations(model: PreTrainedModel, batcher: Batcher, pairs: Sequence[Pair], *, conditioned: bool) -> float:
    """Operations of the trunk's forward pass over ``pairs``, without padding: products by weights, and attention.

    Rows are attended causally, trees along each path as in rows, or by blocks with flex_attention. The mask of eager
    attention hides nothing from its products.
    """
    config = model.config.get_text_config()
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings and p.ndim > 1)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    eager = config._attn_implementation == "eager"
    total = 0.0
    for pair in pairs:
        prompt, both = len(pair.prompt), len(pair.chosen) + len(pair.rejected)
        between = len(batcher.separator_ids)
        branches = [both + between] * 2 if conditioned else [len(pair.chosen), len(pair.rejected)]
        if eager and batcher.layout == "tree":
            seen = float((prompt + sum(branches)) ** 2)
        else:
            seen = sum((prompt + branch) ** 2 for branch in branches) / (1 if eager else 2)
        total += 2 * weights * batcher.tokens(pair, conditioned=conditioned)
        total += 4 * config.num_hidden_layers * width * seen
    return total


def check_layout(
    batcher: Batcher, module: nn.Module, pairs: Sequence[Pair], *, bf16: bool, required: bool,
    log: Callable[[str], None],
) -> Batcher:  # fmt: skip
    """``batcher`` if ``module`` gives two small pairs the log-probs that it gives them in rows; else one of rows.

    With ``required`` that is an InputError instead. All processes call it, and find the same.
    """
    if batcher.layout == "rows":
        return batcher
    # Ragged, whatever the data are, so that masks have padding or another pair to hide.
    small = [Pair(pairs[0].prompt[-24:], pairs[0].chosen[-12:], pairs[0].rejected[-9:]),
             Pair(pairs[-1].prompt[-5:], pairs[-1].chosen[-3:], pairs[-1].rejected[-7:])]  # fmt: skip
    rows = dataclasses.replace(batcher, layout="rows")
    differences = []
    for conditioned in (True, False):
        expected, found = (score(module, small, b, conditioned=conditioned, progress=None) for b in (rows, batcher))
        differences.append((found.logps - expected.logps) / expected.lengths)
        if expected.marginal_logps is not None and found.marginal_logps is not None:
            differences.append((found.marginal_logps - expected.marginal_logps) / expected.lengths)
    worst = torch.cat(differences).abs().max().item()
    if worst <= _TOLERANCE[bf16]:
        return batcher
    message = f"this model gives a small pair laid out as a tree other log-probs than in rows: {worst:.1e} nats a token"
    if required:
        raise InputError(f"layout=tree: {message}; set layout=rows")
    log(f"WARNING: {message}. layout: rows")
    return rows

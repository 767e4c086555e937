"""How a run lays its pairs out for the model: as two sequences in rows, or as a tree that holds the prompt once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

import inspo_kernels as ik
from inspo_kernels.layouts.tree import MAX_DENSE_TOKENS

from .data import Pair
from .errors import InputError
from .scoring import Batcher, Lengths, score

# Nats a token by which trees and rows may differ before a tree is thought wrong: rounding stays far below.
_TOLERANCE = {True: 5e-2, False: 2e-4}  # computed in bfloat16 or not


def choose_layout(
    wanted: str, model: PreTrainedModel, batcher: Batcher, lengths: Lengths, *, conditioned: bool,
    log: Callable[[str], None],
) -> Batcher:  # fmt: skip
    """Return ``batcher`` with the layout that ``wanted`` ("auto", "tree" or "rows") means here.

    ``lengths`` (n, 3) are the pairs' tokens. "auto" is a tree where the model can read one and it costs less than rows.
    Raises InputError where a tree is wanted and the model cannot read it. One line of ``log`` says which layout it is,
    and why.
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
        longest = int(tree.tokens(lengths, conditioned=True).max())
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
    costs = [operations(model, some, lengths, conditioned=conditioned) for some in (tree, rows)]
    ratio = costs[0] / costs[1]
    if wanted == "auto" and ratio >= 1:
        log(f"layout: rows, because eager attention over trees would take {ratio:.2f} times their operations")
        return rows
    form = "many in a row" if packed else "one in a row"
    log(f"layout: tree, prompts read once a pair ({form}): {ratio:.2f} times the operations of rows")
    return tree


def operations(model: PreTrainedModel, batcher: Batcher, lengths: Lengths, *, conditioned: bool) -> float:
    """Count operations of the trunk's forward pass without padding: matmuls by weights, and attention.

    Rows are attended causally, trees along each path as in rows, or by blocks with flex_attention. The mask of eager
    attention hides nothing from its matmuls.
    """
    config = model.config.get_text_config()
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    weights = sum(p.numel() for p in model.parameters() if id(p) not in embeddings and p.ndim > 1)
    width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    eager = config._attn_implementation == "eager"
    prompt, chosen, rejected = (lengths[:, i].astype(float) for i in range(3))
    both = chosen + rejected + len(batcher.separator_ids)
    branches = [both, both] if conditioned else [chosen, rejected]
    if eager and batcher.layout == "tree":
        seen = (prompt + branches[0] + branches[1]) ** 2
    else:
        seen = sum((prompt + branch) ** 2 for branch in branches) / (1 if eager else 2)
    read = batcher.tokens(lengths, conditioned=conditioned)
    return float(2 * weights * read.sum() + 4 * config.num_hidden_layers * width * np.sum(seen))


def check_layout(
    batcher: Batcher, module: nn.Module, pairs: Sequence[Pair], *, bf16: bool, required: bool,
    log: Callable[[str], None],
) -> Batcher:  # fmt: skip
    """Return ``batcher`` if ``module`` gives two small pairs the log-probs that they have in rows; else one of rows.

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
        expected, found = (score(module, small, b, conditioned=conditioned) for b in (rows, batcher))
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

"""Layout of a run's pairs: as two sequences in rows, or as a tree that holds the prompt once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

import inspo_kernels as ik
from inspo_kernels.layouts.tree import MAX_DENSE_TOKENS

from .data import Pair
from .errors import InputError, Log
from .scoring import Batcher, Lengths, score

_EAGER_SHARE = 0.7  # of the tokens of rows: above it, eager attention over whole trees costs more than it saves
# Largest difference of trees and rows in nats per token, in bfloat16 or not. Rounding stays far below.
_TOLERANCE = {True: 5e-2, False: 2e-4}


def choose_layout(
    wanted: str, model: PreTrainedModel, batcher: Batcher, lengths: Lengths, *, conditioned: bool, log: Log
) -> Batcher:
    """Return ``batcher`` with the layout that ``wanted`` ("auto", "tree" or "rows") selects, and log the reason.

    ``lengths`` (n, 3) are the pairs' tokens. "auto" is a tree if the model can read one; with eager attention also only
    if it saves many tokens. Raises InputError if a tree is wanted and the model cannot read it.
    """
    rows = dataclasses.replace(batcher, layout="rows")
    if wanted == "rows":
        log("layout: rows, as set")
        return rows
    attention = model.config.get_text_config()._attn_implementation
    packed = attention == "flex_attention"
    tree = dataclasses.replace(batcher, layout="packed_tree" if packed else "tree")
    reason = ik.tree_unsupported(model)
    most = int(tree.tokens(lengths, conditioned=True).max())  # log-probs of held-out pairs are taken conditioned, too
    if reason is None and attention == "eager" and most > MAX_DENSE_TOKENS:
        reason = (
            f"the longest pair takes {most} tokens as a tree, above the {MAX_DENSE_TOKENS} of eager attention's mask; "
            "lower max_length, or set attn_implementation=sdpa or layout=rows"
        )
    if reason is not None and wanted == "tree":
        raise InputError(f"layout=tree: {reason}")
    if reason is not None:
        log(f"layout: rows, because {reason}")
        return rows
    read = [int(some.tokens(lengths, conditioned=conditioned).sum()) for some in (tree, rows)]
    if wanted == "auto" and attention == "eager" and read[0] > _EAGER_SHARE * read[1]:
        log("layout: rows, because eager attention computes what a tree's mask hides, and trees would save few tokens")
        return rows
    form = "many in a row" if packed else "one in a row"
    log(f"layout: tree, each pair's prompt read once, {form}: {read[0] / read[1]:.2f} times the tokens of rows")
    return tree


def check_layout(
    batcher: Batcher, module: nn.Module, pairs: Sequence[Pair], *, bf16: bool, required: bool, log: Log
) -> Batcher:
    """Return ``batcher`` if ``module`` scores two small pairs as in rows; otherwise a batcher of rows.

    Raises InputError instead if the tree is ``required``. All ranks call this and get the same result.
    """
    if batcher.layout == "rows":
        return batcher
    # Ragged on purpose: masks must hide padding or another pair.
    small = [
        Pair(pairs[0].prompt[-24:], pairs[0].chosen[-12:], pairs[0].rejected[-9:]),
        Pair(pairs[-1].prompt[-5:], pairs[-1].chosen[-3:], pairs[-1].rejected[-7:]),
    ]
    rows = dataclasses.replace(batcher, layout="rows")
    differences = []
    for conditioned in (True, False):
        expected, found = (score(module, small, b, conditioned=conditioned) for b in (rows, batcher))
        for one, other in ((found.logps, expected.logps), (found.marginal_logps, expected.marginal_logps)):
            if one is not None and other is not None:
                differences.append((one - other) / expected.lengths)
    worst = torch.cat(differences).abs().max().item()  # NaN stays NaN and fails the comparison
    if worst <= _TOLERANCE[bf16]:
        return batcher
    message = f"this model scores a small pair differently as a tree and in rows: {worst:.1e} nats per token"
    if required:
        raise InputError(f"layout=tree: {message}; set layout=rows")
    log(f"WARNING: {message}. layout: rows")
    return rows

"""Run a checked call of ``linear_logps``, eager or compiled: find the scored tokens, and pass them through the head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import passes
from .agreement import Split
from .backends import resolve_backend
from .gradients import Gradients, Needs
from .head import LMHead, plain_arithmetic
from .options import TokenOptions
from .passes import HeadPass, KeptTokens
from .prepare import check_split, common_arguments, head_pass
from .row_sums import TokenScores
from .scored_rows import checked_labels, scored_positions, to_device


@dataclass(frozen=True)
class ScoredTokens:
    """Hold the scored tokens of a call: positions (N,) among all targets, rows x (N, H) of hidden, targets (N,).

    ``run`` is None for the reference.
    """

    run: HeadPass | None
    index: Tensor
    x: Tensor
    targets: Tensor

    @classmethod
    def find(
        cls, hidden: Tensor, targets: Tensor, head: LMHead, options: TokenOptions, split: Split | None = None
    ) -> ScoredTokens:
        """Check ``targets`` and return those that are scored, with their rows of ``hidden``."""
        targets = checked_labels("targets", targets, hidden.shape[:-1], hidden.device)
        backend = resolve_backend(options.backend, head, hidden.device)
        flat = targets.flatten()
        check_split(split, backend)
        same = {} if split is None else common_arguments(hidden, head, backend, options)
        index = scored_positions(flat, options.ignore_index, head.vocab_size, hidden.device, split, same)
        flat, index = to_device(flat[index], hidden.device), to_device(index, hidden.device)
        run = head_pass(backend, head, hidden.device, options.max_workspace_bytes, options.statistics, split)
        if run is not None and run.group is not None:
            flat = flat - run.group.first
        return cls(run, index, hidden.reshape(-1, head.hidden_size).index_select(0, index), flat)

    def forward(self, needs: Needs, *, may_keep: bool = True) -> tuple[TokenScores, Tensor | KeptTokens | None]:
        """Return the scores of the tokens, and what their gradients need.

        A frozen head needs the gradient (N, H) of each log-prob with respect to its own row. A trainable head needs
        kept rows, or None if ``may_keep`` is false. Without gradients it is None.
        """
        assert self.run is not None
        with plain_arithmetic(self.x.device):
            if needs.x and not needs.head:
                dx = self.run.empty_rows(self.x)
                scores = self.run.unit_gradients(self.x, self.targets, dx)
                self.run.start_sum(dx)()
                return scores, dx
            if needs.head and may_keep:
                return passes.token_logps(self.run, self.x, self.targets, needs)
            return self.run.score(self.x, self.targets), None

    def backward(self, upstream: Tensor, kept: KeptTokens, needs: Needs, *, reads_last: bool) -> Gradients:
        """Return the gradients of sum(upstream * log-probs), upstream (N,).

        ``reads_last``: whether nobody reads ``kept`` again, so that its memory may be reused.
        """
        assert self.run is not None
        with plain_arithmetic(self.x.device):
            return passes.token_gradients(self.run, self.x, self.targets, kept, upstream, needs, reads_last=reads_last)

    def scatter(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Return a tensor of that shape with ``values`` (N, ...) at the scored positions and 0 elsewhere."""
        total = shape.numel() if values.dim() == 1 else shape[:-1].numel()
        return values.new_zeros(total, *values.shape[1:]).index_copy(0, self.index, values).view(shape)

    def scatter_statistics(self, scores: TokenScores, shape: torch.Size) -> dict[str, Tensor]:
        """Return the statistics at the scored positions, 0 or False elsewhere."""
        return {name: self.scatter(value, shape) for name, value in scores.statistics.items()}

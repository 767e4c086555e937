"""Memory that a call of the loss takes above its inputs, from the sizes of its allocations."""

from __future__ import annotations

import torch

from .arguments import integer
from .backends import resolve_backend
from .gradients import DeferredGradients, GradMask
from .head import FLOATS, LMHead
from .options import TokenOptions
from .prepare import PAIR_GROWTH, head_pass


def workspace_bytes(
    num_rows: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    backend: str = "auto",
    longest_pair: int | None = None,
    frozen: bool = False,
    max_workspace_bytes: int | None = None,
) -> int:
    """Return the peak memory of ``fused_inspo_loss`` and its backward pass above their inputs, in bytes.

    Counts the scored rows, the workspace, and the gradients of scored rows and weight. Does not count the gradient of
    all hidden states, which has their size. Assumes that pairs fill the workspace; a call takes less where they do not.
    On a CPU a workspace above 32 MiB stays allocated for the next call, see ``release_workspace``.

    Args:
        num_rows: scored rows N, including those of marginals.
        hidden_size: H.
        vocab_size: V.
        dtype: of hidden states and weight.
        device: "cpu", "cuda", ...
        backend: as for ``fused_inspo_loss``.
        longest_pair: rows of the longest pair. Default: num_rows.
        frozen: whether the weight needs no gradient.
        max_workspace_bytes: as for ``fused_inspo_loss``.

    Raises:
        TypeError, ValueError: for sizes below 1, another dtype, or a backend that cannot run there.
    """
    rows = integer("num_rows", num_rows, minimum=1)
    pair = rows if longest_pair is None else min(rows, integer("longest_pair", longest_pair, minimum=1))
    hidden_size = integer("hidden_size", hidden_size, minimum=1)
    vocab_size = integer("vocab_size", vocab_size, minimum=1)
    if dtype not in FLOATS:
        raise TypeError(f"dtype must be float16, bfloat16, float32 or float64, got {dtype}")
    if max_workspace_bytes is not None:
        max_workspace_bytes = integer("max_workspace_bytes", max_workspace_bytes, minimum=1)
    device = torch.device(device)
    try:
        weight = torch.empty((), dtype=dtype, device=device).expand(vocab_size, hidden_size)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f"device {str(device)!r} is not available here, and the result depends on it: {error}"
        ) from None
    head = LMHead(weight, None, None, 1.0, dtype)
    resolved = resolve_backend(backend, head, device)
    if resolved is None:
        # Logits, log-softmax and the gradients of both, in the accumulate dtype.
        return 4 * rows * vocab_size * head.accumulate_dtype.itemsize
    run = head_pass(resolved, head, TokenOptions(max_workspace_bytes=max_workspace_bytes))
    wide = head.accumulate_dtype.itemsize
    x, dx = rows * hidden_size * dtype.itemsize, rows * hidden_size * wide
    widened = 0 if dtype == head.accumulate_dtype else dx
    dweight = vocab_size * hidden_size
    if frozen:
        passing = resolved.passing_bytes(head, device, rows, run.workspace_bytes)
        return max(x + widened + dx + passing, 2 * dx + x)
    growth = PAIR_GROWTH if max_workspace_bytes is None else 1
    group = min(rows, max(pair, run.capacity))
    kept = min(group, run.capacity * growth)
    workspace = max(resolved.kept_bytes(head, kept), 0 if kept == group else run.workspace_bytes)
    workspace += resolved.logits_bytes(head, device, run.workspace_bytes)
    needs = GradMask(True, True, False)
    # The labels' rows of the weight, and x with its coefficients; rows that are not kept need no such x.
    labels = max(2 * kept, group - kept) * hidden_size * wide
    if group == rows and kept == group and DeferredGradients.worth_deferring(resolved, head, rows, needs):
        kept_x = x + widened if widened else x
        forward = x + widened + dx + workspace + labels
        backward = kept_x + dx + workspace + x + dweight * dtype.itemsize + labels
        return max(forward, backward)
    forward = x + widened * kept // rows + dx + workspace + dweight * wide + labels
    # Gradients in the accumulate dtype are scaled in place.
    backward = dx + dweight * wide + (x + dweight * dtype.itemsize if widened else 0)
    return max(forward, backward)

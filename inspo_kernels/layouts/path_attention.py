"""Attention of a tree, computed path by path: what ``scaled_dot_product_attention`` does where it is given a mask.

A dense mask over a tree hides most of a square that attention kernels compute nevertheless. The paths from the root to
the leaves are ordinary causal sequences, and together much less than that square. So queries, keys and values of each
path are gathered into a padded batch of sequences, which need no mask at all (padding is on the right, where causal
attention does not look), and the outputs are gathered back. Everything else of the model sees each token once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# Of the mask itself only these are asked: what it looks like, never what it holds.
_METADATA = {"__get__", "dim", "size", "get_device", "is_floating_point", "is_complex"}


class PathMask(Tensor):
    """An attention mask for ``scaled_dot_product_attention`` alone, of shape (rows, 1, T, T), which holds no numbers.

    torch hands the call to this class, as it does for its own ``torch.nn.attention.bias.CausalBias``.

    Attributes, on the device of queries and keys:
        paths: (S, n) int64, the tokens of each path among all rows * T, in order; any token beyond a path's end.
        places: (rows * T,) int64, the place among all S * n from which each token takes its output.
        band: (n, n) bool, what a path's token attends to, or None for all tokens up to itself.
    """

    paths: Tensor
    places: Tensor
    band: Tensor | None

    @classmethod
    def of(cls, paths: Tensor, path_of: Tensor, positions: Tensor, window: int | None) -> PathMask:
        """``path_of`` and ``positions`` (rows, T): a path that each token is on, and its place on every such path."""
        rows, length = positions.shape
        shape = torch.zeros((), dtype=torch.bool, device=paths.device).expand(rows, 1, length, length)
        mask = torch.Tensor._make_subclass(cls, shape)
        longest = paths.shape[1]
        mask.paths, mask.places, mask.band = paths, (path_of * longest + positions).flatten(), None
        if window is not None and window < longest:
            index = torch.arange(longest, device=paths.device)
            distance = index[:, None] - index
            mask.band = (distance >= 0) & (distance < window)
        return mask

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is scaled_dot_product_attention:
            return _attend(*args, **(kwargs or {}))
        if func.__name__ in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(f"the mask of a tree holds no numbers: {func.__name__} cannot read it, only attention can")


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: PathMask,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """query (rows, heads, T, d) and so on, as everywhere; ``is_causal`` is what the mask says already."""
    paths, places, band = attn_mask.paths, attn_mask.places, attn_mask.band
    rows, _, length, _ = query.shape

    def by_path(states: Tensor) -> Tensor:
        flat = states.transpose(1, 2).flatten(0, 1).index_select(0, paths.flatten())
        return flat.unflatten(0, paths.shape).transpose(1, 2)

    out = scaled_dot_product_attention(
        by_path(query),
        by_path(key),
        by_path(value),
        attn_mask=band,
        dropout_p=dropout_p,
        is_causal=band is None,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return out.transpose(1, 2).flatten(0, 1).index_select(0, places).unflatten(0, (rows, length)).transpose(1, 2)

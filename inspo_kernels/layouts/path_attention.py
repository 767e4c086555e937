"""Compute the attention of a tree path by path, when ``scaled_dot_product_attention`` gets a ``PathMask``.

Attention kernels compute the whole square of a dense mask, most of which a tree hides. The paths from the root to the
leaves are ordinary causal sequences and need far less work. So queries, keys and values of each path are gathered into
a padded batch of sequences, and the outputs are gathered back. This batch needs no mask: padding is on the right, where
causal attention does not look. All other parts of the model see each token once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, scaled_dot_product_attention

# Of the mask itself only these are asked: what it looks like, never what it holds.
_METADATA = {"__get__", "dim", "size", "get_device", "is_floating_point", "is_complex"}
_Gathers: TypeAlias = tuple[Tensor, Tensor, Tensor]  # index, places and used of ``_Gather``


class PathMask(Tensor):
    """An attention mask for ``scaled_dot_product_attention`` alone, of shape (rows, 1, T, T), which holds no numbers.

    torch hands the call to this class, as it does for its own ``torch.nn.attention.bias.CausalBias``.

    Attributes, on the device of queries and keys:
        shape_of_paths: (S, n), the number of paths and of places on each.
        to_paths: how ``_Gather`` gets the S * n places from the rows * T tokens.
        to_tokens: how it gets each token's output from one of its places.
        band: (n, n) bool, what a path's token attends to, or None for all tokens up to itself.
    """

    shape_of_paths: torch.Size
    to_paths: _Gathers
    to_tokens: _Gathers
    band: Tensor | None

    @classmethod
    def of(cls, paths: Tensor, path_of: Tensor, positions: Tensor, window: int | None) -> PathMask:
        """Return the mask of ``paths`` (S, n) int64: the tokens of each path among all rows * T, padded with 0.

        ``path_of`` and ``positions`` (rows, T): a path that holds each token, and the token's place on its paths. A
        token is on one or two paths, always at the same place.
        """
        rows, length = positions.shape
        shape = torch.zeros((), dtype=torch.bool, device=paths.device).expand(rows, 1, length, length)
        mask = torch.Tensor._make_subclass(cls, shape)
        longest = paths.shape[1]
        mask.shape_of_paths, mask.band = paths.shape, None
        mask.to_paths, mask.to_tokens = _gathers(paths, (path_of * longest + positions).flatten(), positions.flatten())
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


class _Gather(torch.autograd.Function):
    """Gather rows ``index`` (n,) int64 of a matrix; row i of the matrix goes to rows ``places[i]`` of the result.

    ``places`` (m, k) int64; ``used`` (m, k) bool: whether such a place exists. With them, the backward pass is a
    gather, too. On a GPU it takes a fraction of the time of ``index_select``'s atomic additions.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, index: Tensor, places: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(places, used)
        return matrix.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        places, used = ctx.saved_tensors
        weights = used.to(gradient.dtype)
        return embedding_bag(places, gradient, mode="sum", per_sample_weights=weights), None, None, None


def _gathers(paths: Tensor, places: Tensor, positions: Tensor) -> tuple[_Gathers, _Gathers]:
    """Return the gathers from tokens to places on ``paths`` (S, n), and back from ``places``, one per token."""
    tokens, number = paths.flatten(), len(places)
    index = torch.arange(len(tokens), device=paths.device)
    own = places[tokens] == index
    # A token that two paths share has a second place. Padding beyond a path's end fails the test of positions.
    second = ~own & (positions[tokens] == index % paths.shape[1])
    at = torch.where(second, tokens, number)
    other = torch.zeros(number + 1, dtype=torch.int64, device=paths.device).scatter_(0, at, index)[:-1]
    shared = torch.zeros(number + 1, dtype=torch.bool, device=paths.device).scatter_(0, at, True)[:-1]
    real = tokens[places] == torch.arange(number, device=paths.device)
    to_paths = tokens, torch.stack([places, other], 1), torch.stack([real, shared], 1)
    return to_paths, (places, tokens.unsqueeze(1), own.unsqueeze(1))


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
    band = attn_mask.band
    rows, heads, length, _ = query.shape

    def by_path(states: Tensor) -> Tensor:
        on_paths = _Gather.apply(states.transpose(1, 2).flatten(0, 1).flatten(1), *attn_mask.to_paths)
        return on_paths.view(*attn_mask.shape_of_paths, *states.shape[1::2]).transpose(1, 2)

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
    by_token = _Gather.apply(out.transpose(1, 2).flatten(0, 1).flatten(1), *attn_mask.to_tokens)
    return by_token.view(rows, length, heads, -1).transpose(1, 2)

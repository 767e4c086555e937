"""Define what each rank runs in the tests of split heads: its part, compared with one process."""

from __future__ import annotations

import os
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
import warnings

import torch
import torch.distributed as dist
import triton_setup  # noqa: F401  (the interpreter rounds as GPUs do)
from cases import IGNORE, Case, make_case, relative_error
from torch import Tensor

import inspo_kernels as ik

warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy warns when the interpreter computes inf - inf
STATISTICS = ("entropy", "mean_logit", "is_top1", "logsumexp", "log_sum_sq_probs")


def cuts(vocab: int, ranks: int, sizes: list[int] | None = None) -> list[slice]:
    """Return the consecutive words of each rank, with these sizes or as equal as possible."""
    sizes = sizes or [vocab // ranks + (rank < vocab % ranks) for rank in range(ranks)]
    assert sum(sizes) == vocab and len(sizes) == ranks
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [slice(a, b) for a, b in zip(ends, ends[1:])]


def same_on_every_rank(group: Any, *tensors: Tensor) -> None:
    for tensor in tensors:
        everyone = [torch.empty_like(tensor) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, tensor.contiguous(), group=group)
        for other in everyone:
            assert torch.equal(other.nan_to_num(nan=-7.0), tensor.nan_to_num(nan=-7.0))


def leaves(needs: str, *tensors: Tensor | None) -> list[Tensor | None]:
    """Return copies. Those whose letter (x, w, b) is in ``needs`` require grad."""
    return [None if t is None else t.detach().clone().requires_grad_(name in needs) for name, t in zip("xwb", tensors)]


def gradients(loss: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted) if wanted else ())
    return [next(found) if t is not None and t.requires_grad else None for t in tensors]


def assert_near(got: Any, plain: Any, true: Any, dtype: torch.dtype) -> None:
    """Assert that each error is at most twice plain torch's, or twice the rounding of the result."""
    floor = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps / 2
    for g, p, t in zip(got, plain, true, strict=True):
        if t is None:
            assert g is None
            continue
        if t.double().norm() < 1e-30:  # too large for float32
            assert g.double().norm() < 1e-30
            continue
        error, base = relative_error(g, t), relative_error(p, t)
        assert error <= 2 * max(base, floor), (error, base)


def form_of(case: Case, form: str) -> dict[str, Any]:
    if form == "rows":
        return {"hidden": case.hidden, "labels": case.labels, "marginal_labels": case.marginal_labels}
    return case.packed() if form == "packed" else case.compact()


def vocabulary_loss(
    lengths: list[tuple[int, int, int]],
    *,
    sizes: list[int] | None = None,
    vocab: int = 29,
    dtype: torch.dtype = torch.float64,
    form: str = "rows",
    needs: str = "xwb",
    bias: bool = True,
    seed: int = 0,
    scale: float = 1.0,
    backend: str = "torch",
    **options: Any,
) -> None:
    """Compare the loss of a head that all ranks share with float64 and plain torch."""
    group, rank = dist.group.WORLD, dist.get_rank()
    case = make_case(lengths, hidden_size=8, vocab=vocab, bias=bias, seed=seed, scale=scale).to(dtype)
    own = cuts(vocab, dist.get_world_size(), sizes)[rank]
    options = {"objective": "dpo", "ref_logps": case.ref_logps, "statistics": STATISTICS, **options}
    limits = {"max_workspace_bytes": options.pop("max_workspace_bytes", None), "backend": backend}

    def outcome(dtype: torch.dtype, words: slice, function: Any, **more: Any) -> list[Any]:
        given = form_of(case.to(dtype), form)
        hidden, weight, b = leaves(needs, given.pop("hidden"), case.weight[words].to(dtype), case.to(dtype).bias)
        b = None if b is None else leaves(needs, None, None, b[words])[2]
        out = function(hidden, weight, given.pop("labels"), bias=b, **given, **options, **more)
        found = [out.loss.detach(), out.logps, out.marginal_logps, *out.statistics.values()]
        if function is ik.fused_inspo_loss:
            same_on_every_rank(group, *found, out.losses, out.margins)
        grads = gradients(out.loss, hidden, weight, b) if needs else [None, None, None]
        if function is not ik.fused_inspo_loss:
            return [*found, grads[0], *(None if g is None else g[own] for g in grads[1:])]
        if grads[0] is not None:
            same_on_every_rank(group, grads[0])
        return [*found, *grads]

    everything = slice(0, vocab)
    got = outcome(dtype, own, ik.fused_inspo_loss, process_group=group, **limits)
    plain = outcome(dtype, everything, ik.reference.fused_inspo_loss)
    true = outcome(torch.float64, everything, ik.reference.fused_inspo_loss)
    if dtype == torch.float64:
        for g, t in zip(got, true, strict=True):
            assert (g is None) == (t is None)
            if t is not None:
                torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-11)
    else:
        assert_near(got, plain, true, dtype)
    again = outcome(dtype, own, ik.fused_inspo_loss, process_group=group, **limits)
    for one, other in zip(got, again):
        assert one is None or torch.equal(one, other)


def vocabulary_tokens(
    weight: Tensor,
    hidden: Tensor,
    targets: Tensor,
    *,
    sizes: list[int] | None = None,
    dtype: torch.dtype = torch.float64,
    needs: str = "xw",
    bias: Tensor | None = None,
    backend: str = "torch",
    max_workspace_bytes: int | None = None,
    check_statistics: bool = True,
    **options: Any,
) -> Tensor:
    """Check single tokens of a head that all ranks share, with any upstream gradient. Return the log-probs."""
    rank, vocab = dist.get_rank(), len(weight)
    own = cuts(vocab, dist.get_world_size(), sizes)[rank]
    upstream = torch.randn(targets.shape, generator=torch.Generator().manual_seed(1))
    weight, hidden, bias = (None if t is None else t.to(dtype) for t in (weight, hidden, bias))

    def outcome(to: torch.dtype, words: slice, function: Any, **more: Any) -> list[Any]:
        part = None if bias is None else bias[words]
        x, w, b = leaves(needs, *(None if t is None else t.to(to) for t in (hidden, weight[words], part)))
        logps, found = function(x, w, targets, bias=b, statistics=STATISTICS, **options, **more)
        loss = (logps * upstream.to(logps.dtype)).sum()
        grads = gradients(loss, x, w, b) if needs else [None, None, None]
        cut = slice(None) if words == own else own
        grads = [grads[0], *(None if g is None else g[cut] for g in grads[1:])]
        return [logps.detach(), *found.values(), *grads]

    more = {"backend": backend, "max_workspace_bytes": max_workspace_bytes, "process_group": dist.group.WORLD}
    got = outcome(dtype, own, ik.linear_logps, **more)
    whole = slice(0, vocab + 1)  # any slice except this rank's
    true = outcome(torch.float64, whole, ik.reference.linear_logps)
    if dtype.itemsize == 2:  # the reference would compute in float32 throughout
        plain = outcome(dtype, whole, ik.linear_logps, backend=backend)
    else:
        plain = outcome(dtype, whole, ik.reference.linear_logps)
    same_on_every_rank(dist.group.WORLD, *got[:6], *([] if got[6] is None else [got[6]]))
    if not check_statistics:
        got, plain, true = ([one[0], *one[6:]] for one in (got, plain, true))
    if dtype == torch.float64:
        for g, t in zip(got, true, strict=True):
            assert (g is None) == (t is None)
            if t is not None:
                torch.testing.assert_close(g.to(t.dtype), t, rtol=1e-10, atol=1e-10)
    else:
        assert_near(got, plain, true, dtype)
    return got[0]


def huge_shard(weight: Tensor, hidden: Tensor, size: float, *, dtype: torch.dtype, backend: str) -> None:
    """Tokens of which the first rank's logits are ``size``, 0.5 ``size`` or -``size``, against float64.

    The huge column of hidden gets a gradient that cancels to nothing but rounding: it is left out.
    """
    own = cuts(len(weight), dist.get_world_size(), [15, 25])[dist.get_rank()]
    weight, hidden = weight.to(dtype), hidden.to(dtype)
    hidden[:, 0] = torch.tensor([1.0, -1.0, 0.5]).repeat(3)
    weight[:15, 0] = size
    targets = torch.arange(9) * 5 % 40

    def outcome(to: torch.dtype, words: slice, function: Any, **more: Any) -> list[Tensor]:
        x, w, _ = leaves("xw", hidden.to(to), weight[words].to(to), None)
        logps = function(x, w, targets, **more)
        dx, dw = gradients(logps.sum(), x, w)
        return [logps.detach(), dx[:, 1:], dw]

    got = outcome(dtype, own, ik.linear_logps, backend=backend, process_group=dist.group.WORLD)
    logps, dx, dw = outcome(torch.float64, slice(0, 40), ik.reference.linear_logps)
    near = 10 * torch.finfo(dtype).eps
    for g, true in zip(got, (logps, dx, dw[own])):
        torch.testing.assert_close(g.double(), true, rtol=near, atol=near)


def vocabulary_sums(lengths: list[tuple[int, int, int]], form: str = "rows", **options: Any) -> None:
    case = make_case(lengths)
    own = cuts(29, dist.get_world_size())[dist.get_rank()]
    given = form_of(case, form)
    hidden, labels = given.pop("hidden"), given.pop("labels")
    if form == "compact":
        given["num_pairs"] = len(lengths)
    expected = ik.pair_logps(hidden, case.weight, labels, bias=case.bias, **given)
    got = ik.pair_logps(
        hidden, case.weight[own], labels, bias=case.bias[own], process_group=dist.group.WORLD, **given, **options
    )
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    same_on_every_rank(dist.group.WORLD, *got)


def sequence_loss(
    lengths: list[tuple[int, int, int]],
    *,
    form: str = "compact",
    words: int = 1,
    needs: str = "xwb",
    seed: int = 0,
    empty: bool = False,
    backend: str = "torch",
    **options: Any,
) -> None:
    """Check split sequences: each rank holds some tokens, and with ``words`` > 1 also some rows of the head."""
    case, ranks = make_case(lengths, seed=seed), dist.get_world_size()
    parts, vocabulary, sequence = ranks // words, None, dist.group.WORLD
    place, part = dist.get_rank() % words, dist.get_rank() // words
    if words > 1:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (parts, words), mesh_dim_names=("sequence", "words"))
        vocabulary, sequence = mesh.get_group("words"), mesh.get_group("sequence")
    own = cuts(29, words)[place]
    options = {"objective": "dpo", "ref_logps": case.ref_logps, "statistics": STATISTICS, **options}
    limits = {"max_workspace_bytes": options.pop("max_workspace_bytes", None), "backend": backend}
    whole = form_of(case, form)
    if form == "compact":
        # Rank 0 may hold no tokens.
        count = len(whole["labels"])
        mine = (torch.arange(count) * 7 // 3 % parts == part) if not empty else torch.full((count,), part == parts - 1)
        mine = mine.nonzero().squeeze(1)
        here = {name: tensor[mine] for name, tensor in whole.items()}
        take = lambda dx: dx[mine]  # noqa: E731
    else:
        # Shifted first, then cut along the sequence.
        shifted = {k: torch.full_like(v, IGNORE) for k, v in whole.items() if k != "hidden"}
        for name, labels in shifted.items():
            labels[:, :-1] = whole[name][:, 1:]
        columns = cuts(whole["labels"].shape[1], parts)[part]
        here = {k: v[:, columns] for k, v in (whole | shifted).items()}
        take = lambda dx: dx[:, columns]  # noqa: E731

    def outcome(given: dict[str, Tensor], rows: slice, function: Any, **more: Any) -> list[Any]:
        given = dict(given)
        x, w, b = leaves(needs, given.pop("hidden"), case.weight[rows], case.bias[rows])
        out = function(x, w, given.pop("labels"), bias=b, **given, **options, **more)
        assert out.lengths.sum() > 0
        found = [out.loss.detach(), out.logps, out.marginal_logps, out.lengths.double(), *out.statistics.values()]
        return [*found, *(gradients(out.loss, x, w, b) if needs else [None] * 3)]

    groups = {"process_group": vocabulary, "sequence_group": sequence}
    shift = {} if form == "compact" else {"shift": False}
    got = outcome(here, own, ik.fused_inspo_loss, **groups, **limits, **shift)
    same_on_every_rank(dist.group.WORLD, *got[:-3])
    for one, other in zip(got, outcome(here, own, ik.fused_inspo_loss, **groups, **limits, **shift)):
        assert one is None or torch.equal(one, other)
    true = outcome(whole, slice(0, 29), ik.reference.fused_inspo_loss)
    *found, dx, dw, db = got
    for g, t in zip(found, true[:-3], strict=True):
        torch.testing.assert_close(g, t, rtol=1e-10, atol=1e-11)
    if dx is not None:
        torch.testing.assert_close(dx, take(true[-3]), rtol=1e-10, atol=1e-11)
    for part_of_sum, t in ((dw, true[-2]), (db, true[-1])):
        if part_of_sum is not None:
            dist.all_reduce(part_of_sum, group=sequence)
            torch.testing.assert_close(part_of_sum, t[own], rtol=1e-10, atol=1e-11)
    transform = {name: options[name] for name in ("softcap", "logit_scale") if name in options}
    sums, lengths_found = ik.pair_logps(
        here["hidden"],
        case.weight[own],
        here["labels"],
        bias=case.bias[own],
        **groups,
        **shift,
        **transform,
        **{k: v for k, v in here.items() if k not in ("hidden", "labels")},
        **({"num_pairs": len(lengths)} if form == "compact" else {}),
    )
    torch.testing.assert_close(sums[:2].flatten(), true[1], rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(lengths_found[:2].flatten().double(), true[3])

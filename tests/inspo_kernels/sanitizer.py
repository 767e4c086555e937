"""Check every memory access of the Triton kernels while Triton's interpreter runs them.

``make sanitize`` (``python -m pytest --sanitize tests/inspo_kernels``) runs each test that interprets kernels under a
``Sanitizer``; conftest.py has the hooks. Programs then run in random order. A launch raises ``Finding`` if it breaks
one of four rules:

No access out of bounds. Each access lands on an element of the tensor whose pointer it started from. During a launch,
    arguments are 2^44 bytes apart, so that a stray address still identifies its argument. The gap between two rows of
    a strided view is out of bounds. The sanitizer reports an access out of bounds and does not execute it.
No race between programs. No program loads or stores an element that another program of the launch stores.
No race between threads. Between two barriers, no thread loads or stores an element that another thread of its program
    stores. The interpreter has no threads, so lane i of a block represents a thread. Blocks of the same shape and
    element size share threads, because Triton gives them the same layout. All other blocks have different threads.
    Scalars are loaded and stored by one thread, which belongs to no block. A reduction is not a barrier.
No result from uninitialised memory. ``torch.empty`` and similar functions fill memory with a NaN (or an integer) that
    no arithmetic produces. A launch that loads this value runs again with a huge number in its place, and must write
    the same bits. So a kernel may load garbage, but only to discard it.

The sanitizer does not cover atomics (refused with an error), shared memory and asynchronous copies, which the
interpreter does not have; tensors that share elements with two dtypes (refused); layouts that differ between blocks of
one shape; and threads that load a scalar, as all threads do, after one thread has stored it.
"""

from __future__ import annotations

import linecache
import random
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

# By bytes per element: the value of fresh memory (a quiet NaN in every floating-point dtype of this size), and the
# finite number, huge in all these dtypes, that replaces it in the second run.
FRESH = {2: 0x7FDE, 4: 0x7FDEFEED, 8: 0x7FFDEFEEDFEEDFEE}
HUGE = {2: 0x7B00, 4: 0x7B000000, 8: 0x7B00000000000000}

_SPACING = 44  # bits: arguments are 2^44 bytes apart, and an access may stray by half of this distance
_FACTORIES = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty"))

# The originals without any sanitizer, so that one sanitizer can run inside another.
_builder = interpreter.InterpreterBuilder
_load, _store, _barrier = _builder.create_masked_load, _builder.create_masked_store, _builder.create_barrier
_set_dim, _set_index = _builder.set_grid_dim, _builder.set_grid_idx
_call, _convert = interpreter.GridExecutor.__call__, interpreter._implicit_cvt
_allocate = {place: getattr(*place) for place in _FACTORIES}


class Finding(AssertionError):
    """Raised for a launch that broke a rule. The message names the kernel, the rule and the source lines."""


class View:
    """The elements of one tensor argument, by their distance in bytes from the first element."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.address, self.itemsize = tensor.data_ptr(), tensor.element_size()
        self.empty = tensor.numel() == 0
        # Outermost first; contiguous dimensions are merged.
        self.dims: list[tuple[int, int]] = []
        for stride, size in sorted(
            ((s, n) for n, s in zip(tensor.shape, tensor.stride()) if n > 1 and s), reverse=True
        ):
            if self.dims and self.dims[-1][0] == stride * size:
                size *= self.dims.pop()[1]
            self.dims.append((stride, size))

    def holds(self, distance: np.ndarray) -> np.ndarray:
        """Return whether an element starts at each distance."""
        index, rest = np.divmod(distance, self.itemsize)
        inside = (rest == 0) & (not self.empty)
        for stride, size in self.dims:
            place, index = np.divmod(index, stride)
            inside &= (place >= 0) & (place < size)
        return inside & (index == 0)


@dataclass
class Launch:
    """The accesses of one launch, in rows of: address, is a store, thread, epoch (barriers so far), line."""

    name: str
    substitute: bool
    order: random.Random
    views: list[View] = field(default_factory=list)
    lines: dict[tuple[str, int], int] = field(default_factory=dict)
    threads: dict[tuple, int] = field(default_factory=dict)
    rows: list[np.ndarray] = field(default_factory=list)
    programs: list[np.ndarray] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    fresh: set[int] = field(default_factory=set)
    epoch: int = 0

    def report(self, what: str, lines: np.ndarray) -> None:
        known = list(self.lines)
        places = (known[line] for line in np.unique(lines))
        text = "; ".join(f"{Path(f).name}:{n} `{linecache.getline(f, n).strip()}`" for f, n in places)
        if (finding := f"{self.name}: {what}: {text}") not in self.findings:
            self.findings.append(finding)

    def end_program(self) -> None:
        """Look for races between threads, and keep the accesses needed to find races between programs."""
        if self.rows:
            rows = np.concatenate(self.rows, axis=1)
            stored = np.isin(rows[0], rows[0][rows[1] == 1])
            met = rows[:, stored]
            met = met[:, np.lexsort((met[3], met[0]))]
            if met.size:
                starts = np.flatnonzero(np.r_[True, (met[0, 1:] != met[0, :-1]) | (met[3, 1:] != met[3, :-1])])
                stores = np.maximum.reduceat(met[1], starts) == 1
                differ = np.maximum.reduceat(met[2], starts) != np.minimum.reduceat(met[2], starts)
                if (bad := stores & differ).any():
                    counts = np.diff(np.r_[starts, met.shape[1]])
                    self.report("two threads meet without a barrier between", met[4, np.repeat(bad, counts)])
            self.programs.append(np.vstack([rows[[0, 1, 4]], np.full(rows.shape[1], len(self.programs))]))
        self.rows, self.epoch = [], 0

    def end(self) -> None:
        """Look for races between programs."""
        self.end_program()
        if not self.programs:
            return
        address, stores, line, program = np.concatenate(self.programs, axis=1)
        store = np.flatnonzero(stores)
        store = store[np.argsort(address[store], kind="stable")]
        if not store.size:
            return
        first = store[np.r_[True, address[store][1:] != address[store][:-1]]]  # one store of each address
        found = np.minimum(np.searchsorted(address[first], address), len(first) - 1)
        owner = first[found]
        met = (address[owner] == address) & (program[owner] != program)
        for what, kind in (("two programs store one element", 1), ("a program loads what another stores", 0)):
            if (bad := met & (stores == kind)).any():
                self.report(what, np.r_[line[bad], line[owner[bad]]])


class Sanitizer:
    """A context that checks launches and marks fresh memory. ``counts`` says what was checked."""

    def __init__(self, seed: int = 0) -> None:
        self.order = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.kernels: set[str] = set()
        self.barriers = True

    def __enter__(self) -> Sanitizer:
        self._patch = patch = pytest.MonkeyPatch()
        patch.setattr(interpreter.GridExecutor, "__call__", lambda executor, *a, **k: self._checked(executor, a, k))
        patch.setattr(interpreter, "_implicit_cvt", self._place)
        patch.setattr(_builder, "set_grid_dim", lambda builder, *dims: self._begin(builder, dims))
        patch.setattr(_builder, "set_grid_idx", lambda builder, *index: self._next(builder, index))
        patch.setattr(_builder, "create_masked_load", lambda builder, *args, **how: self._load(builder, *args, **how))
        patch.setattr(_builder, "create_masked_store", lambda builder, *args: self._store(builder, *args))
        patch.setattr(_builder, "create_barrier", lambda builder: self._barrier(builder))
        for name in ("create_atomic_rmw", "create_atomic_cas"):
            patch.setattr(_builder, name, _refuse_atomics)
        for place, allocate in _allocate.items():
            patch.setattr(*place, _marking(allocate))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _checked(self, executor, args, kwargs) -> None:
        bases = (getattr(argument, "base", argument) for argument in (*args, *kwargs.values()))
        tensors = [t for t in bases if isinstance(t, torch.Tensor)]
        _refuse_mixed(tensors)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}.values()
        before, seed = [s.clone() for s in storages], self.order.random()
        launch = self._run(executor, args, kwargs, seed, substitute=False)
        if launch.fresh and not launch.findings:
            after = [s.clone() for s in storages]
            _restore(storages, before)
            self._run(executor, args, kwargs, seed, substitute=True)
            if any(bytes(s) != bytes(kept) for s, kept in zip(storages, after)):
                launch.report("a result follows from memory that nobody has written", np.array([*launch.fresh]))
            _restore(storages, after)
        self.counts["launches"] += 1
        self.counts["findings"] += len(launch.findings)
        self.kernels.add(launch.name)
        if launch.findings:
            raise Finding("\n".join(launch.findings))

    def _run(self, executor, args, kwargs, seed, *, substitute: bool) -> Launch:
        self.launch = launch = Launch(executor.fn.__name__, substitute, random.Random(seed))
        _call(executor, *args, **kwargs)
        launch.end()
        return launch

    def _place(self, argument):
        """Give a tensor's pointer its own address."""
        converted = _convert(argument)
        if hasattr(argument, "data_ptr"):
            self.launch.views.append(View(argument))
            address = (len(self.launch.views) << _SPACING) + (1 << _SPACING - 1)
            converted.handle.data = np.array([address], dtype=np.uint64)
        return converted

    def _begin(self, builder, dims) -> None:
        _set_dim(builder, *dims)
        self.programs = [(x, y, z) for x in range(dims[0]) for y in range(dims[1]) for z in range(dims[2])]
        self.launch.order.shuffle(self.programs)

    def _next(self, builder, _) -> None:
        self.launch.end_program()
        self.counts["programs"] += not self.launch.substitute
        _set_index(builder, *self.programs.pop())

    def _barrier(self, builder) -> None:
        self.launch.epoch += self.barriers
        _barrier(builder)

    def _load(self, builder, pointers, mask, other, *rest, **how):
        real, mask, line = self._access(pointers, mask, store=False)
        loaded = _load(builder, real, mask, other, *rest, **how)
        if (size := loaded.data.itemsize) in FRESH:
            bits = loaded.data.view(f"u{size}")
            if (fresh := (bits == FRESH[size]) & mask.data).any():
                self.launch.fresh.add(line)
                if self.launch.substitute:
                    loaded.data = np.where(fresh, np.array(HUGE[size], bits.dtype), bits).view(loaded.data.dtype)
        return loaded

    def _store(self, builder, pointers, value, mask, *rest):
        real, mask, _ = self._access(pointers, mask, store=True)
        return _store(builder, real, value, mask, *rest)

    def _access(self, pointers, mask, *, store: bool):
        """Record an access. Return the real pointers, the mask without accesses out of bounds, and the source line."""
        launch, pointed = self.launch, np.asarray(pointers.data).astype(np.int64)
        active = np.broadcast_to(np.asarray(mask.data).astype(bool), pointed.shape).copy()
        line = launch.lines.setdefault(_line(), len(launch.lines))
        real, inside = np.zeros_like(pointed), np.zeros_like(active)
        argument = (pointed >> _SPACING) - 1
        for i in np.unique(argument[active]):
            here = active & (argument == i)
            if 0 <= i < len(launch.views):
                view = launch.views[i]
                distance = pointed - ((i + 1) << _SPACING) - (1 << _SPACING - 1)
                inside |= here & view.holds(distance)
                real = np.where(here, view.address + distance, real)
        if (active & ~inside).any():
            launch.report(f"a {'store' if store else 'load'} outside its tensor", np.array([line]))
        if not launch.substitute:
            self.counts["stores" if store else "loads"] += int(inside.sum())
        thread, itemsize = np.array([-1]), pointers.get_element_ty().primitive_bitwidth // 8
        if pointed.size > 1:
            block = launch.threads.setdefault((pointed.shape, itemsize), len(launch.threads))
            thread = np.arange(pointed.size) + (block << 32)
        kept = inside.reshape(-1)
        row = np.empty((5, int(kept.sum())), dtype=np.int64)
        row[0], row[2] = real.reshape(-1)[kept], thread[kept]
        row[1], row[3], row[4] = store, launch.epoch, line
        launch.rows.append(row)
        kept_mask = interpreter.TensorHandle(inside, interpreter.tl.int1)
        return interpreter.TensorHandle(real.astype(np.uint64), pointers.dtype), kept_mask, line


def summary(counts: Counter[str]) -> str:
    """Return a line with the counts of checks and findings."""
    checked = ", ".join(f"{counts[name]:,} {name}" for name in ("launches", "programs", "loads", "stores"))
    return f"sanitizer: {checked} checked; {counts['findings'] or 'no'} findings"


def _line() -> tuple[str, int]:
    """File and line of the kernel that is at work."""
    frame = sys._getframe(2)
    while frame.f_code.co_filename == __file__ or frame.f_globals.get("__name__", "").startswith("triton."):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _marking(allocate):
    """A factory of tensors whose fresh memory is marked."""

    def marked(*args, **kwargs):
        out = allocate(*args, **kwargs)
        size = out.element_size()
        if type(out) is torch.Tensor and out.device.type == "cpu" and size in FRESH and not out.is_complex():
            out.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[size]).fill_(FRESH[size])
        return out

    return marked


def _restore(storages, contents) -> None:
    for storage, content in zip(storages, contents):
        storage.copy_(content)


def _refuse_mixed(tensors: list[torch.Tensor]) -> None:
    """Elements are told apart by where they start, which takes one dtype for each memory."""
    dtypes: dict[int, torch.dtype] = {}
    for tensor in tensors:
        if dtypes.setdefault(tensor.untyped_storage().data_ptr(), tensor.dtype) != tensor.dtype:
            raise NotImplementedError("the sanitizer cannot follow one memory under two dtypes: pass separate tensors")


def _refuse_atomics(*_):
    raise NotImplementedError("the sanitizer has no rule for atomics: say in sanitizer.py when two programs may meet")

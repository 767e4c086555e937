"""A pair as token ids, and many of them in few large arrays."""

from __future__ import annotations

import hashlib
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

_IN_MEMORY = 8_000_000  # token ids that are kept before they go to a file


class Pair(NamedTuple):
    """Token ids of one pair. The prompt carries the BOS, each response its EOS. ``origin`` is what messages call it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    origin: str = ""

    @property
    def tokens(self) -> int:
        return len(self.prompt) + len(self.chosen) + len(self.rejected)


@dataclass(frozen=True)
class Store:
    """The pairs of one source. ``ids`` holds all token ids; ``rows`` (n, 5) has, of each pair, where prompt, chosen and
    rejected end in it, the line or row that ``origin`` names, and the index of what is wrong with it.
    """

    ids: NDArray[np.int32]
    rows: NDArray[np.int64]
    origin: Callable[[int], str]


class Pairs(Sequence[Pair]):
    """A sequence of pairs that takes 4 bytes a token, of a file that several processes share where there are many.

    An index makes a ``Pair``, a slice another such sequence.
    """

    def __init__(
        self, stores: list[Store], where: NDArray[np.int64], cuts: NDArray[np.int64], bos: int | None = None
    ) -> None:  # fmt: skip
        self._stores, self._where, self._cuts, self._bos = stores, where, cuts, bos

    @classmethod
    def of_stores(cls, stores: list[Store]) -> Pairs:
        """All pairs of ``stores``, one after the other."""
        where = [np.stack([np.full(len(s.rows), i), np.arange(len(s.rows))], 1) for i, s in enumerate(stores)]
        return cls(stores, np.concatenate(where), np.zeros(sum(map(len, where)), np.int64))

    @classmethod
    def of_lists(cls, pairs: Iterable[Pair | Sequence[Sequence[int]]], name: str) -> Pairs:
        """Pairs in memory; ``name`` and their number are the origin of those that have none."""
        given = [pair if isinstance(pair, Pair) else Pair(*map(list, pair), f"{name} pair {i}")  # type: ignore[arg-type, call-arg]
                 for i, pair in enumerate(pairs)]  # fmt: skip
        writer, origins = Writer(None), [pair.origin for pair in given]
        for number, pair in enumerate(given):
            writer.add(pair, number, 0)
        return cls.of_stores([writer.store(origins.__getitem__)])

    def __len__(self) -> int:
        return len(self._where)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice | NDArray[np.int64]) -> Pairs: ...
    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> Pair | Pairs:
        if isinstance(index, slice | np.ndarray):
            return Pairs(self._stores, self._where[index], self._cuts[index], self._bos)
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        prompt, chosen, rejected = (part.tolist() for part in self.arrays(index))
        return Pair(prompt, chosen, rejected, self.origin(index))

    def origin(self, index: int) -> str:
        """What messages call a pair."""
        i, row = self._where[index]
        return self._stores[i].origin(int(self._stores[i].rows[row, 3]))

    def arrays(self, index: int) -> list[NDArray[np.int32]]:
        """Token ids of prompt, chosen and rejected, without copies where the prompt is not cut."""
        i, row = self._where[index]
        store, cut = self._stores[i], int(self._cuts[index])
        bounds = [store.rows[row - 1, 2] if row else 0, *store.rows[row, :3]]
        parts = [store.ids[a:b] for a, b in zip(bounds, bounds[1:])]
        if cut:
            head = 1 if parts[0][0] == self._bos else 0
            parts[0] = np.delete(parts[0], slice(head, head + cut))
        return parts

    def __iter__(self) -> Iterator[Pair]:
        return (self[i] for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(n, 3) numbers of tokens of prompt, chosen and rejected."""
        lengths = np.zeros((len(self), 3), np.int64)
        for i, store in enumerate(self._stores):
            of_store = np.diff(store.rows[:, :3].reshape(-1), prepend=0).reshape(-1, 3)
            mine = self._where[:, 0] == i
            lengths[mine] = of_store[self._where[mine, 1]]
        lengths[:, 0] -= self._cuts
        return lengths

    @staticmethod
    def lengths_of(pairs: Sequence[Pair]) -> NDArray[np.int64]:
        """``lengths`` of any sequence of pairs."""
        return pairs.lengths if isinstance(pairs, Pairs) else np.array([[*map(len, pair[:3])] for pair in pairs])

    @cached_property
    def digest(self) -> str:
        """Hash of all token ids."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=16)
        for index in range(len(self)):
            for part in self.arrays(index):
                digest.update(part.data)
        return digest.hexdigest()

    @property
    def problems(self) -> list[int]:
        """What is wrong with each pair, as its store has it."""
        return [int(self._stores[i].rows[row, 4]) for i, row in self._where.tolist()]

    @cached_property
    def last_ids(self) -> set[int]:
        """The ids that end responses."""
        found: set[int] = set()
        for i, store in enumerate(self._stores):
            ends = store.rows[self._where[self._where[:, 0] == i, 1], 1:3]
            found |= set(store.ids[ends.reshape(-1) - 1].tolist())
        return found

    def cut(self, kept: Sequence[int], cuts: Sequence[int], bos: int | None) -> Pairs:
        """The pairs ``kept``; of their prompts, ``cuts`` tokens behind the BOS are left out."""
        index = np.asarray(kept, np.int64)
        return Pairs(self._stores, self._where[index], np.asarray(cuts, np.int64), bos)


class Writer:
    """Collects the pairs of a source; where they are many, in a file of ``folder``, if it is not None."""

    def __init__(self, folder: Path | None) -> None:
        self.folder, self.written = folder, 0
        self.ids, self.rows = array("i"), array("q")

    def add(self, pair: Pair, number: int, problem: int) -> None:
        for part in pair[:3]:
            self.ids.extend(part)
            self.rows.append(self.written + len(self.ids))
        self.rows.extend((number, problem))
        if self.folder is not None and len(self.ids) >= _IN_MEMORY:
            self._flush(self.folder)

    def _flush(self, folder: Path) -> None:
        with (folder / "ids.bin").open("ab") as file:
            self.ids.tofile(file)
        self.written += len(self.ids)
        self.ids = array("i")

    def store(self, origin: Callable[[int], str], final: Path | None = None) -> Store:
        """The pairs; those in a file are in the folder ``final`` from now on."""
        rows = np.array(self.rows, np.int64).reshape(-1, 5)
        if not self.written or self.folder is None or final is None:
            return Store(np.array(self.ids, np.int32), rows, origin)
        self._flush(self.folder)
        np.save(self.folder / "rows.npy", rows)
        shutil.rmtree(final, ignore_errors=True)
        self.folder.rename(final)
        return open_store(final, origin)


def open_store(folder: Path, origin: Callable[[int], str]) -> Store:
    """The pairs that a ``Writer`` left in ``folder``. Raises OSError or ValueError where a file is missing or cut."""
    rows, ids = np.load(folder / "rows.npy", mmap_mode="r"), np.memmap(folder / "ids.bin", np.int32, mode="r")
    if len(ids) != rows[-1, 2]:
        raise ValueError(f"{folder}: its files do not fit together")
    return Store(ids, rows, origin)

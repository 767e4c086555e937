"""Hold pairs as token ids in an Arrow table, which may be a file that several processes share."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock
from numpy.typing import NDArray

from .errors import Log

_IDS = ("prompt", "chosen", "rejected")
_ROWS = 1000  # made together: as Python objects they take much more memory than in a table
SCHEMA = pa.schema(
    {name: pa.list_(pa.int32()) for name in _IDS} | {"origin": pa.string(), "problem": pa.string(), "chat": pa.bool_()}
)


class Pair(NamedTuple):
    """Token ids of one pair. The prompt carries the BOS, each response its EOS. ``origin`` is what messages call it."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    origin: str = ""

    def row(self, problem: str = "", chat: bool = False) -> dict[str, Any]:
        ids = {name: np.array(getattr(self, name), np.int32) for name in _IDS}
        return {**ids, "origin": self.origin, "problem": problem, "chat": chat}


class Pairs(Sequence[Pair]):
    """The rows ``where`` of ``table``, 4 bytes a token. An index makes a ``Pair``, a slice another such sequence.

    The rows ``uncut`` hold the prompts as they were before they were cut.
    """

    def __init__(
        self, table: pa.Table, where: NDArray[np.int64] | None = None, uncut: NDArray[np.int64] | None = None
    ) -> None:
        self._table, self._ids = table, [table.column(name) for name in _IDS]
        self._where = np.arange(len(table)) if where is None else where
        self._uncut = self._where if uncut is None else uncut

    @classmethod
    def of_lists(cls, pairs: Iterable[Pair | Sequence[Sequence[int]]], name: str) -> Pairs:
        """``pairs`` as such a sequence; ``name`` and their number are the origin of those that have none."""
        if isinstance(pairs, Pairs):
            return pairs
        given = [
            pair if isinstance(pair, Pair) else Pair(*map(list, pair), f"{name} pair {i}")  # type: ignore[arg-type, call-arg]
            for i, pair in enumerate(pairs)
        ]
        return cls(pa.Table.from_pylist([pair.row() for pair in given], SCHEMA))

    def __len__(self) -> int:
        return len(self._where)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice | NDArray[np.int64]) -> Pairs: ...
    def __getitem__(self, index: int | slice | NDArray[np.int64]) -> Pair | Pairs:
        if isinstance(index, slice | np.ndarray):
            return Pairs(self._table, self._where[index], self._uncut[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        prompt, chosen, rejected = (part.tolist() for part in self.arrays(index))
        return Pair(prompt, chosen, rejected, self.origin(index))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None  # type: ignore[assignment]  # as a list

    def origin(self, index: int) -> str:
        """Return the name of a pair in messages."""
        return str(self._table.column("origin")[int(self._where[index])])

    def arrays(self, index: int) -> list[NDArray[np.int32]]:
        """Return the token ids of prompt, chosen and rejected, without copies."""
        return [ids[int(self._where[index])].values.to_numpy() for ids in self._ids]

    @property
    def prompt_hashes(self) -> list[int]:
        """Hashes of the prompts, with what is cut."""
        return [hash(self._ids[0][int(row)].values.to_numpy().tobytes()) for row in self._uncut]

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """(n, 3) numbers of tokens of prompt, chosen and rejected."""
        return np.stack([pc.list_value_length(ids).to_numpy()[self._where].astype(np.int64) for ids in self._ids], 1)

    @cached_property
    def digest(self) -> str:
        """Hash of all token ids."""
        digest = hashlib.blake2b(self.lengths.tobytes(), digest_size=16)
        for index in range(len(self)):
            for part in self.arrays(index):
                digest.update(part.data)
        return digest.hexdigest()

    @cached_property
    def last_ids(self) -> set[int]:
        """The ids that end responses."""
        return {int(part[-1]) for index in range(len(self)) for part in self.arrays(index)[1:]}

    @property
    def problems(self) -> list[str]:
        """Return what is wrong with each pair."""
        return self._table.column("problem").take(pa.array(self._where)).to_pylist()  # type: ignore[no-any-return]

    def cut(self, cuts: dict[int, int], bos: int | None) -> Pairs:
        """Return the pairs ``cuts``, each without that number of tokens of its prompt, behind the BOS."""
        uncut = self._where[[*cuts]]
        where, changed = uncut.copy(), [(at, index) for at, (index, count) in enumerate(cuts.items()) if count]
        tables = [self._table]
        for start in range(0, len(changed), _ROWS):  # rows of their own, behind those of the table
            rows: list[dict[str, Any]] = []
            for at, index in changed[start : start + _ROWS]:
                pair = self[index]
                head = 1 if pair.prompt[0] == bos else 0
                where[at] = len(self._table) + start + len(rows)
                rows.append(pair._replace(prompt=pair.prompt[:head] + pair.prompt[head + cuts[index] :]).row())
            tables.append(pa.Table.from_pylist(rows, SCHEMA))
        return Pairs(pa.concat_tables(tables), where, uncut)


def lengths_of(pairs: Sequence[Pair]) -> NDArray[np.int64]:
    """Return the token counts of prompts, chosen and rejected responses, (n, 3)."""
    return pairs.lengths if isinstance(pairs, Pairs) else np.array([[*map(len, pair[:3])] for pair in pairs])


def kept_table(
    folder: Path, key: str, batches: Callable[[], Iterable[pa.RecordBatch]], log: Log
) -> tuple[pa.Table, Path]:
    """Return the rows of ``batches`` as a file of ``folder``, mapped into memory, and that file.

    A file of that ``key`` is read if its contents have the hash in its name. Otherwise one process writes it while
    others wait. Raises OSError if the folder cannot be used.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{key}.lock"):
        for file in folder.glob(f"{key}-*.arrow"):
            if file.stem.endswith(file_hash(file)):
                return _mapped(file), file
            log(f"WARNING: {file} is damaged; its pairs are tokenised again")
            file.unlink()
        unfinished = folder / f"{key}.unfinished"
        try:
            with unfinished.open("wb") as content, pa.ipc.new_stream(content, SCHEMA) as writer:
                for batch in batches():
                    writer.write_batch(batch)
            file = unfinished.rename(folder / f"{key}-{file_hash(unfinished)}.arrow")
        finally:
            unfinished.unlink(missing_ok=True)
        return _mapped(file), file


def _mapped(file: Path) -> pa.Table:
    return pa.ipc.open_stream(pa.memory_map(str(file))).read_all()


def file_hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, partial(hashlib.blake2b, digest_size=16)).hexdigest()

"""Read the records of local files, folders and datasets of the hub, each with the name that messages give it."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from .errors import InputError, check_names, reading
from .text_files import COMPRESSIONS, read_records

_TABLES, _TEXTS = {".parquet", ".arrow"}, {".jsonl", ".json", ".ndjson", ".csv", ".tsv"}

_MOST_WEIGHT = 1000  # each pair so often: more is a mistake, and its indices would fill the memory


def local_path(name: str) -> str:
    """Return ``name`` with ``~`` and variables replaced, as a shell does. Raises InputError for a variable not set."""
    path = os.path.expandvars(os.path.expanduser(name))
    if (unset := re.search(r"\$(?:\w+|\{\w+\})", path)) and not Path(path).exists():
        raise InputError(f"{name}: the environment has no variable {unset[0]}; set it, or write the path out")
    return path


@dataclass(frozen=True)
class Source:
    """One of the sources of ``train_data`` or ``eval_data``.

    ``weight`` says how often each pair is used: 2 twice, 0.5 for half of the pairs, drawn by the run's seed.
    """

    path: str
    subset: str | None = None
    split: str | None = None
    revision: str | None = None
    weight: float = 1.0
    columns: dict[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """The suffix that tells a file's format, without that of its compression."""
        path = Path(self.path)
        return (path.with_suffix("") if self.compression else path).suffix.lower()

    @property
    def compression(self) -> str:
        suffix = Path(self.path).suffix.lower()
        return suffix if suffix in COMPRESSIONS else ""

    @property
    def name(self) -> str:
        return ":".join(filter(None, [self.path, self.subset, self.split]))


def parse_sources(given: Any, columns: dict[str, str] | None = None) -> list[Source]:
    """Return the sources that an option names: a string NAME[:SPLIT], a section, or a list of either.

    ``columns`` are those of a source without its own. Raises InputError for anything else.
    """
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):  # a well-formed value would be parsed already
        raise InputError(f"data source {given[:80]!r}: not a well-formed list or section; in YAML, write it unquoted")
    if isinstance(given, list | tuple):
        if not given:
            raise InputError("a list of data sources must name at least one")
        return [source for one in given for source in parse_sources(one, columns)]
    if isinstance(given, str):
        head, _, split = given.partition(":")
        is_path = "://" in given or Path(local_path(given)).exists()
        given = {"path": given} if is_path else {"path": head, "split": split}
    if not isinstance(given, dict) or not given.get("path") or not isinstance(given["path"], str):
        raise InputError(f"data source {given!r}: must be a string, or a section with path, or a list of these")
    path = local_path(given["path"])
    if "://" in path:
        raise InputError(f"data source {path}: URLs are not read; give the hub name ORG/NAME, or download the data")
    check_names(given, list(Source.__dataclass_fields__), f"of the data source {path}: ")
    values: dict[str, Any] = {"columns": columns or {}} | given | {"path": path}
    source = Source(**values)
    if not isinstance(source.columns, dict):
        raise InputError(f"{path}: columns={source.columns!r} must be a section: {{prompt: q, chosen: good}}")
    if not isinstance(source.weight, int | float) or source.weight is True or not 0 < source.weight <= _MOST_WEIGHT:
        raise InputError(f"{path}: weight={source.weight!r} must be a number above 0, at most {_MOST_WEIGHT}")
    check_names(source.columns, ["prompt", "chosen", "rejected", "tools"], "columns.")
    if twice := [name for name, count in Counter(source.columns.values()).items() if count > 1]:
        raise InputError(f"{path}: columns reads {twice[0]!r} for two columns of a pair; name another for one of them")
    return [source]


def check_source(source: Source) -> None:
    """Raise InputError for a local file that is not there; costs nothing, so that it can be asked first."""
    path = Path(source.path)
    local = source.kind in _TEXTS | _TABLES or source.compression or source.path[:1] in "./~"
    if local and not path.exists():
        raise InputError(f"{source.path}: no such file (working directory: {Path.cwd()})")
    if path.is_file() and (source.subset or source.split or source.revision):
        raise InputError(f"{source.path}: a file has no subset, split or revision")
    if path.is_dir() and (source.revision or (source.subset and _is_saved(path))):
        raise InputError(f"{source.path}: a local folder has no revision, and a saved dataset no subset")


def _is_saved(folder: Path) -> bool:
    """Return whether ``folder`` was written by save_to_disk."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def files_of(source: Source) -> list[Source]:
    """Return the text files that make up a local folder, so that messages name file and line; else ``source`` itself.

    Raises InputError for a folder in which a file of data belongs to no split, so that nothing would read it.
    """
    check_source(source)
    folder = Path(source.path)
    if not folder.is_dir() or _is_saved(folder):
        return [source]
    with reading(source.path, source.path):
        import datasets

        builder = datasets.load_dataset_builder(source.path, source.subset)
        splits = {str(split): [str(file) for file in files] for split, files in builder.config.data_files.items()}
    read = {os.path.realpath(file) for files in splits.values() for file in files}
    for file in sorted(folder.rglob("*")) if len(builder.builder_configs) == 1 else []:
        hidden = any(part[0] in "._" for part in file.relative_to(folder).parts)
        if Source(str(file)).kind in _TEXTS | _TABLES and not hidden and os.path.realpath(file) not in read:
            raise InputError(
                f"{source.path}: {file.relative_to(folder)} would not be read, for it is of another format than other "
                f"files, or of no split (splits: {_names(splits)}); list the files that you mean"
            )
    files = splits.get(source.split or "train", [])
    if not files or not all(Source(file).kind in _TEXTS for file in files):
        return [source]
    return [replace(source, path=file, subset=None, split=None) for file in files]


class Records:
    """The records of one source, read once from beginning to end. Raises InputError that names file and line."""

    def __init__(self, source: Source) -> None:
        check_source(source)
        self.source, self.name, self.identity = source, source.name, ""
        self.is_text = Path(source.path).is_file() and source.kind not in _TABLES
        if self.is_text:
            self.total, self.unit = Path(source.path).stat().st_size, "B"
        else:
            self.rows = _rows(source)
            self.total, self.unit, self.identity = len(self.rows), "pairs", self.rows._fingerprint

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any], int]]:
        """Yield a record's origin (line from 1, row from 0), its values, and how much of ``total`` is read."""
        path, place = Path(self.source.path), ":" if self.is_text else " row "
        rows = read_records(path, self.source.kind, self.source.compression) if self.is_text else self._table_rows()
        for number, values, done in rows:
            origin = f"{self.name}{place}{number}"
            yield origin, self._renamed(values, origin), done

    def _renamed(self, values: dict[str, Any], origin: str) -> dict[str, Any]:
        columns = {ours: theirs for ours, theirs in self.source.columns.items() if theirs in values}
        if missing := self.source.columns.keys() - columns.keys() - {"tools"}:  # few records may have tools
            name = self.source.columns[min(missing)]
            raise InputError(f"{origin}: no column {name!r} (found: {_names(values)}); see columns")
        others = {name: value for name, value in values.items() if name not in columns.values()}
        return others | {ours: values[theirs] for ours, theirs in columns.items()}

    def _table_rows(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        with reading(self.source.path, self.source.path):
            for at, values in enumerate(self.rows):
                yield at, {name: _without_nulls(value) for name, value in values.items()}, at + 1


def _rows(source: Source) -> Any:
    """The ``datasets.Dataset`` of a Parquet or Arrow file, a folder, or a dataset of the hub."""
    import datasets  # slow to import, and text files do without

    path = Path(source.path)
    with reading(source.path, source.path):
        if path.is_file():
            if source.kind == ".parquet" and not pq.read_metadata(path).num_rows:  # datasets fails on such a file
                raise InputError(f"{source.path}: holds no record")
            return datasets.load_dataset(source.kind[1:], data_files=str(path), split="train")
        if not _is_saved(path):
            return datasets.load_dataset(
                source.path, source.subset, split=source.split or "train", revision=source.revision
            )
        saved = datasets.load_from_disk(str(path))
    if not isinstance(saved, datasets.DatasetDict):
        if source.split:
            raise InputError(f"{source.path}: was saved without splits; leave out {source.split!r}")
        return saved
    split = source.split or ("train" if "train" in saved or len(saved) > 1 else next(iter(saved)))
    if split not in saved:
        raise InputError(f"{source.path}: has no split {split!r} (found: {_names(saved)}); write PATH:SPLIT")
    return saved[split]


def _without_nulls(value: Any) -> Any:
    """``value`` without the keys that Arrow adds, as None, to messages that lack what others have."""
    if isinstance(value, list):
        return [_without_nulls(one) for one in value]
    if isinstance(value, dict):
        return {name: _without_nulls(one) for name, one in value.items() if one is not None}
    return value


def _names(values: Any) -> str:
    return ", ".join(map(repr, values)) or "none"

"""Records of a data source: local files, folders and datasets of the hub, each record with what messages call it."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import math
import os
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from .errors import InputError, NotAtHandError, check_names

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
_TABLES = {".parquet": "parquet", ".arrow": "arrow"}
_TEXTS = {".jsonl", ".json", ".ndjson", ".csv", ".tsv"}
_BATCH = 1000
_DECODER, _SPACE = json.JSONDecoder(), re.compile(r"\s*")


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
        return (path.with_suffix("") if path.suffix in _OPENERS else path).suffix.lower()


class Record(NamedTuple):
    """``number`` is a line, from 1, or a row, from 0; ``done`` counts up to ``Records.total``."""

    number: int
    values: dict[str, Any]
    done: int


def parse_sources(given: Any, columns: dict[str, str] | None = None) -> list[Source]:
    """Return the sources that an option names: a string NAME[:SPLIT], a section, or a list of either.

    ``columns`` are those of a source without its own. Raises InputError for anything else.
    """
    if isinstance(given, str) and given.lstrip()[:1] in ("[", "{"):
        try:
            given = json.loads(given)
        except ValueError as error:
            raise InputError(f"data source {given[:80]!r}: not JSON ({error})") from None
    if isinstance(given, list | tuple):
        if not given:
            raise InputError("a list of data sources must name at least one")
        return [source for one in given for source in parse_sources(one, columns)]
    if isinstance(given, str):
        path = os.path.expandvars(os.path.expanduser(given))
        head, _, split = path.partition(":")
        section: dict[str, Any] = {"path": path} if Path(path).exists() or "://" in path else {"path": head}
        return [_source(section | ({"split": split} if split and section["path"] == head else {}), columns)]
    if not isinstance(given, dict) or not given.get("path"):
        raise InputError(f"data source {given!r}: must be a string, or a section with path, or a list of these")
    return [_source(given | {"path": os.path.expandvars(os.path.expanduser(str(given["path"])))}, columns)]


def _source(section: dict[str, Any], columns: dict[str, str] | None) -> Source:
    check_names(section, list(Source.__dataclass_fields__), f"of the data source {section['path']}: ")
    source = Source(**({"columns": columns or {}} | section))
    if not isinstance(source.weight, int | float) or source.weight is True or not 0 < source.weight < math.inf:
        raise InputError(f"{source.path}: weight={source.weight!r} must be a number above 0")
    check_names(source.columns, ["prompt", "chosen", "rejected", "tools"], "columns.")
    return source


def check_source(given: Any) -> None:
    """Raise InputError for a local file that is not there; costs nothing, so that it can be asked first."""
    for source in parse_sources(given):
        path = Path(source.path)
        local = source.kind in {*_TEXTS, *_TABLES} or path.suffix in {*_OPENERS, ".zst"} or source.path[:1] in "./~"
        if local and not path.exists():
            raise InputError(f"{source.path}: no such file (working directory: {Path.cwd()})")
        if path.is_file() and (source.subset or source.split or source.revision):
            raise InputError(f"{source.path}: a file has no subset, split or revision")


class Records:
    """The records of one source, read once from beginning to end. Raises InputError that names file and line."""

    def __init__(self, source: Source) -> None:
        check_source({"path": source.path})
        self.source = source
        self.is_text = Path(source.path).is_file() and source.kind not in _TABLES
        if self.is_text:
            self.total, self.unit = Path(source.path).stat().st_size, "B"
            self.identity = ""
        else:
            self.rows = _rows(source)
            self.total, self.unit = len(self.rows), "pairs"
            self.identity = self.rows._fingerprint

    def origin(self, number: int) -> str:
        return f"{self.name}:{number}" if self.is_text else f"{self.name} row {number}"

    @property
    def name(self) -> str:
        return ":".join(filter(None, [self.source.path, self.source.subset, self.source.split]))

    def __iter__(self) -> Iterator[Record]:
        rows = self._text_rows() if self.is_text else self._table_rows()
        for number, values, done in rows:
            if self.source.columns:
                values = self._renamed(values, number)
            yield Record(number, values, done)

    def _renamed(self, values: dict[str, Any], number: int) -> dict[str, Any]:
        for ours, theirs in self.source.columns.items():
            if theirs not in values and not (ours == "prompt" and "prompt" not in values):
                raise InputError(f"{self.origin(number)}: no column {theirs!r} (found: {_names(values)}); see columns")
        taken = set(self.source.columns.values())
        named = {ours: values[theirs] for ours, theirs in self.source.columns.items() if theirs in values}
        return {name: value for name, value in values.items() if name not in taken} | named

    def _table_rows(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        for start in range(0, len(self.rows), _BATCH):
            columns = self.rows[start : start + _BATCH]
            for at, values in enumerate(zip(*columns.values()), start):
                yield at, {name: _without_nulls(value) for name, value in zip(columns, values)}, at + 1

    def _text_rows(self) -> Iterator[tuple[int, dict[str, Any], int]]:
        path = Path(self.source.path)
        with path.open("rb") as raw, cast(BinaryIO, _OPENERS.get(path.suffix, lambda file: file)(raw)) as file:
            try:
                if self.source.kind in (".csv", ".tsv"):
                    rows = self._csv(file)
                else:
                    rows = self._json(file)
                for number, values in rows:
                    yield number, values, raw.tell()
            except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
                raise InputError(f"{path}: cannot be decompressed ({error}); is the file complete?") from None

    def _json(self, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
        first = True
        for number, line in enumerate(file, 1):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not line.strip():
                continue
            if first and line.lstrip()[:1] == b"[":
                yield from self._json_list(line + file.read(), number)
                return
            first = False
            try:
                values = json.loads(line.strip())
            except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
                where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
                raise InputError(
                    f"{self.origin(number)}: not a line of JSON ({where}); one JSON object per line, or one JSON list"
                ) from None
            if not isinstance(values, dict):
                raise InputError(f"{self.origin(number)}: must be a JSON object, one per line")
            yield number, values

    def _json_list(self, content: bytes, number: int) -> Iterator[tuple[int, dict[str, Any]]]:
        """Records of one JSON list; each has the number of the line where it begins."""
        first = number
        try:
            text = content.decode()
            at, counted = text.index("[") + 1, 0
            while True:
                at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # matches nothing, too
                number, counted = number + text.count("\n", counted, at), at
                if text[at : at + 1] == "]":
                    break
                values, at = _DECODER.raw_decode(text, at)
                if not isinstance(values, dict):
                    raise InputError(f"{self.origin(number)}: each entry of the list must be a JSON object")
                yield number, values
                at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
                if text[at : at + 1] not in (",", "]"):
                    raise json.JSONDecodeError("expected ',' or ']'", text, at)
                at += text[at] == ","
            if text[at + 1 :].strip():
                raise json.JSONDecodeError("the list is followed by more text", text, at)
        except InputError:
            raise
        except (ValueError, RecursionError) as error:
            if isinstance(error, json.JSONDecodeError):
                number = first + error.lineno - 1
            raise InputError(f"{self.origin(number)}: not a JSON list ({error})") from None

    def _csv(self, file: BinaryIO) -> Iterator[tuple[int, dict[str, Any]]]:
        csv.field_size_limit(2**31 - 1)
        reader = csv.DictReader(
            io.TextIOWrapper(file, encoding="utf-8-sig", newline=""),
            delimiter="\t" if self.source.kind == ".tsv" else ",", strict=True,
        )  # fmt: skip
        number = 2
        try:
            for values in reader:
                if None in values or None in values.values():
                    raise InputError(f"{self.origin(number)}: has not as many cells as the first line")
                yield number, values
                number = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise InputError(f"{self.origin(number)}: not a line of CSV ({error})") from None


def _rows(source: Source) -> Any:
    """The ``datasets.Dataset`` of a Parquet or Arrow file, a folder, or a dataset of the hub."""
    import datasets  # slow to import, and text files do without

    path = Path(source.path)
    try:
        if source.kind == ".arrow":
            return datasets.Dataset.from_file(str(path))
        if path.is_file():
            return datasets.load_dataset("parquet", data_files=str(path), split="train")
        if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
            return datasets.load_dataset(
                source.path, source.subset, split=source.split or "train", revision=source.revision
            )
        saved = datasets.load_from_disk(str(path))
    except Exception as error:  # each way to fail has a class of its own: network, missing, gated, split, format
        problem = " ".join(str(error).split())[:400]
        local = f"{source.path}: could not be read as data"
        hub = f"{source.path}: neither a local file nor a dataset that could be loaded"
        remedy = "" if path.exists() else "; offline, give a local file (.jsonl, .json, .csv, .parquet) or folder"
        raise (InputError if path.is_file() else NotAtHandError)(
            f"{local if path.exists() and not source.split else hub} ({type(error).__name__}: {problem}){remedy}"
        ) from None
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

"""Read records of JSON lines, JSON lists and CSV, compressed or not, each with the line where it begins."""

from __future__ import annotations

import csv
import io
import json
import lzma
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from .errors import InputError

COMPRESSIONS = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".xz": "xz"}
_BINARY = re.compile(rb"[\0-\x08\x0e-\x1f]")  # in no text, but within the first bytes of anything else


def read_records(path: Path, kind: str, compression: str) -> Iterator[tuple[int, dict[str, Any], int]]:
    """Yield the line, the values and the number of bytes of ``path`` that are read, of each record.

    ``kind`` is the format's suffix, ``compression`` one of ``COMPRESSIONS`` or empty. Raises InputError with the line.
    """
    with path.open("rb") as raw:
        try:
            file = _decompressed(raw, compression)
            head = file.peek(64)[:64]
            if _BINARY.search(head):
                raise InputError(
                    f"{path}: is not UTF-8 text; save text as UTF-8, unpack archives, and end names in their format: "
                    f"{', '.join(COMPRESSIONS)} or .parquet"
                )
            file.read(3 if head[:3] == b"\xef\xbb\xbf" else 0)
            rows = _csv(path, file, "\t" if kind == ".tsv" else ",") if kind in (".csv", ".tsv") else _json(path, file)
            for number, values in rows:
                yield number, values, raw.tell()
        except (EOFError, OSError, lzma.LZMAError) as error:
            raise InputError(f"{path}: cannot be decompressed ({error}); is the file complete?") from None


def _decompressed(raw: Any, compression: str) -> Any:
    if not compression:
        return raw
    if compression == ".xz":
        return lzma.open(raw)
    return io.BufferedReader(pa.input_stream(raw, compression=COMPRESSIONS[compression]))  # type: ignore[arg-type]


def _unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(items)
    if len(values) < len(items):
        names = [name for name, _ in items]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} appears twice; keep one")
    return values


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _json(path: Path, file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    first = True
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        if first and line.lstrip()[:1] == b"[":
            yield from _json_list(path, line + file.read(), number)
            return
        first = False
        try:
            values = _DECODER.decode(line.decode())
        except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
            where = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            raise InputError(f"{path}:{number}: not JSON ({where}); write an object per line, or one list") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}:{number}: must be a JSON object, one per line")
        yield number, values


def _json_list(path: Path, content: bytes, first: int) -> Iterator[tuple[int, dict[str, Any]]]:
    number, end = first, 0
    try:
        text = content.decode()
        for entry in json.loads(text):
            if not isinstance(entry, dict):
                raise InputError(f"{path}:{number}: each entry of the list must be a JSON object")
            begin = text.index("{", end)
            number += text.count("\n", end, begin)
            values, end = _DECODER.raw_decode(text, begin)  # tells where the entry ends, and refuses duplicate keys
            yield number, values
            number += text.count("\n", begin, end)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        number = first + error.lineno - 1 if isinstance(error, json.JSONDecodeError) else number
        raise InputError(f"{path}:{number}: not a JSON list ({error})") from None


def _csv(path: Path, file: Any, delimiter: str) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    rows = csv.reader((line.decode() for line in file), delimiter=delimiter, strict=True)
    number = 1
    try:
        names = next(rows, [])
        if len(set(names)) < len(names):
            raise InputError(f"{path}:1: two columns have the same name ({', '.join(names)}); rename one")
        number = rows.line_num + 1
        for cells in rows:
            if cells and len(cells) != len(names):
                raise InputError(f"{path}:{number}: has not as many cells as the first line")
            if cells:
                yield number, dict(zip(names, cells))
            number = rows.line_num + 1
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{rows.line_num + 1}: not a line of CSV in UTF-8 ({error})") from None
    except csv.Error as error:
        raise InputError(f"{path}:{number}: not a line of CSV ({error})") from None

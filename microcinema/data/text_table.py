"""Lists as texts: the columns of a CSV, TSV, JSONL or Parquet file, in which no value is taken for a number, a date or a missing one."""

import codecs
import csv
import json
import mmap
import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from microcinema.utils.errors import UserError, user_errors

FORMATS = {".csv": ",", ".tsv": "\t", ".jsonl": "", ".parquet": ""}
"""Delimiters by suffix."""
TEXT = pa.large_string()
_BATCH = 1 << 16  # records of a JSONL file that are Python objects at one time
_DECODER = json.JSONDecoder(parse_int=str, parse_float=str, parse_constant=lambda _: None)  # numbers as written, no NaN


def read_texts(path: str | os.PathLike[str], names: Iterable[str]) -> tuple[pa.Table, list[str]]:
    """Those of the named columns that a list has, as large strings, and the names of all its columns.

    A missing value is the empty text: null, a key that a JSON object lacks, NaN where Parquet or JSON have a number. A TSV file is read
    without quoting if a quote in it could not come from a writer that quotes. A UserError if it cannot be read, or is unlike its kind; the
    first line that is unlike it is named.
    """
    path, names = Path(path), list(dict.fromkeys(names))
    kind = path.suffix.lower()
    if kind not in FORMATS:
        raise UserError(f"list '{path}' is of no known format; give one of {', '.join(FORMATS)}")
    advice = f"give a {kind[1:].upper()} file in UTF-8"
    with user_errors(f"list '{path}' cannot be read ({{reason}}); {advice}"):
        if kind == ".jsonl":
            return _read_jsonl(path, names)
        return _read_parquet(path, names) if kind == ".parquet" else _read_csv(path, names, FORMATS[kind])


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object whose numbers are texts, as written, and whose NaNs are None; a ValueError if it is none."""
    try:
        record = _DECODER.decode(data.decode("utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    return record


def text_of(record: dict[str, Any], name: str) -> str:
    """A value of `parse_object` as text, empty if it is missing; a ValueError if it is a list, an object, true or false."""
    value = record.get(name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is {json.dumps(value)[:40]}, which is no text")
    value.isascii() or value.encode()  # half of a surrogate pair is an error, which is a ValueError
    return value


def _read_jsonl(path: Path, names: list[str]) -> tuple[pa.Table, list[str]]:
    available: dict[str, Any] = {}

    def rows() -> Iterator[list[str]]:
        with open(path, "rb") as file:  # its lines end at \n alone
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.isspace():
                    continue
                try:
                    record = parse_object(line)
                    if not available.keys() >= record.keys():
                        available.update(record)
                    yield [text_of(record, name) for name in names]
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from None

    remaining, batches = rows(), []
    while batch := list(islice(remaining, _BATCH)):
        columns = [pa.array(column, TEXT) for column in zip(*batch, strict=True)]
        batches.append(pa.RecordBatch.from_arrays(columns, names))
    table = pa.Table.from_batches(batches, pa.schema([(name, TEXT) for name in names]))
    return table.select([name for name in names if name in available]), list(available)


def _read_parquet(path: Path, names: list[str]) -> tuple[pa.Table, list[str]]:
    available = pyarrow.parquet.read_schema(path).names
    selected = _select(names, available)
    table = pyarrow.parquet.read_table(path, columns=selected)
    return pa.table([_as_texts(name, table.column(name)) for name in selected], names=selected), available


def _as_texts(name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_nested(column.type) or pa.types.is_temporal(column.type) or pa.types.is_boolean(column.type):
        raise ValueError(f"column '{name}' is of type {column.type}, not of texts")
    if pa.types.is_floating(column.type):  # whole numbers, if some are missing: pandas knows no other way
        column = pc.if_else(pc.is_nan(column), None, column).cast(pa.int64())
    return pc.fill_null(column.cast(TEXT), "")


def _read_csv(path: Path, names: list[str], delimiter: str) -> tuple[pa.Table, list[str]]:
    with open(path, "rb") as file:
        header = re.split("[\r\n]", file.readline().decode("utf-8-sig"))[0]
    if "\0" in header:
        raise ValueError("line 1 is no text")
    available = next(csv.reader([header], delimiter=delimiter))
    selected = _select(names, available)
    if not selected:
        return pa.table({}), available
    line = _stray_quote(path, delimiter.encode(), len(available))
    if line is not None and delimiter == ",":
        raise ValueError(f"line {line}: a quote opens a value and does not close it as a CSV writer would")
    return pyarrow.csv.read_csv(
        path,
        pyarrow.csv.ReadOptions(use_threads=False),  # with threads an error names no row
        pyarrow.csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, quote_char=False if line else '"'),
        pyarrow.csv.ConvertOptions(include_columns=selected, column_types=dict.fromkeys(selected, TEXT)),
    ), available


def _select(names: list[str], available: list[str]) -> list[str]:
    for name in names:
        if available.count(name) > 1:
            raise ValueError(f"column '{name}' occurs twice")
    return [name for name in names if name in available]


def _stray_quote(path: Path, delimiter: bytes, num_columns: int) -> int | None:
    """The first line on which a quote begins a value that does not end as a quoted one does, or that runs over lines which would all be rows."""
    quoted = re.compile(b'"[^"]*(?:""[^"]*)*"(?=[\r\n' + delimiter + b"]|\\Z)")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        position = data.find(b'"')
        while position >= 0:
            end = position + 1
            if data[position - 1 : position] in (delimiter, b"\n", b"\r"):
                match = quoted.match(data, position)
                end = match.end() if match else end
                first, last = data.rfind(b"\n", 0, position) + 1, data.find(b"\n", end) % (len(data) + 1)
                lines = data[first:last].splitlines() if b"\n" in data[position:end] else [b""]
                are_rows = num_columns > 1 and all(line.count(delimiter) == num_columns - 1 for line in lines)
                if match is None or are_rows:
                    return data[:position].count(b"\n") + 1
            position = data.find(b'"', end)
    return None

"""Lists are read as the texts that they hold, or refused with the first line that is unlike their kind."""

import csv
import json
import random
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from microcinema.data.text_table import FORMATS, read_texts
from microcinema.utils.errors import UserError

TRICKY = [
    "2021-01-01",
    "1e5",
    "007",
    "1.50",
    "NaN",
    "null",
    "NA",
    "true",
    " x ",
    "\u2028",
    "a\u0085b",
    "a\x0cb",
    "12:30",
    "-",
]


def write(path: Path, rows: list[tuple[str, str]], **options) -> Path:
    names = ("file", "text")
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.table(dict(zip(names, zip(*rows, strict=True), strict=True))), path)
    elif path.suffix == ".jsonl":
        records = (dict(zip(names, row, strict=True)) for row in rows)
        path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=FORMATS[path.suffix], **options).writerows([names, *rows])
    return path


def read(path: Path) -> list[tuple[str, str]]:
    return [(row["file"], row["text"]) for row in read_texts(path, ("text", "file"))[0].to_pylist()]


@pytest.mark.parametrize("suffix", FORMATS)
def test_texts_that_look_like_something_else_stay_as_they_are(tmp_path, suffix):
    rows = [(f"{k}.mp4", text) for k, text in enumerate(TRICKY)]
    assert read(write(tmp_path / f"list{suffix}", rows)) == rows
    (tmp_path / f"list{suffix}").rename(tmp_path / f"LIST{suffix.upper()}")
    assert read(tmp_path / f"LIST{suffix.upper()}") == rows


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
def test_what_a_writer_quotes_is_read_back(tmp_path, suffix, quoting):
    """Quotes, line ends and delimiters at random, except those lines within a value that would pass for whole rows."""
    rng = random.Random(0)
    texts = ["".join(rng.choices(alphabet, k=rng.randint(1, 12))) for alphabet in ('"\n\ra é', '",\t a') * 100]
    rows = [(f"{k}.mp4", text) for k, text in enumerate(texts)]
    assert read(write(tmp_path / f"list{suffix}", rows, quoting=quoting)) == rows


STRAY = [
    ['"hello she said', "c", "d", 'a screen of 5"', "last"],
    ['"hello she said', "c", "last"],
    ['"hello" she said', 'the "red" star', "last"],
    ['""hello"" she said', "last"],
    ['"', "c", '"', "last"],
]


@pytest.mark.parametrize("texts", STRAY)
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_stray_quote_swallows_no_row(tmp_path, texts, end):
    rows = [("a.mp4", "first"), *((f"{k}.mp4", text) for k, text in enumerate(texts))]
    for delimiter, name in ((",", "list.csv"), ("\t", "list.tsv")):
        lines = [delimiter.join(row) for row in [("file", "text"), *rows]]
        (tmp_path / name).write_text(end.join(lines) + end, newline="")
    assert read(tmp_path / "list.tsv") == rows
    with pytest.raises(
        UserError, match=r"list.csv' cannot be read \(line 3: a quote opens a value and does not close it"
    ):
        read(tmp_path / "list.csv")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "Expecting property name"),
        (b'["b.mp4", "x"]', "it is no JSON object"),
        (b'"b.mp4"', "it is no JSON object"),
        (b'{"file": "b.mp4", "text": ["x", "y"]}', r"'text' is \[\"x\", \"y\"\], which is no text"),
        (b'{"file": "b.mp4", "text": {"en": "x"}}', "'text' is .*, which is no text"),
        (b'{"file": "b.mp4", "text": true}', "'text' is true, which is no text"),
        (b'{"file": "b.mp4", "text": "\\ud83d"}', "surrogates not allowed"),
        (b'{"file": "b.mp4", "text": "\xff"}', "invalid start byte"),
        (b'{"a":' * 100_000, "it is nested too deeply"),
        (b"file,text", "Expecting value"),
    ],
)
def test_the_first_line_that_is_no_record_is_named(tmp_path, line, reason):
    path = write(tmp_path / "list.jsonl", [("a.mp4", "x")])
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n{\n")
    with pytest.raises(UserError, match=rf"list.jsonl' cannot be read \(line 3: .*{reason}"):
        read(path)


def test_numbers_of_json_are_texts_and_nan_is_missing(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"file": 12345678901234567890123, "text": 1.50}\r\n{"text": NaN, "other": [1]}\n{"file": null, "text": 1e5}'
    )
    assert read(tmp_path / "a.jsonl") == [("12345678901234567890123", "1.50"), ("", ""), ("", "1e5")]
    assert read_texts(tmp_path / "a.jsonl", ("none",))[1] == ["file", "text", "other"]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pa.array([17.0, float("nan"), None, 1234567890123.0]), ["17", "", "", "1234567890123"]),
        (pa.array([17, None]), ["17", ""]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", "", "a"]),
        (pa.array([None, None]), ["", ""]),
        (pa.array([["a", "b"]]), None),
        (pa.array([{"en": "a"}]), None),
        (pa.array([date(2021, 1, 1)]), None),
        (pa.array([True]), None),
        (pa.array([1.5]), None),
    ],
)
def test_columns_of_parquet_that_are_no_texts(tmp_path, values, texts):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pa.table({"text": values, "unread": [[1]] * len(values)}), path)
    if texts is None:
        with pytest.raises(UserError, match="a.parquet' cannot be read .(column 'text' is of type|Float value 1.5)"):
            read_texts(path, ["text"])
    else:
        assert read_texts(path, ["text"])[0].column("text").to_pylist() == texts


def test_a_line_unlike_the_others_is_named(tmp_path):
    for line, reason in (
        (b"b.mp4,two,\n", "Row #3: Expected 2 columns, got 3: b.mp4,two,"),
        (b"b,\xe9\n", "Row #3: .*UTF8"),
    ):
        (tmp_path / "a.csv").write_bytes(b"file,text\na.mp4,one\n" + line + b"c,d\n")
        with pytest.raises(UserError, match=reason):
            read(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_text("file,text,text\na,b,c\n")
    with pytest.raises(UserError, match="column 'text' occurs twice"):
        read(tmp_path / "a.csv")

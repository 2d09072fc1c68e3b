"""Lists in every format, with columns of any name."""

import csv
import json
import pickle
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from microcinema.data.metadata import read_rows
from microcinema.data.text_table import FORMATS
from microcinema.utils.errors import UserError

RECORDS = [
    {"path": "a/1.mp4", "text": 'A "red" star,\nmoving', "long": "A large red star", "how": "to the left"},
    {"path": "b/2.mp4", "text": "Ein Herz, schön", "long": "", "how": None},
]
COLUMNS = {"file": "path", "caption": "text", "description": "long", "motion": "how"}


def write(path: Path, records: list[dict]) -> Path:
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    else:
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, records[0], delimiter=FORMATS[path.suffix])
            writer.writeheader()
            writer.writerows(records)
    return path


@pytest.mark.parametrize("suffix", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path, suffix):
    rows = read_rows(write(tmp_path / f"list{suffix}", RECORDS), COLUMNS)
    assert list(rows) == [
        {
            "id": "a/1.mp4",
            "file": "a/1.mp4",
            "page_dir": "",
            "caption": 'A "red" star,\nmoving',
            "description": "A large red star",
            "motion": "to the left",
        },
        {
            "id": "b/2.mp4",
            "file": "b/2.mp4",
            "page_dir": "",
            "caption": "Ein Herz, schön",
            "description": "Ein Herz, schön",  # empty ones stand for nothing
            "motion": "Ein Herz, schön",
        },
    ]
    assert list(pickle.loads(pickle.dumps(rows))) == list(rows)
    assert list(rows.take([1])) == [rows[1]]


@pytest.mark.parametrize("suffix", FORMATS)
def test_numbers_become_text_and_texts_stay_as_they_are(tmp_path, suffix):
    records = [{"id": 17, "caption": "x"}, {"id": 18, "caption": "007"}]
    rows = read_rows(write(tmp_path / f"list{suffix}", records), {})
    assert [row["id"] for row in rows] == ["17", "18"]
    assert rows[1]["caption"] == "007"


@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize(
    "columns, said",
    [
        ({"caption": "text"}, "lacks column id or file .it has: path, text, long, how"),
        ({"file": "path"}, "lacks column caption .it has: path, text, long, how"),
        ({"file": "path", "caption": "txet"}, "lacks column txet .it has: path, text, long, how"),
        ({**COLUMNS, "motion": "motions"}, "lacks column motions"),
        ({"captions": "text"}, "columns has no 'captions'; choose from id, file"),
    ],
)
def test_a_missing_column_is_named_beside_those_found(tmp_path, suffix, columns, said):
    with pytest.raises(UserError, match=said):
        read_rows(write(tmp_path / f"list{suffix}", RECORDS), columns)


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_damaged_list_is_named(tmp_path, suffix):
    (tmp_path / f"list{suffix}").write_bytes(b'id,caption\n1,\xff\xfe\n{"}')
    with pytest.raises(UserError, match=f"list{suffix}' (cannot be read|lacks column)"):
        read_rows(tmp_path / f"list{suffix}", {})
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path / f"none{suffix}", {})
    with pytest.raises(UserError, match=r"no known format; give one of \.csv"):
        read_rows(tmp_path / "list.xlsx", {})


def test_a_row_of_the_wrong_length_is_named(tmp_path):
    (tmp_path / "list.csv").write_text("id,caption,x\n1,one,x\n2,two\n")
    with pytest.raises(UserError, match=r"Expected 3 columns, got 2: 2,two"):
        read_rows(tmp_path / "list.csv", {})


def test_a_long_list_takes_little_more_than_its_text(tmp_path):
    count, text = 20_000, "aerial shot of a forest in winter"
    (tmp_path / "list.csv").write_text("videoid,name\n" + "".join(f"{k},{text} {k}\n" for k in range(count)))
    tracemalloc.start()
    rows = read_rows(tmp_path / "list.csv")
    python, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    size = (tmp_path / "list.csv").stat().st_size
    assert rows.table.nbytes < size + 2 * 9 * count  # an offset of eight bytes a text
    assert python < size / 10  # and hardly any Python objects, which would be copied into every worker process
    assert rows[count - 1]["caption"] == f"{text} {count - 1}"


@pytest.mark.parametrize("suffix", FORMATS)
def test_a_row_without_id_and_file_is_named(tmp_path, suffix):
    rows = [{"id": "a", "file": "", "caption": "x"}, {"id": "", "file": "b.mp4", "caption": "y"}]
    read = read_rows(write(tmp_path / f"list{suffix}", rows), {})
    assert [row["id"] for row in read] == read.keys().to_pylist() == ["a", "b.mp4"]
    for bad in ([*rows, {"id": "", "file": "", "caption": "z"}], [{"id": k, "caption": "x"} for k in ("a", "b", "")]):
        with pytest.raises(UserError, match=f"row 3 of list '.*list{suffix}' has neither an id nor a file"):
            read_rows(write(tmp_path / f"list{suffix}", bad), {})

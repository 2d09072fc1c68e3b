"""Prompts files and what becomes of them."""

import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

from microcinema.data.text_table import FORMATS
from microcinema.pipelines.prompts import read_prompt_items
from microcinema.utils.errors import UserError


def test_items_of_a_text_file_and_of_a_folder_of_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("A star!\n\na moon\n")
    items = read_prompt_items(None, None, str(tmp_path / "prompts.txt"), None, 7, 2)
    assert [item.id for item in items] == ["0000-a-star-0", "0000-a-star-1", "0001-a-moon-0", "0001-a-moon-1"]
    assert [(item.seed, item.sample_index, item.video_index) for item in items] == [
        (7, 0, 0),
        (7, 0, 1),
        (7, 1, 0),
        (7, 1, 1),
    ]
    images = tmp_path / "images"
    images.mkdir()
    for name in ("10", "9"):
        Image.new("RGB", (8, 8)).save(images / f"{name}.png")
    items = read_prompt_items(None, None, str(tmp_path / "prompts.txt"), str(images), 7, 1)
    assert [item.image.name for item in items] == ["9.png", "10.png"]
    with pytest.raises(UserError, match="2 images for 1"):
        read_prompt_items("a star", None, None, str(images), 7, 1)


def test_images_and_motion_prompts_of_a_file_are_its_own(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,image,motion_prompt,keyframe_prompt\na star,x.png,up,red\na moon,,,\n")
    first, second = read_prompt_items(None, "down", str(tmp_path / "p.csv"), None, 0, 1)
    assert (first.image, first.motion_prompt, first.keyframe_prompt) == (tmp_path / "x.png", "up", "red")
    assert (second.image, second.motion_prompt, second.keyframe_prompt) == (None, "down", None)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text\na\n", "no column 'prompt'"),
        ("prompt,size\na,b\n", "column 'size' is unknown"),
        ("prompt\n", "holds no prompts"),
        ("", "no column 'prompt'"),
        ('prompt\n"  "\n', "prompt 1 is empty"),
        ("prompt,id\na,x\nb,x\n", "id 'x' occurs twice"),
        ("prompt,id\na,../x\n", r"'\.\./x' cannot be a file name"),
        ("prompt,id\na,x_keyframe\n", "'x_keyframe' is reserved for a key frame"),
        ("prompt,seed\na,minus\n", "seed 'minus'"),
        ("prompt\na, b\n", "Expected 1 columns, got 2: a, b"),
    ],
)
def test_bad_prompts_files_are_named(tmp_path, content, words):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        read_prompt_items(None, None, str(tmp_path / "p.csv"), None, 0, 1)


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00prompt")
    with pytest.raises(UserError, match="p.csv' cannot be read .'utf-8' codec"):
        read_prompt_items(None, None, str(tmp_path / "p.csv"), None, 0, 1)
    with pytest.raises(UserError, match="No such file"):
        read_prompt_items(None, None, str(tmp_path / "gone.csv"), None, 0, 1)
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe\x00prompt")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompt_items(None, None, str(tmp_path / "p.txt"), None, 0, 1)
    with pytest.raises(UserError, match=r"p.json' is of no known format; give one of .txt, .csv, .tsv"):
        read_prompt_items(None, None, str(tmp_path / "p.json"), None, 0, 1)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
def test_a_prompt_ends_with_its_line_and_nowhere_else(tmp_path, separator):
    """In every format, and the prompts after it keep their seeds."""
    first = f"a red star{separator}moving left"
    contents = {
        "p.txt": f"{first}\r\na moon\n",
        "p.csv": f"prompt\n{first}\na moon\n",
        "p.tsv": f"prompt\n{first}\na moon\n",
        "p.jsonl": f'{{"prompt": {json.dumps(first)}}}\n{{"prompt": "a moon"}}\n',
        "P.JSONL": f'{{"prompt": {json.dumps(first, ensure_ascii=separator < " ")}}}\n{{"prompt": "a moon"}}\n',
    }
    for name, content in contents.items():
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
        items = read_prompt_items(None, None, str(tmp_path / name), None, 7, 1)
        assert [(item.prompt, item.seed, item.sample_index) for item in items] == [(first, 7, 0), ("a moon", 7, 1)]


def test_every_format_gives_the_same_prompts(tmp_path):
    rows = [{"prompt": "a star", "seed": 3, "id": "one"}, {"prompt": "a moon, red", "seed": None, "id": None}]
    (tmp_path / "p.csv").write_text('prompt,seed,id\na star,3,one\n"a moon, red",,\n')
    (tmp_path / "p.tsv").write_text("prompt\tseed\tid\na star\t3\tone\na moon, red\t\t\n")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    for suffix in FORMATS:
        items = read_prompt_items(None, None, str(tmp_path / f"p{suffix}"), None, 7, 1)
        facts = [(item.prompt, item.seed, item.sample_index, item.id) for item in items]
        assert facts == [("a star", 3, 0, "one"), ("a moon, red", 7, 1, "0001-a-moon-red")]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("prompt\na star\n", 1),
        ("prompt\tseed\na star\t3\n", 1),
        ("id;prompt\n", 1),
        ('a star\n{"prompt": "a moon"}\n', 2),
        ("a\0 \0s\0t\0", 1),
    ],
)
def test_a_text_file_that_is_something_else_is_told_by_its_line(tmp_path, content, line):
    (tmp_path / "p.txt").write_text(content)
    with pytest.raises(
        UserError, match=f"line {line} of prompts file '.*p.txt' is not a prompt .*; give one prompt per line"
    ):
        read_prompt_items(None, None, str(tmp_path / "p.txt"), None, 0, 1)

"""Prompts files and what becomes of them."""

import pytest
from PIL import Image

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
        ("prompt\na, b\n", "more fields"),
    ],
)
def test_bad_prompts_files_are_named(tmp_path, content, words):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        read_prompt_items(None, None, str(tmp_path / "p.csv"), None, 0, 1)


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00prompt")
    with pytest.raises(UserError, match="not UTF-8"):
        read_prompt_items(None, None, str(tmp_path / "p.csv"), None, 0, 1)
    with pytest.raises(UserError, match="No such file"):
        read_prompt_items(None, None, str(tmp_path / "gone.csv"), None, 0, 1)

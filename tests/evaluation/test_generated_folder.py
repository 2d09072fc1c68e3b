"""Which generated video was made for which sample."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from microcinema.data.video_writer import write_video
from microcinema.evaluation.generated_folder import folder_clips
from microcinema.pipelines.prompts import PromptItem
from microcinema.utils.errors import UserError

SAMPLES = [PromptItem(f"prompt {k}", str(k), sample_index=k, source=f"Class{k % 2}/v_{k}.avi") for k in range(12)]
NAMES = [f"Class{k % 2}/v_{k}.avi" for k in range(40)]
PROTOCOL = SimpleNamespace(num_frames=2, prompts="raw")


def write_numbered(folder: Path, names: list[str]) -> str:
    """Videos of which the k-th is as bright as 20 k."""
    for k, name in enumerate(names):
        write_video(folder / name, np.full((2, 16, 16, 3), 20 * k, np.uint8), 8)
    return str(folder)


@pytest.mark.parametrize(
    "name",
    ["{}.mp4", "{:05d}.mp4", "sample_{}.mp4", "v_{}.mp4", "Class{parity}/v_{}.mkv"],
)
def test_generated_videos_meet_their_prompts_however_they_are_named(tmp_path, name):
    """`sample_10` is the eleventh, not the third."""
    folder = write_numbered(tmp_path, [name.format(k, parity=k % 2) for k in range(12)])
    generated = folder_clips(folder, PROTOCOL, SAMPLES, NAMES)
    found = {int(item.prompt.split()[1]): generated.load(i)[0].mean() for i, item in enumerate(generated.samples)}
    assert {k: round(mean / 20) for k, mean in found.items()} == {k: k for k in range(12)}
    assert any("natural order" in warning for warning in generated.warnings) == name.startswith("sample")


def test_videos_of_a_class_meet_its_samples_one_after_the_other(tmp_path):
    samples = [PromptItem(f"class {k // 2}", str(k), sample_index=k, source=f"Class{k // 2}") for k in range(4)]
    folder = write_numbered(tmp_path, ["Class1/b.mp4", "Class0/a.mp4", "Class1/a.mp4"])
    generated = folder_clips(folder, PROTOCOL, samples, NAMES)
    assert [item.sample_index for item in generated.samples] == [0, 2, 3]
    write_numbered(tmp_path, ["Class1/c.mp4"])
    with pytest.raises(UserError, match="Class1/c.mp4' .* is one more than its samples"):
        folder_clips(folder, PROTOCOL, samples, NAMES)


@pytest.mark.parametrize(
    "names, words",
    [
        (["v_0.mp4", "v_30.mp4"], "'v_30.mp4' .* belongs to no sample"),  # of the data set, and not drawn
        ([f"v_{k}.mp4" for k in range(20, 32)], "'v_20.mp4' .* belongs to no sample"),
        (["a.mp4", "b.mp4"], "2 videos for 12 samples"),
        (["3.mp4", "12.mp4"], "'12.mp4' .* belongs to no sample"),
        (["3.mp4", "03.mkv"], "'0?3.m..' .* is one more"),
    ],
)
def test_a_video_of_no_sample_is_refused(tmp_path, names, words):
    with pytest.raises(UserError, match=words):
        folder_clips(write_numbered(tmp_path, names), PROTOCOL, SAMPLES, NAMES)


def test_a_table_says_which_video_has_which_prompt(tmp_path):
    write_numbered(tmp_path, ["x.mp4", "y.mp4", "z.mp4"])
    samples = [
        PromptItem("a cat", "0"),
        PromptItem("a dog", "1", sample_index=1),
        PromptItem("a dog", "2", sample_index=2),
    ]
    table = tmp_path / "list.csv"
    table.write_text("file,prompt\nz.mp4,a cat\nx.mp4,a dog\n")
    generated = folder_clips(str(table), PROTOCOL, samples, [])
    assert [
        (item.sample_index, round(generated.load(i)[0].mean() / 20)) for i, item in enumerate(generated.samples)
    ] == [
        (0, 2),
        (1, 0),
    ]
    for rows, words in (
        ("x.mp4,a bird\n", "a bird.* belongs to no sample"),
        ("x.mp4,a cat\ny.mp4,a cat\n", "y.mp4.* is one more"),
        ("gone.mp4,a cat\n", "1 videos that are not there"),
        ("", "names no videos"),
    ):
        table.write_text("file,prompt\n" + rows)
        with pytest.raises(UserError, match=words):
            folder_clips(str(table), PROTOCOL, samples, [])
    table.write_text("file,text\nx.mp4,a cat\n")
    with pytest.raises(UserError, match="no column 'prompt', it has file, text"):
        folder_clips(str(table), PROTOCOL, samples, [])

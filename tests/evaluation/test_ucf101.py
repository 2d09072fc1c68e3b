import shutil

import pytest

from fixtures import zero_shot_data
from microcinema.data.video_reader import probe, read_clip
from microcinema.evaluation.ucf101 import class_prompt, descriptive_prompts, ucf101_videos
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return zero_shot_data.ucf101(tmp_path_factory.mktemp("ucf101"))


def test_the_official_lists_are_read(root):
    train, test, everything = (ucf101_videos(root, split) for split in ("train", "test", "all"))
    assert len(train) == len(test) == 101 and len(everything) == 202
    assert {video.name for video in train} | {video.name for video in test} == {video.name for video in everything}
    assert (
        train[0].name == "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi"
    )  # without the class number or a carriage return
    assert [video.name for video in everything] == sorted(video.name for video in everything)
    assert {video.label for video in test} == set(descriptive_prompts())


def test_handstand_pushups_have_two_spellings(root):
    (video,) = [video for video in ucf101_videos(root, "test") if "andstandPushups" in video.label]
    assert video.label == "HandstandPushups" and video.name == "HandstandPushups/v_HandStandPushups_g01_c01.avi"
    assert read_clip(video.path, 10).shape == (10, 30, 40, 3)


def test_files_that_were_encoded_anew_are_found(root, tmp_path):
    copy = shutil.copytree(root, tmp_path / "copy")
    path = copy / "UCF-101" / "YoYo" / "v_YoYo_g01_c01.avi"
    zero_shot_data.write(path.with_suffix(".mp4"), zero_shot_data.clip(0), "libx264")
    path.unlink()
    found = {video.name: video.path for video in ucf101_videos(copy, "test")}
    assert found["YoYo/v_YoYo_g01_c01.avi"] == path.with_suffix(".mp4")
    assert found["YoYo/v_YoYo_g01_c01.avi"].is_file() and found.keys() == {v.name for v in ucf101_videos(root, "test")}


def test_the_avis_keep_their_rate(root):
    found = probe(ucf101_videos(root, "all")[0].path)
    assert (found.num_frames, found.fps, found.width, found.height) == (zero_shot_data.FRAMES, 25, 40, 30)


def test_prompts_of_every_class(root):
    sentences = descriptive_prompts()
    assert len(sentences) == len(set(sentences.values())) == 101
    for name, sentence in sentences.items():
        words = sentence.split()
        assert 6 < len(words) < 20 and sentence[0].islower() and not sentence.endswith("."), name
        assert class_prompt(name, "raw") == name and class_prompt(name, "descriptive") == sentence
    assert class_prompt("HandstandPushups", "split") == "Handstand Pushups"
    assert class_prompt("YoYo", "split") == "Yo Yo"
    with pytest.raises(UserError, match="'Chess'"):
        class_prompt("Chess", "descriptive")


def test_another_layout_is_told_with_what_was_looked_for(root, tmp_path):
    with pytest.raises(UserError, match=rf"'{tmp_path}/UCF-101'.*evaluation.root"):
        ucf101_videos(tmp_path, "all")
    (tmp_path / "UCF-101").mkdir()
    with pytest.raises(UserError, match=rf"'{tmp_path}/ucfTrainTestlist/classInd.txt'"):
        ucf101_videos(tmp_path, "all")
    shutil.copytree(root / "ucfTrainTestlist", tmp_path / "ucfTrainTestlist")
    assert len(ucf101_videos(tmp_path, "all")) == 202  # named by the lists, and not there
    (tmp_path / "ucfTrainTestlist" / "testlist01.txt").write_text("\r\n")
    with pytest.raises(UserError, match="testlist01.txt' is empty"):
        ucf101_videos(tmp_path, "all")
    (tmp_path / "ucfTrainTestlist" / "testlist01.txt").write_text("Chess/v_Chess_g01_c01.avi\n")
    with pytest.raises(UserError, match="'Chess'"):
        ucf101_videos(tmp_path, "test")

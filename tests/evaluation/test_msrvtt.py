import csv
import hashlib
from functools import partial

import pytest

from fixtures import zero_shot_data
from microcinema.data.video_reader import read_clip
from microcinema.evaluation.msrvtt import CHOICE_FILE, chosen_caption, msrvtt_videos
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module", params=["two lists", "one list", "frozen-in-time"])
def data(request, tmp_path_factory):
    return partial(msrvtt_videos, zero_shot_data.msrvtt(tmp_path_factory.mktemp("msrvtt"), request.param))


def test_videos_come_by_number_and_captions_by_theirs(data):
    videos = data("test")
    assert [video.name for video in videos] == ["video7010", "video7011", "video7012", "video9999"]
    for video in videos:
        assert [caption.text for caption in video.captions] == [c.strip() for c in zero_shot_data.CAPTIONS[video.name]]
        assert [int(caption.id) for caption in video.captions] == sorted(int(caption.id) for caption in video.captions)
        assert read_clip(video.path, 10).shape[0] == 10
    assert videos[2].path.suffix == ".webm"
    assert [video.name for video in data("train")] == ["video0"]
    assert len(data("all")) == 5


def test_chosen_captions_are_written_out_for_every_test_video():
    with open(CHOICE_FILE, encoding="utf-8") as file:
        rows = {row["video_id"]: int(row["caption"]) for row in csv.DictReader(file)}
    assert list(rows) == [f"video{number}" for number in range(7010, 10000)]
    for name, place in rows.items():  # the rule that they were drawn by
        assert place == int(hashlib.sha256(f"2990 {name}".encode()).hexdigest(), 16) % 20
    assert min(list(rows.values()).count(place) for place in range(20)) > 100


def test_the_choice_is_one_of_the_captions(data):
    first, *_ = data("test")
    assert chosen_caption(first) == first.captions[4 % 3]
    with pytest.raises(UserError, match="'video0' is not one of the 2,990"):
        chosen_caption(data("train")[0])


def test_another_layout_is_told_with_what_was_looked_for(tmp_path):
    with pytest.raises(UserError, match=r"test_videodatainfo.json'.*MSRVTT_data.json'.*evaluation.root"):
        msrvtt_videos(tmp_path, "test")
    for content in ("{", "[]", '{"videos": [{"id": 1}], "sentences": []}'):
        (tmp_path / "test_videodatainfo.json").write_text(content)
        with pytest.raises(UserError, match="is no list of MSR-VTT"):
            msrvtt_videos(tmp_path, "test")
    (tmp_path / "test_videodatainfo.json").write_text('{"videos": [], "sentences": []}')
    with pytest.raises(UserError, match="names no video of the split 'test'"):
        msrvtt_videos(tmp_path, "test")

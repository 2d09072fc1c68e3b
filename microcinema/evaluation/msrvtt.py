"""MSR-VTT (Xu et al., CVPR 2016) as it is distributed, with the lists `test_videodatainfo.json` and `train_val_videodatainfo.json`, or merged
into `MSRVTT_data.json`; and as the project frozen-in-time distributes it, with `annotation/MSR_VTT.json` and `videos/all`."""

import csv
import json
import os
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

from microcinema.evaluation.videos import Caption, Video, first_of, videos_by_stem
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import natural_key

CHOICE_FILE = Path(__file__).parent / "msrvtt_captions.csv"

_LISTS = {"test": "test_videodatainfo.json", "train": "train_val_videodatainfo.json"}
_MERGED, _FROZEN_IN_TIME = "MSRVTT_data.json", "MSR_VTT.json"
_FOLDERS = ("", "TestVideo", "TrainValVideo", "videos", "videos/all", "videos/test", "videos/train")
_SPLITS = {"train": ("train",), "validate": ("validate", "val"), "test": ("test",)}
_FIRST = {"train": 0, "validate": 6513, "test": 7010}  # number of the first video of each split


def msrvtt_videos(root: str | os.PathLike[str], split: str) -> list[Video]:
    """The videos of `train`, `validate`, `test` or `all` that a list names, whether they are there or not, in the order of their numbers,
    with all of their captions in the order of theirs.

    Args:
        root: holds the lists, or a folder `annotation` of them, and the videos, in one of their usual folders.

    Raises:
        UserError: no list of this split, or one that is not MSR-VTT's.
    """
    names = _LISTS.values() if split == "all" else [_LISTS["test" if split == "test" else "train"]]
    words = {word for key, words in _SPLITS.items() if split in ("all", key) for word in words}
    captions: dict[str, dict[int, str]] = defaultdict(dict)
    identifiers = set()
    for path in dict.fromkeys(_list(Path(root), name) for name in names):
        with user_errors(f"'{path}' is no list of MSR-VTT ({{reason}})"):
            content = json.loads(path.read_text(encoding="utf-8-sig"))
            if path.name == _FROZEN_IN_TIME:
                content = _as_distributed(content)
            identifiers |= {video["video_id"] for video in content["videos"] if video["split"] in words}
            for sentence in content["sentences"]:
                captions[sentence["video_id"]][int(sentence["sen_id"])] = sentence["caption"].strip()
    if not identifiers:
        raise UserError(f"'{path}' names no video of the split '{split}'; check evaluation.root")
    texts = {name: tuple(Caption(str(i), text) for i, text in sorted(captions[name].items())) for name in identifiers}
    # video2 before video10
    files: dict[str, Path] = {}
    for folder in _FOLDERS:
        files = videos_by_stem(Path(root, folder)) | files
    paths = {name: files.get(name, Path(root, f"{name}.mp4")) for name in texts}
    return [Video(name, paths[name], captions=texts[name]) for name in sorted(texts, key=natural_key)]


def _as_distributed(content: Any) -> dict[str, Any]:
    """The list of frozen-in-time in the form of the others. It has no splits, which follow from the videos' numbers."""
    sentences = [{**row, "video_id": row["image_id"], "sen_id": row["id"]} for row in content["annotations"]]
    numbers = {row["video_id"]: int(row["video_id"].removeprefix("video")) for row in sentences}
    splits = {
        name: max(_FIRST, key=lambda s: (_FIRST[s] <= number) * (1 + _FIRST[s])) for name, number in numbers.items()
    }
    videos = [{"video_id": name, "split": split} for name, split in splits.items()]
    return {"videos": videos, "sentences": sentences}


def _list(root: Path, name: str) -> Path:
    places = [root / folder / file for file in (name, _MERGED, _FROZEN_IN_TIME) for folder in ("", "annotation")]
    return first_of(places, "the list of MSR-VTT's videos and captions")


def chosen_caption(video: Video) -> Caption:
    """The one caption of a test video that a protocol with one caption a video asks for.

    `msrvtt_captions.csv` says which, counted from 0 in the order of their `sen_id`, for each of the 2,990 test videos. It was drawn once:
    sha256 of "2990" and the video's id with a space between, modulo 20, the number of captions that each video has. A UserError if this is no
    test video, or has no captions.
    """
    chosen = _choice().get(video.name)
    if chosen is None or not video.captions:
        why = "has no caption" if chosen is not None else "is not one of the 2,990 test videos"
        raise UserError(f"video '{video.name}' {why}; check the list of MSR-VTT, or use selection=every_caption")
    return video.captions[chosen % len(video.captions)]


@cache
def _choice() -> dict[str, int]:
    with open(CHOICE_FILE, encoding="utf-8", newline="") as file:
        return {row["video_id"]: int(row["caption"]) for row in csv.DictReader(file)}

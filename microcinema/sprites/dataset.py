"""Moving Sprites on disk: a video-text data set like any other, with a file of its truth beside it."""

import csv
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from microcinema.data.video_writer import write_video
from microcinema.sprites import scene
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_folder

TRUTH_FILE = "truth.jsonl"
CSV_FILE = "clips.csv"
OWN_FILES = r"clips\.csv|truth\.jsonl|videos/\d{6,}_\d{6,}/\d{6,}\.mp4"
"""What a folder of the data set may hold if another one may take its place."""
_CLIPS_PER_FOLDER = 1000


def write_dataset(
    folder: str | os.PathLike[str],
    num_videos: int,
    seed: int = 0,
    split: str = "train",
    num_frames: int = 16,
    size: int = 64,
    fps: float = 8.0,
    crf: int = 14,
    rotation_weight: int = 1,
    progress: bool = True,
) -> Path:
    """Renders clips 0 to `num_videos - 1` as a video-text data set: `videos/{page_dir}/{videoid}.mp4` (H.264), a WebVid-style `clips.csv` and `truth.jsonl`.

    Each line of the truth file has a clip's sprite, frames, size and fps, from which `render` gives masks and flow exactly. A UserError if
    the folder cannot be written.
    """
    with (
        atomic_folder(folder) as partial,
        open(partial / CSV_FILE, "w", newline="", encoding="utf-8") as table_file,
        open(partial / TRUTH_FILE, "w", encoding="utf-8") as truth_file,
    ):
        table = csv.writer(table_file)
        table.writerow(["videoid", "contentUrl", "duration", "page_dir", "name", "description", "motion"])
        for index in tqdm(range(num_videos), desc="render Moving Sprites", unit="clip", disable=not progress):
            sprite = scene.sample_attributes(seed, index, split, rotation_weight)
            first = index - index % _CLIPS_PER_FOLDER
            page, video_id = f"{first + 1:06d}_{first + _CLIPS_PER_FOLDER:06d}", f"{index:06d}"
            video = partial / "videos" / page / f"{video_id}.mp4"
            video.parent.mkdir(parents=True, exist_ok=True)
            write_video(video, scene.render(sprite, num_frames, size, fps).frames, fps=fps, crf=crf)
            captions = scene.combined_caption(sprite), scene.caption(sprite), scene.motion_caption(sprite)
            table.writerow([video_id, "", f"PT00H00M{round(num_frames / fps):02d}S", page, *captions])
            truth = {"videoid": video_id, "num_frames": num_frames, "size": size, "fps": fps}
            truth_file.write(json.dumps({**truth, "sprite": dataclasses.asdict(sprite)}) + "\n")
    return Path(folder)


def read_truth(folder: str | os.PathLike[str]) -> Iterator[tuple[str, scene.Sprite, int, int, float]]:
    """Yields (videoid, sprite, num_frames, size, fps) for every clip of a folder that `write_dataset` made; a UserError if the folder has no
    truth file."""
    path = Path(folder) / TRUTH_FILE
    if not path.is_file():
        raise UserError(f"'{path}' not found; render the data set with `microcinema prepare sprites`")
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        yield row["videoid"], scene.Sprite(**row["sprite"]), row["num_frames"], row["size"], row["fps"]

"""UCF-101 (Soomro et al., arXiv 1212.0402) as it is distributed: `UCF-101/<Class>/v_<Class>_gNN_cNN.avi` and `ucfTrainTestlist/`."""

import csv
import os
import re
from functools import cache
from pathlib import Path
from typing import Literal

from microcinema.evaluation.videos import Video, first_of, videos_by_stem
from microcinema.utils.errors import UserError

PROMPTS_FILE = Path(__file__).parent / "ucf101_prompts.csv"
VIDEOS, LISTS = "UCF-101", "ucfTrainTestlist"
PromptSet = Literal["raw", "split", "descriptive"]


def ucf101_videos(root: str | os.PathLike[str], split: str) -> list[Video]:
    """The videos of `train`, `test` or `all` that the lists of the first official division name, whether they are there or not, sorted by
    name, with their classes. A file may have another suffix than the lists give it. A UserError for another layout (what was looked for is
    named), an empty list, or one with a class that `classInd.txt` does not name."""
    folder, lists = Path(root, VIDEOS), Path(root, LISTS)
    first_of([folder], "the videos of UCF-101")
    classes = {line.split(maxsplit=1)[-1] for line in _lines(lists / "classInd.txt")}
    parts = ("train", "test") if split == "all" else (split,)
    # "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1": a class number follows in the training lists.
    names = sorted({line.split()[0] for part in parts for line in _lines(lists / f"{part}list01.txt")})
    # By the folder: that of handstand push-ups is HandstandPushups, its files are called v_HandStandPushups_*.
    labels = {name: name.partition("/")[0] for name in names}
    files = {label: videos_by_stem(folder / label) for label in set(labels.values())}
    paths = {name: files[label].get(Path(name).stem, folder / name) for name, label in labels.items()}
    videos = [Video(name, paths[name], label) for name, label in labels.items()]
    if unknown := sorted({video.label for video in videos} - classes):
        raise UserError(f"'{lists}' names the class '{unknown[0]}', which is not in classInd.txt")
    return videos


def class_prompt(name: str, prompts: PromptSet) -> str:
    """What a class is asked for with: `raw`, its name; `split`, its name in words; `descriptive`, a sentence written for this project."""
    if prompts == "raw":
        return name
    if prompts == "split":
        return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    if name not in descriptive_prompts():
        raise UserError(f"UCF-101 has no class '{name}'; use prompts=raw or prompts=split for other classes")
    return descriptive_prompts()[name]


@cache
def descriptive_prompts() -> dict[str, str]:
    """Class to sentence, for all 101 classes."""
    with open(PROMPTS_FILE, encoding="utf-8", newline="") as file:
        return {row["class"]: row["prompt"] for row in csv.DictReader(file)}


def _lines(path: Path) -> list[str]:
    first_of([path], f"'{path.name}' of UCF-101")
    lines = list(filter(None, map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())))
    if not lines:
        raise UserError(f"list '{path}' is empty; unpack the archive of the lists again")
    return lines

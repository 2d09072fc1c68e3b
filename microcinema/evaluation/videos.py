"""Real videos, whatever data set they are from, and plain folders of videos."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from microcinema.data.video_reader import VIDEOS
from microcinema.utils.errors import UserError
from microcinema.utils.files import list_files


@dataclass(frozen=True)
class Caption:
    """A text and what its data set calls it."""

    id: str
    text: str


@dataclass(frozen=True)
class Video:
    """A video of a data set. `name` is the same on every machine; `path` may lead nowhere; `label` is its class, if it has one."""

    name: str
    path: Path
    label: str = ""
    captions: tuple[Caption, ...] = ()


def folder_videos(folder: str | os.PathLike[str]) -> list[Video]:
    """All videos under a folder, in the order of `natural_key`: 2.mp4 comes before 10.mp4. A UserError if there is no such folder, or no
    video in it."""
    root = Path(folder)
    if not root.is_dir():
        raise UserError(f"'{root}' is no folder; give a folder of videos ({', '.join(VIDEOS)})")
    files = list_files(root, VIDEOS, "**/*")
    if not files:
        raise UserError(f"folder '{root}' holds no videos ({', '.join(VIDEOS)}); check the path")
    return [Video(file.relative_to(root).as_posix(), file) for file in files]


def videos_by_stem(folder: Path) -> dict[str, Path]:
    """The videos right in a folder by their names without suffix, which re-encoded copies of a data set change; none if there is no folder."""
    files = list_files(folder, VIDEOS) if folder.is_dir() else []
    return {file.stem: file for file in reversed(files)}


def file_state(video: Video) -> str:
    """Name and size in bytes of a video's file; a UserError if it is missing."""
    try:
        return f"{video.name} {video.path.stat().st_size}"
    except OSError as error:
        raise UserError(f"video '{error.filename}' cannot be read ({error.strerror}); check the data set") from None


def first_of(candidates: Sequence[Path], what: str) -> Path:
    """The first path that is there; if none is, a UserError that names all."""
    if existing := next(filter(Path.exists, candidates), None):
        return existing
    looked = ", ".join(f"'{path}'" for path in candidates)
    raise UserError(f"{what} not found; looked for {looked}; check evaluation.root")

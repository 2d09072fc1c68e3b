"""The generated clips of a protocol, from a folder of videos: which video was made for which sample."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from microcinema.data.text_table import FORMATS, read_texts
from microcinema.data.video_reader import probe, read_clip
from microcinema.evaluation.generate import Generated
from microcinema.evaluation.protocol import ZeroShotProtocol
from microcinema.evaluation.real_clips import RealKeyframes
from microcinema.evaluation.videos import Video, file_state, folder_videos
from microcinema.pipelines.prompts import PromptItem
from microcinema.utils.errors import UserError

_COMPRESSED = "Generated clips were read from compressed videos; compression changes the results."
_BY_ORDER = "The names of the videos say nothing of their samples: they were taken in natural order."


def folder_clips(
    source: str,
    protocol: ZeroShotProtocol,
    samples: list[PromptItem],
    names: Sequence[str],
    keyframes: RealKeyframes | None = None,
) -> Generated:
    """Clips from a folder of videos, or from those that a table (.csv, .tsv, .jsonl or .parquet) names in its column `file`.

    A video belongs to the sample of its number (`12.mp4`), or to the next one of its video in the data set (`video7010.mp4`) or of its class
    (`YoYo/3.mp4`); with a table, to the next one with its `prompt`. Videos with other names are taken in natural order, if there are as many
    as samples.

    Args:
        samples: of the protocol; if that asks for nothing, any videos are measured.
        names: of all videos of the data set that could be asked for.
        keyframes: those that the videos were made from; None: they are unknown.

    Raises:
        UserError: no videos, or one that is of no sample or one too many; from `load`, videos of several sizes.
    """
    table = Path(source).suffix.lower() in FORMATS and Path(source).is_file()
    videos, prompts = _read_table(Path(source)) if table else (folder_videos(source), [])
    warnings = [_COMPRESSED]
    if protocol.prompts == "none":
        samples = [PromptItem("", f"{i:05d}", sample_index=i) for i in range(len(videos))]
        numbers: list[int] | None = list(range(len(videos)))
    elif table:
        numbers = _assign(source, videos, [[text] for text in prompts], [[sample.prompt] for sample in samples])
    else:
        numbers = _by_name(source, videos, samples, names)
        warnings += [_BY_ORDER] if numbers is None else []
    numbers = list(range(len(videos))) if numbers is None else numbers
    measured = [samples[number] for number in numbers]
    first = probe(videos[0].path)

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        path = videos[index].path
        frames = read_clip(path, protocol.num_frames)
        if frames.shape[1:3] != (first.height, first.width):
            sizes = f"'{path}' is {frames.shape[2]}x{frames.shape[1]}, '{videos[0].path}' {first.width}x{first.height}"
            raise UserError(f"{sizes}; generated videos must all have one size")
        return frames, None if keyframes is None else keyframes(measured[index])

    fingerprint = {"folder": source, "height": first.height, "width": first.width, "fps": first.fps}
    states = [file_state(video) for video in videos]
    return Generated(
        measured, states, load, first.fps, fingerprint, keyframes.index if keyframes else 0, warnings=tuple(warnings)
    )


def _read_table(path: Path) -> tuple[list[Video], list[str]]:
    table, available = read_texts(path, ("file", "prompt"))
    if missing := [name for name in ("file", "prompt") if name not in table.column_names]:
        raise UserError(f"list '{path}' has no column '{missing[0]}', it has {', '.join(available)}; add it")
    files, prompts = (table.column(name).to_pylist() for name in ("file", "prompt"))
    videos = [Video(file, path.parent / file) for file in files]
    if lost := [video.path for video in videos if not video.path.is_file()]:
        raise UserError(f"list '{path}' names {len(lost)} videos that are not there, first '{lost[0]}'; correct it")
    if not videos:
        raise UserError(f"list '{path}' names no videos; give one per row")
    return videos, [prompt.strip() for prompt in prompts]


def _by_name(source: str, videos: list[Video], samples: list[PromptItem], names: Sequence[str]) -> list[int] | None:
    """The samples of videos by their names; None if these say nothing and there are as many as samples."""
    found = [_spellings(video.name) for video in videos]
    if all(name.isdecimal() for name, *_ in found):
        keys = [[str(int(name))] for name, *_ in found]
        return _assign(source, videos, keys, [[str(number)] for number in range(len(samples))])
    asked = [_spellings(sample.source)[:2] for sample in samples]
    known = {spelling for name in names for spelling in _spellings(name)[:2]}.union(*asked)
    if any(not known.isdisjoint(spellings) for spellings in found):
        return _assign(source, videos, found, asked)
    if len(videos) != len(samples):
        fault = f"'{source}' holds {len(videos)} videos for {len(samples)} samples, and their names do not say which"
        raise UserError(f"{fault}; number them as the manifest does, or give a list with columns file and prompt")
    return None


def _spellings(name: str) -> list[str]:
    """A path without suffix, its last part, and its folder: how people call the video of a sample."""
    path = Path(name).with_suffix("")
    return [str(path), path.name, path.parts[0]]


def _assign(
    source: str, videos: list[Video], keys: Sequence[Sequence[str]], asked: Sequence[Sequence[str]]
) -> list[int]:
    """The sample of each video: the next one of the first key of the video that any sample has."""
    remaining: dict[str, list[int]] = {}
    for number, spellings in reversed(list(enumerate(asked))):
        for key in dict.fromkeys(spellings):
            remaining.setdefault(key, []).append(number)
    assigned: dict[int, None] = {}
    for video, spellings in zip(videos, keys, strict=True):
        numbers = next((remaining[key] for key in spellings if key in remaining), None)
        while numbers and numbers[-1] in assigned:
            numbers.pop()
        if not numbers:
            fault = "belongs to no sample" if numbers is None else "is one more than its samples"
            raise UserError(f"'{source}': '{video.name}' ({spellings[0][:60]}) {fault}; compare it with the protocol's")
        assigned[numbers.pop()] = None
    return list(assigned)

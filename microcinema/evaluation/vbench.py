"""VBench (arXiv 2311.17982) and VBench-I2V (of VBench++, arXiv 2411.13503): the videos that the suite expects, and its results in a report.

The suite's own code measures the videos: most of its dimensions need networks that only it brings.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import PartialState

from microcinema.config.schema import Evaluate, VBenchEvaluation
from microcinema.config.types import Count, Name, PathText
from microcinema.evaluation.generate import generate, protocol_sampler
from microcinema.evaluation.measures import Measure
from microcinema.evaluation.report import REPORT_FILE, RESULTS_FILE, Picture, choose, text_table, write_report
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import Format, SampleFolder
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import make_folder, write_json
from microcinema.utils.hashing import hash_file, hash_json
from microcinema.utils.provenance import describe_code

SAMPLES_FOLDER, VIDEOS_FOLDER = "samples", "videos"
NUM_FLICKERING = (
    25  # videos of the prompts of this dimension, of which VBench's static filter keeps some; VBench-I2V has no filter
)
FLICKERING = "temporal_flickering"
_CRF = 10  # as the suite's own example compresses


@dataclass(frozen=True)
class VBenchSuite:
    """The prompts of the suite, with their images for VBench-I2V.

    Args:
        info: the suite's list: `VBench_full_info.json` or `vbench2_i2v_full_info.json`.
        images: for VBench-I2V, the folder of its images of one aspect ratio, such as `crop/1-1`; None: the model draws its key frames.
        dimensions: only prompts of these; None: of all.
        num_videos: of each prompt; of those of temporal flickering `NUM_FLICKERING` without images, as the suite asks.
    """

    info: PathText
    images: PathText | None
    dimensions: list[Name] | None
    num_videos: Count

    def entries(self) -> list[dict[str, Any]]:
        """Rows of the list, with the dimensions that are asked for; a UserError if there is no such list, or a dimension is unknown."""
        advice = "give VBench_full_info.json or vbench2_i2v_full_info.json of the suite"
        with user_errors(f"'{self.info}' is no list of VBench ({{reason}}); {advice}"):
            rows = json.loads(Path(self.info).read_text(encoding="utf-8"))
            rows = [{"prompt": row["prompt_en"], **row, "dimension": list(row["dimension"])} for row in rows]
        known = list(dict.fromkeys(name for row in rows for name in row["dimension"]))
        if unknown := sorted(set(self.dimensions or ()) - set(known)):
            raise UserError(f"the suite has no dimension '{unknown[0]}'; it has {', '.join(known)}")
        asked = set(known if self.dimensions is None else self.dimensions)
        return [row | {"dimension": kept} for row in rows if (kept := [d for d in row["dimension"] if d in asked])]

    def videos(self) -> list["SuiteVideo"]:
        """All videos to make; a UserError as of `entries`, or if images are missing."""
        videos: dict[str, SuiteVideo] = {}
        for number, row in enumerate(self.entries()):
            image = None if self.images is None else Path(self.images, row.get("image_name") or "")
            filtered = image is None and FLICKERING in row["dimension"]
            count = max(self.num_videos, NUM_FLICKERING) if filtered else self.num_videos
            for index in range(count):
                name, place = f"{row['prompt']}-{index}", f"{len(videos):05d}"
                item = PromptItem(row["prompt"], place, sample_index=number, video_index=index, image=image)
                videos.setdefault(name, SuiteVideo(name, item, row["dimension"]))
        images = dict.fromkeys(video.item.image for video in videos.values())
        missing = [image for image in images if isinstance(image, Path) and not image.is_file()]
        if missing:
            fault = f"{len(missing)} images of the suite are missing, first '{missing[0]}'"
            raise UserError(f"{fault}; set evaluation.protocol.images to a folder of its crops, such as crop/1-1")
        return list(videos.values())


@dataclass(frozen=True)
class SuiteVideo:
    """A video by the name that the suite gives it, `<prompt>-<number>`, and the dimensions that it is measured in."""

    name: str
    item: PromptItem
    dimensions: Sequence[str]


def run_vbench(config: Evaluate, suite: VBenchSuite, state: PartialState) -> None:
    """Makes the videos by all processes; the first one lays them where the suite finds them, and reports its results, if they are given.
    After a UserError finished videos are kept, and the next run continues from them."""
    settings, folder = config.evaluation, Path(config.output_dir)
    assert isinstance(settings, VBenchEvaluation)
    if config.generated_dir is not None:
        raise UserError("generated_dir goes with the zero-shot protocols; give the suite's code these videos itself")
    videos = suite.videos()
    found = None if settings.results is None else _read_results(settings.results, videos)
    size = settings.height, settings.width, settings.num_frames, settings.fps
    sampler = protocol_sampler(config, *size, state)
    make_folder(folder)
    items = [video.item for video in videos]
    identity = {"names_sha256": hash_json([video.name for video in videos]), "images": suite.images}
    formats: tuple[Format, ...] = ("video", "frames")
    made = generate(sampler, items, config.seed, folder / SAMPLES_FOLDER, state, formats, _CRF, **identity)
    if not state.is_main_process:
        return
    place = make_folder(folder / VIDEOS_FOLDER)
    for video in videos:
        _lay(made[0].path(video.item), place / f"{video.name}.mp4")
    if found is None:
        print(
            f"{place}: {len(videos)} videos; measure them by VBench's code, then set evaluation.results to its results"
        )
    else:
        _report(folder, suite, videos, found, made)


def _lay(path: Path, place: Path) -> None:
    """A second name for a file, by a link where the disk has them. The suite takes its folder to hold nothing but videos."""
    if place.exists() and place.stat().st_size == path.stat().st_size and place.stat().st_mtime >= path.stat().st_mtime:
        return
    place.unlink(missing_ok=True)
    try:
        os.link(path, place)
    except OSError as error:
        if len(os.fsencode(place.name)) > 255:
            fault = f"the video of the prompt '{place.name[:60]}...' has a longer name than the disk allows"
            raise UserError(f"{fault}; leave its dimension out, by evaluation.protocol.dimensions") from error
        shutil.copy2(path, place)


def _fraction(value: Any) -> float:
    """A score of the suite, which is at most 1, but in imaging quality, whose network's scale ends at 100."""
    return float(value) / 100 if float(value) > 1 else float(value)


def _read_results(path: str, videos: Sequence[SuiteVideo]) -> dict[str, tuple[float, dict[str, float]]]:
    """Score of each dimension, and of each video by its name, from a file `*_eval_results.json` of the suite, or a folder of them."""
    folder = Path(path)
    content: dict[str, Any] = {}
    files = sorted(folder.glob("*_eval_results.json")) if folder.is_dir() else [folder]
    fault = f"evaluation.results='{path}' holds no results of VBench ({{reason}})"
    with user_errors(f"{fault}; give *_eval_results.json, or the folder of all"):
        for file in files:
            content |= json.loads(file.read_text(encoding="utf-8"))
        found = {
            dimension: (
                _fraction(score),
                {Path(row["video_path"]).stem: _fraction(row["video_results"]) for row in rows},
            )
            for dimension, (score, rows) in content.items()
        }
    if not found:
        raise UserError(
            f"evaluation.results='{path}' holds no *_eval_results.json; measure the videos by VBench's code"
        )
    names = {video.name for video in videos}
    for dimension, (_, values) in found.items():
        if strange := sorted(values.keys() - names):
            raise UserError(
                f"evaluation.results: '{strange[0]}' ({dimension}) is no video of this suite; measure these"
            )
    return found


def _report(
    folder: Path,
    suite: VBenchSuite,
    videos: Sequence[SuiteVideo],
    found: Mapping[str, tuple[float, dict[str, float]]],
    made: tuple[SampleFolder, dict[str, Any], dict[str, int]],
) -> None:
    samples, fingerprint, counts = made
    name = "vbench" if suite.images is None else "vbench_i2v"
    asked = Counter(dimension for video in videos for dimension in video.dimensions)
    settings = {"num_videos": suite.num_videos, "info_sha256": hash_file(suite.info), "dimensions": list(asked)}
    size = {key: fingerprint[key] for key in ("num_frames", "fps", "height", "width")}
    identifier = f"{name}-{hash_json([settings, [video.name for video in videos]])[:12]}"
    results = {
        "protocol": {"identifier": identifier, "name": name, "dataset": name, **size, **settings},
        "generated": fingerprint,
        "counts": {"generated": len(videos), "real": 0, **counts},
        "detectors": {},
        "measures": [asdict(Measure(key, key.replace("_", " "), "of VBench", "%", "higher", 2)) for key in found],
        "values": {key: {"value": score, "n": len(values)} for key, (score, values) in found.items()},
        "clips": [_clip(video, found) for video in videos],
        "not_measured": {key: "it is not in the results of the suite" for key in asked if key not in found},
        "shortfalls": [
            f"{key}: {len(values)} of {asked[key]} videos"
            for key, (_, values) in found.items()
            if len(values) < asked[key]
        ],
        "warnings": [f"{key}: {n}" for key, n in counts.items() if n],
        "versions": describe_code(),
    }
    write_json(folder / RESULTS_FILE, results)
    pictures = []
    for index, note in choose(results, extremes=2).items():
        clip = samples.load(videos[index].item.id)
        pictures.append(Picture(videos[index].name, clip.frames, clip.keyframe, fingerprint["fps"], note))
    write_report(folder / REPORT_FILE, results, pictures)
    print(text_table(results))
    print(folder / REPORT_FILE)


def _clip(video: SuiteVideo, found: Mapping[str, tuple[float, dict[str, float]]]) -> dict[str, Any]:
    measures = {key: values[video.name] for key, (_, values) in found.items() if video.name in values}
    return {"part": "all", "name": video.item.id, "prompt": video.item.prompt, "measures": measures}

"""VBench (arXiv 2311.17982) and VBench-I2V (of VBench++, arXiv 2411.13503): the videos that the suite expects, and its results in a report.

Dimensions whose networks can be had are computed here; the suite's own code measures all.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from accelerate.utils import gather_object

from microcinema.config.schema import Evaluate, VBenchEvaluation
from microcinema.config.types import Count, Name, PathText
from microcinema.data.video_reader import read_clip
from microcinema.evaluation import statistics
from microcinema.evaluation.features import Clips, extract_features
from microcinema.evaluation.generate import generate, protocol_sampler
from microcinema.evaluation.measures import Measure
from microcinema.evaluation.report import REPORT_FILE, RESULTS_FILE, Picture, choose, text_table, write_report
from microcinema.evaluation.vbench_dimensions import given_image, open_dimension
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import Format, SampleFolder
from microcinema.utils.errors import UserError, user_errors
from microcinema.utils.files import make_folder, write_json
from microcinema.utils.hashing import hash_file, hash_json
from microcinema.utils.provenance import describe_code

SAMPLES_FOLDER, VIDEOS_FOLDER, FEATURES_FOLDER = "samples", "videos", "features"
FLICKERING = "temporal_flickering"
NUM_FLICKERING = 25  # videos of its prompts, of which VBench's static filter keeps some; VBench-I2V has no such filter
Scores = dict[str, float]  # of videos by their names
Found = dict[str, tuple[float, Scores]]  # of the suite, by dimension
Made = tuple[SampleFolder, dict[str, Any], dict[str, int]]
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
                video = videos.setdefault(name, SuiteVideo(name, item, []))
                video.dimensions.extend(row["dimension"])  # a prompt may stand in two rows
        images = dict.fromkeys(video.item.image for video in videos.values())
        missing = [image for image in images if isinstance(image, Path) and not image.is_file()]
        if missing:
            fault = f"{len(missing)} images of the suite are missing, first '{missing[0]}'"
            raise UserError(f"{fault}; set evaluation.protocol.images to a folder of its crops, such as crop/1-1")
        return list(videos.values())

    def asked(self, videos: Sequence["SuiteVideo"]) -> dict[str, list["SuiteVideo"]]:
        """The videos of each dimension that the suite reads: without the further ones of temporal flickering, of which its filter takes some."""
        read = [video for video in videos if video.item.video_index < self.num_videos]
        names = dict.fromkeys(name for video in videos for name in video.dimensions)
        return {name: [video for video in read if name in video.dimensions] for name in names}


@dataclass(frozen=True)
class SuiteVideo:
    """A video by the name that the suite gives it, `<prompt>-<number>`, and the dimensions that it is measured in."""

    name: str
    item: PromptItem
    dimensions: list[str]


def run_vbench(config: Evaluate, suite: VBenchSuite, state: PartialState) -> None:
    """Makes the videos by all processes; the first one lays them where the suite finds them, and reports its results, if they are given.
    After a UserError finished videos are kept, and the next run continues from them."""
    settings, folder = config.evaluation, Path(config.output_dir)
    assert isinstance(settings, VBenchEvaluation)
    if config.generated_dir is not None:
        raise UserError("generated_dir goes with the zero-shot protocols; give the suite's code these videos itself")
    videos = suite.videos()
    found = {} if settings.results is None else _read_results(settings.results, videos)
    size = settings.height, settings.width, settings.num_frames, settings.fps
    sampler = protocol_sampler(config, *size, state)
    make_folder(folder)
    items = [video.item for video in videos]
    identity = {"names_sha256": hash_json([video.name for video in videos]), "images": suite.images}
    formats: tuple[Format, ...] = ("video", "frames")
    asked, fps = suite.asked(videos), sampler.fingerprint()["fps"]
    opened = {name: open_dimension(name, settings, fps, state.device) for name in asked}
    if "i2v_subject" in asked and suite.images is None:
        opened["i2v_subject"] = "evaluation.protocol.images is not set"
    made = generate(sampler, items, config.seed, folder / SAMPLES_FOLDER, state, formats, _CRF, **identity)
    open_here = {name: one for name, one in opened.items() if not isinstance(one, str)}
    here = {name: _measure(*one, asked[name], made, config, state) for name, one in open_here.items()}
    if not state.is_main_process:
        return
    place = make_folder(folder / VIDEOS_FOLDER)
    for video in videos:
        _lay(made[0].path(video.item), place / f"{video.name}.mp4")
    if found or here:
        _report(folder, suite, videos, found, here, opened, made)
    if not found:
        print(f"{place}: {len(videos)} videos; measure the rest by VBench's code, then set evaluation.results")


def _measure(
    measure: Any, record: Any, videos: list[SuiteVideo], made: Made, config: Evaluate, state: PartialState
) -> Scores:
    """Scores of the videos, as they are compressed, by their names; by all processes together."""
    samples, generated, _ = made

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        item = videos[index].item
        image = given_image(item.image) if record["dimension"] == "i2v_subject" else None
        return read_clip(samples.path(item), generated["num_frames"]), image

    name, clips = record["dimension"], Clips([video.item.id for video in videos], load)
    identity = {"generated": generated, "batch_size": config.batch_size, **record}
    place = Path(config.output_dir, FEATURES_FOLDER, hash_json(identity)[:16])
    processes = state.process_index, state.num_processes, state.is_main_process, gather_object
    features = extract_features(clips, [measure], place, identity, config.batch_size, f"measure {name}", *processes)
    state.wait_for_everyone()
    return dict(zip([video.name for video in videos], features.all(name).tolist(), strict=True))


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


def _read_results(path: str, videos: Sequence[SuiteVideo]) -> Found:
    """Score of each dimension, and of each video by its name, from a file `*_eval_results.json` of the suite, or a folder of them."""
    folder = Path(path)
    content: dict[str, Any] = {}
    files = sorted(folder.glob("*_eval_results.json")) if folder.is_dir() else [folder]
    fault = f"evaluation.results='{path}' holds no results of VBench ({{reason}})"
    with user_errors(f"{fault}; give *_eval_results.json, or the folder of all"):
        for file in files:
            content |= json.loads(file.read_text(encoding="utf-8"))
        found = {
            key: (_fraction(score), {Path(row["video_path"]).stem: _fraction(row["video_results"]) for row in rows})
            for key, (score, rows) in content.items()
        }
    if not found:
        raise UserError(f"evaluation.results='{path}' holds no *_eval_results.json; measure by VBench's code")
    names = {video.name for video in videos}
    for dimension, (_, values) in found.items():
        if strange := sorted(values.keys() - names):
            fault = f"evaluation.results: '{strange[0]}' ({dimension}) is no video of this suite"
            raise UserError(f"{fault}; measure these")
    return found


def _report(
    folder: Path, suite: VBenchSuite, videos: Sequence[SuiteVideo], found: Found, here: Any, opened: Any, made: Made
) -> None:
    """Scores of the suite, and beside them those that are computed here, whose keys end in `_here`."""
    samples, fingerprint, counts = made
    name, asked = "vbench" if suite.images is None else "vbench_i2v", suite.asked(videos)
    settings = {"num_videos": suite.num_videos, "info_sha256": hash_file(suite.info), "dimensions": list(asked)}
    size = {key: fingerprint[key] for key in ("num_frames", "fps", "height", "width")}
    records = {key: one[1] for key, one in opened.items() if key in here}
    identifier = f"{name}-{hash_json([settings, [video.name for video in videos], records])[:12]}"
    values: dict[str, Any] = {key: {"value": score, "n": len(scores)} for key, (score, scores) in found.items()}
    values |= {f"{key}_here": statistics.mean(list(scores.values())) for key, scores in here.items()}
    each = {key: scores for key, (_, scores) in found.items()} | {f"{key}_here": scores for key, scores in here.items()}
    if suite.images is None:
        each.pop(FLICKERING, None)  # the suite's filter numbers its videos anew
    clips: list[dict[str, Any]] = []
    for video in videos:
        scored = {key: scores[video.name] for key, scores in each.items() if video.name in scores}
        clips.append({"part": "all", "name": video.item.id, "prompt": video.item.prompt, "measures": scored})
    ends = {"": "of VBench", "_here": "by VBench's formula"}
    measures = [
        Measure(f"{key}{end}", f"{key}{end}".replace("_", " "), meaning, "%", "higher", 2)
        for key in dict.fromkeys([*asked, *found])
        for end, meaning in ends.items()
    ]
    results = {
        "protocol": {"identifier": identifier, "name": name, "dataset": name, **size, **settings},
        "generated": fingerprint,
        "counts": {"generated": len(videos), "real": 0, **counts},
        "detectors": records,
        "measures": [asdict(measure) for measure in measures if measure.key in values],
        "values": values,
        "clips": clips,
        "not_measured": {key: why for key, why in opened.items() if key not in here and key not in found},
        "shortfalls": [
            f"{key}: {len(scores)} of {len(expected)} videos"
            for key, (_, scores) in found.items()
            if len(scores) < len(expected := asked.get(key, ()))
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

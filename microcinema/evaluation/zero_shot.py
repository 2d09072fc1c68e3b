"""The zero-shot protocols, from a pipeline or a folder of videos to numbers and a report, by any number of processes."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from einops import rearrange

from microcinema.config.compose import instantiate
from microcinema.data.clip_reader import resize_and_crop
from microcinema.data.video_reader import probe, read_clip
from microcinema.evaluation import detectors, statistics
from microcinema.evaluation.detectors import Measure, VideoDetectorLoader
from microcinema.evaluation.features import Clips, Features, extract
from microcinema.evaluation.frechet import Moments, frechet_distance
from microcinema.evaluation.fvd import video_distance
from microcinema.evaluation.generate import Share, generate, protocol_sampler
from microcinema.evaluation.protocol import ZeroShotProtocol, manifest_entry
from microcinema.evaluation.report import Picture, text_table, write_report
from microcinema.evaluation.scores import inception_score, kernel_distance
from microcinema.evaluation.videos import Video, folder_videos, hash_list
from microcinema.pipelines.prompts import PromptItem
from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder, write_json
from microcinema.utils.fingerprint import FINGERPRINT, read_record, write_or_verify
from microcinema.utils.hashing import hash_json
from microcinema.utils.provenance import describe_code

if TYPE_CHECKING:
    from omegaconf import DictConfig

RESULTS_FILE, REPORT_FILE, MANIFEST_FILE = "results.json", "report.html", "manifest.json"
SAMPLES_FOLDER, FEATURES_FOLDER, REFERENCE_FOLDER = "samples", "features", "reference"
PICTURES = 24  # clips that the report shows


@dataclass(frozen=True)
class Generated:
    """Clips to measure: which of the protocol's samples they are, how to read one, and what they depend on."""

    samples: list[PromptItem]
    load: Callable[[int], tuple[np.ndarray, np.ndarray | None]]
    fps: float
    identity: dict[str, Any]
    prompts_known: bool = True
    warnings: tuple[str, ...] = ()


def run_zero_shot(
    config: "DictConfig",
    protocol: ZeroShotProtocol,
    state: PartialState,
    video_detectors: Mapping[str, VideoDetectorLoader] = MappingProxyType({}),
) -> None:
    """Does what the config of `evaluate` asks for; the first process writes the numbers and says where the report is.

    Args:
        video_detectors: further values of `evaluation.video.detector`.

    Raises:
        UserError: bad input; clips and features that were already made stay and are used by the next run.
    """
    settings, folder, share = (
        config.evaluation,
        Path(config.output_dir),
        Share(state.process_index, state.num_processes),
    )
    dataset = protocol.open(settings.root)
    shortfalls: list[str] = []
    samples = [] if protocol.dataset == "folder" else protocol.samples(dataset)
    if protocol.dataset != "folder":
        _enough(len(samples), protocol.expected()["samples"], "samples to ask for", settings.allow_fewer, shortfalls)
    elif config.generated_dir is None:
        raise UserError("the protocol asks for nothing; set generated_dir=folder, the videos to measure")
    real = _present(protocol.real(dataset), protocol.expected()["real"], settings.allow_fewer, shortfalls)
    compares = bool(real) or protocol.dataset == "folder"
    measures, missing = load_measures(
        settings, state.device, config.batch_size, compares, protocol.dataset == "ucf101", video_detectors
    )
    make_folder(folder)
    if config.generated_dir is None:
        generated = _from_pipeline(config, protocol, samples, state)
    else:
        generated = _from_folder(config.generated_dir, protocol, samples, settings.allow_fewer, shortfalls)
    records = {type(measure).__name__: measure.record for measure in measures if hasattr(measure, "record")}
    identifier = protocol.identifier(samples or generated.samples, real, records)
    common = {"preparation": _prepared(protocol), "detectors": records, "batch_size": config.batch_size}
    reference = _reference(settings.real_features_dir, folder, common | _chosen_clips(protocol), real)
    made = {**common, "generated": generated.identity, "prompts": hash_json([s.prompt for s in generated.samples])}
    features = folder / FEATURES_FOLDER / hash_json(made)[:16]
    size = (protocol.height, protocol.width)

    def real_clip(index: int) -> tuple[np.ndarray, None]:
        video = real[index]
        frames = read_clip(video.path, protocol.num_frames, protocol.fps, position=protocol.position(index))
        return _fitted(frames, size), None

    def generated_clip(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        frames, keyframe = generated.load(index)
        return _fitted(frames, size), None if keyframe is None else _fitted(keyframe[None], size)[0]

    prompts = [sample.prompt for sample in generated.samples] if generated.prompts_known else None
    sets = [(Clips(len(generated.samples), generated_clip, prompts), features, made, "measure generated")]
    if real:
        wanted = read_record(reference) or {}
        sets.append((Clips(len(real), real_clip), reference, wanted, "measure real"))
    for clips, place, identity, label in sets:
        extract(clips, measures, place, identity, config.batch_size, share, label, state.is_main_process)
    state.wait_for_everyone()
    if not state.is_main_process:
        return

    found = [Features(place, clips.count, config.batch_size) for clips, place, _, _ in sets]
    results = {
        "protocol": {"identifier": identifier, **dataclasses.asdict(protocol)},
        "prompts_sha256": hash_json([sample.prompt for sample in samples]),
        "real_files_sha256": hash_list(real) if real else None,
        "generated": generated.identity,
        "detectors": records,
        "counts": {"generated": len(generated.samples), "real": len(real)},
        "values": compute(found[0], found[1] if real else None, protocol),
        "not_measured": missing,
        "shortfalls": shortfalls,
        "warnings": list(generated.warnings),
        "versions": describe_code(),
    }
    write_json(folder / MANIFEST_FILE, _manifest(protocol, identifier, samples, real, records))
    write_json(folder / RESULTS_FILE, results)
    write_report(folder / REPORT_FILE, results, _pictures(generated))
    print(text_table(results))
    print(folder / REPORT_FILE)


# ------------------------------------------------------------------------------------------------------------ what is measured


def load_measures(
    settings: Mapping[str, Any],
    device: torch.device | str,
    batch_size: int,
    compares: bool,
    classes: bool,
    video_detectors: Mapping[str, VideoDetectorLoader] = MappingProxyType({}),
) -> tuple[list[Measure], dict[str, str]]:
    """The measures whose weights are given; and for each other one, why not.

    Args:
        settings: the group `evaluation`.
        compares: whether there are real clips.
        classes: whether the Inception score of UCF-101's classes makes sense.

    Raises:
        UserError: no weights at all, or some that cannot be opened.
    """
    measures: list[Measure] = [detectors.motion, detectors.keyframe_fidelity]
    missing = {}
    wanted: list[tuple[str, str, bool, Callable[[Mapping[str, Any]], Measure]]] = [
        ("video", "FVD, KVD", compares, lambda node: instantiate(node).load(device, batch_size, video_detectors)),
        ("c3d", "IS", classes, lambda node: detectors.ClassProbabilities(node["weights"], node["sha256"], device)),
        ("clip", "CLIPSIM, CLIP consistency", True, lambda node: detectors.ClipScores(node["weights"], device)),
        ("inception", "Frame FID", compares, lambda n: detectors.FrameFeatures(n["weights"], n["sha256"], device)),
    ]
    for key, names, applies, load in wanted:
        if not applies:
            missing[names] = (
                "it speaks of the classes of UCF-101" if key == "c3d" else "the protocol has nothing to compare it with"
            )
        elif settings[key]["weights"] is None:
            missing[names] = f"evaluation.{key}.weights is not set"
        else:
            measures.append(load(settings[key]))
    if len(measures) == 2:
        keys = ", ".join(f"evaluation.{key}.weights" for key, _, applies, _ in wanted if applies)
        raise UserError(
            f"no detector has weights; set at least one of {keys} (docs/evaluation.md says how to get them)"
        )
    return measures, missing


def compute(generated: Features, real: Features | None, protocol: ZeroShotProtocol) -> dict[str, Any]:
    """All numbers that the features of generated and real clips allow for."""
    names = generated.names
    values: dict[str, Any] = {}
    if real is not None and "features" in names:
        features = generated.all("features"), real.all("features")
        values["fvd"] = dataclasses.asdict(video_distance(*features, protocol.ddof, protocol.seed))
        values["kvd"] = {"value": kernel_distance(*features)}
    if "probabilities" in names:
        probabilities = generated.all("probabilities")
        splits = min(10, len(probabilities))
        score, deviation = inception_score(probabilities, splits, protocol.seed)
        values["is"] = {"value": score, "std": deviation, "splits": splits}
    if real is not None and "frame_features" in names:
        one, two = (Moments.stream(map(np.concatenate, side.batches("frame_features"))) for side in (generated, real))
        values["frame_fid"] = {"value": frechet_distance(one, two, protocol.ddof)}
    for name in ("clipsim", "clip_consistency", "motion_magnitude", "psnr", "ssim"):
        if name in names:
            values[name] = statistics.mean(generated.all(name).tolist())
            if real is not None and name in real.names:
                values[name]["real"] = float(np.mean(real.all(name)))
    return values


# -------------------------------------------------------------------------------------------------------------- generated clips


def _from_pipeline(
    config: "DictConfig", protocol: ZeroShotProtocol, samples: list[PromptItem], state: PartialState
) -> Generated:
    settings = config.evaluation
    size = settings.height, settings.width
    sampler = protocol_sampler(config, *size, protocol.num_frames, protocol.fps, state)
    folder, prompts = Path(config.output_dir) / SAMPLES_FOLDER, hash_json([sample.prompt for sample in samples])
    clips, fingerprint = generate(sampler, samples, config.seed, folder, state, prompts_sha256=prompts)

    def load(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        clip = clips.load(samples[index].id)
        return clip.frames, clip.keyframe

    return Generated(samples, load, fingerprint["fps"], fingerprint)


def _from_folder(
    name: str, protocol: ZeroShotProtocol, samples: list[PromptItem], allow_fewer: bool, shortfalls: list[str]
) -> Generated:
    """Videos that anyone made. Files whose names are numbers are the samples of these numbers; others, in the order of their names."""
    videos = folder_videos(name)
    numbers = [int(video.path.stem) if video.path.stem.isdigit() else -1 for video in videos]
    known = bool(samples)
    if not samples:
        chosen = [
            PromptItem("", f"{index:05d}", sample_index=index, source=video.name) for index, video in enumerate(videos)
        ]
    elif min(numbers) >= 0:
        if len(set(numbers)) < len(numbers) or max(numbers) >= len(samples):
            raise UserError(
                f"generated_dir='{name}' has numbered files that are not the {len(samples)} samples 0 to {len(samples) - 1}; "
                "number them by the manifest's samples"
            )
        chosen = [samples[number] for number in numbers]
    else:
        if len(videos) > len(samples):
            raise UserError(f"generated_dir='{name}' holds {len(videos)} videos; the protocol asks for {len(samples)}")
        chosen, known = samples[: len(videos)], len(videos) == len(samples)
    if samples:
        _enough(len(videos), len(samples), f"videos in generated_dir='{name}'", allow_fewer, shortfalls)
    first = probe(videos[0].path)

    def load(index: int) -> tuple[np.ndarray, None]:
        video = videos[index]
        frames = read_clip(video.path, protocol.num_frames)
        if frames.shape[1:3] != (first.height, first.width):
            raise UserError(
                f"'{video.path}' is {frames.shape[2]}x{frames.shape[1]}, '{videos[0].path}' {first.width}x{first.height}; "
                "generated videos must all have one size"
            )
        return frames, None

    warnings = ["Generated clips were read from compressed videos; compression changes what is measured."]
    if not known and samples:
        warnings.append("With fewer videos than samples and names that are no numbers, prompts are not known.")
    identity = {"folder": str(name), "files_sha256": hash_list(videos), "height": first.height, "width": first.width}
    return Generated(chosen, load, first.fps, {**identity, "fps": first.fps}, known, tuple(warnings))


def _fitted(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return rearrange(resize_and_crop(frames, size).numpy(), "f c h w -> f h w c")


# --------------------------------------------------------------------------------------------------------------- real clips


def _present(videos: Sequence[Video], expected: int | None, allow_fewer: bool, shortfalls: list[str]) -> list[Video]:
    """Those that are there.

    Raises:
        UserError: there are fewer than asked for.
    """
    there = [video for video in videos if video.path.is_file()]
    wanted = max(expected or 0, len(videos))
    gone = next((f"; first missing: '{video.path}'" for video in videos if not video.path.is_file()), "")
    _enough(len(there), wanted, "real videos", allow_fewer, shortfalls, gone)
    return there


def _enough(
    count: int, wanted: int | None, what: str, allow_fewer: bool, shortfalls: list[str], detail: str = ""
) -> None:
    if wanted is None or count == wanted:
        return
    if count > wanted:
        raise UserError(
            f"{count} {what}, and the protocol asks for {wanted}; use selection=draw, or correct the number"
        )
    if not allow_fewer or count < 2:
        raise UserError(
            f"{count} of {wanted} {what} that the protocol asks for{detail}; complete them, or set evaluation.allow_fewer=true"
        )
    shortfalls.append(f"{count} of {wanted} {what}")


def _prepared(protocol: ZeroShotProtocol) -> dict[str, Any]:
    """What is done to any clip before a detector sees it."""
    return {key: getattr(protocol, key) for key in ("num_frames", "height", "width", "resize")}


def _chosen_clips(protocol: ZeroShotProtocol) -> dict[str, Any]:
    """Which part of a real video is read."""
    return {
        "fps": protocol.fps,
        "clip_position": protocol.clip_position,
        "seed": protocol.seed if protocol.clip_position == "random" else None,
    }


def _reference(given: str | None, folder: Path, settings: Mapping[str, Any], real: Sequence[Video]) -> Path:
    """The folder of the features of these real clips, marked with what they depend on.

    Under the hash of that, in `given` or the output folder; or `given` itself, if it is such a folder.

    Raises:
        UserError: `given` holds features of other clips, or made otherwise; every difference is named.
    """
    root = Path(given) if given is not None else folder / REFERENCE_FOLDER
    if not real:
        return root
    identity = {**settings, "files_sha256": hash_list(real), "count": len(real)}
    place = root if (root / FINGERPRINT).is_file() else root / hash_json(identity)[:16]
    write_or_verify(place, identity, "choose another output_dir or evaluation.real_features_dir")
    return place


# ------------------------------------------------------------------------------------------------------------------- outcome


def _manifest(
    protocol: ZeroShotProtocol,
    identifier: str,
    samples: Sequence[PromptItem],
    real: Sequence[Video],
    records: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "identifier": identifier,
        **dataclasses.asdict(protocol),
        "detectors": records,
        "samples": [manifest_entry(sample) for sample in samples],
        "real": [video.name for video in real],
    }


def _pictures(generated: Generated) -> list[Picture]:
    chosen = np.unique(np.linspace(0, len(generated.samples) - 1, PICTURES).round().astype(int))
    found = []
    for index in chosen.tolist():
        frames, keyframe = generated.load(index)
        sample = generated.samples[index]
        found.append(Picture(sample.prompt or sample.source, frames, keyframe, generated.fps))
    return found

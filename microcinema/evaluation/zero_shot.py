"""Running a zero-shot protocol: clips, features, numbers and a report, by any number of processes."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from einops import rearrange

from microcinema.config.schema import Evaluate, ZeroShotEvaluation
from microcinema.data.clip_reader import resize_and_crop
from microcinema.evaluation import detectors, statistics
from microcinema.evaluation.detectors import Measure, VideoDetectorLoader
from microcinema.evaluation.features import Clips, Features, UnreadableClips, extract_features
from microcinema.evaluation.frechet import Moments, frechet_distance, jedi_distance
from microcinema.evaluation.fvd import video_distance
from microcinema.evaluation.generate import Generated, generate_clips, protocol_sampler
from microcinema.evaluation.generated_folder import folder_clips
from microcinema.evaluation.protocol import ZeroShotProtocol, check_count, manifest_entry
from microcinema.evaluation.real_clips import RealKeyframes, select_clips
from microcinema.evaluation.report import (
    PER_CLIP,
    REPORT_FILE,
    RESULTS_FILE,
    Picture,
    choose,
    measures_of,
    text_table,
    write_report,
)
from microcinema.evaluation.scores import inception_score, kernel_distance
from microcinema.evaluation.videos import Video, file_state
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, make_folder, write_json
from microcinema.utils.fingerprint import FINGERPRINT
from microcinema.utils.hashing import hash_chunks, hash_json
from microcinema.utils.provenance import describe_code

MANIFEST_FILE = "manifest.json"
SAMPLES_FOLDER, KEYFRAMES_FOLDER = "samples", "keyframes"
FEATURES_FOLDER, REFERENCE_FOLDER = "features", "reference"
BROKEN_FILE = "unreadable_real_videos.txt"
ENOUGH_FOR_IS = 1000  # clips: a hundred in each of the ten parts
_FEW_CLIPS = f"The Inception score of fewer than {ENOUGH_FOR_IS} clips depends more on their number than on the model."


def run_zero_shot(
    config: Evaluate,
    protocol: ZeroShotProtocol,
    state: PartialState,
    video_detectors: Mapping[str, VideoDetectorLoader],
) -> None:
    """Runs a protocol with all processes; the first one writes and prints results. `video_detectors`: added to `DETECTORS`. After a UserError
    finished clips and features are kept, and the next run continues from them."""
    settings, folder = config.evaluation, Path(config.output_dir)
    assert isinstance(settings, ZeroShotEvaluation)
    samples, real, shortfalls = select_clips(protocol, settings)
    if protocol.dataset == "folder" and config.generated_dir is None:
        raise UserError("the protocol has no prompts; set generated_dir=folder, the videos to measure")
    options = state.device, config.batch_size, bool(real), protocol.dataset == "ucf101", video_detectors
    measures, not_measured = load_measures(settings, *options)
    sampler = None
    if config.generated_dir is None:
        size = settings.height, settings.width
        sampler = protocol_sampler(config, *size, protocol.num_frames, protocol.fps, state)
    keyframes = RealKeyframes.of(protocol, real, None if sampler is None else sampler.keyframe_index)
    if config.generated_dir is not None:
        names = [video.name for video in protocol.videos(settings.root, protocol.sample_split)]
        generated = folder_clips(config.generated_dir, protocol, samples, names, keyframes)
        what, expected = f"videos in generated_dir='{config.generated_dir}'", len(samples) or None
        shortfalls += check_count(len(generated.samples), expected, what, settings.allow_fewer)
    make_folder(folder)
    detectors_used = {type(measure).__name__: measure.record for measure in measures if hasattr(measure, "record")}
    processes = {"rank": state.process_index, "num_processes": state.num_processes, "gather": gather_object}
    extract = partial(
        extract_features,
        measures=measures,
        batch_size=config.batch_size,
        progress=state.is_main_process,
        **processes,
    )
    # Real clips first: a broken file is told before hours of generation.
    real_features = _real_features(config, protocol, real, detectors_used, extract)
    if sampler is not None:
        samples = keyframes.add(samples, folder / KEYFRAMES_FOLDER, state) if keyframes else samples
        generated = generate_clips(config, sampler, samples, folder / SAMPLES_FOLDER, state)
    features = _generated_features(config, protocol, generated, detectors_used, extract)
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    videos = [video for _, video in real]
    identifier = protocol.identifier(generated.samples, videos, detectors_used)
    results = {
        "protocol": {"identifier": identifier, **dataclasses.asdict(protocol)},
        **_measurements(generated, features, real_features, protocol, detectors_used),
        "real_files_sha256": hash_chunks(f"{file_state(video)}\n" for video in videos) if real else None,
        "detectors": detectors_used,
        "counts": {"generated": len(generated.samples), "real": len(real), **generated.counts},
        "not_measured": not_measured,
        "shortfalls": shortfalls,
        "versions": describe_code(),
    }
    _write(folder, results, videos, generated)


def _measurements(
    generated: Generated,
    features: Features,
    real_features: Features | None,
    protocol: ZeroShotProtocol,
    detectors_used: Mapping[str, Any],
) -> dict[str, Any]:
    """The part of the results that is of the generated clips: numbers of all and of each, and what is doubtful."""
    values = compute(features, real_features, protocol)
    each = {name: features.all(name).tolist() for name in PER_CLIP if name in features.names}
    clips = [
        {"part": "all", "name": sample.id, "prompt": sample.prompt, "measures": {key: each[key][i] for key in each}}
        for i, sample in enumerate(generated.samples)
    ]
    few = "is" in values and len(clips) < ENOUGH_FOR_IS
    warnings = [*generated.warnings, *(f"{key}: {n}" for key, n in generated.counts.items() if n)]
    return {
        "generated": generated.fingerprint,
        "prompts_sha256": hash_json([clip["prompt"] for clip in clips]),
        "values": values,
        "measures": [dataclasses.asdict(measure) for measure in measures_of(values, detectors_used)],
        "clips": clips,
        "warnings": [*warnings, *([_FEW_CLIPS] if few else [])],
    }


def _write(folder: Path, results: dict[str, Any], real: list[Video], generated: Generated) -> None:
    """Writes manifest, results and report, and prints the numbers."""
    clips = {
        "samples": [manifest_entry(sample) for sample in generated.samples],
        "real": [video.name for video in real],
    }
    facts = {"detectors": results["detectors"], "keyframe_index": generated.keyframe_index}
    write_json(folder / MANIFEST_FILE, {**results["protocol"], **facts, **clips})
    write_json(folder / RESULTS_FILE, results)
    chosen = choose(results)
    captions = [clip["prompt"] or clip["name"] for clip in results["clips"]]
    pictures = [Picture(captions[i], *generated.load(i), generated.fps, note) for i, note in chosen.items()]
    write_report(folder / REPORT_FILE, results, pictures)
    print(text_table(results))
    print(folder / REPORT_FILE)


def _real_features(
    config: Evaluate,
    protocol: ZeroShotProtocol,
    real: list[tuple[int, Video]],
    detectors_used: dict[str, Any],
    extract: Callable[..., Features],
) -> Features | None:
    """Features of the real clips, if there are any; in `real_features_dir` or the output folder, in a folder named by the hash of their
    fingerprint; or in `real_features_dir` itself, if it is such a folder. Videos that cannot be read are a UserError, and are listed in the
    output folder."""
    settings, folder = config.evaluation, Path(config.output_dir)
    assert isinstance(settings, ZeroShotEvaluation)
    if not real:
        return None

    def clip(index: int) -> tuple[np.ndarray, None]:
        number, video = real[index]
        return _resized(protocol.read(video, number), (protocol.height, protocol.width)), None

    seed = protocol.seed if protocol.clip_position == "random" else None
    selection = {"fps": protocol.fps, "stride": protocol.stride, "clip_position": protocol.clip_position, "seed": seed}
    fingerprint = {**_common(config, protocol, detectors_used), **selection}
    root = Path(settings.real_features_dir or folder / REFERENCE_FOLDER)
    place = root if (root / FINGERPRINT).is_file() else root / hash_json(fingerprint)[:16]
    clips = Clips([file_state(video) for _, video in real], clip, numbers=[number for number, _ in real])
    try:
        return extract(clips, folder=place, fingerprint=fingerprint, label="measure real")
    except UnreadableClips as error:
        lines = [f"{real[fault.clip][1].name}\t{fault.reason}\n" for fault in error.faults]
        with atomic_path(folder / BROKEN_FILE) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")
        advice = f"replace them, or leave them out by evaluation.skip_real={folder / BROKEN_FILE}, which names all"
        raise UserError(f"{error}; {advice}") from None


def _generated_features(
    config: Evaluate,
    protocol: ZeroShotProtocol,
    generated: Generated,
    detectors_used: dict[str, Any],
    extract: Callable[..., Features],
) -> Features:
    size = protocol.height, protocol.width

    def clip(index: int) -> tuple[np.ndarray, np.ndarray | None]:
        frames, keyframe = generated.load(index)
        return _resized(frames, size), None if keyframe is None else _resized(keyframe[None], size)[0]

    prompts = [sample.prompt for sample in generated.samples]
    clips = Clips(generated.names, clip, prompts if any(prompts) else None, generated.keyframe_index)
    common = _common(config, protocol, detectors_used)
    fingerprint = {**common, "generated": generated.fingerprint, "prompts": hash_json(prompts)}
    place = Path(config.output_dir, FEATURES_FOLDER, hash_json(fingerprint)[:16])
    return extract(clips, folder=place, fingerprint=fingerprint, label="measure generated")


def _common(config: Evaluate, protocol: ZeroShotProtocol, detectors_used: dict[str, Any]) -> dict[str, Any]:
    """What features depend on, of real and generated clips."""
    preparation = {key: getattr(protocol, key) for key in ("num_frames", "height", "width", "resize")}
    return {"preparation": preparation, "detectors": detectors_used, "batch_size": config.batch_size}


def _resized(frames: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    return rearrange(resize_and_crop(frames, size).numpy(), "f c h w -> f h w c")


def load_measures(
    settings: ZeroShotEvaluation,
    device: torch.device | str,
    batch_size: int,
    compares: bool,
    classes: bool,
    video_detectors: Mapping[str, VideoDetectorLoader],
) -> tuple[list[Measure], dict[str, str]]:
    """The measures whose weights are given; and for each other one, why not. Some need real clips to compare with, or UCF-101's classes. A
    UserError if there are no weights at all, or some cannot be opened."""
    c3d, inception = settings.c3d, settings.inception

    def load(key: str, weights: str) -> Measure:
        if key == "video":
            return settings.video.build().load(device, batch_size, video_detectors, settings.probe)
        if key == "clip":
            return detectors.ClipScores(weights, device)
        if key == "c3d":
            return detectors.ClassProbabilities(weights, c3d.sha256, device)
        return detectors.FrameFeatures(weights, inception.sha256, device)

    measures: list[Measure] = [detectors.motion, detectors.keyframe_fidelity]
    no_clips = None if compares else "the protocol has nothing to compare it with"
    no_classes = None if classes else "it speaks of the classes of UCF-101"
    missing, keys = {}, []
    for key, names, obstacle, weights in (
        ("video", "FVD, KVD, JEDi", no_clips, settings.video.arguments["weights"]),
        ("c3d", "IS", no_classes, c3d.weights),
        ("clip", "CLIPSIM, CLIP consistency", None, settings.clip.weights),
        ("inception", "Frame FID", no_clips, inception.weights),
    ):
        if obstacle is None:
            keys.append(f"evaluation.{key}.weights")
        if obstacle is not None or weights is None:
            missing[names] = obstacle or f"evaluation.{key}.weights is not set"
        else:
            measures.append(load(key, weights))
    if len(measures) == 2:
        raise UserError(f"no detector has weights; set at least one of {', '.join(keys)} (see docs/evaluation.md)")
    return measures, missing


def compute(generated: Features, real: Features | None, protocol: ZeroShotProtocol) -> dict[str, Any]:
    """All numbers that the features of generated and real clips allow for."""
    names = generated.names
    values: dict[str, Any] = {}
    if real is not None and "features" in names:
        features, frechet = (
            (generated.all("features"), real.all("features")),
            partial(frechet_distance, ddof=protocol.ddof),
        )
        values["fvd"] = dataclasses.asdict(video_distance(*features, frechet, protocol.seed))
        values["kvd"] = {"value": kernel_distance(*features)}
    if real is not None and "vjepa" in names:
        features = generated.all("vjepa"), real.all("vjepa")
        values["jedi"] = dataclasses.asdict(video_distance(*features, jedi_distance, protocol.seed))
    if "probabilities" in names:
        probabilities = generated.all("probabilities")
        splits = min(10, len(probabilities))
        score, deviation = inception_score(probabilities, splits, protocol.seed)
        values["is"] = {"value": score, "std": deviation, "splits": splits}
    if real is not None and "frame_features" in names:
        one, two = (Moments.stream(map(np.concatenate, side.batches("frame_features"))) for side in (generated, real))
        values["frame_fid"] = {"value": frechet_distance(one, two, protocol.ddof)}
    for name in PER_CLIP:
        if name in names:
            values[name] = statistics.mean(generated.all(name).tolist())
            if real is not None and name in real.names:
                values[name]["real"] = float(np.mean(real.all(name)))
    return values

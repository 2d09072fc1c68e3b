"""Running the Moving Sprites protocol: its clips are generated, judged like real ones, and reported with numbers and pictures."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from accelerate import PartialState
from tqdm import tqdm

from microcinema.config.schema import Evaluate
from microcinema.evaluation.generate import generate, protocol_sampler
from microcinema.evaluation.report import REPORT_FILE, RESULTS_FILE, embedded_picture, embedded_video
from microcinema.evaluation.statistics import CONFIDENCE
from microcinema.pipelines.sample_folder import Sample
from microcinema.sprites import metrics, scene
from microcinema.sprites.judge import SpriteJudge, Verdict, judge_clips
from microcinema.sprites.protocol import PARTS, SpritesProtocol, Task
from microcinema.utils.errors import UserError
from microcinema.utils.files import make_folder, write_json
from microcinema.utils.provenance import describe_code
from microcinema.utils.templates import write_page

SAMPLES_FOLDER = "samples"
TEMPLATE = Path(__file__).with_name("templates") / "report.html.jinja"
TITLES = {"seen": "Seen combinations", "heldout": "Held-out combinations", "image": "Real key frames"}
_SCALE = 3  # clips are enlarged before encoding: H.264 halves the resolution of colour, which 64 pixels cannot spare


def run_sprites(config: Evaluate, protocol: SpritesProtocol, state: PartialState) -> None:
    """The Moving Sprites protocol: all processes make clips, the first one judges them. Bad input raises a UserError."""
    settings: Any = config.evaluation
    if config.generated_dir is not None:
        raise UserError("generated_dir=folder goes with the zero-shot protocols; Moving Sprites measures a pipeline")
    folder = make_folder(config.output_dir)
    judge = SpriteJudge.load(settings.classifier)
    judge.classifier.to(state.device)
    # A classifier that does not fit the protocol is refused here, before anything is generated.
    tasks = protocol.tasks()
    judge_clips(tasks[:1], lambda task: real_sample(task.sprite, protocol), protocol, judge, label="")
    sampler = protocol_sampler(config, protocol.size, protocol.size, protocol.num_frames, protocol.fps, state)
    index = sampler.keyframe_index
    items = []
    for task in tasks:
        keyframe = real_sample(task.sprite, protocol, index).keyframe if task.part == "image" else None
        items.append(task.item(sampler.uses_motion_caption, keyframe))
    samples, fingerprint, counts = generate(sampler, items, config.seed, folder / SAMPLES_FOLDER, state)
    if state.is_main_process:
        results = evaluate(protocol, lambda task: samples.load(task.name), judge, folder, fingerprint | counts, index)
        print(f"{text_table(results)}\n{folder / REPORT_FILE}")


def evaluate(
    protocol: SpritesProtocol,
    load: Callable[[Task], Sample],
    judge: SpriteJudge,
    folder: str | os.PathLike[str],
    fingerprint: Mapping[str, Any],
    keyframe_index: int = 0,
) -> dict[str, Any]:
    """Runs every judge on real clips and on a model's; returns the content of `results.json`, written with `report.html` into the folder.

    Args:
        load: returns the model's clip of a task.
        fingerprint: what the clips depend on beside their tasks, for the record.
        keyframe_index: frame of a clip that the key frame is.
    """
    folder = make_folder(folder)
    tasks = protocol.tasks()
    judged = partial(judge_clips, tasks, protocol=protocol, judge=judge, keyframe_index=keyframe_index)
    real = judged(lambda task: real_sample(task.sprite, protocol, keyframe_index), label="judge real")
    other = other_real_features(tasks, protocol, judge)
    model = judged(load, label="judge model")
    sides = model, real, other
    parts: dict[str, Any] = {
        part: summarize(*([v for t, v in zip(tasks, side, strict=True) if t.part == part] for side in sides))
        for part in PARTS
        if protocol.count(part)
    }
    results = {
        "protocol": {"identifier": protocol.identifier, **dataclasses.asdict(protocol)},
        "model": {**fingerprint, "keyframe_index": keyframe_index},
        "versions": describe_code(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "confidence": CONFIDENCE,
        "measures": [dataclasses.asdict(measure) for measure in (*metrics.MEASURES, metrics.FRECHET)],
        "parts": parts,
        "sets": {
            part: {"frechet": {"value": d}} for part in parts if (d := parts[part]["frechet"]["model"]) is not None
        },
        "clips": [verdict.as_json() for verdict in model],
        "real_clips": [verdict.as_json() for verdict in real],
    }
    write_json(folder / RESULTS_FILE, results)
    write_report(folder / REPORT_FILE, results, [load(task) for task in tasks])
    return results


def real_sample(sprite: scene.Sprite, protocol: SpritesProtocol, keyframe_index: int = 0) -> Sample:
    """The real clip, as if a perfect model had made it."""
    frames = protocol.render(sprite).frames
    return Sample(frames, frames[keyframe_index])


def other_real_features(tasks: Sequence[Task], protocol: SpritesProtocol, judge: SpriteJudge) -> np.ndarray:
    """Features (n, d) of other real clips with the same attributes, whose distance to the real ones is the floor for any model."""
    features = []
    for task in tqdm(tasks, desc="features of other real clips", unit="clip"):
        truth = task.sprite
        names = (truth.shape, truth.colour, truth.size, truth.background, truth.motion, truth.speed)
        sprite = scene.place(np.random.default_rng([*task.numbers, 1]), *names)
        features.append(judge(protocol.render(sprite).frames[None])[1])
    return np.concatenate(features)


def summarize(model: Sequence[Verdict], real: Sequence[Verdict], other: Sequence[np.ndarray]) -> dict[str, Any]:
    """Measures of one part's clips, and the Fréchet distances to the real ones of the model's and of `other` real features."""
    features = [verdict.features for verdict in real]
    return {
        "n": len(model),
        "model": metrics.measure_all(model),
        "real": metrics.measure_all(real),
        "frechet": {
            "model": metrics.distance([verdict.features for verdict in model], features),
            "real": metrics.distance(other, features),
        },
        "breakdown": metrics.breakdown(model),
        "confusion": {"model": metrics.confusion(model), "real": metrics.confusion(real)},
    }


def write_report(path: str | os.PathLike[str], results: Mapping[str, Any], samples: Sequence[Sample]) -> None:
    """Writes the page, whole or not at all, of the content of `results.json` and its clips in the order of `results["clips"]`."""
    clips = []
    for clip, sample in zip(results["clips"], samples, strict=True):
        enlarged = [cv2.resize(f, None, fx=_SCALE, fy=_SCALE, interpolation=cv2.INTER_LANCZOS4) for f in sample.frames]
        video = embedded_video(np.stack(enlarged), results["protocol"]["fps"])
        picture = embedded_picture(sample.keyframe)
        clips.append({**clip, "badges": _badges(clip), "video": video, "keyframe": picture})
    measures = {measure.key: measure for measure in metrics.MEASURES}
    write_page(path, TEMPLATE, results=results, clips=clips, measures=measures, titles=TITLES, meanings=PARTS)


def _badges(clip: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was asked for, whether it is there, and what is there instead."""
    asked, judged, right = clip["asked"], clip["judged"], clip["right"]
    keys = [key for key in ("colour", "shape", "background", "motion", "speed") if key in right]
    return [{"text": asked[key], "right": right[key], "instead": judged[key] or "lost"} for key in keys]


def text_table(results: Mapping[str, Any]) -> str:
    """The main numbers for a terminal: a line for each measure, a column for each part, real clips in brackets."""
    parts = results["parts"]
    lines = [f"{'':22}" + "".join(f"{part:>22}" for part in parts)]

    def cell(measure: metrics.Measure, part: Mapping[str, Any]) -> str:
        forms = (("{}", part["model"].get(measure.key)), ("({})", part["real"].get(measure.key)))
        return " ".join(form.format(measure.format(value["value"])) for form, value in forms if value)

    for measure in metrics.MEASURES:
        lines.append(f"{measure.label:22}" + "".join(f"{cell(measure, part):>22}" for part in parts.values()))
    distances = [[part["frechet"][side] for side in ("model", "real")] for part in parts.values()]
    row = "".join(f"{'-' if a is None else f'{a:.2f} ({b:.2f})':>22}" for a, b in distances)
    lines.append(f"{'Frechet distance':22}" + row)
    return "\n".join(lines)

"""How much moves in the clips of a Moving Sprites model, and how true they stay to the key frame, under several settings of `sample`.

Asked against measured motion, of a model that was trained with model.motion_score:
python -m benchmarks.motion_amount --pipeline runs/sprites_motion --figure docs/motion_amount.png

Start time and initial noise, of any model:
python -m benchmarks.motion_amount start_time=1 start_time=0.9 "start_time=0.9 initial_noise=analytic" initial_noise=frame_init
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from benchmarks.motion_following import started_earlier
from benchmarks.reporting import make_parser, run
from microcinema.config.compose import compose
from microcinema.config.sampling import SamplingSettings
from microcinema.data.keyframe_index import keyframe_index
from microcinema.data.motion_score import motion_score
from microcinema.diffusion.rng import generator
from microcinema.evaluation import statistics
from microcinema.evaluation.video_metrics import clip_flow, frame_consistency, psnr
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.sample_folder import to_uint8
from microcinema.pipelines.saving import load_pipeline
from microcinema.sprites import scene
from microcinema.sprites.tracking import judge_motion

ASKED = ("motion=null", "motion=0.1", "motion=0.3", "motion=0.5", "motion=0.7", "motion=0.9")
MEASURES = {
    "score": "motion score",
    "pace": "speed along the named direction, 1: that of its caption",
    "motion": "motion as asked",
    "psnr": "key frame, dB",
    "consistency": "neighboring frames along the flow, dB",
}
DECODED = "real, decoded"
_WORLD_SEED = 240615735  # never a training seed


def sprites(count: int) -> list[scene.Sprite]:
    """The first `count` sprites of this measurement's world that move in a straight line, at a pace of 1."""
    drawn = (scene.sample_attributes(_WORLD_SEED, index) for index in itertools.count())
    return list(itertools.islice((sprite for sprite in drawn if sprite.motion in scene.TRANSLATIONS), count))


def measure_clip(frames: np.ndarray, sprite: scene.Sprite, keyframe: np.ndarray, index: int, fps: float) -> np.ndarray:
    """The `MEASURES` of a clip, uint8 (f, h, w, 3), whose frame `index` should be the key frame, uint8 (h, w, 3)."""
    judged = judge_motion(frames, fps)
    direction, named = scene.TRANSLATIONS[sprite.motion], scene.TRANSLATION_SPEED[scene.SPEEDS.index(sprite.speed)]
    pace = (direction[0] * judged.rates["x"] + direction[1] * judged.rates["y"]) / named
    fidelity = psnr(frames[index], keyframe), frame_consistency(frames, clip_flow(frames))
    return np.array([motion_score(frames, fps), pace, judged.name == sprite.motion, *fidelity])


def captions(sprite: scene.Sprite, has_two: bool, open_pace: bool) -> tuple[str, str | None]:
    """Prompt and motion caption; with `open_pace` without the word for the speed."""
    texts = [scene.caption(sprite), scene.motion_caption(sprite)] if has_two else [scene.combined_caption(sprite)]
    prompt, *motion = [text.replace(f" {sprite.speed}", "") if open_pace else text for text in texts]
    return prompt, motion[0] if motion else None


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints a table of the means over the same key frames, captions and noise for each of the settings."""
    video = load_pipeline(arguments.pipeline)
    video.set_progress_bar_config(disable=True)
    config = video.config
    frames, fps, size = config["num_frames"], config["fps"], config["height"]
    index = keyframe_index(video.keyframe_position, frames)
    shown = sprites(arguments.clips)
    keyframes = [scene.render(sprite, 1, size).frames[0] for sprite in shown]
    real = [scene.render(started_earlier(s, index / fps), frames, size, fps).frames for s in shown]
    rows: dict[str, list[np.ndarray]] = {name: [] for name in ("real", DECODED, *arguments.settings)}
    for name, clips in (("real", real), (DECODED, [decoded(video, clip) for clip in real])):
        rows[name] = [measure_clip(c, s, k, index, fps) for c, s, k in zip(clips, shown, keyframes, strict=True)]
    settings = {name: own_settings(name) for name in arguments.settings}
    starts = range(0, len(shown), arguments.batch_size)
    for start, (name, own) in tqdm([*itertools.product(starts, settings.items())], "clips", unit="batch"):
        part = slice(start, start + arguments.batch_size)
        clips = make(video, shown[part], keyframes[part], own, arguments, start)
        given = zip(clips, shown[part], keyframes[part], strict=True)
        rows[name] += [measure_clip(clip, sprite, keyframe, index, fps) for clip, sprite, keyframe in given]
    report = {name: summary(values) for name, values in rows.items()}
    for name in settings:
        report[name]["asked"] = video.motion_score(settings[name].get("motion"))
    print(table(report))
    if arguments.figure:
        draw(report, arguments.figure)
    return {"pipeline": arguments.pipeline, "clips": len(shown), "open_pace": arguments.open_pace, "settings": report}


@torch.no_grad()
def decoded(video: ImageToVideoPipeline, clip: np.ndarray) -> np.ndarray:
    """A clip, uint8 (f, h, w, 3), through the VAE, whose flicker the flow of generated clips has as well."""
    pixels = rearrange(torch.from_numpy(clip), "f h w c -> f c h w") / 127.5 - 1
    frames = video.decode_latents(video.encode_image(pixels)[None])[0].float()
    return to_uint8(rearrange((frames + 1) / 2, "f c h w -> f h w c").numpy())


def own_settings(overrides: str) -> dict[str, Any]:
    """Settings of stage 2 from overrides of `sample`, such as `motion=0.3 preset=fast`."""
    config = compose("sample", overrides.split())
    return {name: getattr(config, name) for name in SamplingSettings.__dataclass_fields__}


def make(
    video: ImageToVideoPipeline,
    shown: Sequence[scene.Sprite],
    keyframes: Sequence[np.ndarray],
    settings: Mapping[str, Any],
    arguments: argparse.Namespace,
    first: int,
) -> np.ndarray:
    """Clips, uint8 (n, f, h, w, 3); the noise of each depends on its number alone."""
    texts = [captions(sprite, video.uses_motion_caption, arguments.open_pace) for sprite in shown]
    prompts, motions = [prompt for prompt, _ in texts], [motion for _, motion in texts]
    rngs = [generator(0, first + k) for k in range(len(shown))]
    given = {"motion_prompt": motions} if video.uses_motion_caption else {}
    return to_uint8(video(prompts, list(keyframes), **given, generator=rngs, output_type="np", **settings).frames)


def summary(values: Sequence[np.ndarray]) -> dict[str, Any]:
    """Mean of each measure with its interval."""
    return {name: statistics.mean(column) for name, column in zip(MEASURES, np.stack(values).T.tolist(), strict=True)}


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Markdown."""
    lines = [f"| settings | asked | {' | '.join(MEASURES)} |", "| --- |" + " ---: |" * (1 + len(MEASURES))]
    for name, row in report.items():
        asked = "" if row.get("asked") is None else f"{row['asked']:.1f}"
        cells = ["{value:.2f} [{low:.2f}, {high:.2f}]".format(**row[key]) for key in MEASURES]
        lines.append(f"| `{name}` | {asked} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(report: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A figure: each measure with its interval, one place for each of the settings; dashed, the score that was asked for."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    names = [name for name in report if name != "real"]  # decoded ones are what a model could make
    for axes, key in zip(figure.subplots(1, 3), ("score", "pace", "psnr"), strict=True):
        value, low, high = (np.array([report[name][key][end] for name in names]) for end in ("value", "low", "high"))
        axes.errorbar(
            range(len(names)), value, [value - low, high - value], fmt="o", capsize=2
        )  # no line: most settings have no order
        asked = [report[name].get("asked") for name in names]
        if key == "score" and any(asked):
            axes.plot(range(len(names)), [np.nan if each is None else each for each in asked], "k--", label="asked")
            axes.legend()
        axes.set_xticks(range(len(names)), short(names), rotation=30, ha="right", fontsize=7)
        axes.set_title(MEASURES[key], fontsize=9)
    figure.savefig(path, dpi=110)


def short(names: Sequence[str]) -> list[str]:
    """The names without the words that all settings have in common."""
    common = set.intersection(*(set(name.split()) for name in names if "=" in name)) if len(names) > 3 else set()
    return [" ".join(word for word in name.split() if word not in common) for name in names]


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs the benchmark."""
    parser = make_parser(__doc__)
    parser.add_argument("settings", nargs="*", default=ASKED, help="overrides of `sample`, one text for each row")
    parser.add_argument("--pipeline", default="sprites-microcinema", help="an embedded or saved pipeline")
    parser.add_argument("--clips", type=int, default=24, help="clips of each row")
    parser.add_argument("--batch-size", type=int, default=6, help="clips made at once")
    parser.add_argument("--open-pace", action="store_true", help="captions without slowly and quickly")
    parser.add_argument("--figure", type=Path, help="write a figure to this file")
    return run(measure, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())

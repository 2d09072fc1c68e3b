"""A LoRA learns a motion that the embedded Factorized-Dreamer model does not know, a zigzag, from 20 clips: the figures of docs/lora.md.

    python -m scripts.recipes.motion_lora                            # half an hour on one core
    python -m scripts.recipes.motion_lora steps=20 tests=6 known_tests=9    # a quick look

Key frames of all tests are real first frames of objects that were in no training clip. The work folder is deleted first.
"""

import csv
import dataclasses
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm

from microcinema.commands.cli import main as microcinema
from microcinema.config.sampling import SamplingSettings
from microcinema.data.video_writer import write_video
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import Sample, to_uint8
from microcinema.pipelines.saving import load_pipeline
from microcinema.pipelines.text_to_video import animate
from microcinema.sprites import scene
from microcinema.sprites.backgrounds import BACKGROUNDS, WORLD
from microcinema.sprites.judge import SpriteJudge, judge_clips
from microcinema.sprites.protocol import SpritesProtocol
from microcinema.sprites.tracking import track
from microcinema.utils.files import write_json

MODEL = "sprites-factorized-dreamer"
NUM_FRAMES, FPS = 16, 8.0
TIMES = np.arange(NUM_FRAMES) / FPS
MOTION = "zigzag to the right"
SPEED, AMPLITUDE, PERIOD = 8.0, 6.0, 1.0  # scene units per second to the right, scene units up and down, seconds

SAME = 4  # clips that are made once more, with the LoRA off


@dataclass
class Recipe:
    """What decides the figures. Clips of known motions keep them from being forgotten, as DreamBooth's (arXiv 2208.12242) do."""

    work: str = "runs/motion_lora"
    clips: int = 20
    known_clips: int = 40
    steps: int = 300
    train_batch_size: int = 4
    learning_rate: float = 2e-3
    rank: int = 8
    tests: int = 24
    known_tests: int = 30
    num_inference_steps: int = 10
    seed: int = 0


def zigzag(rng: np.random.Generator, split: str) -> tuple[scene.Sprite, np.ndarray]:
    """A sprite of a split and its poses, `f 4`: to the right at an even pace, up and down in straight lines, up first."""
    pairs = [(s, c) for s in scene.SHAPES for c in scene.COLOURS if ((s, c) in scene.HELD_OUT) == (split == "heldout")]
    shape, colour = pairs[rng.integers(len(pairs))]
    size, ground = str(rng.choice(list(scene.SIZES))), str(rng.choice(list(BACKGROUNDS)))
    sprite = scene.place(rng, shape, colour, size, ground, "still", "")
    seconds, edge = TIMES * sprite.pace, sprite.radius + 1.5
    x = rng.uniform(edge, WORLD - 8 - SPEED * seconds[-1])
    y = rng.uniform(edge + AMPLITUDE, WORLD - edge - AMPLITUDE)
    pose = scene.poses(sprite, TIMES)
    pose[:, 0], pose[:, 1] = x + SPEED * seconds, y - AMPLITUDE * triangle(seconds / PERIOD)
    return dataclasses.replace(sprite, x=x, y=y), pose


def render(sprite: scene.Sprite, pose: np.ndarray) -> np.ndarray:
    """The clip of a still sprite on a path, uint8 `f h w 3`: frame by frame."""
    places = [dataclasses.replace(sprite, x=x, y=y) for x, y in pose[:, :2].tolist()]
    return np.concatenate([scene.render(place, 1, 64, FPS).frames for place in places])


def triangle(phase: np.ndarray) -> np.ndarray:
    """The triangle wave of period 1 that rises through 0 at phase 0, between -1 and 1."""
    return 4 * np.abs((phase - 0.25) % 1 - 0.5) - 1


def is_zigzag(frames: np.ndarray) -> bool:
    """Whether a clip, uint8 `f h w 3`, shows the zigzag, by tracking.

    The object is there in all frames but two, goes right evenly at half to one and a half of the speed, and its height is a triangle wave
    of about this period, whatever its phase, and of half to one and a half of this amplitude.
    """
    path = track(frames)
    found = path.detected
    if found.sum() < NUM_FRAMES - 2:
        return False
    seconds, x, height = TIMES[found], path.position[found, 0], -path.position[found, 1]
    line = np.polyfit(seconds, x, 1)
    if not 0.5 < line[0] / SPEED < 1.5 or _explained(x, np.polyval(line, seconds)) < 0.8:
        return False
    best, amplitude = 0.0, 0.0
    for period in np.linspace(0.75, 1.35, 25) * PERIOD:
        for shift in np.linspace(0, 1, 32, endpoint=False):
            design = np.stack([np.ones_like(seconds), triangle(seconds / period + shift)], axis=1)
            solution = np.linalg.lstsq(design, height, rcond=None)[0]
            if (fit := _explained(height, design @ solution)) > best:
                best, amplitude = fit, abs(solution[1])
    return best > 0.8 and 0.5 < amplitude / AMPLITUDE < 1.5


def _explained(values: np.ndarray, fitted: np.ndarray) -> float:
    return 1 - float(((values - fitted) ** 2).sum() / max(((values - values.mean()) ** 2).sum(), 1e-9))


def path_error(frames: np.ndarray, pose: np.ndarray) -> float:
    """Mean distance of the object from its true place, in scene units of 64; a frame without an object counts as one of half the scene."""
    distance = np.linalg.norm(track(frames).position - pose[:, :2], axis=1)
    return float(np.where(np.isnan(distance), WORLD / 2, distance).mean())


def write_clips(folder: Path, recipe: Recipe) -> None:
    """A data set as that of Moving Sprites: clips of the zigzag, and of motions that the model knows."""
    rng = np.random.default_rng([recipe.seed, 19])
    (folder / "videos").mkdir(parents=True)
    with open(folder / "clips.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["videoid", "file", "name", "description", "motion"])
        for index in range(recipe.clips + recipe.known_clips):
            if index < recipe.clips:
                sprite, pose = zigzag(rng, "train")
                frames, motion = render(sprite, pose), MOTION
            else:
                sprite = scene.sample_attributes(recipe.seed, index)
                frames, motion = scene.render(sprite, NUM_FRAMES, 64, FPS).frames, scene.motion_caption(sprite)
            name = f"videos/{index:04d}.mp4"
            write_video(folder / name, frames, fps=FPS, crf=14)
            table.writerow([f"{index:04d}", name, f"{scene.caption(sprite)}, {motion}", scene.caption(sprite), motion])


def train(recipe: Recipe) -> Path:
    """The folder of the LoRA: the commands `prepare latents` and `train`."""
    work = Path(recipe.work)
    keys = {
        "experiment": "sprites_factorized_dreamer",
        "lora": "motion",
        "lora.rank": recipe.rank,
        "lora.alpha": recipe.rank,
        "init_weights_from": MODEL,
        "data.root": work / "data",
        "cached_latents": work / "latents",
        "output_dir": work / "lora",
        "max_train_steps": recipe.steps,
        "train_batch_size": recipe.train_batch_size,
        "learning_rate": recipe.learning_rate,
        "lr_warmup_steps": 10,
        "ema_decay": 0.98,
        "checkpointing_steps": recipe.steps,
        "validation_prompts": "[]",
        "seed": recipe.seed,
    }
    for command in (["prepare", "latents"], ["train"]):
        if status := microcinema([*command, *(f"{key}={value}" for key, value in keys.items())]):
            sys.exit(status)
    return work / "lora"


class Clips:
    """Clips that a pipeline makes of the same sprites, key frames and noise, with a LoRA and without."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.judge = recipe, SpriteJudge.load("sprites-classifier")
        rng = np.random.default_rng([recipe.seed, 20])
        self.new = [zigzag(rng, "heldout") for _ in range(recipe.tests)]
        self.protocol = SpritesProtocol(0, 0, recipe.known_tests)
        self.real = [render(sprite, pose) for sprite, pose in self.new]

    def make(self, video: ImageToVideoPipeline, item: PromptItem) -> np.ndarray:
        """A clip, uint8 `f h w 3`."""
        settings = SamplingSettings(num_inference_steps=self.recipe.num_inference_steps)
        return to_uint8(animate(video, [item], [item.image], settings, output_type="np").frames[0])

    def new_clips(self, video: ImageToVideoPipeline, label: str) -> list[np.ndarray]:
        """Of the zigzag."""
        items = [
            PromptItem(scene.caption(sprite), f"{i}", MOTION, sample_index=i, image=frames[0])
            for i, ((sprite, _), frames) in enumerate(zip(self.new, self.real, strict=True))
        ]
        return [self.make(video, item) for item in tqdm(items, label, mininterval=5)]

    def known_clips(self, video: ImageToVideoPipeline, label: str, count: int | None = None) -> list[np.ndarray]:
        """Of the motions that the model knows: the part `image` of the protocol, or the first clips of it."""
        tasks = [(task, self.protocol.render(task.sprite).frames[0]) for task in self.protocol.tasks()[:count]]
        return [self.make(video, task.item(True, image)) for task, image in tqdm(tasks, label, mininterval=5)]

    def figures(self, new: Sequence[np.ndarray], known: Sequence[np.ndarray]) -> dict[str, float]:
        """Shares of clips, and scene units."""
        tasks = self.protocol.tasks()
        samples = {task.name: Sample(clip, clip[0]) for task, clip in zip(tasks, known, strict=True)}
        verdicts = judge_clips(tasks, lambda task: samples[task.name], self.protocol, self.judge, "")
        errors = [path_error(clip, pose) for clip, (_, pose) in zip(new, self.new, strict=True)]
        return {
            "zigzag": float(np.mean([is_zigzag(clip) for clip in new])),
            "path_error": float(np.mean(errors)),
            "zigzag_of_known": float(np.mean([is_zigzag(clip) for clip in known])),
            "motion_of_known": float(np.mean([verdict.right["motion"] for verdict in verdicts])),
            "object_of_known": float(np.mean([verdict.right["object"] for verdict in verdicts])),
        }


def measure(recipe: Recipe, lora: Path) -> dict[str, Any]:
    """The figures of real clips and of the model before, with the LoRA, and with it off again; writes the figure."""
    clips, rows = Clips(recipe), {}
    known_real = [clips.protocol.render(task.sprite).frames for task in clips.protocol.tasks()]
    rows["real clips"] = clips.figures(clips.real, known_real)
    video = load_pipeline(MODEL)
    video.set_progress_bar_config(disable=True)
    before = clips.new_clips(video, "zigzag, before"), clips.known_clips(video, "known, before")
    video.load_lora_weights(lora, adapter_name="zigzag")
    after = clips.new_clips(video, "zigzag, with the LoRA"), clips.known_clips(video, "known, with the LoRA")
    rows |= {"before": clips.figures(*before), "with the LoRA": clips.figures(*after)}
    video.disable_lora()
    off = clips.known_clips(video, "known, off", SAME)
    draw(Path(recipe.work) / "motion_lora.png", clips, before[0], after[0])
    same = all(np.array_equal(one, other) for one, other in zip(before[1][:SAME], off, strict=True))
    return {"recipe": dataclasses.asdict(recipe), "figures": rows, "identical_when_off": same}


def draw(path: Path, clips: Clips, before: Sequence[np.ndarray], after: Sequence[np.ndarray], count: int = 6) -> None:
    """Paths of the object in the first clips of the zigzag: the true one, without the LoRA, and with it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, count, figsize=(2 * count, 2.3), layout="constrained")
    for axis, (sprite, pose), old, new in zip(axes, clips.new, before, after, strict=False):
        axis.plot(pose[:, 0], pose[:, 1], color="0.75", linewidth=4, label="true")
        axis.plot(*track(old).position.T, color="tab:blue", marker=".", label="before")
        axis.plot(*track(new).position.T, color="tab:red", marker=".", label="with the LoRA")
        axis.set(xlim=(0, WORLD), ylim=(WORLD, 0), xticks=[], yticks=[], aspect="equal")
        axis.set_title(f"{sprite.colour} {sprite.shape}", fontsize=9)
    axes[0].legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=100)


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The figures in Markdown."""
    lines = [
        "| | zigzag | distance from the true path | zigzag though another motion is asked | known motion | known object |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, row in rows.items():
        shares = [f"{row[key]:.0%}" for key in ("zigzag_of_known", "motion_of_known", "object_of_known")]
        lines.append(f"| {name} | {row['zigzag']:.0%} | {row['path_error']:.1f} | {' | '.join(shares)} |")
    return "\n".join(lines)


def main(overrides: Sequence[str]) -> None:
    """Runs the recipe; prints the table and leaves figures, picture and LoRA in the work folder."""
    recipe = Recipe(**OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_dotlist([*overrides])))  # type: ignore[arg-type]
    work = Path(recipe.work)
    shutil.rmtree(work, ignore_errors=True)
    write_clips(work / "data", recipe)
    torch.set_num_threads(1)
    result = measure(recipe, train(recipe))
    write_json(work / "figures.json", result)
    print(f"{table(result['figures'])}\nthe same clips with the LoRA off: {result['identical_when_off']}\n{work}")


if __name__ == "__main__":
    main(sys.argv[1:])

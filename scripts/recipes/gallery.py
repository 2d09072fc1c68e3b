"""The gallery of the docs, `docs/gallery.md`: what each part does, in clips of the embedded models. `python -m scripts.recipes.gallery`

Every clip is made by the command that stands beside it; a minute or two on two cores.
"""

import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from microcinema.commands.cli import main as microcinema
from microcinema.data.video_reader import probe, read_clip
from microcinema.data.video_writer import write_gif
from microcinema.utils.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
WORK, DOCS = Path("runs/gallery"), ROOT / "docs"
SCALE, GAP = 2, 4  # of the GIFs: a pixel of the small world is hardly seen on a screen; pixels between tiles
KEYFRAME = f"{WORK}/star.png"
STAR, LEFT = "a large red star on sand", "moving quickly to the left"
MOVING_STAR = "a large red star moving quickly to the left on sand"
ANIMATED = (f"image={KEYFRAME}", f"prompt={MOVING_STAR}")
FACTORIZED = (f"image={KEYFRAME}", "pipeline=sprites-factorized-dreamer", f"prompt={STAR}")


@dataclass(frozen=True)
class Row:
    """Clips side by side: the keys of `sample` that all share, and those of each."""

    name: str
    title: str
    text: str
    shared: tuple[str, ...]
    tiles: tuple[tuple[str, ...], ...]


ROWS = (
    Row(
        "seeds",
        "Seeds",
        "One prompt, four seeds: other key frames, and other clips of them.",
        (f"prompt={MOVING_STAR}",),
        tuple((f"seed={seed}",) for seed in range(4)),
    ),
    Row(
        "motion",
        "One picture, five motions",
        "The key frame is the same file; Factorized-Dreamer reads the motion from a caption of its own.",
        FACTORIZED,
        tuple(
            (f"motion_prompt={motion}",)
            for motion in (
                LEFT,
                "moving quickly to the right",
                "rotating quickly clockwise",
                "growing slowly",
                "staying still",
            )
        ),
    ),
    Row(
        "papers",
        "MicroCinema and Factorized-Dreamer",
        "The same picture: MicroCinema takes it for the center frame, which stays as it is, Factorized-Dreamer for the first.",
        (f"image={KEYFRAME}",),
        (
            ("pipeline=sprites-microcinema", f"prompt={MOVING_STAR}"),
            ("pipeline=sprites-factorized-dreamer", f"prompt={STAR}", f"motion_prompt={LEFT}"),
        ),
    ),
    Row(
        "guidance",
        "Guidance by the text",
        "Without guidance, `guidance_scale=1`, the motion is followed less surely; with much of it colors and outlines suffer.",
        ANIMATED,
        tuple((f"guidance_scale={scale}",) for scale in (1, 1.5, 3, 8)),
    ),
    Row(
        "gamma",
        "Noise that leans to the key frame",
        "The authors start sampling from noise with `gamma` times the key frame in it ([method](method.md)). Far too much of it holds the clip back.",
        ANIMATED,
        tuple((f"gamma={gamma}",) for gamma in (0, 0.02, 0.1, 0.3)),
    ),
    Row(
        "steps",
        "Fewer steps",
        "What the presets and still fewer steps look like ([samplers](samplers.md)).",
        ANIMATED,
        (("preset=quality",), ("preset=fast",), ("num_inference_steps=5",), ("num_inference_steps=2",)),
    ),
    Row(
        "start",
        "Initial noise",
        "Noise with the key frame's low frequencies (FrameInit) or with the moments of noisy clips (Analytic-Init), and a start at an earlier time ([amount of motion](motion.md)).",
        ANIMATED,
        (
            ("initial_noise=prior",),
            ("initial_noise=frame_init",),
            ("initial_noise=analytic", "start_time=0.9"),
        ),
    ),
    Row(
        "long",
        "Longer than the model's clips",
        "Clips continued from their last frame, and one clip by windows that overlap.",
        (*FACTORIZED, "motion_prompt=rotating slowly clockwise"),
        (("num_segments=2",), ("num_frames=31",)),
    ),
)


def make_row(row: Row) -> list[Path]:
    """Makes the clips of a row; their files.

    Raises:
        SystemExit: the command failed, with its exit status.
    """
    files = []
    for number, tile in enumerate(row.tiles):
        folder = WORK / row.name / str(number)
        if status := microcinema(["sample", *row.shared, *tile, f"output_dir={folder}"]):
            raise SystemExit(status)
        files += folder.glob("*.mp4")
    return files


def join(files: Sequence[Path], target: Path) -> None:
    """A GIF of clips side by side; a shorter one stays at its last frame."""
    info = [probe(file) for file in files]
    length = max(each.num_frames for each in info)
    tiles: list[np.ndarray] = []
    for file, each in zip(files, info, strict=True):
        clip = read_clip(file, each.num_frames).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
        clip = np.concatenate([clip, clip[-1:].repeat(length - len(clip), axis=0)])
        tiles += [clip, np.full((length, clip.shape[1], GAP, 3), 255, np.uint8)]
    write_gif(target, np.concatenate(tiles[:-1], axis=2), info[0].fps)


def render(rows: Sequence[Row]) -> str:
    """The page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, keep_trailing_newline=True
    )
    shown = [
        {
            "row": row,
            "labels": [", ".join(tile) for tile in row.tiles],
            "command": f"microcinema sample {shlex.join([*row.shared, *row.tiles[0]])}".replace(KEYFRAME, "star.png"),
        }
        for row in rows
    ]
    return environment.get_template("gallery.md.jinja").render(rows=shown, keyframe=MOVING_STAR)


def keyframe_command() -> list[str]:
    """The command that draws the picture which most rows share."""
    return ["sample", f"prompt={MOVING_STAR}", f"output_dir={WORK}/keyframe"]


def main() -> int:
    """Makes all clips anew, their GIFs and the page."""
    shutil.rmtree(WORK, ignore_errors=True)
    if status := microcinema(keyframe_command()):
        return status
    (picture,) = (WORK / "keyframe").glob("*_keyframe.png")
    shutil.copy(picture, KEYFRAME)
    (DOCS / "gallery").mkdir(exist_ok=True)
    for row in ROWS:
        join(make_row(row), DOCS / "gallery" / f"{row.name}.gif")
    with atomic_path(DOCS / "gallery.md") as temporary:
        temporary.write_text(render(ROWS), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""`make demo`: the whole system on Moving Sprites, each step the command that a user would type, shown before it runs."""

import csv
import json
import shlex
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from microcinema.commands.cli import main as microcinema
from microcinema.data.video_reader import probe, read_clip
from microcinema.data.video_writer import write_contact_sheet, write_gif

HERE = Path("runs/demo")
PROMPTS, TWO_PROMPTS = HERE / "prompts.csv", HERE / "two_prompts.csv"
MICROCINEMA, FACTORIZED_DREAMER = "sprites-microcinema", "sprites-factorized-dreamer"
BOTH = HERE / "both_papers"
PAPERS = {
    "microcinema": "MicroCinema",
    "factorized_dreamer": "Factorized-Dreamer, light (ours)",
}  # folder and title, in the order of rows
SCALE = 2  # of the GIF: a pixel of the small world is hardly seen on a screen

# id: what is to be seen (with a place for the motion), and how it moves
SCENES = {
    "star": ("a large red star {}on sand", "moving quickly to the left"),
    "moon": ("a large yellow moon {}on night", "rotating slowly counterclockwise"),
    "square": ("a small orange square {}on water", "growing quickly"),
    "circle": ("a small red circle {}on grass", "bouncing quickly"),
}

STEPS = [
    (
        "Render a small world: clips with captions",
        ["prepare", "sprites", f"output_dir={HERE}/data", "num_videos=200"],
    ),
    (
        "Encode it once, for the run that is to come",
        ["prepare", "latents", "experiment=sprites_demo", f"data.root={HERE}/data"],
    ),
    (
        "Train a video model on it for a short while, from the text-to-image model alone",
        ["train", "experiment=sprites_demo", f"data.root={HERE}/data", f"output_dir={HERE}/train"],
    ),
    (
        "Sample with the embedded MicroCinema model: text to key frame, which is the centre frame, key frame to video",
        ["sample", f"pipeline={MICROCINEMA}", f"prompts={PROMPTS}", f"output_dir={HERE}/microcinema"],
    ),
    (
        "Sample with the embedded Factorized-Dreamer model, with our light pixel-aware attention: the same key frames, the motion told apart",
        ["sample", f"pipeline={FACTORIZED_DREAMER}", f"prompts={TWO_PROMPTS}", f"output_dir={HERE}/factorized_dreamer"],
    ),
    (
        "Measure the embedded MicroCinema model: is the named object there, does it move as named?",
        [
            "evaluate",
            "evaluation=sprites",
            f"pipeline={MICROCINEMA}",
            f"output_dir={HERE}/report",
            "evaluation.protocol.num_prompts=24",
            "evaluation.protocol.num_heldout_prompts=12",
            "evaluation.protocol.num_image_prompts=12",
        ],
    ),
]


def write_prompts() -> None:
    """One caption each for MicroCinema; for Factorized-Dreamer the two parts of it, and MicroCinema's key frame."""
    with (
        open(PROMPTS, "w", encoding="utf-8", newline="") as one,
        open(TWO_PROMPTS, "w", encoding="utf-8", newline="") as two,
    ):
        whole, parts = csv.writer(one), csv.writer(two)
        whole.writerow(("id", "prompt"))
        parts.writerow(("id", "prompt", "motion_prompt", "image"))
        for name, (scene, motion) in SCENES.items():
            whole.writerow((name, scene.format(f"{motion} ")))
            parts.writerow((name, scene.format(""), motion, f"microcinema/{name}_keyframe.png"))


def show_both() -> None:
    """A GIF of all scenes, MicroCinema's videos above Factorized-Dreamer's, and a sheet of their frames with the prompts."""
    BOTH.mkdir()
    rows, sheet, captions, keyframes = [], [], [], []
    for paper, title in PAPERS.items():
        files = {name: HERE / paper / f"{name}.mp4" for name in SCENES}
        info = probe(files["star"])
        clips = {name: read_clip(file, info.num_frames) for name, file in files.items()}
        rows.append(np.concatenate(list(clips.values()), axis=2))
        for name, clip in clips.items():
            key = json.loads((HERE / paper / f"{name}.json").read_text(encoding="utf-8"))["keyframe_index"]
            sheet.append(clip[key % 2 :: 2])  # every second frame, the key frame among them
            keyframes.append(key // 2)
        captions += [f"{title}: {scene.format('')} | {motion}" for scene, motion in SCENES.values()]
    grid = np.concatenate(rows, axis=1).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    write_gif(BOTH / "all.gif", grid, info.fps)
    write_contact_sheet(BOTH / "sheet.png", sheet, captions, keyframes=keyframes)


def main() -> int:
    """Runs the steps in order, stops at the first that fails, and prints what to look at."""
    shutil.rmtree(HERE, ignore_errors=True)  # of an earlier demo: training would refuse to overwrite its checkpoints
    HERE.mkdir(parents=True)
    write_prompts()
    start = time.monotonic()
    for number, (heading, command) in enumerate(STEPS, 1):
        print(f"\n== {number}/{len(STEPS)}  {heading}\n$ microcinema {shlex.join(command)}", flush=True)
        status = microcinema(command)
        if status:
            return status
    show_both()
    print(f"\n== Done in {time.monotonic() - start:.0f} s")
    for what, where in {
        "the same key frames, centre frames of MicroCinema (above), first frames of our light Factorized-Dreamer (below)": BOTH
        / "all.gif",
        "videos of the model trained just now": HERE / "train" / "validation",
        "page with everything measured": HERE / "report" / "report.html",
    }.items():
        print(f"{what}: {where.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

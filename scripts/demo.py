"""`make demo`: the whole system on Moving Sprites, each step the command that a user would type, shown before it runs."""

import shlex
import shutil
import sys
import time
from pathlib import Path

from microcinema.cli import main as microcinema

HERE = Path("runs/demo")
PROMPTS = HERE / "prompts.txt"
EMBEDDED = "sprites-microcinema"

STEPS = [
    (
        "Render a small world: clips with captions, encoded once by the VAE",
        ["prepare", f"output_dir={HERE}/data", "num_clips=200", "latents_of=sprites-base"],
    ),
    (
        "Train a video model on it for a short while, from the text-to-image model alone",
        ["train", "experiment=sprites_demo", f"data.dataset.root={HERE}/data", f"output_dir={HERE}/train"],
    ),
    (
        f"Sample with the embedded model {EMBEDDED}: text to key frame, key frame to video",
        ["sample", f"pipeline={EMBEDDED}", f"prompts={PROMPTS}", f"output_dir={HERE}/videos"],
    ),
    (
        "Measure the embedded model: is the named object there, does it move as named?",
        [
            "evaluate",
            "evaluation=sprites",
            f"pipeline={EMBEDDED}",
            f"output_dir={HERE}/report",
            "evaluation.protocol.num_prompts=24",
            "evaluation.protocol.num_heldout_prompts=12",
            "evaluation.protocol.num_image_prompts=12",
        ],
    ),
]


def main() -> int:
    """Runs the steps in order, stops at the first that fails, and prints what to look at."""
    shutil.rmtree(HERE, ignore_errors=True)  # of an earlier demo: training would refuse to overwrite its checkpoints
    PROMPTS.parent.mkdir(parents=True)
    PROMPTS.write_text(
        "a large red star moving quickly to the left on sand\n"
        "a small blue heart rotating slowly clockwise on wood\n"
        "a large yellow moon growing slowly on night\n"
        "a small orange circle bouncing quickly on grass\n",
        encoding="utf-8",
    )
    start = time.monotonic()
    for number, (heading, command) in enumerate(STEPS, 1):
        print(f"\n== {number}/{len(STEPS)}  {heading}\n$ microcinema {shlex.join(command)}", flush=True)
        status = microcinema(command)
        if status:
            return status
    print(f"\n== Done in {time.monotonic() - start:.0f} s")
    for what, where in {
        "videos of the embedded model": HERE / "videos",
        "videos of the model trained just now": HERE / "train" / "validation",
        "page with everything measured": HERE / "report" / "report.html",
    }.items():
        print(f"{what}: {where.resolve()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

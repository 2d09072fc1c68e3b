"""The ablation of both papers: the sweeps `ablation_microcinema` and `ablation_factorized_dreamer`, with text sensitivity, figures and one page.

    microcinema prepare sprites num_videos=6000 rotation_weight=4
    microcinema prepare sprites split=heldout num_videos=32 rotation_weight=4 output_dir=runs/data/sprites_heldout
    microcinema prepare latents experiment=sprites_factorized_dreamer "cached_parts=[keyframe, flow]"
    python -m scripts.recipes.ablation workers=2

Arguments are keys of `microcinema sweep`, for both papers. A run is `train`, which measures the held-out loss, and `benchmarks.sprites text_sensitivity`; with
`--judged` it is `evaluate` as well, whose sampled videos take longer. Started again, it resumes, as any sweep does. `ablation.md`, `ablation.png` and
`ablation_curves.png` are drawn in the end of what is done.

A measurement of the 32 held-out clips takes some 20 s on one core, six of them two minutes of each run, and text sensitivity 45 s.
Runs compare at equal steps, and in the curves at equal time of training by the median pace of each; for that they should share the machine alike.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from microcinema.commands import sweep
from microcinema.config.compose import compose
from microcinema.evaluation.measures import Measure
from microcinema.utils.errors import UserError
from microcinema.utils.files import lock_folder
from scripts.recipes.ablation_curves import read_curves
from scripts.recipes.ablation_report import publish

PAPERS = ("microcinema", "factorized_dreamer")
JUDGED = [
    "evaluation=sprites",
    "evaluation.protocol.num_prompts=16",
    "evaluation.protocol.num_heldout_prompts=16",
    "evaluation.protocol.num_image_prompts=32",
    "evaluation.num_inference_steps=12",
]
"""What `--judged` tells every evaluation."""
NUM_CLIPS = 64  # for text sensitivity
STEP, FIGURES = "opposite_motion", "figures.json"
MEASURES = (
    Measure(
        STEP, "Opposite motion", "relative increase of the loss where it moves by a caption of it", "%", "higher", 1
    ),
    Measure("seconds", "Training", "seconds of all steps at the median pace of the run", "s", "lower", 0),
)


def text_sensitivity(folder: Path) -> list[sweep.Step]:
    """The further step of the run in a folder: text sensitivity of what it has trained, and the time that this took."""

    def read(measured: Path) -> tuple[dict[str, float], Sequence[Measure]]:
        content = json.loads((measured / FIGURES).read_text(encoding="utf-8"))
        seconds = read_curves(folder / "train")["seconds"][-1]
        return {STEP: content["text_sensitivity"]["text_sensitivity"], "seconds": seconds}, MEASURES

    options = ["--pipeline", str(folder / "train"), f"--clips={NUM_CLIPS}"]
    arguments = ["-m", "benchmarks.sprites", "--json", str(folder / STEP / FIGURES), "text_sensitivity", *options]
    return [sweep.Step(STEP, arguments, read)]


def main(argv: Sequence[str] | None = None, runner: sweep.Runner | None = None) -> int:
    """Runs the sweeps and publishes them; returns 0, 1 if runs failed, 2 for bad input or 130 when interrupted.

    Args:
        runner: of the commands; None: processes.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="keys of microcinema sweep, such as workers=2 seeds=[0]")
    parser.add_argument("--paper", choices=PAPERS, help="one of them; both without it")
    parser.add_argument("--judged", action="store_true", help="sample videos of every run and judge them as well")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"))
    arguments = parser.parse_intermixed_args(argv)
    papers = [arguments.paper] if arguments.paper else PAPERS
    judged = [f"evaluate=[{', '.join(JUDGED)}]"] if arguments.judged else []
    try:
        own = [[f"sweep=ablation_{paper}", f"output_dir={arguments.output_dir / paper}"] for paper in papers]
        configs = [compose("sweep", [*keys, *judged, *arguments.overrides]) for keys in own]
        with lock_folder(arguments.output_dir):
            runs = [sweep.plan(config, text_sensitivity) for config in configs]  # of both, before anything starts
            failed = [sweep.run_all(config, planned, runner) for config, planned in zip(configs, runs, strict=True)]
            publish(arguments.output_dir, dict(zip(papers, zip(configs, runs, strict=True), strict=True)))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return max(failed)


if __name__ == "__main__":
    sys.exit(main())

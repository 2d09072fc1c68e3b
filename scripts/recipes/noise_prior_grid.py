"""Fréchet distance over lambda and gamma of the appearance noise prior, beside the figure of MicroCinema's authors (arXiv 2311.18829).

    python -m scripts.recipes.noise_prior_grid --pipeline sprites-microcinema --steps 600

For each lambda, on a schedule that ends with signal and on one with zero terminal SNR, a model is trained further from `--pipeline`, to predict epsilon
where a step has signal and v where the last one has none. Then gamma changes in sampling alone: the clips of the protocol's part `image`, from real key
frames, are judged by the Fréchet distance of the embedded judge's features. `noise_prior.json` and `noise_prior.png` are written to the output
directory. Started again, the grid resumes. Is there the authors' valley? What comes out is drawn as it comes out.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from microcinema.commands.sweep import COMMAND, Runner
from microcinema.pipelines.loading import INDEX
from microcinema.sprites.evaluate import RESULTS_FILE
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path, make_folder, write_json
from microcinema.utils.processes import Processes

LAMBDAS = (0.0, 0.03, 0.1)
GAMMAS = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)
SCHEDULES = {
    "ends with signal": ["diffusion.scheduler.prediction_type=epsilon"],
    "zero terminal SNR": [
        "diffusion.scheduler.prediction_type=v_prediction",
        "diffusion.scheduler.rescale_betas_zero_snr=true",
        "diffusion.scheduler.timestep_spacing=trailing",
    ],
}
AUTHORS = {
    0.0: (692, 635, 576, 555, 572, 635),
    0.03: (626, 551, 508, 559, 635, 747),
    0.1: (608, 540, 525, 550, 600, 680),
}
"""FVD on UCF-101 by lambda, for each of `GAMMAS`: read off the authors' figure, to 3."""
Distances = dict[str, dict[float, dict[float, float]]]
"""By schedule, lambda and gamma."""


def measure(arguments: argparse.Namespace, runner: Runner) -> Distances:
    """Trains and samples what does not stand yet.

    Raises:
        UserError: a command failed.
    """
    distances: Distances = {schedule: {strength: {} for strength in LAMBDAS} for schedule in SCHEDULES}
    for schedule, scheduler in SCHEDULES.items():
        for strength in LAMBDAS:
            folder = make_folder(arguments.output_dir / schedule.replace(" ", "_") / f"lambda-{strength}")
            trained = folder / "train"
            if not (trained / INDEX).is_file():  # which training writes last
                _run(
                    runner, "train", [*train_overrides(arguments, strength, scheduler), f"output_dir={trained}"], folder
                )
            for gamma in GAMMAS:
                report = folder / f"gamma-{gamma}"
                if not (report / RESULTS_FILE).is_file():
                    own = [f"pipeline={trained}", f"output_dir={report}", f"evaluation.gamma={gamma}"]
                    _run(runner, "evaluate", [*evaluate_overrides(arguments.clips), *own], folder)
                result = json.loads((report / RESULTS_FILE).read_text(encoding="utf-8"))
                distances[schedule][strength][gamma] = result["parts"]["image"]["frechet"]["model"]
    return distances


def train_overrides(arguments: argparse.Namespace, strength: float, scheduler: Sequence[str]) -> list[str]:
    """What `train` is told, but for its folder: the target changes, so that all layers train."""
    return [
        f"experiment={arguments.experiment}",
        f"init_weights_from={arguments.pipeline}",
        f"data.root={arguments.data}",
        f"max_train_steps={arguments.steps}",
        "trainable_parameters=all",
        "trainable_unet_layers=[]",
        "validation_prompts=[]",
        "resume_from_checkpoint=latest",
        f"diffusion.noise_prior.strength={strength}",
        *scheduler,
    ]


def evaluate_overrides(clips: int) -> list[str]:
    """What `evaluate` is told, but for model, folder and gamma: real key frames alone, so that stage 1 plays no part."""
    protocol = "evaluation.protocol"
    return [
        "evaluation=sprites",
        f"{protocol}.num_prompts=0",
        f"{protocol}.num_heldout_prompts=0",
        f"{protocol}.num_image_prompts={clips}",
    ]


def _run(runner: Runner, command: str, arguments: Sequence[str], folder: Path) -> None:
    if runner([*COMMAND, command, *arguments], folder / "log.txt"):
        raise UserError(f"{command} failed; see '{folder / 'log.txt'}'")


def draw(distances: Distances, path: Path) -> None:
    """The figure: one panel for the authors' FVD and one for each schedule of Moving Sprites, a line for each lambda."""
    from matplotlib.figure import Figure

    authors = {strength: dict(zip(GAMMAS, values, strict=True)) for strength, values in AUTHORS.items()}
    panels = {"authors, UCF-101 (read off their figure)": authors}
    panels |= {f"Moving Sprites, {schedule}": lines for schedule, lines in distances.items()}
    figure = Figure(figsize=(13, 4), layout="constrained")
    for panel, (title, lines) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        for strength, values in lines.items():
            panel.plot(list(values), list(values.values()), "o-", label=f"lambda {strength:g}")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("gamma")
        panel.set_ylabel("FVD" if lines is authors else "Fréchet distance of the judge's features")
        panel.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")


def main(argv: Sequence[str] | None = None, runner: Runner | None = None) -> int:
    """Reads the command line, measures and draws; returns 0, or 2 for bad input and for a command that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", default="sprites-microcinema", help="where every training starts")
    parser.add_argument("--experiment", default="sprites_microcinema", help="the network of the pipeline")
    parser.add_argument("--data", type=Path, default=Path("runs/data/sprites"), help="what `prepare` wrote")
    parser.add_argument("--steps", type=int, default=600, help="of each training")
    parser.add_argument("--clips", type=int, default=60, help="that every distance is measured with")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/noise_prior"))
    arguments = parser.parse_args(argv)
    try:
        distances = measure(arguments, runner or Processes(workers=1))
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    settings = {name: str(getattr(arguments, name)) for name in ("pipeline", "experiment", "steps", "clips")}
    write_json(arguments.output_dir / "noise_prior.json", {**settings, "distances": distances})
    draw(distances, arguments.output_dir / "noise_prior.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Figures on Moving Sprites that are too slow or too special for `microcinema evaluate`: one command for each.

python -m benchmarks.sprites long_video --prompts 8
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.reporting import make_parser, run
from microcinema.data.keyframe_index import keyframe_index
from microcinema.pipelines.saving import load_pipeline
from microcinema.utils.errors import UserError

FLOW_WORLD_SEED = 20240820
"""Seed of the clips on which PredictNet is measured; never a training seed."""


def long_video(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints how far continued clips and windows of the same length drift from their key frame, clip by clip."""
    from benchmarks import long_video as measurement
    from microcinema.sprites.judge import SpriteJudge

    pipeline, judge = load_pipeline(arguments.pipeline), SpriteJudge.load(arguments.classifier)
    pipeline.set_progress_bar_config(disable=True)
    names = ("num_segments", "num_inference_steps", "guidance_scale", "window_overlap", "seed")
    settings = {name: getattr(arguments, name) for name in names}
    sprites = measurement.lasting_sprites(arguments.prompts)
    windows = measurement.windows_of(pipeline, arguments.num_segments, arguments.window_overlap)
    place = windows.keyframe_index(pipeline.keyframe_position), pipeline.config["fps"]
    makers = measurement.makers(pipeline, **settings)
    drift = measurement.measure(makers, sprites, judge, pipeline.config["height"], *place)
    if place[0]:
        print("\ncontinuation is not measured: this model's key frame is not the first frame of a clip")
    print(f"\n{measurement.text_table(drift)}")
    return {"pipeline": arguments.pipeline, "prompts": arguments.prompts, **settings, "drift": drift}


def motion_following(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints how often a video moves as its motion caption says, with key frame and descriptive caption fixed."""
    from benchmarks import motion_following as measurement

    pipeline = load_pipeline(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    scenes = measurement.scenes(arguments.keyframes)
    size, fps = pipeline.config["height"], pipeline.config["fps"]
    settings = {name: getattr(arguments, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
    index = keyframe_index(pipeline.keyframe_position, pipeline.config["num_frames"])
    real = partial(measurement.real, index=index, fps=fps)
    makers = {"model": measurement.pipeline_maker(pipeline, **settings), "real": real}
    figures = {name: measurement.measure(maker, scenes, size, fps) for name, maker in makers.items()}
    for name, figure in figures.items():
        motion = figure["motion"]
        print(f"{name:<8}{motion['value']:>8.1%} of {motion['n']} ({motion['low']:.1%} to {motion['high']:.1%})")
    for motion, counts in figures["model"]["confusion"].items():
        print(f"  {motion:<18}" + ", ".join(f"{name or 'nothing'} {count}" for name, count in counts.items()))
    return {"pipeline": arguments.pipeline, "keyframes": arguments.keyframes, **settings, **figures}


def interpolation(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints how near frames between key frames are to the real ones of held-out clips, beside repeated and blended neighbors."""
    from benchmarks import interpolation as measurement

    pipeline = load_pipeline(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    size, fps = pipeline.config["height"], arguments.fps or pipeline.config["fps"]
    settings = {name: getattr(arguments, name) for name in ("num_inference_steps", "guidance_scale", "seed")}
    makers = measurement.makers(pipeline, arguments.told_fps or fps, **settings)
    report: dict[str, Any] = {"pipeline": arguments.pipeline, "clips": arguments.clips, "fps": fps, **settings}
    for task, places in measurement.places_of(pipeline.config["num_frames"], arguments.factor).items():
        sprites = measurement.moving_sprites(arguments.clips)
        figures = report[task] = measurement.measure(makers, sprites, places, size, fps)
        for name, figure in figures.items():
            print(f"{task}, {name:<8}{figure['psnr']:>8.2f} dB, moving {figure['moving_psnr']:.2f} dB")
    return report


def text_sensitivity(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints by how much the loss in moving places rises when the caption names the opposite motion, on held-out clips."""
    from benchmarks import text_sensitivity as measurement
    from microcinema.training.loss import TrainableModel

    pipeline = load_pipeline(arguments.pipeline)
    denoiser = TrainableModel(pipeline.unet).eval()
    figures = measurement.measure(pipeline, denoiser, measurement.moving_sprites(arguments.clips))
    for name, part in {"all": figures, **figures["parts"]}.items():
        print(f"{name:<18}{part['moving_loss']:.4f}, with the opposite motion {part['text_sensitivity']:+.1%}")
    return {"pipeline": arguments.pipeline, "clips": arguments.clips, **figures}


def flow_error(arguments: argparse.Namespace) -> dict[str, Any]:
    """Prints the end-point errors of a checkpoint's PredictNet and of predicting no motion, on held-out clips.

    Raises:
        UserError: the checkpoint has no PredictNet.
    """
    from benchmarks import flow_error as measurement
    from microcinema.commands.export import open_checkpoint
    from microcinema.config.compose import load
    from microcinema.models.predict_net import PredictNet
    from microcinema.sprites.scene import sample_attributes
    from microcinema.training.build import CONFIG
    from microcinema.training.checkpoint import load_ema
    from microcinema.training.loss import TrainableModel

    config = load(arguments.checkpoint.parent / CONFIG, "train")
    folder = arguments.checkpoint / "predict_net"
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not there; give a checkpoint of a run with model.flow_model")
    pipeline = open_checkpoint(arguments.checkpoint, config, use_ema=False)
    predict_net = PredictNet.from_pretrained(folder)
    if config.use_ema:  # as exported; PredictNet has averaged weights too
        load_ema(arguments.checkpoint, TrainableModel(pipeline.unet, predict_net))
    sprites = [sample_attributes(FLOW_WORLD_SEED, index, "heldout") for index in range(arguments.clips)]
    report: dict[str, Any] = {"checkpoint": str(arguments.checkpoint), "clips": arguments.clips}
    for t in arguments.timesteps:
        errors = report[f"t={t}"] = measurement.flow_error(pipeline, predict_net, sprites, t)
        ratio = errors["predict_net"] / errors["zero"]
        print(f"t={t:<6}{errors['predict_net']:.4f} of {errors['zero']:.4f} places a frame: {ratio:.2f}")
    return report


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs one measurement."""
    parser = make_parser(__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    sampling = argparse.ArgumentParser(add_help=False)
    sampling.add_argument("--num-inference-steps", type=int, default=25)
    sampling.add_argument("--guidance-scale", type=float, default=1.5)
    sampling.add_argument("--seed", type=int, default=0, help="seed of the noise")

    command = commands.add_parser("long_video", parents=[sampling], help=long_video.__doc__)
    command.set_defaults(measure=long_video)
    # Its key frame is the first frame, from which a clip can be continued.
    command.add_argument("--pipeline", default="sprites-factorized-dreamer", help="an embedded or saved pipeline")
    command.add_argument("--classifier", default="sprites-classifier", help="an embedded classifier, or its folder")
    command.add_argument("--prompts", type=int, default=20, help="videos of each kind")
    command.add_argument("--num-segments", type=int, default=4, help="clips in a row")
    command.add_argument("--window-overlap", type=int, help="frames that windows share; default: half a window")

    command = commands.add_parser("motion_following", parents=[sampling], help=motion_following.__doc__)
    command.set_defaults(measure=motion_following)
    command.add_argument("--pipeline", default="sprites-factorized-dreamer", help="an embedded or saved pipeline")
    command.add_argument("--keyframes", type=int, default=20)

    command = commands.add_parser("interpolation", parents=[sampling], help=interpolation.__doc__)
    command.set_defaults(measure=interpolation)
    command.add_argument("--pipeline", required=True, help="a saved pipeline, trained with model.keyframe_places")
    command.add_argument("--clips", type=int, default=20)
    command.add_argument("--factor", type=int, default=2, help="every how many frames is a key frame")
    command.add_argument("--fps", type=float, help="rate of the real clips; default: the model's own")
    command.add_argument("--told-fps", type=float, help="rate that the model is told; default: that of the clips")

    command = commands.add_parser("text_sensitivity", help=text_sensitivity.__doc__)
    command.set_defaults(measure=text_sensitivity)
    command.add_argument("--pipeline", default="sprites-factorized-dreamer", help="an embedded or saved pipeline")
    command.add_argument("--clips", type=int, default=64)

    command = commands.add_parser("flow_error", help="end-point error of the PredictNet in a training checkpoint")
    command.set_defaults(measure=flow_error)
    command.add_argument("checkpoint", type=Path, help="folder of a training checkpoint")
    command.add_argument("--clips", type=int, default=40)
    command.add_argument("--timesteps", type=int, nargs="+", default=[20, 100, 300], help="diffusion timesteps")

    arguments = parser.parse_args(argv)
    return run(arguments.measure, arguments)


if __name__ == "__main__":
    sys.exit(main())

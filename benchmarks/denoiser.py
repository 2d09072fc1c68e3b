"""Measures the video model: `python -m benchmarks.denoiser denoiser` prints a table, `--help` the options.

denoiser: it stands beside the 2D UNet that it is built from, run on every frame, and beside diffusers' video UNets, all
at equal widths, head widths and depths, each with the inputs that it takes. A round runs every contestant once; the
figure is the ratio of medians to the per-frame 2D UNet, which other load on the machine hardly moves. On a crowded
machine `--clock cpu` counts the processor time of this process instead of the time that passes. A training step is
forward, mean squared error, backward.

sampling: the whole loop, AppearanceNet included, with each fusion of its features, as a ratio to a model without one.

drift: what becomes of objects and backgrounds in videos that are longer than a model was trained on.

following: how often a video moves as its motion caption says, when key frame and descriptive caption stay the same.

train: what each part of a training step takes, of the trainer itself, for one or more runs such as from video files and from latents.

flow: the end-point error of the PredictNet in a training checkpoint, on clips that it has not seen.
"""

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMScheduler,
    I2VGenXLUNet,
    UNet2DConditionModel,
    UNet3DConditionModel,
    UNetMotionModel,
    UNetSpatioTemporalConditionModel,
)
from einops import rearrange, repeat
from torch import Tensor, nn
from tqdm import tqdm

from microcinema.diffusion.schedule import make_sampler
from microcinema.models import ConditionEncoder, VideoUNet, set_trainable
from microcinema.models.appearance import FUSIONS
from microcinema.utils.errors import UserError
from microcinema.utils.files import atomic_path

REFERENCE = "2D UNet per frame"
FULL: dict[str, Any] = {
    "block_out_channels": (160, 320, 640, 640),
    "head_width": 32,
    "cross_attention_dim": 768,
    "frames": 16,
    "latents": 32,
}
QUICK: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "head_width": 16,
    "cross_attention_dim": 32,
    "frames": 3,
    "latents": 8,
}
TINY: dict[str, Any] = QUICK | {"frames": 16, "latents": 16}
TOKENS = 77
MODELS: dict[str, dict[str, Any]] = {
    "VideoUNet, MicroCinema": {"inject": "both"},
    # As in configs/model/factorized_dreamer.yaml, with the widths of CLIP ViT-L and of flan-t5-base.
    "VideoUNet, Factorized-Dreamer": {"fusion": None, "inject": None, "pixel_scales": (2,), "motion_attention": True},
}
IMAGE_TOKENS, MOTION_TOKENS, VAE_FACTOR = (257, 1024), (32, 768), 8
WITHOUT = "without AppearanceNet"
FLOW_WORLD = 20240820  # of the clips that PredictNet is asked about; never a training seed


class Contestant:
    """A network that takes its own kind of input, seen as a function of noisy latents `b f c h w`.

    Args:
        run: the forward.
        nets: the networks whose gradients a training step computes (those that require one).
    """

    def __init__(self, run: Callable[[Tensor], Tensor], *nets: nn.Module):
        self.run = run
        self.nets = nets

    def forward(self, z_t: Tensor) -> None:
        """One prediction without gradients."""
        for net in self.nets:
            net.eval()
        with torch.inference_mode():
            self.run(z_t)

    def training_step(self, z_t: Tensor) -> None:
        """Forward, loss and backward; the gradients are thrown away."""
        for net in self.nets:
            net.train()
        self.run(z_t).square().mean().backward()
        for net in self.nets:
            net.zero_grad(set_to_none=True)


def layout(size: dict[str, Any]) -> tuple[tuple[int, ...], dict[str, Any], Callable[[str], dict[str, tuple[str, ...]]]]:
    """Heads of each level, what all UNets of a size have in common, and the names of their blocks for a suffix such as `2D`."""
    widths, levels = size["block_out_channels"], len(size["block_out_channels"])

    def blocks(suffix: str) -> dict[str, tuple[str, ...]]:
        down = (f"CrossAttnDownBlock{suffix}",) * (levels - 1) + (f"DownBlock{suffix}",)
        up = (f"UpBlock{suffix}",) + (f"CrossAttnUpBlock{suffix}",) * (levels - 1)
        return {"down_block_types": down, "up_block_types": up}

    dim, side = size["cross_attention_dim"], size["latents"]
    common = {"block_out_channels": widths, "cross_attention_dim": dim, "layers_per_block": 2, "sample_size": side}
    return tuple(width // size["head_width"] for width in widths), common, blocks


def contestants(size: dict[str, Any], fusion: str, training: bool, only: Sequence[str]) -> dict[str, Contestant]:
    """Builds those whose name contains one of `only` (all without it), and the reference.

    In training what runs once per clip (AppearanceNet, the adapter, the pixel pyramid) is within the step, in the forward its outcome is
    given. The frozen encoders of Factorized-Dreamer are in neither.
    """
    torch.manual_seed(0)
    dim, side, f = size["cross_attention_dim"], size["latents"], size["frames"]
    heads, common, blocks = layout(size)
    text, t, fps = torch.randn(1, TOKENS, dim), torch.tensor([500]), torch.tensor([8.0])
    text_of_frames = repeat(text, "b n d -> (b f) n d", f=f)
    z_ref = torch.randn(1, 4, side, side)
    image = repeat(z_ref, "b c h w -> b f c h w", f=f)
    unet2d = UNet2DConditionModel(**common, **blocks("2D"), attention_head_dim=heads)

    def per_frame() -> Contestant:
        return Contestant(
            lambda z_t: unet2d(rearrange(z_t, "b f c h w -> (b f) c h w"), t, text_of_frames).sample, unet2d
        )

    given = {
        "image_tokens": torch.randn(1, *IMAGE_TOKENS),
        "pixels": torch.randn(1, 3, side * VAE_FACTOR, side * VAE_FACTOR),
        "motion_tokens": torch.randn(1, *MOTION_TOKENS),
    }

    @functools.cache
    def nets(model: str) -> tuple[VideoUNet, ConditionEncoder]:
        options = {"fusion": fusion} | MODELS[model]
        heard, seen = options.get("motion_attention", False), bool(options.get("pixel_scales"))
        video = VideoUNet.from_unet2d(unet2d, image_attention=seen, **options)
        return video, ConditionEncoder.from_unet2d(
            unet2d,
            adapter="decoupled" if seen else None,
            image_width=IMAGE_TOKENS[1] if seen else None,
            vae_scale_factor=VAE_FACTOR,
            motion_width=MOTION_TOKENS[1] if heard else None,
            **options,
        )

    def ours(model: str) -> Contestant:
        video, encoder = nets(model)
        with torch.inference_mode():
            conditions = encoder(text, z_ref, fps, **given)
        return Contestant(lambda z_t: video(z_t, t, conditions), video)

    def ours_in_training(model: str, train: str) -> Contestant:
        video, encoder = nets(model)

        def run(z_t: Tensor) -> Tensor:
            set_trainable(video, encoder, train)
            return video(z_t, t, encoder(text, z_ref, fps, **given))

        return Contestant(run, video, encoder)

    def motion() -> Contestant:
        net = UNetMotionModel(**common, **blocks("Motion"), num_attention_heads=heads)
        return Contestant(lambda z_t: net(rearrange(z_t, "b f c h w -> b c f h w"), t, text_of_frames).sample, net)

    def unet3d() -> Contestant:
        net = UNet3DConditionModel(**common, **blocks("3D"), attention_head_dim=size["head_width"])
        return Contestant(lambda z_t: net(rearrange(z_t, "b f c h w -> b c f h w"), t, text).sample, net)

    def i2vgen() -> Contestant:
        net = I2VGenXLUNet(**common, **blocks("3D"), attention_head_dim=size["head_width"])
        inputs = {
            "fps": fps,
            "image_latents": rearrange(image, "b f c h w -> b c f h w"),
            "image_embeddings": torch.randn(1, dim),
            "encoder_hidden_states": text,
        }
        return Contestant(lambda z_t: net(rearrange(z_t, "b f c h w -> b c f h w"), t, **inputs).sample, net)

    def svd() -> Contestant:
        net = UNetSpatioTemporalConditionModel(
            **common, **blocks("SpatioTemporal"), num_attention_heads=heads, num_frames=f
        )
        ids = torch.tensor([[7.0, 127.0, 0.02]])
        # It is conditioned on one image token instead of text.
        return Contestant(lambda z_t: net(torch.cat([z_t, image], dim=2), t, text[:, :1], ids).sample, net)

    video_unets = {model: functools.partial(ours, model) for model in MODELS}
    if training:
        video_unets = {
            f"{model}, train: {train}": functools.partial(ours_in_training, model, train)
            for model in MODELS
            for train in ("all", "temporal")
        }
    peers = {
        "UNetMotionModel": motion,
        "UNet3DConditionModel": unet3d,
        "I2VGenXLUNet": i2vgen,
        "UNetSpatioTemporalConditionModel": svd,
    }
    builders = {REFERENCE: per_frame, **video_unets, **peers}
    return {
        name: build()
        for name, build in builders.items()
        if name == REFERENCE or not only or any(part in name for part in only)
    }


def measure(
    actions: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[], float], what: str
) -> dict[str, float]:
    """Median seconds of each action over interleaved rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    with tqdm(total=(rounds + 1) * len(actions), desc=what) as bar:
        for _ in range(rounds + 1):
            for name, action in actions.items():
                start = clock()
                action()
                seconds[name].append(clock() - start)
                bar.update()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def denoiser(arguments: argparse.Namespace) -> None:
    """Prints forward and training ratios to the per-frame 2D UNet."""
    size = (QUICK if arguments.quick else FULL) | ({"latents": arguments.latents} if arguments.latents else {})
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    z_t = torch.randn(1, size["frames"], 4, size["latents"], size["latents"])
    report: dict[str, Any] = {
        "size": size,
        "fusion": arguments.fusion,
        "clock": arguments.clock,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    for part in arguments.parts:
        runs = contestants(size, arguments.fusion, part == "training", arguments.only)
        parameters = {name: sum(p.numel() for net in c.nets for p in net.parameters()) for name, c in runs.items()}
        step = Contestant.training_step if part == "training" else Contestant.forward
        actions = {name: (lambda c=c, step=step: step(c, z_t)) for name, c in runs.items()}
        seconds = measure(actions, arguments.rounds, clock, part)
        ratios = {name: value / seconds[REFERENCE] for name, value in seconds.items()}
        report[part] = {
            name: {"seconds": seconds[name], "ratio": ratios[name], "parameters": parameters[name]} for name in runs
        }
        print(f"\n{part:<48}{'ratio':>8}{'seconds':>10}{'M parameters':>14}")
        for name in sorted(runs, key=ratios.__getitem__):
            print(f"{name:<48}{ratios[name]:>8.2f}{seconds[name]:>10.3f}{parameters[name] / 1e6:>14.1f}")
        del runs, actions
    write(report, arguments.json)


def sampling(arguments: argparse.Namespace) -> None:
    """Prints what a clip's whole loop costs with each fusion, as ratios to the loop without AppearanceNet."""
    size = (FULL if arguments.full else TINY) | ({"latents": arguments.latents} if arguments.latents else {})
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    torch.manual_seed(0)
    heads, common, blocks = layout(size)
    unet2d = UNet2DConditionModel(**common, **blocks("2D"), attention_head_dim=heads)
    z_ref = torch.randn(1, 4, size["latents"], size["latents"])
    text, fps = torch.randn(1, TOKENS, size["cross_attention_dim"]), torch.tensor([8.0])
    noise = torch.randn(1, size["frames"], *z_ref.shape[1:])

    def loop(fusion: str | None) -> Callable[[], None]:
        options = {"fusion": fusion, "inject": fusion and "both"}
        video, encoder = (kind.from_unet2d(unet2d, **options).eval() for kind in (VideoUNet, ConditionEncoder))
        scheduler = make_sampler(DDPMScheduler())

        def run() -> None:
            with torch.inference_mode():
                scheduler.set_timesteps(arguments.steps)
                conditions, z = encoder(text, z_ref, fps), noise
                for t in scheduler.timesteps:
                    z = scheduler.step(video(z, t, conditions), t, z).prev_sample

        return run

    loops = {WITHOUT: loop(None), **{fusion: loop(fusion) for fusion in FUSIONS}}
    seconds = measure(loops, arguments.rounds, clock, "sampling")
    rows = {name: {"seconds": value, "ratio": value / seconds[WITHOUT]} for name, value in seconds.items()}
    print(f"\n{f'sampling, {arguments.steps} steps':<34}{'ratio':>8}{'seconds':>10}")
    for name, row in rows.items():
        print(f"{name:<34}{row['ratio']:>8.3f}{row['seconds']:>10.3f}")
    settings = {"size": size, "steps": arguments.steps, "clock": arguments.clock}
    write(
        {**settings, "threads": torch.get_num_threads(), "torch": torch.__version__, "sampling": rows}, arguments.json
    )


def drift(arguments: argparse.Namespace) -> None:
    """Prints, clip by clip, how far continued clips and windows of the same length go from their key frame."""
    from microcinema.pipelines.saving import load_pipeline
    from microcinema.sprites import long_video as measurement
    from microcinema.sprites.judge import SpriteJudge

    pipeline, judge = load_pipeline(arguments.pipeline), SpriteJudge.load(arguments.classifier)
    pipeline.set_progress_bar_config(disable=True)
    settings = {key: getattr(arguments, key) for key in ("num_segments", "num_inference_steps", "guidance_scale")}
    settings |= {"window_overlap": arguments.window_overlap, "seed": arguments.seed}
    shown = measurement.lasting_sprites(arguments.prompts)
    kinds = measurement.makers(pipeline, **settings)
    found = measurement.measure(kinds, shown, judge, pipeline.config["height"])
    print(f"\n{measurement.text_table(found)}")
    write({"pipeline": arguments.pipeline, "prompts": arguments.prompts, **settings, "drift": found}, arguments.json)


def following(arguments: argparse.Namespace) -> None:
    """Prints how often motion captions are followed, and what is seen where they are not."""
    from microcinema.pipelines.saving import load_pipeline
    from microcinema.sprites import motion_following as measurement

    pipeline = load_pipeline(arguments.pipeline)
    pipeline.set_progress_bar_config(disable=True)
    shown = measurement.scenes(arguments.keyframes)
    size, fps = pipeline.config["height"], pipeline.config["fps"]
    settings = {key: getattr(arguments, key) for key in ("num_inference_steps", "guidance_scale", "seed")}
    makers = {"model": measurement.pipeline_maker(pipeline, **settings), "real": measurement.real}
    found = {kind: measurement.measure(make, shown, size, fps) for kind, make in makers.items()}
    for kind, figures in found.items():
        motion = figures["motion"]
        print(f"{kind:<8}{motion['value']:>8.1%} of {motion['n']} ({motion['low']:.1%} to {motion['high']:.1%})")
    for asked, seen in found["model"]["confusion"].items():
        print(f"  {asked:<18}" + ", ".join(f"{name or 'nothing'} {count}" for name, count in seen.items()))
    write({"pipeline": arguments.pipeline, "keyframes": arguments.keyframes, **settings, **found}, arguments.json)


def flow(arguments: argparse.Namespace) -> None:
    """Prints the end-point errors of a checkpoint's PredictNet and of predicting that nothing moves."""
    from microcinema.commands.export import open_checkpoint, read_config
    from microcinema.models.predict_net import PredictNet
    from microcinema.sprites.flow_error import flow_error
    from microcinema.sprites.scene import sample_attributes
    from microcinema.training.checkpoint import load_ema
    from microcinema.training.loss import TrainableModel

    config = read_config(arguments.checkpoint.parent)
    folder = arguments.checkpoint / "predict_net"
    if not folder.is_dir():
        raise UserError(f"'{folder}' is not there; give a checkpoint of a run with model.flow_model")
    pipeline = open_checkpoint(arguments.checkpoint, config, use_ema=False)
    predict_net = PredictNet.from_pretrained(folder)
    if config.use_ema:  # what is exported; PredictNet has averages as well
        load_ema(arguments.checkpoint, TrainableModel(pipeline.unet, pipeline.condition_encoder, predict_net))
    shown = [sample_attributes(FLOW_WORLD, index, "heldout") for index in range(arguments.clips)]
    report: dict[str, Any] = {"checkpoint": str(arguments.checkpoint), "clips": arguments.clips}
    for t in arguments.steps:
        errors = report[f"t={t}"] = flow_error(pipeline, predict_net, shown, t)
        share = errors["predict_net"] / errors["zero"]
        print(f"t={t:<6}{errors['predict_net']:.4f} of {errors['zero']:.4f} places a frame: {share:.2f}")
    write(report, arguments.json)


def train(arguments: argparse.Namespace) -> None:
    """Prints what the parts of a step take, run beside run, in milliseconds for a clip and as shares of the step."""
    from microcinema.config.compose import compose
    from microcinema.profiling import step_timer

    columns = arguments.run_of or [["training"]]
    if len(columns) > 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("several processes measure one --run at a time; start them again for the next")
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    report: dict[str, Any] = {"overrides": arguments.overrides, "clock": arguments.clock, "runs": {}}
    report |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    for name, *overrides in columns:
        with tempfile.TemporaryDirectory() as folder:
            composed = compose("train", [*arguments.overrides, *overrides, f"output_dir={folder}"])
            report["runs"][name] = {"overrides": overrides, **step_timer.measure(composed, arguments.steps, clock)}
    if os.environ.get("RANK", "0") != "0":
        return
    runs = report["runs"]
    print(f"\n| ms for a clip (share of the step) | {' | '.join(runs)} |")
    print("| --- |" + " ---: |" * len(runs))
    for part in ("step", *step_timer.PARTS, "other", "communication"):
        if any(part in run for run in runs.values()):
            cells = [f"{1000 * run[part] / run['clips']:.1f} ({run[part] / run['step']:.0%})" for run in runs.values()]
            print(f"| {part} | {' | '.join(cells)} |")
    for title, figure, form in (
        ("decoding a clip, by one worker", "decoding", "{:.1f}"),
        ("waiting for workers", "data_wait", "{:.1%}"),
        ("GiB at most", "peak_memory_gib", "{:.2f}"),
    ):
        scale = 1000 if figure == "decoding" else 1
        print(f"| {title} | {' | '.join(form.format(scale * run[figure]) for run in runs.values())} |")
    write(report, arguments.json)


def write(report: dict[str, Any], path: Path | None) -> None:
    """Writes the figures to a file, if there is to be one."""
    if path:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(report, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Reads the command line and runs one benchmark; returns 0, or 2 for bad input."""
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--rounds", type=int, default=5, help="rounds that count")
    timed.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what to count")
    timed.add_argument("--latents", type=int, help="height and width of the latents")
    for_all = argparse.ArgumentParser(add_help=False)
    for_all.add_argument("--json", type=Path, help="write the figures to this file too")
    parser = argparse.ArgumentParser(description="Measure the video model.")
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser("denoiser", parents=[timed, for_all], help="VideoUNet beside other video UNets")
    command.set_defaults(run=denoiser)
    command.add_argument("--parts", nargs="+", choices=("forward", "training"), default=("forward", "training"))
    command.add_argument("--fusion", choices=FUSIONS, default="add")
    command.add_argument(
        "--only", nargs="+", default=(), metavar="NAME", help="run these and the reference (parts of names)"
    )
    command.add_argument(
        "--quick", action="store_true", help="tiny widths: shows that it runs, measures nothing of use"
    )

    command = commands.add_parser("sampling", parents=[timed, for_all], help="the loop with and without AppearanceNet")
    command.set_defaults(run=sampling)
    command.add_argument("--steps", type=int, default=20, help="denoising steps")
    command.add_argument("--full", action="store_true", help="half Stable Diffusion width instead of a tiny one")

    command = commands.add_parser("drift", parents=[for_all], help="long videos of Moving Sprites, clip by clip")
    command.set_defaults(run=drift)
    command.add_argument("--pipeline", default="sprites-microcinema", help="an embedded model, or a saved pipeline")
    command.add_argument("--classifier", default="sprites-classifier", help="an embedded judge, or the folder of one")
    command.add_argument("--prompts", type=int, default=20, help="videos of each kind")
    command.add_argument("--num-clips", type=int, default=4)
    command.add_argument("--num-inference-steps", type=int, default=25)
    command.add_argument("--guidance-scale", type=float, default=1.5)
    command.add_argument("--window-overlap", type=int, help="frames; half a window without it")
    command.add_argument("--seed", type=int, default=0, help="of the noise")

    command = commands.add_parser(
        "following", parents=[for_all], help="videos of one key frame by many motion captions"
    )
    command.set_defaults(run=following)
    command.add_argument("--pipeline", default="sprites-factorized-dreamer", help="an embedded or saved video model")
    command.add_argument("--keyframes", type=int, default=20)
    command.add_argument("--num-inference-steps", type=int, default=25)
    command.add_argument("--guidance-scale", type=float, default=1.5)
    command.add_argument("--seed", type=int, default=0, help="of the noise")

    command = commands.add_parser("flow", parents=[for_all], help="what a checkpoint's PredictNet knows of motion")
    command.set_defaults(run=flow)
    command.add_argument("checkpoint", type=Path, help="folder of a training checkpoint")
    command.add_argument("--clips", type=int, default=40)
    command.add_argument("--steps", type=int, nargs="+", default=[20, 100, 300], help="diffusion steps")

    command = commands.add_parser("train", parents=[for_all], help="the parts of a training step")
    command.set_defaults(run=train)
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of `microcinema train`, for all runs")
    command.add_argument(
        "--run",
        dest="run_of",
        nargs="+",
        action="append",
        metavar=("NAME", "key=value"),
        help="a column, with its keys",
    )
    command.add_argument("--steps", type=int, default=10, help="steps that count")
    command.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="what to count")

    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UserError as error:
        print("error:", error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Says what runs on Stable Diffusion 1.5, or XL, take of memory: a table of preflight estimates, for which its settings are enough.

With `--measure` the estimate stands beside what this process really takes, with random weights in float32 on the CPU: the
growth of its resident memory (Linux with glibc). At full width that wants 12 GB.
"""

import argparse
import ctypes
import gc
import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch.nn import functional
from tqdm import tqdm

from microcinema.config.compose import compose
from microcinema.models.int8 import quantize_frozen
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.loading import ASSETS, INDEX
from microcinema.profiling import memory_estimate
from microcinema.profiling.memory_tracker import LiveMemory
from microcinema.training import build
from microcinema.utils.files import write_json

GIB = 2**30
FRAMES, TOKENS = 16, 77
M_MMAP_THRESHOLD = -3  # of mallopt
SD15: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [320, 640, 1280, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 8,
        "cross_attention_dim": 768,
        "sample_size": 64,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "scaling_factor": 0.18215,
    },
    "text_encoder": {
        "model_type": "clip_text_model",
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
    },
}
_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
SDXL: dict[str, dict[str, Any]] = {
    "unet": {
        "_class_name": "UNet2DConditionModel",
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 2,
        "up_block_types": ["CrossAttnUpBlock2D"] * 2 + ["UpBlock2D"],
        "attention_head_dim": [5, 10, 20],
        "transformer_layers_per_block": [1, 2, 10],
        "use_linear_projection": True,
        "cross_attention_dim": 2048,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
    "vae": SD15["vae"] | {"scaling_factor": 0.13025, "force_upcast": True},
    "text_encoder": SD15["text_encoder"],
    "text_encoder_2": SD15["text_encoder"] | _BIG_G | {"projection_dim": 1280, "hidden_act": "gelu"},
}
BASES = {"sd15": SD15, "sdxl": SDXL}
NARROW: dict[str, dict[str, Any]] = {
    "unet": {"block_out_channels": [32, 64, 128, 128]},
    "vae": {"block_out_channels": [32, 32, 64, 64]},
    "text_encoder": {"num_hidden_layers": 1},
}
HALF, INT8 = "memory.torch_dtype=float16", "memory.quantization=int8"
TEMPORAL = "train trainable_parameters=temporal gradient_checkpointing=true"
RUNS: dict[str, dict[str, Any]] = {
    "sample": {},
    f"sample {HALF}": {"dtype": torch.float16},
    f"sample {HALF} decode_chunk_size=1": {"dtype": torch.float16, "decode_chunk_size": 1},
    f"sample {HALF} decode_chunk_size=1 {INT8}": {"dtype": torch.float16, "decode_chunk_size": 1, "int8": True},
    f"sample {HALF} decode_chunk_size=1 memory.offload=group": {
        "dtype": torch.float16,
        "decode_chunk_size": 1,
        "group": True,
    },
    **{
        f"train trainable_parameters={layers}{checkpointing and f' gradient_checkpointing={checkpointing}'}": {
            "trainable_parameters": layers,
            "gradient_checkpointing": {"": False, "true": True}.get(checkpointing, checkpointing),
        }
        for layers in ("temporal", "all")
        for checkpointing in ("", "first_level", "true")
    },
    **{
        f"{TEMPORAL} {keys}": {"trainable_parameters": "temporal", "gradient_checkpointing": True, **values}
        for keys, values in {
            "quantization=int8": {"quantization": "int8"},
            "use_8bit_adam=true use_ema=false": {"use_8bit_adam": True, "use_ema": False},
            "use_8bit_adam=true use_ema=false quantization=int8": {
                "use_8bit_adam": True,
                "use_ema": False,
                "quantization": "int8",
            },
        }.items()
    },
}


def settings_of(base: str, folder: Path, narrow: bool = False) -> Path:
    """Writes an entry of `BASES` as a diffusers folder without weights, with the words of Moving Sprites, and returns it."""
    without = shutil.ignore_patterns("*.safetensors", "image_encoder", "feature_extractor")
    shutil.copytree(ASSETS / "sprites-base", folder, ignore=without, dirs_exist_ok=True)
    if "text_encoder_2" in BASES[base]:
        for name in ("tokenizer", "text_encoder"):
            shutil.copytree(folder / name, folder / f"{name}_2", dirs_exist_ok=True)
        index = json.loads((folder / INDEX).read_text())
        second = {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"], "tokenizer_2": index["tokenizer"]}
        (folder / INDEX).write_text(json.dumps(index | second))
    for part, settings in BASES[base].items():
        (folder / part / "config.json").write_text(json.dumps(settings | (NARROW[part] if narrow else {})))
    for file, change in (
        *(
            (f"{name.parent.name}/{name.name}", {"model_max_length": TOKENS})
            for name in folder.glob("tokenizer*/*_config.json")
        ),
        ("scheduler/scheduler_config.json", {"prediction_type": "epsilon"}),
    ):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    return folder


def estimate(composed: Any, run: dict[str, Any]) -> memory_estimate.Estimate:
    """The estimate of an entry of `RUNS`, for one video or one clip at a time, training in bf16 as on CUDA."""
    if "trainable_parameters" in run:
        settings = replace(composed, train_batch_size=1, mixed_precision="bf16", **run)
        return memory_estimate.training_memory(memory_estimate.empty_pipeline(composed), settings, device="cuda")
    sample = compose("sample")
    guidance = {key: getattr(sample, key) for key in ("guidance_scale", "image_guidance_scale")}
    pipeline = memory_estimate.empty_pipeline(composed, run.get("dtype", torch.float32))
    if "int8" in run:
        quantize_frozen(pipeline.unet.requires_grad_(False))
    found = memory_estimate.sampling_memory(pipeline, **guidance, decode_chunk_size=run.get("decode_chunk_size"))
    return memory_estimate.group_offload_memory(found, pipeline) if "group" in run else found


def resident() -> tuple[int, int]:
    """Bytes of memory that this process has now, and had at most since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    now, most = (1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    return now, most


def forget_peak() -> None:
    """Lets the most begin at what this process has now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def real_pipeline(composed: Any) -> ImageToVideoPipeline:
    """The pipeline that `memory_estimate.empty_pipeline` stands for, with random weights."""
    base = load_base(**vars(composed.base), weights=False)
    networks = build.build_networks(composed, base, weights=False)
    pipeline = build.build_pipeline(composed, base.scheduler, **base.shared, **networks)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def forward_memory(pipeline: ImageToVideoPipeline) -> memory_estimate.Estimate:
    """One evaluation of the denoiser for one clip, its conditions included."""
    side = pipeline.config["height"] // pipeline.vae_scale_factor
    z_ref = torch.zeros(1, pipeline.unet.options.unet2d["in_channels"], side, side)
    text = torch.zeros(1, TOKENS, pipeline.unet.options.unet2d["cross_attention_dim"])
    with LiveMemory() as live, torch.no_grad():
        live.watch(memory_estimate.tensors(pipeline))
        weights = live.now
        conditions = pipeline.unet.encode(text, z_ref, torch.tensor([8.0]))
        pipeline.unet(repeat(z_ref, "b c h w -> b f c h w", f=FRAMES), torch.tensor([500]), conditions)
    return memory_estimate.Estimate(weights, {"forward": live.peak})


PARTS: dict[str, Callable[[ImageToVideoPipeline], memory_estimate.Estimate]] = {
    "forward": forward_memory,
    "sampling": lambda pipeline: memory_estimate.sampling_memory(pipeline, guidance_scale=4.0),
    "training": lambda pipeline: memory_estimate.training_memory(
        pipeline, replace(compose("train"), train_batch_size=1, mixed_precision="no")
    ),
}


def compare(composed: Any, parts: Sequence[str]) -> dict[str, dict[str, float]]:
    """GiB estimated and measured of some of `PARTS`; `training` spends the pipeline and comes last."""
    parts = [part for part in PARTS if part in parts]
    estimates = {part: PARTS[part](memory_estimate.empty_pipeline(composed)).peak for part in parts}
    # Every buffer goes back to the kernel when it is released. What the C library would keep for later is not what tensors take.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    functional.conv2d(torch.zeros(1, 8, 8, 8), torch.zeros(8, 8, 3, 3))  # the kernels' own memory
    forget_peak()
    before, _ = resident()
    pipeline = real_pipeline(composed)
    figures = {}
    for part in tqdm(parts, "measuring", unit="part"):
        forget_peak()
        PARTS[part](pipeline)
        measured = resident()[1] - before
        figures[part] = {
            "estimate": estimates[part] / GIB,
            "measured": measured / GIB,
            "ratio": estimates[part] / measured,
        }
    return figures


def main(argv: list[str] | None = None) -> None:
    """Reads the command line, prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", choices=BASES, default="sd15")
    parser.add_argument("--sizes", type=int, nargs="+", default=(256, 512), help="height and width in pixels")
    parser.add_argument("--measure", nargs="+", choices=PARTS, help="measure these too, at the first size, one clip")
    parser.add_argument("--quick", action="store_true", help="narrow networks: shows that it runs")
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    arguments = parser.parse_args(argv)
    if arguments.quick and arguments.base != "sd15":
        parser.error("--quick has widths for sd15 alone")
    with tempfile.TemporaryDirectory() as folder:
        base = settings_of(arguments.base, Path(folder), arguments.quick)
        configs = {
            size: compose(
                "train",
                [f"base.pretrained_model_name_or_path={base}", f"num_frames={FRAMES}", f"resolution={size}"],
            )
            for size in arguments.sizes
        }
        if arguments.measure:
            size = arguments.sizes[0]
            report: dict[str, Any] = compare(configs[size], arguments.measure)
            print(f"\n{f'GiB at {size}x{size}':<16}{'estimate':>10}{'measured':>10}{'ratio':>8}")
            for name, row in report.items():
                print(f"{name:<16}{row['estimate']:>10.2f}{row['measured']:>10.2f}{row['ratio']:>8.2f}")
        else:
            report = {name: {} for name in RUNS}
            for size, name in tqdm([(size, name) for size in configs for name in RUNS], "estimating", unit="run"):
                found = estimate(configs[size], RUNS[name])
                report[name][size] = {**asdict(found), "peak": found.peak, "worst": found.worst}
            print(f"\n| GiB, {FRAMES} frames | {' | '.join(f'{size}x{size}' for size in configs)} |")
            print("| --- |" + " ---: |" * len(configs))
            for name, row in report.items():
                print(f"| `{name}` | {' | '.join(format(found['peak'] / GIB, '.1f') for found in row.values())} |")
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()

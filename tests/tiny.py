"""Tiny random models in the exact folder layouts of Stable Diffusion 1.5, 2.1 and XL, for every test that needs a base.

Import as `import tiny`; pytest puts this folder on the path. Random weights of a seed are always the same.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    SchedulerMixin,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.clip.tokenization_clip import VOCAB_FILES_NAMES

from microcinema.diffusion.schedule import make_sampler
from microcinema.models.conditioning import ConditionEncoder
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.base import load_base
from microcinema.pipelines.image_to_video import ImageToVideoPipeline

FLAVOURS = ("sd15", "sd21")
WIDTH = 32
MAX_TOKENS = 16
LATENT_CHANNELS = 4
VAE_FACTOR = 4
SIZE = 32  # pixels; latents are 8x8, which the tiny UNets halve once

_WORDS = "a an large small red orange blue green yellow purple star circle square moon heart moving still to left right on sand"
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def vae(seed: int = 0) -> AutoencoderKL:
    """4x, 4 latent channels; scaled latents of noise images have a standard deviation near 1."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=SIZE,
        scaling_factor=3.0,
    ).eval()


def unet(flavour: str = "sd15", seed: int = 0, **changes) -> UNet2DConditionModel:
    """Two levels. `sd15`: convolution projections, one head count; `sd21`: linear projections, a head count per level."""
    torch.manual_seed(seed)
    kind = (
        {"attention_head_dim": 4}
        if flavour == "sd15"
        else {"attention_head_dim": (2, 4), "use_linear_projection": True, "upcast_attention": True}
    )
    settings = {
        "sample_size": SIZE // VAE_FACTOR,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": WIDTH,
        "norm_num_groups": 8,
        **kind,
        **changes,
    }
    return UNet2DConditionModel(**settings).eval()


def scheduler(flavour: str = "sd15") -> SchedulerMixin:
    """`sd15`: PNDM, epsilon, and a file that says nothing of clip_sample; `sd21`: DDIM, v-prediction."""
    if flavour == "sd15":
        return PNDMScheduler(**_BETAS, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return DDIMScheduler(
        **_BETAS, prediction_type="v_prediction", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def text_encoder(tokens: CLIPTokenizer, flavour: str = "sd15", seed: int = 0) -> CLIPTextModel:
    """Two layers of width 32. `sd15`: CLIP's activation; `sd21`: OpenCLIP's."""
    torch.manual_seed(seed)
    return CLIPTextModel(_text_config(tokens, "quick_gelu" if flavour == "sd15" else "gelu")).eval()


def _text_config(tokens: CLIPTokenizer, hidden_act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        projection_dim=WIDTH,
        hidden_act=hidden_act,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )


def image_processor() -> CLIPImageProcessor:
    """What a safety checker sees images through, 16 pixels wide."""
    return CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})


def safety_checker(seed: int = 0) -> StableDiffusionSafetyChecker:
    """One layer of width 8; its thresholds are such that it never objects."""
    torch.manual_seed(seed)
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    text = {**tower, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return StableDiffusionSafetyChecker(config).eval()


def tokenizer(folder: str | Path, flavour: str = "sd15") -> CLIPTokenizer:
    """Writes `vocab.json`, `merges.txt` and their config in CLIP's format into `folder` and opens them.

    Some words of Moving Sprites are single tokens, all other text is bytes. SD 1.5 pads with the end token, SD 2.1 with "!".
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    characters = [chr(code) for code in range(33, 127)]
    vocabulary = [*characters, *(character + "</w>" for character in characters)]
    merges: list[str] = []
    for word in _WORDS.split():
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair, parts = parts[:2], ["".join(parts[:2]), *parts[2:]]
            if " ".join(pair) not in merges:
                merges.append(" ".join(pair))
                vocabulary.append(parts[0])
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    ids = {token: number for number, token in enumerate(dict.fromkeys(vocabulary))}
    (folder / VOCAB_FILES_NAMES["vocab_file"]).write_text(json.dumps(ids), encoding="utf-8")
    (folder / VOCAB_FILES_NAMES["merges_file"]).write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = "<|endoftext|>" if flavour == "sd15" else "!"
    config = {**special, "model_max_length": MAX_TOKENS, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def base_pipeline(folder: str | Path, flavour: str = "sd15", seed: int = 0, **unet_changes) -> StableDiffusionPipeline:
    """A whole Stable Diffusion; only its tokenizer's files are written, to `folder/tokenizer`. `sd15` has a safety checker."""
    tokens = tokenizer(Path(folder) / "tokenizer", flavour)
    pipeline = StableDiffusionPipeline(
        vae=vae(seed),
        text_encoder=text_encoder(tokens, flavour, seed),
        tokenizer=tokens,
        unet=unet(flavour, seed, **unet_changes),
        scheduler=scheduler(flavour),
        safety_checker=safety_checker(seed) if flavour == "sd15" else None,
        feature_extractor=image_processor(),
        requires_safety_checker=flavour == "sd15",
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def base_folder(folder: str | Path, flavour: str = "sd15", seed: int = 0, **unet_changes) -> Path:
    """Writes a whole Stable Diffusion as a diffusers folder (safetensors) and returns it."""
    base_pipeline(folder, flavour, seed, **unet_changes).save_pretrained(folder)
    return _as_published(Path(folder))


def sdxl_folder(folder: str | Path, seed: int = 0) -> Path:
    """Writes a whole Stable Diffusion XL as a diffusers folder and returns it: two tokenizers, two text encoders, another VAE (8x)
    and another size (64) than the other flavours'.
    """
    folder = Path(folder)
    one, two = (tokenizer(folder / name, like) for name, like in (("tokenizer", "sd15"), ("tokenizer_2", "sd21")))
    first = text_encoder(one, "sd15", seed)
    second = CLIPTextModelWithProjection(_text_config(two, "gelu")).eval()
    channels = (8, 8, 16, 16)
    autoencoder = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=2 * SIZE,
        scaling_factor=0.13025,
        force_upcast=True,
    ).eval()
    network = UNet2DConditionModel(
        sample_size=2 * SIZE // 2 ** (len(channels) - 1),
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        norm_num_groups=8,
        cross_attention_dim=2 * WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    ).eval()
    pipeline = StableDiffusionXLPipeline(
        vae=autoencoder,
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=one,
        tokenizer_2=two,
        unet=network,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return _as_published(folder)


def t5_folder(folder: str | Path, seed: int = 0) -> Path:
    """Writes a whole T5 (encoder and decoder, two layers of width 24) with its tokenizer, as published, and returns the folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in dict.fromkeys(_WORDS.split()))]
    unigram = Tokenizer(models.Unigram([(word, 0.0 if k < 3 else -1.0) for k, word in enumerate(words)], unk_id=2))
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    unigram.post_processor = processors.TemplateProcessing("$A </s>", None, [("</s>", 1)])
    folder = Path(folder)
    torch.manual_seed(seed)
    config = T5Config(
        vocab_size=len(words), d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3, feed_forward_proj="gated-gelu"
    )
    T5ForConditionalGeneration(config).eval().save_pretrained(folder)
    unigram.save(str(folder / "tokenizer.json"))
    special = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    settings = {**special, "tokenizer_class": "T5Tokenizer", "extra_ids": 0, "model_max_length": MAX_TOKENS}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "special_tokens_map.json").write_text(json.dumps(special), encoding="utf-8")
    return folder


def clip_folder(folder: str | Path, seed: int = 0) -> Path:
    """Writes a whole CLIP (text and image towers of width 24) with its image processor, and returns the folder."""
    torch.manual_seed(seed)
    tower = {
        "hidden_size": 24,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "projection_dim": 8,
    }
    text = {**tower, "vocab_size": 8, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=8)
    CLIPModel(config).eval().save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return Path(folder)


def _as_published(folder: Path) -> Path:
    """The folder as older libraries wrote the published models: tokenizers in CLIP's own two files alone, one image processor."""
    for file in folder.glob("tokenizer*/tokenizer.json"):
        file.unlink()
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("CLIPImageProcessorPil", "CLIPImageProcessor"))
    return folder


def into_hub_cache(folder: str | Path, cache: str | Path, repository: str, revision: str = "main") -> str:
    """Puts a folder into a cache of the hub as downloading does (blobs, snapshots of links to them, refs); returns its commit."""
    home = Path(cache) / f"models--{repository.replace('/', '--')}"
    commit = hashlib.sha1(f"{repository} {revision}".encode()).hexdigest()
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        link = home / "snapshots" / commit / file.relative_to(folder)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    reference = home / "refs" / revision
    reference.parent.mkdir(parents=True, exist_ok=True)
    reference.write_text(commit)
    return commit


def video_pipeline(
    folder: str | Path,
    flavour: str = "sd15",
    fusion: str | None = "add",
    stirred: bool = True,
    factorized: bool = False,
    **settings,
) -> ImageToVideoPipeline:
    """A video pipeline on a base that is written to `folder` (unless it is there): 4 frames, at most 8.

    Args:
        fusion: of the AppearanceNet; None for none.
        factorized: with all parts of Factorized-Dreamer, whose encoders are written to `folder/clip` and `folder/t5`.
        stirred: fill the zero-initialised layers with noise, so that every part has an effect, as after training.
        settings: of the pipeline, such as `noise_prior`.
    """
    folder = Path(folder)
    base = load_base(folder if (folder / "model_index.json").is_file() else base_folder(folder, flavour))
    inject = None if fusion is None else "both"
    video, encoder = {}, {}
    if factorized:
        clip, t5 = clip_folder(folder / "clip"), t5_folder(folder / "t5")
        settings = {"image_encoder_source": str(clip), "motion_encoder_source": str(t5), **settings}
        video = {"image_attention": True, "pixel_scales": (1, 2), "motion_attention": True}
        encoder = {"adapter": "decoupled", "image_width": 24, "num_image_tokens": 3, "motion_width": 24}
        encoder |= {"pixel_scales": (1, 2), "vae_scale_factor": VAE_FACTOR, "motion_attention": True}
    torch.manual_seed(0)
    pipeline = ImageToVideoPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=VideoUNet.from_unet2d(base.unet, max_frames=8, fusion=fusion, inject=inject, **video).eval(),
        condition_encoder=ConditionEncoder.from_unet2d(base.unet, fusion=fusion, **encoder).eval(),
        scheduler=make_sampler(base.scheduler),
        **{"num_frames": 4, "base": str(folder), **settings},
    )
    if stirred:
        noise = torch.Generator().manual_seed(0)
        for network in (pipeline.unet, pipeline.condition_encoder):
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.data += 0.05 * torch.randn(parameter.shape, generator=noise)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline

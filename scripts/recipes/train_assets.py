"""The recipe of the embedded Moving Sprites models: renders the data and trains every model, each stage on the ones before it.

    python -m scripts.recipes.train_assets                 # all stages that are not done yet
    python -m scripts.recipes.train_assets stages=[vae]    # one stage

A stage whose output stands is skipped; an interrupted stage goes on where its last snapshot was. Work files go to `work`, the models to `assets`.
"""

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, DDIMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from jinja2 import Template
from omegaconf import OmegaConf
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    T5TokenizerFast,
)

from microcinema.commands.cli import main as microcinema
from microcinema.config.compose import compose, load
from microcinema.data.clips import ClipDataset
from microcinema.data.keyframe_index import keyframe_index
from microcinema.models.vae import encode_pixels
from microcinema.models.video_unet import set_trainable
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.sprites import scene
from microcinema.sprites.classifier import SpriteClassifier
from microcinema.sprites.dataset import CSV_FILE, read_truth, write_dataset
from microcinema.training.build import build_networks, build_pipeline
from microcinema.training.loss import Batch, NullConditioning, make_loss_config
from microcinema.training.warm_start import warm_start
from microcinema.utils.files import atomic_path, write_json
from scripts.recipes.match_features import matching_loss

NUM_FRAMES = 16
MAX_TOKENS = 32
ROOT = Path(__file__).parents[2]
VIDEO_MODELS = ("sprites-microcinema", "sprites-factorized-dreamer")
ONCE = "sprites-microcinema-once"  # whose 2D layers the others have; it stays in the work folder
START = "sprites-microcinema-start"  # of the authors' network; it stays there as well
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass
class Recipe:
    """Everything that decides the embedded models. Steps are optimiser steps."""

    work: str = "runs/assets"
    assets: str = "microcinema/assets"
    stages: list[str] = field(
        default_factory=lambda: [
            "clip",
            "vae",
            "unet",
            "classifier",
            "microcinema_once",
            "microcinema_start",
            "microcinema",
            "t5",
            "factorized_dreamer",
        ]
    )
    seed: int = 0
    train_clips: int = 6000
    microcinema_once_rotation_weight: int = 4
    microcinema_rotation_weight: int = 4  # in the clips of the video models, which learn to turn last
    factorized_dreamer_rotation_weight: int = 12  # and that is all that it has left to learn
    clip_steps: int = 1500
    t5_steps: int = 1500
    vae_steps: int = 5500
    unet_steps: int = 12000
    classifier_steps: int = 1000
    microcinema_start_steps: int = 2000
    snapshot_steps: int = 250


# --- one loop for every stage ----------------------------------------------------------------------------------------------------


def fit(
    stage: str,
    model: torch.nn.Module,
    loss_of: Callable[[np.random.Generator, torch.Generator, float], tuple[torch.Tensor, dict[str, float]]],
    recipe: Recipe,
    steps: int,
    learning_rate: float,
    ema_decay: float = 0.998,
    memory_format: torch.memory_format = torch.channels_last,
) -> None:
    """Trains `model` in place with AdamW, warm-up and cosine decay, and leaves the averaged weights in it.

    On a GPU in bfloat16 autocast; on a CPU, where the casts of such small networks cost more than they save, in float32.

    `loss_of` gets the step's two sources of randomness and the fraction of the training that is done.
    Every step's randomness follows from (seed, step) alone, so an interrupted stage resumes exactly.
    """
    snapshot = Path(recipe.work) / f"{stage}.pt"
    model.to(DEVICE).train().to(memory_format=memory_format)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
    warmup = min(100, steps // 10 + 1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * min(step / steps, 1))) + 0.01)
    )
    ema = EMAModel(parameters, decay=ema_decay, inv_gamma=1.0, power=0.75, use_ema_warmup=True)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema}
    first = 0
    if snapshot.exists():
        state = torch.load(snapshot, map_location=DEVICE, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        first = state["step"]
    bar = tqdm(range(first, steps), initial=first, total=steps, desc=f"train {stage}", mininterval=5)
    for step in bar:
        torch.manual_seed(recipe.seed * 1_000_003 + step)
        rng = np.random.default_rng([recipe.seed, step])
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=DEVICE.type == "cuda"):
            loss, figures = loss_of(rng, torch.Generator().manual_seed(int(rng.integers(2**62))), step / steps)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        ema.step(parameters)
        if step % 20 == 0:
            figures = {"loss": loss.item(), **figures}
            bar.set_postfix({k: f"{v:.4f}" for k, v in figures.items()})
            with open(Path(recipe.work) / f"{stage}.log", "a", encoding="utf-8") as log:
                log.write(json.dumps({"step": step, **figures}) + "\n")
        if (step + 1) % recipe.snapshot_steps == 0 or step + 1 == steps:
            state = {name: part.state_dict() for name, part in parts.items()}
            with atomic_path(snapshot) as path:
                torch.save({**state, "step": step + 1}, path)
    ema.copy_to(parameters)
    model.eval().to(memory_format=torch.contiguous_format)


def save_half(component: torch.nn.Module, folder: Path) -> None:
    """Saves a component in float16 safetensors, in its library's own layout. The component itself stays as it is."""
    if isinstance(component, ConfigMixin):
        # Without the list of defaults: from_config would put them in the place of values that were set later.
        clone = type(component).from_config({k: v for k, v in component.config.items() if k != "_use_default_values"})
    else:
        clone = type(component)(component.config)
    clone.load_state_dict(component.state_dict())
    clone.half().save_pretrained(folder, safe_serialization=True)


# --- data --------------------------------------------------------------------------------------------------------------------------


@dataclass
class Pool:
    """Rendered training clips: frames uint8 (n, f, h, w, 3), masks uint8 (n, f, h, w), and the sprite of each."""

    frames: np.ndarray
    masks: np.ndarray
    sprites: list[scene.Sprite]

    def frames_of_named_size(self, clip: np.ndarray, frame: np.ndarray) -> np.ndarray:
        """The frame numbers, but the first frame of clips whose object grows or shrinks: a caption names the size at the start."""
        return np.where([self.sprites[c].motion in scene.SCALINGS for c in clip], 0, frame)

    def frames_to_draw(self, clip: np.ndarray, frame: np.ndarray, any_frame: np.ndarray, keyframe: int) -> np.ndarray:
        """For `any_frame` (captions without the motion) the frame numbers, or the first where an object turns or changes its size, since
        they name it as it is at the start; elsewhere that of the key frame.
        """
        changes = [self.sprites[c].motion in (*scene.SCALINGS, *scene.ROTATIONS) for c in clip]
        return np.where(any_frame, np.where(changes, 0, frame), keyframe)

    def images(self, clip: np.ndarray, frame: np.ndarray) -> torch.Tensor:
        """Frames (b, 3, h, w) in [-1, 1] of the given clip and frame numbers."""
        picked = torch.from_numpy(self.frames[clip, frame]).to(DEVICE)
        return picked.permute(0, 3, 1, 2).float() / 127.5 - 1


def render_pool(folder: Path, num_videos: int, seed: int, split: str) -> Pool:
    """Renders the pool once; later calls map it from disk."""
    drawn = [scene.sample_attributes(seed, index, split) for index in range(num_videos)]
    paths = folder / f"{split}-{seed}-frames.npy", folder / f"{split}-{seed}-masks.npy"
    if not all(path.exists() for path in paths):
        frames = np.empty((num_videos, NUM_FRAMES, 64, 64, 3), np.uint8)
        masks = np.empty((num_videos, NUM_FRAMES, 64, 64), np.uint8)
        for index, sprite in enumerate(tqdm(drawn, desc=f"render {split} clips")):
            rendered = scene.render(sprite)
            frames[index], masks[index] = rendered.frames, np.round(rendered.masks * 255)
        for path, array in zip(paths, (frames, masks), strict=True):
            with atomic_path(path) as temporary:
                np.save(temporary, array)
    return Pool(np.load(paths[0], mmap_mode="r"), np.load(paths[1], mmap_mode="r"), drawn)


# --- stages --------------------------------------------------------------------------------------------------------------------------


def brief(rng: np.random.Generator, sprite: scene.Sprite, with_motion: bool) -> tuple[str, dict[str, str]]:
    """A caption that may leave attributes out, as people do, and the attributes of the picture that it names.

    That a word also stands without its neighbours helps to put pairs together that were never seen.
    """
    chances = {"size": 0.7, "colour": 0.85, "shape": 0.9, "background": 0.85}
    named = {name: getattr(sprite, name) for name, chance in chances.items() if rng.random() < chance}
    words = ["a", named.get("size"), named.get("colour"), named.get("shape", "shape")]
    words.append(scene.motion_caption(sprite) if with_motion else None)
    words.append(f"on {sprite.background}" if "background" in named else None)
    return " ".join(word for word in words if word), named


def make_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learnt from the world's own captions, so that every word is one token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    rng = np.random.default_rng(0)
    captions = [brief(rng, scene.sample_attributes(0, index), index % 2 == 0)[0] for index in range(2000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(bytes_to_unicode().values())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=2000, min_frequency=2, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
        ),
    )
    merges = json.loads(bpe.to_str())["model"]["merges"]
    merges = [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in merges]
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["".join(merge) for merge in merges]
    vocabulary = {
        word: number for number, word in enumerate(dict.fromkeys([*words, "<|startoftext|>", "<|endoftext|>"]))
    }
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, pad_token="<|endoftext|>")


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids.to(DEVICE)


def clip_config(tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Towers of width 128: two layers for text, three for 8x8 patches of images."""
    eos = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    shared = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    return CLIPConfig(
        text_config={
            **shared,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": MAX_TOKENS,
            "eos_token_id": eos,
            "pad_token_id": eos,
            "bos_token_id": tokenizer.convert_tokens_to_ids("<|startoftext|>"),
            "projection_dim": 64,
        },
        vision_config={**shared, "num_hidden_layers": 3, "image_size": 64, "patch_size": 8, "projection_dim": 64},
        projection_dim=64,
    )


def train_clip(recipe: Recipe, pool: Pool, base: Path) -> None:
    """CLIP by its own contrastive loss (arXiv 2103.00020), except that a caption's positives are all pictures that it is true of.

    What is kept of the text side is the words' embeddings and the last norm. Stable Diffusion 2 leaves off one layer of its text encoder,
    this leaves off both: behind them every token from a pair on tells of the pair as a whole, and the image model then draws no pair that it
    has not seen (of held-out shapes it drew 25%; from words alone, all).
    """
    tokenizer = make_tokenizer()
    torch.manual_seed(recipe.seed)
    config = clip_config(tokenizer)
    model = CLIPModel(config)
    # Words start as loud as what the layers say of their neighbours. At the library's own scale, a fiftieth of it, they drown.
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight)

    def loss_of(
        rng: np.random.Generator, generator: torch.Generator, done: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        clip = rng.integers(len(pool.sprites), size=96)
        frame = pool.frames_of_named_size(clip, rng.integers(NUM_FRAMES, size=len(clip)))
        captions, named = zip(*(brief(rng, pool.sprites[c], rng.random() < 0.5) for c in clip), strict=True)
        output = model(input_ids=tokenize(tokenizer, list(captions)), pixel_values=pool.images(clip, frame))
        true = torch.tensor(
            [[all(getattr(pool.sprites[c], k) == v for k, v in names.items()) for c in clip] for names in named],
            dtype=torch.float32,
            device=DEVICE,
        )
        logits = output.logits_per_text.float()
        of_text = F.cross_entropy(logits, true / true.sum(1, keepdim=True))
        of_image = F.cross_entropy(logits.T, true.T / true.T.sum(1, keepdim=True))
        right = true.gather(1, logits.argmax(1, keepdim=True)).mean().item()
        return (of_text + of_image) / 2, {"retrieval": right}

    fit("clip", model, loss_of, recipe, recipe.clip_steps, 1e-3)
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    config.text_config.num_hidden_layers = 0
    text = CLIPTextModel(config.text_config)
    words = {key: value for key, value in model.text_model.state_dict().items() if ".layers." not in key}
    getattr(text, "text_model", text).load_state_dict(words)  # older releases of transformers wrap it once more
    vision = CLIPVisionModelWithProjection(config.vision_config)
    vision.load_state_dict(
        {k: v for k, v in model.state_dict().items() if k.startswith(("vision_model", "visual_projection"))}
    )
    save_half(text, base / "text_encoder")
    save_half(vision, base / "image_encoder")
    tokenizer.save_pretrained(base / "tokenizer")
    CLIPImageProcessor(
        size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}, image_mean=[0.5] * 3, image_std=[0.5] * 3
    ).save_pretrained(base / "feature_extractor")


def make_motion_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer whose pieces are the words of the world's captions, and single letters for all others."""
    rng = np.random.default_rng(0)
    words = {word for index in range(2000) for word in any_caption(rng, scene.sample_attributes(0, index)).split()}
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["\u2581", *(f"\u2581{word}" for word in sorted(words)), *letters]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    # A whole word is likelier than its letters.
    vocabulary += [(piece, -1.0 if len(piece) > 2 else -8.0) for piece in dict.fromkeys(pieces)]
    return T5TokenizerFast(vocab=vocabulary, extra_ids=4, model_max_length=MAX_TOKENS)


def any_caption(rng: np.random.Generator, sprite: scene.Sprite) -> str:
    """One of the three captions of a sprite."""
    return (scene.caption, scene.motion_caption, scene.combined_caption)[rng.integers(3)](sprite)


def train_t5(recipe: Recipe, pool: Pool, folder: Path) -> None:
    """T5 by its own task, span corruption (arXiv 1910.10683), on captions: one span of words is taken out, and the decoder says it.

    What is kept is the encoder.
    """
    torch.manual_seed(recipe.seed)
    tokenizer = make_motion_tokenizer()
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    model = T5ForConditionalGeneration(config)

    def loss_of(
        rng: np.random.Generator, generator: torch.Generator, done: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        corrupted, spans = [], []
        for number in rng.integers(len(pool.sprites), size=64):
            words = any_caption(rng, pool.sprites[number]).split()
            first = int(rng.integers(len(words)))
            last = min(len(words), first + int(rng.integers(1, 4)))
            corrupted.append(" ".join([*words[:first], "<extra_id_0>", *words[last:]]))
            spans.append(" ".join(["<extra_id_0>", *words[first:last]]))
        read, said = (tokenizer(texts, padding=True, return_tensors="pt").to(DEVICE) for texts in (corrupted, spans))
        labels = said.input_ids.masked_fill(said.attention_mask == 0, -100)
        output = model(input_ids=read.input_ids, attention_mask=read.attention_mask, labels=labels)
        right = (output.logits.argmax(-1) == labels)[labels != -100].float().mean().item()
        return output.loss, {"words": right}

    fit("t5", model, loss_of, recipe, recipe.t5_steps, 3e-3)
    encoder = T5EncoderModel(config)
    encoder.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(("shared", "encoder"))})
    save_half(encoder, folder)
    tokenizer.save_pretrained(folder)


def train_vae(recipe: Recipe, pool: Pool, base: Path) -> None:
    """AutoencoderKL, 8x, 16 channels. The object is a small part of the picture and would be learnt last, so the loss weighs it up."""
    torch.manual_seed(recipe.seed)
    vae = AutoencoderKL(
        block_out_channels=(24, 32, 64, 96),
        layers_per_block=1,
        latent_channels=16,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=8,
        sample_size=64,
    )

    def loss_of(
        rng: np.random.Generator, generator: torch.Generator, done: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        clip, frame = rng.integers(len(pool.sprites), size=8), rng.integers(NUM_FRAMES, size=8)
        images = pool.images(clip, frame)
        mask = torch.from_numpy(pool.masks[clip, frame]).to(DEVICE).float()[:, None] / 255
        near = F.max_pool2d(mask, 5, 1, 2)
        posterior = vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=generator).to(DEVICE)
        error = vae.decode(latents).sample.float() - images
        weight = 1 + 4 * near
        edges = (error.diff(dim=-1).abs() * weight[..., 1:]).mean() + (
            error.diff(dim=-2).abs() * weight[..., 1:, :]
        ).mean()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss = (weight * (error.abs() + 2 * error.square())).mean() + edges + 1e-3 * kl
        in_mask = (near * error.square()).sum() / (3 * near.sum())
        return loss, {
            "psnr": -10 * math.log10(error.square().mean().item() / 4),
            "object_psnr": -10 * math.log10(in_mask.item() / 4),
            "kl": kl.item(),
        }

    fit("vae", vae, loss_of, recipe, recipe.vae_steps, 1.2e-3)
    with torch.no_grad():
        clip = np.arange(min(256, len(pool.sprites)))
        spread = vae.encode(pool.images(clip, clip % NUM_FRAMES)).latent_dist.mean.std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 5))
    save_half(vae, base / "vae")


def make_data(recipe: Recipe, rotation_weight: int = 1) -> Path:
    """An ordinary data set, files on disk: the pool's clips, or as many of which more rotate."""
    data = Path(recipe.work) / f"data-{rotation_weight}"
    if not (data / CSV_FILE).exists():
        write_dataset(data, recipe.train_clips, recipe.seed, rotation_weight=rotation_weight)
    return data


def encode_clips(data: Path, base: Path) -> torch.Tensor:
    """Latents of all clips by the base's VAE, (n, f, c, h, w), float16."""
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).to(DEVICE)
    clips = ClipDataset(str(data / CSV_FILE), str(data), NUM_FRAMES, 8, 64, clip_position="first")
    return torch.cat([encode_pixels(vae, clips[k]["video"][None] / 127.5 - 1).half().cpu() for k in range(len(clips))])


def train_unet(recipe: Recipe, pool: Pool, base: Path) -> None:
    """The text-to-image UNet: v-prediction (arXiv 2202.00512) on Stable Diffusion's schedule.

    Half of the pictures are any frame with the descriptive caption. Half are frames at the place of MicroCinema's key frame with the motion
    named as well, since the key frame of a motion must leave it room before and after; what turns or grows has then begun to, whatever size
    the caption names for its start. One caption in ten is empty, for guidance. Most diffusion times are drawn where shapes are decided,
    by a logit-normal distribution (arXiv 2403.03206): at the noisiest times the object's place is all that matters, and it cannot be known.
    """
    torch.manual_seed(recipe.seed)
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(64, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=4,
        norm_num_groups=16,
    )
    latents, keyframe = encode_clips(make_data(recipe), base), keyframe_index(keyframe_position(0), NUM_FRAMES)
    tokenizer = CLIPTokenizer.from_pretrained(base / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(base / "text_encoder", torch_dtype=torch.float32).to(DEVICE).eval()
    encoder.requires_grad_(False)

    def loss_of(
        rng: np.random.Generator, generator: torch.Generator, done: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        clip = rng.integers(len(pool.sprites), size=48)
        any_frame = rng.random(48) < 0.5
        frame = pool.frames_to_draw(clip, rng.integers(NUM_FRAMES, size=48), any_frame, keyframe)
        captions = [brief(rng, pool.sprites[c], not d)[0] for c, d in zip(clip, any_frame, strict=True)]
        captions = ["" if empty else caption for empty, caption in zip(rng.random(48) < 0.1, captions, strict=True)]
        clean = latents[clip, frame].float().to(DEVICE)
        noise = torch.randn(clean.shape, generator=generator).to(DEVICE)
        decisive = torch.sigmoid(0.4 + torch.randn(48, generator=generator))
        anywhere = torch.rand(48, generator=generator)
        t = (1000 * torch.where(torch.rand(48, generator=generator) < 0.8, decisive, anywhere)).long().to(DEVICE)
        noisy = scheduler.add_noise(clean, noise, t).contiguous(memory_format=torch.channels_last)
        predicted = unet(noisy, t, encoder(tokenize(tokenizer, captions)).last_hidden_state).sample
        error = (predicted.float() - scheduler.get_velocity(clean, noise, t)).square().mean(1)
        mask = torch.from_numpy(pool.masks[clip, frame]).to(DEVICE).float() / 255
        weight = 1 + 6 * max(0.0, 1 - done / 0.8) * F.max_pool2d(mask, 8)
        return (weight * error).mean(), {"plain": error.mean().item()}

    fit("unet", unet, loss_of, recipe, recipe.unet_steps, 1.5e-3, ema_decay=0.999)
    save_half(unet, base / "unet")
    scheduler.save_pretrained(base / "scheduler")
    write_base_index(base)


def write_base_index(base: Path) -> None:
    """The `model_index.json` that makes the folder a StableDiffusionPipeline of diffusers."""
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "safety_checker": [None, None],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "requires_safety_checker": False,
    }
    write_json(base / "model_index.json", index)


IGNORED = -100
"""Target of an attribute that a clip does not have (the speed of a still sprite); it does not enter the loss."""


def encode_labels(
    classes: Mapping[str, Sequence[str]], attributes: Sequence[Mapping[str, str]]
) -> dict[str, torch.Tensor]:
    """Class numbers (b,) of every attribute: `IGNORED` for an empty string (no such attribute)."""
    return {
        name: torch.tensor([names.index(item[name]) if item[name] else IGNORED for item in attributes])
        for name, names in classes.items()
    }


def classifier_loss(logits: Mapping[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Sum over the attributes of the mean cross-entropy; clips without an attribute (`IGNORED`) do not count in it."""
    losses = []
    for name, values in logits.items():
        target = targets[name].to(values.device)
        known = (target != IGNORED).sum().clamp(min=1)
        losses.append(F.cross_entropy(values.float(), target, ignore_index=IGNORED, reduction="sum") / known)
    return torch.stack(losses).sum()


def train_classifier(recipe: Recipe, pool: Pool, folder: Path) -> None:
    """The judge. It must know the pairs that the generators never see, so it also trains on held-out clips."""
    torch.manual_seed(recipe.seed)
    held_out = render_pool(Path(recipe.work), recipe.train_clips // 4, recipe.seed, "heldout")
    classes = {
        "shape": list(scene.SHAPES),
        "colour": list(scene.COLOURS),
        "size": list(scene.SIZES),
        "background": list(scene.BACKGROUNDS),
        "motion": list(scene.MOTIONS),
        "speed": list(scene.SPEEDS),
    }
    model = SpriteClassifier(classes)
    everything = [*pool.sprites, *held_out.sprites]
    labels = encode_labels(classes, [dataclasses.asdict(sprite) for sprite in everything])

    def loss_of(
        rng: np.random.Generator, generator: torch.Generator, done: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        number = rng.integers(len(everything), size=32)
        seen = len(pool.sprites)
        clips = np.stack([pool.frames[n] if n < seen else held_out.frames[n - seen] for n in number])
        video = torch.from_numpy(clips).to(DEVICE).permute(0, 1, 4, 2, 3).float() / 127.5 - 1
        # What comes out of a VAE is a little soft; the judge must not mind.
        softened = F.avg_pool3d(video.transpose(1, 2), (1, 3, 3), 1, (0, 1, 1)).transpose(1, 2)
        amount = torch.rand((len(video), 1, 1, 1, 1), generator=generator).to(DEVICE)
        video = video + amount * (softened - video)
        targets = {name: label[number].to(DEVICE) for name, label in labels.items()}
        logits = {name: value.float() for name, value in model(video).items()}
        right = [(logits[name].argmax(1) == targets[name]) for name in ("shape", "colour", "background")]
        return classifier_loss(logits, targets), {"joint": torch.stack(right).all(0).float().mean().item()}

    fit("classifier", model, loss_of, recipe, recipe.classifier_steps, 2e-3, ema_decay=0.99)
    save_half(model, folder)


def keyframe_position(model: int) -> str | int:
    """Of one of `VIDEO_MODELS`, as its experiment says."""
    name = VIDEO_MODELS[model].replace("-", "_")
    return compose("train", [f"experiment={name}"]).model.keyframe_position


def train_start(recipe: Recipe, pool: Pool, folder: Path) -> None:
    """The authors' network with the features of the model that runs once per clip, at high noise, where what moves is decided."""
    torch.manual_seed(recipe.seed)
    base, work = Path(recipe.assets) / "sprites-base", Path(recipe.work)
    data = make_data(recipe, recipe.microcinema_rotation_weight)
    overrides = [f"base.pretrained_model_name_or_path={base}", f"data.root={data}", "experiment=sprites_microcinema"]
    config = compose("train", [*overrides, "timestep_logit_normal=[1.5, 1.7]"])
    teacher, loaded = load_pipeline(work / ONCE).to(DEVICE), load_base(str(base))
    networks = build_networks(config, loaded)
    warm_start(networks["unet"], str(work / ONCE))
    components = {"vae": loaded.vae, "text_encoder": loaded.text_encoder, "tokenizer": loaded.tokenizer}
    student = build_pipeline(config, loaded.scheduler, **components, **networks).to(DEVICE)
    set_trainable(student.unet, config.trainable_parameters, config.trainable_unet_layers)
    latents, loss_config = encode_clips(data, base), make_loss_config(student, config)
    captions = [scene.combined_caption(sprite) for _, sprite, *_ in read_truth(data)]
    text = torch.cat([student.encode_text(captions[k : k + 100]) for k in range(0, len(captions), 100)])
    null = NullConditioning(student.encode_text([""]))
    fps = torch.full((8,), student.config["fps"], device=DEVICE)

    def loss_of(
        rng: np.random.Generator, generator: torch.Generator, done: float
    ) -> tuple[torch.Tensor, dict[str, float]]:
        clip, noise = rng.integers(len(latents), size=8), rng.integers(2**31, size=8).tolist()
        batch = Batch(latents[clip].float().to(DEVICE), text[clip], fps, noise)
        return matching_loss(student, teacher, loss_config, batch, null)

    # In channels_last PyTorch 2.13 crashes on a CPU, in the backward of the GroupNorm over frames.
    settings = {"memory_format": torch.contiguous_format}
    fit("microcinema_start", student.unet, loss_of, recipe, recipe.microcinema_start_steps, 8e-4, **settings)
    save_pipeline(student, folder)


def train_video(recipe: Recipe, pool: Pool, folder: Path) -> None:
    """A video model, by the ordinary trainer on an ordinary data set: files on disk, latents encoded once."""
    base, output = Path(recipe.assets) / "sprites-base", Path(recipe.work) / folder.name
    name = folder.name.removeprefix("sprites-").replace("-", "_")
    rotation_weight = getattr(recipe, f"{name}_rotation_weight")
    overrides = [
        f"base.pretrained_model_name_or_path={base}",
        f"data.root={make_data(recipe, rotation_weight)}",
        f"experiment=sprites_{name}",
    ]
    # The same for both models, which read other captions: these are encoded as they train. Key frames are for the second one.
    reads = [
        f"model.keyframe_position={keyframe_position(1)}",
        "model.pixels={block: attention, scales: [1]}",
        "model.flow_model=microcinema.sprites.flow.GroundTruthFlow",
        "cached_parts=[keyframe, flow]",
    ]
    if status := microcinema(["prepare", "latents", *overrides[:2], "experiment=sprites_microcinema", *reads]):
        sys.exit(status)
    overrides += [
        f"output_dir={output}",
        f"seed={recipe.seed}",
        "resume_from_checkpoint=latest",
    ]
    if folder.name == VIDEO_MODELS[0]:
        overrides += [f"init_weights_from={Path(recipe.work) / START}"]
    if folder.name == VIDEO_MODELS[1]:
        overrides += [f"init_weights_from={Path(recipe.work) / ONCE}"]
        overrides += [f"model.motion_encoder={folder.parent / 'sprites-t5'}"]
    status = microcinema(["train", *overrides])
    if status:
        sys.exit(status)
    if folder.name == ONCE:
        return
    pipeline = load_pipeline(output, torch_dtype=torch.float16)
    pipeline.register_to_config(base=base.name)
    if pipeline.uses_motion_caption:
        pipeline.register_to_config(motion_encoder_source="sprites-t5", unet_source=VIDEO_MODELS[0])
    save_pipeline(pipeline, folder, with_base=False)


def write_card(recipe: Recipe, pool: Pool, assets: Path) -> None:
    """Measures both video models on Moving Sprites, and writes what was trained and measured into the model card."""
    work, results = Path(recipe.work), {}
    for name in VIDEO_MODELS:
        report = work / f"report-{name}"
        if microcinema(["evaluate", f"pipeline={assets / name}", f"output_dir={report}"]):
            sys.exit("the evaluation failed; its message is above")
        results[name] = json.loads((report / "results.json").read_text(encoding="utf-8"))
    dreamer = VIDEO_MODELS[1]
    checkpoint = max((work / dreamer).glob("checkpoint-*"), key=lambda folder: int(folder.name.rpartition("-")[2]))
    figures = {
        "results": results,
        "following": benchmark("motion_following", work / "following.json", "--pipeline", str(assets / dreamer)),
        "flow": benchmark("flow_error", work / "flow.json", str(checkpoint)),
        "videos": {name: load(work / name / "config.yaml", "train") for name in VIDEO_MODELS},
    }
    with atomic_path(assets / "README.md") as path:
        path.write_text(render_card(recipe, count_parameters(assets), figures), encoding="utf-8")


def render_card(recipe: Recipe, parameters: dict[str, int], figures: dict[str, Any]) -> str:
    """The model card.

    Args:
        parameters: of each component.
        figures: `results` of `evaluate` and the config of training (`videos`) by video model; reports of `motion_following` and `flow_error` of benchmarks.sprites.
    """
    template = Template(Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8"))
    turns = {
        name: [c["right"]["motion"] for c in result["clips"] if c["asked"]["motion"] in scene.ROTATIONS]
        for name, result in figures["results"].items()
    }
    return template.render(recipe=recipe, world=scene, parameters=parameters, turns=turns, **figures).strip() + "\n"


def count_parameters(assets: Path) -> dict[str, int]:
    """The numbers in the weight files of each component."""
    return {
        folder.relative_to(assets).as_posix(): sum(
            tensor.numel() for file in folder.glob("*.safetensors") for tensor in load_file(file).values()
        )
        for folder in sorted(assets.rglob("*"))
        if any(folder.glob("*.safetensors"))
    }


def benchmark(name: str, figures: Path, *arguments: str) -> dict[str, Any]:
    """The report of a measurement of `benchmarks.sprites`."""
    command = [sys.executable, "-m", "benchmarks.sprites", "--json", str(figures), name, *arguments]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(figures.read_text(encoding="utf-8"))


def main() -> None:
    recipe: Recipe = OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(Recipe), OmegaConf.from_cli(sys.argv[1:]))
    )
    work, assets = Path(recipe.work), Path(recipe.assets)
    work.mkdir(parents=True, exist_ok=True)
    base = assets / "sprites-base"
    pool = render_pool(work, recipe.train_clips, recipe.seed, "train")
    stages = {
        "clip": (train_clip, base, "text_encoder"),
        "vae": (train_vae, base, "vae"),
        "unet": (train_unet, base, "model_index.json"),
        "microcinema_once": (train_video, work / ONCE, "model_index.json"),
        "microcinema_start": (train_start, work / START, "model_index.json"),
        "microcinema": (train_video, assets / VIDEO_MODELS[0], "model_index.json"),
        "t5": (train_t5, assets / "sprites-t5", "config.json"),
        "factorized_dreamer": (train_video, assets / VIDEO_MODELS[1], "model_index.json"),
        "classifier": (train_classifier, assets / "sprites-classifier", "config.json"),
        "card": (write_card, assets, "README.md"),
    }
    for name in recipe.stages:
        train, folder, output = stages[name]
        if not (folder / output).exists():
            train(recipe, pool, folder)


if __name__ == "__main__":
    main()

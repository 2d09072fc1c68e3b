"""Fixtures of the tests of pipelines: tiny Stable Diffusions of three kinds, a video pipeline on the first, and a key frame."""

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection

from fixtures import tiny, tiny_sampling


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return tiny.sdxl_folder(tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(scope="module")
def sd3(tmp_path_factory):
    """A Stable Diffusion 3 without its optional T5: a transformer that flows, 16 latent channels, a VAE with a shift."""
    folder = tmp_path_factory.mktemp("sd3")
    tokens = tiny.tokenizer(folder / "tokenizer"), tiny.tokenizer(folder / "tokenizer_2")
    torch.manual_seed(0)
    config = tiny.text_encoder(tokens[0]).config
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=1,
            attention_head_dim=8,
            num_attention_heads=2,
            caption_projection_dim=16,
            joint_attention_dim=2 * tiny.WIDTH,
            pooled_projection_dim=2 * tiny.WIDTH,
            pos_embed_max_size=16,
        ),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5,
            shift_factor=0.06,
        ),
        text_encoder=CLIPTextModelWithProjection(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        text_encoder_3=None,
        tokenizer=tokens[0],
        tokenizer_2=tokens[1],
        tokenizer_3=None,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(base):
    return tiny.video_pipeline(base)


@pytest.fixture(scope="module")
def image():
    return tiny_sampling.image()

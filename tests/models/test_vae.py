"""Pixels to latents and back: one affine map and its inverse, wherever latents are made or decoded."""

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import tiny
from fixtures.tiny_sampling import PROMPTS, sample
from microcinema.diffusion.rng import generator
from microcinema.models.vae import decode_latents, encode_pixels, scale_latents, unscale_latents
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.utils.errors import UserError

SHIFT, SCALE = 0.25, 0.5


@pytest.fixture(params=[None, SHIFT])
def vae(request):
    network = tiny.vae()
    network.register_to_config(shift_factor=request.param, scaling_factor=SCALE)
    return network


def clip(*leading: int) -> torch.Tensor:
    return torch.rand(*leading, 3, 32, 32, generator=generator(0)) * 2 - 1


def test_scaling_is_affine_and_unscaling_its_exact_inverse(vae):
    z = torch.randint(-64, 64, (2, 4, 8, 8), generator=generator(1)).double() / 16
    assert torch.equal(scale_latents(vae, z), (z - (vae.config.shift_factor or 0)) * SCALE)
    assert torch.equal(unscale_latents(vae, scale_latents(vae, z)), z)
    assert torch.equal(scale_latents(vae, unscale_latents(vae, z)), z)


def test_latents_are_the_scaled_mean(vae):
    video = clip(2, 3)
    latents = encode_pixels(vae, video)
    assert latents.shape == (2, 3, tiny.LATENT_CHANNELS, 8, 8)
    assert not latents.requires_grad
    for b in range(2):
        for f in range(3):
            mean = vae.encode(video[b, f][None]).latent_dist.mode()[0]
            expected = (mean - (vae.config.shift_factor or 0.0)) * SCALE
            torch.testing.assert_close(latents[b, f], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(encode_pixels(vae, video[:, 0]), latents[:, 0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_decoding_inverts_the_scaling(vae):
    video = clip(2, 3)
    expected = vae.decode(vae.encode(video.flatten(0, 1)).latent_dist.mean).sample.unflatten(0, (2, 3))
    latents = encode_pixels(vae, video)
    for chunk_size in (None, 4, 1):
        torch.testing.assert_close(decode_latents(vae, latents, chunk_size), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decode_latents(vae, latents[:, 0]), expected[:, 0], rtol=1e-4, atol=1e-5)


def test_frames_that_the_vae_cannot_divide_are_refused(vae):
    with pytest.raises(UserError, match="frames are 30x32, .* factor 4 .* multiples of 4"):
        encode_pixels(vae, torch.zeros(1, 3, 30, 32))


@torch.no_grad()
def test_the_pipeline_and_training_agree_for_a_vae_with_a_shift(tmp_path):
    pipeline = tiny.video_pipeline(tiny.base_folder(tmp_path))
    pipeline.vae.register_to_config(shift_factor=SHIFT)
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    frames = pixels.permute(2, 0, 1).expand(1, 2, 3, 32, 32)
    video = (pixels.permute(2, 0, 1) / 127.5 - 1).expand(1, 2, 3, 32, 32)
    items = {"video": frames, "caption": PROMPTS[:1], "fps": torch.tensor([8.0]), "sample_index": torch.tensor([0])}
    trained = BatchEncoder(pipeline, torch.device("cpu"))(items).latents
    z_ref = pipeline.encode_image(video[:, 0])
    torch.testing.assert_close(z_ref, trained[:, 0], rtol=1e-4, atol=1e-5)
    assert torch.equal(z_ref, scale_latents(pipeline.vae, pipeline.vae.encode(video[:, 0]).latent_dist.mean))
    # The frames of a sample are its latents decoded with the shift.
    image = Image.fromarray(pixels.numpy())
    z = sample(pipeline, PROMPTS[0], image, output_type="latent")
    frames = sample(pipeline, PROMPTS[0], image, output_type="pt")
    decoded = pipeline.vae.decode(z[0] / pipeline.vae.config.scaling_factor + SHIFT).sample
    torch.testing.assert_close(frames[0], (decoded / 2 + 0.5).clamp(0, 1), rtol=1e-4, atol=1e-4)

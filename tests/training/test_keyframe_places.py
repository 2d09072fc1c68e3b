"""Training with key frames at chosen places: the draws, what the network gets, and what a run without it keeps."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from diffusers import DDPMScheduler

from fixtures import tiny, tiny_training
from fixtures.tiny_unet import options
from microcinema.config.compose import compose
from microcinema.config.types import PlaceSet
from microcinema.data.keyframe_places import place_keyframes
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.saving import load_pipeline
from microcinema.training.consistency import in_common
from microcinema.training.loss import Batch, LossConfig, NullConditioning, make_loss_config, training_loss
from microcinema.training.trainer import Trainer
from microcinema.utils.errors import UserError
from microcinema.utils.fingerprint import differences

SETS = get_args(PlaceSet)
SHAPE = torch.Size((8, 4, 2, 2))


def loss_config(keyframe_places: float = 0.7, **changes) -> LossConfig:
    rest = {"snr_gamma": None, "motion_weight": 0.0, "timestep_logit_normal": None, "flow_weight": 0.1}
    dropout = {"text_dropout": 0.2, "image_dropout": 0.2}
    settings = {
        **rest,
        **dropout,
        "seed": 3,
        "keyframe_places": keyframe_places,
        "keyframe_place_sets": SETS,
        **changes,
    }
    return LossConfig(DDPMScheduler(clip_sample=False), NoisePrior("appearance", 0.5), "center", **settings)


def test_places_of_a_clip_depend_on_its_number_alone_and_change_no_other_draw():
    config = loss_config()
    together, alone = (config.sample_noise_and_timesteps(numbers, SHAPE) for numbers in (range(40), [17]))
    assert torch.equal(together.places[17], alone.places[0])
    assert len({tuple(row.tolist()) for row in together.places}) > 8
    without = loss_config(0.0).sample_noise_and_timesteps(range(40), SHAPE)
    assert without.places is None
    for name in ("noise", "t", "text_mask", "image_mask"):
        assert torch.equal(getattr(together, name), getattr(without, name))


@pytest.mark.parametrize("keeps_own_place", [False, True])
def test_prior_and_network_get_the_main_key_frame_and_the_network_sees_the_places(keeps_own_place):
    config = loss_config(1.0, keeps_own_place=keeps_own_place, motion_weight=2.0)
    latents = torch.randn(12, *SHAPE, generator=generator(1))
    noise = config.sample_noise_and_timesteps(range(12), SHAPE)
    assert noise.places[:, 4].all() == keeps_own_place
    main = [min(row.nonzero()[:, 0].tolist(), key=lambda place: (abs(place - 4), place)) for row in noise.places]
    expected = torch.stack([clip[place] for clip, place in zip(latents, main, strict=True)])
    assert keeps_own_place == (set(main) == {4})
    seen = {}

    def spy(z_t, t, text, z_ref, fps, image_mask, **inputs):
        seen.update(z_ref=z_ref, **inputs)
        return z_t, None

    batch = Batch(latents, torch.zeros(12, 5, 6), torch.full((12,), 8.0), range(12))
    training_loss(spy, batch, noise, NullConditioning(torch.zeros(1, 5, 6)), config)
    assert torch.equal(seen["z_ref"], expected)
    assert torch.equal(seen["placed"], place_keyframes(latents, noise.places))
    torch.testing.assert_close(config.noise(batch, noise), noise.noise + 0.5 * expected[:, None])
    own = replace(noise, places=None)  # of held-out clips
    training_loss(spy, batch, own, NullConditioning(torch.zeros(1, 5, 6)), config)
    assert torch.equal(seen["z_ref"], latents[:, 4])
    assert torch.equal(seen["placed"][:, 4, :4], latents[:, 4]) and seen["placed"][:, :, 4].sum() == 12 * 4


def test_a_run_trains_its_convolutions_and_saves_that_the_model_knows_places(tmp_path):
    network = options("microcinema", "model.max_frames=8", "model.keyframe_places=true", "keyframe_places=0.5")
    model, config = (
        tiny_training.pipeline(tmp_path),
        tiny_training.make_config(tmp_path / "run", num_frames=4, keyframe_places=0.5, model=network),
    )
    teacher = in_common(model)
    model.register_modules(unet=VideoUNet.from_unet2d(tiny.base_pipeline(tmp_path).unet, network))
    assert differences(teacher, in_common(model)) == ["keyframe_places was true and is false"]
    made = make_loss_config(model, config)
    assert (made.keyframe_places, made.keeps_own_place) == (0.5, False)
    run = Trainer(tiny_training.accelerator(config), model, tiny_training.LatentClips(), config).train()
    saved = load_pipeline(run)
    assert saved.unet.options.keyframe_places
    for part in (saved.unet, saved.unet.appear_net):
        assert part.placed_conv_in.weight.any()


def test_network_and_training_must_agree():
    for keys in (["keyframe_places=0.5"], ["model.keyframe_places=true"]):
        with pytest.raises(UserError, match=r"model\.keyframe_places=.*use true with a share"):
            compose("train", keys)

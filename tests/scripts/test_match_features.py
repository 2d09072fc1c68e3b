"""Training on the features of another network."""

import pytest
import torch

from benchmarks.text_sensitivity import loss_config
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.saving import load_pipeline
from microcinema.training.loss import Batch, NullConditioning
from scripts.recipes.match_features import feature_distance, matching_loss, places, record_features


def test_distance_is_relative_to_the_variance_of_the_teacher():
    teacher = [torch.randn(2, 3), 10 * torch.randn(4, 5)]
    assert feature_distance(teacher, teacher) == 0
    means = [feature.mean().expand_as(feature) for feature in teacher]
    expected = sum((feature.numel() - 1) / feature.numel() for feature in teacher) / 2
    assert feature_distance(means, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_features_of_every_layer_are_recorded_and_a_network_is_at_no_distance_from_itself():
    pipeline = load_pipeline("sprites-microcinema")
    unet: VideoUNet = pipeline.unet
    latents = torch.randn(2, 4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    text, null = pipeline.encode_text(["a red star", "a blue moon"]), NullConditioning(pipeline.encode_text([""]))
    batch = Batch(latents, text, torch.full((2,), 8.0), [0, 1])
    with record_features(unet) as features:
        unet(latents, 500, unet.encode(text, latents[:, 0], torch.tensor([8.0])))
    assert len(features) == len(places(unet)) == 2 + 4 + 2 + 1  # of the mid block and the decoder, resampling, the last
    assert not any(module._forward_pre_hooks for module in places(unet))

    total, figures = matching_loss(pipeline, pipeline, loss_config(pipeline), batch, null)
    assert figures["features"] == 0 and total.item() == pytest.approx(figures["clips"])
    other = load_pipeline("sprites-microcinema")
    other.unet.up_blocks[0].resnets[0].conv1.weight.data.mul_(1.5)
    other.unet.requires_grad_(True)
    total, figures = matching_loss(other, pipeline, loss_config(other), batch, null)
    assert figures["features"] > 0
    total.backward()
    assert other.unet.mid_block.resnets[0].conv1.weight.grad.abs().max() > 0

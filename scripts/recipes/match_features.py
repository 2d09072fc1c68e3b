"""A loss by which a video network learns the features of a trained one that has the same 2D layers, beside the clip itself.

The authors' network begins with the 2D layers of `microcinema_once`, frozen, and with AppearNet and injections that know nothing of motion. From
the clips alone it learned next to nothing of left and right in 3,200 steps: with the opposite caption the loss in moving places rose by 4 and 7%.
After 2,100 steps more with this loss it rose by 132 and 169% (`python -m benchmarks.sprites text_sensitivity --clips 48`).
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from microcinema.data.keyframe_index import keyframe_index
from microcinema.diffusion.losses import add_noise, motion_weights, squared_error, target
from microcinema.models.unet2d import resamplers_of
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.loss import LossConfig


def places(unet: VideoUNet) -> list[nn.Module]:
    """Modules of the 2D part whose input is the output of the layers before them, temporal layers and injections included."""
    down, up = list(unet.down_blocks), [unet.mid_block, *unet.up_blocks]
    resnets = [resnet for block in up for resnet in block.resnets]
    return [*resnets, *(module for block in (*down, *up) for module in resamplers_of(block)), unet.conv_norm_out]


@contextmanager
def record_features(unet: VideoUNet) -> Iterator[list[Tensor]]:
    """Collects the inputs of all `places` of a forward, in the order in which it reaches them."""
    features: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, arguments: features.append(arguments[0])) for module in places(unet)
    ]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def feature_distance(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over all places of the squared error of the student's features, relative to the variance of the teacher's."""
    errors = [
        (one.float() - other.float()).square().mean() / other.float().var()
        for one, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).mean()


def matching_loss(
    student: ImageToVideoPipeline,
    teacher: ImageToVideoPipeline,
    config: LossConfig,
    latents: Tensor,
    text: Tensor,
    null_text: Tensor,
    indices: list[int],
) -> tuple[Tensor, dict[str, float]]:
    """The loss of the student's clips plus the distance of its features, and both as figures.

    Both networks see the same noisy clips and captions, each with its own key frame.

    Args:
        config: the student's loss.
        latents: of the clips, `b f c h w`.
        text: of their captions, `b n d`; `null_text` `1 n d` replaces those that are dropped.
        indices: of the clips, for their noise.
    """
    noise = config.sample_noise_and_timesteps(indices, latents.shape[1:]).to(latents.device)
    z_ref = config.keyframes(latents)
    eps = config.prior.noise(noise.noise, z_ref)
    z_t = add_noise(config.scheduler, latents, eps, noise.t)
    text = torch.where(noise.text_mask[:, None, None], text, null_text)

    def predict(pipeline: ImageToVideoPipeline) -> tuple[Tensor, list[Tensor]]:
        z_ref = latents[:, keyframe_index(pipeline.keyframe_position, latents.shape[1])]
        fps = torch.full((len(latents),), pipeline.config["fps"], device=latents.device)
        conditions = pipeline.unet.encode(text, z_ref, fps, noise.image_mask)
        remapped = pipeline.remapped_timesteps
        t = noise.t if remapped is None else remapped.to(latents.device)[noise.t]
        with record_features(pipeline.unet) as features:
            return pipeline.unet(z_t, t, conditions), features

    with torch.no_grad():
        wanted = predict(teacher)[1]
    prediction, found = predict(student)
    weights = motion_weights(latents, z_ref, config.motion_weight)
    loss = squared_error(prediction, target(config.scheduler, latents, eps, noise.t), weights).mean()
    distance = feature_distance(found, wanted)
    return loss + distance, {"clips": loss.item(), "features": distance.item()}

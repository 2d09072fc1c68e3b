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
from microcinema.models.unet2d import resamplers_of
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.training.loss import Batch, LossConfig, NullConditioning, training_loss


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
    batch: Batch,
    null: NullConditioning,
) -> tuple[Tensor, dict[str, float]]:
    """The student's `training_loss` plus the distance of its features, and both as figures.

    Both networks see the same noisy clips and captions, each with its own key frame; their training schedules are the same.
    """
    distances: list[Tensor] = []

    def denoiser(
        z_t: Tensor, t: Tensor, text: Tensor, z_ref: Tensor, fps: Tensor, image_mask: Tensor
    ) -> tuple[Tensor, None]:
        own = batch.latents[:, keyframe_index(teacher.keyframe_position, z_t.shape[1])]
        with torch.no_grad(), record_features(teacher.unet) as wanted:
            teacher.unet(z_t, t, teacher.unet.encode(text, own, fps, image_mask))
        with record_features(student.unet) as found:
            prediction = student.unet(z_t, t, student.unet.encode(text, z_ref, fps, image_mask))
        distances.append(feature_distance(found, wanted))
        return prediction, None

    noise = config.sample_noise_and_timesteps(batch.indices, batch.latents.shape[1:]).to(batch.latents.device)
    loss = training_loss(denoiser, batch, noise, null, config).total.mean()
    return loss + distances[0], {"clips": loss.item(), "features": distances[0].item()}

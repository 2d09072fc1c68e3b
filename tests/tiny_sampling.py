"""A key frame, a short way to call a pipeline, and a denoiser that knows the clip, for the tests of sampling. Import as `import tiny_sampling`."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiny
import torch
from diffusers import SchedulerMixin
from PIL import Image

from microcinema.diffusion import objective
from microcinema.diffusion.randomness import generator
from microcinema.models.conditioning import Conditions
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.image_to_video import ImageToVideoPipeline

PROMPTS = ["a red star moving to the left on sand", "a large blue moon"]


def image(seed: int = 0) -> Image.Image:
    """Noise of the tiny models' size."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8))


def sample(
    pipeline: ImageToVideoPipeline,
    prompt: str | Sequence[str],
    image: Any,
    seeds: Sequence[int] = (0,),
    **arguments: Any,
) -> Any:
    """Frames of a call: three steps, arrays, and for each video a generator of its own seed, unless said otherwise."""
    settings = {"num_inference_steps": 3, "output_type": "np", "generator": [generator(7, seed) for seed in seeds]}
    return pipeline(prompt, image, **{**settings, **arguments}).frames


class Oracle(torch.nn.Module):
    """A denoiser that knows the clip: it returns the true target for whatever noise it is shown.

    Args:
        unet: whose place it takes.
        scheduler: of training.
        z0: the clip, (b, f, c, h, w), or a function that gives it for the latents that are to be denoised.
    """

    def __init__(
        self,
        unet: VideoUNet,
        scheduler: SchedulerMixin,
        z0: torch.Tensor | Callable[[torch.Tensor], torch.Tensor],
    ):
        super().__init__()
        self.config, self.dtype, self.device = unet.config, unet.dtype, unet.device
        self.scheduler, self.z0 = scheduler, z0

    def forward(self, z_t: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> torch.Tensor:
        """The target, (b, f, c, h, w)."""
        z0 = self.z0 if isinstance(self.z0, torch.Tensor) else self.z0(z_t)
        t = t.round().long()  # some solvers have times between those of training
        signal, sigma = objective.signal_and_noise(self.scheduler, t, z_t)
        return objective.target(self.scheduler, z0, (z_t - signal * z0) / sigma, t)

"""Every random generator of the package: it depends on a seed and a sample's own index, never on batch size or number of processes."""

from typing import Literal

import numpy as np
import torch

from microcinema.utils.errors import UserError

Purpose = Literal["keyframe", "video", "upscale"]
_SUFFIX: dict[Purpose, tuple[int, ...]] = {"video": (), "keyframe": (1,), "upscale": (2,)}


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator for one sample: `generator(seed, sample_index)`; further numbers give independent streams of it.

    The numbers are mixed by `numpy.random.SeedSequence`, so neighboring seeds and indices give unrelated streams. They
    go in as its spawn key: as plain entropy, (1,) and (1, 0) would be one stream. A negative number is a UserError.
    """
    if min(seed, *numbers, 0) < 0:
        raise UserError(f"seed {(seed, *numbers)} is negative; use integers >= 0")
    state = np.random.SeedSequence(seed, spawn_key=numbers).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))


def sample_generator(seed: int, sample_index: int, video_index: int, purpose: Purpose) -> torch.Generator:
    """The generator of one generated sample, the same in the command line, the Python API, validation and every protocol.

    Args:
        sample_index: of the prompt among the prompts of this seed.
        video_index: of the video among those of the prompt.
        purpose: `keyframe` for stage 1, `video` for stage 2, `upscale` for stage 3.
    """
    return generator(seed, sample_index, video_index, *_SUFFIX[purpose])

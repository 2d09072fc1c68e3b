"""Random numbers that depend on a seed and a sample's own number, never on batch size or the number of processes."""

import numpy as np
import torch

from microcinema.utils.errors import UserError


def generator(seed: int, *numbers: int) -> torch.Generator:
    """A CPU generator for one sample: `generator(seed, sample_index)`; further numbers give independent streams of it.

    The numbers are mixed by `numpy.random.SeedSequence`, so neighbouring seeds and indices give unrelated streams. They
    go in as its spawn key: as plain entropy, (1,) and (1, 0) would be one stream.

    Raises:
        UserError: a number is negative.
    """
    if min(seed, *numbers, 0) < 0:
        raise UserError(f"seed {(seed, *numbers)} is negative; use integers >= 0")
    state = np.random.SeedSequence(seed, spawn_key=numbers).generate_state(1, np.uint64)
    return torch.Generator("cpu").manual_seed(int(state[0]))

"""Fixtures of the tests of networks."""

import pytest
import torch
from diffusers import UNet2DConditionModel


@pytest.fixture(scope="module")
def unet():
    """A 2D UNet of two levels with one layer each: 2 down layers, 2 in the mid block, 4 up layers."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=4,
    )

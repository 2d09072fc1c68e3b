"""The examples of docs/extending.md, run as they stand on the page."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fixtures import tiny
from microcinema.data.indexed import IndexedDataset
from microcinema.evaluation.detectors import Batch
from microcinema.models.conditioning import Conditions

PAGE = Path(__file__).parents[1] / "docs" / "extending.md"


@pytest.fixture(scope="module")
def examples() -> dict[str, Any]:
    """The names that the page's Python blocks define."""
    namespace: dict[str, Any] = {"__name__": "extending"}
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        exec(compile(code, str(PAGE), "exec"), namespace)
    return namespace


def test_a_condition(examples):
    torch.manual_seed(0)
    unet2d = tiny.unet()
    unet = examples["build"](unet2d)
    text = torch.randn(2, 3, unet2d.config.cross_attention_dim)
    z_ref, pixels = torch.randn(2, 4, 8, 8), torch.zeros(2, 3, 32, 32)
    pixels[:, :, :, 16:] = 1
    conditions = unet.encode(text, z_ref, pixels=pixels, image_mask=torch.tensor([True, False]))
    edges = conditions.keyframe[:, 4]
    assert edges[0].amax(dim=0).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]  # between pixels 15 and 16, in cell 3 of 8
    assert not conditions.keyframe[1].any()
    z_t = torch.randn(2, 3, 4, 8, 8)
    plain = unet(z_t, 500, Conditions(text=text))
    assert torch.equal(unet(z_t, 500, conditions), plain)  # zero-initialised
    torch.nn.init.normal_(unet.keyframe_conv_in.weight)
    changed = unet(z_t, 500, conditions)
    assert not torch.allclose(changed[0], plain[0]) and torch.allclose(changed[1], plain[1], atol=1e-5)


def test_a_noise_prior(examples):
    prior = examples["FadingPrior"](strength=0.5, gamma=0.25, half_life=2.0)
    eps, z_ref = torch.zeros(1, 5, 1, 1, 1), torch.ones(1, 1, 1, 1)
    assert prior.noise(eps, z_ref).flatten().tolist() == pytest.approx([0.5 * 2 ** (-k / 2) for k in range(5)])
    start = prior.initial_noise(eps, z_ref).flatten()
    assert start.tolist() == pytest.approx([0.5 * 2 ** (-k / 2) + 0.25 for k in range(5)])
    centered = examples["FadingPrior"](strength=0.5, half_life=2.0, keyframe_position="center").noise(eps, z_ref)
    assert centered.flatten().tolist() == pytest.approx([0.5 * 2 ** (-abs(k - 2) / 2) for k in range(5)])
    noise = torch.randn(2, 5, 4, 8, 8)
    assert torch.equal(examples["FadingPrior"](strength=0.0).noise(noise, torch.randn(2, 4, 8, 8)), noise)


def test_a_data_set(examples):
    dataset = IndexedDataset(examples["GradientClips"](4, 8.0, 16, count=10), seed=0)
    items = [dataset[n] for n in range(10)]
    assert sorted(item["index"] for item in items) == list(range(10))  # one epoch
    video = items[0]["video"]
    assert video.shape == (4, 3, 16, 16) and video.dtype == torch.uint8
    assert torch.equal(video[1], video[0].roll(1, dims=2))
    other = IndexedDataset(examples["GradientClips"](4, 8.0, 16, count=10), seed=1)
    assert dataset.fingerprint() != other.fingerprint()  # another order


def test_a_metric(examples):
    frames = np.zeros((2, 4, 8, 8, 3), np.uint8)
    frames[1, 1::2] = 10  # 0, 10, 0, 10
    assert examples["flicker"](Batch(frames))["flicker"].tolist() == [0, 10]

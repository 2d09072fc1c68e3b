"""Each dimension in closed form, on networks whose answers are known. Parity with the suite's own code: benchmarks.vbench."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fixtures import tiny_detectors
from microcinema.config.compose import compose
from microcinema.evaluation.detectors import Batch
from microcinema.evaluation.vbench_dimensions import _DIMENSIONS, dynamic_degree, given_image, open_dimension
from microcinema.evaluation.vit import DINO
from microcinema.utils.errors import UserError

SCORES = {name: score for name, (score, *_) in _DIMENSIONS.items()}


def settings(**weights):
    changes = [f"evaluation.{key}.weights={path}" for key, path in weights.items()]
    return compose("evaluate", ["evaluation=vbench", *changes]).evaluation


def turned(*degrees):
    angles = torch.tensor(degrees) * torch.pi / 180
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_temporal_flickering_is_one_less_the_mean_difference():
    video = torch.zeros(5, 3, 4, 6)
    assert SCORES["temporal_flickering"](video) == 1
    video[1::2, 0] = 51
    assert float(SCORES["temporal_flickering"](video)) == pytest.approx(1 - 51 / 3 / 255)


@pytest.mark.parametrize("name", ["subject_consistency", "background_consistency"])
def test_consistency_is_with_the_first_frame_and_the_one_before(name):
    seen = []

    def network(video):
        seen.append(video.shape)
        return turned(0, 60, 60, 180)

    found = float(SCORES[name](network, torch.zeros(4, 3, 190, 250)))
    first, before = [0.5, 0.5, 0], [0.5, 1, 0]  # 180 degrees: -1 with the first and -0.5 with the one before, counted 0
    assert found == pytest.approx((np.mean(first) + np.mean(before)) / 2)
    assert seen[0][2:] == ((224, 294) if name == "subject_consistency" else (190, 250))


def test_i2v_subject_weighs_the_image_the_mean_and_the_smallest():
    def network(video):
        assert video.shape[2:] == (224, 224)
        return turned(0, 60, 90) if len(video) == 3 else turned(30)

    found = float(SCORES["i2v_subject"](network, torch.zeros(3, 3, 190, 250), torch.zeros(1, 3, 224, 224)))
    to_image, neighbors = np.cos(np.pi / 6), [0.5, np.cos(np.pi / 6)]
    assert found == pytest.approx(0.4 * to_image + 0.3 * np.mean(neighbors) + 0.3 * min(neighbors))


def test_aesthetic_quality_is_a_tenth_of_the_mean():
    head = nn.Linear(2, 1).requires_grad_(False)
    head.load_state_dict({"weight": torch.tensor([[2.0, 4.0]]), "bias": torch.tensor([1.0])})
    assert float(SCORES["aesthetic_quality"](head, lambda video: turned(0, 90), None)) == pytest.approx(0.4)


def test_imaging_quality_sees_single_frames_of_at_most_512_pixels():
    sizes, scores = [], iter([40.0, 60.0])

    def network(frame):
        sizes.append(tuple(frame.shape))
        assert frame.max() < 1.001
        return torch.tensor([[next(scores)]])

    assert float(SCORES["imaging_quality"](network, torch.full((2, 3, 300, 1000), 255.0))) == pytest.approx(0.5)
    assert sizes == [(1, 3, 153, 512)] * 2
    SCORES["imaging_quality"](
        lambda frame: sizes.append(tuple(frame.shape)) or torch.ones(1), torch.zeros(1, 3, 30, 40)
    )
    assert sizes[-1] == (1, 3, 30, 40)


@pytest.mark.parametrize("lengths, moves", [((7, 0, 0), True), ((0, 0, 6.1), True), ((5.9, 5.9, 5.9), False)])
def test_dynamic_degree_takes_the_longest_vectors_of_pairs(lengths, moves):
    """Of 8 frames at 16 a second four are left, of which one pair has to move, at 64 pixels by more than 6 / 4."""
    given = iter(lengths)

    def network(one, other, num_flow_updates):
        assert one.shape == other.shape == (1, 3, 64, 80) and num_flow_updates == 20 and one.min() == -1
        flow = torch.zeros(1, 2, 64, 80)
        flow.view(1, 2, -1)[:, 1, : int(0.05 * 64 * 80)] = next(given) / 4
        return [flow + 99, flow]

    assert bool(dynamic_degree(network, torch.zeros(8, 3, 64, 77), fps=16)) == moves
    assert next(given, None) is None


def test_dynamic_degree_needs_a_quarter_of_the_frames():
    """Of 16 frames at 8 a second, four pairs have to move."""
    for moving in (3, 4):
        given = iter([7.0] * moving + [0.0] * (15 - moving))
        flow = torch.zeros(1, 2, 256, 256)

        def network(one, other, num_flow_updates, given=given, flow=flow):
            return [flow + torch.tensor([next(given), 0]).view(1, 2, 1, 1)]

        assert bool(dynamic_degree(network, torch.zeros(16, 3, 256, 256), fps=8.0)) == (moving == 4)
    assert not dynamic_degree(network, torch.zeros(1, 3, 256, 256), fps=8.0)


def test_given_images_are_scaled_and_cropped_as_the_suite_does(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    scaled = np.asarray(Image.fromarray(pixels).resize((426, 256), Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(given_image(tmp_path / "image.png"), scaled[16:240, 101:325])


def test_networks_are_opened_by_path_and_named_in_the_record(tmp_path):
    torch.manual_seed(0)
    dino, head = DINO(2 * DINO.head_width, 32, 1), nn.Linear(16, 1)
    torch.save(dino.state_dict(), tmp_path / "dino.pth")
    torch.save(head.state_dict(), tmp_path / "head.pth")
    clip = tiny_detectors.clip_folder(tmp_path / "clip")
    opened = settings(dino=tmp_path / "dino.pth", clip=clip, aesthetic=tmp_path / "head.pth", aesthetic_clip=clip)
    batch = Batch(tiny_detectors.noise_clips(2, 3), keyframes=np.zeros((2, 224, 224, 3), np.uint8))
    for name in ("subject_consistency", "background_consistency", "aesthetic_quality", "i2v_subject"):
        measure, record = open_dimension(name, opened, 8.0, "cpu")
        found = measure(batch if name == "i2v_subject" else Batch(batch.frames))[name]
        assert found.shape == (2,) and np.isfinite(found).all() and found[0] != found[1]
        assert record.pop("dimension") == name and record.keys() == set(_DIMENSIONS[name][1:])
        assert all(len(sha256) == 64 for sha256 in record.values())


def test_musiq_is_that_of_pyiqa(tmp_path, monkeypatch):
    class MUSIQ(nn.Module):
        def __init__(self, pretrained):
            super().__init__()
            assert not pretrained
            self.level = nn.Parameter(torch.zeros(1))

        def forward(self, frame):
            return self.level[None]

    for name in ("pyiqa", "pyiqa.archs", "pyiqa.archs.musiq_arch"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["pyiqa.archs.musiq_arch"].MUSIQ = MUSIQ
    torch.save({"level": torch.tensor([70.0])}, tmp_path / "musiq.pth")
    measure, _ = open_dimension("imaging_quality", settings(musiq=tmp_path / "musiq.pth"), 8.0, "cpu")
    assert measure(Batch(tiny_detectors.noise_clips(1, 2)))["imaging_quality"] == pytest.approx([0.7])


def test_what_is_not_computed_says_why(tmp_path):
    for name, why in {
        "motion_smoothness": "AMT",
        "i2v_background": "DreamSim",
        "camera_motion": "CoTracker",
        "object_class": "the suite's code only",
        "subject_consistency": "evaluation.dino.weights not set",
        "aesthetic_quality": "evaluation.aesthetic.weights and evaluation.aesthetic_clip.weights not set",
    }.items():
        assert why in open_dimension(name, settings(), 8.0, "cpu")


@pytest.mark.parametrize(
    "key, name, words",
    [
        ("dino", "subject_consistency", "not the weights of DINO"),
        ("musiq", "imaging_quality", "evaluation.musiq.weights='.*' cannot be opened .*pyiqa"),
        ("raft", "dynamic_degree", "evaluation.raft.weights='.*' cannot be opened"),
    ],
)
def test_weights_of_another_network_and_missing_packages_are_told(tmp_path, key, name, words):
    torch.save({"weight": torch.zeros(1, 3)}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=words):
        open_dimension(name, settings(**{key: tmp_path / "weights.pth"}), 8.0, "cpu")

import numpy as np
import pytest
import torch

from microcinema.data.optical_flow import Flow, consistent, estimate, exact, to_latent_grid
from microcinema.sprites import scene
from microcinema.utils.errors import UserError


def clip(motion: str, size: int = 64) -> scene.Rendered:
    rng = np.random.default_rng(5)
    return scene.render(scene.place(rng, "star", "red", "large", "brick", motion, "quickly"), 4, size, 8.0)


def test_the_latent_grid_scales_the_vectors_with_the_size():
    vectors = torch.zeros(3, 2, 32, 16)
    vectors[:, 0], vectors[:, 1] = 8.0, -4.0  # pixels a frame
    coarse = to_latent_grid(Flow(vectors, torch.ones(3, 32, 16, dtype=torch.bool)), 8)
    assert coarse.vectors.shape == (3, 2, 4, 2) and coarse.valid.all()
    torch.testing.assert_close(coarse.vectors[0, :, 1, 1], torch.tensor([1.0, -0.5]))


def test_only_valid_pixels_count_and_a_place_needs_half_of_them():
    vectors, valid = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.bool)
    vectors[0, 0, 0, 0], vectors[0, 0, 0, 1] = 4.0, 2.0
    vectors[0, 0, 1] = 100.0  # not valid
    valid[0, 0, :2], valid[0, 2, 0] = True, True
    coarse = to_latent_grid(Flow(vectors, valid), 2)
    assert coarse.valid[0].tolist() == [[True, False], [False, False]]
    assert coarse.vectors[0, 0, 0, 0].item() == pytest.approx(3.0 / 2)


def test_true_flow_on_the_latent_grid_is_the_motion_of_the_object():
    rendered = clip("right")
    coarse = to_latent_grid(exact(rendered.flow), 8)
    inside = np.abs(rendered.flow[0]).sum(-1) > 0
    step = rendered.flow[0][inside].mean(0)
    assert step[0] > 1 and abs(step[1]) < 0.05  # pixels to the right
    assert coarse.vectors[0, 0].max().item() == pytest.approx(step[0] / 8, rel=0.05)


@pytest.mark.parametrize("motion", ["right", "growing"])
def test_dis_finds_the_motion_of_an_object_where_it_says_that_it_is_sure(motion):
    rendered = clip(motion)
    found = estimate("dis", rendered.frames)
    truth = exact(rendered.flow).vectors
    moving = (torch.from_numpy(rendered.masks[:-1]) > 0.9) & found.valid
    assert moving.float().mean() > 0.5 * (torch.from_numpy(rendered.masks[:-1]) > 0.9).float().mean()
    error = (found.vectors - truth).norm(dim=1)[moving].mean()
    assert error < 0.5 * truth.norm(dim=1)[moving].mean()


def test_what_is_covered_in_the_next_frame_is_not_valid():
    forward, backward = np.zeros((1, 8, 8, 2), np.float32), np.zeros((1, 8, 8, 2), np.float32)
    forward[0, :, 2, 0] = 3  # column 2 goes to column 5
    backward[0, :, 5, 0] = -3  # and back
    forward[0, :, 0, 0] = -2  # column 0 leaves the picture
    valid = consistent(forward, backward)[0]
    assert valid[:, 2].all() and valid[:, 1].all()
    assert not valid[:, 5].any() and not valid[:, 0].any()  # 5 stays where it is, but what is seen there came from 2


def test_one_frame_has_no_flow():
    flow = estimate("dis", np.zeros((1, 16, 16, 3), np.uint8))
    assert flow.vectors.shape == (0, 2, 16, 16) and flow.valid.shape == (0, 16, 16)


def test_teachers_that_are_not_there_are_named():
    with pytest.raises(UserError, match="'lucas' is unknown; use one of dis, raft"):
        estimate("lucas", np.zeros((2, 16, 16, 3), np.uint8))
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):
        with pytest.raises(UserError, match=r"microcinema\[flow\]"):
            estimate("raft", np.zeros((2, 16, 16, 3), np.uint8))
    with pytest.raises(UserError, match="30x32 does not divide by 8"):
        to_latent_grid(exact(np.zeros((1, 30, 32, 2), np.float32)), 8)

import pytest
import torch

from benchmarks.flow_error import flow_error
from fixtures import tiny
from microcinema.models.predict_net import PredictNet
from microcinema.sprites import scene

SHOWN = [scene.sample_attributes(1, index) for index in (0, 3, 4)]


class Knows(PredictNet):
    """Says one flow everywhere."""

    def forward(self, features, frames):
        return torch.full((1, frames - 1, 2, *features.shape[-2:]), 0.25)


@pytest.mark.parametrize("factorized", [False, True])
def test_errors_are_those_of_what_is_said(tmp_path, factorized):
    pipeline = tiny.video_pipeline(tmp_path, model="factorized_dreamer" if factorized else "plain")
    new = flow_error(pipeline, PredictNet(32, 8), SHOWN, 20)
    assert new["predict_net"] == pytest.approx(new["zero"]) and new["zero"] > 0  # it starts at zero flow
    off = flow_error(pipeline, Knows(32, 8), SHOWN, 20)
    assert off["zero"] == new["zero"]
    assert off["predict_net"] == pytest.approx(0.25 * 2**0.5, abs=2 * new["zero"])

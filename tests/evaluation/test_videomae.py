"""VideoMAE v2 in the names of the public file; parity with cd-fvd's own network: benchmarks.cd_fvd."""

import pytest
import torch

from microcinema.evaluation.detectors import VideoDetectorSettings
from microcinema.evaluation.videomae import FRAMES, HEAD_WIDTH, SIZE, VideoMAE
from microcinema.utils.errors import UserError

WIDTH = 2 * HEAD_WIDTH


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = VideoMAE(WIDTH, 64, 2, 5).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return network


def test_the_whole_network_has_the_size_of_the_public_one():
    with torch.device("meta"):
        names = {name: tuple(value.shape) for name, value in VideoMAE().state_dict().items()}
    assert len(names) == 2 + 40 * 13 + 4 and sum(torch.Size(shape).numel() for shape in names.values()) == 1_011_855_918
    assert names["blocks.39.attn.qkv.weight"] == (4224, 1408) and names["patch_embed.proj.weight"] == (
        1408,
        3,
        2,
        14,
        14,
    )


@torch.no_grad()
def test_features_are_of_the_order_of_frames_and_of_places(network):
    video = torch.rand(1, 3, FRAMES, SIZE, SIZE) * 2 - 1
    features = network(video)
    assert features.shape == (1, WIDTH) and torch.isfinite(features).all()
    for other in (video.flip(2), video.flip(4), video.roll(14, 3)):
        assert (network(other) - features).abs().max() > 1e-3 * features.std()
    torch.testing.assert_close(network(torch.cat([video, -video]))[:1], features, atol=1e-5, rtol=1e-4)


def test_the_public_layout_is_opened_and_another_refused(network, tmp_path):
    path = tmp_path / "vit.pth"
    torch.save({"module": network.state_dict()}, path)
    detector = VideoDetectorSettings("videomae", str(path), preparation="cd_fvd").load("cpu", 2)
    clips = (torch.rand(2, FRAMES, 32, 40, 3) * 255).byte().numpy()
    features = detector.network(clips)
    assert features.shape == (2, WIDTH) and detector.record["detector"] == "videomae"
    assert "batch_norm_eps" not in detector.record
    with pytest.raises(UserError, match="set protocol.num_frames=16"):
        detector.network(clips[:, :12])
    state = network.state_dict()
    del state["fc_norm.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match="not the weights of VideoMAE v2 .*fc_norm.weight"):
        VideoDetectorSettings("videomae", str(path)).load("cpu", 2)
    with pytest.raises(UserError, match="preparation=own is unknown to videomae"):
        VideoDetectorSettings("videomae", str(path), preparation="own")

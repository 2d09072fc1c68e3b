"""Networks in the names of their public files; parity with the public code itself: benchmarks.cd_fvd and benchmarks.jedi."""

import pytest
import torch
from torch.nn import functional

from microcinema.config.schema import Weights
from microcinema.evaluation.detectors import VideoDetectorSettings
from microcinema.evaluation.vit import DINO, FRAMES, SIZE, VJEPA, VideoMAE
from microcinema.utils.errors import UserError


def small(kind):
    torch.manual_seed(0)
    network = kind(2 * kind.head_width, 64, 2).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


@pytest.fixture(scope="module", params=[VideoMAE, VJEPA])
def network(request):
    return small(request.param)


@pytest.mark.parametrize(
    "kind, names, size",
    [
        (VideoMAE, 2 + 40 * 13 + 2, 1_011_610_752),
        (VJEPA, 3 + 32 * 12 + 2 + 15, 653_333_760),
        (DINO, 4 + 12 * 12 + 2, 85_798_656),
    ],
)
def test_whole_networks_have_the_size_of_the_public_ones(kind, names, size):
    with torch.device("meta"):
        state = kind().state_dict()
    assert len(state) == names and sum(value.numel() for value in state.values()) == size


@torch.no_grad()
def test_features_are_of_the_order_of_frames_and_of_places(network):
    video = torch.rand(1, 3, FRAMES, SIZE, SIZE) * 2 - 1
    features = network(video)
    assert features.shape == (1, 2 * network.head_width) and torch.isfinite(features).all()
    for other in (video.flip(2), video.flip(4), video.roll(14, 3)):
        assert (network(other) - features).abs().max() > 1e-3 * features.std()
    torch.testing.assert_close(network(torch.cat([video, -video]))[:1], features, atol=1e-5, rtol=1e-4)


def public(network, tmp_path):
    """Files as they are distributed: paths of the network's and the probe's."""
    state = {**network.state_dict(), "head.weight": torch.zeros(2), "linear.bias": torch.zeros(2)}
    paths = [str(tmp_path / name) for name in ("vit.pth", "probe.pth")]
    if isinstance(network, VideoMAE):
        torch.save({"module": state}, paths[0])
        return paths[0], None
    encoder = {f"module.backbone.{name}": value for name, value in state.items() if "pooler" not in name}
    torch.save({"target_encoder": encoder, "encoder": {}, "epoch": 300}, paths[0])
    probe = {f"module.{name}": value for name, value in state.items() if "pooler" in name or "linear" in name}
    torch.save({"classifier": probe, "epoch": 20}, paths[1])
    return paths


def test_the_public_layout_is_opened_and_another_refused(network, tmp_path):
    path, probe = public(network, tmp_path)
    kind, name = type(network), type(network).__name__.lower()
    detector = VideoDetectorSettings(name, path, preparation="cd_fvd").load("cpu", 2, probe=Weights(probe))
    clips = (torch.rand(2, FRAMES, 32, 40, 3) * 255).byte().numpy()
    features = detector.network(clips)
    assert features.shape == (2, 2 * kind.head_width) and detector.record["detector"] == name
    assert "batch_norm_eps" not in detector.record and ("probe_sha256" in detector.record) == (kind is VJEPA)
    with pytest.raises(UserError, match="set protocol.num_frames=16"):
        detector.network(clips[:, :12])
    state = network.state_dict()
    del state["blocks.1.norm1.weight"]
    torch.save(state, path)
    with pytest.raises(UserError, match=f"not the weights of {kind.__name__} .*blocks.1.norm1.weight"):
        VideoDetectorSettings(name, path).load("cpu", 2, probe=Weights(probe))
    with pytest.raises(UserError, match=f"preparation=own is unknown to {name}"):
        VideoDetectorSettings(name, path, preparation="own")


def test_jedi_needs_the_probe(tmp_path):
    path, _ = public(small(VJEPA), tmp_path)
    with pytest.raises(UserError, match=r"needs evaluation.probe.weights too; give ssv2-probe.pth.tar"):
        VideoDetectorSettings("vjepa", path).load("cpu", 2)
    with pytest.raises(UserError, match=r"evaluation.probe.weights='gone' is no file"):
        VideoDetectorSettings("vjepa", path).load("cpu", 2, probe=Weights("gone"))


def dino_by_hand(state, images, positions):
    """After arXiv 2010.11929, equations 1 to 4, with two heads of 64 channels."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    rows, columns = (size // 16 for size in images.shape[2:])
    cells = ((images - mean) / std)[:, :, : 16 * rows, : 16 * columns].unfold(2, 16, 16).unfold(3, 16, 16)
    cells = cells.permute(0, 2, 3, 1, 4, 5).reshape(len(images), rows * columns, 768)
    patches = cells @ state["patch_embed.proj.weight"].flatten(1).T + state["patch_embed.proj.bias"]
    x = torch.cat([state["cls_token"].repeat(len(images), 1, 1), patches], dim=1) + positions
    for block in ("blocks.0", "blocks.1"):
        parts = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv").split(64, dim=-1)  # q, q, k, k, v, v
        weights = [(parts[head] @ parts[2 + head].transpose(1, 2) / 8).softmax(-1) for head in range(2)]
        read = torch.cat([weight @ parts[4 + head] for head, weight in enumerate(weights)], dim=-1)
        x = x + linear(read, f"{block}.attn.proj")
        hidden = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        x = x + linear(hidden * (1 + torch.erf(hidden / 2**0.5)) / 2, f"{block}.mlp.fc2")
    return norm(x, "norm")[:, 0]


@torch.no_grad()
def test_dino_is_the_vit_of_its_paper_at_any_size():
    network = small(DINO)
    state = network.state_dict()
    square, wide = torch.rand(2, 3, SIZE, SIZE), torch.rand(2, 3, SIZE, 330)
    expected = dino_by_hand(state, square, state["pos_embed"])
    torch.testing.assert_close(network(square), expected, atol=1e-4, rtol=1e-4)
    grid = state["pos_embed"][:, 1:].reshape(1, 14, 14, 128).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid, scale_factor=(14.1 / 14, 20.1 / 14), mode="bicubic")  # of DINO's own code
    places = torch.cat([state["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    torch.testing.assert_close(network(wide), dino_by_hand(state, wide, places), atol=1e-4, rtol=1e-4)

import pytest
import torch
from torch.nn import functional

from microcinema.models.appearance import AppearanceNet, fuse
from microcinema.utils.errors import UserError

# With two levels and one layer in each there are 2 down layers, 2 in the mid block and 4 up layers.
WIDTHS = {"encoder": [16, 32, 32, 32], "decoder": [32, 32, 16, 16], "both": [16, 32, 32, 32, 32, 32, 16, 16]}


def identity_projections(net):
    for projection in net.projections:
        with torch.no_grad():
            projection.weight.copy_(torch.eye(projection.in_channels)[..., None, None])
    return net.eval()


@pytest.mark.parametrize("fusion", ["add", "spade"])
@pytest.mark.parametrize("inject", ["encoder", "decoder", "both"])
def test_features_are_zero_at_the_start_and_shaped_for_their_layers(unet, inject, fusion):
    net = AppearanceNet.from_unet2d(unet, fusion=fusion, inject=inject)
    features = net(torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12))
    factor = 2 if fusion == "spade" else 1
    assert [x.shape[1] for x in features] == [factor * width for width in WIDTHS[inject]]
    assert {x.shape[0] for x in features} == {2}
    assert not any(x.any() for x in features)


@torch.no_grad()
def test_features_are_those_of_the_2d_unet_at_time_zero(unet):
    unet.eval()
    z_ref, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 12)
    seen = {}
    blocks = [unet.down_blocks[0].attentions[0], unet.down_blocks[1].resnets[0], unet.mid_block.attentions[0]]
    blocks += [unet.mid_block.resnets[1], *unet.up_blocks[0].resnets, *unet.up_blocks[1].attentions]

    def keep(number):
        return lambda module, args, out: seen.update({number: out if torch.is_tensor(out) else out[0]})

    hooks = [block.register_forward_hook(keep(number)) for number, block in enumerate(blocks)]
    unet(z_ref, 0, text)
    for hook in hooks:
        hook.remove()
    features = identity_projections(AppearanceNet.from_unet2d(unet))(z_ref, text)
    assert len(features) == len(seen) == 8
    for number, feature in enumerate(features):
        torch.testing.assert_close(feature, seen[number], atol=1e-5, rtol=1e-5)


def test_only_needed_layers_are_built_and_all_are_trained(unet):
    encoder = AppearanceNet.from_unet2d(unet, inject="encoder")
    assert not any(key.startswith(("up_blocks", "conv_out", "conv_norm_out")) for key in encoder.state_dict())
    for inject in WIDTHS:
        net = identity_projections(AppearanceNet.from_unet2d(unet, inject=inject))
        sum(x.square().mean() for x in net(torch.randn(1, 4, 8, 8), torch.randn(1, 5, 12))).backward()
        assert all(parameter.grad is not None for parameter in net.parameters())


def test_save_and_load(unet, tmp_path):
    net = AppearanceNet.from_unet2d(unet, inject="encoder", fusion="spade")
    net.save_pretrained(tmp_path)
    again = AppearanceNet.from_pretrained(tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("fusion", "concat"), ("inject", "mid")])
def test_unknown_choice(unet, name, value):
    with pytest.raises(UserError, match=f"{name}='{value}' is not known; choose one of"):
        AppearanceNet.from_unet2d(unet, **{name: value})


@pytest.mark.parametrize("fusion", ["add", "spade"])
def test_fuse_is_its_equation_and_the_identity_for_zero(fusion):
    h = torch.randn(2 * 3, 8, 4, 4, dtype=torch.float64)
    feature = torch.randn(2, 8 if fusion == "add" else 16, 4, 4, dtype=torch.float64)
    each = feature.repeat_interleave(3, dim=0)
    if fusion == "add":
        expected = h + each
    else:
        expected = h + functional.group_norm(h, 2) * each[:, :8] + each[:, 8:]
    torch.testing.assert_close(fuse(h, feature, fusion, groups=2), expected)
    assert torch.equal(fuse(h, torch.zeros_like(feature), fusion, groups=2), h)

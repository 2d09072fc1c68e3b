"""Operations are counted as they are on paper, and gradient checkpointing does not change them."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fixtures import tiny, tiny_training
from microcinema.training.loss import TrainableModel
from microcinema.training.mfu import ModelFlops, peak_flops


def test_a_matrix_product_and_its_two_gradients():
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    with ModelFlops() as flops:
        layer(x).sum().backward()
    assert flops.total == 3 * (2 * 3 * 5 * 7)


def test_what_needs_no_gradient_takes_less():
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5)  # no gradient of the input
    frozen = nn.Linear(5, 5, bias=False).requires_grad_(False)
    with ModelFlops() as flops:
        with torch.no_grad():
            encoded = nn.Linear(5, 5)(x)
        layer(frozen(encoded)).sum().backward()
    assert flops.total == 2 * 3 * 5 * 5 + 2 * (2 * 3 * 5 * 7)


def test_a_convolution():
    layer, x = nn.Conv2d(2, 4, 3, padding=1), torch.randn(5, 2, 6, 7, requires_grad=True)
    with ModelFlops() as flops:
        layer(x).sum().backward()
    assert flops.total == 3 * (2 * 5 * 6 * 7 * 2 * 4 * 9)


def test_attention_by_whichever_kernel():
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (10, 11, 11))
    with ModelFlops() as flops:
        out = scaled_dot_product_attention(q, k, v)
    one = 2 * 2 * 3 * 10 * 11 * 8
    assert flops.total == 2 * one
    with ModelFlops() as flops:
        out.sum().backward()
    assert flops.total in (4 * one, 5 * one)  # fused kernels compute the scores once more


def test_what_a_checkpoint_computes_again_does_not_count():
    layer, x = nn.Linear(5, 7, bias=False), torch.randn(3, 5, requires_grad=True)
    with ModelFlops() as flops:
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert flops.total == 3 * (2 * 3 * 5 * 7)


def test_the_networks_take_the_same_with_checkpointing(tmp_path):
    def count(thrifty: bool) -> int:
        model = tiny_training.pipeline(tmp_path)
        if thrifty:
            model.unet.enable_gradient_checkpointing()
        denoiser = TrainableModel(model.unet).train()
        z = torch.randn(1, tiny_training.FRAMES, tiny.LATENT_CHANNELS, 8, 8)
        text, one = torch.randn(1, 4, tiny.WIDTH), torch.ones(1)
        with ModelFlops() as flops:
            denoiser(z, one.long(), text, z[:, 0], 8 * one, one.bool())[0].mean().backward()
        return flops.total

    assert count(True) == count(False) > 1e6


def test_the_peak_is_measured_once():
    found = peak_flops(torch.device("cpu"), torch.float32)
    assert 1e9 < found < 1e14
    assert peak_flops(torch.device("cpu"), torch.float32) == found

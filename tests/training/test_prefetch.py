"""FSDP2 in two processes gathers layers before their turn, and computes the same."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from fixtures import tiny
from fixtures.tiny_unet import network
from microcinema.models.temporal import TemporalConv, TemporalTransformer
from microcinema.models.unet2d import HalvedResnetBlock2D
from microcinema.training.distributed import prefetch_layers
from microcinema.training.loss import TrainableModel

LAYERS = (HalvedResnetBlock2D, TemporalConv, TemporalTransformer)


@pytest.mark.slow
def test_layers_are_gathered_before_their_turn_and_nothing_else_changes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_compare, (port, tmp_path), nprocs=2)
    losses = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for plain, prefetched in losses:
        assert len(plain) == 2 and prefetched == plain
    assert losses[0] != losses[1]  # each has data of its own


def _sharded() -> nn.Module:
    torch.manual_seed(0)
    base = tiny.unet(block_out_channels=(16, 32), norm_num_groups=4)
    model = TrainableModel(network(base, "plain", "model.max_frames=8"))
    mesh = init_device_mesh("cpu", (2,))
    for module in reversed(list(model.modules())):
        if isinstance(module, LAYERS):
            fully_shard(module, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _train(model: nn.Module, rank: int) -> list[float]:
    losses, optimizer = [], torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(2):
        z = torch.randn(1, 3, tiny.LATENT_CHANNELS, 8, 8, generator=generator)
        text = torch.randn(1, 4, tiny.WIDTH, generator=generator)
        given = z, torch.tensor([500]), text, z[:, 0], torch.full((1,), 8.0), torch.ones(1) > 0
        loss = (model(*given)[0] - z).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def _compare(rank: int, port: int, folder: Path) -> None:
    """Leaves the losses of both runs in the folder; fails if layers are not gathered in their order."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    distributed.init_process_group("gloo")
    plain = _train(_sharded(), rank)
    model = _sharded()
    prefetch_layers(model)
    layers = {layer: name for name, layer in model.named_modules() if isinstance(layer, FSDPModule) and name}
    order, there = [], []

    def record(layer, _):
        order.append(layer)
        following = layer._get_fsdp_state()._states_to_forward_prefetch
        there.append([state._fsdp_param_group._all_gather_result is not None for state in following])

    for layer in layers:
        layer.register_forward_pre_hook(record)
    (folder / f"{rank}.json").write_text(json.dumps([plain, _train(model, rank)]))
    count = len(layers)
    assert len(order) == 2 * count > 30 and set(order) == set(layers)
    assert not any(there[:count])  # the first step finds the order
    for number in range(count, 2 * count - 1):
        layer, following = order[number], order[number + 1 : number - number % count + count][:2]
        states = layer._get_fsdp_state()._states_to_forward_prefetch
        assert states == [other._get_fsdp_state() for other in following]
        assert there[number] == [True] * len(following)
    backward = [layer._get_fsdp_state()._states_to_backward_prefetch for layer in layers]
    assert sorted(map(len, backward)) == [0, 1] + [2] * (count - 2)
    distributed.destroy_process_group()

"""Compiled blocks compute what they compute uncompiled, in one graph for all that are alike, and leave the rest of a run as it is.

The compiler of C++ takes seconds for each graph, so the quick round compiles one block, and the slow one a network of one resolution.
"""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from torch._dynamo.utils import counters

from fixtures import tiny, tiny_training
from fixtures.tiny_training import LatentClips, logged, train, weights
from fixtures.tiny_unet import options
from microcinema.models.temporal import TemporalConv
from microcinema.models.video_unet import VideoUNet, set_trainable
from microcinema.training import compilation
from microcinema.training.distributed import check_replicated
from microcinema.training.loss import TrainableModel
from microcinema.training.mfu import ModelFlops
from microcinema.utils.errors import UserError

STEPS = 20


@pytest.fixture(autouse=True)
def _new_compiler():
    """As in a new process; what was compiled on this machine before is taken from the cache."""
    torch.compiler.reset()
    counters.clear()
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256, optimize_ddp=True):
        yield


def one_process():
    return type("Accelerator", (), {"distributed_type": DistributedType.NO})()


def pipeline(folder: Path, seed: int = 0):
    """A video model of one resolution: a graph for the ResNet blocks of each width, and one for each kind of the others."""
    model = tiny_training.pipeline(folder)
    levels = {"block_out_channels": (16,), "down_block_types": ("CrossAttnDownBlock2D",), "norm_num_groups": 4}
    base = tiny.unet(**levels, up_block_types=("CrossAttnUpBlock2D",))
    torch.manual_seed(seed)
    changes = ("model.max_frames=8", "model.appearance=null")
    model.register_modules(unet=VideoUNet.from_unet2d(base, options("microcinema", *changes)))
    return model


@pytest.mark.slow
def test_a_compiled_block_equals_the_block_and_blocks_alike_share_their_graph():
    torch.manual_seed(0)
    blocks = [TemporalConv(8, 2, over_frames=True).double() for _ in range(2)]
    for block in blocks:
        torch.nn.init.normal_(block.taps.weight)
    h, keys = torch.randn(4, 8, 3, 3, dtype=torch.float64), blocks[0].state_dict().keys()

    def run(block):
        x = h.clone().requires_grad_()
        out = block(x, 2)
        return out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])

    expected = [run(block) for block in blocks]
    for block in blocks:
        compilation.compile_blocks(block, one_process())
    torch.testing.assert_close([run(block) for block in blocks], expected)
    assert compilation.count_graphs() == 1 and not counters["graph_break"]
    assert blocks[0].state_dict().keys() == keys


@pytest.mark.slow
def test_operations_are_counted_as_of_a_network_that_is_not_compiled(tmp_path):
    model = pipeline(tmp_path)
    set_trainable(model.unet)
    z = torch.randn(2, tiny_training.FRAMES, tiny.LATENT_CHANNELS, 8, 8)
    given = z, torch.tensor([3, 500]), torch.randn(2, 4, tiny.WIDTH), z[:, 0], torch.full((2,), 8.0), torch.ones(2) > 0
    network = TrainableModel(model.unet)
    with ModelFlops() as flops:
        network(*given)[0].sum().backward()
    gradients = {
        name: parameter.grad.clone() for name, parameter in network.named_parameters() if parameter.requires_grad
    }
    compilation.compile_blocks(network, one_process())
    assert compilation.count_flops(network, *given) == flops.total > 1e6
    assert compilation.count_graphs() == 0
    for name, parameter in network.named_parameters():
        assert not parameter.requires_grad or torch.equal(parameter.grad, gradients[name])  # none was added


@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_shards_are_refused(kind):
    accelerator = type("Accelerator", (), {"distributed_type": kind})()
    with pytest.raises(UserError, match=f"compile=true works with DistributedDataParallel, not with {kind.value}"):
        compilation.compile_blocks(torch.nn.Linear(1, 1), accelerator)
    with pytest.raises(UserError, match=f"quantization=int8 works .*, not with {kind.value}; set quantization=null"):
        check_replicated(accelerator, "quantization=int8", "quantization=null")


def test_a_compiler_that_fails_is_told_in_one_line():
    def broken(graph, inputs):
        raise RuntimeError("no compiler is there")

    message = r"^compile=true fails here \(.*no compiler is there\); set compile=false$"
    with pytest.raises(UserError, match=message), compilation.compilation_errors():
        torch.compile(torch.sin, backend=broken)(torch.zeros(1))


@pytest.mark.slow  # the compiler takes minutes
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_compiled_training_is_training(tmp_path, gradient_checkpointing):
    settings = {"max_train_steps": STEPS, "checkpointing_steps": STEPS // 2, "lr_warmup_steps": 0}
    train(pipeline(tmp_path), LatentClips(), tmp_path / "plain", **settings)
    settings |= {"compile": True, "gradient_checkpointing": gradient_checkpointing}
    validated = []

    def validate(accelerator, model, step):
        before = compilation.count_graphs()
        validated.append(model("a red star", torch.zeros(1, 3, tiny.SIZE, tiny.SIZE), output_type="np").frames)
        assert compilation.count_graphs() == before

    train(pipeline(tmp_path), LatentClips(), tmp_path / "compiled", validate, validation_steps=STEPS // 2, **settings)
    assert len(validated) == 2 and not counters["graph_break"]
    plain, compiled = (logged(tmp_path / name) for name in ("plain", "compiled"))
    assert plain.keys() == compiled.keys() == set(range(1, STEPS + 1))
    assert all(abs(plain[step] - compiled[step]) < 1e-4 for step in plain)
    graphs = logged(tmp_path / "compiled", "compiled_graphs")
    assert 0 < graphs[1] == graphs[STEPS] < 8  # there are more than 20 blocks
    assert logged(tmp_path / "plain", "mfu").keys() == logged(tmp_path / "compiled", "mfu").keys()
    assert weights(tmp_path / "plain").keys() == weights(tmp_path / "compiled").keys()
    # On from a checkpoint that was not compiled.
    resumed = tmp_path / "resumed"
    resumed.mkdir()
    (tmp_path / f"plain/checkpoint-{STEPS // 2}").rename(resumed / f"checkpoint-{STEPS // 2}")
    train(pipeline(tmp_path), LatentClips(), resumed, resume_from_checkpoint="latest", **settings)
    losses = logged(resumed)
    assert min(losses) == STEPS // 2 + 1 and all(abs(plain[step] - losses[step]) < 1e-4 for step in losses)
    assert json.loads((resumed / f"checkpoint-{STEPS}/training_state.json").read_text())["progress"]["step"] == STEPS


@pytest.mark.slow
def test_each_shape_of_clips_is_compiled_once(tmp_path):
    class TwoShapes(LatentClips):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            return item if index % 2 else {**item, "latents": item["latents"][..., :4]}

    settings = {"max_train_steps": 8, "train_batch_size": 1, "compile": True}
    train(pipeline(tmp_path), TwoShapes(2), tmp_path / "run", **settings)
    graphs = logged(tmp_path / "run", "compiled_graphs")
    assert sorted(set(graphs.values())) == [graphs[1], 2 * graphs[1]]


@pytest.mark.slow
def test_compiled_training_on_two_processes_is_that_on_one(tmp_path, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.multiprocessing.spawn(_train_compiled, (port, tmp_path), nprocs=2)
    train(pipeline(tmp_path), LatentClips(), tmp_path / "one", max_train_steps=3, train_batch_size=4)
    assert logged(tmp_path / "two") == pytest.approx(logged(tmp_path / "one"), abs=1e-4)
    graphs = logged(tmp_path / "two", "compiled_graphs")
    assert graphs[1] == graphs[3]


def _train_compiled(rank: int, port: int, folder: Path) -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ.update(address, RANK=str(rank), LOCAL_RANK=str(rank))
    own = folder / f"process-{rank}"
    own.mkdir()
    train(pipeline(own), LatentClips(), folder / "two", max_train_steps=3, train_batch_size=2, compile=True)

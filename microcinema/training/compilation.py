"""Regional compilation: the blocks that a network repeats are compiled, one graph for all that are alike; what is between them is not.

The parameters keep their names, so that a checkpoint of a compiled run is as any other.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from diffusers.models.attention import BasicTransformerBlock
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from microcinema.models.temporal import TemporalConv, TemporalTransformer
from microcinema.models.unet2d import HalvedResnetBlock2D
from microcinema.training.distributed import check_replicated
from microcinema.training.mfu import ModelFlops
from microcinema.utils.errors import UserError, first_line

BLOCKS = (HalvedResnetBlock2D, BasicTransformerBlock, TemporalTransformer, TemporalConv)
_MAX_GRAPHS = 2**14


def compile_blocks(model: nn.Module, accelerator: Accelerator) -> None:
    """Compiles the blocks of a network, each when it is first called, whole, and for its own width and shape; a UserError if the parameters
    are sharded."""
    check_replicated(accelerator, "compile=true", "compile=false")
    # Each width and each shape of clips is one graph: torch's limits, 8 and 256, are too few for buckets.
    config = torch._dynamo.config
    config.recompile_limit = config.accumulated_recompile_limit = _MAX_GRAPHS
    config.optimize_ddp = False  # it would split blocks where a bucket of gradients ends
    for module in model.modules():
        if isinstance(module, BLOCKS):
            compiled = torch.compile(module.forward, fullgraph=True, dynamic=False)
            module.forward = compiled  # type: ignore[method-assign]


def count_graphs() -> int:
    """The graphs that this process has compiled."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def count_flops(model: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> int:
    """Operations of forward and backward of a `TrainableModel`, counted without compilation and data: compiled kernels count nothing."""
    mode, trained = FakeTensorMode(allow_non_fake_inputs=True), [p for p in model.parameters() if p.requires_grad]
    with mode, torch.compiler.set_stance("force_eager"), ModelFlops() as flops:
        outputs = [output.sum() for output in model(*args, **kwargs) if output is not None]
        torch.autograd.grad(outputs, trained, allow_unused=True)
    return flops.total


@contextmanager
def compilation_errors() -> Iterator[None]:
    """Within it, an error of the compiler is a UserError."""
    try:
        yield
    except torch._dynamo.exc.TorchDynamoException as error:
        reason = first_line(getattr(error, "inner_exception", error))
        raise UserError(f"compile=true fails here ({reason}); set compile=false") from error

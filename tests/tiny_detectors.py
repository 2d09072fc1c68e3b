"""Random I3D weights, and TorchScripts with the calling conventions of the public files, for the tests of evaluation. Import as `import tiny_detectors`."""

from pathlib import Path

import numpy as np
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from microcinema.models.i3d import I3D

FRAMES = 10  # the fewest that I3D reads


def i3d_state(seed: int = 0) -> dict[str, Tensor]:
    """Weights under which neighbouring clips are told apart: statistics of the norms differ from those of a fresh network."""
    torch.manual_seed(seed)
    state = I3D().state_dict()
    for name, value in state.items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            value.normal_(0, 0.1)
    return state


class PublicI3D(nn.Module):
    """As `i3d_torchscript.pt` is called; a batch of one loses its batch axis."""

    def __init__(self, network: I3D):
        super().__init__()
        self.network = torch.jit.trace(network, torch.zeros(1, 3, FRAMES, 224, 224), check_trace=False)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if resize:
            b, c, f, h, w = x.shape
            frames = x.permute(0, 2, 1, 3, 4).reshape(b * f, c, h, w).float()
            frames = F.interpolate(frames, size=[224, 224], mode="bilinear", align_corners=False)
            x = frames.reshape(b, f, c, 224, 224).permute(0, 2, 1, 3, 4)
        if rescale:
            x = x / 255 * 2 - 1
        logits = self.network(x)
        found = logits if return_features else logits.softmax(dim=1)
        return found.squeeze(0)


class PublicC3D(nn.Module):
    """As `c3d_ucf101.pt` is called. `sharpness` 0 knows nothing."""

    def __init__(self, sharpness: float = 1.0, softmax: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.sharpness, self.softmax = nn.Linear(3, 101), sharpness, softmax

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        logits = self.sharpness * self.layer(x.float().mean(dim=[2, 3, 4]) / 25)
        return logits.softmax(dim=1) if self.softmax else logits


class PublicInception(nn.Module):
    """As NVIDIA's `inception-2015-12-05.pt` is called: features of width 6."""

    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        assert x.dtype == torch.uint8 and return_features
        pixels = x.float() / 255
        return torch.cat([pixels.mean(dim=[2, 3]), pixels.std(dim=[2, 3])], dim=1)


class SmallVideoScript(nn.Module):
    """With I3D's calling convention, and 12 features that see colour, contrast and motion; fast."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        assert return_features
        if rescale:
            x = x.float() / 255 * 2 - 1
        change = (x[:, :, 1:] - x[:, :, :-1]).abs()
        edges = (x[..., 1:] - x[..., :-1]).abs()
        parts = [x.mean(dim=[2, 3, 4]), x.flatten(2).std(dim=2), change.mean(dim=[2, 3, 4]), edges.mean(dim=[2, 3, 4])]
        return torch.cat(parts, dim=1).squeeze(0)


def write_script(module: nn.Module, path: Path) -> tuple[str, str]:
    """Writes a TorchScript; returns its path and sha256."""
    from microcinema.evaluation.weights import sha256_of

    torch.jit.script(module.eval()).save(str(path))
    return str(path), sha256_of(path)


def clip_folder(folder: Path) -> Path:
    """A CLIP of two layers and width 32, with its tokenizer and image processor, as the hub has it."""
    tokens = tiny.tokenizer(folder)
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **tower,
        "vocab_size": len(tokens),
        "max_position_embeddings": tiny.MAX_TOKENS,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
    }
    vision = {**tower, "image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(folder)
    tiny.image_processor().save_pretrained(folder)
    return folder


def noise_clips(count: int = 2, frames: int = FRAMES, height: int = 40, width: int = 56, seed: int = 0) -> np.ndarray:
    """uint8 (count, frames, height, width, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (count, frames, height, width, 3), np.uint8)

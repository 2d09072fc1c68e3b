"""Vision transformers by whose features videos are compared, with the names of their public files, so that these open as they are.

- VideoMAE v2 (arXiv 2303.16727), ViT-g fine-tuned on Something-Something v2: content-debiased FVD (arXiv 2404.12391).
- V-JEPA (arXiv 2404.08471), ViT-H, with an attentive probe trained on the same data: JEDi (arXiv 2410.05203).
- DINO (arXiv 2104.14294), ViT-B/16: consistency of subjects in VBench (arXiv 2311.17982).
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Self

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from microcinema.utils.errors import UserError

SIZE, FRAMES, TUBELET = 224, 16, 2
_EPS = 1e-6
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Attention(nn.Module):
    """Self-attention; without `key_bias` queries and values have biases, and keys none."""

    def __init__(self, width: int, head_width: int, key_bias: bool):
        super().__init__()
        self.head_width = head_width
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=key_bias), nn.Linear(width, width)
        if not key_bias:
            self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """`b n c` to `b n c`."""
        bias = self.qkv.bias
        if bias is None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return self.proj(_attend(self.head_width, *F.linear(x, self.qkv.weight, bias).chunk(3, dim=-1)))


class Block(nn.Module):
    """A transformer block with norms before its parts."""

    def __init__(self, width: int, hidden: int, head_width: int, key_bias: bool):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.attn, self.mlp = Attention(width, head_width, key_bias), _mlp(width, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """`b n c` to `b n c`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Patches and blocks. Subclasses name the public file, and the width of a head in it."""

    file: str
    head_width: int
    key_bias = True

    def __init__(self, width: int, hidden: int, depth: int):
        super().__init__()
        self.patch_embed = nn.ModuleDict()
        self.blocks = nn.Sequential(*(Block(width, hidden, self.head_width, self.key_bias) for _ in range(depth)))

    def patches(self, x: Tensor) -> Tensor:
        """(b, 3, ...) to `b n c`; a UserError for a video of another shape than 16x224x224."""
        if x.ndim == 5 and x.shape[2:] != (FRAMES, SIZE, SIZE):
            found, name = "x".join(map(str, x.shape[2:])), type(self).__name__
            raise UserError(f"clips are {found}; {name} reads {FRAMES}x{SIZE}x{SIZE}: set protocol.num_frames=16")
        return rearrange(self.patch_embed["proj"](x), "b c ... -> b (...) c")

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """Of the public file's content, or of a smaller one with the same names; a UserError if they do not match."""
        kept = {name: value for name, value in state.items() if not name.startswith(("head.", "linear."))}
        try:
            hidden, width = kept["blocks.0.mlp.fc1.weight"].shape
            network = cls(width, hidden, len({name.split(".")[1] for name in kept if name.startswith("blocks.")}))
            network.load_state_dict(kept)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(f"not the weights of {cls.__name__} ({reason}); give {cls.file}") from None
        return network.eval().requires_grad_(False)


class VideoMAE(ViT):
    """The mean of all tokens after the last block, normalized."""

    file, head_width, key_bias = "vit_g_hybrid_pt_1200e_ssv2_ft.pth", 88, False
    positions: Tensor

    def __init__(self, width: int = 1408, hidden: int = 6144, depth: int = 40, patch: int = 14):
        super().__init__(width, hidden, depth)
        self.patch_embed["proj"] = nn.Conv3d(3, width, kernel := (TUBELET, patch, patch), stride=kernel)
        self.fc_norm = nn.LayerNorm(width, _EPS)
        places = _positions((FRAMES // TUBELET) * (SIZE // patch) ** 2, width)
        self.register_buffer("positions", places, persistent=False)

    def forward(self, video: Tensor) -> Tensor:
        """(b, 3, 16, 224, 224) in [-1, 1], as `PREPARATIONS` give, to (b, width)."""
        x = self.patches((video + 1) / 2)  # without the normalization of colors, as cd-fvd reads clips
        return self.fc_norm(self.blocks(x + self.positions).mean(dim=1))


class VJEPA(ViT):
    """What the probe's token reads from all tokens, before its classes: JEDi's features."""

    file, head_width = "vith16.pth.tar, and ssv2-probe.pth.tar as evaluation.probe.weights", 80

    def __init__(self, width: int = 1280, hidden: int = 5120, depth: int = 32, patch: int = 16):
        super().__init__(width, hidden, depth)
        self.patch_embed["proj"] = nn.Conv3d(3, width, kernel := (TUBELET, patch, patch), stride=kernel)
        self.pos_embed = nn.Parameter(torch.zeros(1, (FRAMES // TUBELET) * (SIZE // patch) ** 2, width))
        self.norm, self.pooler = nn.LayerNorm(width, _EPS), nn.Module()
        self.pooler.query_tokens = nn.Parameter(torch.zeros(1, 1, width))
        norms = {f"norm{number}": nn.LayerNorm(width) for number in (1, 2)}  # with torch's own epsilon
        sizes = {"q": width, "kv": 2 * width, "proj": width}
        reading = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items()})
        self.pooler.cross_attention_block = nn.ModuleDict({**norms, "xattn": reading, "mlp": _mlp(width, hidden)})

    def forward(self, video: Tensor) -> Tensor:
        """(b, 3, 16, 224, 224) in [-1, 1], as `PREPARATIONS` give, to (b, width)."""
        x = self.norm(self.blocks(self.patches(_normalized((video + 1) / 2)) + self.pos_embed))
        block: Any = self.pooler.cross_attention_block
        token: Any = self.pooler.query_tokens
        keys, values = block["xattn"]["kv"](block["norm1"](x)).chunk(2, dim=-1)
        read = _attend(self.head_width, block["xattn"]["q"](token).expand(len(x), -1, -1), keys, values)
        # JEDi's code applies `proj`, although V-JEPA's does not: its probe was trained without.
        token = token + block["xattn"]["proj"](read)
        return (token + block["mlp"](block["norm2"](token)))[:, 0]


class DINO(ViT):
    """The class token after the last block, normalized."""

    file, head_width = "dino_vitbase16_pretrain.pth", 64

    def __init__(self, width: int = 768, hidden: int = 3072, depth: int = 12, patch: int = 16):
        super().__init__(width, hidden, depth)
        self.patch_embed["proj"] = nn.Conv2d(3, width, patch, stride=patch)
        self.patch, self.side, self.norm = patch, SIZE // patch, nn.LayerNorm(width, _EPS)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.side**2, width))

    def forward(self, images: Tensor) -> Tensor:
        """(b, 3, h, w) in [0, 1], of any size, to (b, width)."""
        patches = self.patches(_normalized(images))
        x = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self._places(*images.shape[2:])
        return self.norm(self.blocks(x)[:, 0])

    def _places(self, height: int, width: int) -> Tensor:
        """Positions of images of another size, bicubic; the tenth of a patch is of DINO's code, and shifts them a little."""
        if height == width and height // self.patch == self.side:
            return self.pos_embed
        grid = rearrange(self.pos_embed[:, 1:], "1 (h w) c -> 1 c h w", h=self.side)
        factors = [(size // self.patch + 0.1) / self.side for size in (height, width)]
        grid = F.interpolate(grid, scale_factor=factors, mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], rearrange(grid, "1 c h w -> 1 (h w) c")], dim=1)


def _mlp(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, width)))


def _attend(head_width: int, *qkv: Tensor) -> Tensor:
    q, k, v = (rearrange(part, "b n (heads c) -> b heads n c", c=head_width) for part in qkv)
    return rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)")


def _normalized(pixels: Tensor) -> Tensor:
    """Colors (b, 3, ...) by ImageNet's mean and deviation."""
    mean, std = (pixels.new_tensor(values).view(3, *[1] * (pixels.ndim - 2)) for values in (_MEAN, _STD))
    return (pixels - mean) / std


def _positions(count: int, width: int) -> Tensor:
    """Sines and cosines of the number of each token, alternating, (count, width)."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()

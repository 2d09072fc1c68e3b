"""VideoMAE v2 (arXiv 2303.16727), whose features the content-debiased FVD (arXiv 2404.12391) compares: ViT-g, fine-tuned on Something-Something v2.

Written out here with the names of the public file `vit_g_hybrid_pt_1200e_ssv2_ft.pth`, so that it opens as it is: the names of transformers'
VideoMAE change from one of its versions to the next.
"""

from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from microcinema.utils.errors import UserError

SIZE, FRAMES, TUBELET, PATCH = 224, 16, 2, 14
HEAD_WIDTH = 88  # of ViT-g: 16 heads of 1408 channels
_EPS = 1e-6


class Attention(nn.Module):
    """Self-attention whose keys have no bias."""

    def __init__(self, width: int):
        super().__init__()
        self.q_bias, self.v_bias = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`b n c` to `b n c`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        qkv = F.linear(x, self.qkv.weight, bias)
        q, k, v = rearrange(qkv, "b n (k heads c) -> k b heads n c", k=3, c=HEAD_WIDTH)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b heads n c -> b n (heads c)"))


class Block(nn.Module):
    """A transformer block with norms before its parts."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, _EPS), nn.LayerNorm(width, _EPS)
        self.attn = Attention(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, hidden), "fc2": nn.Linear(hidden, width)})

    def forward(self, x: Tensor) -> Tensor:
        """`b n c` to `b n c`."""
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class VideoMAE(nn.Module):
    """The features of clips: the mean of all tokens after the last block, normalized."""

    positions: Tensor

    def __init__(self, width: int = 1408, hidden: int = 6144, depth: int = 40, classes: int = 174):
        super().__init__()
        kernel = TUBELET, PATCH, PATCH
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(3, width, kernel, stride=kernel)})
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(depth))
        self.fc_norm, self.head = nn.LayerNorm(width, _EPS), nn.Linear(width, classes)
        self.register_buffer(
            "positions", _positions((FRAMES // TUBELET) * (SIZE // PATCH) ** 2, width), persistent=False
        )

    def forward(self, video: Tensor) -> Tensor:
        """(b, 3, 16, 224, 224) in [-1, 1], as `PREPARATIONS` give, to (b, width); a UserError for another shape."""
        if video.shape[2:] != (FRAMES, SIZE, SIZE):
            found = "x".join(map(str, video.shape[2:]))
            raise UserError(f"clips are {found}; VideoMAE reads {FRAMES}x{SIZE}x{SIZE}: set protocol.num_frames=16")
        x = self.patch_embed["proj"]((video + 1) / 2)  # without the normalization of colors, as cd-fvd reads clips
        x = rearrange(x, "b c f h w -> b (f h w) c") + self.positions
        for block in self.blocks:
            x = block(x)
        return self.fc_norm(x.mean(dim=1))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> "VideoMAE":
        """Of the public file's content, or of a smaller one with the same names; a UserError if they do not match."""
        try:
            (hidden, width), classes = state["blocks.0.mlp.fc1.weight"].shape, len(state["head.weight"])
            depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
            network = cls(width, hidden, depth, classes)
            network.load_state_dict(dict(state))
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[-1].strip()
            raise UserError(
                f"not the weights of VideoMAE v2 ({reason}); give vit_g_hybrid_pt_1200e_ssv2_ft.pth"
            ) from None
        return network.eval().requires_grad_(False)


def _positions(count: int, width: int) -> Tensor:
    """Sines and cosines of the number of each token, alternating, (count, width)."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = torch.arange(count, dtype=torch.float64)[:, None] / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()

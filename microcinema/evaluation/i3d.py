"""I3D: Inception v1 inflated to three dimensions (Carreira and Zisserman, arXiv 1705.07750), trained on Kinetics-400.

Its logits are the features of the Fréchet video distance (arXiv 1812.01717). The names of its parameters are those of the files that the
field passes round: `rgb_imagenet.pt` of pytorch-i3d and `i3d_pretrained_400.pt` of VideoGPT.
"""

from collections.abc import Mapping, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microcinema.utils.errors import UserError

SIZE = 224
MIN_FRAMES = 10  # two frames have to be left of the clip where the last pooling looks at two

# Channels in, and out of [b0, b1a, b1b, b2a, b2b, b3b].
MIXED = {
    "Mixed_3b": (192, (64, 96, 128, 16, 32, 32)),
    "Mixed_3c": (256, (128, 128, 192, 32, 96, 64)),
    "Mixed_4b": (480, (192, 96, 208, 16, 48, 64)),
    "Mixed_4c": (512, (160, 112, 224, 24, 64, 64)),
    "Mixed_4d": (512, (128, 128, 256, 24, 64, 64)),
    "Mixed_4e": (512, (112, 144, 288, 32, 64, 64)),
    "Mixed_4f": (528, (256, 160, 320, 32, 128, 128)),
    "Mixed_5b": (832, (256, 160, 320, 32, 128, 128)),
    "Mixed_5c": (832, (384, 192, 384, 48, 128, 128)),
}


def pad_same(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Zeros around (b, c, f, h, w) as TensorFlow's padding `SAME` puts them: the odd one behind."""
    widths: list[int] = []
    for size, k, s in zip(reversed(x.shape[2:]), reversed(kernel), reversed(stride), strict=True):
        total = max(k - (size % s or s), 0)
        widths += [total // 2, total - total // 2]
    return F.pad(x, widths) if any(widths) else x


class Unit3d(nn.Module):
    """Convolution, batch norm, ReLU; with `bare`, the convolution alone and with a bias."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int, eps: float, bare: bool = False):
        super().__init__()
        self.kernel, self.stride = (kernel,) * 3, (stride,) * 3
        # At stride 1 `SAME` is the same on both sides, and the convolution pads for itself.
        padding = kernel // 2 if stride == 1 else 0
        self.conv3d = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=bare)
        self.bn = None if bare else nn.BatchNorm3d(out_channels, eps=eps, momentum=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, f, h, w) -> (b, c', f/stride, h/stride, w/stride)"""
        if self.stride != (1, 1, 1):
            x = pad_same(x, self.kernel, self.stride)
        x = self.conv3d(x)
        return x if self.bn is None else F.relu(self.bn(x), inplace=True)


class Mixed(nn.Module):
    """Four branches side by side: 1x1; 1x1 and 3x3; 1x1 and 3x3; pooling and 1x1."""

    def __init__(self, in_channels: int, widths: Sequence[int], eps: float):
        super().__init__()
        b0, b1a, b1b, b2a, b2b, b3b = widths
        self.b0 = Unit3d(in_channels, b0, 1, 1, eps)
        self.b1a, self.b1b = Unit3d(in_channels, b1a, 1, 1, eps), Unit3d(b1a, b1b, 3, 1, eps)
        self.b2a, self.b2b = Unit3d(in_channels, b2a, 1, 1, eps), Unit3d(b2a, b2b, 3, 1, eps)
        self.b3b = Unit3d(in_channels, b3b, 1, 1, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, f, h, w) -> (b, c', f, h, w)"""
        pooled = max_pool(x, (3, 3, 3), (1, 1, 1))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), self.b3b(pooled)], dim=1)


class I3D(nn.Module):
    """Logits of Kinetics-400, averaged over time, before the softmax. `eps` of the batch norms is 1e-3 in pytorch-i3d and TF-hub, 1e-5 in
    VideoGPT's file."""

    def __init__(self, eps: float = 1e-3):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit3d(3, 64, 7, 2, eps)
        self.Conv3d_2b_1x1 = Unit3d(64, 64, 1, 1, eps)
        self.Conv3d_2c_3x3 = Unit3d(64, 192, 3, 1, eps)
        for name, (in_channels, widths) in MIXED.items():
            self.add_module(name, Mixed(in_channels, widths, eps))
        self.logits = Unit3d(1024, 400, 1, 1, eps, bare=True)

    def forward(self, video: Tensor) -> Tensor:
        """(b, 3, f, 224, 224) in [-1, 1] -> (b, 400); a UserError for another size, or f below `MIN_FRAMES`."""
        frames, height, width = video.shape[2:]
        if (height, width) != (SIZE, SIZE) or frames < MIN_FRAMES:
            clips = f"{frames} frames of {height}x{width}"
            raise UserError(f"clips are {clips}; I3D reads {MIN_FRAMES} or more of {SIZE}x{SIZE}")
        x = max_pool(self.Conv3d_1a_7x7(video), (1, 3, 3), (1, 2, 2))
        x = max_pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name == "Mixed_4b":
                x = max_pool(x, (3, 3, 3), (2, 2, 2))
            if name == "Mixed_5b":
                x = max_pool(x, (2, 2, 2), (2, 2, 2))
            x = self.get_submodule(name)(x)
        x = self.logits(F.avg_pool3d(x, (2, 7, 7), stride=1))
        return x.mean(dim=(2, 3, 4))

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], eps: float = 1e-3) -> "I3D":
        """Of a published file's content, in evaluation mode; a UserError if names or shapes are not I3D's."""
        network = cls(eps)
        try:  # files from before PyTorch 0.4 lack num_batches_tracked, which is then not counted as missing
            names = network.load_state_dict(dict(state), strict=False)
        except RuntimeError as error:  # its last line names a weight and both shapes
            raise UserError(f"not the weights of I3D: {str(error).splitlines()[-1].strip()}") from None
        kinds = {"missing": names.missing_keys, "unknown": names.unexpected_keys}
        if any(kinds.values()):
            counts = [f"{len(keys)} {kind} ({', '.join(keys[:2]) or 'none'})" for kind, keys in kinds.items()]
            raise UserError(f"not the weights of I3D: {', '.join(counts)}")
        return network.eval().requires_grad_(False)


def max_pool(x: Tensor, kernel: Sequence[int], stride: Sequence[int]) -> Tensor:
    """Largest values of (b, c, f, h, w), padded `SAME`; for values >= 0, as after a ReLU, for which zeros are no padding at all.

    One axis after the other: the same values as `max_pool3d`'s, which looks at all 27 neighbours and takes a quarter of the network's time.
    """
    x = pad_same(x, kernel, stride)
    for axis, (k, s) in enumerate(zip(kernel, stride, strict=True), start=2):
        last = (x.shape[axis] - k) // s * s
        shifted = [x[(slice(None),) * axis + (slice(i, i + last + 1, s),)] for i in range(k)]
        x = reduce(torch.maximum, shifted)
    return x

"""Attention to keys and values that are computed once per clip, and the initialization that makes an added layer start as the identity.

Shapes: b clips, n queries, m keys, c channels of all heads side by side.
"""

from itertools import zip_longest
from typing import NamedTuple, TypeVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

_MAX_BATCH = 2**16 - 1
"""Of CUDA's flash and memory-efficient kernels, a limit of the grid: attention over frames has a sequence for each position of each clip."""
ModuleT = TypeVar("ModuleT", bound=nn.Module)


class KeyValue(NamedTuple):
    """Keys and values of one attention layer, which depend on neither noise nor time."""

    key: Tensor  # b m c
    value: Tensor  # b m c
    mask: Tensor | None = None  # bool b m, False where a key is padding


def attention(query: Tensor, key_value: KeyValue, heads: int) -> Tensor:
    """Scaled dot-product attention (arXiv 1706.03762) of queries `b n c` to keys and values of the same b clips; `b n c`."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=heads) for x in (query, key_value.key, key_value.value))
    mask = None if key_value.mask is None else rearrange(key_value.mask, "b m -> b 1 1 m")
    if len(q) <= _MAX_BATCH:
        out = functional.scaled_dot_product_attention(q, k, v, mask)
    else:
        parts = zip_longest(*(() if x is None else x.split(_MAX_BATCH) for x in (q, k, v, mask)))
        out = torch.cat([functional.scaled_dot_product_attention(*part) for part in parts])
    return rearrange(out, "b h n d -> b n (h d)")


def count_heads(width: int) -> int:
    """The largest number of heads that divides `width` and leaves each at least 32 channels."""
    return max(n for n in range(1, max(1, width // 32) + 1) if width % n == 0)


def zero_init(module: ModuleT) -> ModuleT:
    """Sets all parameters of a module to zero and returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module

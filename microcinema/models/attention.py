"""Attention to keys and values that are computed once per clip, and the initialization that makes an added layer start as the identity.

Shapes: b clips, n queries, m keys, c channels of all heads side by side.
"""

from typing import NamedTuple, TypeVar

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

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
    return rearrange(functional.scaled_dot_product_attention(q, k, v, attn_mask=mask), "b h n d -> b n (h d)")


def count_heads(width: int) -> int:
    """The largest number of heads that divides `width` and leaves each at least 32 channels."""
    return max(n for n in range(1, max(1, width // 32) + 1) if width % n == 0)


def zero_init(module: ModuleT) -> ModuleT:
    """Sets all parameters of a module to zero and returns it."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module

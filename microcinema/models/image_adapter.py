"""TextImageAdapter: the image encoder's tokens become a few tokens that the spatial cross-attention reads beside the text.

Factorized-Dreamer (arXiv 2408.10119) combines text and CLIP image embeddings in an adapter whose structure is not published; the
resampler and both ways of reading its tokens are our choice.

Shapes: b clips, n text tokens, p patch tokens, m image tokens, d text width, e width of the image encoder.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from microcinema.models.attention import KeyValue, attention, count_heads


class ResamplerBlock(nn.Module):
    """Tokens attend to a context and to themselves, then pass a feed-forward (perceiver resampler, arXiv 2204.14198)."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = count_heads(width)
        self.norm = nn.LayerNorm(width)
        self.context_norm = nn.LayerNorm(width)
        self.to_query = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward_in = nn.Linear(width, 4 * width)
        self.feed_forward_out = nn.Linear(4 * width, width)

    def forward(self, tokens: Tensor, context: Tensor) -> Tensor:
        """Maps tokens `b m d` to the same shape; `context` is `b n d`."""
        x = self.norm(tokens)
        key, value = self.to_kv(torch.cat([self.context_norm(context), x], dim=1)).chunk(2, dim=-1)
        tokens = tokens + self.to_out(attention(self.to_query(x), KeyValue(key, value), self.heads))
        return tokens + self.feed_forward_out(functional.gelu(self.feed_forward_in(self.feed_forward_norm(tokens))))


class TextImageAdapter(nn.Module):
    """Resamples text and patch tokens to a few image tokens.

    `decoupled`: every spatial cross-attention has separate keys and values for them (arXiv 2308.06721), whose result a
    zero-initialized gate adds to the text's. `concat`: they are appended to the text tokens and share their keys and values, so
    that the pretrained network sees them from the first step on.

    Args:
        image_width: of the image encoder's tokens.
        text_width: of the text tokens and of the result.
        widths: of the spatial cross-attentions, in the order of the layers; empty for `concat`.
        num_tokens: number of image tokens m.
    """

    def __init__(self, image_width: int, text_width: int, widths: Sequence[int], num_tokens: int):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_tokens, text_width) / text_width**0.5)
        self.image_in = nn.Linear(image_width, text_width)
        self.text_in = nn.Linear(text_width, text_width)
        self.blocks = nn.ModuleList(ResamplerBlock(text_width) for _ in range(2))
        self.norm_out = nn.LayerNorm(text_width)
        self.to_kv = nn.ModuleList(nn.Linear(text_width, 2 * width, bias=False) for width in widths)

    def tokens(self, text: Tensor, image: Tensor) -> Tensor:
        """Image tokens `b m d` of text tokens `b n d` and patch tokens `b p e`."""
        context = torch.cat([self.image_in(image), self.text_in(text)], dim=1)
        tokens = self.queries.expand(len(image), -1, -1)
        for block in self.blocks:
            tokens = block(tokens, context)
        return self.norm_out(tokens)

    def forward(self, text: Tensor, image: Tensor) -> tuple[KeyValue, ...] | Tensor:
        """Keys and values `b m c` of the image tokens for every spatial cross-attention; `concat`: the tokens, `b m d`."""
        tokens = self.tokens(text, image)
        if not self.to_kv:
            return tokens
        return tuple(KeyValue(*to_kv(tokens).chunk(2, dim=-1)) for to_kv in self.to_kv)

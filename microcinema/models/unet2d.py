"""The 2D UNet of Stable Diffusion as blocks to build on: all networks here are made of it.

Shapes: b clips, f frames, c channels of a layer, h w its spatial size, n text tokens, m image tokens, d text width,
e width of what is added to the time embedding.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch import Tensor, nn

from microcinema.models.attention import KeyValue, attention
from microcinema.models.weights import check_keys
from microcinema.utils.device import to_device
from microcinema.utils.errors import UserError

# The config keys of a UNet2DConditionModel that differ among Stable Diffusion 1.x, 2.x and XL; all others must have their defaults.
UNET2D_ARGUMENTS = [
    "sample_size",
    "in_channels",
    "out_channels",
    "flip_sin_to_cos",
    "freq_shift",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "downsample_padding",
    "act_fn",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "attention_head_dim",
    "use_linear_projection",
    "upcast_attention",
    "transformer_layers_per_block",
    "addition_embed_type",
    "addition_time_embed_dim",
    "projection_class_embeddings_input_dim",
]
SUPPORTED = {"addition_embed_type": ("text_time",)}
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Modules of a UNet2DConditionModel; each keeps its name. Those that begin with add_ are SDXL's.
ENCODER_MODULES = (
    *("conv_in", "time_proj", "time_embedding", "add_time_proj", "add_embedding"),
    *("down_blocks", "mid_block"),
)
MODULES = (*ENCODER_MODULES, "up_blocks", "conv_norm_out", "conv_act", "conv_out")
LayerFunction = Callable[[int, "HalvedResnetBlock2D", Transformer2DModel | None, Tensor], tuple[Tensor, Any]]


def unet2d_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of the networks built here, from a UNet2DConditionModel's config; refuses unsupported features."""
    defaults = {k: p.default for k, p in inspect.signature(UNet2DConditionModel.__init__).parameters.items()}
    for key, value in config.items():
        if key.startswith("_") or (key in UNET2D_ARGUMENTS and key != "addition_embed_type"):
            continue
        if key not in defaults or value not in (defaults[key], *SUPPORTED.get(key, ())):
            raise UserError(
                f"base UNet has {key}={value!r}, which is not supported; use a Stable Diffusion 1.x, 2.x or XL"
            )
    return {key: config[key] for key in UNET2D_ARGUMENTS if key in config}


def block_layers(block: Any) -> list[tuple[ResnetBlock2D, Transformer2DModel | None]]:
    """The layers of a block, in order."""
    return list(zip_longest(block.resnets, getattr(block, "attentions", ())))


def all_blocks(net: Any) -> list[Any]:
    """All blocks of a UNet2DConditionModel or of a network built from its blocks, in order."""
    return [*net.down_blocks, net.mid_block, *getattr(net, "up_blocks", ())]


def resamplers_of(block: Any) -> list[Any]:
    """The down- or upsampler of a block, if it has one."""
    return [module for name in ("downsamplers", "upsamplers") for module in getattr(block, name, None) or ()]


class LayerSpec(NamedTuple):
    """Size of a layer."""

    width: int  # channels of its output
    has_attention: bool  # whether it has a spatial transformer
    scale: int  # latent positions per position of the layer, in each direction


def layer_specs(net: Any) -> list[LayerSpec]:
    """All layers, in order, of a UNet2DConditionModel or of a network built from its blocks."""
    specs, scale = [], 1
    for block in all_blocks(net):
        for resnet, transformer in block_layers(block):
            specs.append(LayerSpec(resnet.out_channels, transformer is not None, scale))
        if getattr(block, "downsamplers", None):
            scale *= 2
        elif getattr(block, "upsamplers", None):
            scale //= 2
    return specs


class TextImageContext(NamedTuple):
    """Context of a spatial cross-attention that reads an adapter's image tokens beside the text."""

    text: Tensor  # b n d
    image: KeyValue  # b m c
    gate: Tensor  # (c,), factor of each channel of the attention to the image


class SharedTextProcessor:
    """Attention processor for frames that share one text: keys and values are computed once per clip, not per frame.

    The queries `(b f) q c` of a clip's frames become one sequence `b (f q) c`, which does not change the result, since cross-attention
    treats every query by itself. With a TextImageContext the queries also attend to the image, and the gated result is added
    (decoupled cross-attention, arXiv 2308.06721, equation 5). Without a context it is the self-attention of every frame, without the
    divisions by one of diffusers' processor. With `xformers` its memory-efficient attention replaces torch's.
    """

    def __init__(self, xformers: bool = False):
        self.xformers = xformers

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | TextImageContext | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        text = context.text if isinstance(context, TextImageContext) else context
        frames = len(hidden_states) // len(text)
        query = rearrange(attn.to_q(hidden_states), "(b f) n c -> b (f n) c", f=frames)
        out = self._attention(query, KeyValue(attn.to_k(text), attn.to_v(text), attention_mask), attn.heads)
        if isinstance(context, TextImageContext):
            out = out + context.gate * self._attention(query, context.image, attn.heads)
        out = rearrange(out, "b (f n) c -> (b f) n c", f=frames)
        return attn.to_out[1](attn.to_out[0](out))  # projection, dropout

    def _attention(self, query: Tensor, key_value: KeyValue, heads: int) -> Tensor:
        if not self.xformers:
            return attention(query, key_value, heads)
        from xformers.ops import memory_efficient_attention

        q, k, v = (rearrange(x, "b n (h d) -> b n h d", h=heads) for x in (query, key_value.key, key_value.value))
        return rearrange(memory_efficient_attention(q, k, v, attn_bias=key_value.mask), "b n h d -> b n (h d)")


class SharedTextAttention(Attention):
    """An attention of diffusers that keeps its `SharedTextProcessor` when xformers is switched on or off."""

    def set_use_memory_efficient_attention_xformers(
        self, use_memory_efficient_attention_xformers: bool, attention_op: Any = None
    ) -> None:
        """As in diffusers, whose checks this calls."""
        super().set_use_memory_efficient_attention_xformers(use_memory_efficient_attention_xformers, attention_op)
        self.set_processor(SharedTextProcessor(use_memory_efficient_attention_xformers))


def share_tokens(module: nn.Module) -> None:
    """Lets the cross-attentions of a module of diffusers share their tokens among the frames of a clip."""
    for child in module.modules():
        if isinstance(child, Attention):
            child.__class__ = SharedTextAttention  # diffusers builds the blocks; this class has no parameters
            child.set_processor(SharedTextProcessor())


class HalvedResnetBlock2D(ResnetBlock2D):
    """A ResNet block of diffusers whose forward runs a temporal convolution after each of its two convolutions.

    diffusers builds the blocks, and this class, which has no parameters, replaces theirs. Without temporal convolutions it is its own
    forward, but that all layers share the SiLU of the time embedding, and that it does not divide by the `output_scale_factor`, which is 1.
    """

    def forward(  # type: ignore[override]
        self,
        h: Tensor,
        emb: Tensor,
        frames: int = 1,
        first: nn.Module | None = None,
        second: nn.Module | None = None,
        scale_shift: Tensor | None = None,
    ) -> Tensor:
        """Maps `n c h w` to `n c' h w`, with the SiLU of time embeddings, `n d`.

        Args:
            frames, first, second, scale_shift: the temporal convolutions and their arguments; modules, since functions of a layer's number
                would be compiled for each layer.
        """
        x = self.conv1(self.nonlinearity(self.norm1(h)))
        x = (first(x, frames) if first else x) + self.time_emb_proj(emb)[:, :, None, None]
        x = self.conv2(self.dropout(self.nonlinearity(self.norm2(x))))
        x = second(x, frames, scale_shift) if second else x
        return x + (h if self.conv_shortcut is None else self.conv_shortcut(h))


def spatial_transformer(module: Transformer2DModel, h: Tensor, text: Tensor | TextImageContext) -> Tensor:
    """Runs a spatial transformer of the base on `(b f) c h w`, with text tokens `b n d` shared by the frames of a clip.

    This is its own forward without the forced return to the contiguous layout (a copy per call) and without its inner
    checkpointing, which would recompute again what the layer's checkpoint recomputes.
    """
    x, linear = module.norm(h), module.use_linear_projection
    tokens = rearrange(x if linear else module.proj_in(x), "n c h w -> n (h w) c")
    tokens = module.proj_in(tokens) if linear else tokens
    for block in module.transformer_blocks:
        tokens = block(tokens, encoder_hidden_states=text)
    x = rearrange(module.proj_out(tokens) if linear else tokens, "n (h w) c -> n c h w", h=h.shape[-2])
    return h + (x if linear else module.proj_out(x))


@dataclass
class StepCache:
    """Deep features that denoising steps take over from an earlier one (DeepCache, arXiv 2312.00858).

    A network that finds them runs its layers of the first resolution alone, spatial and temporal; otherwise it runs all, and leaves here
    what enters the last block of its decoder.
    """

    features: Tensor | None = None  # n c h w

    def holds(self, h: Tensor) -> bool:
        """Whether there are features for the frames of `h`, `n ...`: its own, or those of more terms of guidance, of which it is the last."""
        return self.features is not None and len(self.features) >= len(h)


class UNet2DBackbone(nn.Module):
    """Base class of the networks that are built from a 2D UNet's modules, which keep their names.

    A *layer* is a ResNet block and the spatial transformer after it, if there is one. Layers are numbered from the
    first down layer through the mid block (two layers: it begins and ends with a ResNet block) to the last up layer.
    """

    new_prefixes: tuple[str, ...] = ()  # of the parameters that a 2D UNet does not have

    if TYPE_CHECKING:  # modules, which torch declares as tensors or modules

        def __getattr__(self, name: str) -> Any: ...

    def _build_unet2d(self, config: dict[str, Any], modules: Iterable[str] = MODULES) -> None:
        """Builds the 2D UNet of a config (keys that it does not have are ignored) and takes over the named modules."""
        for key, supported in BLOCK_TYPES.items():
            for block_type in config[key]:
                if block_type not in supported:
                    raise UserError(f"base UNet has '{block_type}' in {key}; supported are {', '.join(supported)}")
        base = UNet2DConditionModel(**{key: config[key] for key in UNET2D_ARGUMENTS if key in config})
        for name in modules:
            if hasattr(base, name):
                setattr(self, name, getattr(base, name))
        for module in self.modules():
            if isinstance(module, ResnetBlock2D):
                module.__class__ = HalvedResnetBlock2D
        share_tokens(self)
        self.gradient_checkpointing, self.checkpoints_first_level_alone = False, False

    def split_text(self, text: Tensor, height: int, width: int) -> tuple[Tensor, Tensor | None]:
        """Text tokens `b n d`, and what is added to the time embedding, `b e`, of text for frames of a height and width in pixels.

        Without `add_embedding` the second is None. SDXL's text, `b n+1 d`, has the pooled text as its last row, padded with zeros; sinusoids
        of the original size, the crop's top left and the target size follow it in e (arXiv 2307.01952, section 2.2). A clip stands for one
        that was made at its size.
        """
        if not hasattr(self, "add_embedding"):
            return text, None
        sizes = to_device(torch.tensor([height, width, 0, 0, height, width]), text.device)
        embedded = self.add_time_proj(sizes).to(text.dtype).flatten().expand(len(text), -1)
        pooled = text[:, -1, : self.add_embedding.linear_1.in_features - embedded.shape[1]]
        return text[:, :-1], torch.cat([pooled, embedded], dim=1)

    def embed_time(self, t: Tensor | float, z: Tensor, added: Tensor | None = None) -> Tensor:
        """Time embedding, one row per clip, of a diffusion time, a number or `(b,)`, for latents `b ...` and in their dtype.

        Not in that of the weights: with diffusers' layerwise casting they are stored in eight bits until they are used.
        `added`, `b e`, is of `split_text`.
        """
        # A number is filled in on the device: a copy from the host would wait for the device.
        t = (t if isinstance(t, Tensor) else torch.full((), t, device=z.device)).to(z.device).expand(len(z))
        emb = self.time_embedding(self.time_proj(t).to(z.dtype))
        return emb if added is None else emb + self.add_embedding(added.to(z.dtype))

    def run_blocks(
        self,
        h: Tensor,
        layer: LayerFunction,
        after_resampling: Callable[[int, Tensor], Tensor] | None = None,
        cache: StepCache | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Runs all blocks on `h`, the output of `conv_in`; returns the last features, and what the layers that ran return beside them.

        Args:
            layer: `layer(number, resnet, transformer, h)` runs one layer, under a checkpoint if gradient checkpointing is on for it, and
                returns its features and anything else; skip connections and changes of resolution are those of the 2D UNet.
            after_resampling: function of the features after the down- or upsampler of a number, from 0.
            cache: of deep features; a network of one resolution has none.
        """
        down, up = list(self.down_blocks), list(getattr(self, "up_blocks", ()))
        cache = cache if len(down) > 1 else None
        is_shallow, last = cache is not None and cache.holds(h), len(down) + len(up)

        def run(number: int, resnet: Any, transformer: Transformer2DModel | None, *inputs: Tensor) -> Any:
            return layer(number, resnet, transformer, torch.cat(inputs, dim=1) if len(inputs) > 1 else inputs[0])

        def step(block: int, *arguments: Any) -> Any:
            # The first level, at the full resolution, is the first block and the last of a decoder.
            checkpointed = not self.checkpoints_first_level_alone or block in (0, 2 * len(down))
            if self.gradient_checkpointing and checkpointed and torch.is_grad_enabled():
                return self._gradient_checkpointing_func(run, *arguments)
            return run(*arguments)

        number, resampling, skips, others = 0, 0, [h], []
        for i, block in enumerate((*down, self.mid_block, *up)):
            if cache is not None and up and i == last:
                if is_shallow:
                    h = cache.features[-len(h) :]  # type: ignore[index]
                else:
                    cache.features = h
            elif is_shallow and i > 0:
                number += len(block.resnets)
                continue
            for resnet, transformer in block_layers(block):
                h, other = step(i, number, resnet, transformer, h, *([skips.pop()] if i > len(down) else ()))
                others.append(other)
                if i < len(down):
                    skips.append(h)
                number += 1
            for resampler in () if is_shallow else resamplers_of(block):
                h = resampler(h)
                h = after_resampling(resampling, h) if after_resampling else h
                resampling += 1
                if i < len(down):
                    skips.append(h)
        return h, others

    def load_unet2d(self, unet: UNet2DConditionModel) -> None:
        """Copies the weights of a 2D UNet; a key of a module here that is missing or unexpected is a UserError."""
        unused = tuple(f"{name}." for name in MODULES if not hasattr(self, name))
        state = {key: value for key, value in unet.state_dict().items() if not key.startswith(unused)}
        missing, unexpected = self.load_state_dict(state, strict=False)
        check_keys([key for key in missing if not key.startswith(self.new_prefixes)], unexpected, "the base UNet")

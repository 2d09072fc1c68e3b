"""The 2D UNet of Stable Diffusion as parts to build on: VideoUNet and AppearanceNet are both made of it."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from typing import Any, ClassVar, NamedTuple

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from einops import rearrange
from torch import Tensor

from microcinema.models.temporal import KeyValue, attend
from microcinema.utils.errors import UserError, first_line

# What of a UNet2DConditionModel's config may vary: all that Stable Diffusion 1.x and 2.x vary.
# The rest must stand at its default.
UNET2D_ARGUMENTS = (
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
)
BLOCK_TYPES = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
# Parts of a UNet2DConditionModel; each keeps its name.
PARTS = (
    "conv_in",
    "time_proj",
    "time_embedding",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_act",
    "conv_out",
)

LayerFunction = Callable[[int, ResnetBlock2D, Transformer2DModel | None, Tensor], Tensor]


def unet2d_arguments(config: dict[str, Any]) -> dict[str, Any]:
    """Picks the constructor arguments from a UNet2DConditionModel's config.

    Raises:
        UserError: the config asks for a feature that the video model does not have (the key and its value are named).
    """
    defaults = {k: p.default for k, p in inspect.signature(UNet2DConditionModel.__init__).parameters.items()}
    for key, value in config.items():
        if key.startswith("_") or key in UNET2D_ARGUMENTS:
            continue
        if key not in defaults or value != defaults[key]:
            raise UserError(
                f"base UNet has {key}={value!r}, which is not supported; use a Stable Diffusion 1.x or 2.x UNet"
            )
    return {key: config[key] for key in UNET2D_ARGUMENTS if key in config}


class LayerSpec(NamedTuple):
    """Where a layer stands.

    Attributes:
        width: channels of its output.
        attends: whether it has a spatial transformer.
        scale: places of the latent grid per place of the layer, in each direction.
    """

    width: int
    attends: bool
    scale: int


def layer_specs(net: Any) -> list[LayerSpec]:
    """Shapes of all layers, in the order of their numbers, of a UNet2DConditionModel or of a network of its parts."""
    shapes: list[LayerSpec] = []
    scale = 1

    def add(block: Any) -> None:
        for resnet, transformer in UNet2DBackbone.block_layers(block):
            shapes.append(LayerSpec(resnet.out_channels, transformer is not None, scale))

    for block in net.down_blocks:
        add(block)
        scale *= 2 if block.downsamplers else 1
    add(net.mid_block)
    for block in net.up_blocks:
        add(block)
        scale //= 2 if block.upsamplers else 1
    return shapes


class TextImageContext(NamedTuple):
    """What a spatial cross-attention reads if an adapter is on.

    Attributes:
        text: text tokens `b m d`.
        image: keys and values of the image tokens.
        gate: factor of each channel of their result, `(c,)`.
    """

    text: Tensor
    image: KeyValue
    gate: Tensor


class ClipCrossAttention:
    """Attention processor for frames that share one text: keys and values are computed once per clip, not per frame.

    `hidden_states` is `(b f) n d`, `encoder_hidden_states` is `b m d` or TextImageContext; the queries of a clip's frames are
    one long sequence `b (f n) d`, which changes nothing in the result, since cross-attention treats every query alone.
    With an image the same queries also attend to its keys, and the gated result is added (arXiv 2308.06721, equation 5).
    Returns `(b f) n d`.

    Args:
        xformers: compute with xformers' memory-efficient attention instead of torch's scaled-dot-product attention.
    """

    def __init__(self, xformers: bool = False):
        self.xformers = xformers

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | TextImageContext,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        given = encoder_hidden_states
        text = given.text if isinstance(given, TextImageContext) else given
        frames = len(hidden_states) // len(text)
        query = rearrange(attn.to_q(hidden_states), "(b f) n c -> b (f n) c", f=frames)
        out = self._attend(query, KeyValue(attn.to_k(text), attn.to_v(text), attention_mask), attn.heads)
        if isinstance(given, TextImageContext):
            out = out + given.gate * self._attend(query, given.image, attn.heads)
        out = rearrange(out, "b (f n) c -> (b f) n c", f=frames)
        for layer in attn.to_out:  # projection, dropout
            out = layer(out)
        return out

    def _attend(self, query: Tensor, to: KeyValue, heads: int) -> Tensor:
        if not self.xformers:
            return attend(query, to, heads)
        from xformers.ops import memory_efficient_attention

        # It wants the heads behind the tokens.
        q, k, v = (rearrange(x, "b n (h d) -> b n h d", h=heads) for x in (query, to.key, to.value))
        return rearrange(memory_efficient_attention(q, k, v, attn_bias=to.mask), "b n h d -> b n (h d)")


class ClipAttention(Attention):
    """A cross-attention of diffusers that stays with `ClipCrossAttention` when xformers is turned on or off."""

    def set_use_memory_efficient_attention_xformers(
        self, use_memory_efficient_attention_xformers: bool, attention_op: Any = None
    ) -> None:
        """As diffusers' own, which this calls for its checks."""
        super().set_use_memory_efficient_attention_xformers(use_memory_efficient_attention_xformers, attention_op)
        self.set_processor(ClipCrossAttention(use_memory_efficient_attention_xformers))


def spatial_transformer(module: Transformer2DModel, h: Tensor, text: Tensor | TextImageContext) -> Tensor:
    """Runs one of the base's spatial transformers.

    This is its own forward without the forced return to the contiguous layout (a copy per call) and without its inner
    checkpointing, which would recompute twice what the layer's checkpoint recomputes anyway.

    Args:
        h: `(b f) c h w`.
        text: `b n d`, with or without an image beside it.
    """
    height = h.shape[-2]
    x = module.norm(h)
    if module.use_linear_projection:
        tokens = module.proj_in(rearrange(x, "n c h w -> n (h w) c"))
    else:
        tokens = rearrange(module.proj_in(x), "n c h w -> n (h w) c")
    for block in module.transformer_blocks:
        tokens = block(tokens, encoder_hidden_states=text)
    if module.use_linear_projection:
        x = rearrange(module.proj_out(tokens), "n (h w) c -> n c h w", h=height)
    else:
        x = module.proj_out(rearrange(tokens, "n (h w) c -> n c h w", h=height))
    return h + x


class UNet2DBackbone(ModelMixin, ConfigMixin):
    """Base of the networks that are built from a 2D UNet's parts under their own names.

    A *layer* is a ResNet block and the spatial transformer behind it, if there is one. Layers are numbered from the
    first down layer through the mid block (two: it begins and ends with a ResNet block) to the last up layer.
    """

    # Prefixes of parameters that a 2D UNet does not have, and of those that it has and this network has not.
    added: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar = ["BasicTransformerBlock", "ResnetBlock2D"]
    _skip_layerwise_casting_patterns: ClassVar = ["norm"]

    def _build(self, arguments: dict[str, Any], parts: Iterable[str] = PARTS) -> None:
        """Builds the 2D UNet of these arguments (others are left aside) and takes over the named parts."""
        for key, known in BLOCK_TYPES.items():
            for block_type in arguments[key]:
                if block_type not in known:
                    raise UserError(f"base UNet has '{block_type}' in {key}; supported are {', '.join(known)}")
        base = UNet2DConditionModel(**{key: arguments[key] for key in UNET2D_ARGUMENTS if key in arguments})
        for name in parts:
            setattr(self, name, getattr(base, name))
        for module in self.modules():
            if isinstance(module, Attention) and module.is_cross_attention:
                module.__class__ = ClipAttention  # diffusers builds the blocks; this class adds nothing that is stored
                module.set_processor(ClipCrossAttention())
        self.gradient_checkpointing = False

    def blocks(self) -> tuple[list[Any], list[Any], list[Any]]:
        """The down, mid and up blocks that this network has."""
        return list(self.down_blocks), [self.mid_block], list(getattr(self, "up_blocks", ()))

    @staticmethod
    def block_layers(block: Any) -> list[tuple[ResnetBlock2D, Transformer2DModel | None]]:
        """The block's layers, in the order in which they run."""
        return list(zip_longest(block.resnets, getattr(block, "attentions", ())))

    def layers(self) -> list[tuple[ResnetBlock2D, Transformer2DModel | None]]:
        """All layers in the order of their numbers."""
        return [layer for blocks in self.blocks() for block in blocks for layer in self.block_layers(block)]

    def embed_time(self, t: Tensor | float, b: int, device: torch.device) -> Tensor:
        """Time embedding `b d`, on the device, of a diffusion time that is a number or a tensor `(b,)`."""
        t = torch.as_tensor(t, device=device).expand(b)
        return self.time_embedding(self.time_proj(t).to(self.time_embedding.linear_1.weight.dtype))

    def walk(self, h: Tensor, layer: LayerFunction) -> Iterator[Tensor]:
        """Runs all blocks on `h`, the output of `conv_in`; yields every layer's output, last the output of the blocks.

        `layer(number, resnet, transformer, h)` runs one layer, under a checkpoint if gradient checkpointing is on; skip
        connections and changes of resolution are the 2D UNet's.
        """
        down, mid, up = self.blocks()

        def run(number: int, resnet: ResnetBlock2D, transformer: Transformer2DModel | None, *parts: Tensor) -> Tensor:
            return layer(number, resnet, transformer, torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])

        def step(*arguments: Any) -> Tensor:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                return self._gradient_checkpointing_func(run, *arguments)
            return run(*arguments)

        number = 0
        skips = [h]
        for block in down:
            for resnet, transformer in self.block_layers(block):
                h = step(number, resnet, transformer, h)
                yield h
                skips.append(h)
                number += 1
            for downsampler in block.downsamplers or ():
                h = downsampler(h)
                skips.append(h)
        for block in mid:
            for resnet, transformer in self.block_layers(block):
                h = step(number, resnet, transformer, h)
                yield h
                number += 1
        for block in up:
            for resnet, transformer in self.block_layers(block):
                h = step(number, resnet, transformer, h, skips.pop())
                yield h
                number += 1
            for upsampler in block.upsamplers or ():
                h = upsampler(h)

    def load_unet2d(self, unet: UNet2DConditionModel) -> None:
        """Copies the weights of a 2D UNet, key for key.

        Raises:
            UserError: a key is missing or unexpected beyond what this network adds and drops; all of them are named.
        """
        state = {k: v for k, v in unet.state_dict().items() if not k.startswith(self.dropped or "\0")}
        missing, unexpected = self.load_state_dict(state, strict=False)
        missing = [key for key in missing if not key.startswith(self.added)]
        check_keys(missing, unexpected, "the base UNet")

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers' own, but a key too many or too few is an error and not a warning.

        Raises:
            UserError: nothing can be read there, or the keys do not agree with the network.
        """
        return load_checked(super().from_pretrained, pretrained_model_name_or_path, **kwargs)


def load_checked(from_pretrained: Callable[..., Any], path: Any, **kwargs: Any) -> Any:
    """Calls diffusers' `from_pretrained` and refuses a checkpoint whose keys are not exactly the network's."""
    loading_info = kwargs.pop("output_loading_info", False)
    try:
        model, info = from_pretrained(path, output_loading_info=True, **kwargs)
    except (OSError, ValueError, RuntimeError) as error:
        raise unreadable(path, error) from error
    check_keys(info["missing_keys"], info["unexpected_keys"], f"'{path}'")
    return (model, info) if loading_info else model


def unreadable(path: Any, error: Exception) -> UserError:
    """The error that tells of a folder from which no network can be loaded."""
    return UserError(
        f"cannot load a network from '{path}' ({first_line(error)}); give a folder written by save_pretrained"
    )


def check_keys(missing: Iterable[str], unexpected: Iterable[str], source: str) -> None:
    """Raises a UserError that names all missing and unexpected keys, if there are any."""
    problems = [
        f"{kind} keys: {', '.join(sorted(keys))}"
        for kind, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise UserError(f"the weights of {source} do not fit the network; {'; '.join(problems)}")

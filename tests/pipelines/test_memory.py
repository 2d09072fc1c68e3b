"""Memory settings: the same frames within a stated tolerance, and less memory where that is what a setting is for."""

import sys
import types

import accelerate
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.hooks.group_offloading import ModuleGroup
from diffusers.models.attention_processor import Attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from fixtures import tiny, tiny_sampling
from fixtures.tiny_sampling import PROMPTS, sample
from microcinema.config.sampling import MemorySettings
from microcinema.models.unet2d import SharedTextProcessor
from microcinema.models.vae import decode_latents, decoding_bytes, images_at_once
from microcinema.pipelines import memory
from microcinema.profiling.memory_estimate import Estimate, group_offload_memory
from microcinema.profiling.memory_tracker import LiveMemory
from microcinema.utils.errors import UserError

NO_GPU = not torch.cuda.is_available()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.base_folder(tmp_path_factory.mktemp("base"))


@pytest.fixture
def pipeline(base):
    return tiny.video_pipeline(base)


@pytest.fixture(scope="module")
def image():
    return tiny_sampling.image()


def frames(pipeline, image, **arguments):
    """Of two videos, which guidance makes four: every part has a batch to cut up."""
    return sample(pipeline, PROMPTS, image, seeds=(0, 1), **arguments)


def networks(pipeline):
    return {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}


# ---------------------------------------------------------------- the same frames
# Frames are in [0, 1]; those of the tiny random models have a standard deviation of 0.14.


@pytest.mark.parametrize(
    ("settings", "arguments", "largest", "mean"),
    [
        ({}, {}, 0.0, 0.0),
        ({"vae_slicing": True}, {}, 1e-4, 1e-5),
        ({"vae_tiling": True}, {}, 0.0, 0.0),  # no frame here is larger than those that the VAE was trained with
        ({}, {"decode_chunk_size": 1}, 1e-4, 1e-5),
        ({}, {"decode_chunk_size": 3}, 1e-4, 1e-5),
        ({"torch_dtype": "bfloat16"}, {}, 0.15, 0.015),
        ({"torch_dtype": "float16"}, {}, 0.03, 0.004),
    ],
)
def test_frames_are_the_same(pipeline, image, settings, arguments, largest, mean):
    wanted = frames(pipeline, image)
    memory.apply(pipeline, MemorySettings(**settings), "cpu")
    assert {network.dtype for network in networks(pipeline).values()} == {
        getattr(torch, MemorySettings(**settings).torch_dtype)
    }
    error = np.abs(frames(pipeline, image, **arguments) - wanted)
    assert error.max() <= largest
    assert error.mean() <= mean


def test_attention_is_plain_attention(pipeline, image, monkeypatch):
    wanted = frames(pipeline, image)
    calls = []

    def plain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        calls.append(tuple(query.shape))
        weights = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(weights.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None:
            weights = (
                weights.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else weights + attn_mask
            )
        return weights.softmax(dim=-1) @ value

    monkeypatch.setattr(functional, "scaled_dot_product_attention", plain)
    assert np.abs(frames(pipeline, image) - wanted).max() < 1e-4
    assert calls


# ---------------------------------------------------------------- offloading


def test_model_offload_leaves_the_device_to_the_network_that_runs(base, image, monkeypatch):
    """Without an accelerator nothing is moved, but every hook is run that would move it: they say which networks would be there."""
    pipeline = tiny.video_pipeline(base)
    wanted = frames(pipeline, image)
    names = {id(part): name for name, part in networks(pipeline).items()}
    there, seen = set(), []
    before_forward, leave = CpuOffload.pre_forward, CpuOffload.init_hook

    def arrive(hook, module, *args, **kwargs):
        if hook.prev_module_hook is not None:
            there.discard(names[id(hook.prev_module_hook.model)])
        there.add(names[id(module)])
        seen.append((names[id(module)], set(there)))
        return before_forward(hook, module, *args, **kwargs)

    monkeypatch.setattr(CpuOffload, "pre_forward", arrive)
    monkeypatch.setattr(
        CpuOffload, "init_hook", lambda hook, module: (there.discard(names[id(module)]), leave(hook, module))[1]
    )
    pipeline.enable_model_cpu_offload(device="cpu")
    assert np.abs(frames(pipeline, image) - wanted).max() < 1e-4
    assert [name for name, _ in seen] == [
        "text_encoder",
        "text_encoder",
        "vae",
        "unet",
        "unet",
        "unet",
        "vae",
    ]
    # Only the text encoder, which is small, stays until the key frame is encoded too.
    assert [present for name, present in seen if present != {name}] == [{"text_encoder", "vae"}]
    assert not there


def test_sequential_offload_brings_one_layer_at_a_time(pipeline, image):
    wanted = frames(pipeline, image)
    whole = sum(p.numel() for part in networks(pipeline).values() for p in part.parameters())
    # As diffusers' enable_sequential_cpu_offload does, which names the device cpu:0 here; accelerate cannot go there and back.
    for part in networks(pipeline).values():
        accelerate.cpu_offload(part, torch.device("cpu"), offload_buffers=len(part._parameters) > 0)
    assert {part.device for part in networks(pipeline).values()} == {torch.device("meta")}
    present = []

    def look(*_):
        parameters = (p for part in networks(pipeline).values() for p in part.parameters())
        present.append(sum(p.numel() for p in parameters if p.device.type != "meta"))

    # A layer with weights of its own, seen from within.
    layer = next(iter(pipeline.unet.temporal_transformers.values()))
    layer.norm.register_forward_pre_hook(look)
    assert np.array_equal(frames(pipeline, image), wanted)
    assert set(present) == {layer.positions.numel()}
    assert present[0] < whole / 10


class Poisoned:
    """Group offloading where layers that wait have no numbers: what is used before it is fetched shows in the frames.

    Attributes:
        most: bytes of the layers that were there at once.
    """

    def __init__(self, monkeypatch):
        self.stored, self.there, self.most = {}, {}, 0
        monkeypatch.setattr(ModuleGroup, "_onload_from_memory", lambda group: self.fetch(group))
        monkeypatch.setattr(ModuleGroup, "_offload_to_memory", lambda group: self.leave(group))

    def tensors(self, group):
        for module in group.modules:
            yield from (*module.parameters(), *module.buffers())
        yield from (*group.parameters, *group.buffers)

    def leave(self, group):
        for tensor in self.tensors(group):
            self.stored.setdefault(tensor, tensor.data)
            tensor.data = torch.full_like(tensor.data, torch.nan if tensor.is_floating_point() else 77)
        self.there.pop(group, None)

    def fetch(self, group):
        for tensor in self.tensors(group):
            tensor.data = self.stored[tensor]
        self.there[group] = sum(tensor.nbytes for tensor in self.tensors(group))
        self.most = max(self.most, sum(self.there.values()))


EVERY_PART = ("model.adapter={mode: decoupled, num_tokens: 3}", "model.pixels={block: transformer, scales: null}")


@pytest.mark.parametrize(
    "model, changes, quantization",
    [("microcinema", EVERY_PART, "int8"), ("microcinema_once", (), None), ("factorized_dreamer", (), None)],
)
def test_group_offload_brings_every_layer_when_it_is_used(base, image, monkeypatch, model, changes, quantization):
    settings = {"height": tiny.SIZE, "width": tiny.SIZE}
    pipeline = tiny.video_pipeline(base, model=model, changes=changes)
    memory.apply(pipeline, MemorySettings(quantization=quantization), "cpu")
    wanted, poisoned = frames(pipeline, image, **settings), Poisoned(monkeypatch)
    memory.group_offload(pipeline, torch.device("cpu"))
    whole, gates = sum(p.nbytes for net in networks(pipeline).values() for p in net.parameters()), 0
    if (gates := dict(pipeline.unet.image_gates)) and changes:
        assert len(poisoned.there) == 1  # parameters that no layer of their own fetches stay
        assert sum(poisoned.there.values()) == sum(gate.nbytes for gate in gates.values())
    assert np.array_equal(frames(pipeline, image, **settings), wanted)
    estimate = group_offload_memory(Estimate(whole, {"denoising": whole + 7}), pipeline)
    assert poisoned.most <= estimate.weights + sum(gate.nbytes for gate in gates.values()) < whole / 4
    assert estimate.phases == {"denoising": estimate.weights + 7}


def test_group_offload_is_told_how(pipeline, monkeypatch):
    told = []
    monkeypatch.setattr(
        type(pipeline), "enable_group_offload", lambda self, *args, **kwargs: told.append((args, kwargs))
    )
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *args, **kwargs: module)
    for device, use_stream in (("cuda", True), ("mps", False)):
        memory.apply(pipeline, MemorySettings(offload="group"), device)
        assert told.pop() == ((torch.device(device),), {"offload_type": "leaf_level", "use_stream": use_stream})


# ---------------------------------------------------------------- less memory


def decode(pipeline, side, **arguments):
    """Bytes alive at most while 6 frames are decoded, beyond the result's own."""
    z = torch.zeros(1, 6, tiny.LATENT_CHANNELS, side, side)
    with LiveMemory() as live:
        pixels = pipeline.decode_latents(z, **arguments)
        return live.peak - pixels.nbytes


@torch.no_grad()
def test_the_vae_in_parts_takes_less_memory(base):
    pipeline = tiny.video_pipeline(base)
    whole = decode(pipeline, 16)
    assert decode(pipeline, 16, chunk_size=3) < 0.65 * whole
    assert decode(pipeline, 16, chunk_size=1) < 0.35 * whole
    memory.apply(pipeline, MemorySettings(vae_slicing=True), "cpu")
    sliced = decode(pipeline, 16)
    assert sliced < 0.35 * whole
    memory.apply(pipeline, MemorySettings(vae_tiling=True), "cpu")
    assert decode(pipeline, 16) < 0.6 * sliced


def test_fewer_frames_are_decoded_at_once_where_there_is_no_memory_for_more():
    class OutOfMemory:
        dtype, config, limit = torch.float32, {"scaling_factor": 1.0}, 2

        def decode(self, chunk):
            chunks.append(len(chunk))
            if len(chunk) > self.limit:
                raise torch.OutOfMemoryError
            return types.SimpleNamespace(sample=2 * chunk)

    z, vae, chunks = torch.randn(1, 7, 4, 2, 2), OutOfMemory(), []
    assert torch.equal(decode_latents(vae, z), 2 * z)
    assert chunks == [7, 4, 2, 2, 2, 1]
    vae.limit = 0
    with pytest.raises(torch.OutOfMemoryError):
        decode_latents(vae, z)


@torch.no_grad()
@pytest.mark.parametrize("make", [AutoencoderKL, AutoencoderTiny])
def test_the_memory_of_a_decoded_frame_is_known_beforehand(make, monkeypatch):
    widths = (32, 64, 64)
    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    if make is AutoencoderKL:
        vae = make(block_out_channels=widths, norm_num_groups=8, layers_per_block=2, **kinds)
    else:
        blocks = {f"{part}_block_out_channels": (64, 64, 64) for part in ("encoder", "decoder")}
        vae = make(**blocks, num_encoder_blocks=(1, 3, 3), num_decoder_blocks=(3, 3, 1))
    images = torch.zeros(6, 4, 16, 16)
    with LiveMemory() as live:
        decode_latents(vae, images)
    estimate = decoding_bytes(vae, images)
    assert 0.6 * estimate < live.peak / 6 < estimate
    assert images_at_once(vae, images) == 6  # on a CPU
    free = {"mem_get_info": (estimate, 0), "memory_reserved": 3 * estimate, "memory_allocated": estimate // 2}
    for name, value in free.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    with FakeTensorMode():
        images = torch.empty(6, 4, 16, 16, device="cuda")
    assert images_at_once(vae, images) == 3  # of what is free, and what torch keeps for itself


def preview_vae(folder, levels):
    """The folder of an AutoencoderTiny with random weights for the latents of the tiny base, if it has three levels."""
    widths = {f"{part}_block_out_channels": (8,) * levels for part in ("encoder", "decoder")}
    torch.manual_seed(0)
    tiny_vae = AutoencoderTiny(**widths, num_encoder_blocks=(1,) * levels, num_decoder_blocks=(1,) * levels)
    tiny_vae.save_pretrained(folder)
    return str(folder)


def test_a_tiny_decoder_makes_previews_of_the_same_size(pipeline, image, tmp_path):
    wanted, key = frames(pipeline, image), pipeline.encode_image(torch.zeros(1, 3, tiny.SIZE, tiny.SIZE))
    folder, z = preview_vae(tmp_path / "tiny", 3), frames(pipeline, image, output_type="latent")
    memory.apply(pipeline, MemorySettings(preview_vae=folder), "cpu")
    preview = frames(pipeline, image)
    assert preview.shape == wanted.shape and np.abs(preview - wanted).max() > 0.01
    with torch.no_grad():  # of scaled latents, which the tiny decoder expects
        expected = AutoencoderTiny.from_pretrained(folder).decode(z[0]).sample / 2 + 0.5
    assert np.abs(preview[0] - expected.clamp(0, 1).permute(0, 2, 3, 1).numpy()).max() < 1e-5
    assert torch.equal(
        pipeline.encode_image(torch.zeros(1, 3, tiny.SIZE, tiny.SIZE)), key
    )  # the key frame is the VAE's
    other = preview_vae(tmp_path / "other", 4)
    with pytest.raises(UserError, match="preview_vae '.*' has 8 pixels per latent, the model's VAE 4"):
        memory.apply(pipeline, MemorySettings(preview_vae=other), "cpu")
    with pytest.raises(UserError, match="'nothing' is neither a folder nor"):
        memory.apply(pipeline, MemorySettings(preview_vae="nothing"), "cpu")


@pytest.mark.parametrize("dtype, rounding", [("float32", 4), ("bfloat16", 2)])
def test_quantization_stores_a_byte_for_each_weight(pipeline, image, dtype, rounding):
    memory.apply(pipeline, MemorySettings(torch_dtype=dtype), "cpu")
    wanted, held = frames(pipeline, image), sum(p.nbytes for p in pipeline.unet.parameters())
    memory.apply(pipeline, MemorySettings(torch_dtype=dtype, quantization="int8"), "cpu")
    stored = [p.numel() for p in pipeline.unet.parameters() if p.dtype == torch.int8]
    assert sum(stored) > 0.95 * sum(p.numel() for p in pipeline.unet.parameters())
    assert sum(p.nbytes for p in pipeline.unet.parameters()) == held - (rounding - 1) * sum(stored)
    error = np.abs(frames(pipeline, image) - wanted)
    assert 0 < error.mean() < (0.006 if dtype == "float32" else 0.02)
    assert pipeline.unet.dtype == getattr(torch, dtype)


@torch.no_grad()
def test_half_precision_takes_half_the_memory(base):
    pipeline = tiny.video_pipeline(base)
    size = {name: sum(p.nbytes for p in part.parameters()) for name, part in networks(pipeline).items()}
    whole = decode(pipeline, 16)
    memory.apply(pipeline, MemorySettings(torch_dtype="bfloat16"), "cpu")
    assert {name: 2 * sum(p.nbytes for p in part.parameters()) for name, part in networks(pipeline).items()} == size
    assert decode(pipeline, 16) < 0.6 * whole


@torch.no_grad()
def test_tiles_of_a_trained_vae_give_nearly_the_same_frames():
    # The worst case: tiles of 64 pixels, where Stable Diffusion's have 512. What looks at a whole frame sees a quarter of it.
    from microcinema.pipelines.base_model import BASE_COMPONENTS
    from microcinema.pipelines.loading import ASSETS, load_components
    from microcinema.sprites import scene

    vae = load_components(str(ASSETS / "sprites-base"), {"vae": BASE_COMPONENTS["vae"]})["vae"]
    scene = scene.render(scene.sample_attributes(0, 0, "train"), 1, 2 * vae.config["sample_size"], 8.0).frames
    z = vae.encode(torch.from_numpy(scene).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
    whole = vae.decode(z).sample
    vae.enable_tiling()
    error = (vae.decode(z).sample - whole).abs() / 2
    assert 0 < error.mean() < 0.08


# ---------------------------------------------------------------- xformers


@pytest.fixture
def fake_xformers(monkeypatch):
    """A stand-in that computes what xformers computes, on (b, n, h, d), and counts its calls."""
    calls = []

    def memory_efficient_attention(query, key, value, attn_bias=None, **kwargs):
        calls.append(tuple(query.shape))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias).transpose(1, 2)

    ops = types.ModuleType("xformers.ops")
    ops.memory_efficient_attention = memory_efficient_attention
    package = types.ModuleType("xformers")
    package.ops = ops
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return calls


def clip_attentions(pipeline):
    return [m for m in pipeline.unet.modules() if isinstance(m, Attention) and m.is_cross_attention]


def test_attention_to_a_clips_text_can_be_xformers(pipeline, image, fake_xformers, monkeypatch):
    wanted = frames(pipeline, image)
    # diffusers' own part asks for a CUDA device.
    monkeypatch.setattr(Attention, "set_use_memory_efficient_attention_xformers", lambda *_: None)
    pipeline.enable_xformers_memory_efficient_attention()
    assert np.abs(frames(pipeline, image) - wanted).max() < 1e-4
    # Two videos, with text and without: texts are not repeated for frames; self-attention is per frame.
    assert {shape[0] for shape in fake_xformers} == {4, 4 * 4}
    monkeypatch.undo()
    pipeline.disable_xformers_memory_efficient_attention()
    assert all(not module.processor.xformers for module in clip_attentions(pipeline))
    assert np.abs(frames(pipeline, image) - wanted).max() < 1e-4


def test_a_denoiser_keeps_its_attention_through_a_copy_and_through_a_file(pipeline, tmp_path):
    import copy

    assert all(isinstance(module.processor, SharedTextProcessor) for module in clip_attentions(pipeline))
    other = copy.deepcopy(pipeline.unet)
    other.disable_xformers_memory_efficient_attention()
    pipeline.unet.save_pretrained(tmp_path)
    again = type(pipeline.unet).from_pretrained(tmp_path)
    for net in (other, again):
        found = [m for m in net.modules() if isinstance(m, Attention) and m.is_cross_attention]
        assert found and all(isinstance(module.processor, SharedTextProcessor) for module in found)


# ---------------------------------------------------------------- compilation


def test_the_denoiser_alone_is_compiled(pipeline, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    memory.apply(pipeline, MemorySettings(compile=True), "cpu")
    assert compiled == [pipeline.unet]


@pytest.mark.slow
def test_the_denoiser_is_one_graph_and_gives_the_same_frames(pipeline, image):
    import torch._dynamo

    wanted = frames(pipeline, image)
    pipeline.unet.compile(backend="eager", fullgraph=True)
    assert np.abs(frames(pipeline, image) - wanted).max() < 1e-4
    torch._dynamo.reset()


# ---------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"torch_dtype": "int8"}, "memory.torch_dtype is 'int8'.*'float32', 'float16' or 'bfloat16'"),
        ({"offload": "disk"}, "memory.offload is 'disk'.*'none', 'model', 'group' or 'sequential'"),
        ({"attention": "flash"}, "memory.attention is 'flash'.*'sdpa' or 'xformers'"),
        ({"quantization": "int4"}, "memory.quantization is 'int4'.*'int8'"),
        ({"compile": True, "offload": "sequential"}, "compile=true and offload=sequential exclude each other"),
        ({"compile": True, "offload": "group"}, "compile=true and offload=group exclude each other"),
        ({"quantization": "int8", "offload": "sequential"}, "quantization=int8 and offload=sequential exclude"),
    ],
)
def test_bad_settings_are_named(bad, words):
    with pytest.raises(UserError, match=words):
        MemorySettings(**bad)


@pytest.mark.parametrize("offload", ["model", "group", "sequential"])
def test_offloading_without_an_accelerator_is_refused(base, offload):
    with pytest.raises(UserError, match=f"offload={offload} .*the device is the CPU; use offload=none"):
        memory.apply(tiny.video_pipeline(base), MemorySettings(offload=offload), "cpu")


def test_xformers_that_is_not_there_is_refused(base, monkeypatch):
    pipeline, settings = tiny.video_pipeline(base), MemorySettings(attention="xformers")
    monkeypatch.setattr(memory, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="not installed; pip install"):
        memory.apply(pipeline, settings, "cuda")
    monkeypatch.setattr(memory, "find_spec", lambda name: "there")
    with pytest.raises(UserError, match="CUDA devices only, not on cpu"):
        memory.apply(pipeline, settings, "cpu")


def test_what_a_pipeline_does_not_have_is_refused_or_left_aside(base, tmp_path):
    from diffusers import DiffusionPipeline

    stage1 = DiffusionPipeline.from_pretrained(base)
    memory.apply(stage1, MemorySettings(vae_slicing=True, vae_tiling=True), "cpu")
    assert stage1.vae.use_slicing and stage1.vae.use_tiling
    stage1.register_modules(unet=None)
    for option, value in (("compile", True), ("quantization", "int8")):
        with pytest.raises(
            UserError, match=f"{option} is set, but StableDiffusionPipeline has neither a unet nor a tra"
        ):
            memory.apply(stage1, MemorySettings(**{option: value}), "cpu")
    stage1.register_modules(vae=stage1.text_encoder)
    with pytest.raises(UserError, match="vae_tiling=true, but CLIPTextModel"):
        memory.apply(stage1, MemorySettings(vae_tiling=True), "cpu")
    stage1.register_modules(vae=None)
    memory.apply(stage1, MemorySettings(vae_tiling=True), "cpu")


# ---------------------------------------------------------------- on a GPU


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """Wide enough for weights to be what fills the memory."""
    return tiny.base_folder(tmp_path_factory.mktemp("wide"), block_out_channels=(256, 512))


def on_gpu(base, image, cache_interval=None, **settings):
    """Frames of a pipeline that was set up so, and the bytes of GPU memory that it took at most."""
    pipeline = tiny.video_pipeline(base)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    memory.apply(pipeline, MemorySettings(**settings), "cuda")
    found = frames(pipeline, image, cache_interval=cache_interval)
    return found, torch.cuda.max_memory_allocated() - before


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
def test_offloading_gives_the_same_frames_in_less_memory_of_the_gpu(wide_base, image):
    wanted, whole = on_gpu(wide_base, image)
    found, by_network = on_gpu(wide_base, image, offload="model")
    assert np.abs(found - wanted).max() < 1e-3
    assert by_network < 0.8 * whole
    found, by_layer = on_gpu(wide_base, image, offload="sequential")
    assert np.abs(found - wanted).max() < 1e-3
    assert by_layer < 0.8 * by_network
    found, by_group = on_gpu(wide_base, image, offload="group")
    assert np.abs(found - wanted).max() < 1e-3
    assert by_group < 0.8 * by_network
    found, stored = on_gpu(wide_base, image, offload="group", quantization="int8")
    assert np.abs(found - wanted).mean() < 0.006
    assert stored < by_group
    # Of the steps that take deep features over, some layers that were fetched do not run.
    wanted, found = (on_gpu(wide_base, image, offload=way, cache_interval=2)[0] for way in ("none", "group"))
    assert np.abs(found - wanted).max() < 1e-3


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
def test_xformers_gives_the_same_frames(wide_base, image):
    pytest.importorskip("xformers")
    wanted, _ = on_gpu(wide_base, image, torch_dtype="float16")
    found, _ = on_gpu(wide_base, image, torch_dtype="float16", attention="xformers")
    assert np.abs(found - wanted).mean() < 0.004


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(NO_GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("offload", ["none", "model"])
def test_compilation_gives_the_same_frames(wide_base, image, offload):
    wanted, _ = on_gpu(wide_base, image, torch_dtype="bfloat16")
    found, _ = on_gpu(wide_base, image, torch_dtype="bfloat16", compile=True, offload=offload)
    assert np.abs(found - wanted).mean() < 0.015

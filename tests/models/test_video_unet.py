import re
from collections import Counter
from itertools import product

import pytest
import torch
from einops import rearrange, repeat
from safetensors.torch import load_file, save_file

from fixtures import tiny_training
from fixtures.tiny_unet import (
    EVERYTHING,
    PRESETS,
    base,
    encoder_outputs,
    inputs,
    network,
    options,
    per_frame,
    randomise,
)
from microcinema.config.compose import plain
from microcinema.models.conditioning import Conditions
from microcinema.models.video_unet import VideoUNet, set_trainable
from microcinema.training.loss import TrainableModel
from microcinema.utils.errors import UserError

VARIANTS = [
    *((preset,) for preset in PRESETS),
    EVERYTHING,
    ("microcinema", "model.appearance.inject=encoder", "model.appearance.fusion=add"),
    ("microcinema", "model.appearance.inject=decoder", "model.appearance.fusion=scale_shift"),
    ("microcinema", "model.temporal.convolutions=after", "model.temporal.positions=false"),
    ("microcinema_once", "model.appearance.fusion=scale_shift", "model.temporal.convolutions=inside"),
    ("microcinema_once", "model.appearance.inject=decoder", "model.keyframe_concat=true"),
    ("factorized_dreamer", "model.adapter.mode=concat", "model.adapter.num_tokens=2", "model.pixels.scales=[1,4]"),
]
APPEARANCE = [("microcinema",), ("microcinema_once", "model.appearance.fusion=scale_shift")]


def predict(video, z_t, t, text, z_ref, fps, **changes):
    return video(z_t, t, video.encode(text, z_ref, fps, **{**encoder_outputs(len(text)), **changes}))


def float64(tensors):
    return [x.double() if x.is_floating_point() else x for x in tensors]


@pytest.mark.parametrize(
    "shape, variant",
    [*product(("sd1", "sd2"), VARIANTS), *(("sdxl", variant) for variant in VARIANTS[: len(PRESETS) + 1])],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
@torch.no_grad()
def test_equals_the_2d_unet_at_initialization(shape, variant):
    torch.set_default_dtype(torch.float64)
    try:
        unet = base(shape)
        video = network(unet, *variant)
        if "model.adapter.mode=concat" in variant:  # which the cross-attentions read from the start
            video.image_adapter.forward = lambda text, image: text[:, :0]
        given = {name: x.double() for name, x in encoder_outputs().items()}
        for frames in (1, 5):
            z_t, t, text, z_ref, fps = float64(inputs(frames))
            out = predict(video, z_t, t, text, z_ref, fps, **given)
            assert (out - per_frame(unet, z_t, t, text)).abs().max() < 1e-13
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow  # tracing takes a minute
@pytest.mark.parametrize("variant", [("microcinema",), EVERYTHING], ids=["microcinema", "everything"])
def test_equals_the_2d_unet_compiled_and_under_checkpointing(unet, variant):
    video = network(unet, *variant)
    video.enable_gradient_checkpointing()
    z_t, t, _, z_ref, fps = inputs(2)
    text = torch.randn(2, 5, 12)
    conditions = video.encode(text, z_ref, fps, **encoder_outputs())
    expected = per_frame(unet, z_t, t, text)
    torch.testing.assert_close(video(z_t, t, conditions), expected, atol=1e-5, rtol=1e-5)
    torch.compiler.reset()
    compiled = torch.compile(video, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(z_t, t, conditions), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@torch.no_grad()
def test_saves_and_loads_bit_for_bit(tmp_path, variant):
    video = network(base(), *variant)
    randomise(video)
    video.save_pretrained(tmp_path)
    again = VideoUNet.from_pretrained(tmp_path)
    assert plain(again.options) == plain(video.options)
    assert video.state_dict().keys() == again.state_dict().keys()
    assert torch.equal(predict(video, *inputs(3)), predict(again, *inputs(3)))


@pytest.mark.parametrize("enabled", ["true", "false"])
@torch.no_grad()
def test_frame_embedding_tells_every_block_the_index_of_its_frame(enabled):
    video = network(base(), "plain", f"model.temporal.frame_embedding={enabled}")
    assert hasattr(video, "frame_embedding") == (enabled == "true")
    if enabled == "true":
        randomise(video.frame_embedding)
    z_t, t, text, _, _ = inputs(1)
    # Four frames alike, and no other temporal layer that matters.
    out = video(z_t.expand(-1, 4, -1, -1, -1), t, Conditions(text))
    assert torch.allclose(out[:, :1].expand_as(out), out, atol=1e-5) != (enabled == "true")


@pytest.mark.parametrize("trainable_unet_layers", [[], ["up_blocks.1", "conv_out.bias"]])
@pytest.mark.parametrize("variant", [EVERYTHING, ("microcinema_once",)], ids=lambda v: v[0])
def test_frozen_parts_get_no_gradient_no_optimizer_entry_and_keep_their_bytes(variant, trainable_unet_layers):
    video = network(base(), *variant)
    trained = set_trainable(video, "temporal", trainable_unet_layers)
    randomise(video)
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.1)
    before = {k: v.clone() for k, v in video.state_dict().items()}
    predict(video, *inputs(3)).square().mean().backward()
    optimizer.step()
    entries = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in video.named_parameters():
        trains = name.startswith((*VideoUNet.new_prefixes, *trainable_unet_layers))
        assert (id(parameter) in entries) == (parameter.grad is not None) == trains, name
        assert torch.equal(parameter, before[name]) != trains, name


def test_train_all_trains_everything():
    video = network(base(), "microcinema")
    set_trainable(video, "temporal")
    for trainable_unet_layers in ([], ["up_blocks.1"]):
        assert len(set_trainable(video, "all", trainable_unet_layers)) == len([*video.parameters()])
    with pytest.raises(UserError, match="trainable_parameters='some'"):
        set_trainable(video, "some")


@pytest.mark.parametrize("name", ["up_block", "up_blocks.7", "temporal_transformers", ""])
def test_trainable_layers_must_be_2d_layers(name):
    message = f"trainable_unet_layers names '{name}', and no 2D layer has that name.*mid_block, "
    with pytest.raises(UserError, match=message):
        set_trainable(network(base(), "microcinema"), "temporal", [name])


@pytest.mark.parametrize("variant", APPEARANCE, ids=lambda v: v[0])
def test_gradient_checkpointing_changes_no_gradient_and_covers_the_appearance_branch(variant):
    video = network(base(), *variant)
    randomise(video)

    def gradients():
        video.zero_grad()
        predict(video, *inputs(3)).square().mean().backward()
        return [p.grad.clone() for p in video.parameters()]

    plain = gradients()
    video.enable_gradient_checkpointing()
    branch = video.appear_net if hasattr(video, "appear_net") else video.reference_net
    assert video.gradient_checkpointing and branch.gradient_checkpointing
    calls = []
    branch.down_blocks[0].resnets[0].register_forward_hook(lambda *_: calls.append(1))
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(), strict=True))
    assert len(calls) == 2  # forward, and recomputed


@pytest.mark.parametrize("variant", APPEARANCE, ids=lambda v: v[0])
def test_the_first_level_alone_can_be_checkpointed(variant, tmp_path):
    pipeline = tiny_training.pipeline(tmp_path)
    pipeline.unet = network(base(), *variant)
    randomise(pipeline.unet)
    predict(pipeline.unet, *inputs(3)).square().mean().backward()
    plain = [p.grad.clone() for p in pipeline.unet.parameters()]
    pipeline.unet.zero_grad()
    config = tiny_training.make_config(tmp_path, gradient_checkpointing="first_level", trainable_parameters="all")
    video, calls = TrainableModel.for_training(pipeline, config).unet, Counter()
    branch = video.appear_net if hasattr(video, "appear_net") else video.reference_net
    for prefix, net in (("video", video), ("branch", branch)):
        for name, module in net.named_modules():
            if re.fullmatch(r"(down_blocks\.\d|mid_block|up_blocks\.\d)\.resnets\.\d", name):
                module.register_forward_pre_hook(lambda *_, name=f"{prefix}.{name}": calls.update([name]))
    predict(video, *inputs(3)).square().mean().backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(plain, video.parameters(), strict=True))
    last = len(video.up_blocks) - 1
    twice = {name.rpartition(".resnets")[0] for name, count in calls.items() if count == 2}
    decoder = {f"branch.up_blocks.{last}"} if hasattr(branch, "up_blocks") else set()
    assert twice == {"video.down_blocks.0", f"video.up_blocks.{last}", "branch.down_blocks.0", *decoder}


@pytest.mark.parametrize("shape", ["sd1", "sd2"])
def test_2d_part_has_the_2d_names_shapes_and_values(shape):
    unet = base(shape)
    video = network(unet, *EVERYTHING)
    state = video.state_dict()
    assert {k for k in state if not k.startswith(VideoUNet.new_prefixes)} == unet.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in unet.state_dict().items())
    assert len(video.new_parameters()) == len(state) - len(unet.state_dict())
    branch = {k.removeprefix("appear_net."): v for k, v in state.items() if k.startswith("appear_net.")}
    assert all(torch.equal(v, unet.state_dict()[k]) for k, v in branch.items() if k in unet.state_dict())


def test_loading_other_weights_names_all_keys():
    unet = base()
    state = unet.state_dict()
    state["conv_in.extra"] = state.pop("conv_in.bias")
    unet.state_dict = lambda: state
    with pytest.raises(UserError, match=r"missing keys: conv_in\.bias; unexpected keys: conv_in\.extra"):
        network(unet)


def test_a_checkpoint_without_a_key_is_refused(tmp_path):
    network(base(), "microcinema").save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    state["other"] = state.pop("appear_net.temporal_first_convs.0.taps.weight")
    save_file(state, path, metadata={"format": "pt"})
    message = r"missing keys: appear_net\.temporal_first_convs\.0\.taps\.weight; unexpected keys: other"
    with pytest.raises(UserError, match=message):
        VideoUNet.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot load a network from"):
        VideoUNet.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
        ({"center_input_sample": True}, "center_input_sample=True"),
        ({"down_block_types": ("CrossAttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D")}, "AttnDownBlock2D"),
    ],
)
def test_unsupported_base_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        network(base(**changes))


@torch.no_grad()
def test_text_once_per_clip_is_text_repeated_per_frame():
    """Each frame's text is a clip's own in a batch of one-frame clips; without temporal layers both must agree."""
    video = network(base())
    z_t, t, text, _, _ = inputs(4)
    batches = []
    hook = (
        video.mid_block.attentions[0]
        .transformer_blocks[0]
        .attn2.to_k.register_forward_hook(lambda module, args, out: batches.append(out.shape[0]))
    )
    once = video(z_t, t, Conditions(text))
    repeated = video(
        rearrange(z_t, "b f c h w -> (b f) 1 c h w"),
        t.repeat_interleave(4),
        Conditions(repeat(text, "b n d -> (b f) n d", f=4)),
    )
    hook.remove()
    torch.testing.assert_close(once, rearrange(repeated, "(b f) 1 c h w -> b f c h w", f=4), atol=1e-5, rtol=1e-5)
    assert batches == [2, 8]


@pytest.mark.parametrize("variant", [*APPEARANCE, EVERYTHING], ids=lambda v: v[0])
@torch.no_grad()
def test_clips_of_a_batch_do_not_see_each_other(variant):
    video = network(base(), *variant)
    randomise(video)
    z_t, t, text, z_ref, _ = inputs(3)
    fps = torch.tensor([4.0, 24.0])
    batch = predict(video, z_t, t, text, z_ref, fps)
    for i in range(2):
        one = slice(i, i + 1)
        tokens = {name: x[one] for name, x in encoder_outputs().items()}
        alone = predict(video, z_t[one], t[one], text[one], z_ref[one], fps[one], **tokens)
        torch.testing.assert_close(batch[one], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("variant", APPEARANCE, ids=lambda v: v[0])
@torch.no_grad()
def test_every_condition_matters_once_trained(variant):
    video = network(base(), *variant)
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(3)
    out = predict(video, z_t, t, text, z_ref, fps)
    dropped = predict(video, z_t, t, text, z_ref, fps, image_mask=torch.zeros(2, dtype=torch.bool))
    torch.testing.assert_close(dropped, video(z_t, t, Conditions(text=text, fps=fps)))
    others = [(text, z_ref, fps + 8), (text + 1, z_ref, fps), (text, -z_ref, fps)]
    for other in (dropped, *(predict(video, z_t, t, *changed) for changed in others)):
        assert (other - out).abs().max() > 1e-3
    assert torch.equal(predict(video, z_t, 10, text, z_ref, fps)[:1], out[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_runs_in_half_precision(dtype):
    video = network(base(), "microcinema")
    z_t, t, text, z_ref, fps = inputs(2)
    expected = predict(video, z_t, t, text, z_ref, fps)
    out = predict(video.to(dtype), z_t.to(dtype), t, text.to(dtype), z_ref.to(dtype), fps)
    assert out.dtype == dtype
    assert (out.float() - expected).abs().mean() < 0.05 * expected.abs().mean()


@pytest.mark.parametrize("variant", [EVERYTHING, ("microcinema_once",)], ids=["everything", "microcinema_once"])
@torch.no_grad()
def test_layerwise_casting_of_diffusers_rounds_weights_and_nothing_else(variant):
    """The reference has the same weights, rounded once."""
    cast, rounded = (network(base(), *variant) for _ in range(2))
    for video in (cast, rounded):
        randomise(video)
        video.to(torch.bfloat16)
    cast.enable_layerwise_casting(torch.float8_e4m3fn, torch.bfloat16)
    stored = {name for name, parameter in cast.named_parameters() if parameter.dtype == torch.float8_e4m3fn}
    assert cast.dtype == torch.bfloat16 and "time_embedding.linear_1.weight" in stored and len(stored) > 100
    for name, parameter in rounded.named_parameters():
        if name in stored:
            parameter.copy_(parameter.to(torch.float8_e4m3fn))
    arguments = [x.bfloat16() if x.is_floating_point() else x for x in inputs(2)]
    tokens = {name: x.bfloat16() for name, x in encoder_outputs().items()}
    first, second = (predict(video, *arguments, **tokens) for video in (cast, rounded))
    assert first.dtype == torch.bfloat16 and torch.equal(first, second)


def test_trains_under_autocast_and_checkpointing():
    video = network(base(), *EVERYTHING)
    randomise(video)
    video.enable_gradient_checkpointing()
    with torch.autocast("cpu", torch.bfloat16):
        out = predict(video, *inputs(2))
    out.float().square().mean().backward()
    for name, parameter in video.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 0, 4, 8, 8), "0 frames; this model takes 1 to 6"),
        ((1, 7, 4, 8, 8), "7 frames; this model takes 1 to 6"),
        ((1, 2, 4, 8, 6), "8x6; height and width must be multiples of 4"),
        ((1, 2, 4, 0, 8), "0x8"),
        ((1, 2, 3, 8, 8), "c=4"),
        ((2, 4, 8, 8), "b f c h w"),
        ((2, 2, 4, 8, 8), "1 texts for 2 clips"),
    ],
)
def test_bad_latents(shape, message):
    with pytest.raises(UserError, match=message):
        network(base(), "plain", "model.max_frames=6")(torch.zeros(shape), 0, Conditions(torch.zeros(1, 7, 24)))


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        (("microcinema_once",), "17 appearance features, and this network uses 0"),
        (("factorized_dreamer",), "keys and values of the image, and this network uses 0"),
        (("factorized_dreamer", "model.adapter=null"), "3 features of pixels, and this network uses 0"),
    ],
)
def test_conditions_of_another_network_are_refused(variant, message):
    unet = base()
    z_t, t, text, z_ref, fps = inputs(2)
    conditions = network(unet, *variant).encode(text, z_ref, fps, **encoder_outputs())
    with pytest.raises(UserError, match=message):
        network(unet)(z_t, t, conditions)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["model.appearance.fusion=all"], "model.appearance.fusion is 'all', but should be 'add'"),
        (["model.appearance.network=reference_net"], "reference_net has one feature per layer"),
        (["model.temporal.convolutions=x"], "should be 'inside' or 'after'"),
    ],
)
def test_options_that_cannot_work(changes, message):
    with pytest.raises(UserError, match=message):
        options("microcinema", *changes)


def test_a_config_that_cannot_be_built_is_a_user_error():
    video = network(base())
    with pytest.raises(UserError, match=r"temporal\.convolutions: should be 'inside' or 'after'"):
        VideoUNet(**{**video.config, "temporal": {**video.config["temporal"], "convolutions": "x"}})


@pytest.mark.parametrize("bottleneck", [1, 2])
def test_attention_bottleneck(bottleneck):
    video = network(base(), "plain", f"model.temporal.attention_bottleneck={bottleneck}")
    assert video.temporal_transformers["0"].proj_in.out_channels == 32 // bottleneck

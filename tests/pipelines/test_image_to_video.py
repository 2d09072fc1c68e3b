"""Pipelines on tiny random models in the layouts of Stable Diffusion 1.5 and 2.1."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fixtures import tiny
from fixtures.tiny_sampling import PROMPTS, sample
from microcinema.diffusion.guidance import Guidance
from microcinema.diffusion.noise_prior import NoisePrior
from microcinema.diffusion.rng import generator
from microcinema.diffusion.schedule import make_sampler, make_scheduler, schedule_summary, set_timesteps
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.denoise import prepare_conditions
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import as_pil
from microcinema.pipelines.loading import resolve_model_path
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline, save_pipeline
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module", params=tiny.FLAVOURS)
def any_base(request, tmp_path_factory):
    return tiny.base_folder(tmp_path_factory.mktemp(request.param), request.param)


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


# ---------------------------------------------------------------- the base


def test_base_says_prediction_type_and_schedule(any_base):
    found = load_base(any_base)
    file = json.loads((any_base / "scheduler" / "scheduler_config.json").read_text())
    assert found.scheduler.config.prediction_type == file["prediction_type"]
    assert found.scheduler.config.beta_start == file["beta_start"]
    assert found.scheduler.config.clip_sample is False
    frozen = [*found.vae.parameters(), *found.text_encoder.parameters()]
    assert not any(parameter.requires_grad for parameter in frozen)


def test_half_precision_files_are_computed_in_float32(base, tmp_path):
    tiny.base_pipeline(tmp_path).to(torch.float16).save_pretrained(tmp_path)
    assert {p.dtype for p in load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors").values()} == {
        torch.float16
    }
    found = load_base(tmp_path)
    for network in (found.unet, found.vae, found.text_encoder):
        assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    close = zip(found.unet.parameters(), load_base(base).unet.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in close)


def test_text_is_read_as_stable_diffusion_reads_it(any_base):
    stable_diffusion = tiny.base_pipeline(any_base, "sd15" if "sd15" in str(any_base) else "sd21")
    wanted, empty = stable_diffusion.encode_prompt(PROMPTS, "cpu", 1, True)
    pipeline = tiny.video_pipeline(any_base)
    assert torch.equal(pipeline.encode_text(PROMPTS), wanted)
    assert torch.equal(pipeline.encode_text([""]), empty[:1])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def drop_weight(path):
    weights = load_file(path)
    del weights["conv_in.bias"]
    save_file({**weights, "surplus": torch.zeros(1)}, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: shutil.rmtree(b / "vae"), "vae"),
        (lambda b: (b / "model_index.json").unlink(), "model_index.json"),
        (lambda b: (b / "unet" / "diffusion_pytorch_model.safetensors").unlink(), "unet"),
        (lambda b: (b / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"torn"), "unet"),
        (lambda b: drop_weight(b / "unet" / "diffusion_pytorch_model.safetensors"), "conv_in.bias.*surplus"),
        (lambda b: drop_weight_of_text(b / "text_encoder" / "model.safetensors"), "final_layer_norm"),
        (
            lambda b: edit_json(b / "model_index.json", unet=["diffusers", "FluxTransformer2DModel"]),
            "FluxTransformer2DModel",
        ),
        (lambda b: edit_json(b / "model_index.json", text_encoder=[None, None]), "text_encoder"),
        (lambda b: shutil.rmtree(b / "scheduler"), "scheduler"),
        (lambda b: edit_json(b / "scheduler" / "scheduler_config.json", prediction_type="guess"), "guess"),
    ],
)
def test_broken_bases_are_named_in_one_line(base, tmp_path, damage, words):
    broken = shutil.copytree(base, tmp_path / "broken")
    damage(broken)
    with pytest.raises(UserError, match=words) as error:
        load_base(broken)
    assert "\n" not in str(error.value)


def drop_weight_of_text(path):
    weights = load_file(path)
    name = next(name for name in weights if "final_layer_norm.weight" in name)
    save_file({key: value for key, value in weights.items() if key != name}, path, metadata={"format": "pt"})


def test_components_of_two_models_do_not_mix(base, tmp_path):
    tiny.base_folder(tmp_path / "other", cross_attention_dim=24)
    with pytest.raises(UserError, match="text encoder's width is 32, but its UNet has cross_attention_dim=24"):
        load_base(tmp_path / "other")


def test_locate():
    assert resolve_model_path("owner/name") == "owner/name"
    with pytest.raises(UserError, match="nowhere"):
        resolve_model_path("nowhere")
    with pytest.raises(UserError, match="/no/such"):
        resolve_model_path("/no/such")


# ---------------------------------------------------------------- image to video


@pytest.mark.parametrize("model", ["microcinema", "microcinema_once", "plain"])
def test_shapes_and_output_types(any_base, image, model):
    pipeline = tiny.video_pipeline(any_base, model=model)
    frames = sample(pipeline, PROMPTS, image, seeds=(0, 1))
    assert frames.shape == (2, 4, tiny.SIZE, tiny.SIZE, 3)
    assert 0 <= frames.min() < frames.max() <= 1
    as_pt = sample(pipeline, PROMPTS, image, seeds=(0, 1), output_type="pt")
    assert np.allclose(as_pt.permute(0, 1, 3, 4, 2).numpy(), frames, atol=1e-6)
    as_pil = sample(pipeline, PROMPTS, image, seeds=(0, 1), output_type="pil")
    assert np.abs(np.array(as_pil[1][3]) / 255 - frames[1, 3]).max() < 0.01
    other = sample(pipeline, PROMPTS[0], image, height=24, width=40, num_frames=1, decode_chunk_size=1)
    assert other.shape == (1, 1, 24, 40, 3)


def test_a_video_depends_on_its_own_generator_and_not_on_its_batch(pipeline, image):
    other = image.transpose(Image.Transpose.ROTATE_180)
    together = sample(pipeline, PROMPTS, [image, other], seeds=(0, 1), output_type="latent")
    alone = sample(pipeline, PROMPTS[1], other, seeds=(1,), output_type="latent")
    assert (together[1:] - alone).abs().max() < 1e-5 * alone.abs().max()
    assert torch.equal(alone, sample(pipeline, PROMPTS[1], other, seeds=(1,), output_type="latent"))
    several = sample(pipeline, PROMPTS[1], other, seeds=(1, 2), num_videos_per_prompt=2, output_type="latent")
    assert (several[:1] - alone).abs().max() < 1e-5 * alone.abs().max()
    assert not torch.allclose(several[1:], alone, atol=1e-2)


def test_every_condition_matters(pipeline, image):
    reference = sample(pipeline, PROMPTS[0], image, output_type="latent")
    for change in (
        {"prompt": PROMPTS[1]},
        {"image": image.transpose(Image.Transpose.ROTATE_90)},
        {"fps": 24},
        {"negative_prompt": "grass"},
        {"guidance_scale": 2.0},
        {"image_guidance_scale": 2.0},
        {"gamma": 0.5},
        {"guidance_scale": 7.5, "guidance_interval": (0.0, 0.5)},
        {"guidance_scale": 7.5, "guidance_reuse": 2},
        {"guidance_scale": 7.5, "guidance_rescale": 0.7},
        {"guidance_scale": 7.5, "apg_eta": 0.0},
        {"guidance_scale": 7.5, "apg_norm_threshold": 0.1},
        {"guidance_scale": 7.5, "apg_momentum": -0.5},
        {"scheduler": "UniPCMultistepScheduler"},
        {"cache_interval": 3},
        {"seeds": (1,)},
    ):
        given = {"prompt": PROMPTS[0], "image": image, **change}
        assert (sample(pipeline, **given, output_type="latent") - reference).abs().max() > 1e-4, change


@pytest.mark.parametrize("model", ["microcinema", "microcinema_once"])
def test_appear_net_runs_at_every_step_reference_net_once_per_clip_and_guidance_wastes_no_evaluation(
    base, image, model
):
    pipeline = tiny.video_pipeline(base, model=model)
    branch = pipeline.unet.appear_net if model == "microcinema" else pipeline.unet.reference_net
    appearance, text = count_calls(branch), count_calls(pipeline.text_encoder)
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    for steps, scales, evaluations in [
        (20, (7.5, 1.5), 3),
        (2, (3.0, 3.0), 2),
        (2, (1.0, 1.0), 1),
        (2, (7.5, 1.0), 2),
    ]:
        for calls in (appearance, text, batches):
            calls.clear()
        scales = dict(zip(("guidance_scale", "image_guidance_scale"), scales, strict=True))
        sample(pipeline, PROMPTS[0], image, num_inference_steps=steps, output_type="latent", **scales)
        assert len(appearance) == (steps if model == "microcinema" else 1)
        assert len(text) == 2  # the prompt and the empty prompt
        assert batches == [evaluations] * steps


@pytest.mark.parametrize("model", ["microcinema", "microcinema_once", "factorized_dreamer"])
def test_a_step_without_guidance_is_one_evaluation_of_the_whole_caption(base, image, model):
    """Also in a batch, in windows, and where the text's scale is 0 and plain guidance would not evaluate the caption."""
    pipeline = tiny.video_pipeline(base, model=model)
    batches = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: batches.append(len(arguments[0])))
    for settings in ({}, {"num_frames": 6}):
        call = {**settings, "seeds": (0, 1), "num_inference_steps": 5, "output_type": "latent"}
        batches.clear()
        some = sample(
            pipeline, PROMPTS, image, guidance_scale=7.5, guidance_interval=(0.2, 0.8), guidance_reuse=2, **call
        )
        windows = 2 if settings else 1
        assert batches == [b for b in (2, 4, 2, 4, 2) for _ in range(windows)]
        none = sample(pipeline, PROMPTS, image, guidance_scale=7.5, guidance_interval=(0.5, 0.5), **call)
        zero = sample(pipeline, PROMPTS, image, guidance_scale=0.0, guidance_interval=(0.0, 0.0), **call)
        unguided = sample(pipeline, PROMPTS, image, guidance_scale=1.0, **call)
        for latents in (none, zero):  # whose key frame and text were encoded in another batch
            torch.testing.assert_close(latents, unguided, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(some, unguided, atol=1e-3)


@pytest.mark.parametrize("frames", [4, 6])
def test_deep_features_are_computed_at_multiples_of_the_interval(base, image, frames):
    """For each window of a longer video, and anew where guidance adds terms that have none."""
    pipeline, whole = tiny.video_pipeline(base, model="microcinema"), []
    pipeline.unet.mid_block.resnets[0].register_forward_pre_hook(lambda _, inputs: whole.append(len(inputs[0]) // 4))
    call = {"num_inference_steps": 7, "output_type": "latent", "num_frames": frames, "guidance_scale": 7.5}
    windows = 1 if frames == 4 else 2
    plain = sample(pipeline, PROMPTS[0], image, **call)
    assert whole == [2] * 7 * windows
    for settings, batches in (
        ({"cache_interval": 1}, [2] * 7),
        ({"cache_interval": 3}, [2, 2, 2]),
        ({"cache_interval": 3, "guidance_interval": (0.2, 1.0)}, [1, 2, 2, 2]),  # steps 0, 2, 3 and 6
    ):
        whole.clear()
        latents = sample(pipeline, PROMPTS[0], image, **settings, **call)
        assert whole == [batch for batch in batches for _ in range(windows)]
        assert torch.equal(latents, plain) == (settings == {"cache_interval": 1})


def remapped_pipeline(base):
    """With steps that the network knows as times between whole ones, as Factorized-Dreamer's."""
    pipeline, own = tiny.video_pipeline(base), load_base(base).scheduler
    shifted = make_scheduler(own.config, {"snr_shift": 2.0})
    summaries = (schedule_summary(schedule) for schedule in (shifted, own))
    pipeline.register_to_config(**dict(zip(("training_schedule", "network_schedule"), summaries, strict=True)))
    pipeline.register_modules(scheduler=make_sampler(shifted))
    return pipeline


def test_remapped_times_are_tensors_which_compilation_does_not_take_for_constants(base, image):
    pipeline, times = remapped_pipeline(base), []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: times.append(arguments[1]))
    sample(pipeline, PROMPTS[0], image, output_type="latent", num_inference_steps=10)
    expected = np.interp(pipeline.scheduler.timesteps, np.arange(1000), pipeline.remapped_timesteps)
    assert torch.equal(torch.stack(times), torch.tensor(expected, dtype=torch.float32))
    assert (torch.stack(times) % 1 > 0).any()


@pytest.mark.slow  # tracing takes half a minute
def test_a_compiled_denoiser_is_not_compiled_anew_at_each_step(base, image):
    pipeline, graphs = remapped_pipeline(base), []
    torch.compiler.reset()
    pipeline.unet.compile(backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    sample(pipeline, PROMPTS[0], image, num_inference_steps=5, output_type="latent")
    assert len(graphs) == 1


def test_a_call_with_another_scheduler_leaves_the_pipeline_s_own(pipeline, image):
    before = sample(pipeline, PROMPTS[0], image, output_type="latent")
    own = type(pipeline.scheduler)
    other = sample(pipeline, PROMPTS[0], image, output_type="latent", scheduler="HeunDiscreteScheduler")
    assert pipeline.num_timesteps == 5  # of three steps, of which two have two evaluations
    assert type(pipeline.scheduler) is own and not torch.equal(other, before)
    assert torch.equal(sample(pipeline, PROMPTS[0], image, output_type="latent"), before)


def test_conditions_are_those_that_guidance_names(base, image):
    pipeline = tiny.video_pipeline(base, model="microcinema_once")
    guidance = Guidance(text=7.5, image=1.5)
    z_ref = torch.randn(2, tiny.LATENT_CHANNELS, 8, 8, generator=generator(0))
    text, empty = pipeline.encode_text(PROMPTS), pipeline.encode_text([""])
    with torch.no_grad():
        conditions = prepare_conditions(pipeline.unet, guidance, {"text": (text, empty)}, {"z_ref": z_ref}, fps=8.0)
        alone = pipeline.unet.encode(text, z_ref, torch.full((2,), 8.0))
    assert torch.equal(conditions.text, torch.cat([empty, empty, empty, empty, text]))
    for feature, wanted in zip(conditions.reference, alone.reference, strict=True):
        assert not feature[:2].any()
        assert feature[2:4].any()
        assert torch.allclose(feature[4:], wanted, atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "appearance", "mixed", "progressive"])
def test_sampling_starts_where_the_prior_says(base, image, kind):
    pipeline = tiny.video_pipeline(base, noise_prior=kind, noise_prior_strength=0.5, noise_prior_gamma=0.25)
    seen = []
    pipeline.unet.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
    for gamma in (None, 0.0, 2.0):
        sample(
            pipeline, PROMPTS[0], image, num_inference_steps=1, guidance_scale=1.0, gamma=gamma, output_type="latent"
        )
    eps = torch.randn(1, 4, tiny.LATENT_CHANNELS, 8, 8, generator=generator(7, 0))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    z_ref = pipeline.encode_image(pixels)
    assert pipeline.noise_prior.kind == kind
    for z_T, gamma in zip(seen, (0.25, 0.0, 2.0), strict=True):
        assert torch.allclose(z_T, pipeline.noise_prior.noise(eps, z_ref) + gamma * z_ref[:, None], atol=1e-5)


def test_gamma_is_the_authors_where_the_schedule_ends_with_signal(base, tmp_path):
    """Saved with the pipeline, which keeps it whatever the default becomes."""
    for settings, gamma in (
        ({}, 0.02),
        ({"noise_prior_strength": 0.0}, 0.02),
        ({"noise_prior_gamma": 0.0}, 0.0),
        ({"noise_prior_gamma": 0.3}, 0.3),
        ({"noise_prior": "none"}, 0.0),
        ({"noise_prior": "mixed"}, 0.0),
    ):
        pipeline = tiny.video_pipeline(base, **settings)
        assert pipeline.config["noise_prior_gamma"] == gamma, settings
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    silent = make_sampler(make_scheduler(tiny.scheduler().config, changes))
    pipeline = ImageToVideoPipeline(**{**pipeline.components, "scheduler": silent}, base=str(base))
    assert pipeline.noise_prior == NoisePrior("appearance", 0.03, 0.0)
    save_pipeline(pipeline, tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "model_index.json").read_text())["noise_prior_gamma"] == 0.0


def test_chunked_decoding_changes_nothing(pipeline, image):
    whole, chunked = (sample(pipeline, PROMPTS[0], image, decode_chunk_size=size) for size in (None, 3))
    assert np.abs(whole - chunked).max() < 1e-5


def test_callback_sees_every_step_and_may_change_latents(pipeline, image):
    steps = []

    def callback(pipe, step, t, values):
        assert pipe is pipeline
        assert list(values) == ["latents"]
        steps.append((step, int(t)))
        return {"latents": torch.zeros_like(values["latents"])} if step == 2 else None

    z = sample(pipeline, PROMPTS[0], image, output_type="latent", callback_on_step_end=callback)
    assert steps == list(enumerate(set_timesteps(pipeline.scheduler, 3).timesteps.tolist()))
    assert not z.any()


def test_as_pipelines_of_diffusers_it_counts_its_timesteps_and_returns_a_tuple_on_demand(base, image):
    """Heun visits all but the last timestep twice."""
    pipeline, steps = tiny.video_pipeline(base), []
    pipeline.scheduler = make_sampler(pipeline.scheduler, "HeunDiscreteScheduler")
    settings = {"num_inference_steps": 3, "output_type": "latent"}
    settings |= {"callback_on_step_end_tensor_inputs": pipeline._callback_tensor_inputs}
    arguments = lambda: {**settings, "generator": generator(7), "callback_on_step_end": lambda *a: steps.append(a)}  # noqa: E731
    output = pipeline(PROMPTS[0], image, **arguments())
    assert len(steps) == pipeline.num_timesteps == 5
    frames, keyframes = pipeline(PROMPTS[0], image, return_dict=False, **arguments())
    assert torch.equal(frames, output.frames) and keyframes == output.keyframes


def test_images_may_be_arrays_and_tensors_as_pipelines_return_them(pipeline, image):
    pixels = np.asarray(image)
    tensor = torch.from_numpy(pixels / 255).permute(2, 0, 1)
    others = (pixels, pixels / 255, np.float32(pixels / 255), tensor, tensor.float(), (tensor * 255).round().byte())
    assert all(np.array_equal(as_pil(other), pixels) for other in (image, *others))
    batch = np.stack([pixels, pixels[::-1]])
    settings = {"seeds": (0, 1), "num_inference_steps": 1, "num_frames": 1, "output_type": "latent"}
    expected = sample(pipeline, PROMPTS, [Image.fromarray(pixels) for pixels in batch], **settings)
    for other in (batch, torch.from_numpy(batch / 255).permute(0, 3, 1, 2)):
        assert torch.equal(sample(pipeline, PROMPTS, other, **settings), expected)


def test_a_base_may_be_trained_at_a_size_that_is_no_square(tmp_path):
    """Height comes first, as in diffusers' own pipelines."""
    base = tiny.base_folder(tmp_path / "base", sample_size=(8, 16))
    pipeline = tiny.video_pipeline(base)
    assert (pipeline.config["height"], pipeline.config["width"]) == (32, 64)
    keyframe = load_keyframe_pipeline(pipeline)
    keyframe.set_progress_bar_config(disable=True)
    (drawn,) = keyframe(["a star"], 32, 64, num_inference_steps=1)
    assert drawn.provenance["original_size"] == {"height": 32, "width": 64}
    assert sample(pipeline, PROMPTS[0], drawn.image).shape == (1, 4, 32, 64, 3)
    save_pipeline(pipeline, tmp_path / "saved")
    assert load_pipeline(tmp_path / "saved").unet.config["unet2d"]["sample_size"] == [8, 16]


def test_negative_prompts_are_one_for_all_or_one_each(pipeline, image):
    def negative(prompts, texts, seeds):
        return sample(pipeline, prompts, image, seeds, negative_prompt=texts, output_type="latent")

    each = negative(PROMPTS, ["grass", "sand"], (0, 1))
    assert torch.allclose(each[:1], negative(PROMPTS[0], "grass", (0,)), atol=1e-4)
    assert torch.allclose(each[1:], negative(PROMPTS[1], "sand", (1,)), atol=1e-4)
    assert torch.allclose(each[1:], negative(PROMPTS, "sand", (0, 1))[1:], atol=1e-4)
    assert not torch.allclose(each[1:], negative(PROMPTS[1], None, (1,)), atol=1e-3)
    assert torch.equal(negative(PROMPTS[1], None, (1,)), negative(PROMPTS[1], "", (1,)))


def test_one_generator_for_all_videos_is_drawn_from_in_their_order(pipeline, image):
    one = sample(pipeline, PROMPTS, image, generator=generator(7, 0), output_type="latent")
    first = sample(pipeline, PROMPTS[0], image, seeds=(0,), output_type="latent")
    assert (one[:1] - first).abs().max() < 1e-5 * first.abs().max()
    assert not torch.allclose(one[1:], one[:1], atol=1e-2)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": [PROMPTS[0], "  "]}, "prompt is empty"),
        ({"prompt": []}, "prompt is empty"),
        ({"height": 30}, "height 30.*multiple of 8.*32"),
        ({"width": 0}, "width is 0"),
        ({"num_frames": 0}, "num_frames is 0"),
        ({"fps": 0}, "fps is 0"),
        ({"image": np.full((8, 8, 3), 1.01)}, r"float64 \(8, 8, 3\).*floats from 0 to 1"),
        ({"image": np.full((8, 8, 3), np.nan)}, "float64"),
        ({"image": np.zeros((8, 8, 4), np.uint8)}, r"uint8 \(8, 8, 4\)"),
        ({"image": np.zeros((0, 8, 3))}, "float64"),
        ({"image": torch.zeros(8, 8, 3)}, r"float64 \(8, 3, 8\)"),
        ({"image": torch.zeros(3)}, "float64"),
        ({"image": np.zeros((2, 8, 8, 3))}, "2 images for 1"),
        ({"image": []}, "0 images for 1"),
        ({"image": "red.png"}, "a key frame is str; give a PIL image"),
        ({"image": [None]}, "a key frame is NoneType"),
        ({"negative_prompt": ()}, "0 negative prompts for 1"),
        ({"motion_prompt": "up"}, "no motion encoder"),
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1"),
        ({"callback_on_step_end_tensor_inputs": ["text"]}, "no tensor 'text'.*latents, prediction"),
        ({"gamma": -1}, "gamma is -1"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"guidance_scale": float("inf")}, "guidance_scale is inf"),
        ({"image_guidance_scale": float("-inf")}, "image_guidance_scale is -inf"),
        ({"fps": float("inf")}, "fps is inf"),
        ({"decode_chunk_size": 0}, "decode_chunk_size is 0"),
        ({"seeds": (1, 2)}, "2 generators for 1"),
        ({"generator": 7}, "generator is 7; give a torch.Generator"),
        ({"generator": [None]}, "generator is None"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"scheduler": "NoScheduler"}, "no scheduler 'NoScheduler'"),
        ({"preset": "best"}, "preset is 'best'"),
        ({"guidance_interval": (0.6, 0.2)}, r"guidance_interval is \[0.6, 0.2\]; begin with the lower"),
        ({"guidance_interval": (0.2, 1.2)}, "guidance_interval is"),
        ({"apg_momentum": -1}, "apg_momentum is -1"),
        ({"cache_interval": 0}, "cache_interval is 0"),
        ({"steps": 3}, "argument 'steps' is unknown"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt=0"),
        ({"output_type": "gif"}, "gif"),
    ],
)
def test_bad_calls_are_named(pipeline, image, bad, words):
    with pytest.raises(UserError, match=words):
        sample(pipeline, **{"prompt": PROMPTS[0], "image": image, **bad})


def test_bad_settings_are_named(base):
    nan = float("nan")
    numbers = ({"noise_prior_strength": nan}, {"guidance_scale": nan}, {"keyframe_guidance_scale": nan})
    for bad in ({"noise_prior": "pink"}, {"keyframe_position": 4}, {"keyframe_position": "last"}, *numbers):
        with pytest.raises(UserError):
            tiny.video_pipeline(base, **bad)


# ---------------------------------------------------------------- saved pipelines


@pytest.mark.parametrize("with_base", [True, False])
def test_a_reloaded_pipeline_gives_the_same_bits(any_base, image, tmp_path, with_base):
    settings = {"noise_prior": "mixed", "noise_prior_strength": 0.5, "keyframe_position": "center", "fps": 6.0}
    pipeline = tiny.video_pipeline(any_base, **settings)
    folder = tmp_path / "saved"
    save_pipeline(pipeline, folder, with_base)
    shared = {"vae", "text_encoder", "tokenizer"}
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"unet", "scheduler"} | (
        shared if with_base else set()
    )
    again = load_pipeline(folder)
    again.set_progress_bar_config(disable=True)
    assert (again.noise_prior, again.keyframe_position) == (pipeline.noise_prior, "center")
    assert again.config["training_schedule"] == pipeline.config["training_schedule"]
    assert np.array_equal(sample(pipeline, PROMPTS[0], image), sample(again, PROMPTS[0], image))


def test_diffusers_own_from_pretrained_opens_a_saved_pipeline(base, image, tmp_path):
    pipeline = tiny.video_pipeline(base, noise_prior_strength=0.1)
    pipeline.save_pretrained(tmp_path)
    again = ImageToVideoPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.noise_prior.strength == 0.1
    assert np.array_equal(sample(pipeline, PROMPTS[0], image), sample(again, PROMPTS[0], image))


def test_a_variant_opens_by_name_and_alone_without_one(base, image, tmp_path):
    pipeline, folder = tiny.video_pipeline(base), tmp_path / "saved"
    pipeline.save_pretrained(folder, variant="fp16")
    expected = sample(pipeline, PROMPTS[0], image)
    for opened in (load_pipeline(folder), load_pipeline(folder, variant="fp16")):
        opened.set_progress_bar_config(disable=True)
        assert np.array_equal(sample(opened, PROMPTS[0], image), expected)
    with pytest.raises(UserError, match="no weights of variant=bf16; it has variant=fp16"):
        load_pipeline(folder, variant="bf16")
    for weights in pipeline.unet.parameters():
        weights.data.zero_()
    pipeline.save_pretrained(folder)  # beside the other
    assert not any(weights.any() for weights in load_pipeline(folder).unet.parameters())
    assert any(weights.any() for weights in load_pipeline(folder, variant="fp16").unet.parameters())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: shutil.rmtree(p / "unet"), "unet"),
        (lambda p: drop_weight(p / "unet" / "diffusion_pytorch_model.safetensors"), "conv_in.bias.*surplus"),
        (
            lambda p: (p / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b""),
            "unet",
        ),
        (lambda p: edit_json(p / "unet" / "config.json", max_frames=9), "unet"),
        (lambda p: edit_json(p / "scheduler" / "scheduler_config.json", beta_end=0.02), "alpha_bar"),
        (lambda p: edit_json(p / "model_index.json", _class_name="StableDiffusionPipeline"), "StableDiffusionPipeline"),
        (lambda p: (shutil.rmtree(p / "vae"), edit_json(p / "model_index.json", base=None)), "vae"),
        (lambda p: (shutil.rmtree(p / "vae"), edit_json(p / "model_index.json", base="/gone")), "/gone"),
    ],
)
def test_broken_pipelines_are_named_in_one_line(base, tmp_path, damage, words):
    folder = tmp_path / "saved"
    save_pipeline(tiny.video_pipeline(base), folder)
    damage(folder)
    with pytest.raises(UserError, match=words) as error:
        load_pipeline(folder)
    assert "\n" not in str(error.value)


def test_a_pipeline_without_a_base_must_be_saved_whole(base, tmp_path):
    with pytest.raises(UserError, match="base"):
        save_pipeline(tiny.video_pipeline(base, base=None), tmp_path / "saved", with_base=False)
    assert not (tmp_path / "saved").exists()

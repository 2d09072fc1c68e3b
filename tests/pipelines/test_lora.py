"""LoRA files and the methods of the pipeline; training has tests of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from fixtures import lora_files, tiny
from fixtures.tiny_sampling import sample
from microcinema.config.sampling import KeyframeSettings, MemorySettings, SamplingSettings
from microcinema.pipelines.lora import Lora, fuse_loras, lora_file, read_lora
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import SampleFolder
from microcinema.pipelines.sampler import Sampler
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.utils.errors import UserError
from microcinema.utils.hashing import hash_file

FORMATS = {name: getattr(lora_files, name) for name in ("kohya", "old_diffusers", "diffusers", "peft")}


@pytest.fixture(scope="module")
def networks(base) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(base)


@pytest.fixture
def fresh(base, networks):
    """A pipeline at initialization, which a test may change."""
    return tiny.video_pipeline(base, stirred=False)


@pytest.mark.parametrize("layout", FORMATS)
def test_files_of_the_same_weights_are_read_alike(tmp_path, networks, layout):
    weights = lora_files.layers(networks.unet, networks.text_encoder)
    found = read_lora(lora_file(FORMATS[layout](tmp_path, weights)))
    expected = {name: pair for name, pair in weights.items() if layout != "peft" or name.startswith("unet.")}
    assert sum(map(len, found.values())) == 2 * len(expected)
    for name, pair in expected.items():
        component, _, layer = name.partition(".")
        for matrix, value in zip("AB", pair, strict=True):
            actual = found[component][f"{layer}.lora_{matrix}.weight"]
            torch.testing.assert_close(actual.float(), value, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "flavour, model", [("sd15", "microcinema"), ("sd21", "microcinema_once"), ("sd15", "factorized_dreamer")]
)
def test_at_initialization_every_frame_is_that_of_diffusers_unet_with_the_same_lora(tmp_path, flavour, model):
    """With AppearNet and ReferenceNet, which have no LoRA; in float64."""
    video = tiny.video_pipeline(tmp_path, flavour, model, stirred=False)
    image = StableDiffusionPipeline.from_pretrained(tmp_path)
    file = lora_files.kohya(
        tmp_path, lora_files.layers(image.unet, image.text_encoder, lora_files.UNET + lora_files.CONVOLUTIONS)
    )
    rng = torch.Generator().manual_seed(1)
    z = torch.randn(2, 3, tiny.LATENT_CHANNELS, 8, 8, generator=rng, dtype=torch.float64)
    t = torch.tensor(500)

    def outputs() -> tuple[torch.Tensor, torch.Tensor]:
        text = video.encode_text(["a red star", "a moon"])
        tokens = image.tokenizer(["a red star", "a moon"], padding="max_length", return_tensors="pt").input_ids
        expected = [image.unet(z[:, i], t, image.text_encoder(tokens)[0]).sample for i in range(3)]
        pixels = torch.zeros(2, 3, tiny.SIZE, tiny.SIZE, dtype=torch.float64)
        conditions = video.unet.encode(text, z[:, 0], **video.encode_pixels(pixels), **motion)
        return video.unet(z, t, conditions), torch.stack(expected, dim=1)

    motion = {"motion_tokens": video.encode_motion(["left", "up"]).double()} if video.uses_motion_caption else {}
    for network in (video.unet, image.unet, video.text_encoder, image.text_encoder, video.image_encoder):
        if network is not None:
            network.double()
    with torch.no_grad():
        before, _ = outputs()
        for pipeline in (video, image):
            pipeline.load_lora_weights(str(file), adapter_name="style")
            pipeline.set_adapters("style", 0.7)
        found, expected = outputs()
    assert (found - before).abs().max() > 0.01
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    # AppearNet's and ReferenceNet's layers, whose names end alike, have none.
    changed = {name.partition(".lora_")[0] for name, _ in video.unet.named_parameters() if ".lora_" in name}
    assert changed == set(lora_files.UNET + lora_files.CONVOLUTIONS)


def test_the_methods_of_diffusers(tmp_path, fresh, networks, image):
    first, second = (
        FORMATS[layout](tmp_path, lora_files.layers(networks.unet, networks.text_encoder, names, seed))
        for layout, names, seed in (("kohya", lora_files.UNET, 0), ("diffusers", lora_files.CONVOLUTIONS, 1))
    )
    weights = {name: value.clone() for name, value in fresh.unet.state_dict().items()}

    def frames() -> torch.Tensor:
        return torch.from_numpy(sample(fresh, "a red star", image))

    plain = frames()
    fresh.load_lora_weights(first)
    assert fresh.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}
    one = frames()
    fresh.load_lora_weights(
        second.parent / "new", adapter_name="second", weight_name="pytorch_lora_weights.safetensors"
    )
    fresh.set_adapters(["default_0", "second"], [1.0, 0.0])
    assert torch.equal(frames(), one) and not torch.allclose(one, plain, atol=1e-3)
    fresh.set_adapters(["default_0", "second"], [0.5, -0.8])
    both = frames()
    assert not torch.allclose(both, one, atol=1e-3)
    with pytest.raises(UserError, match="'second' is loaded already"):
        fresh.load_lora_weights(second, adapter_name="second")
    with pytest.raises(UserError, match="fuse_lora"):
        fresh.save_pretrained(tmp_path / "saved")
    fresh.disable_lora()
    assert torch.equal(frames(), plain)
    fresh.enable_lora()
    fresh.fuse_lora()
    torch.testing.assert_close(frames(), both, rtol=0, atol=1e-4)
    fresh.unfuse_lora()
    torch.testing.assert_close(frames(), both, rtol=0, atol=1e-4)
    fresh.delete_adapters("second")
    assert fresh.get_list_adapters() == {"unet": ["default_0"], "text_encoder": ["default_0"]}
    fresh.unload_lora_weights()
    assert fresh.unet.state_dict().keys() == weights.keys()
    for name, value in fresh.unet.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-6)


def test_fused_ones_are_the_weights_themselves(tmp_path, fresh, networks, image):
    """No further layer, launch or parameter; of scales and several at once the sum."""
    file = lora_files.kohya(tmp_path, lora_files.layers(networks.unet, networks.text_encoder))
    names = [name for name, _ in fresh.unet.named_modules()]
    fresh.load_lora_weights(file, adapter_name="one")
    fresh.set_adapters("one", 0.75)
    expected = sample(fresh, "a red star", image)
    fresh.unload_lora_weights()
    fuse_loras(fresh, [Lora.of(f"{file}:1"), Lora.of(f"{file}:-0.25")])
    assert [name for name, _ in fresh.unet.named_modules()] == names
    assert abs(sample(fresh, "a red star", image) - expected).max() < 1e-4


def test_a_name_has_a_scale_or_none(tmp_path, networks):
    file = lora_files.kohya(tmp_path, lora_files.layers(networks.unet, None))
    colon = file.rename(tmp_path / "a:b.safetensors")
    assert [Lora.of(f"{colon}{end}").scale for end in ("", ":0.5", ":-1", ":.25")] == [1.0, 0.5, -1.0, 0.25]
    assert Lora.of(f"{colon}:0.5").file == colon


def _wrong(folder: Path, networks: StableDiffusionPipeline, name: str) -> Path:
    weights = lora_files.layers(networks.unet, None)
    if name == "another shape":
        weights[lora_files.UNET[0].join(["unet.", ""])] = torch.zeros(4, 640), torch.zeros(640, 4)
    elif name == "SDXL":
        weights = {
            "unet.down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q": (
                torch.zeros(4, 640),
                torch.zeros(640, 4),
            )
        }
    elif name == "second text encoder":
        weights = {"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (torch.zeros(4, 8), torch.zeros(8, 4))}
    elif name == "pickle":
        torch.save({}, folder / "lora.pt")
        return folder / "lora.pt"
    elif name in ("no file", "folder"):
        return folder / "missing.safetensors" if name == "no file" else folder
    elif name == "garbage":
        (folder / "lora.safetensors").write_bytes(b"garbage")
        return folder / "lora.safetensors"
    elif name in ("LoHa", "model"):
        key = "lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a" if name == "LoHa" else "conv_in.weight"
        save_file({key: torch.zeros(4, 4)}, folder / "lora.safetensors")
        return folder / "lora.safetensors"
    return lora_files.old_diffusers(folder, weights)


@pytest.mark.parametrize(
    "name, message",
    {
        "another shape": r"attn1.to_q.lora_A.weight is \(4, 640\) for a layer of \(32, 32\)",
        "SDXL": "unet has no layer down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q; use one",
        "second text encoder": "it is for text_encoder_2, which the model does not have",
        "pickle": "may be a pickle, which can run code",
        "no file": "check the path",
        "folder": "has the files none",
        "garbage": "cannot be read",
        "LoHa": "cannot be read",
        "model": "cannot be read",
    }.items(),
)
def test_what_does_not_fit_is_one_line_and_changes_nothing(tmp_path, fresh, networks, name, message):
    before = {key: value.clone() for key, value in fresh.unet.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        fresh.load_lora_weights(_wrong(tmp_path, networks, name))
    assert "\n" not in str(error.value)
    after = fresh.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)


def test_the_hub_has_files_by_name(tmp_path, networks, monkeypatch):
    file = lora_files.kohya(tmp_path / "files", lora_files.layers(networks.unet, None))
    tiny.into_hub_cache(file.parent, tmp_path / "cache", "owner/style")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert Lora.of("owner/style/kohya.safetensors:0.5").file.read_bytes() == file.read_bytes()
    with pytest.raises(UserError, match=r"owner/style/\(file\).safetensors, or download"):
        Lora.of("owner/style")


@pytest.fixture(scope="module")
def model(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pipeline(tiny.video_pipeline(base, num_inference_steps=1, guidance_scale=1.0), folder)
    return folder


def test_both_stages_have_it_and_a_changed_one_makes_clips_again(model, base, tmp_path, networks, monkeypatch):
    written = []
    for stage in ("keyframe", "video"):
        write = getattr(SampleFolder, f"write_{stage}")
        monkeypatch.setattr(SampleFolder, f"write_{stage}", lambda *a, w=write, s=stage: written.append(s) or w(*a))
    folder = SampleFolder(tmp_path / "samples", ("frames",))
    item = PromptItem("a red star", "0")

    def run(*lora: str, own: tuple[str, ...] | None = None) -> list[str]:
        written.clear()
        settings = SamplingSettings(num_inference_steps=1), KeyframeSettings(lora=own), MemorySettings()
        Sampler(str(model), *settings, "cpu", progress=False, lora=lora).run([item], folder)
        return list(written)

    weights = lora_files.layers(networks.unet, networks.text_encoder, [*lora_files.UNET, "conv_out"], size=10.0)
    style = lora_files.kohya(tmp_path / "one", weights)
    assert (run(), run()) == (["keyframe", "video"], [])
    plain = folder.load("0")
    assert run(str(style)) == ["keyframe", "video"]
    styled = folder.load("0")
    record = {"name": "kohya.safetensors", "scale": 1.0, "sha256": hash_file(style)}
    assert folder.record(item)["lora"] == folder.record(item)["keyframe"]["lora"] == [record]
    # Stage 1 draws what diffusers' own pipeline draws with it.
    image = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    image.load_lora_weights(str(style))
    drawn = image("a red star", generator=item.generator("keyframe"), num_inference_steps=1, guidance_scale=1.0).images[
        0
    ]
    assert abs(np.asarray(drawn).astype(int) - styled.keyframe).max() <= 1
    assert abs(plain.keyframe.astype(int) - styled.keyframe).mean() > 2

    moved = style.rename((tmp_path / "two").mkdir() or tmp_path / "two" / style.name)
    assert run(f"{moved}:1.0") == []
    assert run(f"{moved}:0.5", own=()) == ["keyframe", "video"]
    assert np.array_equal(folder.load("0").keyframe, plain.keyframe)
    lora_files.kohya(tmp_path / "two", lora_files.layers(networks.unet, None, seed=1))
    assert run(f"{moved}:0.5", own=()) == ["video"]
    assert run(own=()) == ["video"] and np.array_equal(folder.load("0").frames, plain.frames)


def test_stage_1_goes_without_what_is_not_for_it(model, tmp_path, networks, caplog):
    """A motion LoRA, without a word; one that does not fit another model, with one; one that it is told to take is an error."""
    video = load_pipeline(model)
    motion = {f"unet.{name}": value for name, value in _motion_weights(video.unet).items()}
    save_file(motion, tmp_path / "motion.safetensors")
    other = tiny.base_folder(tmp_path / "other", block_out_channels=(32, 32))
    style = str(
        lora_files.kohya(tmp_path, lora_files.layers(networks.unet, None, lora_files.UNET + lora_files.CONVOLUTIONS))
    )

    def run(loras: str, **keyframe) -> dict:
        folder = SampleFolder(tmp_path / f"{len(list(tmp_path.iterdir()))}", ("frames",))
        settings = SamplingSettings(num_inference_steps=1), KeyframeSettings(**keyframe), MemorySettings()
        Sampler(str(model), *settings, "cpu", progress=False, lora=[loras]).run([PromptItem("a red star", "0")], folder)
        return folder.record(PromptItem("", "0"))

    record = run(str(tmp_path / "motion.safetensors"))
    assert record["keyframe"]["lora"] == [] and len(record["lora"]) == 1 and "stage 1" not in caplog.text
    record = run(style, pretrained_model_name_or_path=str(other))
    assert record["keyframe"]["lora"] == [] and "stage 1 draws without LoRA" in caplog.text
    with pytest.raises(UserError, match="does not fit the model: unet"):
        run(style, pretrained_model_name_or_path=str(other), lora=(style,))


def _motion_weights(unet) -> dict[str, torch.Tensor]:
    weight = unet.get_submodule("temporal_transformers.0.to_qkv").weight
    a, b = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
    return {f"temporal_transformers.0.to_qkv.lora_{name}.weight": value for name, value in (("A", a), ("B", b))}

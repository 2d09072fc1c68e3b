"""Bases: from a folder or from the hub's cache, what is refused as one, and Stable Diffusion at its real width."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from fixtures import tiny
from fixtures.tiny_training import reset_accelerator
from fixtures.tiny_unet import EVERYTHING, network
from microcinema.commands import cli
from microcinema.config.compose import compose
from microcinema.diffusion.schedule import check_keeps_prediction_type, make_scheduler
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines import loading
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.loading import load_index
from microcinema.utils.errors import UserError

SD15, SD21 = (compose("train", [f"base={name}"]).base.pretrained_model_name_or_path for name in ("sd15", "sd21"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {flavour: tiny.base_folder(tmp_path_factory.mktemp(flavour), flavour) for flavour in tiny.FLAVOURS}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and no connection to it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(a, b) for (name, a), (twin, b) in pairs)


# From the hub's cache


@pytest.mark.parametrize("option, flavour", [("sd15", "sd15"), ("sd21", "sd21"), ("sd21_base", "sd15")])
def test_a_base_opens_from_the_cache_while_offline(folders, cache, option, flavour):
    wanted = compose("train", [f"base={option}"]).base
    tiny.into_hub_cache(folders[flavour], cache, wanted.pretrained_model_name_or_path)
    base, local = load_base(**vars(wanted)), load_base(folders[flavour])
    assert base.scheduler.config["prediction_type"] == wanted.prediction_type
    for part in ("unet", "vae", "text_encoder"):
        assert same_weights(getattr(base, part), getattr(local, part)), part


def test_a_revision_is_a_branch_or_a_commit(folders, cache, tmp_path):
    tiny.into_hub_cache(folders["sd15"], cache, SD15)
    other = tiny.base_folder(tmp_path / "other", seed=1)
    commit = tiny.into_hub_cache(other, cache, SD15, revision="second")
    for revision in ("second", commit):
        base = load_base(SD15, revision=revision)
        assert same_weights(base.unet, load_base(other).unet)
        assert not same_weights(base.unet, load_base(SD15).unet)
    with pytest.raises(UserError, match=r"'third'|revision third.*--revision third"):
        load_base(SD15, revision="third")
    with pytest.raises(UserError, match="no revision 'second'; set revision=null"):
        load_base(other, revision="second")


def test_a_variant_is_which_weight_files(folders, cache, tmp_path):
    both = shutil.copytree(folders["sd15"], tmp_path / "both")
    half = tiny.base_pipeline(tmp_path / "half", seed=1).to(torch.float16)
    half.save_pretrained(both, variant="fp16")
    assert (both / "unet/diffusion_pytorch_model.fp16.safetensors").exists()
    tiny.into_hub_cache(both, cache, SD15)
    base = load_base(SD15, variant="fp16")
    assert same_weights(base.unet, half.unet.float())
    assert same_weights(base.text_encoder, half.text_encoder.float())
    assert same_weights(load_base(SD15).unet, load_base(folders["sd15"]).unet)
    with pytest.raises(UserError, match="no weights of variant=fp16; it has variant=null"):
        load_base(folders["sd15"], variant="fp16")
    for name in ("unet", "vae"):
        (both / name / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="no weights of variant=null; it has variant=fp16"):
        load_base(both)


def test_what_is_fetched_of_a_repository_is_safetensors_of_one_variant(monkeypatch):
    repository = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "feature_extractor/preprocessor_config.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
    ]
    asked = {}

    def download(name, **options):
        kept = filter_repo_objects(repository, allow_patterns=options["allow_patterns"])
        asked[options["revision"]] = sorted(kept)
        return "folder"

    monkeypatch.setattr(loading, "snapshot_download", download)
    assert loading.download_snapshot(SD15, revision="settings") == "folder"
    settings = sorted(name for name in repository if name.endswith((".json", ".txt")))
    assert asked["settings"] == settings
    parts = ("unet", "text_encoder", "tokenizer")
    loading.download_snapshot(SD15, parts, "plain")
    plain = ["text_encoder/model.safetensors", "unet/diffusion_pytorch_model.safetensors"]
    assert asked["plain"] == sorted([*settings, *plain])
    loading.download_snapshot(SD15, parts, "half", "fp16")
    half = ["text_encoder/model.fp16.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"]
    assert asked["half"] == sorted([*settings, *half])


@pytest.mark.parametrize(
    "kind, said",
    [
        (errors.RepositoryNotFoundError, "neither a folder nor a public repository of the hub"),
        (errors.GatedRepoError, "is gated"),
        (errors.RevisionNotFoundError, "name a branch, tag or commit"),
        (errors.LocalEntryNotFoundError, "the hub cannot be reached"),
        (OSError, "No space left"),
    ],
)
def test_why_nothing_could_be_fetched_is_told_in_one_line(monkeypatch, kind, said):
    def download(*_, **__):
        error = kind.__new__(kind, "No space left\nby the way")
        raise error

    monkeypatch.setattr(loading, "snapshot_download", download)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UserError, match=said) as error:
        load_base(SD15)
    assert SD15 in str(error.value) and "\n" not in str(error.value)


def test_a_name_that_is_neither_a_folder_nor_a_repository_is_told_so(cache):
    with pytest.raises(UserError, match="'models/stable diffusion' is neither a folder nor"):
        load_base("models/stable diffusion")
    with pytest.raises(UserError, match="'models/sd15' is not a folder and not complete in the hub's cache"):
        load_base("models/sd15")


def test_a_cached_repository_without_its_weights_is_named(folders, cache, tmp_path):
    part = shutil.copytree(folders["sd15"], tmp_path / "part", ignore=shutil.ignore_patterns("*.safetensors"))
    tiny.into_hub_cache(part, cache, SD15)
    with pytest.raises(UserError, match="stable-diffusion-v1-5.*vae' has no weights"):
        load_base(SD15)
    assert load_index(SD15)["_class_name"] == "StableDiffusionPipeline"


@pytest.mark.slow
def test_the_command_line_says_how_to_fetch_what_is_not_there_while_offline(tmp_path):
    """As a user has it: by environment variables, in a process of its own."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    arguments = ["train", "base=sd15", "base.revision=main", "base.variant=fp16", f"output_dir={tmp_path / 'run'}"]
    code = "import sys; from microcinema.commands.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for part in (SD15, "HF_HUB_OFFLINE=1", str(tmp_path / "hub"), f"hf download {SD15} --revision main --include"):
        assert part in done.stderr
    assert '"*model.fp16.safetensors"' in done.stderr
    assert not (tmp_path / "hub").exists() or not any((tmp_path / "hub").rglob("*.safetensors"))


# What cannot be a base


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def transformer(kind, network):
    def make(folder):
        edit_json(folder / "model_index.json", _class_name=kind, transformer=["diffusers", network])
        index = json.loads((folder / "model_index.json").read_text())
        del index["unet"]
        (folder / "model_index.json").write_text(json.dumps(index))
        shutil.rmtree(folder / "unet")

    return make


def unet_config(**changes):
    return lambda folder: edit_json(folder / "unet/config.json", **changes)


def as_refiner(folder):
    shutil.rmtree(folder)
    tiny.sdxl_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    names = {"_class_name": "StableDiffusionXLImg2ImgPipeline", "text_encoder": [None, None], "tokenizer": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index | names))


def without_second_encoder(folder):
    shutil.rmtree(folder)
    tiny.sdxl_folder(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps(index | {"text_encoder_2": [None, None], "tokenizer_2": [None, None]})
    )
    edit_json(folder / "unet/config.json", cross_attention_dim=tiny.WIDTH)


def as_inpainting(folder):
    shutil.rmtree(folder)
    tiny.base_folder(folder, in_channels=9)
    edit_json(folder / "model_index.json", _class_name="StableDiffusionInpaintPipeline")


def as_pickles(folder):
    for file in folder.rglob("*.safetensors"):
        stem = "pytorch_model" if file.parent.name in ("text_encoder", "safety_checker") else file.stem
        torch.save(load_file(file), file.with_name(f"{stem}.bin"))
        file.unlink()


def as_flow_matching(folder):
    FlowMatchEulerDiscreteScheduler().save_pretrained(folder / "scheduler")


@pytest.mark.parametrize(
    "make, said",
    [
        (
            transformer("PixArtAlphaPipeline", "PixArtTransformer2DModel"),
            "PixArtAlphaPipeline.*PixArtTransformer2DModel",
        ),
        (transformer("StableDiffusion3Pipeline", "SD3Transformer2DModel"), "SD3Transformer2DModel.*key frames alone"),
        (transformer("FluxPipeline", "FluxTransformer2DModel"), "FluxPipeline.*use a Stable Diffusion 1.x, 2.x or XL"),
        (as_refiner, "has no text_encoder"),
        (without_second_encoder, "unet of .*mismatch|reads two text encoders"),
        (unet_config(addition_embed_type="image"), "addition_embed_type='image'.*1.x, 2.x or XL"),
        (as_inpainting, "StableDiffusionInpaintPipeline.*9 input and 4 output channels"),
        (unet_config(time_cond_proj_dim=256), "time_cond_proj_dim=256"),
        (unet_config(class_embed_type="projection"), "class_embed_type='projection'"),
        (as_pickles, "pickle.*safetensors.*from_pretrained.*save_pretrained"),
        (as_flow_matching, "FlowMatchEulerDiscreteScheduler.*no betas"),
        (lambda folder: (folder / "unet/config.json").unlink(), "cannot read the unet's config"),
    ],
)
def test_the_command_line_refuses_it_in_one_line(folders, tmp_path, capsys, make, said):
    folder = shutil.copytree(folders["sd15"], tmp_path / "base")
    make(folder)
    assert_refused(tmp_path, capsys, said, f"base.pretrained_model_name_or_path={folder}")


def assert_refused(tmp_path, capsys, said, *overrides):
    reset_accelerator()
    capsys.readouterr()
    assert cli.main(["train", f"output_dir={tmp_path / 'run'}", *overrides]) == 2
    shown = re.sub(r"\r?Loading weights:[^\r\n]*[\r\n]", "", capsys.readouterr().err)
    assert shown.startswith("error: ") and shown.count("\n") == 1
    assert re.search(said, shown), shown


@pytest.mark.parametrize(
    "name, said",
    [
        ("v1-5-pruned.safetensors", "cannot read the single file 'v1-5-pruned.safetensors'"),
        ("models/sd-v1-4.ckpt", "is a pickle.*from_single_file.*save_pretrained"),
    ],
)
def test_a_single_file_that_cannot_be_read_is_refused(tmp_path, capsys, name, said):
    assert_refused(tmp_path, capsys, said, f"base.pretrained_model_name_or_path={name}")


def test_pickles_convert_by_the_command_that_is_told(folders, tmp_path):
    folder = shutil.copytree(folders["sd21"], tmp_path / "base")
    as_pickles(folder)
    with pytest.raises(UserError) as error:
        load_base(folder)
    code = str(error.value).partition('python -c "')[2].rstrip('"')
    exec(code, {})
    assert same_weights(load_base(f"{folder}-safetensors").unet, load_base(folders["sd21"]).unet)


# What the base says wins


def test_a_prediction_type_that_its_files_contradict_is_refused_with_both(folders, tmp_path, capsys):
    said = "base.prediction_type is epsilon.*says v_prediction.*null"
    assert_refused(tmp_path, capsys, said, "base=sd15", f"base.pretrained_model_name_or_path={folders['sd21']}")
    assert (
        load_base(folders["sd21"], prediction_type="v_prediction").scheduler.config["prediction_type"] == "v_prediction"
    )


def test_frozen_layers_keep_the_target_that_they_know(folders, tmp_path, capsys):
    said = "diffusion.scheduler.prediction_type is v_prediction.*trained with epsilon.*=epsilon, or trainable_parameters=all"
    base = f"base.pretrained_model_name_or_path={folders['sd15']}"
    assert_refused(tmp_path, capsys, said, base, "diffusion.scheduler.prediction_type=v_prediction")


def test_an_override_that_says_what_the_base_says_is_none():
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    check_keeps_prediction_type(make_scheduler(scheduler.config, {"beta_schedule": "linear"}), "v_prediction")


# At the width of the real models, without their gigabytes

COMMON = {
    "act_fn": "silu",
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
# The published unet/config.json of each, and how many parameters it has.
PUBLISHED = {
    "sd15": ({**COMMON, "attention_head_dim": 8, "cross_attention_dim": 768, "sample_size": 64}, 859_520_964),
    "sd21": (
        {
            **COMMON,
            "attention_head_dim": [5, 10, 20, 20],
            "cross_attention_dim": 1024,
            "dual_cross_attention": False,
            "num_class_embeds": None,
            "only_cross_attention": False,
            "sample_size": 96,
            "upcast_attention": True,
            "use_linear_projection": True,
        },
        865_910_724,
    ),
}


OTHERS = {
    "keyframe_conv_in.",
    "appear_net.",
    "injections.",
    "image_adapter.",
    "image_gates.",
    "pixel_pyramid.",
    "pixel_attentions.",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_at_full_width_exactly_the_temporal_and_injection_keys_are_missing(name):
    settings, parameters = PUBLISHED[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(settings)
        video = network(unet, *EVERYTHING)
        reference = network(unet, "microcinema_once").reference_net
    assert sum(parameter.numel() for parameter in unet.parameters()) == parameters
    base = {key: tensor.shape for key, tensor in unet.state_dict().items()}
    inside = ("temporal_first_convs.", "temporal_second_convs.", "temporal_resample_convs.", "temporal_transformers.")
    embeddings = ("fps_embedding.", "frame_embedding.")
    unused = ("conv_norm_out.", "conv_out.")
    for part, added, dropped in (
        (video, (*inside, *embeddings, *(prefix for prefix in VideoUNet.new_prefixes if prefix in OTHERS)), ()),
        (video.appear_net, (*inside, *embeddings, "keyframe_conv."), ("up_blocks.", *unused)),
        (reference, ("projections.",), unused),
    ):
        own = {key: tensor.shape for key, tensor in part.state_dict().items()}
        missing, unused = own.keys() - base.keys(), base.keys() - own.keys()
        assert all(any(key.startswith(prefix) for key in missing) for prefix in added)
        assert all(key.startswith(added) for key in missing)
        assert all(key.startswith(dropped) for key in unused) if dropped else not unused
        assert all(own[key] == base[key] for key in own.keys() & base.keys())
    assert (
        len(video.temporal_first_convs) == len(video.temporal_second_convs) == 22
        and len(video.temporal_transformers) == 16
    )
    assert len(reference.projections) == 22 and len(video.injections) == 8 + 12
    assert len(video.temporal_resample_convs) == 6 and len(video.pixel_attentions) == 12

"""Single-file checkpoints with the makers' own keys, as base and for key frames; what is refused."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from fixtures import ldm_keys, tiny
from fixtures.tiny_training import reset_accelerator
from microcinema.commands import cli, doctor
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.loading import resolve_model_path
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.utils.errors import UserError

FAMILIES = ("sd15", "sd21", "sdxl")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A single file of each family, with the folder of its configs, without weights, beside it; and the whole folder it was made of."""
    made = {}
    for family in FAMILIES:
        folder = tmp_path_factory.mktemp(family)
        # Two layers a block and 2D attention, as the published ones, for every key to have its kind.
        whole = tiny.sdxl_folder(folder / "whole") if family == "sdxl" else tiny.base_folder(folder / "whole", family)
        shutil.copytree(whole, folder / "model", ignore=shutil.ignore_patterns("*.safetensors"))
        made[family] = ldm_keys.single_file(whole, folder / "model.safetensors"), whole
    return made


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == twin and torch.equal(a, b) for (name, a), (twin, b) in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_single_file_is_the_base_that_it_was_made_of(files, family):
    file, whole = files[family]
    one, other = load_base(file), load_base(whole)
    networks = ["unet", "vae", "text_encoder", *(["text_encoder_2"] if family == "sdxl" else [])]
    for name in networks:
        assert same_weights(getattr(one, name), getattr(other, name)), name
        assert not any(weight.requires_grad for weight in getattr(one, name).parameters())
    assert one.scheduler.config == other.scheduler.config
    assert one.tokenizer.get_vocab() == other.tokenizer.get_vocab()
    assert load_base(file, torch_dtype=torch.float16).unet.dtype == torch.float16
    settings = load_base(file, weights=False)
    assert {k: v.shape for k, v in settings.unet.state_dict().items()} == {
        k: v.shape for k, v in other.unet.state_dict().items()
    }


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_key_frames_of_a_single_file_are_those_of_its_folder(files, family):
    size = 2 * tiny.SIZE if family == "sdxl" else tiny.SIZE
    frames = []
    for name in files[family]:
        pipeline = KeyframePipeline.from_pretrained(name)
        pipeline.set_progress_bar_config(disable=True)
        rng = torch.Generator().manual_seed(0)
        frames += pipeline(["a red star"], size, size, [rng], num_inference_steps=2)
    assert frames[0].provenance["sha256_of_pixels"] == frames[1].provenance["sha256_of_pixels"]
    assert frames[0].provenance["source"] == str(files[family][0])


@pytest.mark.slow
def test_a_light_pipeline_takes_its_encoders_from_a_single_file(files, tmp_path):
    file, whole = files["sd15"]
    pipeline = tiny.video_pipeline(whole, base=str(file))
    save_pipeline(pipeline, tmp_path / "light", with_base=False)
    again = load_pipeline(tmp_path / "light")
    assert same_weights(again.vae, pipeline.vae) and same_weights(again.text_encoder, pipeline.text_encoder)


@pytest.mark.slow
def test_train_and_sample_from_a_single_file(files, tmp_path):
    file, _ = files["sd15"]
    train = [f"base.pretrained_model_name_or_path={file}", f"resolution={tiny.SIZE}", "num_frames=2"]
    train += ["train_batch_size=1", "max_train_steps=1", "lr_warmup_steps=0", "dataloader_num_workers=0"]
    train += ["report_to=null", f"data.root={tmp_path / 'clips'}", f"output_dir={tmp_path / 'run'}"]
    sample = [f"pipeline={tmp_path / 'video'}", "prompt=a red star", "num_inference_steps=1"]
    for arguments in (
        ["prepare", "sprites", f"output_dir={tmp_path / 'clips'}", "num_videos=1"],
        ["train", *train],
        ["export", f"checkpoint={tmp_path / 'run/checkpoint-1'}", f"output_dir={tmp_path / 'video'}"],
        ["sample", *sample, f"output_dir={tmp_path / 'out'}"],
    ):
        reset_accelerator()
        assert cli.main(arguments) == 0
    (record,) = (tmp_path / "out").glob("*_keyframe.json")
    assert json.loads(record.read_text())["source"] == str(file)  # stage 1 is the base
    assert "huggingface.co" not in (tmp_path / "video/README.md").read_text().split("---")[1]


def test_configs_of_the_hub_serve_files_without_a_folder(files, tmp_path, monkeypatch):
    """From its cache; where it is empty, the error says how to fill it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for family, repository in (
        ("sd15", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
        ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0"),
    ):
        file, whole = files[family]
        alone = shutil.copy(file, tmp_path / f"{family}.safetensors")
        with pytest.raises(UserError, match=f"{repository}.*hf download {repository}"):
            load_base(alone)
        tiny.into_hub_cache(file.with_suffix(""), tmp_path / "hub", repository)
        assert same_weights(load_base(alone).unet, load_base(whole).unet)
    alone = shutil.copy(files["sd21"][0], tmp_path / "sd21.safetensors")
    with pytest.raises(UserError, match="does not say what it predicts.*hf download .*--local-dir"):
        load_base(alone)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".pth", ".bin"])
def test_a_pickle_is_refused_unread_with_the_command_that_converts_it(tmp_path, suffix):
    file = tmp_path / f"model{suffix}"
    file.write_bytes(b"never read")
    for open_it in (load_base, KeyframePipeline.from_pretrained):
        with pytest.raises(UserError, match=r"is a pickle.*from_single_file\('.*'\)\.save_pretrained\(folder\)"):
            open_it(file)


def test_what_is_no_whole_checkpoint_is_refused_in_one_line(files, tmp_path):
    file, _ = files["sd15"]
    weights = load_file(file)
    shutil.copytree(file.with_suffix(""), tmp_path / "part")
    shutil.copytree(file.with_suffix(""), tmp_path / "other")
    save_file({k: v for k, v in weights.items() if "middle_block.2" not in k}, tmp_path / "part.safetensors")
    with pytest.raises(UserError, match=r"single file '.*part.safetensors' cannot be opened.*is it complete"):
        load_base(tmp_path / "part.safetensors")
    save_file({"lora_unet.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match="is no single file of a whole Stable Diffusion"):
        load_base(tmp_path / "lora.safetensors")
    shutil.copy(files["sdxl"][0], tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="cannot be opened with the configs of '.*other'"):
        load_base(tmp_path / "other.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:100])
    for name in ("cut", "missing"):
        with pytest.raises(UserError, match=f"cannot read the single file '.*{name}.safetensors'"):
            resolve_model_path(tmp_path / f"{name}.safetensors")


def test_doctor_knows_single_files(files):
    finding, folder = doctor.base(str(files["sd15"][0]), None, None)
    assert finding.status == doctor.OK and "single file" in finding.found
    assert folder == str(files["sd15"][0].with_suffix(""))


def test_configs_that_name_code_from_elsewhere_are_refused(files, tmp_path):
    file = shutil.copy(files["sd15"][0], tmp_path / "model.safetensors")
    index = shutil.copytree(files["sd15"][0].with_suffix(""), tmp_path / "model") / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"feature_extractor": ["os", "system"]}))
    for open_it in (load_base, KeyframePipeline.from_pretrained):
        with pytest.raises(UserError, match="code from elsewhere"):
            open_it(file)

import pytest
import torch
from safetensors.torch import load_file

from fixtures import tiny
from microcinema.models.conditioning import ConditionEncoder
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.training.warm_start import warm_start, warm_start_summary
from microcinema.utils.errors import UserError


def test_what_has_the_same_name_and_shape_starts_from_the_saved_model(tmp_path):
    saved = tiny.video_pipeline(tmp_path / "base", fusion="add")
    save_pipeline(saved, tmp_path / "saved", with_base=False)
    base = tiny.unet()
    networks = {
        "unet": VideoUNet.from_unet2d(base, max_frames=4, motion_attention=True),
        "condition_encoder": ConditionEncoder.from_unet2d(base, fusion=None, motion_attention=True, motion_width=12),
    }
    before = {name: value.clone() for name, value in networks["unet"].state_dict().items()}
    new = warm_start(networks, str(tmp_path / "saved"))
    own = saved.unet.state_dict()
    for name, value in networks["unet"].state_dict().items():
        wanted = before[name] if name in new["unet"] else own[name]
        assert torch.equal(value, wanted), name
    # The position tables are of another length, and there was no motion attention.
    assert {name.split(".")[-1] for name in new["unet"] if "motion" not in name} == {"positions"}
    assert all("motion" in name for name in new["condition_encoder"])
    summary = warm_start_summary(new, "saved")
    assert "newly initialized: temporal_transformers" in summary and "motion_to_kv" in summary


def test_a_folder_without_a_video_model_is_refused(tmp_path):
    networks = {"unet": VideoUNet.from_unet2d(tiny.unet())}
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="none of the video UNet's weights"):
        warm_start(networks, str(tmp_path))
    (tmp_path / "unet/a.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        warm_start(networks, str(tmp_path))


def test_a_light_folder_leaves_out_the_weights_that_stayed_an_embedded_models(tmp_path, monkeypatch):
    monkeypatch.setattr("microcinema.pipelines.loading.ASSETS", tmp_path)
    saved = tiny.video_pipeline(tmp_path / "base", fusion=None, stirred=False)
    saved.register_to_config(unet_source="base")
    changed = "conv_in.weight"
    with torch.no_grad():
        saved.unet.get_parameter(changed).add_(0.5)
    save_pipeline(saved, tmp_path / "light", with_base=False)
    kept = load_file(tmp_path / "light/unet/diffusion_pytorch_model.safetensors")
    assert changed in kept
    assert {name for name in kept if name != changed} == {n for n in kept if n.startswith(VideoUNet.new_prefixes)}
    opened = load_pipeline(tmp_path / "light").unet.state_dict()
    assert opened.keys() == saved.unet.state_dict().keys()
    assert all(torch.equal(opened[name], value) for name, value in saved.unet.state_dict().items())
    torch.manual_seed(1)
    fresh = VideoUNet.from_config(saved.unet.config)
    assert warm_start({"unet": fresh}, str(tmp_path / "light")) == {"unet": []}
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in opened.items())
    save_pipeline(saved, tmp_path / "whole")
    assert len(load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")) == len(opened)
    assert torch.equal(load_pipeline(tmp_path / "whole").unet.conv_in.weight, opened[changed])
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="UNet.s weights .* are missing"):
        load_pipeline(tmp_path / "light")

import pytest
import torch
from safetensors.torch import load_file

from fixtures import tiny
from fixtures.tiny_unet import network
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.training.warm_start import warm_start, warm_start_summary
from microcinema.utils.errors import UserError


def test_what_has_the_same_name_and_shape_starts_from_the_saved_model(tmp_path):
    saved = tiny.video_pipeline(tmp_path / "base")
    save_pipeline(saved, tmp_path / "saved", with_base=False)
    unet = network(
        tiny.unet(), "microcinema", "model.max_frames=4", "model.appearance=null", "model.motion_encoder=any"
    )
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    new, own = warm_start(unet, str(tmp_path / "saved")), saved.unet.state_dict()
    for name, value in unet.state_dict().items():
        assert torch.equal(value, before[name] if name in new else own[name]), name
    # The position tables are of another length, and the motion tokens of another width than the text.
    assert {".".join(name.split(".")[2:]) for name in new} == {"positions", "to_text_kv.weight"}
    assert warm_start_summary(new, "saved").endswith("from 'saved'; newly initialized: temporal_transformers (8)")


def test_appear_net_starts_as_a_copy_of_a_main_branch_that_has_none(tmp_path):
    saved = tiny.video_pipeline(tmp_path / "base", model="plain")
    save_pipeline(saved, tmp_path / "saved", with_base=False)
    unet = network(tiny.unet(), "microcinema", "model.temporal.convolutions=after")
    new, own = warm_start(unet, str(tmp_path / "saved")), saved.unet.state_dict()
    for part in ("conv_in.weight", "mid_block.resnets.0.conv1.weight", "temporal_convs.0.taps.weight"):
        assert torch.equal(unet.state_dict()[f"appear_net.{part}"], own[part]) and f"appear_net.{part}" not in new
    assert {name.split(".")[0] for name in new} == {"appear_net", "injections", "temporal_transformers"}


def test_a_folder_without_a_video_model_is_refused(tmp_path):
    unet = network(tiny.unet())
    (tmp_path / "unet").mkdir()
    with pytest.raises(UserError, match="none of the video UNet's weights"):
        warm_start(unet, str(tmp_path))
    (tmp_path / "unet/a.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="cannot be read"):
        warm_start(unet, str(tmp_path))


def test_a_light_folder_leaves_out_the_weights_that_stayed_an_embedded_models(tmp_path, monkeypatch):
    monkeypatch.setattr("microcinema.pipelines.loading.ASSETS", tmp_path)
    saved = tiny.video_pipeline(tmp_path / "base", model="plain", stirred=False)
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
    assert warm_start(fresh, str(tmp_path / "light")) == []
    assert all(torch.equal(fresh.state_dict()[name], value) for name, value in opened.items())
    save_pipeline(saved, tmp_path / "whole")
    assert len(load_file(tmp_path / "whole/unet/diffusion_pytorch_model.safetensors")) == len(opened)
    assert torch.equal(load_pipeline(tmp_path / "whole").unet.conv_in.weight, opened[changed])
    (tmp_path / "base/unet/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(UserError, match="UNet.s weights .* are missing"):
        load_pipeline(tmp_path / "light")

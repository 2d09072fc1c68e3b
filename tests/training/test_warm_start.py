"""Runs that start from a model trained earlier: its weights, and the schedule and target that they know."""

import itertools
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from fixtures import tiny, tiny_training
from fixtures.tiny_unet import network
from microcinema.commands import cli
from microcinema.config.compose import compose
from microcinema.diffusion.schedule import make_sampler, make_scheduler, match_snr_timesteps, schedule_summary
from microcinema.models.video_unet import VideoUNet
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.profiling.memory_estimate import empty_pipeline
from microcinema.training.build import check_schedule
from microcinema.training.warm_start import known_schedule, warm_start, warm_start_summary
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


# The target and the noise levels that the weights know

ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
FACTORIZED = "diffusion=factorized_dreamer"


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """An epsilon base; a first stage that was trained whole for v, with more noise, as a pipeline and as a checkpoint."""
    folder = tmp_path_factory.mktemp("stages")
    model = tiny.video_pipeline(folder / "base", model="plain")
    base = make_scheduler(model.scheduler.config)
    schedule = make_scheduler(base.config, {**ZERO_SNR, "snr_shift": 2.0})
    model.scheduler = make_sampler(schedule)
    model.register_to_config(training_schedule=schedule_summary(schedule), network_schedule=schedule_summary(base))
    save_pipeline(model, folder / "stage1")
    clips = tiny_training.LatentClips()
    run = tiny_training.train(
        model, clips, folder / "run", max_train_steps=1, report_to=None, trainable_parameters="all"
    )
    return folder, base, run / "checkpoint-1"


def config_of(stages, source, *overrides):
    folder, _, checkpoint = stages
    source = {"pipeline": folder / "stage1", "checkpoint": checkpoint, "base": folder / "base", None: None}[source]
    start = f"init_weights_from={'null' if source is None else source}"
    base = f"base.pretrained_model_name_or_path={folder / 'base'}"
    return compose("train", ["model=plain", f"resolution={tiny.SIZE}", "num_frames=4", base, start, *overrides])


SAMPLE = [("temporal", None), ("temporal", "checkpoint"), ("all", "checkpoint")]  # in the quick round


@pytest.mark.parametrize(
    "trainable, source",
    [
        pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.slow)
        for case in itertools.product(["temporal", "all"], [None, "base", "pipeline", "checkpoint"])
    ],
)
@pytest.mark.parametrize("target", ["epsilon", "v_prediction"])
def test_frozen_layers_keep_their_target_wherever_they_come_from(stages, source, target, trainable):
    knows = "v_prediction" if source in ("pipeline", "checkpoint") else "epsilon"
    overrides = [f"diffusion.scheduler.prediction_type={target}", f"trainable_parameters={trainable}"]
    config = config_of(stages, source, *overrides)
    if trainable == "all" or target == knows:
        check_schedule(config, stages[1])
    else:
        with pytest.raises(
            UserError, match=f"is {target}, but the frozen layers were trained with {knows}; set .*={knows}"
        ):
            check_schedule(config, stages[1])


def test_the_command_refuses_the_wrong_target_and_takes_the_right_one(stages, tmp_path, capsys):
    config = config_of(stages, "checkpoint", FACTORIZED, "trainable_parameters=temporal")
    pipeline = empty_pipeline(config)
    wanted = match_snr_timesteps(pipeline.training_scheduler, stages[1])  # the base's timesteps, as in the first stage
    assert torch.equal(pipeline.remapped_timesteps, wanted)
    names = [
        f"base.pretrained_model_name_or_path={stages[0] / 'base'}",
        f"init_weights_from={config.init_weights_from}",
    ]
    assert cli.main(["train", "model=plain", *names, f"output_dir={tmp_path / 'run'}"]) == 2
    assert "trained with v_prediction; set" in capsys.readouterr().err.splitlines()[-1]


def test_the_noise_levels_are_those_that_the_starting_model_knows(stages, tmp_path):
    """A model of another base: its own timesteps count, not those of the base that lends the other networks."""
    folder, base, _ = stages
    other = tiny.video_pipeline(folder / "base", model="plain")
    schedule = make_scheduler(base.config, {"beta_schedule": "linear"})
    other.register_to_config(training_schedule=schedule_summary(schedule))
    save_pipeline(other, tmp_path / "other", with_base=False)
    assert known_schedule(str(tmp_path / "other"), base) == (schedule_summary(schedule), "epsilon")
    config = config_of(stages, None)
    levels, _ = known_schedule(str(tmp_path / "other"), base)
    assert known_schedule(str(folder / "base" / "unet"), base) == (schedule_summary(base), "epsilon")  # says nothing
    pipeline = empty_pipeline(replace(config, init_weights_from=str(tmp_path / "other")))
    assert pipeline.config["network_schedule"] == levels
    assert torch.equal(pipeline.remapped_timesteps, match_snr_timesteps(pipeline.training_scheduler, schedule))


@pytest.mark.parametrize("overrides", [["trainable_parameters=all"], []])
def test_epsilon_with_zero_terminal_snr_is_refused_at_the_start(stages, overrides):
    config = config_of(stages, None, "diffusion.scheduler.rescale_betas_zero_snr=true", *overrides)
    with pytest.raises(UserError, match="zero terminal SNR.*epsilon; use prediction_type=v_prediction"):
        check_schedule(config, stages[1])

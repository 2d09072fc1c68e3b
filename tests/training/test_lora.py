"""Training of a LoRA: what trains, what is saved, and that it is used as it was trained."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures import tiny, tiny_training
from fixtures.tiny_training import LatentClips, logged, make_config, pipeline, train, weights
from microcinema.commands import cli
from microcinema.config.compose import compose
from microcinema.config.schema import LoRA
from microcinema.models.lora import add_lora
from microcinema.pipelines.saving import save_pipeline
from microcinema.sprites.dataset import write_dataset
from microcinema.utils.errors import UserError

MOTION = LoRA(rank=2, alpha=3.0, targets="temporal", dropout=0.1)
SPATIAL = r"(down_blocks|mid_block|up_blocks)\.\S*\.attn[12]\.to_(q|k|v|out\.0)"
FILE = "pytorch_lora_weights.safetensors"


def model(folder: Path, seed: int = 0):
    """A fresh one whose temporal layers have an effect."""
    video = pipeline(folder, seed)
    for name, parameter in video.unet.named_parameters():
        if name.startswith("temporal_") and not parameter.any():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return video


def run(video, folder: Path, lora: LoRA = MOTION, **changes) -> Path:
    changes = {"init_weights_from": "a model", "report_to": None, "learning_rate": 1e-2, **changes}
    return train(video, LatentClips(), folder, lora=lora, **changes)


def output(unet) -> torch.Tensor:
    rng = torch.Generator().manual_seed(2)
    z, text = torch.randn(1, 4, 4, 8, 8, generator=rng), torch.randn(1, 5, tiny.WIDTH, generator=rng)
    with torch.no_grad():
        return unet(z, 500, unet.encode(text, z[:, 0]))


@pytest.mark.parametrize("targets", ["temporal", "spatial", "both"])
def test_only_the_lora_trains_and_starts_as_nothing(tmp_path, targets):
    video, plain = model(tmp_path), model(tmp_path)
    add_lora(plain.unet, 2, 3.0, targets, 0.0)
    torch.testing.assert_close(output(plain.unet.eval()), output(video.unet.eval()), rtol=0, atol=1e-5)
    before = {name: parameter.clone() for name, parameter in video.unet.named_parameters()}
    run(video, tmp_path / "run", replace(MOTION, targets=targets), max_train_steps=2)
    layers = set()
    for name, parameter in video.unet.named_parameters():
        layer, _, rest = name.partition(".lora_")
        assert parameter.requires_grad is bool(rest)
        if rest:
            layers.add(layer)
            assert "lora_A" in name or parameter.any()  # B has moved from zero
        else:
            assert torch.equal(parameter, before[name.replace(".base_layer.", ".")]), name
    patterns = {"temporal": r"temporal_\S*", "spatial": SPATIAL, "both": rf"{SPATIAL}|temporal_\S*"}
    assert all(re.fullmatch(patterns[targets], layer) for layer in layers)  # none of AppearNet's
    linear = [n for n, m in model(tmp_path).unet.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)]
    assert layers == {name for name in linear if re.fullmatch(patterns[targets], name)}
    state = torch.load(tmp_path / "run/checkpoint-2/optimizer.bin", weights_only=True)
    assert sum(len(group["params"]) for group in state["param_groups"]) == 2 * len(layers)


def test_interrupted_and_resumed_equals_uninterrupted(tmp_path):
    settings = {"checkpointing_steps": 2, "report_to": "tensorboard"}
    whole = run(model(tmp_path), tmp_path / "whole", **settings)
    run(model(tmp_path), tmp_path / "parts", max_train_steps=2, **settings)
    torch.manual_seed(123)
    parts = run(model(tmp_path), tmp_path / "parts", resume_from_checkpoint="latest", **settings)
    assert logged(parts) == logged(whole)
    one, other = weights(whole), weights(parts)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    with pytest.raises(UserError, match=r"lora.alpha was 3\S* and is 4"):
        run(model(tmp_path), tmp_path / "parts", replace(MOTION, alpha=4.0), resume_from_checkpoint="latest")


def test_loaded_it_does_what_it_did_in_training(tmp_path):
    """With alpha other than the rank; the averages are what is saved."""
    video = model(tmp_path)
    folder = run(video, tmp_path / "run", use_ema=False)
    trained, fresh = output(video.unet.eval()), model(tmp_path)
    before = output(fresh.unet.eval())
    fresh.load_lora_weights(folder)
    torch.testing.assert_close(output(fresh.unet), trained, rtol=0, atol=1e-5)
    assert (trained - before).abs().max() > 0.01
    averaged = load_file(run(model(tmp_path), tmp_path / "averaged", ema_decay=0.5) / FILE)
    ema = load_file(tmp_path / "averaged/checkpoint-4/ema.safetensors")
    assert len(averaged) == len(ema)
    for name, value in ema.items():
        torch.testing.assert_close(averaged[name.replace(".default.", ".")], value * (1.5 if "lora_B" in name else 1.0))


@pytest.mark.parametrize(
    "changes, message",
    [
        (["init_weights_from=null"], "a LoRA trains alone"),
        (["trainable_parameters=all"], "a LoRA trains alone"),
        (["trainable_unet_layers=[conv_out]"], "a LoRA trains alone"),
        (["model.flow_model=dis"], "a LoRA trains alone"),
        (["lora.targets=all"], "lora.targets is 'all'"),
        (["lora.rank=0"], "lora.rank is 0"),
    ],
)
def test_what_does_not_go_with_a_lora_is_named(changes, message):
    with pytest.raises(UserError, match=message):
        compose("train", ["lora=motion", "init_weights_from=sprites-microcinema", *changes])
    assert make_config("x").lora is None


def test_the_commands_train_export_and_sample(tmp_path, capsys):
    write_dataset(tmp_path / "clips", num_videos=3, seed=0, progress=False)
    base = tiny.base_folder(tmp_path / "base")
    video = tiny.video_pipeline(base, num_inference_steps=1, guidance_scale=1.0)
    save_pipeline(video, tmp_path / "video")
    keys = {"lora": "motion", "base.pretrained_model_name_or_path": base, "data.root": tmp_path / "clips"}
    keys |= {"init_weights_from": tmp_path / "video", "model.max_frames": 8, "num_frames": 4, "max_train_steps": 2}
    keys |= {"resolution": tiny.SIZE, "output_dir": tmp_path / "run", "report_to": "null", "learning_rate": 0.01}
    keys |= {"train_batch_size": 1, "dataloader_num_workers": 0, "lr_warmup_steps": 0, "ema_decay": 0.5}

    def command(name: str, **changes) -> int:
        tiny_training.reset_accelerator()
        return cli.main([*name.split(), *(f"{key}={value}" for key, value in changes.items())])

    assert command("train", **keys, **{"model": "microcinema_once"}) == 2
    assert "a LoRA needs the whole model; set the keys of model as that model was trained" in capsys.readouterr().err
    assert command("train", **keys) == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} >= {FILE, "README.md"}
    assert not (tmp_path / "run/model_index.json").exists()
    checkpoint = tmp_path / "run/checkpoint-2"
    for folder, averaged in (("averaged", "true"), ("plain", "false")):
        assert command("export", checkpoint=checkpoint, output_dir=tmp_path / folder, use_ema=averaged) == 0
        assert {path.name for path in (tmp_path / folder).iterdir()} == {FILE, "README.md"}
    assert command("export", checkpoint=checkpoint, output_dir=tmp_path / "plain", use_ema="false") == 0  # replaced
    own, averaged, plain = (load_file(tmp_path / folder / FILE) for folder in ("run", "averaged", "plain"))
    assert all(torch.equal(own[key], averaged[key]) for key in own)
    assert own.keys() == plain.keys() and any(not torch.equal(own[key], plain[key]) for key in own)
    card = (tmp_path / "averaged/README.md").read_text()
    assert "# averaged" in card and "motion LoRA" in card and str(tmp_path) not in card
    capsys.readouterr()
    assert command("export", checkpoint=tmp_path / "run", output_dir=tmp_path / "again") == 2
    assert "a finished run holds its LoRA" in capsys.readouterr().err
    sampling = {"pipeline": tmp_path / "video", "prompt": "a red star", "memory.torch_dtype": "float32"}
    for folder, lora in (("with", f"[{tmp_path / 'run'}:2]"), ("without", "[]")):
        assert command("sample", **sampling, lora=lora, output_dir=tmp_path / folder) == 0
    one, other = (next((tmp_path / folder).glob("*.mp4")).read_bytes() for folder in ("with", "without"))
    assert one != other

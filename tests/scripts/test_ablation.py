"""The ablation: what its variants change, and what is published of them."""

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures import tiny_training
from microcinema.commands import sweep
from microcinema.config.compose import compose, plain, save
from microcinema.pipelines.base_model import load_base
from microcinema.training.build import build_networks
from microcinema.training.heldout_loss import RECORD
from microcinema.utils.errors import UserError
from microcinema.utils.files import write_json
from scripts.recipes import ablation, ablation_curves

SCHEDULE_OF_THE_BASE = dict.fromkeys(
    f"diffusion.scheduler.{key}"
    for key in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "snr_shift")
)
WITHOUT_BRANCH = {"model.appearance": None}
CHANGES: dict[str, dict[str, dict[str, Any]]] = {
    "microcinema": {
        "reference_net": {"model.appearance.network": "reference_net", "model.appearance.fusion": "add"},
        "keyframe_concat": {**WITHOUT_BRANCH, "model.keyframe_concat": True},
        "without_keyframe": WITHOUT_BRANCH,
        "injection_into_encoder": {"model.appearance.inject": "encoder"},
        "injection_into_decoder": {"model.appearance.inject": "decoder"},
        "scale_shift": {"model.appearance.fusion": "scale_shift"},
        "add": {"model.appearance.fusion": "add"},
        "light_convolutions": {"model.temporal.convolutions": "after"},
        "without_text_in_time": {"model.temporal.text": False},
        "without_frame_index": {"model.temporal.positions": False, "model.temporal.frame_embedding": False},
        "noise_prior_0": {"diffusion.noise_prior.strength": 0.0},
        "noise_prior_0.1": {"diffusion.noise_prior.strength": 0.1},
    },
    "factorized_dreamer": {
        "without_adapter": {"model.adapter": None},
        "whole_pixel_blocks": {"model.pixels.block": "transformer", "model.pixels.scales": None},
        "without_pixel_attention": {"model.pixels": None},
        "without_t5": {"model.motion_encoder": None},
        "without_predict_net": {"model.flow_model": None},
        "without_schedule": SCHEDULE_OF_THE_BASE,
        "without_keyframe_concat": {"model.keyframe_concat": False},
    },
}


compose_once = functools.cache(compose)


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    return {paper: compose("sweep", [f"sweep=ablation_{paper}"]) for paper in ablation.PAPERS}


@pytest.fixture(scope="module")
def composed(shipped: Any) -> dict[tuple[str, str], Any]:
    return {
        (paper, variant): compose_once("train", (*config.train, *changes))
        for paper, config in shipped.items()
        for variant, changes in sweep.variants(config).items()
    }


def leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix[:-1]: tree}
    return {leaf: value for key, node in tree.items() for leaf, value in leaves(node, f"{prefix}{key}.").items()}


def test_a_variant_changes_exactly_what_it_says(shipped: Any, composed: dict):
    assert all(len(config.seeds) >= 3 for config in shipped.values())
    assert {paper: set(config.variants) - {"full"} for paper, config in shipped.items()} == {
        paper: set(variants) for paper, variants in CHANGES.items()
    }
    assert all(next(iter(config.variants)) == "full" for config in shipped.values())
    for paper, variants in CHANGES.items():
        full = leaves(plain(composed[paper, "full"]))
        for variant, expected in variants.items():
            other = leaves(plain(composed[paper, variant]))
            # A part that is switched off is one key in place of its own.
            changed = {key: value for key, value in other.items() if full.get(key, "absent") != value}
            assert changed == expected, variant
            gone = full.keys() - other.keys()
            assert all(
                any(key.startswith(f"{part}.") for part, value in expected.items() if value is None) for key in gone
            )


def test_a_full_model_has_every_part_and_starts_from_images_alone(composed: dict):
    microcinema, dreamer = composed["microcinema", "full"], composed["factorized_dreamer", "full"]
    appearance, temporal = microcinema.model.appearance, microcinema.model.temporal
    assert (appearance.network, appearance.inject, appearance.fusion) == ("appear_net", "both", "both")
    assert temporal.convolutions == "inside" and temporal.text and not microcinema.model.keyframe_concat
    prior = microcinema.diffusion.noise_prior.arguments
    assert prior["strength"] == 0.03 and prior["kind"] == "appearance"
    assert temporal.frame_embedding and microcinema.motion_weight > 0
    assert dreamer.model.adapter and dreamer.model.pixels and dreamer.model.motion_encoder
    assert dreamer.model.flow_model == "microcinema.sprites.flow.GroundTruthFlow"
    assert dreamer.diffusion.scheduler.rescale_betas_zero_snr and dreamer.diffusion.scheduler.snr_shift == 2
    for config in (microcinema, dreamer):
        assert config.init_weights_from is None and config.trainable_parameters == "all"
        assert config.base.pretrained_model_name_or_path == "sprites-base"


def test_without_its_schedule_the_prediction_stays(composed: dict):
    """The base predicts v already, so this variant is about noise levels, not about what is predicted."""
    base = load_base("sprites-base", weights=False)
    wanted = composed["factorized_dreamer", "full"].diffusion.scheduler.prediction_type
    assert base.scheduler.config.prediction_type == wanted == "v_prediction"


@pytest.mark.filterwarnings("ignore:for .*no-op")  # the base's weights, which are not looked at
def test_every_variant_can_be_built(composed: dict):
    base = load_base("sprites-base", weights=False)
    sizes = {}
    for cell, config in composed.items():
        with torch.device("meta"):
            unet = build_networks(config, base, weights=False)["unet"]
        sizes[cell] = sum(parameter.numel() for parameter in unet.parameters())
    of_same_size = {"noise_prior_0", "noise_prior_0.1", "without_predict_net", "without_schedule"}
    # A decoder of its own; whole transformer blocks; the text is wider than the tokens of T5.
    larger = {"reference_net", "whole_pixel_blocks", "without_t5"}
    for (paper, variant), size in sizes.items():
        full = sizes[paper, "full"]
        order = 0 if variant in {"full", *of_same_size} else 1 if variant in larger else -1
        assert (size > full) - (size < full) == order, (paper, variant)


# figures


def test_curves_are_what_was_measured_of_held_out_clips(tmp_path: Path):
    from torch.utils.tensorboard import SummaryWriter

    (tmp_path / "validation").mkdir()
    entries = [{"step": 3, "loss": 9.0}, {"step": 3, "loss": 4.0}, {"step": 6, "loss": 2.0}]  # one step done again
    (tmp_path / RECORD).write_text(json.dumps(entries))
    save(tiny_training.make_config(tmp_path, max_train_steps=6, train_batch_size=2), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="lacks some of its steps"):
        ablation_curves.read_curves(tmp_path)
    with SummaryWriter(str(tmp_path / "logs" / "microcinema")) as writer:
        for step in (2, 4, 6):
            writer.add_scalar("clips_per_second", 2.0 / (step if step < 6 else 11), step)  # busy in the end
    curves = ablation_curves.read_curves(tmp_path)
    assert curves.pop("seconds") == pytest.approx([3 * 4, 6 * 4])
    assert curves == {"step": [3, 6], "loss": [4, 2]}
    save(tiny_training.make_config(tmp_path, max_train_steps=7), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="lacks some of its steps"):
        ablation_curves.read_curves(tmp_path)


def test_differences_are_of_the_same_seed_where_both_have_been_measured():
    fast = {"step": [2, 4], "seconds": [10.0, 20.0], "loss": [3.0, 1.0]}
    slow = {"step": [2, 4], "seconds": [15.0, 30.0], "loss": [5.0, 2.0]}
    steps, values = ablation_curves.differences({0: slow, 1: slow}, {0: fast, 2: fast}, "step")
    assert steps.tolist() == [2, 4] and values.tolist() == [[2.0, 1.0]]
    seconds, values = ablation_curves.differences({0: slow}, {0: fast}, "seconds")
    assert seconds.tolist() == [15, 20] and values.tolist() == [[5.0 - 2.0, 4.0 - 1.0]]
    assert len(ablation_curves.differences({}, {0: fast}, "step")[0]) == 0


# the recipe


class Recorder:
    """A runner that leaves what the commands do, and notes them; training of `fails` fails."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.calls = fails, []

    def __call__(self, arguments: list[str], log: Path) -> int:
        from torch.utils.tensorboard import SummaryWriter

        self.calls.append(arguments)
        log.write_text("error: out of memory")
        if arguments[1] == "benchmarks.sprites":
            write_json(arguments[3], {"text_sensitivity": {"text_sensitivity": 0.5}})
        elif self.fails in arguments:
            return 2
        else:
            told = dict(text.split("=", 1) for text in arguments[3:])
            folder, loss = Path(told["output_dir"]), 1.0 + int(told["seed"]) + ("model.adapter=null" in arguments)
            entries = [{"step": step, "loss": loss / step, "loss/t=100": loss} for step in (1, 2)]
            write_json(folder / RECORD, entries)
            save(tiny_training.make_config(folder, max_train_steps=2, train_batch_size=2), folder / "config.yaml")
            with SummaryWriter(str(folder / "logs" / "microcinema")) as writer:
                writer.add_scalar("clips_per_second", 0.5, 2)
        return 0


def test_the_ablation_is_sweeps_and_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    drawn: list[str] = []
    from matplotlib.axes import Axes

    monkeypatch.setattr(sweep, "compose", lambda command, told: compose_once(command, tuple(told)))
    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: (drawn.append(s), text(self, x, y, s, **k))[1])
    options = ["--output-dir", str(tmp_path), "seeds=[0, 1]", "--paper", "factorized_dreamer"]
    runner = Recorder(fails="model.motion_encoder=null")
    assert ablation.main(options, runner) == 1
    assert "without_t5, seed 1: failed: exit status 2, 'error: out of memory'" in capsys.readouterr().out
    tested = [call for call in runner.calls if call[1] == "benchmarks.sprites"]
    assert len(tested) == 2 * (8 - 1) and f"--clips={ablation.NUM_CLIPS}" in tested[0]
    page = (tmp_path / "ablation.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith("| without_adapter |"))
    assert (
        "| 1.2500 ± " in row and "(+0.5000 ± 0.0000)" in row and "| 50.0 ± 0.0 (+0.0 ± 0.0) | 8 ± 0 (+0 ± 0) |" in row
    )
    assert (
        "| without_t5 | 0 | missing | missing | missing |" in page
        and "`without_t5`: `model.motion_encoder=null`" in page
    )
    assert drawn.count("missing") == 3
    assert all(
        (tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in ("ablation.png", "ablation_curves.png")
    )
    runner = Recorder()
    assert ablation.main(options, runner) == 0
    assert len(runner.calls) == 2 * 2 and all("without_t5" in " ".join(call) for call in runner.calls)
    assert ablation.main([*options, "max_steps=2"], runner) == 2
    assert "unknown key 'max_steps'" in capsys.readouterr().err


def test_what_is_judged_is_an_evaluation_of_moving_sprites():
    config = compose("evaluate", ablation.JUDGED)
    assert config.evaluation.protocol.arguments["num_image_prompts"] == 32

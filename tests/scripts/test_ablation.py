"""The ablation grid: what its variants change, that it goes on where it stopped, and what is published of it."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from scipy import stats

from benchmarks import sprites
from fixtures import tiny, tiny_training
from microcinema.commands import cli
from microcinema.config.compose import compose, plain, save
from microcinema.pipelines.base_model import load_base
from microcinema.sprites import scene
from microcinema.sprites.classifier import SpriteClassifier
from microcinema.training.build import build_networks
from microcinema.training.checkpoint import Checkpoints
from microcinema.utils.errors import UserError
from scripts.recipes import ablation, ablation_curves, ablation_grid, ablation_report

NONE = {"diffusion.noise_prior.kind": "none", "diffusion.noise_prior.strength": 0.0}
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


@pytest.fixture(scope="module")
def shipped() -> Any:
    return ablation_grid.load_grid(ablation.config_folder() / "ablation" / "sprites.yaml")


# the grid


@pytest.fixture(scope="module")
def composed(shipped: Any) -> dict[tuple[str, str], Any]:
    return {
        (paper, variant): compose("train", shipped.train_overrides(paper, variant))
        for paper, content in shipped.papers.items()
        for variant in content.variants
    }


def leaves(config: Any) -> dict[str, Any]:
    return dict(ablation._dotted(plain(config)))


def test_a_variant_changes_exactly_what_it_says(shipped: Any, composed: dict):
    assert len(shipped.seeds) >= 3
    assert {paper: set(content.variants) - {"full"} for paper, content in shipped.papers.items()} == {
        paper: set(variants) for paper, variants in CHANGES.items()
    }
    for paper, variants in CHANGES.items():
        full = leaves(composed[paper, "full"])
        for variant, expected in variants.items():
            other = leaves(composed[paper, variant])
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

VALUES = {"full": [0.9, 0.8, 0.95], "without_t5": [0.7, 0.75, 0.6], "without_adapter": [0.5]}
LEFT = "without_schedule"


@pytest.fixture
def results(shipped: Any, tmp_path: Path) -> Path:
    """Results as runs leave them: three whole variants of Factorized-Dreamer, one seed of a fourth, nothing else."""
    settings = {"max_train_steps": 1200, "evaluate": shipped.evaluate, "train": shipped.train, "data": "data"}
    ablation.write_or_verify(tmp_path, settings)
    for variant, values in VALUES.items():
        for seed, value in enumerate(values):
            pace = 1 if variant == "full" else 2  # seconds of a step
            result = {
                "loss": value / 10,
                "loss/t=100": value / 20,
                "text_sensitivity": value,
                "moving_loss": value,
                "seconds": 1200 * pace,
                "curves": {"step": [600, 1200], "seconds": [600 * pace, 1200 * pace], "loss": [value / 5, value / 10]},
                "versions": {"v": 1},
            }
            if variant != "without_adapter":
                result |= {"object": value, "motion": 1 - value, "psnr": 30 * value}
            ablation_report.write_json(
                tmp_path / "factorized_dreamer" / variant / f"seed-{seed}" / ablation_report.RESULT_FILE, result
            )
    return tmp_path


def test_intervals_are_students():
    expected = stats.ttest_1samp(VALUES["full"], 0).confidence_interval(0.95)
    found = ablation_report.interval(VALUES["full"])
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high))
    assert found["mean"] == pytest.approx(sum(VALUES["full"]) / 3) and found["n"] == 3
    assert ablation_report.interval([0.5]) == {"mean": 0.5, "low": None, "high": None, "n": 1}
    assert ablation_report.interval([]) == {"mean": None, "low": None, "high": None, "n": 0}


def test_differences_are_of_the_same_seed(shipped: Any, results: Path):
    rows = ablation_report.summarise(shipped, results)["papers"]["factorized_dreamer"]
    paired = stats.ttest_rel(VALUES["without_t5"], VALUES["full"]).confidence_interval(0.95)
    difference = rows["without_t5"]["measures"]["object"]["difference"]
    assert (difference["low"], difference["high"]) == pytest.approx((paired.low, paired.high))
    assert difference["values"] == pytest.approx({0: 0.7 - 0.9, 1: 0.75 - 0.8, 2: 0.6 - 0.95})
    single = rows["without_adapter"]["measures"]["loss"]["difference"]
    assert single["mean"] == pytest.approx((0.5 - 0.9) / 10) and single["n"] == 1 and single["low"] is None
    # When `full` is done, in 1200 s, a run of half its pace has been measured at its step 600.
    assert rows["without_adapter"]["measures"]["loss_at_equal_time"]["values"] == pytest.approx({0: 0.5 / 5})
    slow = rows["without_adapter"]["measures"]["loss_at_equal_time"]["difference"]
    assert slow["mean"] == pytest.approx(0.5 / 5 - 0.9 / 10)
    assert rows["full"]["measures"]["object"]["difference"] is None


def test_the_table_and_the_figure_tell_what_is_missing(shipped: Any, results: Path, monkeypatch: pytest.MonkeyPatch):
    def nothing(*arguments: Any) -> int:
        raise AssertionError("--table runs nothing")

    drawn: list[str] = []
    from matplotlib.axes import Axes

    text = Axes.text
    monkeypatch.setattr(Axes, "text", lambda self, x, y, s, **k: (drawn.append(s), text(self, x, y, s, **k))[1])
    assert ablation.main(["--table", "--output-dir", str(results)], nothing) == 0
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in (results / "ablation.md").read_text().splitlines()
    ]
    table = {row[0]: row[2:] for row in rows if len(row) == 3 + len(ablation_report.QUANTITIES)}
    levels = {row[0]: row[1:] for row in rows if len(row) == 5}
    found, mean = ablation_report.interval(VALUES["full"]), sum(VALUES["full"]) / 3
    assert table["full"][:2] == ["3", f"{mean / 10:.4f} ± {(mean - found['low']) / 10:.4f}"]
    assert table["without t5"][3].startswith("68.3 ± ") and "(-20.0 ± " in table["without t5"][3]
    single = ["0.0500 (-0.0400)", "0.1000 (+0.0100)", "50.0 (-40.0)", "0.5000 (-0.4000)", "2400.0 (+1200.0)"]
    assert table["without adapter"] == ["1", *single, *["missing"] * 3]
    assert table["without schedule"] == ["0"] + ["missing"] * 8
    assert levels["held-out loss less that of full"] == ["seed 0", "seed 1", "seed 2", "t=100"]
    assert levels["without adapter"] == ["-0.0400", "missing", "missing", "-0.0200"]
    assert levels["without t5"][:3] == ["-0.0200", "-0.0050", "-0.0350"] and " ± " in levels["without t5"][3]
    last = (results / "ablation.md").read_text().splitlines()[-1]
    assert "factorized_dreamer/without_adapter (seeds 1, 2)" in last
    assert "microcinema/full (seeds 0, 1, 2)" in last and "without_t5" not in last

    published = json.loads((results / "ablation.json").read_text())
    assert published["papers"]["factorized_dreamer"][LEFT]["measures"]["object"]["mean"] is None
    assert published["papers"]["factorized_dreamer"][LEFT]["missing"] == [0, 1, 2]
    assert published["settings"]["max_train_steps"] == 1200 and published["versions"] == [{"v": 1}]

    cells = sum(len(paper.variants) for paper in shipped.papers.values())
    found, whole = len(VALUES) - 1, len(shipped.papers)  # `full` is what the others are drawn beside
    not_judged = 3
    assert drawn.count("missing") == (cells - whole - found) * len(ablation_report.QUANTITIES) + not_judged
    assert all((results / name).read_bytes().startswith(b"\x89PNG") for name in ("ablation.png", "ablation_curves.png"))


def test_what_is_not_judged_has_no_columns(shipped: Any, results: Path):
    for file in results.rglob("result.json"):
        result = json.loads(file.read_text())
        ablation_report.write_json(file, {k: v for k, v in result.items() if k not in ablation_report.JUDGED})
    page = ablation_report.markdown(ablation_report.summarise(shipped, results))
    assert "| Held-out loss | Held-out loss at equal time | Text sensitivity, % |" in page and "Object" not in page


def test_curves_are_what_was_logged_of_held_out_clips(tmp_path: Path):
    from torch.utils.tensorboard import SummaryWriter

    save(tiny_training.make_config(tmp_path, max_train_steps=6, train_batch_size=2), tmp_path / "config.yaml")
    with SummaryWriter(str(tmp_path / "logs" / "microcinema")) as writer:
        for step in [1, 2, 3, 3, 4, 5, 6]:  # broken off, and one step done again
            writer.add_scalar(
                "clips_per_second", 2.0 / (step if step < 6 else 11), step
            )  # the last while the machine was busy
        for step, loss in ((3, 9.0), (3, 4.0), (6, 2.0)):
            writer.add_scalar("validation/loss", loss, step)
            writer.add_scalar("validation/loss/t=100", loss / 2, step)
    curves, wall_seconds = ablation_curves.read_curves(tmp_path)
    assert curves.pop("seconds") == pytest.approx([3 * 3.5, 6 * 3.5]) and wall_seconds == pytest.approx(26)
    assert curves == {"step": [3, 6], "loss": [4, 2], "loss/t=100": [2, 1]}
    save(tiny_training.make_config(tmp_path, max_train_steps=6, logging_steps=4), tmp_path / "config.yaml")
    curves, wall_seconds = ablation_curves.read_curves(tmp_path)  # read at steps 4 and 6
    assert curves["seconds"] == pytest.approx([3 * 7.5, 6 * 7.5]) and wall_seconds == pytest.approx(4 * 4 + 2 * 11)
    save(tiny_training.make_config(tmp_path, max_train_steps=7), tmp_path / "config.yaml")
    with pytest.raises(UserError, match="lacks some of its 7 steps"):
        ablation_curves.read_curves(tmp_path)


def test_equal_time_ends_with_the_shorter_run():
    fast = {"step": [2, 4], "seconds": [10.0, 20.0], "loss": [3.0, 1.0]}
    slow = {"step": [2, 4], "seconds": [15.0, 30.0], "loss": [5.0, 2.0]}
    assert ablation_curves.at_equal_time(slow, fast) == (4.0, 1.0)
    assert ablation_curves.at_equal_time(fast, slow) == (1.0, 4.0)
    slowest = {"step": [2, 4], "seconds": [25.0, 50.0], "loss": [5.0, 2.0]}
    assert ablation_curves.at_equal_time(slowest, fast) is None  # it had not been measured then

    steps, values = ablation_curves.differences({0: slow, 1: slow}, {0: fast, 2: fast}, "step")
    assert steps.tolist() == [2, 4] and values.tolist() == [[2.0, 1.0]]
    seconds, values = ablation_curves.differences({0: slow}, {0: fast}, "seconds")
    assert seconds.tolist() == [15, 20] and values.tolist() == [[5.0 - 2.0, 4.0 - 1.0]]
    assert len(ablation_curves.differences({}, {0: fast}, "step")[0]) == 0


# runs


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data with flow, an untrained judge, and a grid of two variants, all tiny."""
    folder = tmp_path_factory.mktemp("world")
    base = tiny.base_folder(folder / "base")
    assert (
        cli.main(["prepare", "sprites", "num_videos=2", "num_frames=4", "size=32", f"output_dir={folder / 'data'}"])
        == 0
    )
    held_out = f"output_dir={folder / 'held_out'}"
    assert cli.main(["prepare", "sprites", "split=heldout", "num_videos=2", "num_frames=4", "size=32", held_out]) == 0
    train = [
        f"base.pretrained_model_name_or_path={base}",
        f"cached_latents={folder / 'data/latents'}",
        "num_frames=4",
        "resolution=32",
    ]
    reads = [
        "model=plain",
        "diffusion=none",
        "model.flow_model=microcinema.sprites.flow.GroundTruthFlow",
        "cached_parts=[flow]",
    ]
    assert cli.main(["prepare", "latents", f"data.root={folder / 'data'}", *train, *reads]) == 0
    kinds = {
        "shape": scene.SHAPES,
        "colour": scene.COLOURS,
        "background": scene.BACKGROUNDS,
        "size": scene.SIZES,
    }
    classes = {name: list(values) for name, values in kinds.items()}
    judge = SpriteClassifier(classes, num_frames=4, channels=(8, 8, 8), feature_dim=8)
    judge.save_pretrained(folder / "classifier")
    protocol = {"num_prompts": 1, "num_heldout_prompts": 0, "num_image_prompts": 2, "num_frames": 4, "size": 32}
    grid = {
        "seeds": [5],
        "max_train_steps": 2,
        "train": train,
        "text_sensitivity": ["--clips=2"],
        "evaluate": [f"evaluation.protocol.{key}={value}" for key, value in protocol.items()],
        "papers": {
            "paper": {
                "train": ["model=plain", "diffusion=none", "train_batch_size=1", "dataloader_num_workers=0"],
                "variants": {
                    "full": ["model.flow_model=microcinema.sprites.flow.GroundTruthFlow"],
                    "without": ["model.flow_model=null"],
                },
            }
        },
    }
    grid["train"] += [
        "checkpointing_steps=1",
        "validation_steps=1",
        "validation_clips=2",
        "learning_rate=1e-3",
        "lr_warmup_steps=0",
    ]
    grid["evaluate"] += [f"evaluation.classifier={folder / 'classifier'}", "evaluation.num_inference_steps=1"]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder


class InProcess:
    """A `Runner` without processes, which notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def __call__(self, command: str, overrides: list[str], log: Path) -> int:
        self.asked.append((command, overrides))
        if command == "benchmark":
            return sprites.main(overrides)
        tiny_training.reset_accelerator()
        return cli.main([command, *overrides])


def arguments(world: Path, *more: str) -> list[str]:
    return [
        "--grid",
        str(world / "grid.yaml"),
        "--data",
        str(world / "data"),
        "--held-out",
        str(world / "held_out"),
        *more,
    ]


@pytest.mark.slow
def test_the_grid_goes_on_where_it_stopped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    out = tmp_path / "out"
    command = arguments(world, "--output-dir", str(out))
    save = Checkpoints.save

    def save_and_break_off(self: Checkpoints, progress: Any) -> None:
        save(self, progress)
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(Checkpoints, "save", save_and_break_off)
        broken = InProcess()
        assert ablation.main([*command, "--variants", "full"], broken) == 1
    assert [name for name, _ in broken.asked] == ["train"]
    assert "paper/full/seed-5: failed; see" in capsys.readouterr().out

    def results() -> dict[str, Any]:
        return {v: json.loads((out / "paper" / v / "seed-5/result.json").read_text()) for v in ("full", "without")}

    runner = InProcess()
    assert ablation.main(command, runner) == 0
    assert [name for name, _ in runner.asked] == ["train", "benchmark"] * 2
    measured = results()
    full, trained = measured["full"], out / "paper/full/seed-5/train"
    assert full["curves"]["step"] == [1, 2] and full["loss"] == full["curves"]["loss"][-1] > 0
    assert full["text_sensitivity"] == full["text"]["text_sensitivity"] and full["text"]["clips"] == 2
    assert full["seconds"] == 2 * full["curves"]["seconds"][0] > 0
    assert full["wall_seconds"] > 0 and "object" not in full
    # The run that was broken off after its first step went on with the second.
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    assert sorted(tiny_training.logged(trained)) == [1, 2]
    summary = json.loads((out / "ablation.json").read_text())
    assert summary["papers"]["paper"]["without"]["measures"]["loss"]["values"] == {"5": measured["without"]["loss"]}

    # A measurement that is lost is made again without training; what stands is left alone.
    (out / "paper" / "without" / "seed-5" / "result.json").unlink()
    runner = InProcess()
    assert ablation.main(command, runner) == 0
    assert [name for name, _ in runner.asked] == ["benchmark"]
    runner = InProcess()
    assert ablation.main(command, runner) == 0 and not runner.asked
    assert results() == measured

    # Videos are judged later.
    assert ablation.main([*command, "--judged"], runner) == 0
    assert [name for name, _ in runner.asked] == ["evaluate"] * 2
    judged = results()
    assert all(judged[variant] | measured[variant] == judged[variant] for variant in measured)
    evaluated = json.loads((out / "paper" / "full" / "seed-5" / "evaluate" / "results.json").read_text())
    shares = {part: evaluated["parts"][part]["model"]["psnr"]["value"] for part in ("seen", "image")}
    assert judged["full"]["psnr"] == pytest.approx((shares["seen"] + 2 * shares["image"]) / 3)
    assert evaluated["model"]["seed"] == 5 and evaluated["protocol"]["num_image_prompts"] == 2
    runner = InProcess()
    assert ablation.main([*command, "--judged"], runner) == 0 and not runner.asked

    # Other settings do not come into the same folder: neither those that all share nor those of a variant.
    capsys.readouterr()
    assert ablation.main([*command, "--steps", "3"], runner) == 2
    assert "max_train_steps was 2 and is 3" in capsys.readouterr().err
    grid = yaml.safe_load((world / "grid.yaml").read_text())
    grid["papers"]["paper"]["variants"]["without"].append("motion_weight=1")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(grid))
    assert ablation.main([*command, "--grid", str(tmp_path / "other.yaml")], runner) == 2
    assert "train.motion_weight was 0.0 and is 1.0" in capsys.readouterr().err
    assert not runner.asked


def test_a_choice_of_the_grid(shipped: Any):
    names = [str(run) for run in ablation_grid.choose(shipped, ["microcinema"], ["full", "without_t5"], [7, 8])]
    assert names == ["microcinema/full/seed-7", "microcinema/full/seed-8"]
    everything = ablation_grid.choose(shipped, None, None, shipped.seeds)
    assert len(everything) == len(set(everything)) == 3 * sum(len(p.variants) for p in shipped.papers.values())
    assert [run.seed for run in everything] == sorted(run.seed for run in everything)


def test_a_failure_is_alone(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    """Two at once; one fails, the other comes through as far as its own failure, and nothing is published as zero."""
    together = threading.Barrier(2, timeout=30)

    def runner(command: str, overrides: list[str], log: Path) -> int:
        if command == "train":
            together.wait()
        return 2 if command == "benchmark" or "model.flow_model=null" in overrides else 0

    out = tmp_path / "out"
    assert ablation.main(arguments(world, "--output-dir", str(out), "--workers", "2"), runner) == 1
    assert capsys.readouterr().out.count("failed; see") == 2
    assert (out / "ablation.md").read_text().count("missing") == 2 * (len(ablation_report.QUANTITIES) - 3)


def test_bad_input_ends_in_one_line(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "list.yaml").write_text("papers: 3")
    (tmp_path / "short.yaml").write_text("seeds: [0]\npapers: {a: {train: [], variants: {}}}")
    half = yaml.safe_load((world / "grid.yaml").read_text())
    del half["papers"]["paper"]["variants"]["full"]
    (tmp_path / "half.yaml").write_text(yaml.safe_dump(half))
    cases = [
        (["--papers", "nobody"], "no paper 'nobody'; it has paper"),
        (["--variants", "fulll"], "no variant 'fulll'; it has full, without"),
        (["--data", str(tmp_path / "nowhere")], "no data set"),
        (["--held-out", str(tmp_path / "nowhere")], "no data set"),
        (["--steps", "0"], "max_train_steps is 0"),
        (["--grid", str(tmp_path / "none.yaml")], "is no grid"),
        (["--grid", str(tmp_path / "list.yaml")], "is no grid"),
        (["--grid", str(tmp_path / "short.yaml")], "is no grid"),
        (["--grid", str(tmp_path / "half.yaml")], "no variant 'full'"),
        (["--table"], "holds no ablation"),
    ]
    for more, said in cases:
        assert ablation.main(arguments(world, "--output-dir", str(tmp_path / "out"), *more), InProcess()) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and told.startswith("error: ") and said in told, told


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of `train`: says its threads and what it was told, sleeps as long as the first of that says, and fails."""
    code = "import os, sys, time; print(os.environ['OMP_NUM_THREADS'], *sys.argv[1:], flush=True); "
    (tmp_path / "train.py").write_text(
        code + "time.sleep(float(sys.argv[1]) if sys.argv[1].isdigit() else 60); sys.exit(2)"
    )
    monkeypatch.setitem(ablation.COMMANDS, "train", [str(tmp_path / "train.py")])
    monkeypatch.setattr(ablation.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate", "benchmark"])
def test_each_command_of_a_run_starts_from_anywhere(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert ablation.Processes(1)(command, ["--help"], tmp_path / "log.txt") == 0
    assert (tmp_path / "log.txt").read_text().startswith("usage")


def test_commands_are_processes(sleeper: None, tmp_path: Path):
    run, log = ablation.Processes(2), tmp_path / "log.txt"
    assert run("train", ["0", "a=b c"], log) == 2
    assert log.read_text() == "3 0 a=b c\n"
    ended: list[int] = []
    thread = threading.Thread(target=lambda: ended.append(run("train", ["60"], log)))
    thread.start()
    wait_for("60", log)
    run.stop()
    thread.join(timeout=20)
    assert len(ended) == 1 and ended[0] < 0
    assert run("train", ["60"], log) == ablation.INTERRUPTED


def test_interrupted_it_ends_its_runs_and_begins_no_other(
    world: Path, sleeper: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = tmp_path / "out"

    def interrupt(waiting: Any) -> None:
        wait_for("seed=5", out / "paper" / "full" / "seed-5" / "log.txt")
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "as_completed", interrupt)
    begun = time.monotonic()
    assert ablation.main(arguments(world, "--output-dir", str(out))) == ablation.INTERRUPTED
    assert time.monotonic() - begun < 50  # less than the run would have slept
    assert [path.parent.parent.name for path in out.rglob("log.txt")] == ["full"]

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

from fixtures import tiny
from fixtures.tiny_training import reset_accelerator
from microcinema.commands import cli
from microcinema.config.compose import compose, plain
from microcinema.pipelines.base_model import load_base
from microcinema.sprites import scene
from microcinema.sprites.classifier import SpriteClassifier
from microcinema.training.build import build_networks
from microcinema.training.checkpoint import Checkpoints
from microcinema.utils.errors import UserError
from scripts.recipes import ablation, ablation_grid, ablation_report

NONE = {"diffusion.noise_prior.kind": "none", "diffusion.noise_prior.strength": 0.0}
WITHOUT_APPEARANCE = dict.fromkeys(
    [f"model.{part}{key}" for part in ("", "unet.", "condition_encoder.") for key in ("fusion", "inject")]
)
INTO_ENCODER = {f"model.{part}inject": "encoder" for part in ("", "unet.", "condition_encoder.")}
WITHOUT_PIXELS: dict[str, Any] = {f"model.{part}pixel_scales": [] for part in ("", "unet.", "condition_encoder.")}
WITHOUT_CONCAT = {"model.keyframe_concat": False, "model.condition_encoder.keyframe_concat": False}
SCHEDULE_OF_THE_BASE = dict.fromkeys(
    f"diffusion.scheduler.{key}"
    for key in ("prediction_type", "rescale_betas_zero_snr", "timestep_spacing", "snr_shift")
)
CHANGES = {
    "microcinema": {
        "without_appearance_branch": WITHOUT_APPEARANCE,
        "injection_into_encoder_only": INTO_ENCODER,
        "noise_prior_0": {"diffusion.noise_prior.strength": 0.0},
        "noise_prior_0.01": {"diffusion.noise_prior.strength": 0.01},
        "noise_prior_0.1": {"diffusion.noise_prior.strength": 0.1},
        "without_keyframe_concat": WITHOUT_CONCAT,
    },
    "factorized_dreamer": {
        "without_adapter": {"model.adapter": None, "model.condition_encoder.adapter": None},
        "without_pixel_attention": WITHOUT_PIXELS,
        "without_t5": {"model.motion_encoder": None},
        "without_predict_net": {"model.flow_model": None},
        "without_schedule": SCHEDULE_OF_THE_BASE,
        "without_keyframe_concat": WITHOUT_CONCAT,
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
            assert full.keys() == other.keys()
            assert {key: value for key, value in other.items() if value != full[key]} == expected, variant


def test_a_full_model_has_every_part_and_starts_from_images_alone(composed: dict):
    microcinema, dreamer = composed["microcinema", "full"], composed["factorized_dreamer", "full"]
    assert (microcinema.model.fusion, microcinema.model.inject) == ("add", "both")
    prior = microcinema.diffusion.noise_prior.arguments
    assert prior["strength"] == 0.03 and prior["kind"] == "appearance"
    assert microcinema.model.unet.arguments["frame_conditioning"] and microcinema.motion_weight > 0
    assert dreamer.model.adapter and dreamer.model.pixel_scales and dreamer.model.motion_encoder
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
            parts = build_networks(config, base, weights=False)
        trained = (parts["unet"], parts["condition_encoder"])
        sizes[cell] = sum(parameter.numel() for part in trained for parameter in part.parameters())
    of_same_size = {"noise_prior_0", "noise_prior_0.01", "noise_prior_0.1", "without_predict_net", "without_schedule"}
    for (paper, variant), size in sizes.items():
        full = sizes[paper, "full"]
        assert size == full if variant in {"full", *of_same_size} else size < full, (paper, variant)


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
            result = {
                "object": value,
                "motion": 1 - value,
                "psnr": 30 * value,
                "loss": value / 10,
                "versions": {"v": 1},
            }
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
    single = rows["without_adapter"]["measures"]["psnr"]["difference"]
    assert single["mean"] == pytest.approx(30 * (0.5 - 0.9)) and single["n"] == 1 and single["low"] is None
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
    table = {row[0]: row[2:] for row in rows if len(row) == 7}
    low, mean = ablation_report.interval(VALUES["full"])["low"], sum(VALUES["full"]) / 3
    assert table["full"][:2] == ["3", f"{100 * mean:.1f} ± {100 * (mean - low):.1f}"]
    assert table["without t5"][1].startswith("68.3 ± ") and "(-20.0 ± " in table["without t5"][1]
    assert table["without adapter"] == ["1", "50.0 (-40.0)", "50.0 (+40.0)", "15.0 (-12.0)", "0.0500 (-0.0400)"]
    assert table["without schedule"] == ["0"] + ["missing"] * 4
    last = (results / "ablation.md").read_text().splitlines()[-1]
    assert "factorized_dreamer/without_adapter (seeds 1, 2)" in last
    assert "microcinema/full (seeds 0, 1, 2)" in last and "without_t5" not in last

    published = json.loads((results / "ablation.json").read_text())
    assert published["papers"]["factorized_dreamer"][LEFT]["measures"]["object"]["mean"] is None
    assert published["papers"]["factorized_dreamer"][LEFT]["missing"] == [0, 1, 2]
    assert published["settings"]["max_train_steps"] == 1200 and published["versions"] == [{"v": 1}]

    cells = sum(len(paper.variants) for paper in shipped.papers.values())
    found, whole = len(VALUES) - 1, len(shipped.papers)  # `full` is what the others are drawn beside
    assert drawn.count("missing") == (cells - whole - found) * len(ablation_report.QUANTITIES)
    assert (results / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_the_loss_is_of_the_last_tenth_without_that_of_flow(tmp_path: Path):
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path / "logs" / "microcinema")) as writer:
        for step in [*range(1, 20), 19, 20]:  # broken off, and one step done again
            writer.add_scalar("loss", 2.0 * step, step)
            writer.add_scalar("loss/flow", 10.0, step)
    assert ablation.final_loss(tmp_path, 20, 0.1) == pytest.approx((38 + 40) / 2 - 1)
    with pytest.raises(UserError, match="steps 28 to 30"):
        ablation.final_loss(tmp_path, 30, 0.1)


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
    grid["train"] += ["checkpointing_steps=1", "learning_rate=1e-3", "lr_warmup_steps=0"]
    grid["evaluate"] += [f"evaluation.classifier={folder / 'classifier'}", "evaluation.num_inference_steps=1"]
    (folder / "grid.yaml").write_text(yaml.safe_dump(grid))
    return folder


class InProcess:
    """A `Runner` without processes, which notes what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def __call__(self, command: str, overrides: list[str], log: Path) -> int:
        self.asked.append((command, overrides))
        reset_accelerator()
        return cli.main([command, *overrides])


def arguments(world: Path, *more: str) -> list[str]:
    return ["--grid", str(world / "grid.yaml"), "--data", str(world / "data"), *more]


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

    runner = InProcess()
    assert ablation.main(command, runner) == 0
    assert [name for name, _ in runner.asked] == ["train", "evaluate"] * 2
    results = {v: json.loads((out / "paper" / v / "seed-5" / "result.json").read_text()) for v in ("full", "without")}
    evaluated = json.loads((out / "paper" / "full" / "seed-5" / "evaluate" / "results.json").read_text())
    shares = {part: evaluated["parts"][part]["model"]["psnr"]["value"] for part in ("seen", "image")}
    assert results["full"]["psnr"] == pytest.approx((shares["seen"] + 2 * shares["image"]) / 3)
    assert evaluated["model"]["seed"] == 5 and evaluated["protocol"]["num_image_prompts"] == 2
    # The run that was broken off after its first step went on with the second.
    checkpoints = sorted(path.name for path in (out / "paper" / "full" / "seed-5" / "train").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-1", "checkpoint-2"]
    assert logged_steps(out / "paper" / "full" / "seed-5" / "train") == [1, 2]
    summary = json.loads((out / "ablation.json").read_text())
    assert summary["papers"]["paper"]["without"]["measures"]["loss"]["values"] == {"5": results["without"]["loss"]}

    # An evaluation that is lost is made again without training; what stands is left alone.
    (out / "paper" / "without" / "seed-5" / "result.json").unlink()
    runner = InProcess()
    assert ablation.main(command, runner) == 0
    assert [name for name, _ in runner.asked] == ["evaluate"]
    runner = InProcess()
    assert ablation.main(command, runner) == 0 and not runner.asked
    assert {v: json.loads((out / "paper" / v / "seed-5" / "result.json").read_text()) for v in results} == results

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


def logged_steps(trained: Path) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = EventAccumulator(str(trained / "logs" / "microcinema"))
    log.Reload()
    return [event.step for event in log.Scalars("loss")]


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
        return 2 if command == "evaluate" or "model.flow_model=null" in overrides else 0

    out = tmp_path / "out"
    assert ablation.main(arguments(world, "--output-dir", str(out), "--workers", "2"), runner) == 1
    assert capsys.readouterr().out.count("failed; see") == 2
    assert (out / "ablation.md").read_text().count("missing") == 2 * len(ablation_report.QUANTITIES)


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
    monkeypatch.setattr(ablation, "LAUNCHERS", tmp_path)
    monkeypatch.setattr(ablation.os, "cpu_count", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def wait_for(text: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while not (log.exists() and text in log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_each_command_of_a_run_has_a_launcher():
    assert all((ablation.LAUNCHERS / f"{command}.py").is_file() for command in ("train", "evaluate"))


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

"""The grid over lambda and gamma: what it runs, that it resumes, and what it writes."""

import json
from argparse import Namespace
from pathlib import Path

from microcinema.config.compose import compose
from microcinema.diffusion.schedule import alphas_cumprod, make_scheduler
from microcinema.pipelines.base_model import load_base
from microcinema.pipelines.loading import INDEX
from microcinema.sprites.evaluate import RESULTS_FILE
from scripts.recipes import noise_prior_grid

SETTINGS = Namespace(pipeline="sprites-microcinema", experiment="sprites_microcinema", data=Path("data"), steps=3)


def value(overrides, key):
    return next(text.partition("=")[2] for text in overrides if text.startswith(f"{key}="))


class Recorder:
    """A runner that leaves the files of the commands and calls the distance `1000 lambda + 100 gamma`."""

    def __init__(self):
        self.calls = []

    def __call__(self, arguments, log):
        command = arguments[2]
        self.calls.append(command)
        folder = Path(value(arguments, "output_dir"))
        folder.mkdir(parents=True)
        if command == "train":
            (folder / INDEX).write_text("{}")
            return 0
        strength = float(folder.parent.name.removeprefix("lambda-"))
        distance = 1000 * strength + 100 * float(value(arguments, "evaluation.gamma"))
        result = {"parts": {"image": {"frechet": {"model": distance}}}}
        (folder / RESULTS_FILE).write_text(json.dumps(result))
        return 0


def test_every_distance_is_measured_once_and_written(tmp_path):
    runner, options = Recorder(), ["--output-dir", str(tmp_path), "--steps", "3"]
    assert noise_prior_grid.main(options, runner) == 0
    assert (runner.calls.count("train"), runner.calls.count("evaluate")) == (6, 36)
    assert noise_prior_grid.main(options, runner) == 0
    assert len(runner.calls) == 42
    (tmp_path / "zero_terminal_SNR" / "lambda-0.1" / "gamma-0.05" / RESULTS_FILE).unlink()
    (tmp_path / "zero_terminal_SNR" / "lambda-0.1" / "gamma-0.05").rmdir()
    assert noise_prior_grid.main(options, runner) == 0
    assert runner.calls[42:] == ["evaluate"]
    distances = json.loads((tmp_path / "noise_prior.json").read_text())["distances"]
    assert set(distances) == {"ends with signal", "zero terminal SNR"}
    assert distances["zero terminal SNR"]["0.1"]["0.05"] == 105
    assert (tmp_path / "noise_prior.png").read_bytes().startswith(b"\x89PNG")


def test_a_command_that_fails_ends_the_grid_in_one_line(tmp_path, capsys):
    assert noise_prior_grid.main(["--output-dir", str(tmp_path)], lambda *_: 1) == 2
    assert "train failed; see" in capsys.readouterr().err and not (tmp_path / "noise_prior.json").exists()


def test_settings_compose_and_schedules_are_what_they_are_called():
    base = load_base("sprites-base", weights=False).scheduler
    for schedule, overrides in noise_prior_grid.SCHEDULES.items():
        config = compose("train", noise_prior_grid.train_overrides(SETTINGS, 0.1, overrides))
        assert config.diffusion.noise_prior.arguments["strength"] == 0.1 and config.trainable_parameters == "all"
        scheduler = make_scheduler(base.config, vars(config.diffusion.scheduler))
        assert (alphas_cumprod(scheduler)[-1] == 0) == (schedule == "zero terminal SNR")
    evaluation = compose("evaluate", [*noise_prior_grid.evaluate_overrides(9), "evaluation.gamma=0.04"]).evaluation
    assert evaluation.gamma == 0.04 and evaluation.protocol.arguments["num_image_prompts"] == 9

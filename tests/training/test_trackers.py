"""What the trackers are told of a run."""

import shutil

import wandb

from fixtures import tiny_training
from fixtures.tiny_training import LatentClips, pipeline
from microcinema.config.compose import compose
from microcinema.training.trackers import RUN_ID_FILE, hyperparameters
from microcinema.training.trainer import Trainer


def run(folder, steps, **changes):
    changes = {"max_train_steps": steps, "checkpointing_steps": 1, "resume_from_checkpoint": "latest", **changes}
    settings = tiny_training.make_config(folder, **changes)
    return Trainer(tiny_training.accelerator(settings), pipeline(folder.parent), LatentClips(), settings).train()


def test_every_value_of_the_config_has_its_own_key():
    one, other = (
        hyperparameters(compose("train", [f"model={model}", "validation_data={metadata: val.csv}"]))
        for model in ("microcinema", "microcinema_once")
    )
    assert one["model.temporal.convolutions"] == "inside" and other["model.temporal.convolutions"] == "after"
    assert one["diffusion.noise_prior.strength"] == 0.03 and one["data._target_"].startswith("microcinema.")
    assert one["sampling.num_inference_steps"] == 25 and one["report_to"] == "tensorboard"
    assert one["validation_data.metadata"] == "val.csv" and one["snr_gamma"] == "None"
    assert all(isinstance(value, int | float | str | bool) for value in one.values())


def test_tensorboard_knows_model_data_and_diffusion(tmp_path):
    run(tmp_path / "run", 1, **{"tracker": {"project": "stars", "name": None, "group": None, "tags": []}})
    events = (path for path in (tmp_path / "run" / "logs" / "stars").rglob("events*") if path.is_file())
    content = b"".join(path.read_bytes() for path in events)
    for key in (b"model.temporal.text", b"data._target_", b"diffusion.noise_prior"):
        assert key in content


def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    told, init = [], wandb.init
    monkeypatch.setattr(wandb, "init", lambda **arguments: told.append(arguments) or init(**arguments))
    tracker = {"project": "stars", "name": None, "group": "zigzag", "tags": ["a", "b"]}
    for steps in (1, 2):
        run(tmp_path / "run", steps, report_to="wandb", tracker=tracker)
    first, second = told
    assert first["id"] == second["id"] == (tmp_path / "run" / RUN_ID_FILE).read_text()
    assert (first["project"], first["name"], first["group"], first["tags"]) == ("stars", "run", "zigzag", ["a", "b"])
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{first['id']}"))) >= 1
    for checkpoint in (tmp_path / "run").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    run(tmp_path / "run", 1, report_to="wandb", tracker=tracker)
    assert told[-1]["id"] != first["id"]  # it begins anew

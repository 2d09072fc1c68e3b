"""The command `evaluate`, on a tiny random pipeline and an untrained classifier."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures import tiny
from microcinema.commands import cli
from microcinema.evaluation.video_metrics import psnr
from microcinema.pipelines.sample_folder import SampleFolder
from microcinema.pipelines.saving import save_pipeline
from microcinema.sprites import scene
from microcinema.sprites.classifier import SpriteClassifier
from microcinema.sprites.evaluate import REPORT_FILE, RESULTS_FILE, SAMPLES_FOLDER
from microcinema.sprites.protocol import SpritesProtocol

ROOT = Path(__file__).parents[2]
COUNTS = {"num_prompts": 2, "num_heldout_prompts": 1, "num_image_prompts": 1, "num_frames": 4, "size": 32}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    save_pipeline(tiny.video_pipeline(folder / "base"), folder / "video", with_base=False)
    torch.manual_seed(0)
    looks = {
        "shape": scene.SHAPES,
        "colour": scene.COLOURS,
        "background": scene.BACKGROUNDS,
        "size": scene.SIZES,
    }
    classes = {name: list(values) for name, values in looks.items()}
    SpriteClassifier(classes, num_frames=4, channels=(8, 8, 8), feature_dim=8).save_pretrained(folder / "classifier")
    SpriteClassifier({"shape": ["circle"]}, num_frames=4, channels=(8, 8, 8)).save_pretrained(folder / "poor")
    return folder


@pytest.fixture
def run(models, tmp_path, capsys):
    """Runs the command; returns its exit code, stdout and stderr."""

    def command(*overrides, output=tmp_path / "out"):
        settings = {"pipeline": models / "video", "output_dir": output, "batch_size": 3}
        settings |= {f"evaluation.protocol.{key}": value for key, value in COUNTS.items()}
        settings |= {"evaluation.classifier": models / "classifier", "evaluation.num_inference_steps": 2}
        code = cli.main(["evaluate", *(f"{key}={value}" for key, value in settings.items()), *overrides])
        return code, *capsys.readouterr()

    return command


def samples(folder):
    found = {}
    clips = SampleFolder(folder / SAMPLES_FOLDER, ("frames",))
    for path in sorted((folder / SAMPLES_FOLDER).glob("*.npz")):
        clip = clips.load(path.stem)
        found[path.stem] = {"frames": clip.frames.astype(int), "keyframe": clip.keyframe.astype(int)}
    return found


def test_measures_a_pipeline_and_goes_on_where_it_stopped(run, tmp_path):
    folder = tmp_path / "out"
    code, said, _ = run()
    assert code == 0 and str(folder / REPORT_FILE) in said and "Motion" in said
    results = json.loads((folder / RESULTS_FILE).read_text())
    assert results["model"]["num_inference_steps"] == 2
    assert {"unet", "keyframe.unet"} <= set(results["model"]["weights_sha256"])
    made = samples(folder)
    assert list(made) == ["heldout-00000", "image-00000", "seen-00000", "seen-00001"]
    assert made["seen-00000"]["frames"].shape == (4, 32, 32, 3)
    assert (made["seen-00000"]["frames"] != made["seen-00001"]["frames"]).any()

    # One clip lost, and clips made one at a time: the same again, and nothing else is touched.
    times = {path.name: path.stat().st_mtime_ns for path in (folder / SAMPLES_FOLDER).iterdir()}
    (folder / SAMPLES_FOLDER / "seen-00001.npz").unlink()
    assert run("batch_size=1")[0] == 0
    again = samples(folder)
    for name, arrays in made.items():
        for key, values in arrays.items():
            assert np.abs(again[name][key] - values).max() <= 1, name  # sums in another order, then rounding to bytes
    now = {path.name: path.stat().st_mtime_ns for path in (folder / SAMPLES_FOLDER).iterdir()}
    assert [name for name in sorted(times) if now[name] != times[name]] == ["seen-00001.json", "seen-00001.npz"]


@pytest.mark.parametrize(("position", "index"), [("first", 0), ("center", 2), (3, 3)])
def test_the_image_part_gives_the_real_frame_at_the_place_of_the_models_key_frame(
    run, models, tmp_path, position, index
):
    video = models / f"video-{position}"
    pipeline = tiny.video_pipeline(models / "base", keyframe_position=position)
    save_pipeline(pipeline, video, with_base=False)
    none = ["evaluation.protocol.num_prompts=0", "evaluation.protocol.num_heldout_prompts=0"]
    assert run(*none, f"pipeline={video}")[0] == 0
    protocol = SpritesProtocol(0, 0, 1, num_frames=4, size=32)
    (task,) = protocol.tasks()
    clip = samples(tmp_path / "out")[task.name]
    np.testing.assert_array_equal(clip["keyframe"], protocol.render(task.sprite).frames[index])
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text())
    assert results["protocol"]["identifier"] == protocol.identifier
    assert results["model"]["keyframe_index"] == index
    assert f"which is frame {index} of the clip" in (tmp_path / "out" / REPORT_FILE).read_text()
    fidelity = psnr(clip["frames"][index].astype(np.uint8), clip["keyframe"].astype(np.uint8))
    assert results["clips"][0]["measures"]["psnr"] == fidelity


def test_bad_input_ends_in_one_line(run, models, tmp_path):
    cases = [
        (["evaluation.protocol.num_prompts=-1"], "-1"),
        (["evaluation.classifier=none-such"], "none-such"),
        ([f"evaluation.classifier={models / 'poor'}"], "background"),
        (["evaluation.protocol.num_frames=16"], "16 frames"),
        (["pipeline=none-such"], "none-such"),
        (["evaluation.protocol.num_promts=3"], "num_prompts"),
    ]
    for overrides, words in cases:
        code, _, told = run(*overrides)
        errors = [line for line in told.splitlines() if line.startswith("error: ")]
        assert code == 2 and len(errors) == 1 and words in errors[0], (overrides, told)
        assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob(RESULTS_FILE))


def test_clips_of_other_settings_are_refused_before_anything_is_judged(run):
    assert run("evaluation.protocol.num_heldout_prompts=0", "evaluation.protocol.num_image_prompts=0")[0] == 0
    for override, words in (
        ("guidance_scale=3", "guidance_scale was 7.5 and is 3"),
        ("gamma=0.1", "gamma was 0.02 and is 0.1"),
    ):
        code, _, told = run(f"evaluation.{override}")
        assert code == 2 and words in told


@pytest.mark.slow
def test_two_processes_share_the_clips_and_one_judges_them(models, run, tmp_path):
    settings = {"pipeline": models / "video", "output_dir": tmp_path / "two", "batch_size": 1}
    settings |= {f"evaluation.protocol.{key}": value for key, value in COUNTS.items()}
    settings |= {"evaluation.classifier": models / "classifier", "evaluation.num_inference_steps": 2}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "scripts/evaluate.py"), *(f"{key}={value}" for key, value in settings.items())]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(REPORT_FILE) == 1
    assert run("batch_size=1", output=tmp_path / "one")[0] == 0
    one, two = (samples(tmp_path / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    for name, arrays in one.items():
        for key, values in arrays.items():
            np.testing.assert_array_equal(values, two[name][key])
    assert len(json.loads((tmp_path / "two" / RESULTS_FILE).read_text())["clips"]) == len(one)

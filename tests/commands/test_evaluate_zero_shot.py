"""`evaluate` on miniature UCF-101 and MSR-VTT, from files on disk to the report, with real codecs and real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import tiny, tiny_detectors, zero_shot_data
from microcinema.commands import cli
from microcinema.data.video_reader import read_clip
from microcinema.data.video_writer import write_video
from microcinema.evaluation.video_metrics import psnr
from microcinema.evaluation.vit import VJEPA
from microcinema.evaluation.zero_shot import (
    _FEW_CLIPS,
    BROKEN_FILE,
    FEATURES_FOLDER,
    KEYFRAMES_FOLDER,
    MANIFEST_FILE,
    REFERENCE_FOLDER,
    REPORT_FILE,
    RESULTS_FILE,
    SAMPLES_FOLDER,
    _resized,
)
from microcinema.pipelines.sample_folder import SampleFolder
from microcinema.pipelines.saving import save_pipeline

ROOT = Path(__file__).parents[2]
SAMPLES, REAL, FRAMES, SIZE = 7, 9, 10, 32


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Data sets, a pipeline and detectors."""
    folder = tmp_path_factory.mktemp("zero-shot")
    zero_shot_data.ucf101(folder / "ucf101")
    zero_shot_data.msrvtt(folder / "msrvtt")
    pipeline = tiny.video_pipeline(folder / "base", keyframe_position=1)
    save_pipeline(pipeline, folder / "model", with_base=False)
    tiny_detectors.clip_folder(folder / "clip")
    return folder


@pytest.fixture(scope="module")
def weights(files):
    scripts = {
        "video": tiny_detectors.SmallVideoScript(),
        "c3d": tiny_detectors.PublicC3D(),
        "inception": tiny_detectors.PublicInception(),
    }
    chosen = {"evaluation.clip.weights": files / "clip"}
    for key, module in scripts.items():
        path, sha256 = tiny_detectors.write_script(module, files / f"{key}.pt")
        chosen |= {f"evaluation.{key}.weights": path, f"evaluation.{key}.sha256": sha256}
    return chosen


def protocol(**changes):
    small = {"num_frames": FRAMES, "fps": "null", "height": SIZE, "width": SIZE, **changes}
    return {f"evaluation.protocol.{key}": value for key, value in small.items()}


@pytest.fixture(scope="module")
def chosen(files, weights):
    """Overrides by data set."""
    common = {"pipeline": files / "model", "batch_size": 2, "evaluation.num_inference_steps": 2, **weights}
    drawn = protocol(selection="draw", num_samples=SAMPLES, num_real=REAL)
    ucf101 = {"evaluation": "ucf101", "evaluation.root": files / "ucf101", **common, **drawn}
    every = protocol(num_samples=4, num_real=4)
    msrvtt = {"evaluation": "msrvtt", "evaluation.root": files / "msrvtt", **common, **every}
    return {"ucf101": ucf101, "msrvtt": msrvtt}


def arguments(overrides):
    return ["evaluate", *(f"{key}={value}" for key, value in overrides.items())]


@pytest.fixture(scope="module")
def whole(chosen, tmp_path_factory):
    """An uninterrupted run of one process by data set: folder and results."""
    found = {}
    for name, overrides in chosen.items():
        folder = tmp_path_factory.mktemp(name)
        assert cli.main(arguments({**overrides, "output_dir": folder})) == 0
        found[name] = folder, (folder / RESULTS_FILE).read_text(encoding="utf-8")
    return found


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command; returns its exit code, stdout and stderr."""

    def command(overrides, **changes):
        changes = {key.replace("__", "."): value for key, value in changes.items()}
        code = cli.main(arguments({**overrides, "output_dir": tmp_path / "out", **changes}))
        return code, *capsys.readouterr()

    return command


def test_everything_is_measured(whole):
    folder, text = whole["ucf101"]
    results = json.loads(text)
    assert set(results["values"]) == {
        *("fvd", "kvd", "is", "clipsim", "frame_fid", "clip_consistency", "motion_magnitude", "psnr", "ssim")
    }
    fvd = results["values"]["fvd"]
    assert (fvd["num_generated"], fvd["num_real"], fvd["floor_count"]) == (SAMPLES, REAL, REAL // 2)
    assert results["not_measured"] == {} and results["shortfalls"] == []
    assert results["warnings"] == [_FEW_CLIPS]
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert manifest["identifier"] == results["protocol"]["identifier"]
    assert len(manifest["samples"]) == SAMPLES and len(manifest["real"]) == REAL
    assert manifest["keyframe_index"] == results["generated"]["keyframe_index"] == 1
    clips = [SampleFolder(folder / SAMPLES_FOLDER, ("frames",)).load(f"{index:05d}") for index in range(SAMPLES)]
    fidelity = np.mean([psnr(clip.frames[1], clip.keyframe) for clip in clips])
    assert results["values"]["psnr"]["value"] == pytest.approx(fidelity)
    assert {"unet", "keyframe.unet"} <= set(results["generated"]["weights_sha256"])


def test_the_report_shows_the_best_and_the_worst_clips(whole):
    folder, text = whole["ucf101"]
    clips = json.loads(text)["clips"]
    best = max(clips, key=lambda clip: clip["measures"]["psnr"])
    page = (folder / REPORT_FILE).read_text(encoding="utf-8")
    assert [clip["name"] for clip in clips] == [f"{index:05d}" for index in range(SAMPLES)]
    assert f"best by Key frame, PSNR: {best['measures']['psnr']:.1f} dB" in page and "worst by CLIPSIM" in page


def test_two_runs_are_compared(whole, chosen, tmp_path, capsys):
    other = {**chosen["msrvtt"], "evaluation.num_inference_steps": 1, "output_dir": tmp_path / "one_step"}
    assert cli.main(arguments(other)) == 0
    compared = {"compare": f"[{whole['msrvtt'][0]},{tmp_path / 'one_step'}]", "output_dir": tmp_path / "out"}
    assert cli.main(arguments(compared)) == 0
    said = capsys.readouterr().out
    assert "one_step" in said and "FVD ↓" in said and said.strip().endswith("comparison.html")
    cells = {row["key"]: row["cells"][1] for row in json.loads((tmp_path / "out/comparison.json").read_text())["rows"]}
    assert cells["psnr"]["difference"]["n"] == 4 and {"low", "high"} <= cells["fvd"]["difference"].keys()


def test_features_are_those_of_the_clips(whole, files):
    """Frame FID's mean colours, against the sample files themselves."""
    from microcinema.evaluation.features import Features

    folder, _ = whole["ucf101"]
    (place,) = (folder / FEATURES_FOLDER).iterdir()
    found = Features(sorted(place.glob("*.npz"))).all("frame_features")
    for index in range(SAMPLES):
        with np.load(folder / SAMPLES_FOLDER / f"{index:05d}.npz") as arrays:
            colours = arrays["frames"].astype(float).mean(axis=(1, 2)) / 255  # already of the protocol's size
        np.testing.assert_allclose(found[index, :, :3], colours, atol=1e-5)


def test_captions_are_asked_for_as_they_stand(whole):
    folder, _ = whole["msrvtt"]
    manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
    texts = {text.strip() for captions in zero_shot_data.CAPTIONS.values() for text in captions}
    assert {sample["prompt"] for sample in manifest["samples"]} <= texts
    assert manifest["real"] == list(zero_shot_data.CAPTIONS)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert manifest["identifier"] in page and "342.86" in page and "weak evidence" in page
    assert "<h1>model on msrvtt2990</h1>" in page and "4 generated clips, 4 real ones" in page
    assert "key frame, 1</figcaption>" in page and r"FVD $\downarrow$" in page and "| FVD ↓ |" in page


def environment():
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def assert_alike(found, expected):
    """Equal, but for the rounding of numbers."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_alike(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for pair in zip(found, expected, strict=True):
            assert_alike(*pair)
    else:
        assert found == (pytest.approx(expected, rel=1e-4, abs=1e-6) if isinstance(expected, float) else expected)


def two_processes(overrides, cwd):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "scripts/evaluate.py"), *arguments(overrides)[1:]]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ucf101", "msrvtt"])
def test_killed_and_resumed_by_two_processes_the_results_are_the_same(chosen, whole, tmp_path, name):
    overrides = {**chosen[name], "output_dir": tmp_path / "out"}
    samples = tmp_path / "out" / SAMPLES_FOLDER
    command = [sys.executable, str(ROOT / "scripts/evaluate.py"), *arguments(overrides)[1:]]
    killed = subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not list(samples.glob("[0-9]*.npz")) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    made = len(list(samples.glob("[0-9]*.npz")))
    assert 0 < made < 4 and not (tmp_path / "out" / RESULTS_FILE).exists()
    done = two_processes(overrides, tmp_path)
    assert done.returncode == 0, done.stderr
    # Batches differ, and with them the last bits of a network and, rarely, a pixel's rounding.
    assert_alike(json.loads((tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8")), json.loads(whole[name][1]))
    assert done.stdout.count(REPORT_FILE) == 1  # the first process alone speaks


def test_a_second_run_measures_nothing_again(chosen, whole, tmp_path, monkeypatch):
    folder = shutil.copytree(whole["ucf101"][0], tmp_path / "again")
    monkeypatch.setattr(tiny_detectors.SmallVideoScript, "forward", None)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")}
    assert cli.main(arguments({**chosen["ucf101"], "output_dir": folder})) == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.npz")} == times
    assert (folder / RESULTS_FILE).read_text(encoding="utf-8") == whole["ucf101"][1]


# Folders of videos


def write_folder(folder: Path, clips, names=None) -> Path:
    for index, clip in enumerate(clips):
        write_video(folder / (names[index] if names else f"{index}.mp4"), clip, 25, lossless=True)
    return folder


def sample_frames(folder: Path) -> list[np.ndarray]:
    found = []
    for path in sorted((folder / SAMPLES_FOLDER).glob("[0-9]*.npz")):
        with np.load(path) as arrays:
            found.append(arrays["frames"])
    return found


def test_a_folder_of_the_same_clips_has_the_same_numbers(run, chosen, whole, tmp_path):
    clips = sample_frames(whole["ucf101"][0])
    write_folder(tmp_path / "videos", clips)
    code, said, _ = run(chosen["ucf101"], generated_dir=tmp_path / "videos")
    assert code == 0 and "compressed" in said
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8"))
    expected = json.loads(whole["ucf101"][1])
    assert results["protocol"]["identifier"] == expected["protocol"]["identifier"]
    for key in set(expected["values"]) - {"psnr", "ssim"}:  # a folder has no key frames
        assert results["values"][key] == expected["values"][key], key
    assert "psnr" not in results["values"]


def test_two_folders_are_compared(run, files, weights, tmp_path):
    clips = [zero_shot_data.clip(seed, FRAMES, SIZE, SIZE) for seed in range(8)]
    write_folder(tmp_path / "a", clips)
    write_folder(tmp_path / "b", clips)
    write_folder(tmp_path / "c", [255 - clip for clip in clips])
    overrides = {"evaluation": "folders", "generated_dir": tmp_path / "a", "batch_size": 3, **weights}
    overrides |= protocol()
    values = {}
    for name in ("b", "c"):
        code, said, told = run({**overrides, "evaluation.root": tmp_path / name, "output_dir": tmp_path / name / "out"})
        assert code == 0, told
        assert "IS not measured" in said and "[folders-2-" in said
        results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8"))
        values[name] = results["values"]["fvd"]["value"]
        assert "clipsim" not in results["values"]
        shutil.rmtree(tmp_path / "out")
    assert values["b"] == pytest.approx(0, abs=1e-9) and values["c"] > 0.01


# Reference statistics


def test_jedi_has_curve_interval_and_floor(run, tmp_path):
    torch.manual_seed(0)
    state = VJEPA(VJEPA.head_width, 32, 1).state_dict()
    for value in state.values():
        torch.nn.init.normal_(value, std=0.3)
    torch.save({"target_encoder": {k: v for k, v in state.items() if "pooler" not in k}}, tmp_path / "vith16.pth.tar")
    torch.save({"classifier": {k: v for k, v in state.items() if "pooler" in k}}, tmp_path / "probe.pth.tar")
    for name, seed in (("real", 1), ("generated", 2)):
        clips = np.random.default_rng(seed).integers(0, 256 // seed, (4, 16, 16, 16, 3), np.uint8)
        write_folder(tmp_path / name, clips)
    overrides = {
        "evaluation": "folders",
        "evaluation.root": tmp_path / "real",
        "generated_dir": tmp_path / "generated",
        "evaluation.video.detector": "vjepa",
        "evaluation.video.preparation": "squash",
        "evaluation.video.weights": tmp_path / "vith16.pth.tar",
        "evaluation.probe.weights": tmp_path / "probe.pth.tar",
        **protocol(num_frames=16),
    }
    code, said, _ = run(overrides)
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8"))
    jedi = results["values"]["jedi"]
    assert code == 0 and "fvd" not in results["values"] and "JEDi" in said and "at infinite N" in said
    assert jedi["low"] < jedi["value"] < jedi["high"] and jedi["curve"][-1][0] == 4 and jedi["floor_count"] == 2
    assert results["detectors"]["VideoFeatures"]["probe_sha256"]
    assert "<h2>JEDi against N</h2>" in (tmp_path / "out" / REPORT_FILE).read_text(encoding="utf-8")


def test_features_of_real_clips_are_shared_between_runs_and_refused_if_they_are_of_others(run, chosen, whole, tmp_path):
    clips = sample_frames(whole["ucf101"][0])
    overrides = {**chosen["ucf101"], "generated_dir": write_folder(tmp_path / "videos", clips)}
    reference = tmp_path / "reference"
    assert run(overrides, evaluation__real_features_dir=reference)[0] == 0
    (place,) = reference.iterdir()
    times = {path: path.stat().st_mtime_ns for path in place.iterdir()}
    for given in (reference, place):  # the folder of all, or the one itself
        assert run(overrides, evaluation__real_features_dir=given, output_dir=tmp_path / "second")[0] == 0
        assert {path: path.stat().st_mtime_ns for path in place.iterdir()} == times
    other = {
        "evaluation__protocol__clip_position": "first",
        "evaluation__real_features_dir": place,
        "output_dir": tmp_path / "third",
    }
    code, _, told = run(overrides, **other)
    assert code == 2 and "clip_position was center and is first" in told and "evaluation.real_features_dir" in told
    assert not (tmp_path / "third" / RESULTS_FILE).exists()
    assert run(overrides, **{**other, "evaluation__real_features_dir": reference})[0] == 0
    assert len(list(reference.iterdir())) == 2


# Bad input


def assert_refused(run, overrides, words, **changes):
    code, _, told = run(overrides, **changes)
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1 and words in errors[0], told


def test_fewer_real_videos_are_counted_refused_or_marked(run, chosen, whole, files, tmp_path):
    clips = sample_frames(whole["msrvtt"][0])
    root = shutil.copytree(files / "msrvtt", tmp_path / "msrvtt")
    (root / "TestVideo" / "video7011.mp4").unlink()
    overrides = {**chosen["msrvtt"], "evaluation.root": root, "generated_dir": write_folder(tmp_path / "videos", clips)}
    assert_refused(run, overrides, "3 of 4 real videos")
    assert not (tmp_path / "out").exists()
    code, said, _ = run(overrides, evaluation__allow_fewer="true")
    assert code == 0 and "INCOMPLETE: 3 of 4 real videos" in said
    assert "Incomplete" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8"))
    assert results["protocol"]["identifier"] != json.loads(whole["msrvtt"][1])["protocol"]["identifier"]


def test_fewer_generated_videos_are_counted_refused_or_marked(run, chosen, whole, tmp_path):
    clips = sample_frames(whole["msrvtt"][0])[:3]
    numbered = write_folder(tmp_path / "numbered", clips, ["0.mp4", "2.mp4", "3.mp4"])
    named = write_folder(tmp_path / "named", clips, ["a.mp4", "b.mp4", "c.mp4"])
    assert_refused(run, chosen["msrvtt"], "3 of 4 videos in generated_dir=", generated_dir=numbered)
    code, said, _ = run(chosen["msrvtt"], generated_dir=numbered, evaluation__allow_fewer="true")
    assert code == 0 and "INCOMPLETE: 3 of 4" in said and "CLIPSIM" in said
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8"))
    assert results["protocol"]["identifier"] != json.loads(whole["msrvtt"][1])["protocol"]["identifier"]
    # Without numbers nobody knows which prompt a video was made from.
    assert_refused(run, chosen["msrvtt"], "names do not say which", generated_dir=named)
    write_folder(tmp_path / "numbered", clips[:1], ["9.mp4"])
    assert_refused(run, chosen["msrvtt"], "'9.mp4' (9) belongs to no sample", generated_dir=numbered)


def test_broken_real_videos_are_told_at_once_before_anything_is_made_and_can_be_left_out(
    run, chosen, files, tmp_path, monkeypatch
):
    root, out = shutil.copytree(files / "msrvtt", tmp_path / "msrvtt"), tmp_path / "out"
    broken = ["video7010.mp4", "video9999.mp4"]
    for name in broken:
        (root / "TestVideo" / name).write_bytes(b"no video")
    overrides = {**chosen["msrvtt"], "evaluation.root": root}
    code, _, told = run(overrides)
    (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
    assert code == 2 and "2 of 4 clips cannot be read" in error and all(name in error for name in broken)
    assert not (out / SAMPLES_FOLDER).exists()
    listed = out / BROKEN_FILE
    assert [line.split("\t")[0] for line in listed.read_text().splitlines()] == ["video7010", "video9999"]
    code, said, _ = run(overrides, evaluation__skip_real=listed)
    assert code == 0 and "2 of 4 real videos are left out" in said
    times = {path: path.stat().st_mtime_ns for path in (out / REFERENCE_FOLDER).rglob("*.npz")}
    skipped = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))
    for name in broken:
        shutil.copy(files / "msrvtt" / "TestVideo" / name, root / "TestVideo" / name)
    assert run(overrides)[0] == 0  # batches of two: each lacked one
    assert all(path.stat().st_mtime_ns == time for path, time in times.items())
    mended = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))
    assert mended["protocol"]["identifier"] != skipped["protocol"]["identifier"]
    listed.write_text("video1\n")
    assert_refused(run, overrides, "'video1', which is no real video", evaluation__skip_real=listed)
    assert_refused(run, overrides, "skip_real='gone' cannot be read", evaluation__skip_real="gone")


def test_key_frames_of_real_clips(run, chosen, files, tmp_path):
    """The model gets the frame of the real clip at its own place, and so does a folder of another model's videos."""
    out, frames = tmp_path / "out", zero_shot_data.FRAMES
    i2v = {**chosen["msrvtt"], "evaluation": "msrvtt_i2v", "evaluation.protocol.num_samples": 4, **protocol(stride=1)}
    i2v.pop("evaluation.protocol.num_real")
    code, _, told = run(i2v)
    assert code == 0, told
    results = json.loads((out / RESULTS_FILE).read_text(encoding="utf-8"))
    assert results["protocol"]["identifier"].startswith("msrvtt_i2v-2-") and results["values"]["psnr"]["n"] == 4
    manifest = json.loads((out / MANIFEST_FILE).read_text(encoding="utf-8"))
    assert [sample["source"] for sample in manifest["samples"]] == manifest["real"] and manifest["keyframe_index"] == 1
    for sample in manifest["samples"]:
        path = next((files / "msrvtt" / "TestVideo").glob(f"{sample['source']}.*"))
        expected = read_clip(path, frames)[1]
        found = np.asarray(Image.open(out / KEYFRAMES_FOLDER / f"{sample['index']:05d}.png"))
        np.testing.assert_array_equal(found, expected)
    assert_refused(run, i2v, "is frame 0, and the model's is frame 1", evaluation__protocol__keyframe="first")
    # Real clips as generated ones: their key frames are kept exactly.
    videos = tmp_path / "videos"
    for sample in manifest["samples"]:
        path = next((files / "msrvtt" / "TestVideo").glob(f"{sample['source']}.*"))
        clip = _resized(read_clip(path, FRAMES), (SIZE, SIZE))
        write_video(videos / f"{sample['source']}.mp4", clip, 25, lossless=True)
    code, _, told = run(i2v, generated_dir=videos, output_dir=tmp_path / "rival")
    assert code == 0, told
    rival = json.loads((tmp_path / "rival" / RESULTS_FILE).read_text(encoding="utf-8"))
    assert rival["values"]["psnr"]["value"] == 60 and rival["values"]["fvd"]["value"] == pytest.approx(0, abs=1e-6)
    assert results["values"]["psnr"]["value"] < 60


def test_a_list_that_asks_for_less_than_the_protocol_is_refused(run, chosen):
    assert_refused(run, chosen["msrvtt"], "4 of 2990 prompts", evaluation__protocol__num_samples=2990)
    assert_refused(run, chosen["msrvtt"], "4 prompts, and the protocol asks for 3", evaluation__protocol__num_samples=3)
    assert_refused(run, chosen["msrvtt"], "4 of 2990 real videos", evaluation__protocol__num_real=2990)


def test_videos_that_do_not_fit_are_named(run, chosen, tmp_path):
    clips = [zero_shot_data.clip(seed, FRAMES, SIZE, SIZE) for seed in range(4)]
    short = write_folder(tmp_path / "short", [*clips[:3], clips[3][:8]])
    assert_refused(run, chosen["msrvtt"], "3.mp4' (8 frames", generated_dir=short)
    mixed = write_folder(tmp_path / "mixed", [*clips[:3], clips[3][:, :16]])
    assert_refused(run, chosen["msrvtt"], "must all have one size", generated_dir=mixed, output_dir=tmp_path / "b")
    damaged = write_folder(tmp_path / "damaged", clips)
    (damaged / "2.mp4").write_bytes(b"no video")
    assert_refused(run, chosen["msrvtt"], "2.mp4' cannot be decoded", generated_dir=damaged, output_dir=tmp_path / "c")
    assert not list(tmp_path.rglob(RESULTS_FILE))


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"evaluation__video__sha256": "f" * 64}, "not ffff"),
        ({"evaluation__video__weights": "gone.pt"}, "gone.pt"),
        ({"evaluation__root": "/gone"}, "'/gone/UCF-101'"),
        ({"generated_dir": "/gone"}, "generated_dir '/gone' is not there"),
        ({"evaluation__protocol__prompts": "caption"}, "prompts=caption"),
        ({"evaluation__protocol__prompts": "poetic"}, "'poetic'"),
        ({"evaluation__torch_dtype": "int8"}, "int8"),
        ({"pipeline": "/gone"}, "/gone"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_made(run, chosen, tmp_path, changes, words):
    assert_refused(run, chosen["ucf101"], words, **changes)
    assert not list(tmp_path.rglob("*.npz")) and not list(tmp_path.rglob(RESULTS_FILE))


def test_without_any_weights_nothing_starts(run, chosen, tmp_path):
    none = {key: value for key, value in chosen["ucf101"].items() if "weights" not in key and "sha256" not in key}
    assert_refused(run, none, "evaluation.video.weights, evaluation.c3d.weights")
    assert_refused(run, {"evaluation": "sprites", "generated_dir": tmp_path}, "zero-shot protocols")
    assert_refused(run, {"evaluation": "folders", "evaluation.root": tmp_path}, "no videos")


def test_only_similarity_is_measured_where_nothing_is_compared(run, chosen, files, tmp_path):
    overrides = {**chosen["msrvtt"], "evaluation": "msrvtt_all", "evaluation.protocol.num_samples": 10}
    overrides.pop("evaluation.protocol.num_real")
    code, said, told = run(overrides)
    assert code == 0, told
    results = json.loads((tmp_path / "out" / RESULTS_FILE).read_text(encoding="utf-8"))
    assert "clipsim" in results["values"] and "fvd" not in results["values"] and results["counts"]["real"] == 0
    assert results["values"]["clipsim"]["n"] == 10 and "FVD, KVD, JEDi not measured" in said


def test_the_codec_of_the_report_plays(whole, tmp_path):
    import base64
    import re

    page = (whole["ucf101"][0] / "report.html").read_text(encoding="utf-8")
    videos = re.findall(r"data:video/mp4;base64,([^\"]+)", page)
    assert len(videos) == SAMPLES
    (tmp_path / "clip.mp4").write_bytes(base64.b64decode(videos[0]))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == FRAMES
    assert not re.search(r"https?://|@import|url\(", page)

"""VBench's suites in miniature: what its code finds, and its results in the report."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures import tiny
from microcinema.commands import cli
from microcinema.config.compose import compose
from microcinema.data.video_reader import probe, read_clip
from microcinema.evaluation.vbench import NUM_FLICKERING
from microcinema.evaluation.vit import DINO
from microcinema.pipelines.saving import save_pipeline

ROOT = Path(__file__).parents[2]
FRAMES = 4
I2V = [  # rows as in vbench2_i2v_full_info.json
    {
        "prompt_en": "a cat, sitting",
        "dimension": ["i2v_subject", "subject_consistency", "imaging_quality", "temporal_flickering"],
        "image_type": "animal",
    },
    {"prompt_en": "a street, camera pans left", "dimension": ["camera_motion"], "image_type": "architecture"},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model and the suites' files in their own layouts."""
    folder = tmp_path_factory.mktemp("vbench")
    save_pipeline(tiny.video_pipeline(folder / "base", keyframe_position=1), folder / "model", with_base=False)
    for number, row in enumerate(I2V):
        row["image_name"] = f"{row['prompt_en'].split(',')[0]}.jpg"
        (folder / "crop" / "1-1").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (90 * number, 0, 90)).save(folder / "crop" / "1-1" / row["image_name"])
    (folder / "i2v.json").write_text(json.dumps(I2V))
    t2v = [
        {"prompt_en": "still life", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a dog", "dimension": ["color"]},
    ]
    (folder / "t2v.json").write_text(json.dumps(t2v))
    torch.manual_seed(0)
    torch.save(DINO(2 * DINO.head_width, 32, 1).state_dict(), folder / "dino.pth")
    return folder


def arguments(files, output_dir, *more, kind="vbench_i2v"):
    info = [f"evaluation.protocol.info={files / ('i2v.json' if kind == 'vbench_i2v' else 't2v.json')}"]
    info += [f"evaluation.protocol.images={files / 'crop' / '1-1'}"] if kind == "vbench_i2v" else []
    common = [f"pipeline={files / 'model'}", "evaluation.num_inference_steps=1", f"evaluation.num_frames={FRAMES}"]
    common += [f"evaluation.dino.weights={files / 'dino.pth'}"]
    return ["evaluate", f"evaluation={kind}", *info, *common, f"output_dir={output_dir}", "batch_size=2", *more]


@pytest.fixture(scope="module")
def made(files, tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    assert cli.main(arguments(files, folder, "evaluation.protocol.num_videos=2")) == 0
    return folder


def names(folder):
    return sorted(path.name for path in (folder / "videos").iterdir())


def test_the_videos_are_what_the_suite_looks_for(made):
    """It takes the suffix of the first file of its folder for that of all: there may be nothing but videos."""
    assert names(made) == [f"{row['prompt_en']}-{index}.mp4" for row in I2V for index in range(2)]
    assert all(probe(path).num_frames == FRAMES for path in (made / "videos").iterdir())
    record = json.loads((made / "samples" / "00001.json").read_text())
    assert record["generator"] == {"seed": 0, "sample_index": 0, "video_index": 1}
    assert record["keyframe"]["source"].endswith("a cat.jpg")


def test_prompts_of_flickering_have_more_videos_and_dimensions_are_chosen(files, tmp_path):
    suite = compose("evaluate", arguments(files, tmp_path, kind="vbench")[1:]).evaluation.protocol.build()
    assert [video.name for video in suite.videos()][::NUM_FLICKERING] == ["still life-0", "a dog-0"]
    assert len(suite.videos()) == NUM_FLICKERING + 5
    chosen = arguments(files, tmp_path, "evaluation.protocol.dimensions=[color]", kind="vbench")
    videos = compose("evaluate", chosen[1:]).evaluation.protocol.build().videos()
    assert [video.name for video in videos] == [f"a dog-{index}" for index in range(5)]


def write_results(path, folder):
    def rows(values):
        return [
            {"video_path": str(folder / "videos" / f"{name}.mp4"), "video_results": v} for name, v in values.items()
        ]

    subject = {"a cat, sitting-0": 0.9, "a cat, sitting-1": 0.7}
    camera = {"a street, camera pans left-0": True, "a street, camera pans left-1": False}
    path.mkdir()  # the suite writes a file for each dimension that it is asked for
    quality = dict.fromkeys(subject, 61.0)  # by a network whose scale ends at 100
    results = ("i2v_subject", 0.8, subject), ("camera_motion", 0.5, camera), ("imaging_quality", 61.0, quality)
    for dimension, score, values in results:
        content = {dimension: [score, rows(values)]}
        (path / f"{dimension}_eval_results.json").write_text(json.dumps(content))
    (path / f"{dimension}_full_info.json").write_text("[]")


def test_results_of_the_suite_stand_in_the_report_and_can_be_compared(files, made, tmp_path, capsys):
    made = shutil.copytree(made, tmp_path / "made")
    write_results(tmp_path / "results", made)
    more = "evaluation.protocol.num_videos=2", f"evaluation.results={tmp_path / 'results'}"
    assert cli.main(arguments(files, made, *more)) == 0
    said = capsys.readouterr().out
    assert "i2v subject" in said and "80.00" in said and "i2v subject here" in said
    results = json.loads((made / "results.json").read_text())
    clip = results["clips"][1]["measures"]
    assert clip.pop("i2v_subject") == 0.7 and clip.pop("imaging_quality") == 0.61 and results["shortfalls"] == []
    assert clip.keys() == {"i2v_subject_here", "subject_consistency_here", "temporal_flickering_here"}
    assert results["not_measured"] == {} and set(results["detectors"]["i2v_subject"]) == {"dimension", "dino"}
    keys = [measure["key"] for measure in results["measures"]]
    assert keys[:3] == ["i2v_subject", "i2v_subject_here", "subject_consistency_here"]
    assert results["values"]["i2v_subject_here"]["n"] == 2
    page = (made / "report.html").read_text()
    assert "<h1>model on vbench_i2v</h1>" in page and "What others published" not in page
    assert cli.main(["evaluate", f"compare=[{made},{made}/../{made.name}]", f"output_dir={tmp_path / 'out'}"]) == 0
    rows = json.loads((tmp_path / "out" / "comparison.json").read_text())["rows"]
    texts = {row["key"]: row["cells"][1]["text"] for row in rows}
    assert texts["i2v_subject"] == "80.00" and texts["camera_motion"] == "50.00" and "i2v_subject_here" in texts
    assert all(row["cells"][1]["difference"]["value"] == 0 for row in rows)


def test_dimensions_are_computed_of_the_videos_as_the_suite_reads_them(made):
    results = json.loads((made / "results.json").read_text())
    videos = [read_clip(made / "videos" / f"a cat, sitting-{index}.mp4", FRAMES) for index in range(2)]
    changes = [np.abs(np.diff(video.astype(float), axis=0)).mean() / 255 for video in videos]
    found = results["values"]["temporal_flickering_here"]
    assert found["value"] == pytest.approx(1 - np.mean(changes), abs=1e-6) and found["n"] == 2
    assert results["not_measured"] == {
        "imaging_quality": "evaluation.musiq.weights not set",
        "camera_motion": "its network CoTracker is in research code only",
    }


def test_without_images_there_is_no_subject_of_them(files, tmp_path, capsys):
    few = "evaluation.protocol.dimensions=[i2v_subject]", "evaluation.protocol.num_videos=1"
    assert cli.main(arguments(files, tmp_path / "out", "evaluation.protocol.images=null", *few)) == 0
    assert not (tmp_path / "out" / "results.json").exists()
    assert "1 videos; measure the rest by VBench's code" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_and_resumed_by_two_processes_the_results_are_the_same(files, made, tmp_path):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    overrides = arguments(files, tmp_path / "out", "evaluation.protocol.num_videos=2")
    samples = tmp_path / "out" / "samples"
    killed = subprocess.Popen([sys.executable, "-m", "microcinema", *overrides], env=environment)
    deadline = time.monotonic() + 300
    while not list(samples.glob("[0-9]*.npz")) and time.monotonic() < deadline:
        time.sleep(0.002)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert 0 < len(list(samples.glob("[0-9]*.npz"))) <= 4 and not (tmp_path / "out" / "results.json").exists()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "microcinema"]
    done = subprocess.run([*launch, *overrides], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for name in names(made):
        assert (tmp_path / "out" / "videos" / name).read_bytes() == (made / "videos" / name).read_bytes()
    assert (tmp_path / "out" / "results.json").read_bytes() == (made / "results.json").read_bytes()


@pytest.mark.parametrize(
    "override, words",
    [
        ("evaluation.protocol.info=gone.json", "'gone.json' is no list of VBench"),
        ("evaluation.protocol.images=gone", "2 images of the suite are missing, first 'gone/a cat.jpg'"),
        ("evaluation.protocol.dimensions=[beauty]", "no dimension 'beauty'; it has i2v_subject"),
        ("evaluation.results=gone.json", "evaluation.results='gone.json' holds no results of VBench"),
        ("evaluation.results=.", "'.' holds no *_eval_results.json"),
        ("generated_dir=.", "generated_dir goes with the zero-shot protocols"),
    ],
)
def test_bad_input_ends_in_one_line_before_anything_is_made(files, tmp_path, capsys, override, words):
    assert cli.main(arguments(files, tmp_path / "out", override)) == 2
    told = capsys.readouterr().err
    assert words in told and told.count("error:") == 1 and not (tmp_path / "out" / "samples").exists()


def test_results_of_other_videos_are_refused(files, made, tmp_path, capsys):
    path = tmp_path / "eval_results.json"
    path.write_text(json.dumps({"color": [0.1, [{"video_path": "x/a dog-0.mp4", "video_results": 0.1}]]}))
    assert cli.main(arguments(files, made, f"evaluation.results={path}", "evaluation.protocol.num_videos=2")) == 2
    assert "'a dog-0' (color) is no video of this suite" in capsys.readouterr().err

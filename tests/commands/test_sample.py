"""The command `sample`, on tiny random pipelines: real files, real codecs, real processes."""

import csv
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fixtures import tiny
from microcinema.commands import cli, sample
from microcinema.config.compose import compose
from microcinema.data.video_reader import probe, read_clip
from microcinema.pipelines import sample_folder, sampler
from microcinema.pipelines.image_to_video import ImageToVideoPipeline
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.saving import save_pipeline
from microcinema.utils.hashing import hash_weights

ROOT = Path(__file__).parents[2]
PROMPT = "a large red star moving quickly to the left on sand"
TEXTS = {"a": "a star", "b": "a moon", "c": "a heart on sand", "d": "a large circle"}
ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is an accelerator")
ENDINGS = (".mp4", ".gif", ".png", ".json", "_keyframe.png", "_keyframe.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pipeline(tiny.video_pipeline(folder / "base"), folder / "video", with_base=False)
    return folder / "video"


@pytest.fixture
def run(model, tmp_path, capsys, monkeypatch):
    """Runs the command, whose files go to tmp_path/out; returns its exit code and what it said on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*overrides, output="out"):
        settings = [f"pipeline={model}", f"output_dir={output}", "num_inference_steps=2", *overrides]
        return cli.main(["sample", *settings]), *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def four(model, tmp_path_factory):
    """The overrides of four prompts, and the folder `out` that a whole run of them leaves."""
    folder = tmp_path_factory.mktemp("four")
    lines = ["id,prompt", *(f"{name},{text}" for name, text in TEXTS.items())]
    (folder / "prompts.csv").write_text("\n".join(lines))
    overrides = [f"pipeline={model}", f"prompts={folder / 'prompts.csv'}", "num_inference_steps=2", "output_dir=out"]
    with pytest.MonkeyPatch.context() as context:
        context.chdir(folder)
        assert cli.main(["sample", *overrides]) == 0
    return overrides, folder / "out"


@pytest.fixture
def made(monkeypatch):
    """What the two stages are called for, in order."""
    calls = []

    def counted(kind, method):
        def call(self, prompt, *arguments, **more):
            if not isinstance(getattr(self, "source", None), Path):
                calls.append((kind, prompt if isinstance(prompt, str) else prompt[0]))
            return method(self, prompt, *arguments, **more)

        return call

    for kind, pipeline in {"key frame": KeyframePipeline, "video": ImageToVideoPipeline}.items():
        monkeypatch.setattr(pipeline, "__call__", counted(kind, pipeline.__call__))
    return calls


def both(names):
    """As in `made`: all key frames, then all videos."""
    return [(kind, TEXTS[name]) for kind in ("key frame", "video") for name in names]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def digests(folder):
    return {path.name: digest(path) for path in folder.iterdir()}


def record_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


# What is made


def test_a_prompt_gives_a_video_with_all_that_belongs_to_it(run, tmp_path, model):
    asked = ["seed=3", "num_frames=5", "fps=6", "height=24", "guidance_scale=3", "keyframe.guidance_scale=null"]
    assert run(f"prompt={PROMPT}", *asked)[0] == 0
    name = "a-large-red-star-moving-quickly-to-the-left-on-sand-seed3"
    assert set(digests(tmp_path / "out")) == {f"{name}{ending}" for ending in ENDINGS}
    info = probe(tmp_path / "out" / f"{name}.mp4")
    assert (info.num_frames, info.fps, info.height, info.width) == (5, 6.0, 24, tiny.SIZE)
    with Image.open(tmp_path / "out" / f"{name}.gif") as gif:
        assert (gif.n_frames, gif.size) == (5, (tiny.SIZE, 24))

    record = record_of(tmp_path / "out", name)
    assert (record["prompt"], record["motion_prompt"], record["generator"]["seed"]) == (PROMPT, None, 3)
    assert (record["num_frames"], record["fps"], record["height"], record["width"]) == (5, 6.0, 24, tiny.SIZE)
    assert record["config"]["guidance_scale"] == record["guidance_scale"] == 3.0
    assert record["schedule"]["class"] == "DDIMScheduler"
    assert len(record["schedule"]["timesteps"]) == record["num_inference_steps"] == 2
    assert record["pipeline"]["training_schedule"]["prediction_type"] == "epsilon"
    assert record["versions"]["torch"] == torch.__version__
    assert set(record["weights_sha256"]) == {"unet", "vae", "text_encoder"}
    again = tiny.video_pipeline(model.parent / "base")
    assert record["weights_sha256"]["unet"] == hash_weights(again.unet)
    assert record["keyframe_encoder"]["sha256"] == record["weights_sha256"]["vae"]

    drawn = record["keyframe"]
    assert drawn == record_of(tmp_path / "out", f"{name}_keyframe")
    assert (record["source"], drawn["source"]) == (str(model), str(model.parent / "base"))
    assert {"unet", "vae", "text_encoder"} <= set(drawn["weights_sha256"])
    assert drawn["arguments"] == {"num_inference_steps": 2, "guidance_scale": 3.0}  # those of the video
    pixels = np.array(Image.open(tmp_path / "out" / record["files"]["keyframe"]))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == drawn["sha256_of_pixels"]


def test_the_same_request_gives_the_same_bytes_alone_or_in_a_file(run, tmp_path):
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "motion_prompt", "seed"])
        writer.writerow(["first", "a blue moon, on sand", "", ""])
        writer.writerow(["second", PROMPT, "", "3"])
        writer.writerow(["third", PROMPT, "", "4"])
    assert run(f"prompts={tmp_path / 'prompts.csv'}", "seed=5")[0] == 0
    assert run(f"prompt={PROMPT}", "seed=3", output=tmp_path / "alone")[0] == 0
    alone = next((tmp_path / "alone").glob("*.mp4"))
    videos = {path.stem: digest(path) for path in (tmp_path / "out").glob("*.mp4")}
    assert set(videos) == {"first", "second", "third"}
    assert videos["second"] == digest(alone)
    assert videos["third"] != videos["second"]
    assert record_of(tmp_path / "out", "first")["generator"] == {"seed": 5, "sample_index": 0, "video_index": 0}


def test_longer_videos_say_how_they_are_made(run, tmp_path):
    """The model was trained on 4 frames: clips of 6 are two windows, and three clips share two frames."""
    assert run(f"prompt={PROMPT}", "num_frames=6", "num_segments=3", "window_overlap=1")[0] == 0
    record = json.loads(next((tmp_path / "out").glob("*seed0.json")).read_text())
    assert (record["num_segments"], record["num_frames"], record["frames_of_all_clips"]) == (3, 6, 16)
    assert record["windows"] == [[0, 4], [2, 6]]
    assert probe(tmp_path / "out" / record["files"]["video"]).num_frames == 16


def test_from_an_image_file(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    assert run(f"prompt={PROMPT}", f"image={tmp_path / 'start.png'}", "num_videos_per_prompt=2")[0] == 0
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*seed0-?.json"))]
    assert [record["generator"]["video_index"] for record in records] == [0, 1]
    assert records[0]["keyframe"]["source"] == str(tmp_path / "start.png")
    assert "weights_sha256" not in records[0]["keyframe"]  # nothing was drawn, nothing was loaded for it
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / records[0]["files"]["keyframe"])), pixels)
    first, second = (read_clip(tmp_path / "out" / record["files"]["video"], 4) for record in records)
    assert not np.array_equal(first, second)


# Stage 1


def test_all_key_frames_are_drawn_before_the_first_video_and_each_stage_has_the_memory_alone(
    run, four, made, monkeypatch
):
    alive = {"load_keyframe_pipeline": [], "load_pipeline": []}

    def watched(name, other):
        opener = getattr(sampler, name)

        def call(*arguments, **more):
            assert [reference() for reference in alive[other]] == [None] * len(alive[other])
            pipeline = opener(*arguments, **more)
            networks = pipeline.networks if name == "load_keyframe_pipeline" else pipeline.components
            alive[name] += [weakref.ref(part) for part in networks.values() if isinstance(part, torch.nn.Module)]
            return pipeline

        return call

    for name, other in zip(alive, reversed(alive), strict=True):
        monkeypatch.setattr(sampler, name, watched(name, other))
    assert run(*four[0])[0] == 0
    assert all(alive.values())
    assert made == both(TEXTS)


def test_another_stage_1_has_its_own_size_steps_and_guidance(run, tmp_path):
    """Of the kind of SDXL, under a video model on Stable Diffusion 1.5."""
    sdxl = tiny.sdxl_folder(tmp_path / "sdxl")
    own = {"pretrained_model_name_or_path": sdxl, "height": 48, "width": 64, "num_inference_steps": 1}
    own |= {"guidance_scale": 2.5, "resize_mode": "stretch"}
    overrides = [f"keyframe.{key}={value}" for key, value in own.items()]
    assert run(f"prompt={PROMPT}", "negative_prompt=grass", *overrides)[0] == 0
    record = json.loads(next((tmp_path / "out").glob("*_keyframe.json")).read_text())
    assert (record["class"], record["source"]) == ("StableDiffusionXLPipeline", str(sdxl))
    wanted = {"num_inference_steps": 1, "guidance_scale": 2.5, "negative_prompt": "grass", "height": 48, "width": 64}
    assert record["arguments"] == wanted
    assert record["original_size"] == {"height": 48, "width": 64}
    assert record["size"] == {"height": tiny.SIZE, "width": tiny.SIZE}
    assert (record["resize_mode"], record["cropped"]) == ("stretch", None)
    assert {"text_encoder", "text_encoder_2", "unet", "vae"} == set(record["weights_sha256"])
    assert len(list((tmp_path / "out").glob("*.mp4"))) == 1


@pytest.mark.filterwarnings("error", "ignore:Deprecated:DeprecationWarning:transformers")  # as by `python -W error`
def test_a_revision_and_a_variant_of_stage_1_are_those_of_the_config(run, tmp_path, monkeypatch):
    base = tiny.base_pipeline(tmp_path / "fp16").to(torch.float16)
    base.save_pretrained(tmp_path / "fp16", variant="fp16")
    repository = "someone/drawer"
    tiny.into_hub_cache(tmp_path / "fp16", tmp_path / "cache", repository, "v2")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    chosen = {"pretrained_model_name_or_path": repository, "revision": "v2", "variant": "fp16"}
    code, _, told = run(f"prompt={PROMPT}", *(f"keyframe.{key}={value}" for key, value in chosen.items()))
    assert code == 0, told
    record = json.loads(next((tmp_path / "out").glob("*_keyframe.json")).read_text())
    assert (record["source"], record["revision"], record["variant"]) == (repository, "v2", "fp16")


def records(folder):
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_flagged_key_frames_end_the_run_or_have_no_video_or_are_animated(run, tmp_path, made, monkeypatch):
    base = tiny.flagging(tmp_path / "base")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "start.png")
    (tmp_path / "p.csv").write_text("id,prompt,image\na,a star,\nb,a moon,start.png\n")
    settings = ["prompts=p.csv", f"keyframe.pretrained_model_name_or_path={base}", "num_inference_steps=1"]
    code, _, told = run(*settings)
    assert code == 2 and told.splitlines()[-1].startswith(
        "error: the key frame of 'a' was flagged by the safety checker"
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"b_keyframe.png", "b_keyframe.json"}
    code, said, _ = run(*settings, "keyframe.on_flagged=skip")
    assert code == 0 and said.splitlines() == ["out/b.mp4"]
    assert set(records(tmp_path / "out")) == {"a_keyframe", "b_keyframe", "b"}
    made.clear()
    code, _, told = run(*settings)
    assert (code, made) == (2, []) and "'a' was flagged" in told.splitlines()[-1]  # it is not drawn again
    assert run(*settings, "keyframe.on_flagged=keep")[0] == 0 and made == both("a")[1:]
    found = records(tmp_path / "out")
    assert found["a"]["keyframe"]["flagged"] == found["a_keyframe"]["flagged"] == "by the safety checker"
    assert "flagged" not in found["b_keyframe"]


def test_key_frames_that_are_not_finite_are_not_written(run, tmp_path, model):
    base = shutil.copytree(model.parent / "base", tmp_path / "base")
    path = base / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "decoder.conv_out.bias": weights["decoder.conv_out.bias"] * torch.nan}, path)
    code, _, told = run(f"prompt={PROMPT}", f"keyframe.pretrained_model_name_or_path={base}")
    assert code == 2 and "stage 1 draws pixels that are not finite; use keyframe.torch_dtype" in told.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*"))


def test_ends_of_prompts_that_no_encoder_reads_are_said_and_recorded(run, tmp_path, caplog):
    long = " ".join(["circle"] * 14)  # with begin and end as many tokens as the tiny encoder reads
    (tmp_path / "p.csv").write_text(f"id,prompt\na,{long}\nb,{long} moving left\n")
    code, *_ = run("prompts=p.csv", "negative_prompt=" + "moon " * 15)
    found = records(tmp_path / "out")
    assert code == 0
    assert found["a"]["truncated"] == {"negative_prompt": "moon"} and "truncated" not in found["a_keyframe"]
    assert found["b"]["truncated"] == {"prompt": "moving left", "negative_prompt": "moon"}
    assert found["b"]["keyframe"]["truncated"] == "moving left"
    assert f"stage 1 reads '{long} moving left' without its end 'moving left'" in caplog.messages
    assert f"prompt '{long} moving left' is read without its end 'moving left'" in caplog.messages


# Memory


def test_memory_settings_reach_both_stages_and_their_provenance(run, tmp_path, monkeypatch):
    applied = []
    works = sampler.apply

    def apply(pipeline, settings, device):
        works(pipeline, settings, device)
        applied.append((pipeline.unet.dtype, pipeline.vae.use_slicing, pipeline.vae.use_tiling))

    monkeypatch.setattr(sampler, "apply", apply)
    chosen = ["memory.torch_dtype=bfloat16", "memory.vae_slicing=true", "memory.vae_tiling=true"]
    assert run(f"prompt={PROMPT}", *chosen, "keyframe.torch_dtype=float32")[0] == 0
    assert applied == [(torch.float32, True, True), (torch.bfloat16, True, True)]
    (record,) = (json.loads(path.read_text()) for path in (tmp_path / "out").glob("*seed0.json"))
    assert record["memory"] == {
        "torch_dtype": "bfloat16",
        "offload": "none",
        "vae_slicing": True,
        "vae_tiling": True,
        "attention": "sdpa",
        "compile": False,
        "quantization": None,
        "preview_vae": None,
    }
    assert record["keyframe"]["memory"] == record["memory"] | {"torch_dtype": "float32"}


# Going on


def test_what_stands_is_not_made_again_and_said_to_stand(run, tmp_path, four, made):
    overrides, whole = four
    shutil.copytree(whole, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    code, said, _ = run(*overrides)
    assert (code, made) == (0, [])
    assert said.splitlines() == [f"out/{name}.mp4 is up to date" for name in TEXTS]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == times


@pytest.mark.parametrize(
    ("killed", "after", "rest"),
    [
        ("write_keyframe", 2, both("abcd")[2:]),
        ("write_gif", 1, both("abcd")[5:]),  # a video without the rest of its files
        ("write_json", 6, both("abcd")[6:]),  # all files, but not their provenance
    ],
)
def test_a_killed_run_goes_on_where_it_stopped(run, tmp_path, four, made, monkeypatch, killed, after, rest):
    overrides, whole = four
    home = sampler.SampleFolder if killed == "write_keyframe" else sample_folder
    works, done = getattr(home, killed), []

    def dying(*arguments, **more):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(arguments)
        return works(*arguments, **more)

    monkeypatch.setattr(home, killed, dying)
    assert run(*overrides)[0] == 130
    assert not list((tmp_path / "out").glob(".*"))
    assert digests(tmp_path / "out").items() < digests(whole).items()
    monkeypatch.setattr(home, killed, works)
    made.clear()
    assert run(*overrides)[0] == 0
    assert made == rest
    assert digests(tmp_path / "out") == digests(whole)


def test_a_changed_setting_of_a_key_frame_makes_it_and_its_video_again(run, tmp_path, made):
    (tmp_path / "p.csv").write_text("id,prompt\na,a star")
    settings = ["prompts=p.csv", "num_inference_steps=1", "keyframe.guidance_scale=null"]
    for change in (
        "seed=1",
        "guidance_scale=5",
        "keyframe.guidance_scale=3",
        "keyframe.resize_mode=stretch",
        "height=24",
    ):
        settings.append(change)
        made.clear()
        assert run(*settings)[0] == 0
        assert made == both("a"), change


def test_a_changed_setting_of_a_video_alone_makes_that_again(run, tmp_path, made):
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(tmp_path / "start.png")
    (tmp_path / "p.csv").write_text("id,prompt,image\na,a star,start.png")
    settings = ["prompts=p.csv", "num_inference_steps=1"]
    changes = ["seed=1", "guidance_scale=5", "image_guidance_scale=2", "gamma=0.1", "negative_prompt=grass"]
    changes += [
        "num_frames=3",
        "num_frames=5",
        "window_overlap=1",
        "num_segments=2",
        "fps=4",
        "decode_chunk_size=1",
        "scheduler=DPMSolverMultistepScheduler",
        "video_crf=30",
    ]
    drawn = None
    for change in changes:
        settings.append(change)
        made.clear()
        assert run(*settings)[0] == 0
        assert made == both("a")[1:], change
        time = (tmp_path / "out/a_keyframe.png").stat().st_mtime_ns
        drawn = drawn or time
        assert time == drawn


def test_what_is_missing_damaged_or_of_other_weights_is_made_again(run, tmp_path, four, model, made):
    copy = shutil.copytree(model, tmp_path / "copy")
    base = shutil.copytree(model.parent / "base", tmp_path / "base")
    arguments = [*four[0], f"pipeline={copy}", f"keyframe.pretrained_model_name_or_path={base}"]

    def remade():
        made.clear()
        assert run(*arguments)[0] == 0
        return made

    def touch_up(folder):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        weights["conv_in.bias"] += 1e-3
        save_file(weights, path, metadata={"format": "pt"})

    out = tmp_path / "out"
    assert remade() == both("abcd")
    for lost in ("a.mp4", "b.gif", "c.png"):
        (out / lost).unlink()
    (out / "d.json").write_text("{")
    assert remade() == both("abcd")[4:]
    moved = shutil.copytree(model, tmp_path / "moved")
    assert cli.main(["sample", *arguments, f"pipeline={moved}"]) == 0
    assert made == both("abcd")[4:]  # nothing was made for another name of the same weights
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save(out / "a_keyframe.png")  # not what its provenance says
    (out / "b_keyframe.png").write_text("torn")
    (out / "c_keyframe.json").unlink()
    assert remade() == both("abc")
    touch_up(copy)
    assert remade() == both("abcd")[4:]
    touch_up(base)
    assert remade() == both("abcd")


def test_another_image_under_the_same_name_makes_the_video_again(run, tmp_path, made):
    (tmp_path / "p.csv").write_text("id,prompt,image\na,a star,start.png")
    for colour, again in (("black", 1), ("black", 0), ("white", 1)):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "start.png")
        made.clear()
        assert run("prompts=p.csv")[0] == 0
        assert len(made) == again


# Several processes


def environment(**more):
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", **more}


@pytest.mark.slow
def test_two_processes_make_the_files_that_one_makes(tmp_path, four):
    """Names, videos, images and provenances alike; one of the videos stands already."""
    overrides, whole = four
    (tmp_path / "out").mkdir()
    for ending in ENDINGS:
        shutil.copy2(whole / f"b{ending}", tmp_path / "out")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(ROOT / "scripts/sample.py"), *overrides]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    said = sorted(re.findall(r"out/.\.mp4(?: is up to date)?", done.stdout))
    assert said == ["out/a.mp4", "out/b.mp4 is up to date", "out/c.mp4", "out/d.mp4"]
    assert digests(tmp_path / "out") == digests(whole)


@pytest.mark.slow
def test_a_process_that_fails_leaves_the_others_working(tmp_path, four):
    """As under srun, where nobody ends the others."""
    overrides, whole = four
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank, more in enumerate(([], ["pipeline=/gone"])):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "scripts/sample.py"), *overrides, *more],
                cwd=tmp_path,
                env=environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **place),
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    told = [process.communicate(timeout=600)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 2], told
    assert "/gone" in told[1]
    made = digests(tmp_path / "out")
    assert set(made) == {f"{name}{ending}" for name in "ac" for ending in ENDINGS}
    assert made.items() < digests(whole).items()


# Bad input


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "prompt"),
        (["prompt="], "give one of"),
        ([f"prompt={PROMPT}", "prompts=x.csv"], "one of"),
        ([f"prompt={PROMPT}", "num_frames=0"], "num_frames"),
        ([f"prompt={PROMPT}", "num_segments=0"], "num_segments"),
        ([f"prompt={PROMPT}", "window_overlap=4"], "window_overlap is 4"),
        ([f"prompt={PROMPT}", "width=30"], "multiple of 8"),
        ([f"prompt={PROMPT}", "num_inference_steps=2000"], "cannot make 2000 steps"),
        ([f"prompt={PROMPT}", "image=gone.png"], "gone.png"),
        ([f"prompt={PROMPT}", f"image={__file__}"], "not an image"),
        ([f"prompt={PROMPT}", "pipeline=/gone"], "/gone"),
        ([f"prompt={PROMPT}", "scheduler=NoScheduler"], "NoScheduler"),
        ([f"prompt={PROMPT}", "output_dir=/dev/null/out"], "/dev/null/out"),
        ([f"prompt={PROMPT}", "keyframe.pretrained_model_name_or_path=/gone"], "/gone"),
        ([f"prompt={PROMPT}", "keyframe.resize_mode=squeeze"], "'squeeze'"),
        ([f"prompt={PROMPT}", "keyframe.height=32"], "keyframe.height=32, keyframe.width=None"),
        ([f"prompt={PROMPT}", "keyframe.height=30", "keyframe.width=30"], "height=30"),
        ([f"prompt={PROMPT}", "keyframe.num_inference_steps=0"], "num_inference_steps"),
        ([f"prompt={PROMPT}", "keyframe.resize_mod=crop"], "keyframe.resize_mode"),
        ([f"prompt={PROMPT}", "keyframe.torch_dtype=int8"], "'int8'"),
        ([f"prompt={PROMPT}", "memory.attention=flash"], "'flash'"),
        ([f"prompt={PROMPT}", "memory.compile=maybe"], "memory.compile is 'maybe'"),
        pytest.param([f"prompt={PROMPT}", "memory.offload=model"], "offload=model", marks=ON_CPU),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(run, tmp_path, overrides, words):
    code, _, said = run(*overrides)
    assert code == 2
    lines = [line for line in said.splitlines() if "it/s" not in line and line.strip()]
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not list((tmp_path / "out").glob("*"))


def test_what_is_no_text_to_image_pipeline_is_refused_before_anything_is_drawn(run, tmp_path, model, made):
    code, _, said = run(f"prompt={PROMPT}", f"keyframe.pretrained_model_name_or_path={model}")
    assert (code, made) == (2, [])
    assert "ImageToVideoPipeline" in said and "text-to-image" in said


def test_a_video_that_is_no_numbers_is_not_written(run, tmp_path, model):
    broken = shutil.copytree(model, tmp_path / "broken")
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    save_file({**weights, "conv_out.bias": torch.full_like(weights["conv_out.bias"], torch.nan)}, path)
    Image.new("RGB", (8, 8)).save(tmp_path / "start.png")
    code, _, said = run(f"prompt={PROMPT}", "image=start.png", f"pipeline={broken}")
    assert code == 2 and "not finite; use torch_dtype" in said
    assert not list((tmp_path / "out").glob("*.mp4"))


def test_an_image_of_another_size_is_refused_if_only_the_exact_one_will_do(run, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    code, _, said = run(f"prompt={PROMPT}", f"image={tmp_path / 'small.png'}", "keyframe.resize_mode=exact")
    assert code == 2 and "8x8" in said and "32x32" in said


def test_key_frames_at_chosen_places(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    places = ("model.keyframe_places=true", "keyframe_places=0.5")
    save_pipeline(tiny.video_pipeline(tmp_path / "base", changes=places), tmp_path / "video", with_base=False)
    for k in range(2):
        pixels = np.random.default_rng(k).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{k}.png")

    def run(*overrides):
        settings = [f"prompt={PROMPT}", "pipeline=video", "output_dir=out", "num_inference_steps=1", *overrides]
        return cli.main(["sample", *settings]), *capsys.readouterr()

    assert run("keyframes=[0:0.png,3:1.png]", "interpolate=2")[0] == 0
    (file,) = (tmp_path / "out").glob("*seed0.json")
    record = json.loads(file.read_text())
    assert (record["keyframe"]["source"], record["keyframe_index"]) == ("0.png", 0)
    assert {place: frame and frame["source"] for place, frame in record["keyframes"].items()} == {
        "0": None,
        "6": "1.png",
    }
    video = probe(tmp_path / "out" / record["files"]["video"])
    assert (video.num_frames, video.fps, record["fps"], record["frames_of_all_clips"]) == (7, 16, 16, 7)
    sheet = np.array(Image.open(tmp_path / "out" / record["files"]["contact_sheet"]))
    columns = np.unique(np.nonzero((sheet == (225, 0, 110)).all(-1))[1])
    assert (np.diff(columns) > 1).sum() == 1 and columns[-1] - columns[
        0
    ] > 6 * tiny.SIZE  # round the first and the last
    before = (tmp_path / "out" / record["files"]["video"]).stat().st_mtime_ns
    assert "up to date" in run("keyframes=[0:0.png,3:1.png]", "interpolate=2")[1]
    Image.open(tmp_path / "0.png").save(tmp_path / "1.png")  # another picture of the same name
    assert run("keyframes=[0:0.png,3:1.png]", "interpolate=2")[0] == 0
    assert (tmp_path / "out" / record["files"]["video"]).stat().st_mtime_ns != before
    assert run("keyframes=[1,3]")[0] == 0  # that of stage 1, twice
    record = json.loads(file.read_text())
    assert (record["keyframe_index"], record["keyframes"]) == (1, {"1": None, "3": None})
    assert record["keyframe"]["class"] == "StableDiffusionPipeline"
    for bad, words in (
        (["keyframes=[0:0.png]", "image=1.png"], "image is of no key frame"),
        (["keyframes=[0:gone.png]"], "image 'gone.png' cannot be read"),
        (["keyframes=[4]"], "a key frame is at 4"),
        (["keyframes=[a.png]"], "entry 'a.png'"),
    ):
        code, _, told = run(*bad)
        assert code == 2 and words in told.splitlines()[-1]


def test_key_frames_alone_of_which_one_becomes_the_video(run, tmp_path):
    whole = ["prompt=a star", "num_videos_per_prompt=2"]
    status, shown, _ = run(*whole, "keyframes_only=true")
    assert status == 0 and shown.split() == [f"out/a-star-seed0-{index}_keyframe.png" for index in range(2)]
    assert not list((tmp_path / "out").glob("*.mp4"))
    assert run(*whole, output="whole")[0] == 0
    for index in range(2):
        name = f"a-star-seed0-{index}_keyframe.png"
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert run("prompt=a star", "image=out/a-star-seed0-0_keyframe.png", output="chosen")[0] == 0
    video, expected = tmp_path / "chosen/a-star-seed0.mp4", tmp_path / "whole/a-star-seed0-0.mp4"
    assert video.read_bytes() == expected.read_bytes()
    status, _, said = run("prompt=a star", "keyframes_only=true", "upscale.pretrained_model_name_or_path=x")
    assert status == 2 and "makes no video to upscale" in said


def test_each_step_is_told_and_changes_nothing(run, model, tmp_path):
    assert run("prompt=a star")[0] == 0
    steps, previews = [], []

    def on_step(stage, step, count, preview):
        steps.append((stage, step, count))
        previews.extend([] if preview is None else [preview(3)])

    overrides = ["prompt=a star", f"pipeline={model}", "num_inference_steps=2", "output_dir=told"]
    sample.run(compose("sample", overrides), on_step)
    drawn = [("key frame", step, 3) for step in (1, 2, 3)]  # PNDM visits a timestep twice
    assert steps == [*drawn, ("video", 1, 2), ("video", 2, 2)]
    assert all(frames.shape == (3, tiny.SIZE, tiny.SIZE, 3) and frames.dtype == np.uint8 for frames in previews)
    assert (tmp_path / "told/a-star-seed0.mp4").read_bytes() == (tmp_path / "out/a-star-seed0.mp4").read_bytes()
    assert len(previews) == 2 and not np.array_equal(*previews)

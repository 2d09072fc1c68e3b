"""The command `sample`, on a tiny random pipeline: real files, real codecs."""

import csv
import hashlib
import json

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from microcinema import cli, provenance
from microcinema.data.video_io import probe, read_clip
from microcinema.errors import UserError
from microcinema.pipelines.saved import save_pipeline
from microcinema.requests import read_requests

PROMPT = "a large red star moving quickly to the left on sand"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_pipeline(tiny.video_pipeline(folder / "base"), folder / "video", with_base=False)
    return folder / "video"


@pytest.fixture
def run(model, tmp_path, capsys):
    """Runs the command; returns its exit code and what it said on stderr."""

    def command(*overrides, output=tmp_path / "out"):
        settings = [f"pipeline={model}", f"output_dir={output}", "num_inference_steps=2", *overrides]
        code = cli.main(["sample", *settings])
        return code, capsys.readouterr().err

    return command


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_prompt_gives_a_video_with_all_that_belongs_to_it(run, tmp_path, model):
    assert run(f"prompt={PROMPT}", "seed=3", "num_frames=5", "fps=6", "height=24")[0] == 0
    name = "a-large-red-star-moving-quickly-to-the-left-on-sand-seed3"
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {f"{name}{ending}" for ending in (".mp4", ".gif", ".png", "_keyframe.png", ".json")}
    info = probe(tmp_path / "out" / f"{name}.mp4")
    assert (info.num_frames, info.fps, info.height, info.width) == (5, 6.0, 24, tiny.SIZE)
    with Image.open(tmp_path / "out" / f"{name}.gif") as gif:
        assert (gif.n_frames, gif.size) == (5, (tiny.SIZE, 24))

    record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
    assert (record["prompt"], record["motion_prompt"], record["seed"]) == (PROMPT, None, 3)
    assert (record["num_frames"], record["fps"], record["height"], record["width"]) == (5, 6.0, 24, tiny.SIZE)
    assert record["config"]["guidance_scale"] == record["guidance_scale"] == 4.0
    assert record["schedule"]["class"] == "DDIMScheduler"
    assert len(record["schedule"]["timesteps"]) == record["num_inference_steps"] == 2
    assert record["pipeline"]["training_schedule"]["prediction_type"] == "epsilon"
    assert record["versions"]["torch"] == torch.__version__
    pixels = np.array(Image.open(tmp_path / "out" / record["files"]["keyframe"]))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == record["keyframe"]["sha256_of_pixels"]
    assert {"unet", "condition_encoder", "vae", "text_encoder", "keyframe.unet"} <= set(record["weights_sha256"])
    again = tiny.video_pipeline(model.parent / "base")
    assert record["weights_sha256"]["unet"] == provenance.hash_weights(again.unet)


def test_the_same_request_gives_the_same_bytes_alone_or_in_a_file(run, tmp_path):
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "motion_prompt", "seed"])
        writer.writerow(["first", "a blue moon, on sand", "", ""])
        writer.writerow(["second", PROMPT, "", "3"])
        writer.writerow(["third", PROMPT, "to the right", "3"])
    prompts = f"prompts={tmp_path / 'prompts.csv'}"
    assert run(prompts, "seed=5")[0] == 0
    assert run(f"prompt={PROMPT}", "seed=3", output=tmp_path / "alone")[0] == 0
    alone = next((tmp_path / "alone").glob("*.mp4"))
    videos = {path.stem: digest(path) for path in (tmp_path / "out").glob("*.mp4")}
    assert set(videos) == {"first", "second", "third"}
    assert videos["second"] == digest(alone)
    assert videos["third"] != videos["second"]
    whole = {path.name: digest(path) for path in (tmp_path / "out").iterdir()}
    assert run(prompts, "seed=5")[0] == 0
    assert {path.name: digest(path) for path in (tmp_path / "out").iterdir()} == whole
    assert json.loads((tmp_path / "out" / "first.json").read_text())["generator"] == [5, 0, 0]


def test_from_an_image_file(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "start.png")
    assert run(f"prompt={PROMPT}", f"image={tmp_path / 'start.png'}", "num_videos_per_prompt=2")[0] == 0
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*.json"))]
    assert [record["generator"] for record in records] == [[0, 0, 0], [0, 0, 1]]
    assert records[0]["keyframe"]["source"] == str(tmp_path / "start.png")
    assert "keyframe.unet" not in records[0]["weights_sha256"]  # nothing was drawn, nothing was loaded for it
    assert np.array_equal(np.array(Image.open(tmp_path / "out" / records[0]["files"]["keyframe"])), pixels)
    first, second = (read_clip(tmp_path / "out" / record["files"]["video"], 4) for record in records)
    assert not np.array_equal(first, second)


def test_requests_of_a_text_file_and_of_a_folder_of_images(tmp_path):
    (tmp_path / "prompts.txt").write_text("A star!\n\na moon\n")
    requests = read_requests(None, None, str(tmp_path / "prompts.txt"), None, 7, 2)
    assert [request.id for request in requests] == ["0000-a-star-0", "0000-a-star-1", "0001-a-moon-0", "0001-a-moon-1"]
    assert [request.numbers for request in requests] == [(7, 0, 0), (7, 0, 1), (7, 1, 0), (7, 1, 1)]
    images = tmp_path / "images"
    images.mkdir()
    for name in "ba":
        Image.new("RGB", (8, 8)).save(images / f"{name}.png")
    requests = read_requests(None, None, str(tmp_path / "prompts.txt"), str(images), 7, 1)
    assert [request.image.name for request in requests] == ["a.png", "b.png"]
    with pytest.raises(UserError, match="2 images for 1"):
        read_requests("a star", None, None, str(images), 7, 1)


def test_images_and_motion_prompts_of_a_file_are_its_own(tmp_path):
    (tmp_path / "p.csv").write_text("prompt,image,motion_prompt\na star,x.png,up\na moon,,\n")
    first, second = read_requests(None, "down", str(tmp_path / "p.csv"), None, 0, 1)
    assert (first.image, first.motion_prompt) == (tmp_path / "x.png", "up")
    assert (second.image, second.motion_prompt) == (None, "down")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("text\na\n", "no column 'prompt'"),
        ("prompt,size\na,b\n", "column 'size' is unknown"),
        ("prompt\n", "holds no prompts"),
        ("", "no column 'prompt'"),
        ('prompt\n"  "\n', "prompt 1 is empty"),
        ("prompt,id\na,x\nb,x\n", "id 'x' is there twice"),
        ("prompt,id\na,../x\n", r"'\.\./x' cannot be a file name"),
        ("prompt,seed\na,minus\n", "seed 'minus'"),
        ("prompt\na, b\n", "more fields"),
    ],
)
def test_bad_prompts_files_are_named(tmp_path, content, words):
    (tmp_path / "p.csv").write_text(content)
    with pytest.raises(UserError, match=words):
        read_requests(None, None, str(tmp_path / "p.csv"), None, 0, 1)


def test_files_that_are_no_text_are_named(tmp_path):
    (tmp_path / "p.csv").write_bytes(b"\xff\xfe\x00prompt")
    with pytest.raises(UserError, match="not UTF-8"):
        read_requests(None, None, str(tmp_path / "p.csv"), None, 0, 1)
    with pytest.raises(UserError, match="No such file"):
        read_requests(None, None, str(tmp_path / "gone.csv"), None, 0, 1)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "prompt"),
        (["prompt="], "empty"),
        ([f"prompt={PROMPT}", "prompts=x.csv"], "one of"),
        ([f"prompt={PROMPT}", "num_frames=0"], "num_frames"),
        ([f"prompt={PROMPT}", "num_frames=9"], "1 to 8"),
        ([f"prompt={PROMPT}", "width=30"], "multiple of 8"),
        ([f"prompt={PROMPT}", "image=gone.png"], "gone.png"),
        ([f"prompt={PROMPT}", "pipeline=/gone"], "/gone"),
        ([f"prompt={PROMPT}", "scheduler=NoScheduler"], "NoScheduler"),
        ([f"prompt={PROMPT}", "output_dir=/dev/null/out"], "/dev/null/out"),
    ],
)
def test_bad_input_ends_in_one_line_and_writes_nothing(run, tmp_path, overrides, words):
    code, said = run(*overrides)
    assert code == 2
    lines = [line for line in said.splitlines() if "it/s" not in line and line.strip()]
    assert len(lines) == 1, said
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert not list((tmp_path / "out").glob("*"))


def test_hashes_follow_the_weights():
    network = torch.nn.Linear(2, 2)
    before = provenance.hash_weights(network)
    assert provenance.hash_weights(network) == before
    with torch.no_grad():
        network.bias[0] += 1e-6
    assert provenance.hash_weights(network) != before
    assert provenance.hash_weights(network.half()) != provenance.hash_weights(network.float())


def test_code_is_described():
    found = provenance.describe_code()
    assert set(found) == {"microcinema", "commit", "python", *provenance.LIBRARIES}
    assert found["commit"] is None or len(found["commit"].removesuffix("-dirty")) == 40

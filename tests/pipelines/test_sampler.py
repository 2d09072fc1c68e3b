"""The command `sample`, the Python API and the protocols make the same key frames and videos of a prompt and a seed, bit for bit."""

import csv
import json

import numpy as np
import pytest
from accelerate import PartialState
from PIL import Image

from fixtures import tiny, zero_shot_data
from microcinema.commands import cli
from microcinema.config.compose import compose
from microcinema.config.sampling import KeyframeSettings, MemorySettings, SamplingSettings
from microcinema.data.video_writer import _MARK
from microcinema.diffusion.rng import sample_generator
from microcinema.evaluation.generate import generate, protocol_sampler
from microcinema.pipelines import sample_folder, sampler
from microcinema.pipelines.keyframe import KeyframePipeline
from microcinema.pipelines.prompts import PromptItem
from microcinema.pipelines.sample_folder import SampleFolder, to_uint8
from microcinema.pipelines.sampler import Sampler
from microcinema.pipelines.saving import load_keyframe_pipeline, load_pipeline, save_pipeline
from microcinema.pipelines.text_to_video import TextToVideoPipeline
from microcinema.sprites.protocol import SpritesProtocol
from microcinema.utils.errors import UserError

SEED, FRAMES = 5, 4
DEFAULTS = {"num_inference_steps": 2, "guidance_scale": 1.5, "keyframe_guidance_scale": 3.0}
TOLERANCE = 1  # grey levels: another batch size adds up in another order, and rounding to bytes can make one of it


def save_model(folder, factorized):
    """A model with defaults of its own."""
    pipeline = tiny.video_pipeline(
        folder / "base", model="factorized_dreamer" if factorized else "microcinema", **DEFAULTS
    )
    save_pipeline(pipeline, folder / "video", with_base=False)
    return folder / "video"


@pytest.fixture(scope="module", params=["microcinema", "factorized"])
def model(request, tmp_path_factory):
    """The second one has a motion encoder."""
    return save_model(tmp_path_factory.mktemp(request.param), request.param == "factorized")


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain"), factorized=False)


@pytest.fixture
def command(model, tmp_path, monkeypatch):
    """Runs `sample`; returns key frames and frames of its videos by id, as they are before compression."""
    frames = {}

    def write_video(path, clip, fps, **settings):
        frames[path.stem] = clip
        path.write_bytes(b"")

    def run(*overrides):
        monkeypatch.setattr(sample_folder, "write_video", write_video)
        folder = tmp_path / "command"
        assert cli.main(["sample", f"pipeline={model}", f"output_dir={folder}", f"seed={SEED}", *overrides]) == 0
        return {name: (np.array(Image.open(folder / f"{name}_keyframe.png")), clip) for name, clip in frames.items()}

    return run


def open_api(model):
    pipeline = TextToVideoPipeline.from_pretrained(str(model))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_the_python_api_makes_the_videos_of_the_command(model, command, tmp_path):
    prompts = ["a red star moving to the left on sand", "a large blue moon"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    expected = list(command(f"prompts={tmp_path / 'prompts.txt'}", "num_videos_per_prompt=2").values())
    output = open_api(model)(prompts, seed=SEED, num_videos_per_prompt=2)
    assert len(expected) == len(output.frames) == 4
    for (keyframe, frames), own_keyframe, own_frames in zip(expected, output.keyframes, output.frames, strict=True):
        assert np.array_equal(keyframe, own_keyframe.image)
        assert np.array_equal(frames, np.stack(own_frames))
    arrays = open_api(model)(prompts[1], seed=SEED, sample_index=1, output_type="np").frames
    assert np.array_equal(to_uint8(arrays[0]), expected[2][1])
    assert not np.array_equal(expected[0][1], expected[1][1])


@pytest.mark.parametrize("batch_size", [1, 2])
def test_moving_sprites_makes_the_videos_of_the_command(model, command, tmp_path, batch_size):
    """Four clips, of which one has a real key frame; the samples' indices are those of the lines of a prompts file."""
    protocol = SpritesProtocol(2, 1, 1, num_frames=FRAMES, size=tiny.SIZE)
    config = compose("evaluate", [f"pipeline={model}", f"batch_size={batch_size}"])
    sampler = protocol_sampler(config, tiny.SIZE, tiny.SIZE, FRAMES, protocol.fps, PartialState(cpu=True))
    real = {task.name: protocol.render(task.sprite).frames[0] for task in protocol.tasks() if task.part == "image"}
    items = [task.item(sampler.uses_motion_caption, real.get(task.name)) for task in protocol.tasks()]
    clips, fingerprint, counts = generate(sampler, items, SEED, tmp_path / "samples", PartialState(cpu=True))
    assert (fingerprint["num_inference_steps"], fingerprint["keyframe_guidance_scale"]) == (2, 3.0)
    # The tiny tokenizer reads 16 tokens: whole captions are longer, descriptive ones without the motion mostly not.
    truncated = 1 if sampler.uses_motion_caption else 4
    assert counts == {"flagged_keyframes": 0, "truncated_prompts": truncated}

    rows = sorted(items, key=lambda item: item.sample_index)
    assert [item.sample_index for item in rows] == [0, 1, 2, 3]
    with (tmp_path / "prompts.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "motion_prompt", "keyframe_prompt", "image"])
        for item in rows:
            if item.image is not None:
                Image.fromarray(item.image).save(tmp_path / f"{item.id}.png")
            image = "" if item.image is None else f"{item.id}.png"
            writer.writerow([item.id, item.prompt, item.motion_prompt or "", item.keyframe_prompt, image])
    expected = command(f"prompts={tmp_path / 'prompts.csv'}", f"fps={protocol.fps}")
    assert set(expected) == {item.id for item in items}
    for item in items:
        keyframe, frames = expected[item.id]
        clip = clips.load(item.id)
        assert np.array_equal(keyframe, clip.keyframe)
        if batch_size == 1:
            assert np.array_equal(frames, clip.frames)
        assert np.abs(frames.astype(int) - clip.frames).max() <= TOLERANCE


def test_a_key_frame_in_the_middle_is_recorded_and_marked_and_never_continued_from(tmp_path, capsys):
    pipeline = tiny.video_pipeline(tmp_path / "base", keyframe_position="center", **DEFAULTS)
    save_pipeline(pipeline, tmp_path / "video", with_base=False)
    command = ["sample", f"pipeline={tmp_path / 'video'}", f"output_dir={tmp_path}", "prompt=a star"]
    assert cli.main([*command, "num_segments=2"]) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "this model's key frame is not the first (keyframe_position=center)" in told
    assert not list(tmp_path.glob("*.png"))
    for frames, index in ((FRAMES, 2), (8, 4)):  # 8 frames: three windows
        assert cli.main([*command, f"num_frames={frames}"]) == 0
        (record,) = (path for path in tmp_path.glob("*.json") if "keyframe" not in path.name)
        assert json.loads(record.read_text())["keyframe_index"] == index
        sheet = np.array(Image.open(record.with_suffix(".png")))
        marked = np.flatnonzero((sheet == _MARK).all(axis=2).sum(axis=0) == tiny.SIZE + 6)  # sides of the border
        left = 8 + index * (tiny.SIZE + 4)
        assert marked.tolist() == [left - 3, left - 2, left + tiny.SIZE + 1, left + tiny.SIZE + 2]


def test_a_zero_shot_protocol_makes_the_videos_of_the_python_api(model, tmp_path):
    zero_shot_data.msrvtt(tmp_path / "msrvtt")
    overrides = ["evaluation=msrvtt", f"pipeline={model}", "batch_size=1", f"evaluation.protocol.num_frames={FRAMES}"]
    config = compose("evaluate", [*overrides, "evaluation.protocol.fps=null", f"evaluation.root={tmp_path / 'msrvtt'}"])
    protocol = config.evaluation.protocol.build()
    items = protocol.samples(config.evaluation.root)[:2]
    sampler = protocol_sampler(config, None, None, FRAMES, None, PartialState(cpu=True))
    clips, *_ = generate(sampler, items, SEED, tmp_path / "samples", PartialState(cpu=True))
    output = open_api(model)([item.prompt for item in items], seed=SEED)
    for item, keyframe, frames in zip(items, output.keyframes, output.frames, strict=True):
        assert np.array_equal(clips.load(item.id).keyframe, keyframe.image)
        assert np.array_equal(clips.load(item.id).frames, np.stack(frames))


def test_a_protocol_animates_and_counts_flagged_key_frames(tmp_path):
    tiny.flagging(tmp_path / "base")
    save_pipeline(tiny.video_pipeline(tmp_path / "base", **DEFAULTS), tmp_path / "video", with_base=False)
    config = compose("evaluate", [f"pipeline={tmp_path / 'video'}"])
    sampler = protocol_sampler(config, tiny.SIZE, tiny.SIZE, FRAMES, 8.0, PartialState(cpu=True))
    image = np.full((tiny.SIZE, tiny.SIZE, 3), 99, np.uint8)
    items = [PromptItem("a star", "a"), PromptItem("a moon", "b"), PromptItem("a heart", "c", image=image)]
    for _ in range(2):  # resumed, they are counted as well
        clips, _, counts = generate(sampler, items, SEED, tmp_path / "samples", PartialState(cpu=True))
        assert counts == {"flagged_keyframes": 2, "truncated_prompts": 0}
    assert [clips.load(name).keyframe.max() for name in "abc"] == [0, 0, 99]


def test_from_an_image_the_second_stage_alone_makes_the_video_of_the_command(model, command, tmp_path):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (tiny.SIZE, tiny.SIZE, 3), np.uint8))
    image.save(tmp_path / "start.png")
    ((_, frames),) = command("prompt=a star", f"image={tmp_path / 'start.png'}").values()
    pipeline = load_pipeline(model)
    pipeline.set_progress_bar_config(disable=True)
    output = pipeline("a star", image, generator=[sample_generator(SEED, 0, 0, "video")])
    assert np.array_equal(np.stack(output.frames[0]), frames)


def test_none_means_the_model_s_own_defaults_everywhere(plain_model):
    """Those that the model was saved with; a key frame's steps are the video's, since the model has none for them."""
    expected = SamplingSettings(
        tiny.SIZE,
        tiny.SIZE,
        FRAMES,
        8.0,
        num_inference_steps=2,
        guidance_scale=1.5,
        image_guidance_scale=1.0,
        gamma=0.02,
        guidance_interval=(0.0, 1.0),
        guidance_reuse=1,
        cache_interval=1,
    )
    video = load_pipeline(plain_model)
    assert video.resolve(SamplingSettings()) == expected
    sample, evaluate = compose("sample"), compose("evaluate", [f"pipeline={plain_model}"])
    settings = SamplingSettings(**{name: getattr(sample, name) for name in SamplingSettings.__dataclass_fields__})
    command = Sampler(str(plain_model), settings, sample.keyframe, sample.memory, "cpu", progress=False)
    protocol = protocol_sampler(evaluate, None, None, FRAMES, None, PartialState(cpu=True))
    assert command.settings == protocol.settings == expected
    assert command.fingerprint() == protocol.fingerprint()
    assert command.fingerprint()["keyframe_num_inference_steps"] == 2
    keyframe = TextToVideoPipeline(load_keyframe_pipeline(video), video)
    keyframe.set_progress_bar_config(disable=True)
    arguments = keyframe("a star").keyframes[0].provenance["arguments"]
    assert arguments == {"num_inference_steps": 2, "guidance_scale": 3.0}
    explicit = KeyframeSettings(num_inference_steps=1, guidance_scale=1.0)
    arguments = keyframe("a star", keyframe=explicit).keyframes[0].provenance["arguments"]
    assert arguments == {"num_inference_steps": 1, "guidance_scale": 1.0}


def test_clips_are_made_again_if_and_only_if_they_would_differ(plain_model, tmp_path, monkeypatch):
    written = []
    write = SampleFolder.write_video
    monkeypatch.setattr(SampleFolder, "write_video", lambda *a: written.append(a[1].id) or write(*a))

    def run(*changes, **settings):
        written.clear()
        settings = SamplingSettings(**{"num_inference_steps": 1, **settings})
        keyframe, memory = KeyframeSettings(), MemorySettings()
        sampler = Sampler(str(plain_model), settings, keyframe, memory, "cpu", batch_size=2, progress=False)
        items = [PromptItem(text, str(index), sample_index=index) for index, text in enumerate(("a", "b", "c"))]
        sampler.run([*items[: 3 - len(changes)], *changes], SampleFolder(tmp_path, ("frames",)))
        return list(written)

    assert run() == ["0", "1", "2"]
    assert run() == []
    (tmp_path / "1.npz").unlink()
    assert run() == ["1"]  # though the batch is made whole
    assert run(guidance_scale=3.0) == ["0", "1", "2"]
    assert run(guidance_scale=3.0) == []
    assert run(PromptItem("d", "2", sample_index=2), guidance_scale=3.0) == ["2"]


def test_key_frames_are_drawn_in_batches_whole_batches_whatever_is_missing(plain_model, tmp_path, monkeypatch):
    """As on a GPU; of four prompts the last has another negative prompt, which is another call."""
    calls, draw = [], KeyframePipeline._draw
    monkeypatch.setattr(KeyframePipeline, "_draw", lambda *a: calls.append(list(a[1])) or draw(*a))
    monkeypatch.setattr(Sampler, "_make_videos", lambda *a: None)
    items = [PromptItem(text, f"{index}", sample_index=index) for index, text in enumerate("abc")]
    items.append(PromptItem("d", "3", negative_prompt="a moon", sample_index=3))

    def run(name, batches=True, size=4, rank=0, processes=1):
        calls.clear()
        settings, folder = SamplingSettings(num_inference_steps=2), SampleFolder(tmp_path / name, ("frames",))
        maker = Sampler(str(plain_model), settings, KeyframeSettings(), MemorySettings(), "cpu", size, progress=False)
        assert not maker.draws_batches  # on the CPU
        maker.draws_batches = batches
        maker.run(items, folder, rank, processes)
        return np.stack([np.asarray(folder.open_keyframe(item)) for item in items if folder.record(item, True)])

    alone = run("alone", batches=False)
    assert calls == [["a"], ["b"], ["c"], ["d"]]
    together = run("together")
    assert calls == [["a", "b", "c"], ["d"]]
    assert np.abs(alone.astype(int) - together).max() <= TOLERANCE
    assert run("together").shape == together.shape and calls == []
    (tmp_path / "together/1_keyframe.png").unlink()
    assert np.array_equal(run("together"), together) and calls == [["a", "b", "c"]]
    for rank in (0, 1):
        shared = run("two processes", size=2, rank=rank, processes=2)
        assert calls == ([["a", "b"]], [["c"], ["d"]])[rank]
    assert np.array_equal(run("one process", size=2), shared)


def test_with_key_frames_given_the_video_model_is_opened_once(plain_model, tmp_path, monkeypatch):
    opened = []
    monkeypatch.setattr(sampler, "load_pipeline", lambda *a, **k: opened.append(a) or load_pipeline(*a, **k))
    settings = SamplingSettings(num_inference_steps=1)
    maker = Sampler(str(plain_model), settings, KeyframeSettings(), MemorySettings(), "cpu", progress=False)
    image = np.full((tiny.SIZE, tiny.SIZE, 3), 99, np.uint8)
    for name, count in (("a", 1), ("b", 2)):  # moved to a device and compiled, it is not used again
        maker.run([PromptItem("a star", name, image=image)], SampleFolder(tmp_path, ("frames",)))
        assert len(opened) == count and (tmp_path / f"{name}.npz").is_file()


@pytest.mark.parametrize("embedded, count", [(True, 1), (False, 2)])
def test_a_small_video_model_stays_while_its_key_frames_are_drawn(plain_model, tmp_path, monkeypatch, embedded, count):
    opened = []
    monkeypatch.setattr(sampler, "load_pipeline", lambda *a, **k: opened.append(a) or load_pipeline(*a, **k))
    monkeypatch.setattr(sampler, "is_embedded", lambda name: embedded)
    settings = SamplingSettings(num_inference_steps=1)
    maker = Sampler(str(plain_model), settings, KeyframeSettings(), MemorySettings(), "cpu", progress=False)
    maker.run([PromptItem("a star", "a")], SampleFolder(tmp_path, ("frames",)))
    assert len(opened) == count and (tmp_path / "a.npz").is_file()


def test_pixels_that_are_not_finite_are_refused():
    with pytest.raises(UserError, match="'x' has pixels that are not finite"):
        to_uint8(np.array([0.0, np.nan]), "'x'")
    assert to_uint8(np.array([-0.1, 0.5, 1.2])).tolist() == [0, 128, 255]

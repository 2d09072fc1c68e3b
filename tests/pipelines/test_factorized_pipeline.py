"""Factorized-Dreamer end to end on tiny models: sampling with two captions, saving, training with a flow loss, the commands."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from benchmarks import sprites
from fixtures import tiny, tiny_training
from fixtures.tiny_training import FRAMES, logged, weights
from microcinema.commands import cli
from microcinema.data.clips import ClipDataset
from microcinema.data.optical_flow import FlowClips
from microcinema.diffusion.rng import generator
from microcinema.models.predict_net import PredictNet
from microcinema.pipelines.encoders import encode_motion_tokens, load_image_encoder, load_motion_encoder
from microcinema.pipelines.saving import load_pipeline, save_pipeline
from microcinema.sprites.dataset import write_dataset
from microcinema.training import cached_latents_check
from microcinema.training.batch_encoder import BatchEncoder
from microcinema.utils.errors import UserError

PROMPT, MOTION = "a large red star on sand", "moving to the left"

GROUND_TRUTH = "microcinema.sprites.flow.GroundTruthFlow"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("factorized")


@pytest.fixture(scope="module")
def model(folder):
    return tiny.video_pipeline(folder, model="factorized_dreamer")


@pytest.fixture(scope="module")
def image():
    pixels = torch.randint(0, 256, (tiny.SIZE, tiny.SIZE, 3), generator=generator(5), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four real clips of Moving Sprites."""
    return write_dataset(tmp_path_factory.mktemp("clips"), num_videos=4, num_frames=FRAMES, size=tiny.SIZE)


def dataset(clips):
    return ClipDataset(clips / "clips.csv", clips, FRAMES, 8.0, tiny.SIZE, clip_position="first")


def sample(pipeline, prompt=PROMPT, image=None, motion_prompt=MOTION, seed=0, **settings):
    count = 1 if isinstance(prompt, str) else len(prompt)
    return pipeline(
        prompt,
        image,
        motion_prompt,
        **{"num_inference_steps": 2, "output_type": "latent", **settings},
        generator=[generator(seed, k) for k in range(count)],
    ).frames


def calls(module):
    made = []
    module.register_forward_pre_hook(lambda *_: made.append(1))
    return made


# Sampling


def test_two_captions_and_the_key_frame_all_matter_and_one_caption_stands_for_both(model, image):
    reference = sample(model, image=image)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    for change in ({"prompt": "a small blue moon"}, {"motion_prompt": "still"}, {"image": turned}):
        given = {"prompt": PROMPT, "image": image, "motion_prompt": MOTION, **change}
        assert (sample(model, **given) - reference).abs().max() > 1e-4, change
    assert torch.equal(sample(model, image=image, motion_prompt=None), sample(model, image=image, motion_prompt=PROMPT))


def test_what_depends_on_the_clip_alone_runs_once(folder, image):
    pipeline = tiny.video_pipeline(folder, model="factorized_dreamer")
    parts = (pipeline.image_encoder, pipeline.unet.image_adapter, pipeline.unet.pixel_pyramid)
    made = [calls(part) for part in parts]
    of_motion = calls(pipeline.motion_encoder)
    sample(pipeline, image=image, num_inference_steps=5, guidance_scale=3.0, image_guidance_scale=1.5)
    assert [len(found) for found in made] == [1, 1, 1]
    assert len(of_motion) == 2  # the caption and the empty caption


def test_a_video_is_the_same_alone_and_in_a_batch(model, image):
    turned = image.transpose(Image.Transpose.ROTATE_90)
    together = sample(model, [PROMPT, "a small blue moon"], [turned, image], [MOTION, "still"])
    assert torch.allclose(together[:1], sample(model, PROMPT, turned, MOTION), atol=1e-4)


def test_a_motion_prompt_that_nothing_reads_is_refused(tmp_path, image):
    plain = tiny.video_pipeline(tmp_path)
    with pytest.raises(UserError, match="no motion encoder"):
        sample(plain, image=image)


# Saving


@pytest.mark.parametrize("with_base", [True, False])
def test_a_saved_model_gives_the_same_bits(tmp_path, model, image, with_base):
    save_pipeline(model, tmp_path / "saved", with_base)
    kept = {path.name for path in (tmp_path / "saved").iterdir() if path.is_dir()}
    assert ({"image_encoder", "motion_encoder", "motion_tokenizer", "vae"} <= kept) == with_base
    wanted = sample(model, image=image)
    for opened in (load_pipeline(tmp_path / "saved"), DiffusionPipeline.from_pretrained(tmp_path / "saved")):
        opened.set_progress_bar_config(disable=True)
        assert torch.equal(sample(opened, image=image), wanted)


def test_motion_captions_are_padded_with_zeros_and_cut(folder):
    parts = load_motion_encoder(str(folder / "t5"))
    tokens = encode_motion_tokens(
        parts["motion_encoder"], parts["motion_tokenizer"], ["left", "", "a large red star on sand"], 4
    )
    assert tokens.any(-1).tolist() == [[True, True, False, False], [True, False, False, False], [True] * 4]
    alone = encode_motion_tokens(parts["motion_encoder"], parts["motion_tokenizer"], ["left"], 8)
    torch.testing.assert_close(alone[:, :2], tokens[:1, :2])


def test_encoders_that_are_not_there_are_named(folder, tmp_path):
    with pytest.raises(UserError, match=r"no image encoder.*model\.image_encoder="):
        load_image_encoder(None, str(folder))
    with pytest.raises(UserError, match="is a clip; name a T5"):
        load_motion_encoder(str(folder / "clip"))
    (folder / "clip" / "preprocessor_config.json").rename(tmp_path / "away")
    try:
        with pytest.raises(UserError, match="image_mean"):
            load_image_encoder(str(folder / "clip"), str(folder))
    finally:
        (tmp_path / "away").rename(folder / "clip" / "preprocessor_config.json")


# Training


def train(folder, run, clips, teacher=GROUND_TRUTH, **settings):
    pipeline = tiny.video_pipeline(folder, model="factorized_dreamer", stirred=False)
    data = dataset(clips)
    predict_net = None
    if teacher is not None:
        data, predict_net = (
            FlowClips(data, teacher, tiny.VAE_FACTOR),
            PredictNet.for_unet(pipeline.unet),
        )
    settings = tiny_training.make_config(run, **{"trainable_parameters": "all", **settings})
    tiny_training.Trainer(
        tiny_training.accelerator(settings), pipeline, data, settings, predict_net=predict_net
    ).train()
    return pipeline


def test_predict_net_is_in_checkpoints_and_not_in_the_pipeline(folder, tmp_path, clips):
    """And a run that is broken off goes on to the same bits, PredictNet included."""
    train(folder, tmp_path / "with", clips)
    train(folder, tmp_path / "without", clips, teacher=None)
    exported = [{name for name in weights(tmp_path / run) if "checkpoint" not in name} for run in ("with", "without")]
    assert exported[0] == exported[1] and not any("predict" in name for name in exported[0])
    assert any(name.startswith("predict_net/") for name in weights(tmp_path / "with/checkpoint-4"))
    assert min(logged(tmp_path / "with", "loss/flow").values()) > 0

    train(folder, tmp_path / "parts", clips, max_train_steps=2)
    train(folder, tmp_path / "parts", clips, resume_from_checkpoint="latest")
    once, twice = (weights(tmp_path / run / "checkpoint-4") for run in ("with", "parts"))
    assert once.keys() == twice.keys() and all(torch.equal(once[name], twice[name]) for name in once)


def collated(source):
    return torch.utils.data.default_collate([{**source[k], "sample_index": k} for k in range(3)])


@pytest.mark.parametrize("keep", [None, ["keyframe", "flow"], ["text", "motion_tokens", "keyframe", "flow"]])
def test_encoded_clips_are_to_the_model_what_the_clips_are(model, clips, tmp_path, keep, monkeypatch):
    """Whatever was kept and whatever is made of it; what was kept is not made again."""
    data = FlowClips(dataset(clips), GROUND_TRUTH, tiny.VAE_FACTOR)
    kept = tiny_training.encode_clips(model, dataset(clips), tmp_path / "latents", GROUND_TRUTH, keep)
    cached_latents_check.check(kept, model, GROUND_TRUTH)
    encode = BatchEncoder(model, torch.device("cpu"))
    raw, null = encode(collated(data)), encode.null_conditioning()
    if keep is None:
        for network in (model.vae, model.text_encoder, model.motion_encoder, model.image_encoder):
            monkeypatch.setattr(network, "forward", None)
        monkeypatch.setattr(model.vae, "encode", None)
    encode = BatchEncoder(model, torch.device("cpu"), kept.empty_tokens)
    batch = encode(collated(kept))
    assert raw.image.keys() == batch.image.keys() == {"image_tokens", "pixels"}
    close = {"atol": 4e-3, "rtol": 2e-3}  # float16
    torch.testing.assert_close(batch.latents, raw.latents, **close)
    torch.testing.assert_close(batch.text, raw.text, **close)
    torch.testing.assert_close(batch.motion_tokens, raw.motion_tokens, **close)
    torch.testing.assert_close(batch.image["image_tokens"], raw.image["image_tokens"], **close)
    torch.testing.assert_close(batch.image["pixels"], raw.image["pixels"], atol=1e-6, rtol=0)
    torch.testing.assert_close(encode.null_conditioning().text, null.text, **close)
    torch.testing.assert_close(encode.null_conditioning().motion_tokens, null.motion_tokens, **close)
    assert torch.equal(batch.flow.valid, raw.flow.valid)
    torch.testing.assert_close(batch.flow.vectors, raw.flow.vectors, **close)
    assert raw.flow.vectors.abs().max() > 0.05
    with pytest.raises(UserError, match=f"teacher was {GROUND_TRUTH} and is dis"):
        cached_latents_check.check(kept, model, "dis")


def test_what_is_kept_of_the_key_frame_is_of_the_models_own_place(folder, clips, tmp_path):
    """Pixels and image tokens; and those of another place are refused in one line."""
    model = tiny.video_pipeline(folder, model="factorized_dreamer", keyframe_position="center")
    kept = tiny_training.encode_clips(model, dataset(clips), tmp_path / "latents")
    video = dataset(clips)[1]["video"].float()
    assert not torch.equal(video[0], video[FRAMES // 2])
    torch.testing.assert_close(kept[1]["keyframe"].float(), video[FRAMES // 2], atol=0, rtol=0)
    tokens = model.encode_pixels(video[FRAMES // 2][None] / 127.5 - 1)["image_tokens"][0]
    torch.testing.assert_close(kept[1]["image_tokens"].float(), tokens, atol=4e-3, rtol=2e-3)
    cached_latents_check.check(kept, model, None)
    for position, told in (("first", "0"), (0, "0"), (1, "1")):
        model.register_to_config(keyframe_position=position)
        fault = f"image_tokens.keyframe_position was center and is {told}, keyframe.keyframe_position was center and is {told}"
        with pytest.raises(UserError, match=f"do not match this run: {fault}; make others") as caught:
            cached_latents_check.check(kept, model, None)
        assert "\n" not in str(caught.value)


def test_what_these_latents_are_not(folder, model, clips, tmp_path):
    kept = tiny_training.encode_clips(
        model, dataset(clips), tmp_path / "latents", cached_parts=["text", "motion_tokens"]
    )
    with pytest.raises(UserError, match="come without flow and keyframe, which this model needs"):
        cached_latents_check.check(kept, model, "dis")
    with pytest.raises(UserError, match="do not include"):
        BatchEncoder(model, torch.device("cpu"))(collated(kept))
    model.register_to_config(num_motion_tokens=9)
    with pytest.raises(UserError, match="num_motion_tokens was 32 and is 9; make others"):
        cached_latents_check.check(kept, model, None)
    model.register_to_config(num_motion_tokens=32)
    plain = tiny.video_pipeline(folder)
    with pytest.raises(UserError, match="of was description and is caption"):  # another caption is read
        cached_latents_check.check(kept, plain, None)


# The commands


@pytest.mark.usefixtures("model")  # which writes the folder
def test_the_commands_train_export_and_sample(folder, clips, tmp_path, capsys, monkeypatch):
    tiny_training.reset_accelerator()
    monkeypatch.chdir(tmp_path)
    common = [
        f"base.pretrained_model_name_or_path={folder}",
        "trainable_parameters=all",
        f"output_dir={tmp_path / 'run'}",
    ]
    data = [f"data.root={clips}", f"resolution={tiny.SIZE}", f"num_frames={FRAMES}", "fps=8"]
    parts = [
        f"model.image_encoder={folder / 'clip'}",
        f"model.motion_encoder={folder / 't5'}",
        "model.flow_model=dis",
    ]
    small = ["max_train_steps=1", "train_batch_size=2", "dataloader_num_workers=0", "report_to=null"]
    command = ["train", "model=factorized_dreamer", *common, *data, *parts, *small]
    assert cli.main(command) == 0
    assert cli.main(["export", f"checkpoint={tmp_path / 'run/checkpoint-1'}", f"output_dir={tmp_path / 'out'}"]) == 0
    schedule = json.loads((tmp_path / "out/model_index.json").read_text())["training_schedule"]
    assert schedule["prediction_type"] == "v_prediction"
    capsys.readouterr()
    assert sprites.main(["flow_error", str(tmp_path / "run/checkpoint-1"), "--clips", "1", "--timesteps", "20"]) == 0
    assert "places a frame: 1.0" in capsys.readouterr().out  # a step from predicting zero
    assert sprites.main(["flow_error", str(tmp_path / "run/logs")]) == 2
    assert "predict_net' is not there" in capsys.readouterr().err
    Image.new("RGB", (tiny.SIZE, tiny.SIZE)).save("key.png")
    asked = [f"pipeline={tmp_path / 'out'}", "image=key.png", "num_inference_steps=2", f"prompt={PROMPT}"]
    made = {}
    for name in ("still", "moving to the left"):
        assert cli.main(["sample", *asked, f"motion_prompt={name}", f"output_dir={name}"]) == 0
        (record,) = (p for p in (tmp_path / name).glob("*.json") if "keyframe" not in p.name)
        made[name] = json.loads(record.read_text())
    assert made["still"]["motion_prompt"] == "still"
    assert {"image_encoder", "motion_encoder"} <= made["still"]["weights_sha256"].keys()
    capsys.readouterr()
    tiny_training.reset_accelerator()
    without = [key for key in command if not key.startswith("model.image_encoder")]
    assert cli.main(without) == 2
    assert "has no image encoder" in capsys.readouterr().err


def test_flow_needs_a_truth_and_a_known_teacher(clips):
    with pytest.raises(UserError, match="not allowed"):
        FlowClips(dataset(clips), "guess", 4)
    moving = dataset(clips)
    moving.clip_position = "random"
    with pytest.raises(UserError, match="clip_position=first"):
        FlowClips(moving, GROUND_TRUTH, 4)

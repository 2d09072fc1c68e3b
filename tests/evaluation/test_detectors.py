"""Detectors on random weights: calling conventions of the public files, and what is refused."""

import numpy as np
import pytest
import torch

from fixtures import tiny_detectors
from fixtures.tiny_detectors import noise_clips, write_script
from microcinema.evaluation.detectors import (
    Batch,
    ClassProbabilities,
    ClipScores,
    FrameFeatures,
    VideoDetectorSettings,
    VideoFeatures,
    keyframe_fidelity,
    motion,
)
from microcinema.evaluation.i3d import I3D
from microcinema.evaluation.weights import hash_file
from microcinema.utils.errors import UserError


@pytest.fixture(scope="module")
def i3d(tmp_path_factory):
    """`rgb_imagenet.pt`, and a TorchScript of the same weights: paths and the script's sha256."""
    folder = tmp_path_factory.mktemp("i3d")
    state = tiny_detectors.i3d_state()
    torch.save(state, folder / "rgb_imagenet.pt")
    script, sha256 = write_script(tiny_detectors.PublicI3D(I3D.from_state_dict(state)), folder / "i3d_torchscript.pt")
    return str(folder / "rgb_imagenet.pt"), script, sha256


def test_the_public_torchscript_and_the_written_out_network_agree(i3d):
    plain, script, sha256 = i3d
    clips = noise_clips(1)  # of one clip, from which the script drops the batch axis
    written = VideoDetectorSettings("i3d", plain).load("cpu", 1)
    public = VideoDetectorSettings("i3d_torchscript", script, sha256, "own").load("cpu", 1)
    expected = written(Batch(clips))["features"]
    assert expected.shape == (1, 400) and expected.std() > 0.01
    np.testing.assert_allclose(public(Batch(clips))["features"], expected, rtol=1e-4, atol=1e-5)
    assert public.record == {"detector": "i3d_torchscript", "sha256": sha256, "preparation": "own"}
    assert written.record["sha256"] == hash_file(plain) and written.record["batch_norm_eps"] == 1e-3


def test_the_eps_of_the_norms_reaches_them(i3d, monkeypatch):
    monkeypatch.setattr(I3D, "forward", lambda self, video: torch.full((len(video), 1), self.Mixed_5c.b2b.bn.eps))
    found = VideoDetectorSettings("i3d", i3d[0], batch_norm_eps=1e-5).load("cpu", 1)(Batch(noise_clips(2)))
    np.testing.assert_allclose(found["features"], 1e-5)


def test_what_is_no_detector_is_refused(i3d, tmp_path):
    plain, script, sha256 = i3d

    def refused(words: str, *settings, clips=None):
        with pytest.raises(UserError, match=words):
            VideoDetectorSettings(*settings).load("cpu", 1)(Batch(clips))

    refused("no file", "i3d", "gone.pt")
    refused(f"is code.*evaluation.video.sha256={sha256}", "i3d_torchscript", script)
    refused(f"sha256 {sha256}, not", "i3d_torchscript", script, "0" * 64)
    refused("no TorchScript", "i3d_torchscript", plain, hash_file(plain))
    refused("preparation=own", "i3d", plain, None, "own")
    (tmp_path / "text.pt").write_text("nothing")
    refused("holds no weights", "i3d", str(tmp_path / "text.pt"))
    torch.save([1, 2], tmp_path / "list.pt")
    refused("not a dictionary of weights", "i3d", str(tmp_path / "list.pt"))
    refused("9 frames", "i3d", plain, clips=noise_clips(1, frames=9))


def test_a_command_may_add_detectors(tmp_path):
    def load(weights, device, batch_size):
        return VideoFeatures(lambda clips: clips.mean(axis=(1, 2, 3)), {"detector": weights})

    detector = VideoDetectorSettings("colors", "mean").load("cpu", 4, {"colors": load})
    assert detector(Batch(noise_clips(3)))["features"].shape == (3, 3) and detector.record == {"detector": "mean"}
    with pytest.raises(
        UserError, match="detector=colors is unknown; use one of i3d, i3d_torchscript, videomae, vjepa, other"
    ):
        VideoDetectorSettings("colors", "mean").load("cpu", 4, {"other": load})


def test_c3d_gives_probabilities_or_is_refused(tmp_path):
    clips = Batch(noise_clips(3))
    detector = ClassProbabilities(*write_script(tiny_detectors.PublicC3D(), tmp_path / "c3d.pt"))
    found = detector(clips)["probabilities"]
    assert found.shape == (3, 101)
    np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
    logits = write_script(tiny_detectors.PublicC3D(softmax=False), tmp_path / "logits.pt")
    with pytest.raises(UserError, match="no probabilities"):
        ClassProbabilities(*logits)(clips)
    sports = write_script(tiny_detectors.PublicC3D(classes=487), tmp_path / "sports.pt")
    with pytest.raises(UserError, match="knows 487 classes, and UCF-101 has 101"):
        ClassProbabilities(*sports)(clips)


def test_frames_keep_their_clip(tmp_path):
    clips = noise_clips(2, 3)
    found = FrameFeatures(*write_script(tiny_detectors.PublicInception(), tmp_path / "i.pt"))(Batch(clips))
    np.testing.assert_allclose(found["frame_features"][..., :3], clips.astype(float).mean(axis=(2, 3)) / 255, atol=1e-5)


def test_clip_scores_are_mean_cosines(tmp_path):
    folder = tiny_detectors.clip_folder(tmp_path / "clip")
    scores = ClipScores(str(folder))
    clips, prompts = noise_clips(2, 3), ["a red star", "a large blue moon on sand"]
    found = scores(Batch(clips, prompts))
    for row, (clip, prompt) in enumerate(zip(clips, prompts, strict=True)):
        words = scores.tokens([prompt], return_tensors="pt")
        pixels = scores.images(list(clip), return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            output = scores.network(**words, pixel_values=pixels)
        images = output.image_embeds  # which the model has normalised itself
        assert found["clipsim"][row] == pytest.approx(float((images @ output.text_embeds.T).mean()), abs=1e-5)
        assert found["clip_consistency"][row] == pytest.approx(
            float((images[1:] * images[:-1]).sum(1).mean()), abs=1e-5
        )
    assert set(scores(Batch(clips))) == {"clip_consistency"}
    still = np.repeat(clips[:, :1], 3, axis=1)
    np.testing.assert_allclose(scores(Batch(still))["clip_consistency"], 1, atol=1e-5)
    with pytest.raises(UserError, match="nothing-here"):
        ClipScores(str(tmp_path / "nothing-here"))


def test_motion_and_fidelity_are_those_of_the_frames():
    still = np.repeat(noise_clips(2, 1), 4, axis=1)
    np.testing.assert_allclose(motion(Batch(still))["motion_magnitude"], 0, atol=0.01)
    assert (motion(Batch(noise_clips(2, 4)))["motion_magnitude"] > 0.1).all()
    assert keyframe_fidelity(Batch(still)) == {}
    found = keyframe_fidelity(Batch(still, keyframes=still[:, 0]))
    assert list(found["psnr"]) == [60, 60] and found["ssim"].shape == (2,)


def test_fidelity_is_that_of_the_frame_at_which_the_key_frame_stands():
    clips = noise_clips(2)
    values = keyframe_fidelity(Batch(clips, keyframes=clips[:, 3], keyframe_index=3))
    assert list(values["psnr"]) == [60, 60]
    assert (keyframe_fidelity(Batch(clips, keyframes=clips[:, 3]))["psnr"] < 20).all()

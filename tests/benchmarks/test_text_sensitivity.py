"""Text sensitivity: 0 for a network that does not read its text, and as constructed for one that does."""

import json
from collections import Counter

import pytest
import torch

from benchmarks import sprites, text_sensitivity
from fixtures import tiny
from microcinema.sprites import scene
from microcinema.training.loss import TrainableModel

TIMES = ["t=100", "t=300", "t=500", "t=700", "t=900"]


def test_sprites_have_every_motion_that_has_an_opposite():
    drawn = text_sensitivity.moving_sprites(17)
    motions = Counter(sprite.motion for sprite in drawn)
    assert set(motions) == {*scene.TRANSLATIONS, *scene.ROTATIONS, *scene.SCALINGS}
    assert sorted(motions.values()) == [2] * 7 + [3] and len(set(drawn)) == 17
    assert all((sprite.shape, sprite.colour) in scene.HELD_OUT for sprite in drawn)
    assert drawn[:3] == text_sensitivity.moving_sprites(3)
    assert all(text_sensitivity.OPPOSITE[other] == motion for motion, other in text_sensitivity.OPPOSITE.items())


def test_a_network_that_does_not_read_its_text_has_none(tmp_path):
    pipeline = tiny.video_pipeline(tmp_path)
    blind = TrainableModel(pipeline.unet).eval()

    def denoiser(z_t, t, text, *rest, **inputs):
        return blind(z_t, t, torch.zeros_like(text), *rest, **inputs)

    found = text_sensitivity.measure(pipeline, denoiser, text_sensitivity.moving_sprites(2))
    assert found["text_sensitivity"] == 0 and found["moving_loss"] > 0
    assert list(found["parts"]) == [*TIMES, "left", "right"]
    assert all(part["text_sensitivity"] == 0 for part in found["parts"].values())


@pytest.mark.parametrize("factorized", [False, True])
def test_a_network_that_reads_its_motion_caption_has_some(tmp_path, factorized, monkeypatch):
    """The key frame's caption stays; what the network predicts is twice as far off where the motion is not the right one."""
    pipeline, drawn = (
        tiny.video_pipeline(tmp_path, model="factorized_dreamer" if factorized else "microcinema"),
        text_sensitivity.moving_sprites(1),
    )
    encoder = "encode_motion" if factorized else "encode_text"
    encode = getattr(pipeline, encoder)

    def encode_side(captions):
        return torch.full_like(encode(captions), 1e3 if "to the left" in captions[0] else 2e3)

    def denoiser(z_t, t, text, *rest, motion_tokens=None, **inputs):
        assert (motion_tokens is not None) == factorized
        return (motion_tokens if factorized else text)[0, 0, 0].expand(z_t.shape), None

    monkeypatch.setattr(pipeline, encoder, encode_side)
    found = text_sensitivity.measure(pipeline, denoiser, drawn)
    assert [sprite.motion for sprite in drawn] == ["left"]
    assert found["text_sensitivity"] == pytest.approx(3, rel=0.01)


@pytest.mark.parametrize("name", ["sprites-microcinema", "sprites-factorized-dreamer"])
def test_the_embedded_models_read_it(name, tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert sprites.main(["--json", str(path), "text_sensitivity", "--pipeline", name, "--clips", "4"]) == 0
    report = json.loads(path.read_text())
    assert report["text_sensitivity"] > 0.02 and report["parts"]["t=900"]["text_sensitivity"] > 0
    assert capsys.readouterr().out.startswith("all ")

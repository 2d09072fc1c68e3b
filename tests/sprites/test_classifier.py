import math

import pytest
import torch

from microcinema.sprites.classifier import SpriteClassifier
from microcinema.utils.errors import UserError
from scripts.recipes.train_assets import IGNORED, classifier_loss, encode_labels

CLASSES = {"shape": ["circle", "square"], "motion": ["still", "left", "right"], "speed": ["slowly", "quickly"]}


def small(**kwargs) -> SpriteClassifier:
    torch.manual_seed(0)
    return SpriteClassifier(CLASSES, num_frames=8, channels=(8, 16, 24), feature_dim=32, **kwargs)


def test_logits_have_one_column_a_class_and_features_are_penultimate():
    network, video = small(), torch.randn(3, 8, 3, 32, 32)
    logits = network(video)
    assert {name: tuple(values.shape) for name, values in logits.items()} == {
        "shape": (3, 2),
        "motion": (3, 3),
        "speed": (3, 2),
    }
    features = network.features(video)
    assert features.shape == (3, 32)
    torch.testing.assert_close(network.heads["motion"](features), logits["motion"])


def test_a_clip_is_judged_alike_whatever_else_is_in_its_batch():
    network, video = small(), torch.randn(3, 8, 3, 32, 32)
    torch.testing.assert_close(network.features(video)[1:2], network.features(video[1:2]), atol=1e-5, rtol=1e-5)


def test_default_network_stays_small():
    classes = dict(CLASSES, background=["a", "b", "c", "d", "e", "f"])
    assert sum(p.numel() for p in SpriteClassifier(classes).parameters()) < 0.45e6


def test_missing_attribute_is_ignored_by_the_loss():
    targets = encode_labels(
        CLASSES,
        [
            {"shape": "circle", "motion": "still", "speed": ""},
            {"shape": "square", "motion": "left", "speed": "quickly"},
        ],
    )
    assert targets["speed"].tolist() == [IGNORED, 1] and targets["motion"].tolist() == [0, 1]
    uniform = {name: torch.zeros(2, len(names)) for name, names in CLASSES.items()}
    assert float(classifier_loss(uniform, targets)) == pytest.approx(math.log(2) + math.log(3) + math.log(2))
    all_still = {name: torch.zeros(2, len(names), requires_grad=True) for name, names in CLASSES.items()}
    loss = classifier_loss(all_still, {**targets, "speed": torch.full((2,), IGNORED)})
    assert float(loss.detach()) == pytest.approx(math.log(2) + math.log(3))


def test_saved_and_loaded_network_is_the_same(tmp_path):
    network, video = small(), torch.randn(2, 8, 3, 32, 32)
    network.save_pretrained(tmp_path)
    loaded = SpriteClassifier.from_pretrained(tmp_path)
    assert dict(loaded.config.classes) == CLASSES
    torch.testing.assert_close(loaded(video)["shape"], network(video)["shape"])


def test_bad_input_names_the_value():
    with pytest.raises(UserError, match="6"):
        SpriteClassifier(CLASSES, num_frames=6)
    with pytest.raises(UserError, match="12"):
        SpriteClassifier(CLASSES, channels=(12, 16, 24))
    with pytest.raises(UserError, match="16 frames"):
        small()(torch.randn(1, 16, 3, 32, 32))


def test_learns_which_way_a_square_moves():
    torch.manual_seed(0)
    network = SpriteClassifier({"motion": ["left", "right"]}, num_frames=8, channels=(8, 16, 24), feature_dim=32)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.randint(0, 2, (16,))
        video = -torch.ones(16, 8, 3, 32, 32)
        for clip, way in enumerate(label):
            start, top = int(torch.randint(10, 14, ())), int(torch.randint(0, 24, ()))
            for frame in range(8):
                left = start + (frame if way else -frame)
                video[clip, frame, :, top : top + 8, left : left + 8] = 1
        return video, label

    for _ in range(60):
        video, label = batch()
        loss = classifier_loss(network(video), {"motion": label})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    video, label = batch()
    assert (network(video)["motion"].argmax(dim=1) == label).float().mean() == 1

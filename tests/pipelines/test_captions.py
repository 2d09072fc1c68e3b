"""Embeddings in the place of texts, as compel makes them."""

import pytest
import torch

from fixtures import tiny
from fixtures.tiny_sampling import PROMPTS, sample
from microcinema.utils.errors import UserError

GUIDED = {"guidance_scale": 3.0, "seeds": (0, 1)}


def test_embeddings_of_texts_make_the_videos_of_the_texts(pipeline, image):
    expected = sample(pipeline, PROMPTS, image, negative_prompt="blue", **GUIDED)
    embeds, negative = pipeline.encode_text(PROMPTS), pipeline.encode_text(["blue"])
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert (sample(pipeline, None, image, **given, **GUIDED) == expected).all()
    assert (sample(pipeline, None, image, prompt_embeds=embeds, negative_prompt="blue", **GUIDED) == expected).all()
    one = sample(pipeline, None, image, prompt_embeds=embeds[:1], num_videos_per_prompt=2, **GUIDED)
    assert abs(one - sample(pipeline, PROMPTS[:1] * 2, image, **GUIDED)).max() < 1e-4  # but for rounding


def test_longer_ones_and_weighted_ones_are_read(pipeline, image):
    """Of a prompt that is longer than the text encoder reads: compel's are of two or more times its length."""
    long = torch.cat([pipeline.encode_text([text]) for text in PROMPTS], dim=1)
    null = torch.cat([pipeline.encode_text([""])] * 2, dim=1)
    settings = {"guidance_scale": 3.0, "negative_prompt_embeds": null}
    frames = sample(pipeline, None, image, prompt_embeds=long, **settings)
    other = sample(pipeline, None, image, prompt_embeds=torch.cat([long[:, : tiny.MAX_TOKENS]] * 2, dim=1), **settings)
    assert not (frames == other).all()
    assert not (sample(pipeline, None, image, prompt_embeds=1.5 * long, **settings) == frames).all()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "the prompt is empty"),
        ({"prompt": "a star", "prompt_embeds": torch.zeros(1, tiny.MAX_TOKENS, tiny.WIDTH)}, "both given; give one"),
        ({"prompt_embeds": torch.zeros(1, tiny.MAX_TOKENS, 7)}, r"give \(prompts, tokens, 32\)"),
        ({"prompt_embeds": torch.zeros(1, 2 * tiny.MAX_TOKENS, tiny.WIDTH)}, "as many tokens of both"),
        ({"prompt": "a star", "negative_prompt_embeds": torch.zeros(1, 5, tiny.WIDTH)}, "as many tokens of both"),
    ],
)
def test_what_does_not_fit_is_told(pipeline, image, arguments, message):
    with pytest.raises(UserError, match=message):
        pipeline(**{"prompt": None, "image": image, "num_inference_steps": 1, **arguments})


def test_a_motion_encoder_needs_a_text_of_its_own(tmp_path, image):
    video = tiny.video_pipeline(tmp_path, model="factorized_dreamer")
    embeds = video.encode_text(["a red star"])
    with pytest.raises(UserError, match="give a motion_prompt as well"):
        sample(video, None, image, prompt_embeds=embeds)
    frames = sample(video, None, image, prompt_embeds=embeds, motion_prompt="moving left")
    assert (frames == sample(video, "a red star", image, motion_prompt="moving left")).all()

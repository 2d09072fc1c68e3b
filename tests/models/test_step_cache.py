"""Deep features that are taken over from an earlier step: which layers run, and that what they give is right."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fixtures.tiny_unet import EVERYTHING, PRESETS, base, encoder_outputs, inputs, network, randomise
from microcinema.models.unet2d import HalvedResnetBlock2D, StepCache

VARIANTS = [*((preset,) for preset in PRESETS), EVERYTHING]


def trained(*variant):
    """A network of three resolutions that uses all its parts, latents, a time, and conditions of two clips."""
    video = network(base(), *variant)
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(3)
    return video, z_t, t, video.encode(text, z_ref, fps, **encoder_outputs())


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@torch.no_grad()
def test_a_step_that_takes_its_own_deep_features_over_is_the_whole_step_bit_for_bit(variant):
    video, z_t, t, conditions = trained(*variant)
    plain, cache = video(z_t, t, conditions), StepCache()
    assert torch.equal(video(z_t, t, conditions, cache), plain)
    assert torch.equal(video(z_t, t, conditions, cache), plain)
    other = video(z_t + 1, t, conditions, cache)
    assert not torch.allclose(other, video(z_t + 1, t, conditions)) and not torch.allclose(other, plain)


@pytest.mark.parametrize("variant", VARIANTS, ids=" ".join)
@torch.no_grad()
def test_such_a_step_runs_the_first_resolution_alone(variant):
    video, z_t, t, conditions = trained(*variant)
    ran = []
    for name, module in video.named_modules():
        if isinstance(module, HalvedResnetBlock2D):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    cache, flops = StepCache(), []
    for _ in range(2):
        ran.clear()
        with FlopCounterMode(display=False) as counter:
            video(z_t, t, conditions, cache)
        flops.append(counter.get_total_flops())
    own = [name for name in ran if not name.startswith("appear_net.")]
    assert own == [*(f"down_blocks.0.resnets.{i}" for i in range(2)), *(f"up_blocks.2.resnets.{i}" for i in range(3))]
    assert [name.removeprefix("appear_net.") for name in ran if name not in own] == (own[:2] if video.sources else [])
    assert flops[1] < 0.75 * flops[0]


@pytest.mark.parametrize("variant", [("microcinema",), EVERYTHING], ids=["microcinema", "everything"])
@torch.no_grad()
def test_the_last_clips_take_over_their_own_features_and_more_clips_than_there_are_run_whole(variant):
    """Terms of guidance are clips of the batch, and a step without guidance evaluates the last ones."""
    video, z_t, t, conditions = trained(*variant)
    cache = StepCache()
    both = video(z_t, t, conditions, cache)
    last = video(z_t[1:], t[1:], conditions.last(1), cache)
    torch.testing.assert_close(last, both[1:], atol=1e-4, rtol=1e-4)
    few = StepCache()
    video(z_t[:1] + 1, t[:1], conditions.last(1), few)
    assert torch.equal(video(z_t, t, conditions, few), both)


@torch.no_grad()
def test_a_network_of_one_resolution_has_no_deep_features():
    one = {"block_out_channels": (32,), "down_block_types": ("CrossAttnDownBlock2D",)}
    video = network(base(**one, up_block_types=("CrossAttnUpBlock2D",)), "microcinema")
    randomise(video)
    z_t, t, text, z_ref, fps = inputs(3)
    conditions, cache = video.encode(text, z_ref, fps), StepCache()
    for latents in (z_t, z_t + 1):
        assert torch.equal(video(latents, t, conditions, cache), video(latents, t, conditions))
    assert cache.features is None


@pytest.mark.slow  # tracing takes half a minute
@torch.no_grad()
def test_a_compiled_network_has_one_graph_for_whole_steps_and_one_for_others(unet):
    video = network(unet, "microcinema")
    randomise(video)
    z_t, _, _, z_ref, fps = inputs(3)
    conditions = video.encode(torch.randn(2, 5, 12), z_ref, fps)
    graphs = []
    torch.compiler.reset()
    compiled = torch.compile(video, backend=lambda graph, _: graphs.append(graph) or graph.forward, fullgraph=True)
    cache = StepCache()
    for step in range(6):
        if step % 3 == 0:
            cache.features = None
        time = torch.tensor(900.0 - step)
        if step == 1:
            other = StepCache(cache.features)
            expected = video(z_t, time, conditions, other)
            torch.testing.assert_close(compiled(z_t, time, conditions, cache), expected, atol=1e-5, rtol=1e-5)
        else:
            compiled(z_t, time, conditions, cache)
        assert len(graphs) == min(step + 1, 2)

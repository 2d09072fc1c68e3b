import torch

from fixtures import tiny_training
from microcinema.training.launch_settings import launch_settings
from microcinema.utils.device import precision_settings, set_precision, to_device


def test_a_tensor_goes_to_the_device_that_it_is_asked_to():
    tensor = torch.arange(3)
    assert to_device(tensor, torch.device("meta")).device.type == "meta"
    assert torch.equal(to_device(tensor, torch.device("cpu")), tensor)


def test_a_run_decides_on_tf32_and_records_what_is_in_force(tmp_path):
    for allowed, precision in ((True, "high"), (False, "highest")):
        settings = launch_settings(tiny_training.accelerator(tiny_training.make_config(tmp_path, allow_tf32=allowed)))
        assert (settings["float32_matmul_precision"], settings["cudnn_allow_tf32"]) == (precision, allowed)
    assert {"flash", "mem_efficient", "math"} <= set(settings["attention_kernels"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert precision_settings()["attention_kernels"] == ["math"]


def test_a_processor_computes_the_same_bits_either_way():
    one, other = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    products = []
    for allowed in (True, False):
        set_precision(allowed)
        products.append(one @ other)
    assert torch.equal(*products)

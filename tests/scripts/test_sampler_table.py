"""The page of samplers says what the code gives."""

import re

import pytest

from scripts.recipes.sampler_table import PAGE, PREDICTION_TYPES, SCHEDULES, page, section

FEW = {
    ("Stable Diffusion's", "v_prediction"): ["DDIM", "PNDM", "DDPM", "LCM"],
    ("zero terminal SNR", "epsilon"): ["DDIM"],
    ("Factorized-Dreamer's", "sample"): ["UniPCMultistep", "EulerAncestralDiscrete", "HeunDiscrete"],
}


def same(line: str, other: str) -> bool:
    """Whether two lines are equal but for the last digit of their figures, which depends on the processor."""
    figure = re.compile(r"\b\d\.\d\d\b")
    numbers = zip(figure.findall(line), figure.findall(other), strict=False)
    return figure.sub("", line) == figure.sub("", other) and all(abs(float(a) - float(b)) < 0.021 for a, b in numbers)


def committed(schedule: str, prediction_type: str) -> list[str]:
    heading, _, _ = section(schedule, prediction_type, {})[0].partition("\n")
    text = PAGE.read_text(encoding="utf-8").partition(f"{heading}\n")[2]
    return text.partition("\n### ")[0].splitlines()


@pytest.mark.parametrize("combination", FEW, ids=" ".join)
def test_the_page_says_what_some_samplers_give(combination):
    lines = committed(*combination)
    for name in FEW[combination]:
        for line in section(*combination, {name: {}}):
            if line.startswith(f"| {name}"):
                assert any(same(line, other) for other in lines), line
            elif line.startswith("- Refused"):
                reason = line.partition("(")[2]
                assert any(re.search(f" {name}[, ]", other) and other.endswith(reason) for other in lines), line


def test_every_combination_has_its_section():
    assert all(committed(schedule, kind) for schedule in SCHEDULES for kind in PREDICTION_TYPES)


@pytest.mark.slow
def test_the_page_is_what_the_script_writes():
    lines = zip(page().splitlines(), PAGE.read_text(encoding="utf-8").splitlines(), strict=True)
    assert [pair for pair in lines if not same(*pair)] == []

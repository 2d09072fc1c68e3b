"""The table of published zero-shot numbers that stands in every report."""

import re

from microcinema.evaluation.report import published

NUMBERS = ("ucf101_fvd", "ucf101_is", "msrvtt_fvd", "msrvtt_clipsim")


def test_microcinema_stands_with_all_that_its_authors_report():
    row = {entry["method"]: entry for entry in published()}["MicroCinema"]
    assert [row[name] for name in NUMBERS] == ["342.86", "37.46", "377.40", "0.2967"]


def test_every_method_has_a_number_and_both_papers():
    rows = published()
    assert len({entry["method"] for entry in rows}) == len({entry["arxiv"] for entry in rows}) == len(rows) == 20
    for entry in rows:
        assert re.fullmatch(r"\d{4}\.\d{5}", entry["arxiv"]), entry["method"]
        # The method's own paper, or the table on the project page of MicroCinema's authors.
        assert entry["listed_by"] in {entry["arxiv"], "2311.18829"}, entry["method"]
        assert any(entry[name] for name in NUMBERS), entry["method"]


def test_values_are_of_the_size_of_their_measure():
    limits = dict(zip(NUMBERS, ((200, 750), (15, 50), (200, 1300), (0.2, 0.35)), strict=True))
    for entry in published():
        for name, (low, high) in limits.items():
            assert not entry[name] or low < float(entry[name]) < high, (entry["method"], name)

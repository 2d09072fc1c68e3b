from microcinema.evaluation.measures import Measure, tables
from microcinema.evaluation.report import measures_of


def test_a_measure_is_written_with_its_digits_unit_and_way():
    share = Measure("motion", "Motion", "as asked", "%", "higher", 1)
    assert (share.number(0.9204), share.format(0.9204), share.title) == ("92.0", "92.0 %", "Motion (%) ↑")
    assert Measure("epe", "Flow error", "", "px", "lower").number(-0.25, signed=True) == "-0.250"
    assert Measure("fvd", "FVD", "", better="lower", digits=2).title == "FVD ↓"


def test_tables_are_whole_and_escaped():
    found = tables(["", "FVD ↓", "a_b & 50%"], [["model|x", "1.00", r"\1"]])
    assert found["md"].splitlines() == [
        "|  | FVD ↓ | a_b & 50% |",
        "| --- | ---: | ---: |",
        r"| model\|x | 1.00 | \1 |",
    ]
    tex = found["tex"].splitlines()
    assert tex[0] == r"\begin{tabular}{lrr}" and tex[-1] == r"\end{tabular}"
    assert r" & FVD $\downarrow$ & a\_b \& 50\% \\" in tex
    assert r"model|x & 1.00 & \textbackslash{}1 \\" in tex


def test_distances_of_other_features_have_another_name():
    values = {"fvd": {}, "kvd": {}, "psnr": {}}
    i3d, videomae = ({"VideoFeatures": {"detector": name}} for name in ("i3d", "videomae"))
    assert [measure.label for measure in measures_of(values, i3d)][:2] == ["FVD", "KVD"]
    assert [measure.label for measure in measures_of(values, videomae)][:2] == ["cd-FVD", "cd-KVD"]

"""The benchmark of decoding, short."""

from benchmarks import decoding


def test_a_clip_is_decoded_beside_its_peers(tmp_path):
    found = decoding.measure_file(decoding.write(tmp_path / "a.mp4", 25, 62), 1)
    ratios = {f"{name}{end}" for name in decoding.RATIOS for end in ("", "_low", "_high")}
    assert set(found) == {"microcinema_ms", "pyav_ms", "decord_ms"} | ratios
    assert 0.2 < found["of_decord"] < 5 and min(found.values()) > 0

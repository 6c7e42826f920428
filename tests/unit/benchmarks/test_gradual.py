"""The tables of the benchmark of gradual unfreezing."""

from benchmarks.gradual import lines


def test_one_round_is_said_as_one() -> None:
    # Also one photo.
    photos = {"images": 1, "size": 224, "batch": 32}
    row = {"work": "work", **photos, "rounds": 1, "bit_equal_to_plain": True, "ratios": {}}
    told = "1 photo of 224 pixels in batches of 32; 1 round; weights bit-equal to the plain loop's"
    assert lines(row) == f"-- work; {told}"
    assert "; 128 photos of 224 " in lines({**row, "images": 128})
    assert "; 3 rounds;" in lines({**row, "rounds": 3})

"""The tables of the benchmark of gradual unfreezing."""

from benchmarks.gradual import lines


def test_one_round_is_said_as_one() -> None:
    # Also one photo.
    row = {"work": "work", "images": 1, "rounds": 1, "bit_equal_to_plain": True, "ratios": {}}
    assert lines(row) == "-- work; 1 photo, 1 round; weights bit-equal to the plain loop's"
    assert "; 128 photos, 3 rounds;" in lines({**row, "images": 128, "rounds": 3})

"""Splits are seeded, stratified or grouped, and complete."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwise.errors import DataError
from layerwise.sources.splits import fracs_to_split, grouped_split, stratified_split


@given(
    counts=st.lists(st.integers(3, 40), min_size=1, max_size=6),
    val=st.sampled_from([0.0, 0.1, 0.33, 0.5]),
    test=st.sampled_from([0.0, 0.1, 0.4]),
    seed=st.integers(0, 9),
)
def test_every_sample_is_in_one_part_and_every_class_in_every_part(counts, val, test, seed):
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    parts = stratified_split(labels, [val, test], seed=seed)
    assert sorted(index for part in parts for index in part) == list(range(len(labels)))
    for frac, part in zip((None, val, test), parts, strict=True):
        present = Counter(labels[index] for index in part)
        assert set(present) == (set() if frac == 0 else set(range(len(counts))))
        if frac:
            assert all(abs(present[label] - frac * count) <= 1.5 for label, count in enumerate(counts))


def test_the_seed_alone_decides():
    labels = ["a", "b"] * 20
    assert stratified_split(labels, [0.2], seed=1) == stratified_split(labels, [0.2], seed=1)
    assert stratified_split(labels, [0.2], seed=1) != stratified_split(labels, [0.2], seed=2)


def test_small_classes_are_all_named():
    with pytest.raises(DataError, match=r"2 classes are too small.*'b' has 1, 'c' has 2.*at least 3"):
        stratified_split(["a"] * 5 + ["b"] + ["c"] * 2, [0.2, 0.2], seed=0)


def test_many_small_classes_are_ten_and_a_number():
    # A column of numbers taken for labels makes as many classes as rows.
    with pytest.raises(
        DataError, match=r"500 classes are too small.*, '106' has 1 and 490 more\).*--val-frac"
    ):
        stratified_split([str(number) for number in range(500)], [0.2], seed=0)


def test_one_class_too_small_is_told_in_the_singular():
    # Words follow the number.
    with pytest.raises(DataError, match=r"^1 class is too small"):
        stratified_split(["a"] * 8 + ["b"], [0.2], seed=0)


@pytest.mark.parametrize("split", [stratified_split, grouped_split])
@pytest.mark.parametrize("fracs", [[-0.1], [1.0], [0.5, 0.5]])
def test_shares_out_of_range(split, fracs):
    with pytest.raises(DataError, match=r"val_frac=.*sum is below 1"):
        split(list(range(10)), fracs, seed=0)


@given(groups=st.lists(st.integers(0, 30), min_size=60, max_size=200), seed=st.integers(0, 5))
def test_groups_stay_together(groups, seed):
    if len(set(groups)) < 3:
        return
    parts = grouped_split(groups, [0.2, 0.2], seed=seed)
    assert sorted(index for part in parts for index in part) == list(range(len(groups)))
    sides = [{groups[index] for index in part} for part in parts]
    assert all(sides)
    assert sum(map(len, sides)) == len(set(groups))  # no group on two sides
    largest = max(Counter(groups).values())
    for frac, part in zip((0.6, 0.2, 0.2), parts, strict=True):
        assert abs(len(part) - frac * len(groups)) <= 2 * largest


def test_too_few_groups():
    with pytest.raises(DataError, match="2 groups cannot be split into 3 parts"):
        grouped_split(["a", "a", "b"], [0.2, 0.2], seed=0)


def test_a_share_is_checked_and_told_where_the_part_is_there() -> None:
    # A share out of range is an error although nothing is split; one not used is told.
    with pytest.raises(DataError, match="val_frac is 2; expected"):
        fracs_to_split({"train", "val"}, val_frac=2, test_frac=0.0)
    both = (
        r"^--val-frac 0\.6, --test-frac 0\.4 \(val_frac=, test_frac=\): expected shares whose sum is below 1"
    )
    with pytest.raises(DataError, match=both):
        fracs_to_split({"train"}, val_frac=0.6, test_frac=0.4)
    fracs, notes = fracs_to_split({"train", "test"}, val_frac=0.3, test_frac=0.99)
    assert fracs == [0.3, 0.0]
    assert notes == ["--test-frac 0.99 (test_frac=) is not used: the data have a test part of their own"]
    assert fracs_to_split({"train", "val", "test"}, val_frac=0.2, test_frac=0.0) == ([0.0, 0.0], [])


def test_samples_without_classes_are_not_told_of_a_class():
    # Numbers and texts of language models are split as if they had one.
    with pytest.raises(DataError, match=r"^1 sample cannot be split into 2 parts\. Add samples.*frac"):
        stratified_split([0], [0.2], seed=0)

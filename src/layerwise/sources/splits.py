"""Split samples into parts by a seed: stratified by class, or keeping what belongs together on one side."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Collection, Hashable, Sequence

from layerwise.errors import DataError, plural, shorten

VAL_FRAC = 0.2
"""Share of train to validate on, where nothing else is said."""


def fracs_to_split(
    parts: Collection[str], *, val_frac: float, test_frac: float
) -> tuple[list[float], list[str]]:
    """Return the shares of train to split off for val and test: 0 for a part that is there already.

    Also returns a note for each share that was asked for in vain.

    Args:
        parts: names of those that are there.
        val_frac: share for validation.
        test_frac: share for testing.

    Raises:
        DataError: a share is out of range, whether it is used or not, or those that are leave no train.
    """
    fracs, notes = [], []
    for name, frac, default in (("val", val_frac, VAL_FRAC), ("test", test_frac, 0.0)):
        if not 0 <= frac < 1:
            raise DataError(f"{name}_frac is {frac}; expected a share of at least 0 and below 1.")
        if name in parts and frac not in (0.0, default):
            notes.append(
                f"--{name}-frac {frac} ({name}_frac=) is not used: the data have a {name} part of their own"
            )
        fracs.append(0.0 if name in parts else frac)
    if sum(fracs) >= 1:
        raise DataError(
            f"--val-frac {val_frac}, --test-frac {test_frac} (val_frac=, test_frac=): expected shares whose "
            "sum is below 1, so that something is left to train on."
        )
    return fracs, notes


def stratified_split(
    labels: Sequence[Hashable], fracs: Sequence[float], *, seed: int, names: Sequence[str] = ("val", "test")
) -> list[list[int]]:
    """Return the indices of the parts of a split in which every class has the same share of each part.

    Of each class, ``round(frac * n)`` samples go to a part, and at least one where `frac` is above 0; the
    rest is the first part (train), which keeps at least one: parts that are too large for that get fewer.
    Nothing but `labels` and `seed` decides, so the same files give the same split on every machine.

    Args:
        labels: the class of each sample.
        fracs: share of each further part, in [0, 1), their sum below 1; 0 gives an empty part.
        seed: of Python's generator, made anew here.
        names: of the further parts, for messages.

    Returns:
        One sorted list of indices for train, then one for each of `fracs`.

    Raises:
        DataError: a share is out of range, or a class has too few samples for one in each part.

    >>> [len(part) for part in stratified_split(["a"] * 8 + ["b"] * 4, [0.25], seed=0)]
    [9, 3]
    """
    members, wanted = _members(labels, fracs, names)
    small = {label: len(indices) for label, indices in members.items() if len(indices) < wanted}
    if small and len(members) == 1:  # of numbers and of texts without labels
        raise DataError(
            f"{plural(len(labels), 'sample')} cannot be split into {wanted} parts. Add samples, or set a "
            "share to 0: --val-frac, --test-frac."
        )
    if small:
        listed = shorten((f"{label!r} has {count}" for label, count in sorted(small.items(), key=str)), 10)
        raise DataError(
            f"{plural(len(small), 'class is', 'classes are')} too small to be split into {wanted} parts "
            f"({listed}); expected at least {wanted} samples of each class. Add samples, leave "
            "the classes out, or set a share to 0: --val-frac, --test-frac."
        )
    parts: list[list[int]] = [[] for _ in range(len(fracs) + 1)]
    generator = random.Random(seed)
    for label in sorted(members, key=str):
        indices = members[label]
        generator.shuffle(indices)
        for part, count in zip(parts[1:], _counts(len(indices), fracs)):
            part.extend(indices[:count])
            indices = indices[count:]
        parts[0].extend(indices)
    return [sorted(part) for part in parts]


def _members(
    labels: Sequence[Hashable], fracs: Sequence[float], names: Sequence[str]
) -> tuple[dict[Hashable, list[int]], int]:
    """Return the indices of the samples of each label, and how many parts are not empty.

    Raises:
        DataError: a share is out of range.
    """
    if any(not 0 <= frac < 1 for frac in fracs) or sum(fracs) >= 1:
        shares = ", ".join(f"{name}_frac={frac}" for name, frac in zip(names, fracs))
        raise DataError(f"{shares}: expected shares of at least 0 whose sum is below 1.")
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        members[label].append(index)
    return members, sum(frac > 0 for frac in fracs) + 1


def _counts(total: int, fracs: Sequence[float]) -> list[int]:
    """Return how many of `total` samples each part gets; at least one is left for train."""
    counts = [max(1, round(frac * total)) if frac > 0 else 0 for frac in fracs]
    while sum(counts) >= total:
        counts[counts.index(max(counts))] -= 1
    return counts


def grouped_split(
    groups: Sequence[Hashable], fracs: Sequence[float], *, seed: int, names: Sequence[str] = ("val", "test")
) -> list[list[int]]:
    """Return the indices of the parts of a split in which all samples of one group are in one part.

    For samples that are near copies of each other (photos of one object, packages built from one
    source): a random split would put copies on both sides and flatter the result. Groups are taken by
    size, the largest first and equal ones in random order, and each is given to the part that lacks the
    largest share of its samples (of equal ones train, then the first). Classes are not balanced.

    Args:
        groups: what belongs together, for each sample.
        fracs: share of samples of each further part, in [0, 1), their sum below 1.
        seed: of Python's generator, made anew here.
        names: of the further parts, for messages.

    Raises:
        DataError: a share is out of range, or there are fewer groups than parts.

    >>> grouped_split(["x", "x", "y", "z"], [0.25], seed=1)[1] in ([2], [3])
    True
    """
    members, wanted = _members(groups, fracs, names)
    if len(members) < wanted:
        raise DataError(
            f"{plural(len(members), 'group')} cannot be split into {wanted} parts that share none."
        )
    # By size, ties at random: what is left for the end is small, so that the shares come out close.
    order = sorted(members, key=str)
    random.Random(seed).shuffle(order)
    order.sort(key=lambda group: -len(members[group]))
    targets = [frac * len(groups) for frac in (1 - sum(fracs), *fracs)]
    parts: list[list[int]] = [[] for _ in targets]
    for group in order:
        lacking = [
            (target - len(part)) / target if target else -1.0
            for target, part in zip(targets, parts, strict=True)
        ]
        parts[lacking.index(max(lacking))].extend(members[group])
    return [sorted(part) for part in parts]

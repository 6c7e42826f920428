"""Operations whose last bits depend on a sample's place in its batch are found."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from layerwise.cache.proof import evenness
from layerwise.cache.proof.evenness import OpLog, uneven_places


def logged(function, *inputs):
    with torch.no_grad(), OpLog() as log:
        function(*inputs)
    return log.runs


def routines_differ(function) -> bool:
    """Whether this processor has two routines for a function that differ in some last bit."""
    x = torch.randn(4096, generator=torch.Generator().manual_seed(1))
    return not torch.equal(function(x), torch.cat([function(x[i : i + 1]) for i in range(4096)]))


def test_a_log_keeps_no_tensor() -> None:
    # small ones between large activations would leave the heap full of holes
    (run,) = logged(torch.add, torch.randn(5, 9), torch.randn(9))
    assert [outline.shape for outline in (*run.outlines, run.output)] == [(5, 9), (9,), (5, 9)]
    assert not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((run.arguments, run.output)))


@pytest.mark.parametrize("name", ["silu", "silu_", "sigmoid"])
def test_left_over_numbers(name) -> None:
    # 9 numbers a sample leave some over; 128 do not
    if not routines_differ(getattr(torch.ops.aten, name.rstrip("_")).default):
        pytest.skip("this processor computes it by one routine")
    function = getattr(torch.ops.aten, name).default
    uneven = uneven_places(logged(function, torch.randn(5, 9)), 5, logged(function, torch.randn(2, 9)), 2)
    assert all(name in found for found in uneven)
    even = uneven_places(logged(function, torch.randn(5, 128)), 5, logged(function, torch.randn(2, 128)), 2)
    assert even == ("", "")


def test_left_over_complex_numbers() -> None:
    x = torch.randn(4096, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    if torch.equal(x.square(), torch.cat([one.square() for one in x.split(1)])):
        pytest.skip("this processor computes it by one routine")
    for width, uneven in ((9, True), (128, False)):
        runs = [logged(torch.square, torch.randn(count, width, dtype=torch.complex64)) for count in (5, 2)]
        assert ["pow" in found for found in uneven_places(runs[0], 5, runs[1], 2)] == [uneven, uneven]


@pytest.mark.parametrize("name", ["atan2", "logaddexp"])
def test_many_numbers_beside_one(name) -> None:
    def function(x):
        return getattr(torch, name)(x, torch.tensor(0.7))

    if not routines_differ(function):
        pytest.skip("this processor computes it by one routine")
    runs = [logged(function, torch.randn(count, 9)) for count in (5, 2)]
    assert all(name in found for found in uneven_places(runs[0], 5, runs[1], 2))


def test_one_number_tells_nothing_of_many() -> None:
    # a weight that is one number goes through the same operation first
    if not routines_differ(nn.functional.silu):
        pytest.skip("this processor computes it by one routine")

    def function(x):
        return nn.functional.silu(torch.tensor(0.5)) * nn.functional.silu(x)

    runs = [logged(function, torch.randn(count, 9)) for count in (5, 2)]
    assert all("silu" in found for found in uneven_places(runs[0], 5, runs[1], 2))


def test_a_part_that_meets_another_routine() -> None:
    # 4 times 8 numbers are computed at once, 1 times 8 one by one: only the part differs
    if not routines_differ(nn.functional.silu):
        pytest.skip("this processor computes it by one routine")
    runs = [logged(nn.functional.silu, torch.randn(count, 8)) for count in (8, 1)]
    within, between = uneven_places(runs[0], 8, runs[1], 1)
    assert within == ""
    assert "silu" in between


def test_exact_arithmetic_is_even() -> None:
    # sums, products and comparisons are rounded correctly by every routine
    def arithmetic(x, scale):
        return (x * scale + 1).clamp(0, 6) / 3 - x.relu()

    scale = torch.randn(7)
    runs = [logged(arithmetic, torch.randn(count, 7), scale) for count in (5, 2)]
    assert len(runs[0]) >= 5
    assert uneven_places(runs[0], 5, runs[1], 2) == ("", "")


def test_other_operations_for_a_part() -> None:
    # a model that computes otherwise for few samples: nothing can be said of them
    runs = [logged(function, torch.randn(3, 32)) for function in (torch.sigmoid, torch.tanh)]
    assert uneven_places(runs[0], 3, runs[1], 3) == ("", "another order of operations")


def test_a_batch_that_is_computed_in_pieces() -> None:
    # two samples of 20 numbers leave 8 over, in each piece: how many pieces there are depends on the batch
    if not routines_differ(nn.functional.silu):
        pytest.skip("this processor computes it by one routine")

    def in_pieces(x):
        return torch.cat([nn.functional.silu(piece) for piece in x.split(2)])

    for width, found in ((20, "aten.silu.default"), (64, "")):
        runs = [logged(in_pieces, torch.randn(count, width)) for count in (8, 2)]
        assert uneven_places(runs[0], 8, runs[1], 2) == (found, "another order of operations")


def test_transposed_and_expanded_tensors() -> None:
    # strides are kept: a value laid out otherwise meets other routines
    def silu(x):
        return nn.functional.silu(x.transpose(1, 2)) + nn.functional.silu(x[:, :1].expand(-1, 4, -1)).sum()

    runs = [logged(silu, torch.randn(count, 4, 32)) for count in (4, 2)]
    assert uneven_places(runs[0], 4, runs[1], 2) == ("", "")


@pytest.mark.parametrize(
    ("shape", "found"),
    [
        (lambda count: (count, 9), True),
        (lambda count: (count, count, 9), True),  # pairs of samples: not made of samples side by side
        (lambda count: (5, 9), False),  # a table, whatever the batch
    ],
)
def test_what_is_not_made_of_samples(shape, found) -> None:
    if not routines_differ(nn.functional.silu):
        pytest.skip("this processor computes it by one routine")
    runs = [logged(nn.functional.silu, torch.randn(shape(count))) for count in (5, 2)]
    uneven = uneven_places(runs[0], 5, runs[1], 2)
    assert ["silu" in name for name in uneven] == [found, found]


def product(name: str, scale: float):
    """Return an operation of that name, some of whose numbers are rounded otherwise at odd places."""

    def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = x * weight
        y[1::2, ..., -1:] *= scale
        return y

    operation = torch.library.custom_op(f"layerwise_{round(scale * 2**20)}::{name}", mutates_args=())
    return operation(multiply)


@pytest.mark.parametrize("counts", [(5, 2), (6, 1), (1, 4)])
@pytest.mark.parametrize(("name", "shape"), [("mm", (6,)), ("bmm", (2, 5)), ("convolution", (2, 1, 3))])
def test_small_products_that_round_some_rows_otherwise(name, shape, counts) -> None:
    # of a weight, or of one that is repeated for each sample; an operation of another name is not tried
    for kind, scale in ((name, 1 + 2**-20), (name, 1.0), ("add", 1 + 2**-20)):
        multiply, weight = product(kind, scale), torch.randn(shape)
        for expanded in (False, True):
            runs = [
                logged(multiply, torch.randn(n, *shape), weight.expand(n, *shape) if expanded else weight)
                for n in counts
            ]
            found = uneven_places(runs[0], counts[0], runs[1], counts[1])
            odd = kind == name and scale != 1
            assert [kind in place for place in found] == [odd and counts[0] > 1, odd and counts[1] > 1]
            assert all(place == "" or odd for place in found)


def test_products_that_are_not_tried() -> None:
    # of many numbers the values tell; of none, and of what is not made of samples, nothing is told
    multiply = product("mm", 1 + 2**-20)
    for shape in ((5000,), (0,), (None, 3)):
        runs = [
            logged(multiply, *[torch.randn(n, *(n if s is None else s for s in shape))] * 2) for n in (5, 2)
        ]
        assert uneven_places(runs[0], 5, runs[1], 2) == ("", "")
        assert uneven_places(runs[0], 5, runs[1] * 2, 2) == ("", "another order of operations")


def places_differ(function, x: torch.Tensor) -> bool:
    """Whether this processor gives one sample other bits at some place; samples are the second dimension."""
    same = x[:, :1].expand_as(x).contiguous()
    found = function(same)
    return not torch.equal(found, found[..., :1].expand_as(found))


@pytest.mark.parametrize("length", [6, 50])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "sum", "mean", "logsumexp"])
def test_sums_over_time_that_round_the_left_over_samples_otherwise(name, length) -> None:
    # time first, as recurrent networks have it: 16 or 32 samples are taken at once, and the others one by one
    def function(x):
        return getattr(torch, name)(x, 0)

    x = torch.randn(length, 37, generator=torch.Generator().manual_seed(1))
    if sum(places_differ(function, x.roll(by, 1)) for by in range(37)) < 4:
        pytest.skip("this processor computes it by one routine, or by two that hardly differ")
    within, _ = uneven_places(logged(function, x), 37, logged(function, x[:, :5].contiguous()), 5)
    assert name in within
    runs = [logged(function, torch.randn(length, n, 32)) for n in (4, 2)]  # no number is left over
    assert uneven_places(runs[0], 4, runs[1], 2) == ("", "")


@pytest.mark.parametrize("name", ["glu", "softmax"])
def test_samples_that_two_threads_share(name) -> None:
    # where the second thread begins, a sample's numbers are taken in other groups
    def function(x):
        return getattr(nn.functional, name)(x, dim=1)

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        samples = torch.randn(12, 1, 8, 1517, generator=torch.Generator().manual_seed(1))
        found = [function(one.expand(17, -1, -1).contiguous()) for one in samples]
        if sum(not torch.equal(one, one[:1].expand_as(one)) for one in found) < 6:
            pytest.skip("this processor computes it by one routine, or by two that hardly differ")
        runs = [logged(function, torch.randn(n, 8, 1517)) for n in (17, 2)]
        within, _ = uneven_places(runs[0], 17, runs[1], 2)
    finally:
        torch.set_num_threads(before)
    assert name in within


def test_a_sum_of_no_numbers_is_no_fault() -> None:
    # there is nothing to draw: zeros come out, in the same bits everywhere
    runs = [logged(lambda x: x.sum(1), torch.empty(n, 0, 3)) for n in (4, 2)]
    assert uneven_places(runs[0], 4, runs[1], 2) == ("", "")


def test_sums_of_many_numbers_are_tried_a_few_times(monkeypatch) -> None:
    # else it would take as long as the first epoch of large images
    drawn = []
    run = evenness._run
    monkeypatch.setattr(evenness, "_run", lambda op, given: drawn.append(given[0].numel()) or run(op, given))
    for size, most in ((8, 2 * 129), (512, 2 * 2)):
        drawn.clear()
        runs = [logged(lambda x: x.mean((1, 2)), torch.randn(n, size, size)) for n in (4, 2)]
        assert uneven_places(runs[0], 4, runs[1], 2) == ("", "")
        assert 0 < len(drawn) <= most


def test_numbers_are_looked_for_once_under_the_same_settings(monkeypatch) -> None:
    # a second time they are those that are found anew; another setting of torch is another case
    looked = []

    def look(run):
        looked.append(run)
        return look_for_numbers(run)

    look_for_numbers = evenness._look_for_numbers
    monkeypatch.setattr(evenness, "_FOUND", {})
    monkeypatch.setattr(evenness, "_look_for_numbers", look)
    (run,) = logged(nn.functional.silu, torch.randn(5, 9))
    found = evenness._telling_numbers(run)
    (same,) = logged(nn.functional.silu, torch.randn(2, 4))
    assert evenness._telling_numbers(same) == found == look_for_numbers(same)
    assert len(looked) == 1
    (other,) = logged(nn.functional.silu, torch.randn(5, 9, dtype=torch.float64))
    assert evenness._telling_numbers(other) == look_for_numbers(other)
    assert len(looked) == 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        evenness._telling_numbers(run)
    assert len(looked) == 3
    with OpLog():  # a mode may change what an operation gives
        evenness._telling_numbers(run)
        evenness._telling_numbers(run)
    assert len(looked) == 5

"""On random nets, data and loops: cached training is plain training, and no skipped value is ever missed."""

from __future__ import annotations

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from cache_loops import Counted, assert_same, train
from layerwise.cache.cutting.cut import NothingToSkipError
from layerwise.cache.cutting.search import find_cut
from layerwise.cache.proof.mixing import compare_skeletons
from layerwise.cache.replay.capturing import capture
from layerwise.cache.replay.replaying import Replay
from layerwise.layers.recording import record

WIDTH = 4


class Block(nn.Module):
    """One of several kinds of block, all from (batch, width, 4, 4) to the same shape."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.other = nn.Conv2d(WIDTH, WIDTH, 1)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.drop = nn.Dropout(0.3)

    def forward(self, x):
        if self.kind == "plain":
            return self.conv(x).relu()
        if self.kind == "norm":
            return self.norm(self.conv(x)).relu_()
        if self.kind == "residual":
            return x + self.drop(self.conv(x).relu())
        if self.kind == "branches":
            return torch.cat([self.conv(x)[:, :2], self.other(x)[:, 2:]], 1)
        if self.kind == "gate":
            return x * self.other(x).mean((2, 3), keepdim=True).sigmoid()
        return self.conv(x).to(memory_format=torch.channels_last)


class Net(nn.Module):
    """Blocks in a row, skips between some of them, a pooled head."""

    def __init__(self, kinds: list[str], skips: list[int]) -> None:
        super().__init__()
        self.skips = skips
        self.stem = nn.Conv2d(3, WIDTH, 1)
        for number, kind in enumerate(kinds):
            self.add_module(f"b{number}", Block(kind))
        self.count = len(kinds)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        values = [self.stem(x)]
        for number in range(self.count):
            x = values[-1]
            if self.skips[number] < len(values):
                x = x + values[self.skips[number]]
            values.append(getattr(self, f"b{number}")(x))
        return self.head(values[-1].mean((2, 3)))


kinds = st.lists(
    st.sampled_from(["plain", "norm", "residual", "branches", "gate", "layout"]), min_size=1, max_size=4
)


@st.composite
def cases(draw):
    chosen = draw(kinds)
    skips = draw(st.lists(st.integers(0, 6), min_size=len(chosen), max_size=len(chosen)))
    names = ["stem", *(f"b{i}" for i in range(len(chosen)))]
    learning = draw(st.sets(st.sampled_from(names), max_size=2)) | {"head"}
    return chosen, skips, sorted(learning)


@settings(max_examples=12, deadline=None)
@example((["plain", "plain"], [1, 2], ["head"]), 6, 5, False)  # a last batch of one with four numbers
@given(cases(), st.integers(6, 13), st.integers(2, 5), st.booleans())
def test_cached_training_is_plain_training(case, count, batch, drop_last) -> None:
    chosen, skips, learning = case
    generator = torch.Generator().manual_seed(count)
    data = Counted(
        torch.randn(count, 3, 4, 4, generator=generator), torch.randint(0, 3, (count,), generator=generator)
    )

    def make() -> nn.Module:
        return Net(chosen, skips)

    options = {"batch": batch, "loader_options": {"drop_last": drop_last}}
    plain = train(make, data, *learning, cached=False, **options)
    cached = train(make, data, *learning, cached=True, storage="auto", **options)
    assert_same(plain, cached)


@settings(max_examples=25, deadline=None)
@given(cases())
def test_poison(case) -> None:
    """A skipped output that is not at a site may be NaN without a trace; one at a site may not."""
    chosen, skips, learning = case
    torch.manual_seed(0)
    model = Net(chosen, skips).eval()
    x = torch.randn(4, 3, 4, 4)
    names = frozenset(n for n, _ in model.named_parameters() if n.split(".")[0] in learning)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)
    try:
        cut = find_cut(record(model, (x,)), names)
    except NothingToSkipError:
        return
    whole = capture(model, [cut], ((x,), {}), batch=4)
    compare_skeletons(whole.skeletons, capture(model, [cut], ((x[:2],), {}), batch=2).skeletons)
    expected = model(x)
    poison = torch.full_like(x, float("nan"))  # nothing reads the input but what is skipped
    given_input = poison if 0 not in cut.inputs else x

    def replay(values):
        with Replay(cut, values, whole.skeletons, batch=4, device=x.device):
            return model(given_input)

    assert torch.equal(replay({site: value.clone() for site, value in whole.values.items()}), expected)
    for site in cut.frontier:
        values = {s: v.clone() for s, v in whole.values.items()}
        values[site].fill_(float("nan"))
        assert replay(values).isnan().any(), f"{site} is stored and not needed"

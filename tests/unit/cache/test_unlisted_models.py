"""Models that write their forward in unusual ways are trained exactly, or not cached for a named reason."""

from __future__ import annotations

import re

import pytest
import torch

from cache_loops import assert_same, train
from unlisted_models import CASES


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:The prefix cache is off")
def test_exact_or_refused_with_a_reason(name) -> None:
    # two shuffled epochs with a smaller last batch: same losses, weights, buffers and random state
    case = CASES[name]
    samples = case.samples()
    plain = train(case.make, samples, *case.learning, cached=False, step=case.loss, epochs=2)
    cached = train(case.make, samples, *case.learning, cached=True, step=case.loss, epochs=2)
    assert_same(plain, cached)
    assert re.search(case.expected, cached.text), cached.text
    torch.manual_seed(0)
    start = case.make().state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in cached.weights.items())

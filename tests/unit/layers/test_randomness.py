"""The random state of the process."""

import torch

from layerwise.layers.randomness import random_state, restore_random_state


def test_devices_are_not_looked_for_where_cuda_is_not_in_use(monkeypatch) -> None:
    # with Lightning imported, each look tries to load the driver anew
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: 1 / 0)
    state = random_state()
    drawn = torch.rand(3)
    assert state.cuda == []
    restore_random_state(state)
    assert torch.equal(torch.rand(3), drawn)

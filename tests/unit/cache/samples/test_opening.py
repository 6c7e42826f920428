"""What keeps a loader or a model from being cached is told before anything is computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from cache_loops import images
from helpers import TinyCNN
from layerwise.cache.samples.supply import open_supply
from layerwise.errors import LayerwiseWarning


@pytest.mark.parametrize("processes", [1, 2])
def test_layers_that_talk_to_other_processes(processes, monkeypatch) -> None:
    # those would wait for ever for one that looks at a batch
    monkeypatch.setattr("layerwise.cache.samples.supply.process_count", lambda: processes)
    model, loader = nn.SyncBatchNorm.convert_sync_batchnorm(TinyCNN()), DataLoader(images(), 4)
    if processes == 1:
        assert open_supply(loader, model, views=1, asked=True).reason == ""
        return
    with pytest.warns(LayerwiseWarning, match="SyncBatchNorm"):
        assert "SyncBatchNorm" in open_supply(loader, model, views=1, asked=True).reason


@pytest.mark.parametrize("what", ["doubles", "seeds"])
def test_workers_that_are_prepared(what) -> None:
    # a sample that is loaded in this process must be the one that a worker gives
    def prepare(worker: int) -> None:
        torch.manual_seed(worker)
        if what == "doubles":
            torch.utils.data.get_worker_info().dataset.inputs *= 2

    model, data = TinyCNN(), images()
    loader = DataLoader(data, 4, num_workers=2, worker_init_fn=prepare)
    before = torch.get_rng_state()
    reason = open_supply(loader, model, views=1, asked=False).reason
    assert ("worker_init_fn makes other samples" in reason) == (what == "doubles")
    assert torch.equal(torch.get_rng_state(), before)

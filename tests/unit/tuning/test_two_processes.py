"""A plan that unfreezes, in two real processes under DistributedDataParallel."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.nn import functional as F

from forked import Forked, script
from helpers import batches, changed, map_by_children, snapshot, tiny_mlp
from layerwise.plans.unfreezing import gradual_unfreezing
from layerwise.tuning.tuner import Tuner

WORKER = """
import sys
import torch
from torch import nn
from torch.nn import functional as F
from helpers import batches, map_by_children, snapshot, tiny_mlp
from layerwise.plans.unfreezing import gradual_unfreezing
from layerwise.tuning.tuner import Tuner

rank, folder = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
model = tiny_mlp(blocks=2)
layers = map_by_children(model)
plan = gradual_unfreezing(layers, decay=0.5, last_epochs=1)
tuner = Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers, momentum=0.9)
with tuner.all_phases():
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
for epoch in tuner.epochs():
    for inputs, labels in batches(2, (6,), classes=3, seed=epoch):
        mine = slice(4 * rank, 4 * rank + 4)  # half of each batch
        F.cross_entropy(wrapped(inputs[mine]), labels[mine]).backward()
        tuner.step()
torch.save(snapshot(model), f"{folder}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_late_joiners_are_averaged_over_processes_too(tmp_path: Path) -> None:
    """Both processes end in the same weights, those of one process on the whole batches."""
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    workers = [Forked(script, path, rank, tmp_path) for rank in (0, 1)]
    for worker in workers:
        done = worker.finish()
        assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert not changed(first, second)

    model = tiny_mlp(blocks=2)
    before = snapshot(model)
    layers = map_by_children(model)
    plan = gradual_unfreezing(layers, decay=0.5, last_epochs=1)
    tuner = Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers, momentum=0.9)
    for epoch in tuner.epochs():
        for inputs, labels in batches(2, (6,), classes=3, seed=epoch):
            F.cross_entropy(model(inputs), labels).backward()
            tuner.step()
    alone = snapshot(model)
    assert changed(before, alone) == set(before)
    for name, value in alone.items():
        assert torch.allclose(value, first[name], atol=1e-6), name

"""`fit` on two processes with the cache: bit for bit the weights of two processes without it."""

from __future__ import annotations

import os
from pathlib import Path

from forked import Forked, free_port, script

SCRIPT = """
import sys, warnings
sys.path.insert(0, {tests!r})
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "phase .* batch-norm layers? trains? on batches")
import torch
import layerwise
from accelerate import PartialState
from cache_loops import images
from helpers import TinyCNN

def run(cache, folder=None, **settings):
    torch.manual_seed(0)
    model = TinyCNN()
    layers = layerwise.layer_map(model, torch.zeros(2, 3, 8, 8), granularity="stages")
    plan = layerwise.gradual_unfreezing(layers, epochs_per_group=2, last_epochs=1)
    start = {{name: value.clone() for name, value in model.state_dict().items()}}
    data = images(60)
    result = layerwise.fit(
        model, data, images(10), plan=plan, layers=layers, batch_size=4, lr=1e-2, cache=cache,
        keep="last", progress=False, device="cpu", audit=False, cache_folder=folder, **settings,
    )
    assert any(not torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert "forward" not in vars(model), "the model still carries accelerate's autocast"
    return model.state_dict(), [line["train_loss"] for line in result.history], data.loads

for cache, folder, settings in (
    ("memory", None, {{"precision": "bf16", "accumulate": 2}}),
    ("disk", {shared!r}, {{}}),
):
    plain, losses, loads = run("off", **settings)
    weights, same_losses, fewer_loads = run(cache, folder, **settings)
    assert losses == same_losses
    for name, value in plain.items():
        assert torch.equal(value, weights[name]), (cache, name)
    naming = 0 if folder is None else len(images(60)) + len(images(10))  # a data set that lists nothing
    assert fewer_loads - naming < loads, (cache, fewer_loads, loads)
assert PartialState().num_processes == 2
print("EQUAL", flush=True)
"""

DRAWN = """
import torch
import layerwise
from torch import nn
from torch.utils.data import TensorDataset

torch.manual_seed(0)
model = nn.Sequential(*[nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(5)], nn.Linear(6, 2))
x = torch.randn(64, 6)
data = TensorDataset(x, (x[:, 0] > 0).long())
layers = layerwise.layer_map(model, x[:2], granularity="layers")
plan = layerwise.lisa(layers, groups=1, every_steps=2, epochs=2)
layerwise.fit(
    model, data, data, plan=plan, layers=layers, batch_size=8, lr=1e-2, device="cpu", progress=False,
    cache="off",
)
print([parameter.sum().item() for parameter in model.parameters()], flush=True)
"""


def of_two_processes(rank: int, port: str) -> dict[str, str]:
    """Return what ``python -m torch.distributed.run --nproc_per_node 2`` puts into the environment."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip


def test_two_processes_with_the_cache_are_two_without_it(tmp_path: Path) -> None:
    # gradual unfreezing, batch-norm and dropout in the trained part; in memory and in one folder for both;
    # bf16 with accumulated gradients as well
    path, shared = tmp_path / "train.py", tmp_path / "columns"
    path.write_text(SCRIPT.format(tests=str(Path(__file__).parents[2]), shared=str(shared)))
    port = free_port()
    started = [
        Forked(script, path, environment={**os.environ, **of_two_processes(rank, port)}) for rank in (0, 1)
    ]
    for process in started:
        done = process.finish()
        assert done.returncode == 0, done.stderr
        assert done.stdout == "EQUAL\n"
    assert not list(shared.glob(".part-*"))  # no leftovers


def test_groups_that_are_drawn_within_a_phase_are_averaged_too(tmp_path: Path) -> None:
    # LISA: what learns changes every two steps
    path, port = tmp_path / "train.py", free_port()
    path.write_text(DRAWN)
    started = [
        Forked(script, path, environment={**os.environ, **of_two_processes(rank, port)}) for rank in (0, 1)
    ]
    done = [process.finish() for process in started]
    assert [one.returncode for one in done] == [0, 0], done[0].stderr
    assert done[0].stdout == done[1].stdout

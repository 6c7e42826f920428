"""`fit` on two processes with the cache: bit for bit the weights of two processes without it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

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


def test_two_processes_with_the_cache_are_two_without_it(tmp_path: Path) -> None:
    # gradual unfreezing, batch-norm and dropout in the trained part; in memory and in one folder for both;
    # bf16 with accumulated gradients as well
    script, shared = tmp_path / "train.py", tmp_path / "columns"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[2]), shared=str(shared)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("EQUAL") == 2
    assert not list(shared.glob(".part-*"))  # no leftovers

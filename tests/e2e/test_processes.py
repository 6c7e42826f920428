"""`fit` on two processes: both end with the same weights, and one of them writes the run."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import hashlib, sys
sys.path.insert(0, {tests!r})
import torch
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan
import layerwise

model = Tiny()
result = layerwise.fit(
    model, tiny_data(64), tiny_data(30, seed=5), plan=tiny_plan(), layers=tiny_layers(model),
    out={out!r}, batch_size=4, lr=1e-2, device="cpu", progress=False,
)
weights = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
row = [hashlib.sha256(weights).hexdigest(), result.steps, result.metrics["accuracy"]]
print("RESULT", *row, flush=True)
torch.distributed.destroy_process_group()  # else a thread of gloo's may abort a process that ends
"""


def test_two_processes_train_one_model(tmp_path: Path) -> None:
    # The body joins in the second phase, after the wrapper for distributed training was made.
    out = tmp_path / "run"
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parents[1]), out=str(out)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert len(rows) == 2
    assert rows[0] == rows[1]
    assert int(rows[0][1]) == 4 * 8  # 16 batches an epoch, shared by two
    about = json.loads((out / "run.json").read_text())
    assert about["result"]["metrics"]["accuracy"] == float(rows[0][2])
    moved = json.loads((out / "audit.json").read_text())["after"]["moved"]
    assert any(name.startswith("body.") for name in moved)

"""Runs to be killed, each in a process of its own, forked from one that has imported everything.

``python runner.py`` reads one JSON object a line (``out``, ``resume``, ``at``), carries it out in a forked
process and prints how that ended: its exit code, negative for a signal.
"""

import json
import os
import signal
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import accelerate  # noqa: F401  (imported before the fork, so that a run takes a fraction of a second)
import torch
import torchmetrics.classification  # noqa: F401

from layerwise import files
from layerwise.training.fit import fit
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan


class Countdown:
    """Kills this process at the n-th moment at which the run flushes a file or sees a batch."""

    def __init__(self, at: int) -> None:
        self.left, self.seen = at, 0

    def __call__(self) -> None:
        self.seen += 1
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def run(out: str, *, resume: bool, at: int, task: str = "tiny") -> None:
    """Carry out a run; killed at moment `at`, at none for 0.

    ``"tiny"`` is four epochs of two phases on numbers, ``"demo"`` gradual unfreezing of the demo's network
    on a few of its images.
    """
    tick = Countdown(at)
    flush = files.sync

    def sync(path: Path) -> None:  # before and after each flush: half-written files and folders
        tick()
        flush(path)
        tick()

    class Ticking(Tiny):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            tick()
            return super().forward(x)

    files.sync = sync
    if task == "demo":
        run_demo_task(Path(out), resume=resume)
        (Path(out) / "moments").write_text(str(tick.seen))
        return
    model = Ticking()
    fit(
        model,
        tiny_data(),
        tiny_data(30, seed=5),
        plan=tiny_plan(),
        layers=tiny_layers(model),
        out=out,
        batch_size=8,
        lr=3e-2,
        accumulate=2,
        clip_norm=1.0,
        checkpoint_every_steps=1,
        cache="off",
        progress=False,
        resume=resume,
    )
    (Path(out) / "moments").write_text(str(tick.seen))


def run_demo_task(out: Path, *, resume: bool) -> None:
    """Unfreeze EfficientNet-Lite0 stage by stage on solar cells; a checkpoint every second step."""
    from layerwise.sources.demo import DEMO_MODEL, lite0_weights
    from layerwise.training.job import Job, prepare
    from layerwise.training.resuming import resume_job

    if resume:
        resume_job(out, progress=False)
        return
    job = Job(
        model=DEMO_MODEL,
        weights=str(lite0_weights()),
        data="demo:elpv:24/8/8",
        strategy="gradual_unfreezing",
        granularity="stages",
        input_size=64,
        options={"batch_size": 8, "checkpoint_every_steps": 2},
    )
    prepare(job).fit(out=out, progress=False)


def serve() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        command = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                run(**command)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()

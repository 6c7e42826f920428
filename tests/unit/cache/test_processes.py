"""Two processes: each caches its share under DDP; two may use one folder at the same time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import torch

from forked import Forked, free_port, script

TESTS = Path(__file__).parents[2]

DDP = """
    import os, sys
    sys.path.insert(0, {tests!r})
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader, DistributedSampler
    import layerwise
    from cache_loops import freeze_prefix, images
    from helpers import TinyCNN

    rank = int(sys.argv[1])
    torch.distributed.init_process_group(
        "gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2
    )
    ended = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = TinyCNN()
        freeze_prefix(model, "layer2", "fc")
        data = images()
        wrapped = DistributedDataParallel(model)
        sampler = DistributedSampler(data, shuffle=True)
        loader = DataLoader(data, batch_size=4, sampler=sampler)
        cache = layerwise.PrefixCache(wrapped, loader, storage="memory")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loads = []
        for epoch in range(5):
            sampler.set_epoch(epoch)
            before = data.loads
            for x, y in cache.batches() if cached else loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(wrapped(x), y).backward()
                optimizer.step()
            loads.append(data.loads - before)
        ended.append({{k: v.clone() for k, v in model.state_dict().items()}})
    assert all(torch.equal(ended[0][k], ended[1][k]) for k in ended[0])
    assert "cut at layer1" in cache.describe()
    ((feed,),) = (s.feeds for s in cache._supplies)
    (stored,) = feed.sites.values()
    torch.save((loads, int(stored.column.filled.sum()), ended[1]), sys.argv[3])
    torch.distributed.destroy_process_group()
"""

PREPARED = """
    import os, sys, time
    sys.path.insert(0, {tests!r})
    os.environ |= dict(
        RANK=sys.argv[1], LOCAL_RANK=sys.argv[1], WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=sys.argv[2], ACCELERATE_USE_CPU="true",
    )
    import torch
    from accelerate import Accelerator
    from torch import nn
    from torch.utils.data import DataLoader
    import layerwise
    from cache_loops import freeze_prefix, images
    from helpers import TinyCNN

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    assert accelerator.num_processes == 2
    ended = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = TinyCNN()
        freeze_prefix(model, "layer2", "fc")
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        loader = DataLoader(images(), batch_size=4, shuffle=True)
        prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        cache = layerwise.PrefixCache(prepared, loader, storage="memory")
        for epoch in range(4):
            for x, y in cache.batches() if cached else loader:
                with accelerator.accumulate(prepared):
                    accelerator.backward(nn.functional.cross_entropy(prepared(x), y))
                    optimizer.step()
                    optimizer.zero_grad()
        ended.append({{k: v.clone() for k, v in model.state_dict().items()}})
    assert all(torch.equal(ended[0][k], ended[1][k]) for k in ended[0])
    assert "cut at layer1" in cache.describe(), cache.describe()
    (supply,) = cache._supplies
    assert supply.replays > 0
    open(os.path.join(sys.argv[3], sys.argv[1]), "w").close()
    late = time.monotonic() + 60
    while len(os.listdir(sys.argv[3])) < 2 and time.monotonic() < late:
        time.sleep(0.01)
    os._exit(0)  # in the usual way torch's threads end a process now and then before it has ended them
"""

SHARED = """
    import sys
    sys.path.insert(0, {tests!r})
    import torch
    from cache_loops import images, train
    from helpers import TinyCNN

    outcome = train(TinyCNN, images(), "layer2", "fc", cached=True, storage="disk", folder=sys.argv[1])
    plain = train(TinyCNN, images(), "layer2", "fc", cached=False)
    assert outcome.losses == plain.losses
"""

LEFT = """
    import sys
    sys.path.insert(0, {tests!r})
    from torch.utils.data import DataLoader
    import layerwise
    from cache_loops import freeze_prefix, images
    from helpers import TinyCNN

    model = TinyCNN()
    freeze_prefix(model, "layer2", "fc")
    cache = layerwise.PrefixCache(model, DataLoader(images(), batch_size=4), storage="memory")
    batches = iter(cache.batches())
    model(next(batches)[0])
"""


def run(folder: Path, code: str, *arguments: list[str]) -> None:
    """Run one process for each list of arguments; all must end well."""
    path = folder / "run.py"
    path.write_text(textwrap.dedent(code.format(tests=str(TESTS))))
    processes = [Forked(script, path, *given) for given in arguments]
    ended = [process.finish(240) for process in processes]
    assert [done.returncode for done in ended] == [0] * len(ended), ended


def test_ddp_caches_each_share(tmp_path) -> None:
    # the same weights as plain DDP; what a rank has not seen yet is computed when it comes
    meeting = str(tmp_path / "meeting")
    run(tmp_path, DDP, ["0", meeting, str(tmp_path / "0")], ["1", meeting, str(tmp_path / "1")])
    ends = [torch.load(tmp_path / str(rank), weights_only=True) for rank in (0, 1)]
    learned = [key for key in ends[0][2] if "running" not in key]  # statistics are each rank's own
    assert all(torch.equal(ends[0][2][key], ends[1][2][key]) for key in learned)
    for loads, filled, _ in ends:
        assert filled > 11  # more than one epoch's share
        assert loads[-1] < loads[0]


def test_two_processes_of_accelerate_cache_each_share(tmp_path) -> None:
    port = free_port()
    (tmp_path / "done").mkdir()
    run(tmp_path, PREPARED, *([str(rank), port, str(tmp_path / "done")] for rank in (0, 1)))


def test_two_processes_share_a_folder(tmp_path) -> None:
    # both train at once, both exactly; one set of files is left, whole
    shared = tmp_path / "shared"
    run(tmp_path, SHARED, [str(shared)], [str(shared)])
    assert len(list(shared.iterdir())) == 2
    assert all((entry / "meta.json").is_file() for entry in shared.iterdir())


def test_a_process_that_ends_amid_an_epoch_ends_in_silence() -> None:
    # Python then closes what is left of the epoch, when there are no global names any more
    code = textwrap.dedent(LEFT.format(tests=str(TESTS)))
    ended = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ended.stderr == ""

"""The loop as a whole: what it trains, keeps, writes, and how it stops."""

import json
import math
import os
import re
import shutil
import signal
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    SequentialSampler,
    TensorDataset,
    WeightedRandomSampler,
)

from helpers import changed
from layerwise.errors import DataError, LayerwiseWarning, PlanError, RecordingError, RunError, TrainingError
from layerwise.layers.mapping import layer_map
from layerwise.plans.plan import Plan
from layerwise.plans.unfreezing import gradual_unfreezing
from layerwise.training import checkpoint, setup
from layerwise.training.checkpoint import list_checkpoints, load_latest
from layerwise.training.classification import Classification
from layerwise.training.data import open_batches
from layerwise.training.fit import fit
from layerwise.training.history import read_history
from layerwise.training.result import Result
from layerwise.training.run import load_run
from layerwise.training.run_folder import hold_run, read_run, write_audit
from layerwise.training.text_tasks import MultiLabel
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan

# Batches are small on purpose here; training/test_fit.py tests that fit warns of it.
pytestmark = pytest.mark.filterwarnings("ignore:phase .* batch-norm layers? trains? on batches")

VAL = tiny_data(30, seed=5)


def run(model: nn.Module | None = None, train: object = None, val: object = VAL, **options: object) -> Result:
    """Fit a tiny model quickly; any option can be changed."""
    model = Tiny() if model is None else model
    settings: dict = {
        "plan": tiny_plan(),
        "layers": tiny_layers(model),
        "lr": 3e-2,
        "batch_size": 8,
        "cache": "off",
        "progress": False,
        **options,
    }
    return fit(model, tiny_data() if train is None else train, val, **settings)


def one_phase(**changes: object) -> Plan:
    return tiny_plan(
        phases=[{"name": "all", "rates": {"stem": 1.0, "body": 1.0, "head": 1.0}, "epochs": 6, **changes}]
    )


def test_it_learns_what_the_plan_says_and_nothing_else() -> None:
    # Loss falls, accuracy rises above the largest class, the frozen stem keeps every bit and buffer.
    model = Tiny()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    result = run(model, tiny_data(200), keep="last")
    moved = {
        name.split(".")[0]
        for name, tensor in model.state_dict().items()
        if not torch.equal(before[name], tensor)
    }
    assert moved == {"body", "head"}
    assert result.history[-1]["train_loss"] < result.history[0]["train_loss"]
    assert result.metrics["accuracy"] > 0.6
    assert result.trained_parameters == sum(p.numel() for n, p in model.named_parameters() if "stem" not in n)
    assert result.total_parameters == sum(p.numel() for p in model.parameters())
    assert not model.training
    assert result.steps == 4 * 25


def test_a_result_prints_what_came_of_it_and_not_the_network(tmp_path: Path) -> None:
    # Epochs, steps, trained parameters, metrics and the folder; neither print nor repr spells the model out.
    result = run(Tiny(), tiny_data(40), tiny_data(20), out=tmp_path / "run")
    lines = str(result).splitlines()
    assert lines[0].startswith(f"finished after 4 epochs, {result.steps} steps, ")
    assert lines[1] == f"{result.trained_parameters:,} of {result.total_parameters:,} parameters trained"
    assert lines[2].startswith(f"validation, weights of epoch {result.best_epoch + 1}: loss ")
    assert lines[-1] == f"in {tmp_path / 'run'}"
    for shown in (repr(result), repr(load_run(tmp_path / "run", model=Tiny()))):
        assert "Linear" not in shown


def test_small_batches_of_training_batch_norm_are_warned_of_in_the_phase_that_trains_it() -> None:
    # The head's phase trains no batch-norm; the next one trains the body's, and larger batches are fine.
    with pytest.warns(
        LayerwiseWarning, match=r"phase 'more': 1 batch-norm .* batches of 8 \(body\.1\)"
    ) as told:
        run()
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(batch_size=16)


@pytest.mark.parametrize(
    ("train", "size"),
    [
        (tiny_data(6), 6),
        (DataLoader(tiny_data(6), 32), 6),
        (DataLoader(tiny_data(9), batch_sampler=BatchSampler(SequentialSampler(range(9)), 3, False)), 3),
        (DataLoader(tiny_data(8), 4, sampler=WeightedRandomSampler([1.0] * 8, 8)), 4),
        (DataLoader(tiny_data(9), batch_sampler=[[0, 1, 2, 3, 4], [5, 6, 7, 8]]), None),
    ],
)
def test_small_batches_are_those_that_the_data_give(train: object, size: int | None) -> None:
    # Fewer samples than batch_size, and samplers of the user's own; one that tells no size draws no warning.
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(train=train, batch_size=32, plan=one_phase(epochs=1))
    found = [re.search(r"batches of (\d+)", str(one.message)) for one in told]
    assert [int(one[1]) for one in found if one] == ([] if size is None else [size])


def test_history_says_what_happened_in_each_epoch() -> None:
    # One line an epoch: phase, steps, losses, metrics, and the rates of its last step.
    history = run().history
    assert [line["epoch"] for line in history] == [0, 1, 2, 3]
    assert [line["phase"] for line in history] == ["head", "head", "more", "more"]
    assert [line["step"] for line in history] == [7, 14, 21, 28]
    assert all(line["steps"] == 7 for line in history)
    assert history[0]["rates"] == {"stem": 0.0, "body": 0.0, "head": 3e-2}
    assert 0 < history[-1]["rates"]["body"] < history[-1]["rates"]["head"]
    assert {"train_loss", "val_loss", "accuracy", "balanced_accuracy", "macro_f1"} <= history[0].keys()


def test_the_best_epoch_is_kept(tmp_path: Path) -> None:
    # With and without a folder the model ends with the weights of the best epoch; "last" keeps the last.
    kept = {}
    for name, options in {
        "memory": {},
        "folder": {"out": tmp_path / "a"},
        "last": {"keep": "last", "out": tmp_path / "b"},
    }.items():
        model = Tiny()
        result = run(model, plan=one_phase(epochs=4), lr=0.3, **options)
        metrics = [line["balanced_accuracy"] for line in result.history]
        expected = len(metrics) - 1 if name == "last" else metrics.index(max(metrics))
        assert result.best_epoch == expected
        assert result.metrics["balanced_accuracy"] == metrics[expected]
        kept[name] = torch.cat([p.detach().flatten() for p in model.parameters()])
        if name == "folder":
            assert expected < len(metrics) - 1, "the test needs a best epoch that is not the last"
    assert torch.equal(kept["memory"], kept["folder"])
    assert not torch.equal(kept["memory"], kept["last"])


def test_of_equal_epochs_the_one_with_the_lowest_loss_is_kept() -> None:
    # The monitor reaches its best value early, and the loss goes on falling: the first of them is not kept.
    train, val = tiny_data(200, classes=2), tiny_data(12, classes=2)
    result = run(Tiny(2), train, val, plan=one_phase(epochs=8), lr=1e-2)
    best = max(line["balanced_accuracy"] for line in result.history)
    ties = [line for line in result.history if line["balanced_accuracy"] == best]
    assert len(ties) > 1
    assert result.best_epoch == min(ties, key=lambda line: line["val_loss"])["epoch"] != ties[0]["epoch"]


def test_a_run_folder_holds_what_is_needed(tmp_path: Path) -> None:
    # run.json tells plan, settings, classes, versions and result; plan.yaml loads; files are whole.
    out = tmp_path / "run"
    result = run(out=out, classes=["a", "b", "c"], test=VAL)
    about = read_run(out)
    assert about["plan"] == tiny_plan().model_dump(mode="json")
    assert about["task"]["classes"] == ["a", "b", "c"]
    assert about["settings"]["lr"] == 3e-2
    assert about["versions"]["torch"] == version("torch")
    assert about["result"]["metrics"] == result.metrics
    assert about["result"]["test"] == result.test
    assert result.test is not None
    assert result.test["accuracy"] == pytest.approx(result.metrics["accuracy"])  # the same data
    assert Plan.load(out / "plan.yaml") == tiny_plan()
    assert read_history(out / "history.jsonl") == result.history
    assert len(list_checkpoints(out / "checkpoints")) == 2
    assert not list(out.rglob(".tmp-*"))


def test_a_folder_with_a_run_is_left_alone(tmp_path: Path) -> None:
    # A second run in the same folder is refused before anything is written.
    run(out=tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    with pytest.raises(RunError, match=r"already holds a run.*--resume"):
        run(out=tmp_path / "run")
    assert before == {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}


def test_a_run_is_not_resumed_as_another_one(tmp_path: Path) -> None:
    # Other settings, data or classes: each difference is listed.
    run(out=tmp_path / "run")
    with pytest.raises(RunError) as caught:
        run(train=tiny_data(60), out=tmp_path / "run", lr=1e-3, resume=True, classes=["a", "b", "c"])
    for part in ("settings.lr: 0.03 -> 0.001", "data.train_samples: 50 -> 60", "task.classes"):
        assert part in str(caught.value)
    with pytest.raises(RunError, match="does not exist"):
        run(out=tmp_path / "nothing", resume=True)
    with pytest.raises(RunError, match="needs out="):
        run(resume=True)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_run_is_not_resumed_on_other_data_of_equal_length(part: str, tmp_path: Path) -> None:
    # The number of samples says little: some of them are compared.
    out = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        run(out=out, on_epoch=stop_after(0))
    other = {"train": tiny_data(seed=9), "val": tiny_data(30, seed=9)}
    with pytest.raises(RunError, match=rf"data\.{part}_fingerprint"):
        run(out=out, resume=True, **{part: other[part]})
    run(out=out, resume=True)


def test_a_run_is_loaded_to_predict(tmp_path: Path) -> None:
    # The model of a Python run has no name, so it is given; predictions are those of the trained model.
    model = Tiny()
    run(model, out=tmp_path / "run", classes=["a", "b", "c"])
    with pytest.raises(RunError, match="model=model"):
        load_run(tmp_path / "run")
    loaded = load_run(tmp_path / "run", model=Tiny(seed=9))
    x = VAL.tensors[0][:4]
    expected = model(x).softmax(1)
    for row, probabilities in zip(loaded.predict(x), expected):
        assert row["label"] == loaded.classes[int(probabilities.argmax())]
        assert row["probability"] == pytest.approx(float(probabilities.max().detach()))
    assert loaded.plan == tiny_plan()


def test_altered_weights_are_refused(tmp_path: Path) -> None:
    # The hash in run.json is compared before the weights are believed; other classes do not fit.
    run(out=tmp_path / "run")
    file = tmp_path / "run" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    with pytest.raises(RunError, match="does not fit Tiny"):
        load_run(tmp_path / "run", model=Tiny(classes=5))
    file.write_bytes(data)
    with pytest.raises(RunError, match="altered or cut short"):
        load_run(tmp_path / "run", model=Tiny())
    with pytest.raises(RunError, match=r"does not exist.*Runs in"):
        load_run(tmp_path / "ruin")


def test_a_record_without_its_parts_is_refused(tmp_path: Path) -> None:
    # run.json that was altered is told as such, when it is loaded and when it is resumed.
    run(out=tmp_path / "run", plan=one_phase(epochs=1))
    for text in ('{"format": 1}', '{"format": 1, "plan": null, "model": {}, "settings": {}, "data": {}}'):
        (tmp_path / "run" / "run.json").write_text(text)
        with pytest.raises(RunError, match=r"run.json does not tell .*plan, task"):
            load_run(tmp_path / "run", model=Tiny())
        with pytest.raises(RunError, match=r"run.json does not tell .*plan, task"):
            run(out=tmp_path / "run", resume=True)


def stop_after(epoch: int):
    """Return an `on_epoch` that interrupts a run at the end of an epoch."""

    def on_epoch(entry: dict) -> None:
        if entry["epoch"] == epoch:
            raise KeyboardInterrupt

    return on_epoch


def alter(path: Path) -> None:
    """Write other weights of the same names into a safetensors file."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({name: tensor * 0 for name, tensor in load_file(path).items()}, path, metadata=metadata)


def test_a_finished_run_is_only_read(tmp_path: Path) -> None:
    # Resuming it gives its result again, and no file changes.
    out = tmp_path / "a"
    first = run(out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    again = run(out=out, resume=True)
    assert again.metrics == first.metrics
    assert not changed(first.model.state_dict(), again.model.state_dict())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_finished_run_without_checkpoints_is_not_trained_again(tmp_path: Path) -> None:
    # Somebody removed them to save room: the weights and the history stay as they are.
    out = tmp_path / "a"
    run(out=out)
    shutil.rmtree(out / "checkpoints")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(RunError, match=r"is finished and has no checkpoints any more.*layerwise predict"):
        run(out=out, resume=True)
    assert {path: path.read_bytes() for path in before} == before


def test_a_folder_in_the_place_of_the_history_is_told(tmp_path: Path) -> None:
    # By its own name, and before anything is trained; once it is away the run goes on.
    out = tmp_path / "a"
    first = run(out=out)
    (out / "model.safetensors").unlink()
    shutil.rmtree(max((out / "checkpoints").glob("step-*")))
    (out / "history.jsonl").unlink()
    (out / "history.jsonl").mkdir()
    with pytest.raises(RunError, match=r"a/history\.jsonl is a folder, .*Move it away and resume"):
        run(out=out, resume=True)
    (out / "history.jsonl").rmdir()
    assert run(out=out, resume=True).history == first.history


def test_a_run_that_another_process_trains_is_not_resumed(tmp_path: Path) -> None:
    # It is refused as long as the other one lives; a process that the other one started does not count.
    out = tmp_path / "a"
    with pytest.raises(ZeroDivisionError):
        run(out=out, on_epoch=lambda entry: 1 / 0)
    ready, told = os.pipe()
    other = os.fork()
    if other == 0:
        with hold_run(out):
            if os.fork() == 0:
                signal.alarm(60)  # ends it
                signal.pause()
            os.write(told, b"1")
            signal.pause()
    try:
        assert os.read(ready, 1) == b"1"
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(RunError, match=r"another process is training the run .*/a at this moment"):
            run(out=out, resume=True)
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(ready)
        os.close(told)
    run(out=out, resume=True)
    assert read_run(out)["result"]


def test_of_two_that_begin_in_one_folder_the_second_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both found it free; the first has made its run while the second opened its data.
    out = tmp_path / "a"
    run(out=out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    monkeypatch.setattr("layerwise.training.fit.require_free", lambda folder: None)
    with pytest.raises(RunError, match="already holds a run"):
        run(out=out)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("older", [False, True])
def test_resuming_does_not_take_altered_weights_for_the_run_s_own(tmp_path: Path, older: bool) -> None:
    # The file is compared with the hash in the checkpoint or, of older checkpoints, with that in run.json.
    out = tmp_path / "a"
    run(out=out)
    if older:
        last = load_latest(out / "checkpoints")
        assert last is not None
        del last.state["best"]["sha256"]
        checkpoint.save_checkpoint(out / "checkpoints", last.step, last.state)
        assert run(out=out, resume=True).steps == last.step  # it can still be read
    told = read_run(out)
    alter(out / "model.safetensors")
    with pytest.raises(RunError, match=r"altered or cut short. Put the run's own file back"):
        run(out=out, resume=True)
    assert read_run(out) == told


def test_weights_altered_between_two_sittings_are_not_ended_with(tmp_path: Path) -> None:
    # A kill between the new weights and the checkpoint looks the same: the best epoch is looked for anew.
    falling = Classification(("0", "1", "2"), monitor="accuracy", mode="min")
    options: dict = {"plan": one_phase(epochs=2), "task": falling}
    assert run(**options).best_epoch == 0
    out = options["out"] = tmp_path / "a"
    with pytest.raises(KeyboardInterrupt):
        run(on_epoch=stop_after(0), **options)
    alter(out / "model.safetensors")
    result = run(resume=True, **options)
    assert result.best_epoch == 1
    assert any("is not what the checkpoint knows" in note for note in result.notes)
    assert any(bool(tensor.any()) for tensor in load_file(out / "model.safetensors").values())


class Poisoned(Dataset):
    """Real samples, one of which holds a NaN."""

    def __init__(self, bad: int) -> None:
        self.data, self.bad = tiny_data(), bad

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        x, y = self.data[index]
        return (x * math.nan if index == self.bad else x), y


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    # The step is named, bad data told from divergence, and the last checkpoint is whole and finite.
    with pytest.raises(
        TrainingError, match=r"loss became nan at step \d+ .*The batch itself holds"
    ) as caught:
        run(train=Poisoned(30), out=tmp_path / "a", checkpoint_every_steps=1)
    latest = load_latest(tmp_path / "a" / "checkpoints")
    assert latest is not None
    assert f"at step {latest.step + 1} " in str(caught.value)
    assert str(latest.path) in str(caught.value)
    assert all(torch.isfinite(t).all() for t in latest.state["model"].values())
    for precision, told in (("fp32", "or add warm-up"), ("bf16", "or use precision='fp32'")):
        with pytest.raises(TrainingError, match=rf"training diverged: lower lr.*{told}"):
            run(plan=one_phase(), lr=1e30, optimizer="sgd", out=tmp_path / precision, precision=precision)
    with pytest.raises(TrainingError, match="No checkpoint was kept"):
        run(train=Poisoned(3))


def with_nan(data: TensorDataset) -> TensorDataset:
    """Return the data with one missing value."""
    x = data.tensors[0].clone()
    x[3, 2] = math.nan
    return TensorDataset(x, data.tensors[1])


def test_nan_in_held_out_data_is_told_and_the_run_ends_all_the_same(tmp_path: Path) -> None:
    # A missing value in validation or test data costs a number, not the run: null in both files, and a note.
    result = run(val=with_nan(VAL), test=with_nan(VAL), out=tmp_path / "a", plan=one_phase(epochs=2))
    assert math.isnan(result.metrics["loss"])
    assert [note.split(" (")[0] for note in result.notes] == [
        "validation of epoch 1: loss is nan",
        "validation of epoch 2: loss is nan",
        "test data: loss is nan",
    ]
    told = read_run(tmp_path / "a")["result"]
    assert told["metrics"]["loss"] is None
    assert told["test"]["loss"] is None
    assert told["notes"] == list(result.notes)
    lines = read_history(tmp_path / "a" / "history.jsonl")
    assert [(line["val_loss"], line["note"]) for line in lines] == [(None, n) for n in result.notes[:2]]
    assert "NaN" not in (tmp_path / "a" / "history.jsonl").read_text().replace("Look for NaN", "")


def test_a_weight_that_is_not_finite_never_reaches_a_checkpoint(tmp_path: Path) -> None:
    # A step can make weights infinite from a finite loss; the checkpoint before it is the last good one, from
    # which a resumed run, whose settings are the same, would come to the same step.
    class Bursts(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            super().step(closure)
            Bursts.steps += 1
            if Bursts.steps == 5:
                self.param_groups[0]["params"][0].data.fill_(math.inf)

    with pytest.raises(TrainingError, match=r"not finite after step 5.*step-00000004; .*begin a new one"):
        run(optimizer=Bursts, out=tmp_path / "run", checkpoint_every_steps=1)
    latest = load_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert latest.step == 4


def test_a_weight_that_is_not_finite_never_replaces_the_kept_ones(tmp_path: Path) -> None:
    # Without validation every epoch's weights are kept: those of an epoch whose last step went wrong are not.
    class Bursts(torch.optim.SGD):
        steps = 0

        def step(self, closure=None):
            super().step(closure)
            Bursts.steps += 1
            if Bursts.steps == 14:
                self.param_groups[0]["params"][0].data.fill_(math.nan)

    with pytest.raises(TrainingError, match=r"not finite after step 14.*step-00000007"):
        run(val=None, optimizer=Bursts, out=tmp_path / "run", plan=one_phase(epochs=3))
    kept = load_file(tmp_path / "run" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())
    assert len(read_history(tmp_path / "run" / "history.jsonl")) == 1


class Fails(Tiny):
    """Raises an error in the n-th forward pass in train mode."""

    def __init__(self, at: int, error: BaseException) -> None:
        super().__init__()
        self.left, self.error = at, error

    def forward(self, x):
        self.left -= self.training
        if self.left == 0:
            raise self.error
        return super().forward(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes"
        ),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_out_of_memory_names_the_step(tmp_path: Path, error: BaseException) -> None:
    # Whatever kind of memory ran out: step, advice, last checkpoint; the run can then be resumed.
    with pytest.raises(
        TrainingError, match=r"memory ran out at step 10 \(.*\)\. Take a smaller batch_size.*step-00000009"
    ):
        run(Fails(10, error), out=tmp_path / "run", checkpoint_every_steps=3)
    latest = load_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert latest.step == 9


def test_other_errors_pass_unchanged() -> None:
    # Only what is understood is explained.
    with pytest.raises(RuntimeError, match="something else"):
        run(Fails(3, RuntimeError("something else")))


def test_a_full_disk_stops_the_run_and_it_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The checkpoint of step 9 fails; that of step 6 is used, and the end is that of an undisturbed run.
    undisturbed = run(out=tmp_path / "a", checkpoint_every_steps=3)
    save = torch.save
    calls = 0

    def full(state: object, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 5:  # after those of steps 0, 3, 6 and 7 (the end of the epoch)
            Path(path).write_bytes(b"half of it")
            raise RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed")
        save(state, path)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(
        RunError, match=r"checkpoint of step 9 could not be written.*only a part of its file.*--resume .*b$"
    ):
        run(out=tmp_path / "b", checkpoint_every_steps=3)
    monkeypatch.undo()
    resumed = run(out=tmp_path / "b", checkpoint_every_steps=3, resume=True)
    assert resumed.history == undisturbed.history
    assert any("step 7" in note for note in resumed.notes)


def test_ctrl_c_saves_the_step_and_the_run_goes_on(tmp_path: Path) -> None:
    # The signal comes in the middle of step 10; the step is finished and saved, then the run stops.
    class Presses(Tiny):
        left = 10

        def forward(self, x):
            self.left -= self.training
            if self.left == 0 and self.training:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x)

    before = signal.getsignal(signal.SIGINT)
    undisturbed = run(Presses.__base__(), out=tmp_path / "a")
    with pytest.raises(KeyboardInterrupt):
        run(Presses(), out=tmp_path / "b")
    assert signal.getsignal(signal.SIGINT) is before
    latest = load_latest(tmp_path / "b" / "checkpoints")
    assert latest is not None
    assert latest.step == 10
    about = json.loads((tmp_path / "b" / "run.json").read_text())
    about["model"]["class"] = "Tiny"
    (tmp_path / "b" / "run.json").write_text(json.dumps(about))
    resumed = run(out=tmp_path / "b", resume=True)
    assert resumed.history == undisturbed.history


def test_ctrl_c_in_validation_loses_nothing_of_the_epoch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Stopped at once it would lose all steps since the last checkpoint: the epoch is finished and saved.
    class Presses(Tiny):
        left = 2

        def forward(self, x):
            self.left -= not self.training
            if self.left == 0 and not self.training:
                os.kill(os.getpid(), signal.SIGINT)
            return super().forward(x)

    with pytest.raises(KeyboardInterrupt, match="--resume"):
        run(Presses(), out=tmp_path / "run", progress=True)
    latest = load_latest(tmp_path / "run" / "checkpoints")
    assert latest is not None
    assert latest.step == 7
    assert len(read_history(tmp_path / "run" / "history.jsonl")) == 1
    assert capsys.readouterr().err.count("validation of this epoch is finished first") == 1


def test_it_stops_early() -> None:
    # A rate too low to change anything: two epochs without improvement end the run.
    result = run(plan=one_phase(epochs=30), lr=1e-12, optimizer="sgd", early_stopping=2)
    assert result.stopped == "early"
    assert len(result.history) == 3
    assert result.best_epoch == 0


def test_early_stopping_without_validation_data_is_told() -> None:
    # Nothing is measured that could get worse, so all epochs are trained.
    with pytest.warns(
        LayerwiseWarning, match=r"early_stopping is 1, and without validation data .*--val-frac"
    ):
        result = run(val=None, plan=one_phase(epochs=2), early_stopping=1)
    assert len(result.history) == 2


def test_the_loss_can_be_monitored() -> None:
    # The kept epoch is that of the lowest validation loss, and a rising one stops early.
    task = Classification(("0", "1", "2"), monitor="loss")
    result = run(task=task, plan=one_phase(epochs=30), early_stopping=2, lr=0.1)
    losses = [line["val_loss"] for line in result.history]
    assert result.stopped == "early"
    assert result.best_epoch == losses.index(min(losses)) == len(losses) - 3


def test_a_monitor_that_is_not_measured_is_told() -> None:
    # Else keep="best" would keep the last epoch, and nothing would stop early.
    with pytest.raises(TrainingError, match=r"'acuracy' is not measured.*loss, accuracy.*mean 'accuracy'"):
        run(task=Classification(("0", "1", "2"), monitor="acuracy"))


def test_an_early_stop_is_remembered(tmp_path: Path) -> None:
    # Resuming a run that stopped early does not train on.
    options: dict = {
        "plan": one_phase(epochs=30),
        "lr": 1e-12,
        "optimizer": "sgd",
        "early_stopping": 2,
        "out": tmp_path / "run",
    }
    first = run(**options)
    again = run(**options, resume=True)
    assert again.history == first.history
    assert again.stopped == "early"


def test_phases_by_steps_end_inside_an_epoch(tmp_path: Path) -> None:
    # 7 steps an epoch: phases of 4 and 6 steps; a checkpoint at each phase change; 10 steps in all.
    plan = tiny_plan(
        phases=[
            {"name": "one", "rates": {"head": 1.0}, "steps": 4},
            {"name": "two", "rates": {"body": 1.0, "head": 1.0}, "steps": 6},
        ]
    )
    result = run(plan=plan, out=tmp_path / "run", keep_checkpoints=9)
    assert result.steps == 10
    assert [line["steps"] for line in result.history] == [7, 3]
    steps = [int(p.name.split("-")[1]) for p in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert steps == [0, 4, 7, 10]


@pytest.mark.parametrize("norms", [{"policy": "follow"}, {"policy": "calibrate", "momentum": 0.3}])
def test_a_run_goes_on_from_a_phase_change_inside_an_epoch(tmp_path: Path, norms: dict) -> None:
    # The epoch keeps the name of the phase it began in; statistics are measured once.
    plan = tiny_plan(
        phases=[
            {"name": "one", "rates": {"head": 1.0}, "steps": 4},
            {"name": "two", "rates": {"body": 1.0, "head": 1.0}, "steps": 6, "norms": norms},
        ]
    )
    options: dict = {"plan": plan, "out": tmp_path / "run", "keep_checkpoints": 9}
    whole = run(**options)
    for later in list_checkpoints(tmp_path / "run" / "checkpoints")[2:]:
        shutil.rmtree(later)
    resumed = run(**options, resume=True)
    assert any("(step 4)" in note for note in resumed.notes)
    assert not changed(whole.model.state_dict(), resumed.model.state_dict())
    assert resumed.history == whole.history


def test_imbalance_is_met_by_weights_or_by_sampling() -> None:
    # Balanced weights reach the task; weighted sampling needs labels; both change the run.
    plain = run()
    weighted = run(class_weights="balanced")
    assert isinstance(weighted.task, Classification)
    counts = torch.bincount(tiny_data().tensors[1]).tolist()
    assert weighted.task.class_weights == pytest.approx(tuple(50 / (3 * n) for n in counts))
    assert weighted.history != plain.history
    sampled = run(sampler="weighted")
    assert sampled.history != plain.history
    assert run(class_weights=[1, 1, 1]).history == plain.history
    with pytest.raises(DataError, match="2 numbers for 3 classes"):
        run(class_weights=[1, 2])
    with pytest.raises(TrainingError, match="set them on the task"):
        run(class_weights="balanced", task=Classification(("a", "b", "c")))


def test_a_loader_is_drawn_from_by_weight_too() -> None:
    # sampler="weighted" looks through a DataLoader: the same run as on its data set.
    rare = tiny_data(60, classes=2)
    loader = DataLoader(rare, batch_size=8, shuffle=True)
    results = [run(Tiny(2), train, None, sampler="weighted", plan=one_phase()) for train in (rare, loader)]
    assert results[0].history == results[1].history


def test_validation_may_be_a_stream(tmp_path: Path) -> None:
    # A loader over an iterable data set without a length validates, as it tests; its size is not known. The
    # seed that such a loader draws for each pass is no draw of the training's.
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(VAL)

    result = run(val=DataLoader(Stream(), batch_size=8), out=tmp_path / "a", plan=one_phase())
    assert result.history == run(plan=one_phase()).history
    assert read_run(tmp_path / "a")["data"]["val_samples"] is None


def test_options_that_a_task_s_loss_lacks_are_told(tmp_path: Path) -> None:
    # "Set them on the task" is true of classification alone.
    labels = TensorDataset(torch.randn(16, 8), torch.ones(16, 3))
    with pytest.raises(TrainingError, match=r"MultiLabel \(multi_label\) knows no class_weights. Leave it"):
        run(train=labels, val=None, task=MultiLabel(("a", "b", "c")), class_weights=[1.0, 2.0, 1.0])
    with pytest.raises(TrainingError, match="set them on the task"):
        run(task=Classification(("0", "1", "2")), class_weights=[1.0, 2.0, 1.0])


def test_a_window_with_a_smaller_batch_is_the_gradient_of_its_samples() -> None:
    # 16, 16, 16, 16 and 6 samples in one step: the gradient of the mean over all 70.
    gradients: list[torch.Tensor] = []

    class Recorder(torch.optim.SGD):
        def step(self, *args, **kwargs):
            gradients.extend(p.grad.clone() for group in self.param_groups for p in group["params"])
            return super().step(*args, **kwargs)

    model, data, head = Tiny(), tiny_data(70), tiny_plan()
    only_head = tiny_plan(phases=[{**head.phases[0].model_dump(exclude_defaults=True), "epochs": 1}])
    model.eval()
    F.cross_entropy(model(data.tensors[0]), data.tensors[1]).backward()
    expected = [model.head.weight.grad.clone(), model.head.bias.grad.clone()]
    model.zero_grad()
    run(model, data, None, plan=only_head, optimizer=Recorder, batch_size=16, accumulate=5)
    assert len(gradients) == 2
    for ours, theirs in zip(gradients, expected):
        torch.testing.assert_close(ours, theirs)


def test_a_task_that_feeds_the_model_otherwise_is_told_to_give_the_map() -> None:
    """The map's input is made of the batch's keys; fit has no example_input= that the error could mean."""

    class Picks(Classification):
        def forward(self, model, batch):
            return model(batch["image"])

    x, y = tiny_data().tensors
    data = [{"image": one, "labels": label} for one, label in zip(x, y)]
    task = Picks(("a", "b", "c"))
    with pytest.raises(
        RecordingError, match=r"'image'.*to fit, layers=layerwise.layer_map\(model, example\)"
    ):
        fit(Tiny(), data, plan=tiny_plan(), task=task, progress=False)
    fit(Tiny(), data, plan=tiny_plan(), task=task, layers=tiny_layers(Tiny()), progress=False)


def test_mappings_are_understood() -> None:
    # Batches with "labels" go into the model by keyword; the same numbers come out.
    class Keyword(Tiny):
        def forward(self, *, features):
            return {"logits": super().forward(features)}

    class Rows(Dataset):
        def __len__(self) -> int:
            return 50

        def __getitem__(self, index: int):
            x, y = tiny_data()[index]
            return {"features": x, "labels": y}

    result = run(Keyword(), Rows(), Rows(), plan=tiny_plan())
    assert result.task.name == "text_classification"
    assert result.history == run(val=tiny_data()).history


def test_loaders_are_understood() -> None:
    # A loader with drop_last and its own batch size; a loader whose sampler is foreign.
    shuffled = DataLoader(tiny_data(), batch_size=8, shuffle=True, drop_last=True)
    assert run(train=shuffled, val=DataLoader(VAL, batch_size=7)).steps == 4 * 6

    class Sampler(torch.utils.data.Sampler):
        def __iter__(self):
            yield from torch.randperm(50).tolist()

        def __len__(self) -> int:
            return 50

    assert run(train=DataLoader(tiny_data(), batch_size=10, sampler=Sampler())).steps == 4 * 5


def test_what_does_not_fit_is_told_before_training(tmp_path: Path) -> None:
    # Wrong options, classes, labels: no folder is made.
    out = tmp_path / "run"
    with pytest.raises(TrainingError, match=r"lr is nan"):
        run(lr=math.nan, out=out)
    with pytest.raises(DataError, match=r"expected \[N, 2\]"):
        run(classes=["a", "b"], out=out)
    with pytest.raises(DataError, match="one integer for each sample"):
        run(train=TensorDataset(torch.zeros(4, 8), torch.zeros(4)), out=out)
    other = tiny_plan(groups=["a", "head"], phases=[{"name": "p", "rates": {"a": 1.0}, "epochs": 1}])
    with pytest.raises(PlanError, match="another model"):
        run(plan=other, out=out)
    assert not out.exists()


def test_a_last_batch_of_one_sample_can_be_left_out() -> None:
    # Batch-norm on vectors cannot train on one sample; with drop_last the run goes through.
    with pytest.raises(TrainingError, match=r"step 7 holds one sample.*drop_last=True"):
        run(train=tiny_data(49), plan=one_phase())
    assert run(train=tiny_data(49), plan=one_phase(), drop_last=True).steps == 6 * 6


def test_batch_norm_statistics_are_calibrated_where_the_plan_says() -> None:
    # Policy "calibrate": before the phase the stem's statistics become those of the training data.
    model = Tiny()
    plan = tiny_plan(
        phases=[
            {"name": "head", "rates": {"head": 1.0}, "epochs": 1, "norms": {"policy": "calibrate"}},
        ]
    )
    inputs = tiny_data().tensors[0]
    expected = model.stem[0](inputs).mean(0).detach()
    assert not torch.allclose(model.stem[1].running_mean, expected, atol=1e-3)
    run(model, plan=plan)
    assert torch.allclose(model.stem[1].running_mean, expected, atol=1e-6)


def test_calibrated_statistics_are_watched_afterwards(tmp_path: Path) -> None:
    # They move once, as the plan says, and are frozen from then on.
    def drift(model: Tiny, *_: object) -> None:
        model.stem[1].running_mean.add_(0.1)

    norms = {"policy": "calibrate"}
    plan = tiny_plan(phases=[{"name": "head", "rates": {"head": 1.0}, "epochs": 2, "norms": norms}])
    for drifts in (False, True):
        model = Tiny()
        if drifts:
            model.register_forward_hook(drift)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run(model, plan=plan, out=tmp_path / str(drifts))
        watched = json.loads((tmp_path / str(drifts) / "audit.json").read_text())["after"]
        assert watched["frozen_buffers_moved"] == (["stem.1.running_mean"] if drifts else [])
        assert watched["frozen_buffers"] == 6
        assert set(watched["buffers_moved"]) >= {"stem.1.running_mean", "body.1.running_var"}
        assert any("of frozen modules moved" in str(one.message) for one in told) is drifts


@pytest.mark.parametrize("momentum", [None, 0.3])
def test_statistics_are_calibrated_in_the_groups_that_say_so_alone(momentum: float | None) -> None:
    # Those of the body are measured on what the stem gives by the statistics that it keeps.
    model = Tiny()
    own = {"policy": "calibrate", "momentum": momentum}
    norms = {"policy": "freeze", "groups": {"body": own}}
    plan = tiny_plan(phases=[{"name": "head", "rates": {"head": 1.0}, "epochs": 1, "norms": norms}])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = tiny_data()
    expected = model.body[0](model.stem.eval()(data.tensors[0])).mean(0).detach()
    run(model, data, plan=plan)
    moved = changed(before, model.state_dict())
    statistics = {f"body.1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert moved == {"head.weight", "head.bias", *statistics}
    assert torch.allclose(model.body[1].running_mean, expected, atol=1e-6) is (momentum is None)


@pytest.mark.parametrize("how", [{"samples": 12}, {"momentum": 0.5}])
def test_a_share_of_the_data_is_drawn_for_calibration(how: dict[str, float]) -> None:
    # The first samples of a folder of images, and its last ones, are of one class.
    data = tiny_data()
    inputs = data.tensors[0].sort(0).values
    model = Tiny()
    whole = model.stem[0](inputs).mean(0).detach()
    spread = model.stem[0](inputs).std(0).detach()
    norms = {"policy": "calibrate", **how}
    plan = tiny_plan(phases=[{"name": "head", "rates": {"head": 1.0}, "epochs": 1, "norms": norms}])
    run(model, TensorDataset(inputs, data.tensors[1]), plan=plan)
    assert ((model.stem[1].running_mean - whole).abs() < 0.6 * spread).all()


def test_statistics_are_calibrated_by_the_forward_of_the_task() -> None:
    # Batches that only a task of one's own can feed are measured as they are trained on.
    class Named(Classification):
        def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            return model(batch["picture"] + 1)

    model, data = Tiny(), tiny_data()
    plan = tiny_plan(
        phases=[{"name": "head", "rates": {"head": 1.0}, "epochs": 1, "norms": {"policy": "calibrate"}}]
    )
    inputs, labels = data.tensors
    expected = model.stem[0](inputs + 1).mean(0).detach()
    rows = [{"picture": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    run(model, rows, None, plan=plan, task=Named(("a", "b", "c")))
    assert torch.allclose(model.stem[1].running_mean, expected, atol=1e-6)


def test_calibrating_in_no_group_is_an_error_that_names_their_policies() -> None:
    # All groups with norms have a policy of their own.
    norms = {"policy": "calibrate", "groups": {"stem": "freeze", "body": "adapt"}}
    plan = tiny_plan(phases=[{"name": "head", "rates": {"head": 1.0}, "epochs": 1, "norms": norms}])
    with pytest.raises(PlanError, match=r"phase 'head'.* measures nothing.*\(stem: freeze, body: adapt\)"):
        run(Tiny(), plan=plan)


def test_bf16_runs_and_differs() -> None:
    # Autocast is on: losses are near those of fp32 and not equal.
    half, whole = run(precision="bf16"), run()
    assert half.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=0.05)
    assert half.history != whole.history


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    # No metrics, the last epoch, and weights in the folder.
    result = run(val=None, out=tmp_path / "run")
    assert result.metrics == {}
    assert result.best_epoch == 3
    assert load_run(tmp_path / "run", model=Tiny()).classes == ("0", "1", "2")


class Varied(Dataset):
    """Samples that are another each time."""

    def __init__(self) -> None:
        self.inner = tiny_data()

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        x, label = self.inner[index]
        return x + 0.01 * torch.rand(x.shape), label


def test_what_fit_looks_at_first_draws_nothing_from_the_data_set_s_own_generator(tmp_path: Path) -> None:
    # A run with a folder, whose data get a fingerprint, is the run without; training makes the first draw.
    class Noisy(Dataset):
        def __init__(self) -> None:
            self.data, self.own = tiny_data(), torch.Generator().manual_seed(3)

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int):
            x, y = self.data[index]
            return x + torch.randn(8, generator=self.own), y

    results = [run(train=Noisy(), plan=one_phase(epochs=1), out=out) for out in (None, tmp_path / "a")]
    assert results[0].history == results[1].history
    noisy, once = Noisy(), Noisy()
    setup.first_batch(open_batches(noisy, train=True, batch_size=8))
    assert noisy[0][0].equal(once[0][0])


def test_the_note_on_the_cache_advises_nothing_that_fit_does_not_have() -> None:
    # With augmentation, and where all learns on purpose, the reason is told and no remedy of PrefixCache.
    for told in (
        run(train=Varied(), cache="auto").notes,
        run(plan=one_phase(epochs=1), cache="auto").notes,
    ):
        (note,) = [note for note in told if note.startswith("prefix cache: off")]
        assert "views" not in note
        assert "Freeze" not in note


def test_each_phase_is_told_its_own_cut(capsys: pytest.CaptureFixture[str]) -> None:
    # The gain rounds to one figure in some phases, and the validation data meet each of them later.
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(16)), nn.Linear(8, 3))
    layers = layer_map(model, torch.zeros(1, 8), granularity="layers")
    plan = gradual_unfreezing(layers, epochs=34)
    fit(model, tiny_data(), VAL, plan=plan, layers=layers, batch_size=8, cache="memory")
    told = re.findall(r"prefix cache: memory, .* reads '(\d+)\.", capsys.readouterr().err)
    assert told == [str(first) for first in range(16, 0, -1)]


class Graded(Dataset):
    """Samples that grow from epoch to epoch."""

    def __init__(self) -> None:
        self.data, self.grade, self.told = tiny_data(), math.nan, list[int]()

    def set_epoch(self, epoch: int) -> None:
        self.grade = 1 + epoch / 2
        self.told += [epoch] if self.told[-1:] != [epoch] else []

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        x, y = self.data[index]
        return self.grade * x, y


class InOrder(SequentialSampler):
    """A sampler of the user's own."""


@pytest.mark.parametrize("is_loader", [False, True])
@pytest.mark.parametrize("policy", ["follow", "calibrate"])
def test_a_data_set_is_told_each_epoch(is_loader: bool, policy: str, tmp_path: Path) -> None:
    # By its set_epoch, before the epoch's first sample; cached, and where a run goes on inside an epoch, too.
    norms = {"policy": policy}
    phases = [
        {"name": "one", "rates": {"head": 1.0}, "steps": 11},
        {"name": "two", "rates": {"body": 1.0, "head": 1.0}, "steps": 10, "norms": norms},
    ]

    def once(**options: object) -> Result:
        data = Graded()
        train = DataLoader(data, batch_size=8, sampler=InOrder(data)) if is_loader else data
        result = run(train=train, plan=tiny_plan(phases=phases), keep_checkpoints=9, **options)
        assert data.told == [0, 1, 2]
        return result

    whole = once(out=tmp_path / "run")
    for later in list_checkpoints(tmp_path / "run" / "checkpoints")[3:]:
        shutil.rmtree(later)
    resumed = once(out=tmp_path / "run", resume=True)
    assert any("(step 11)" in note for note in resumed.notes)
    for other in (resumed, once(cache="memory")):
        assert other.history == whole.history
        assert not changed(whole.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_a_cached_run_is_the_same_run(storage: str, tmp_path: Path) -> None:
    # With the frozen prefix replayed, history and weights are those of the plain run, bit for bit.
    plain, cached = Tiny(), Tiny()
    first = run(plain, out=tmp_path / "a")
    second = run(cached, out=tmp_path / "b", cache=storage)
    assert any("cut at" in note for note in second.notes), second.notes
    assert second.history == first.history
    assert all(torch.equal(t, cached.state_dict()[name]) for name, t in plain.state_dict().items())


def test_the_set_up_is_audited_and_watched(tmp_path: Path) -> None:
    # audit.json: no errors before, nothing frozen moved afterwards; what moves all the same is told.
    run(out=tmp_path / "a")
    audited = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert audited["before"]["ok"]
    assert audited["after"]["ok"]
    assert set(audited["after"]["moved"]) == {n for n, _ in Tiny().named_parameters() if "stem" not in n}

    class Drifts(Tiny):
        def forward(self, x):
            self.stem[0].weight.data.mul_(1.001)
            return super().forward(x)

    with pytest.warns(LayerwiseWarning, match=r"1 frozen parameter moved \(stem\.0\.weight\)"):
        result = run(Drifts(), out=tmp_path / "b")
    assert "stem.0.weight" in result.notes[0]
    assert not json.loads((tmp_path / "b" / "audit.json").read_text())["after"]["ok"]
    run(Drifts(), out=tmp_path / "c", audit=False)
    assert not (tmp_path / "c" / "audit.json").exists()


def test_a_disk_that_is_full_at_the_very_end_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # All is trained and only run.json is to be written: the run can be finished once there is room.
    def full(out: Path, result: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("layerwise.training.fit.finish_run", full)
        with pytest.raises(RunError, match=r"No space left.*Make room on the disk.*go on from it"):
            run(out=tmp_path / "a")
    assert read_run(tmp_path / "a")["result"] is None
    run(out=tmp_path / "a", resume=True)
    assert read_run(tmp_path / "a")["result"]


def test_an_audit_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    # It is named, and what to do; the run can then be finished.
    for content in ("[]", '{"before', "[" * 100_000):
        (tmp_path / "audit.json").write_text(content)
        with pytest.raises(RunError, match=r"audit.json cannot be read.*or remove it, and resume"):
            write_audit(tmp_path, after={})
        assert (tmp_path / "audit.json").read_text() == content


def test_the_audit_of_a_run_tells_of_small_batches_in_every_phase(tmp_path: Path) -> None:
    # The first phase is audited with the loader's batch size, a later one as it begins, resumed or not.
    def stop(entry: dict) -> None:
        if entry["phase"] == "head":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "a", on_epoch=stop)
    assert json.loads((tmp_path / "a" / "audit.json").read_text())["phases"] == {}
    run(out=tmp_path / "a", resume=True)
    audited = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert audited["before"]["findings"] == []
    assert list(audited["phases"]) == ["more"]
    assert audited["phases"]["more"].startswith("1 batch-norm layer trains on batches of 8 (body.1)")

    run(train=DataLoader(tiny_data(), 4), batch_size=32, out=tmp_path / "b", plan=one_phase(epochs=1))
    audited = json.loads((tmp_path / "b" / "audit.json").read_text())
    assert [finding["code"] for finding in audited["before"]["findings"]] == ["small-batch-norm"]
    assert audited["phases"] == {}


def test_the_audit_of_a_resumed_run_is_that_of_its_beginning(tmp_path: Path) -> None:
    # Stopped before its end it has "before"; resumed it keeps that; resumed once more nothing changes.
    def stop(entry: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "a", on_epoch=stop)
    file = tmp_path / "a" / "audit.json"
    audited = json.loads(file.read_text())
    assert audited["before"]["ok"]
    assert audited["after"] is None
    audited["before"]["notes"] = ["of the beginning"]
    file.write_text(json.dumps(audited))
    run(out=tmp_path / "a", resume=True)
    audited = json.loads(file.read_text())
    assert audited["before"]["notes"] == ["of the beginning"]
    assert audited["after"]["moved"]
    text = file.read_text()
    run(out=tmp_path / "a", resume=True)
    assert file.read_text() == text


def test_a_run_whose_result_is_missing_keeps_what_moved(tmp_path: Path) -> None:
    # Killed between its last step and its result, it is finished without a step: "after" stays.
    run(out=tmp_path / "a")
    about = json.loads((tmp_path / "a" / "run.json").read_text())
    (tmp_path / "a" / "run.json").write_text(json.dumps({**about, "result": None}))
    (tmp_path / "a" / "plan.yaml").unlink()
    text = (tmp_path / "a" / "audit.json").read_text()
    run(out=tmp_path / "a", resume=True)
    assert (tmp_path / "a" / "audit.json").read_text() == text
    assert (tmp_path / "a" / "plan.yaml").exists()


def test_a_tracker_that_is_not_there_is_told(tmp_path: Path) -> None:
    # accelerate would only leave it out; here the run does not start.
    with pytest.raises(TrainingError, match="tracker 'nothing' is not known"):
        run(trackers="nothing", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()

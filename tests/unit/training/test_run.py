"""A run's folder: where it can be made, and what is said of one that cannot be read."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from layerwise.errors import DataError, RunError
from layerwise.files import sha256
from layerwise.plans.plan import Plan
from layerwise.training.classification import Classification
from layerwise.training.fit import fit
from layerwise.training.kept_weights import load_weights, save_weights
from layerwise.training.run import load_run
from layerwise.training.run_folder import create_run, read_run, require_free
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan

TASK = {"name": "text_classification", "classes": ["a", "b"]}


def about(**changes: object) -> dict:
    return {"model": {"spec": None, "class": "Tiny"}, "task": {}, "settings": {}, "data": {}, **changes}


def test_a_run_needs_a_folder_that_can_be_made(tmp_path: Path) -> None:
    # A file in its place, or above it, is told with the option to change.
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(RunError, match=r"file is a file; --out \(out=\) names the folder"):
        require_free(file)
    require_free(file / "run")
    with pytest.raises(
        RunError, match=r"file/run cannot be written: .*Not a directory.*Choose another: --out"
    ):
        create_run(file / "run", plan=tiny_plan(), about=about())
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "cannot be read: Expecting property name"),
        (b"\xff", "cannot be read: 'utf-8' codec"),
        ("[" * 100_000, "cannot be read: maximum recursion depth"),
        ("[]", "is not the record of a run"),
        ("{}", "is not the record of a run"),
        ('{"format": 1, "model": []}', "does not tell model, plan"),
    ],
)
def test_a_record_that_cannot_be_read_is_told(content: str | bytes, told: str, tmp_path: Path) -> None:
    # What is wrong with it, in words, and what to do: no name of a Python exception.
    raw = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "run.json").write_bytes(raw)
    with pytest.raises(RunError, match=f"run.json {told}.*Put the run's own file back, or start") as caught:
        read_run(tmp_path)
    assert "Error" not in str(caught.value)


def test_a_file_in_place_of_a_run_is_not_called_missing(tmp_path: Path) -> None:
    # Whoever names a table where a run is expected is told what it is.
    table = tmp_path / "texts.csv"
    table.touch()
    with pytest.raises(RunError, match="is a file, and a run is a folder"):
        read_run(table)


def test_a_folder_of_runs_tells_them(tmp_path: Path) -> None:
    # As a search's folder, which holds the winner's run; runs beside it are not meant.
    for name in ("s/winner-trial-4", "other"):
        create_run(tmp_path / name, plan=tiny_plan(), about=about())
    with pytest.raises(RunError, match=r"s is not a run .*Runs in .*s: winner-trial-4\. Make"):
        read_run(tmp_path / "s")


def test_a_record_of_another_format_is_told(tmp_path: Path) -> None:
    # Both versions are named.
    (tmp_path / "run.json").write_text('{"format": 2}')
    with pytest.raises(RunError, match=r"has format 2; this version of layerwise reads 1. Use the one that"):
        read_run(tmp_path)


def test_weights_that_do_not_fit_the_model_are_told(tmp_path: Path) -> None:
    # Missing, of another model, or no weights at all: the file is named.
    file = tmp_path / "model.safetensors"
    with pytest.raises(
        RunError, match=r"is missing: the run has kept no weights yet. Go on with it: --resume"
    ):
        load_weights(nn.Linear(2, 1), file)
    with pytest.raises(
        RunError, match=r"is missing, though the run had kept it. Put the run's own file back"
    ):
        load_weights(nn.Linear(2, 1), file, expected_sha256="0" * 64)
    save_file({"weight": torch.ones(3, 2), "bias": torch.ones(3)}, file)
    with pytest.raises(RunError, match=r"does not fit Linear: .* of another shape \(weight: "):
        load_weights(nn.Linear(2, 1), file)
    file.write_bytes(b"no weights")
    with pytest.raises(RunError, match=r"does not fit Linear: .*header"):
        load_weights(nn.Linear(2, 1), file)


def test_a_folder_in_place_of_the_weights_is_told(tmp_path: Path) -> None:
    # It is not missing, and room does not help. A resumed run tells it before it trains an epoch for nothing.
    file = tmp_path / "run" / "model.safetensors"
    told = rf"{re.escape(str(file))} is a folder.*Move the folder away.*--resume"
    options = {"plan": tiny_plan(), "layers": tiny_layers(Tiny()), "progress": False, "out": file.parent}

    def stop(entry: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Tiny(), tiny_data(), on_epoch=stop, **options)
    file.unlink()
    file.mkdir()
    with pytest.raises(RunError, match=told):
        load_weights(nn.Linear(2, 1), file)
    with pytest.raises(RunError, match=told):
        fit(Tiny(), tiny_data(), resume=True, on_epoch=lambda entry: pytest.fail("trained"), **options)


def test_weights_that_cannot_be_written_leave_the_old_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A full disk, as safetensors tells it: the message says what to do, the old file stays.
    from safetensors import SafetensorError
    from safetensors import torch as writer

    file = tmp_path / "model.safetensors"
    kept = save_weights(nn.Linear(2, 1), file)

    def full(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(writer, "save_model", full)
    with pytest.raises(RunError, match=r"could not be written to .*No space left.*Make room and resume"):
        save_weights(nn.Linear(2, 1), file)
    assert sha256(file) == kept
    assert list(tmp_path.iterdir()) == [file]


def test_a_model_that_cannot_be_built_again_is_told_with_its_run(tmp_path: Path) -> None:
    # The weights file that it was opened with may be gone.
    model = {"spec": "timm:no_such_model", "class": "NoModel"}
    create_run(tmp_path / "run", plan=tiny_plan(), about=about(model=model, task=TASK))
    with pytest.raises(RunError, match=r"the model of .*run cannot be built again: .*no_such_model"):
        load_run(tmp_path / "run")


def test_a_tokenizer_that_cannot_be_read_is_told_with_its_run(tmp_path: Path) -> None:
    # Of a run whose model the caller gives, the tokenizer still comes from the run.
    pytest.importorskip("transformers")
    create_run(tmp_path / "run", plan=tiny_plan(), about=about(task=TASK))
    saved = tmp_path / "run" / "transformers"
    saved.mkdir()
    (saved / "tokenizer_config.json").write_text("{")
    with pytest.raises(RunError, match=r"the tokenizer of .*run cannot be read: "):
        load_run(tmp_path / "run", model=nn.Linear(2, 1))


def test_the_record_holds_the_plan_as_it_was(tmp_path: Path) -> None:
    # Validated again from JSON it is the same plan.
    create_run(tmp_path / "run", plan=tiny_plan(), about=about())
    assert Plan.model_validate(read_run(tmp_path / "run")["plan"]) == tiny_plan()


@dataclass(frozen=True)
class Shouts(Classification):
    """A task of the caller's own, with a setting and a reading of its own."""

    mark: str = "!"

    def decode(self, output: torch.Tensor) -> list[dict]:
        return [{**row, "label": row["label"] + self.mark} for row in super().decode(output)]


def test_a_run_with_a_task_of_its_own_is_loaded_with_that_task(tmp_path: Path) -> None:
    # Its code is not in the run; without it the error blamed another version, or another class decoded.
    task = Shouts(("a", "b", "c"))
    fit(
        Tiny(),
        tiny_data(),
        plan=tiny_plan(),
        layers=tiny_layers(Tiny()),
        task=task,
        out=tmp_path / "a",
        progress=False,
        audit=False,
    )
    with pytest.raises(RunError, match=r"task of .*a \(Shouts\) is your own.*load_run\(path, task=task\)"):
        load_run(tmp_path / "a", model=Tiny())
    with pytest.raises(RunError, match=r"has the classes \['a', 'b'\].*on \['a', 'b', 'c'\]"):
        load_run(tmp_path / "a", model=Tiny(), task=Shouts(("a", "b")))
    loaded = load_run(tmp_path / "a", model=Tiny(), task=task)
    assert loaded.task is task
    assert loaded.predict(torch.zeros(1, 8))[0]["label"] in {"a!", "b!", "c!"}


def test_a_loaded_run_measures_data_as_fit_did(tmp_path: Path) -> None:
    # The kept weights on the test data give the run's own figures, of data sets and of loaders.
    fitted = fit(
        Tiny(),
        tiny_data(),
        tiny_data(20, seed=2),
        test=tiny_data(30, seed=3),
        plan=tiny_plan(),
        layers=tiny_layers(Tiny()),
        out=tmp_path / "a",
        progress=False,
        audit=False,
    )
    loaded = load_run(tmp_path / "a", model=Tiny())
    found = loaded.evaluate(tiny_data(30, seed=3))
    assert found.values == fitted.test
    assert found.tables["confusion"] == fitted.test_tables["confusion"]
    loader = DataLoader(tiny_data(30, seed=3), batch_size=7)
    assert loaded.evaluate(loader).values["accuracy"] == found.values["accuracy"]


def test_data_of_other_classes_are_not_measured(tmp_path: Path) -> None:
    # Classes are numbered by name: a folder that lacks one would give all after it other numbers.
    fit(Tiny(), tiny_data(), plan=tiny_plan(), layers=tiny_layers(Tiny()), out=tmp_path / "a", progress=False)
    loaded = load_run(tmp_path / "a", model=Tiny())
    data = tiny_data(6, classes=2)
    data.classes = ["0", "2"]
    with pytest.raises(DataError, match=r"have the classes \['0', '2'\].*trained on \['0', '1', '2'\]"):
        loaded.evaluate(data)
    with pytest.raises(DataError, match="labels"):
        loaded.evaluate(TensorDataset(torch.zeros(4, 8), torch.tensor([0, 9, 1, 2])))

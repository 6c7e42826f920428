"""Jobs: runs that are gone on with by their folder alone, and data that are named wrongly."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from image_folders import make_images
from layerwise.errors import DataError, ModelError, RunError
from layerwise.sources.models import open_model
from layerwise.training.fit import fit
from layerwise.training.job import Job, open_job
from layerwise.training.kept_weights import save_weights
from layerwise.training.resuming import resume_job
from layerwise.training.run import load_run
from tiny_fit import Tiny, tiny_data, tiny_layers, tiny_plan
from tiny_text import save_tiny, topic_rows, write_csv
from tiny_transformers import save_vit


def test_a_run_of_objects_is_resumed_where_they_are(tmp_path: Path) -> None:
    # The folder does not know how to make them; the call that does is told.
    model, out = Tiny(), tmp_path / "run"
    layers = tiny_layers(model)
    fit(model, tiny_data(), plan=tiny_plan(), layers=layers, batch_size=16, out=out, progress=False)
    with pytest.raises(RunError, match=r"have no names. Resume it there: layerwise.fit.*resume=True"):
        resume_job(out)


@pytest.mark.parametrize(
    ("job", "told"),
    [
        (
            {"model": "m", "data": "d", "speed": 1, "options": {"lr": 1.0, "depth": 3}},
            "has depth, speed, unknown",
        ),
        ({"data": "d", "options": {}}, "lacks model or data"),
    ],
)
def test_a_job_of_another_version_is_told(tmp_path: Path, job: dict, told: str) -> None:
    # What this version does not know is named; it is not a TypeError.
    given = {"layers": tiny_layers(model := Tiny()), "out": tmp_path, "about": {"job": job}}
    fit(model, tiny_data(), plan=tiny_plan(), progress=False, **given)
    with pytest.raises(RunError, match=f"{told}.*Resume it with the version"):
        resume_job(tmp_path)


@pytest.mark.parametrize(
    ("name", "spec", "told"),
    [
        (
            "winner-trial-4",
            "hf:bert",
            "is part of a search, which goes on with it. Give the command .* again",
        ),
        ("winner-trial-4", None, "is part of a search"),
        ("language-model", "hf:bert", "is part of a run with --lm-epochs.*Give the command .* again"),
        ("language-model", None, "started from Python"),
    ],
)
def test_a_run_within_another_is_resumed_by_that(
    tmp_path: Path, name: str, spec: str | None, told: str
) -> None:
    # What made the folder is told; a run of objects that happens to have the name is one of objects.
    model, out = Tiny(), tmp_path / "all" / name
    options = {"plan": tiny_plan(), "layers": tiny_layers(model), "batch_size": 16, "progress": False}
    fit(model, tiny_data(), out=out, about={"model": {"spec": spec}}, **options)
    with pytest.raises(RunError, match=told) as caught:
        resume_job(out)
    assert str(tmp_path / "all") in str(caught.value)


def test_a_run_of_texts_is_gone_on_with_by_its_folder(tmp_path: Path) -> None:
    # Model, data, plan and options come from the record, and the end is that of a run in one go, bit for bit.
    pytest.importorskip("transformers")
    save_tiny(tmp_path / "bert", "bert")
    write_csv(tmp_path / "train.csv", topic_rows(30))
    job = Job(
        model=f"hf:{tmp_path / 'bert'}",
        data=str(tmp_path / "train.csv"),
        strategy="lp_ft",
        epochs=2,
        options={"lr": 1e-3, "batch_size": 8},
        text={"label_column": "topic"},
    )

    def stop(entry: dict) -> None:
        raise KeyboardInterrupt

    whole = open_job(job).fit(out=tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        open_job(job).fit(out=tmp_path / "cut", progress=False, on_epoch=stop)
    again = resume_job(tmp_path / "cut", progress=False)
    assert again.history == whole.history
    assert any("resumed from" in note for note in again.notes)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_a_run_goes_on_without_the_weights_file_that_it_began_with(tmp_path: Path) -> None:
    # All weights, those that L2-SP pulls to too, are in the checkpoint; without one the file is needed.
    pytest.importorskip("transformers")
    save_tiny(tmp_path / "bert", "bert")
    write_csv(tmp_path / "train.csv", topic_rows(30))
    weights = tmp_path / "start.safetensors"
    save_weights(open_model(f"hf:{tmp_path / 'bert'}", num_classes=3).model, weights)
    job = Job(
        model=f"hf:{tmp_path / 'bert'}",
        data=str(tmp_path / "train.csv"),
        strategy="full:l2_sp=0.5",
        weights=str(weights),
        epochs=2,
        options={"lr": 1e-3, "batch_size": 8},
        text={"label_column": "topic"},
    )

    def stop(entry: dict) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        open_job(job).fit(out=tmp_path / "cut", progress=False, on_epoch=stop)
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    with_file = resume_job(tmp_path / "cut", progress=False)
    weights.unlink()
    said: list[str] = []
    without = resume_job(tmp_path / "other", say=said.append, progress=False)
    assert f"weights file {str(weights)!r} is gone; all weights are in the checkpoint" in said
    assert without.history == with_file.history
    for name, value in with_file.model.state_dict().items():
        assert torch.equal(without.model.state_dict()[name], value), name
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    with pytest.raises(ModelError, match=r"weights file .*start.safetensors' does not exist"):
        resume_job(tmp_path / "other", progress=False)


@pytest.mark.parametrize("counts", ["100", "1/2", "a/b/c", "1/2/3/4"])
def test_numbers_of_demo_images_are_three(counts: str) -> None:
    job = Job(model="timm:resnet18", data=f"demo:elpv:{counts}", strategy="full")
    with pytest.raises(DataError, match="expected demo:elpv or demo:elpv:TRAIN/VAL/TEST, three numbers"):
        open_job(job)


@pytest.mark.parametrize("name", ["hf:cifar10", "demo:birds"])
def test_data_that_an_image_model_cannot_take_by_name(name: str) -> None:
    with pytest.raises(DataError, match=f"data '{name}' is no set of images: named are demo:elpv alone"):
        open_job(Job(model="timm:resnet18", data=name, strategy="full", pretrained=False))


@pytest.mark.parametrize("file", ["missing.pt", "folder", "notes.txt", "cut.pt", "cut.safetensors"])
def test_wrong_weights_are_told_before_the_data_are_read(tmp_path: Path, file: str) -> None:
    # Data may take minutes; here they would be found wrong too.
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("no weights")
    torch.save({"fc.weight": torch.ones(50, 50)}, tmp_path / "whole.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"\x40\0\0\0\0\0\0\0{")
    job = Job("timm:resnet10t", str(tmp_path / "nowhere"), strategy="full", weights=str(tmp_path / file))
    with pytest.raises(ModelError, match=f"weights .*{file}"):
        open_job(job)


def test_a_published_image_classifier_keeps_the_order_of_its_classes(tmp_path: Path) -> None:
    # Sorted, the rows of its output layer would be taken for one another. With other weights, too: a run is
    # resumed without those that it began with.
    data = make_images(tmp_path / "photos", classes=("green", "red"))
    model = save_vit(tmp_path / "vit", classes=2)
    model.config.id2label = {0: "Red", 1: "Green"}
    model.save_pretrained(tmp_path / "vit")
    job = Job(model=f"hf:{tmp_path / 'vit'}", data=str(data), strategy="linear_probe", epochs=1)
    prepared = open_job(job)
    assert prepared.data.classes == prepared.data.train.classes == ("red", "green")
    folders = [Path(path).parent.name for path in prepared.data.train.paths]
    assert folders == [prepared.data.classes[target] for target in prepared.data.train.targets]
    assert torch.equal(prepared.opened.model.classifier.weight, model.classifier.weight)
    assert "classes in the order of the model's own output layer: red, green" in prepared.notes
    prepared.fit(out=tmp_path / "run", progress=False)
    assert load_run(tmp_path / "run").classes == ("red", "green")
    assert open_job(dataclasses.replace(job, pretrained=False)).data.classes == ("red", "green")

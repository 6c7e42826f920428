"""Models and data by name, as the commands that need no labels open them."""

import importlib.util

import pytest

from layerwise.choosing.named import check_source, has_labels, open_inputs
from layerwise.errors import DataError
from tiny_text import save_tiny, topic_rows


def test_texts_of_a_named_data_set_come_without_their_labels(tmp_path, monkeypatch):
    # the column of labels is read with the others, and no batch holds it
    datasets = pytest.importorskip("datasets")
    rows = [{"text": row["text"], "label": row["topic"]} for row in topic_rows(12)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: {"train": datasets.Dataset.from_list(rows)})
    save_tiny(tmp_path / "bert", "bert")
    opened, samples, layers = open_inputs(f"hf:{tmp_path / 'bert'}", "hf:topics", text={})
    assert len(samples) == 12
    batch = samples.collate([samples[0], samples[1]])
    assert set(batch) == set(opened.example_input)
    assert layers.head is not None


@pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs elpv-dataset")
def test_images_of_the_demo_come_without_their_labels():
    # of its training part, nothing split off
    opened, samples, _ = open_inputs("timm:test_efficientnet", "demo:elpv", pretrained=False, input_size=32)
    assert samples[0].shape == (3, 32, 32)
    assert opened.preprocessing.crop == (32, 32)


@pytest.mark.parametrize("source", ["missing", "demo:elpv"])
def test_a_source_that_cannot_be_opened_is_told_before_the_model_is(source):
    # data sets by name are no sources
    with pytest.raises(DataError, match=f"source '{source}' does not exist; expected a folder"):
        check_source(source, None)


@pytest.mark.parametrize(
    ("files", "labelled"),
    [
        (["a.png", "b.png"], False),
        (["2024/a.png", "2024/b/c.png", "notes/x.txt"], False),
        (["cat/a.png", "dog/b.png"], True),
        (["train/cat/a.png", "train/dog/b.png"], True),
        (["cat/a.png", "loose.png"], True),
        ([], True),
    ],
)
def test_images_in_one_folder_have_no_labels(tmp_path, files, labelled):
    # one class is no label: diagnose measures their inputs; what cannot be opened is told by opening it
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert has_labels("timm:resnet18", str(tmp_path), None) == labelled

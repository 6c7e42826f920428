"""Predictions of a run for image files: those that cannot be read, and runs that know no preprocessing."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from image_folders import make_images
from layerwise.errors import DataError, RunError
from layerwise.sources.preprocessing import Preprocessing
from layerwise.training.classification import Classification
from layerwise.training.predict import predict_images
from layerwise.training.run import Run


class Channels(nn.Module):
    """Says by the mean of red and green which is stronger."""

    def forward(self, images):
        return 20 * images.mean((2, 3))[:, :2]


RUN = Run(
    Path("runs/x"), Channels(), Classification(("red", "green")), {}, Preprocessing(crop=(8, 8), resize=None)
)


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_bad_files_are_left_out_and_listed_whatever_the_batches(batch_size: int, tmp_path: Path) -> None:
    # Also where a whole batch is bad; the others keep their order.
    folder = make_images(tmp_path / "images", count=2)
    (folder / "a.png").write_bytes(b"no image")
    (folder / "b.png").write_bytes(b"")
    images = [folder / "a.png", folder / "b.png", folder / "red/0.png", folder / "green/0.png"]
    found = predict_images(RUN, images, batch_size=batch_size, skip_bad_images=True)
    assert [(row["image"], row["label"]) for row in found.rows] == [
        (str(images[2]), "red"),
        (str(images[3]), "green"),
    ]
    assert [path for path, _ in found.skipped] == [str(images[0]), str(images[1])]
    assert not any("skip" in reason for _, reason in found.skipped)
    with pytest.raises(DataError, match=r"a.png"):
        predict_images(RUN, images, batch_size=batch_size)


def test_no_image_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    # With each file and its reason, also where bad ones are left out: nothing was predicted.
    bad = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in bad:
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 2 images can be read:\n  - image '.*a\.png' (?s:.*)b\.png"):
        predict_images(RUN, bad, batch_size=1, skip_bad_images=True)


def test_tables_are_read_by_the_column_of_training_or_the_one_that_is_named(tmp_path: Path) -> None:
    # "path" where training named none; a table without the column is told which there are.
    image = make_images(tmp_path, count=1) / "red/0.png"
    (tmp_path / "t.csv").write_text(f"file,photo\n{image},none.png\n")
    named = dataclasses.replace(RUN, about={"job": {"text": {"path_column": "file"}}})
    for run, column in ((named, None), (RUN, "file")):
        (row,) = predict_images(run, [tmp_path / "t.csv"], path_column=column).rows
        assert row["label"] == "red"
    for run in (RUN, dataclasses.replace(RUN, about={"job": {"text": None}})):
        with pytest.raises(DataError, match=r"no column 'path'; its columns are 'file', 'photo'\..*--path-c"):
            predict_images(run, [tmp_path / "t.csv"])


def test_a_run_that_knows_no_preprocessing_is_told(tmp_path: Path) -> None:
    # What to do instead is said.
    with pytest.raises(
        RunError, match=r"runs/x does not know how its images were prepared.*its predict\(\) a"
    ):
        predict_images(dataclasses.replace(RUN, preprocessing=None), [tmp_path])
    assert RUN.predict(torch.zeros(1, 3, 8, 8))[0]["label"] == "red"

"""Samples that a data set holds twice are told: with labels that differ, or in train and another part."""

import shutil
from pathlib import Path

from image_folders import make_images
from layerwise.sources.images import open_images
from layerwise.sources.preprocessing import Preprocessing
from layerwise.sources.texttable import read_texts

SMALL = Preprocessing(crop=(8, 8), resize=None)


def test_one_image_in_two_classes_and_in_two_parts(tmp_path: Path) -> None:
    # Of another name, but of the same bytes; a copy within one class and part is no fault.
    make_images(tmp_path / "train", count=4)
    make_images(tmp_path / "val", count=4)
    (note,) = open_images(tmp_path, SMALL).notes
    assert note.startswith("val: 8 images in train too, which flatters what is measured ('")
    shutil.rmtree(tmp_path / "val")
    assert not open_images(tmp_path, SMALL, val_frac=0).notes
    shutil.copy(tmp_path / "train/red/0.png", tmp_path / "train/red/again.png")
    assert not open_images(tmp_path, SMALL, val_frac=0).notes
    shutil.copy(tmp_path / "train/red/0.png", tmp_path / "train/green/also.png")
    (note,) = open_images(tmp_path, SMALL, val_frac=0).notes
    assert note.startswith("1 image with labels that contradict each other ('")
    assert "also.png' as 'green', '" in note
    assert "0.png' as 'red'" in note


def test_one_text_in_two_classes_and_in_two_parts(tmp_path: Path) -> None:
    # Pairs are compared as a whole.
    rows = ["text,pair,label,split", "one,x,a,train", "one,x,b,train", "two,x,a,train", "two,y,b,train"]
    (tmp_path / "t.csv").write_text("\n".join([*rows, "one,y,a,val", "two,x,a,val"]) + "\n")
    table = read_texts(tmp_path / "t.csv", pair_column="pair", split_column="split")
    assert table.notes == (
        "1 text with labels that contradict each other ('one' as 'a', 'one' as 'b')",
        "val: 1 text in train too, which flatters what is measured ('two')",
    )

"""Image folders and tables open as data sets, and every fault in them is named."""

import csv
import json
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

from layerwise.errors import DataError
from layerwise.sources.images import image_list, open_images
from layerwise.sources.preprocessing import Preprocessing
from layerwise.training.job import _digest

SMALL = Preprocessing(crop=(16, 16), resize=18)


def fill(folder, count=6, seed=0):
    """Make `count` small photos in a class folder."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"i{index}.png")
    return folder


def tree(root, classes=("cat", "dog"), count=6):
    for number, name in enumerate(classes):
        fill(root / name, count, seed=number)
    return root


def test_one_folder_is_split_by_seed(tmp_path):
    root = tree(tmp_path, count=10)
    data = open_images(root, SMALL, val_frac=0.2, test_frac=0.1, seed=3)
    assert data.classes == ("cat", "dog")
    assert {name: len(part) for name, part in data.parts().items()} == {"train": 14, "val": 4, "test": 2}
    every = [path for part in data.parts().values() for path in part.paths]
    assert len(set(every)) == 20
    assert data.val.counts == {"cat": 2, "dog": 2}
    again = open_images(root, SMALL, val_frac=0.2, test_frac=0.1, seed=3)
    other = open_images(root, SMALL, val_frac=0.2, test_frac=0.1, seed=4)
    assert again.val.paths == data.val.paths != other.val.paths
    assert any("4 images split off from train, seed 3" in note for note in data.notes)


def test_samples_are_tensors_with_their_class(tmp_path):
    data = open_images(tree(tmp_path), SMALL, val_frac=0.0)
    image, target = data.train[7]
    assert image.shape == (3, 16, 16)
    assert image.dtype == torch.float32
    assert target == 1
    assert data.train.paths[7].endswith("dog/i1.png")
    assert data.train.targets[7] == 1
    expected = SMALL.transform()(Image.open(data.train.paths[7]))
    assert torch.equal(image, expected)
    assert (data.val, data.test) == (None, None)


@pytest.mark.parametrize("name", ["val", "valid", "Validation", "dev"])
def test_part_folders_are_used_as_they_are(tmp_path, name):
    tree(tmp_path / "train", count=5)
    tree(tmp_path / name, count=2)
    data = open_images(tmp_path, SMALL, val_frac=0.5)
    assert (len(data.train), len(data.val), data.test) == (10, 4, None)
    assert all(f"/{name}/" in path for path in data.val.paths)


def test_a_missing_part_is_split_off_train(tmp_path):
    tree(tmp_path / "train", count=10)
    tree(tmp_path / "test", count=2)
    data = open_images(tmp_path, SMALL, val_frac=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)


def test_augmentation_is_for_train_only(tmp_path):
    data = open_images(tree(tmp_path), SMALL, val_frac=0.5, augment="light")
    assert (data.train.deterministic, data.val.deterministic) == (False, True)
    assert not torch.equal(data.train[0][0], data.train[0][0])
    plain = data.train.plain()
    assert plain.deterministic
    assert torch.equal(plain[0][0], plain[0][0])
    assert not data.train.deterministic  # the original is as it was


def test_sets_pickle_and_load_in_workers(tmp_path):
    data = open_images(tree(tmp_path), SMALL, val_frac=0.0)
    again = pickle.loads(pickle.dumps(data.train))
    assert torch.equal(again[3][0], data.train[3][0])
    batches = list(DataLoader(data.train, batch_size=5, num_workers=2))
    assert [len(targets) for _, targets in batches] == [5, 5, 2]
    assert torch.equal(batches[0][0][2], data.train[2][0])


def test_subset_keeps_samples_and_settings(tmp_path):
    data = open_images(tree(tmp_path), SMALL, val_frac=0.0)
    part = data.train.subset([8, 1])
    assert part.paths == (data.train.paths[8], data.train.paths[1])
    assert part.targets == (1, 0)
    assert torch.equal(part[0][0], data.train[8][0])


def test_classes_are_numbered_as_a_model_has_them(tmp_path):
    # A model may know more classes than a folder has, and have them in another order.
    whole = open_images(tree(tmp_path), SMALL, val_frac=0.0).train
    names = [*reversed(whole.classes), "none of them"]
    other = whole.in_order(names)
    assert [other.classes[t] for t in other.targets] == [whole.classes[t] for t in whole.targets]
    assert other[0][1] == other.targets[0] != whole.targets[0]
    with pytest.raises(DataError, match=f"no class {whole.classes[0]} among {whole.classes[1]}"):
        whole.in_order(whole.classes[1:])


def test_fingerprint_changes_with_files_labels_and_transform(tmp_path):
    root = tree(tmp_path)
    first = open_images(root, SMALL, val_frac=0.0).train
    prints = {first.fingerprint()}
    assert open_images(root, SMALL, val_frac=0.0).train.fingerprint() in prints
    prints.add(open_images(root, SMALL.at(8), val_frac=0.0).train.fingerprint())
    prints.add(open_images(root, SMALL, val_frac=0.0, augment="flip").train.fingerprint())
    prints.add(first.subset(range(5)).fingerprint())
    Image.new("RGB", (30, 30)).save(first.paths[0])
    prints.add(first.fingerprint())
    assert len(prints) == 5


def table(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(rows)
    return path


def test_a_table_of_paths_and_labels(tmp_path):
    tree(tmp_path / "photos")
    rows = [
        (f"photos/{name}/i{n}.png", name, "train" if n < 4 else "dev")
        for name in ("cat", "dog")
        for n in range(6)
    ]
    source = table(tmp_path / "t.tsv", [("file", "kind", "part"), *rows])
    data = open_images(source, SMALL, path_column="file", label_column="kind", split_column="part")
    assert (len(data.train), len(data.val), data.classes) == (8, 4, ("cat", "dog"))
    split = open_images(source, SMALL, path_column="file", label_column="kind", val_frac=0.25)
    assert (len(split.train), len(split.val)) == (8, 4)
    with pytest.raises(DataError, match=r"no column 'path'.*'file', 'kind', 'part'"):
        open_images(source, SMALL, label_column="kind")


def test_bad_rows_of_a_table_are_all_named(tmp_path):
    tree(tmp_path / "p")
    source = table(
        tmp_path / "t.csv", [("path", "label", "s"), ("", "a", "train"), ("p", "", "val"), ("p", "a", "x")]
    )
    with pytest.raises(DataError) as caught:
        open_images(source, SMALL, split_column="s")
    assert "row 1 has no path" in str(caught.value)
    assert "row 2 has no label" in str(caught.value)
    assert "row 3 has 'x'" in str(caught.value)
    missing = table(tmp_path / "m.csv", [("path", "label"), ("p/cat/i0.png", "a"), ("p/none.png", "b")])
    with pytest.raises(DataError, match=r"1 of 2 images cannot be read(?s:.*)none.png' does not exist"):
        open_images(missing, SMALL)


def test_a_table_without_training_images(tmp_path):
    # all rows in val, and none that can be used; the message is about tables
    tree(tmp_path / "p")
    rows = [(f"p/{name}/i0.png", name, "val") for name in ("cat", "dog")]
    source = table(tmp_path / "t.csv", [("path", "label", "s"), *rows])
    with pytest.raises(DataError, match="the train part has no images"):
        open_images(source, SMALL, split_column="s")
    table(source, [("path", "label"), ("p/cat/i0.png", "")])
    with pytest.raises(DataError, match="there are no images; expected rows with a path and a label"):
        open_images(source, SMALL, skip_bad_rows=True)


def test_labels_of_a_table_are_read_as_those_of_texts(tmp_path):
    # Blanks and ".0" make no new class, and a missing label is none.
    tree(tmp_path / "p")
    csv_labels = table(
        tmp_path / "t.csv",
        [
            ("path", "label"),
            *((f"p/{c}/i{n}.png", c + " " * (n % 2)) for c in ("cat", "dog") for n in range(6)),
        ],
    )
    assert open_images(csv_labels, SMALL, val_frac=0.0).classes == ("cat", "dog")
    rows = [{"path": f"p/{c}/i{n}.png", "label": v} for c, v in (("cat", 10.0), ("dog", 2)) for n in range(6)]
    lines = tmp_path / "t.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    assert open_images(lines, SMALL, val_frac=0.0).classes == ("10", "2")
    lines.write_text("\n".join(map(json.dumps, [*rows, {"path": "p/cat/i0.png", "label": float("nan")}])))
    with pytest.raises(DataError, match="row 13 has no label"):
        open_images(lines, SMALL)


def test_links_are_followed_and_dangling_ones_are_bad_images(tmp_path):
    # What a link points to is data like any other, and what it fails to point to is missed.
    root = tree(tmp_path / "photos")
    more = fill(tmp_path / "more", 3)
    (root / "cat" / "linked").symlink_to(more)
    (more / "back").symlink_to(more)  # in a circle
    assert open_images(root, SMALL, val_frac=0.0).train.counts == {"cat": 9, "dog": 6}
    assert len(image_list([root / "cat"], SMALL)) == 9
    (root / "dog" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(DataError, match=r"1 of 16 images cannot be read(?s:.*)gone.png"):
        open_images(root, SMALL)
    data = open_images(root, SMALL, val_frac=0.0, skip_bad_images=True)
    assert [path for path, _ in data.skipped] == [str(root / "dog" / "gone.png")]


def test_a_link_to_a_folder_above_brings_no_images_of_other_classes(tmp_path):
    # It is a circle too: the whole data set would be one class.
    root = tree(tmp_path / "photos")
    (root / "cat" / "up").symlink_to("..")
    (root / "cat" / "deep").mkdir()
    (root / "cat" / "deep" / "top").symlink_to(tmp_path)
    assert open_images(root, SMALL, val_frac=0.0).train.counts == {"cat": 6, "dog": 6}


@pytest.mark.parametrize("inside", ["", "train"], ids=["flat", "parts"])
def test_a_class_folder_that_leads_nowhere_is_missed(tmp_path, inside):
    # A disk that is not mounted must not become a run with one class fewer.
    root = tmp_path / "photos"
    tree(root / inside)
    (root / inside / "rat").symlink_to(tmp_path / "nowhere")
    with pytest.raises(DataError, match="rat' is a link to nothing"):
        open_images(root, SMALL)
    (root / inside / "rat").unlink()
    (root / inside / "notes.txt").symlink_to(tmp_path / "nowhere")
    assert open_images(root, SMALL).classes == ("cat", "dog")


def test_unreadable_images_are_named_or_left_out(tmp_path):
    root = tree(tmp_path)
    (root / "cat" / "bad.jpg").write_text("no image")
    content = (root / "dog" / "i0.png").read_bytes()
    (root / "dog" / "short.png").write_bytes(content[:-40])
    with pytest.raises(DataError) as caught:
        open_images(root, SMALL)
    for part in ("2 of 14 images cannot be read", "bad.jpg", "short.png", "--skip-bad-images"):
        assert part in str(caught.value)
    data = open_images(root, SMALL, val_frac=0.0, skip_bad_images=True)
    assert len(data.train) == 12
    assert [path.rpartition("/")[2] for path, _ in data.skipped] == ["bad.jpg", "short.png"]
    assert all(reason for _, reason in data.skipped)
    with pytest.raises(DataError, match=r"1 of 14(?s:.*)bad.jpg"):
        open_images(root, SMALL, check="header")  # finds no truncation, as it says


def test_a_file_that_breaks_later_is_named_when_it_is_read(tmp_path):
    data = open_images(tree(tmp_path), SMALL, val_frac=0.0)
    (tmp_path / "cat" / "i2.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"i2\.png"):
        data.train[2]


def test_a_class_whose_images_are_all_bad_is_not_forgotten(tmp_path):
    root = tree(tmp_path)
    (root / "owl").mkdir()
    (root / "owl" / "o.png").write_text("x")
    with pytest.raises(DataError, match="class 'owl' of train has no readable image left"):
        open_images(root, SMALL, skip_bad_images=True)


def test_a_check_that_there_is_not_and_no_paths_at_all(tmp_path):
    # both are mistakes of a caller in Python
    with pytest.raises(DataError, match="check is 'quick'; expected 'auto', 'full' or 'header'"):
        open_images(tree(tmp_path), SMALL, check="quick")
    with pytest.raises(DataError, match="no paths were given"):
        image_list([], SMALL)


def test_only_bad_images_are_not_taken_for_a_missing_folder(tmp_path):
    # the message says what is wrong with them, and not that there should be folders
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_text("x")
    with pytest.raises(DataError, match=r"(?s)'cat' of train has no readable.*'dog'") as caught:
        open_images(tmp_path, SMALL, skip_bad_images=True)
    assert "expected a folder" not in str(caught.value)


def test_all_problems_of_a_tree_are_in_one_message(tmp_path):
    tree(tmp_path / "train", classes=("cat", "dog", "owl"))
    tree(tmp_path / "val", classes=("cat", "dogs"))
    (tmp_path / "train" / "empty").mkdir()
    with pytest.raises(DataError) as caught:
        open_images(tmp_path, SMALL)
    text = str(caught.value)
    assert "empty' has no images" in text
    assert "class 'dogs' is in val and not in train. Did you mean 'dog'" in text
    assert "class 'dog' is in train and not in val" in text
    assert "class 'owl' is in train and not in val" in text


def test_folders_that_are_no_data(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(DataError, match=r"does not exist\. Did you mean 'photos'"):
        open_images(tmp_path / "photo", SMALL)
    with pytest.raises(DataError, match="there are no images"):
        open_images(tmp_path / "photos", SMALL)
    fill(tmp_path / "photos" / "one")
    with pytest.raises(DataError, match=r"one class \('one'\)"):
        open_images(tmp_path / "photos", SMALL)
    fill(tmp_path / "flat")
    with pytest.raises(DataError, match="holds images itself"):
        open_images(tmp_path / "flat", SMALL)
    tree(tmp_path / "parts" / "val")
    with pytest.raises(DataError, match="no train folder"):
        open_images(tmp_path / "parts", SMALL)
    tree(tmp_path / "two" / "train")
    tree(tmp_path / "two" / "val")
    tree(tmp_path / "two" / "valid")
    with pytest.raises(DataError, match=r"two folders for one part \(val, valid\)"):
        open_images(tmp_path / "two", SMALL)
    tree(tmp_path / "hole" / "train")
    (tmp_path / "hole" / "val").mkdir()
    with pytest.raises(DataError, match="the val part has no images"):
        open_images(tmp_path / "hole", SMALL)


def test_other_files_are_counted_and_hidden_ones_ignored(tmp_path):
    root = tree(tmp_path)
    (root / "cat" / "notes.txt").touch()
    (root / "cat" / ".hidden.png").touch()
    (root / ".git").mkdir()
    data = open_images(root, SMALL, val_frac=0.0)
    assert len(data.train) == 12
    assert "2 files that are no images were left out" in data.notes


def test_images_and_folders_that_belong_to_no_class_are_told(tmp_path):
    root = tree(tmp_path / "photos")
    fill(root, count=2)
    assert "2 images outside of the class folders were left out" in open_images(root, SMALL).notes
    for part in ("train", "val"):
        tree(tmp_path / "parts" / part)
    fill(tmp_path / "parts" / "held out" / "cat")
    fill(tmp_path / "parts" / "train", count=1)
    notes = open_images(tmp_path / "parts", SMALL).notes
    assert "1 image outside of the class folders was left out" in notes
    assert "'held out' beside the folders of the parts was left out" in notes


def test_what_browsers_save_as_jfif_is_an_image(tmp_path):
    root = tree(tmp_path)
    Image.new("RGB", (20, 24)).save(root / "cat" / "photo.jfif")
    assert len(open_images(root, SMALL, val_frac=0.0).train) == 13


@pytest.mark.skipif(sys.platform != "linux", reason="file names are bytes")
def test_a_class_folder_whose_name_is_no_text_is_told(tmp_path):
    # a run could not write it down; a file's name of such bytes does no harm
    tree(tmp_path, classes=("cat", "dog"))
    shutil.copy(tmp_path / "cat" / "i0.png", os.fsencode(tmp_path / "cat") + b"/caf\xe9.png")
    whole = _digest(open_images(tmp_path, SMALL, val_frac=0).train)
    assert len(whole) == 16
    (tmp_path / "owl").mkdir()
    os.rename(os.fsencode(tmp_path / "dog"), os.fsencode(tmp_path) + b"/caf\xe9")
    with pytest.raises(
        DataError, match=r"caf\\udce9' is no text in utf-8.*rename it(?s:.*)owl' has no images"
    ):
        open_images(tmp_path, SMALL)


def test_images_for_prediction_have_no_labels(tmp_path):
    fill(tmp_path / "a", 2)
    found = image_list([tmp_path / "a", tmp_path / "a" / "i1.png"], SMALL, classes=("x", "y"))
    assert len(found) == 3
    assert found[2][1] == -1
    (tmp_path / "e").mkdir()
    with pytest.raises(DataError) as caught:
        image_list([tmp_path / "e", tmp_path / "none.png"], SMALL)
    assert "has no images" in str(caught.value)
    assert "none.png' does not exist" in str(caught.value)


def test_a_table_of_paths_needs_no_labels(tmp_path):
    fill(tmp_path / "a", 3)
    table(tmp_path / "t.csv", [["file"], ["a/i2.png"], ["a/i0.png"]])
    found = image_list([tmp_path / "t.csv", tmp_path / "a"], SMALL, path_column="file")
    assert [path[-6:-4] for path in found.paths] == ["i2", "i0", "i0", "i1", "i2"]
    with pytest.raises(DataError, match=r"'path'.*--path-column"):
        image_list([tmp_path / "t.csv"], SMALL)
    table(tmp_path / "t.csv", [["path", "n"], ["a/i0.png", "1"], ["", "2"]])
    with pytest.raises(DataError, match="row 2 has no path"):
        image_list([tmp_path / "t.csv"], SMALL)


def test_classes_and_samples_are_those_of_torchvisions_folders(tmp_path):
    # Weights trained on an ImageFolder keep their meaning.
    tree(tmp_path, classes=("10", "9", "Zebra", "ape"), count=12)
    theirs = datasets.ImageFolder(tmp_path)
    ours = open_images(tmp_path, SMALL, val_frac=0.0).train
    assert list(ours.classes) == theirs.classes
    assert sorted(zip(ours.paths, ours.targets)) == sorted(theirs.samples)

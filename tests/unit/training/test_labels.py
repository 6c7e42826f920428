"""Labels are found where data sets keep them, and rare classes can weigh more."""

from itertools import chain

import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset

from layerwise.errors import DataError
from layerwise.training.data import EpochBatches
from layerwise.training.labels import balanced_class_weights, labels_of, sampling_weights


class Samples(Dataset):
    """Tells its labels only sample by sample."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int):
        return torch.zeros(3), index % 2


def test_labels_are_found_where_data_sets_keep_them() -> None:
    # targets, tensors, subsets, mappings and plain samples.
    data = TensorDataset(torch.arange(6.0), torch.arange(6) % 2)
    assert labels_of(data).tolist() == [0, 1, 0, 1, 0, 1]
    assert labels_of(Subset(data, [1, 3])).tolist() == [1, 1]
    assert labels_of(Samples()).tolist() == [0, 1] * 5
    assert labels_of([{"labels": 2}, {"labels": 0}]).tolist() == [2, 0]

    class Folder(Samples):
        targets = list(range(10))  # noqa: RUF012

    assert labels_of(Folder()).tolist() == list(range(10))
    swapped = Folder()
    swapped.target_transform = lambda label: 9 - label  # what its samples come with
    assert labels_of(swapped).tolist() == list(range(9, -1, -1))
    swapped.targets = torch.arange(10)
    assert labels_of(swapped).tolist() == list(range(9, -1, -1))
    with pytest.raises(DataError, match="one integer each"):
        labels_of(TensorDataset(torch.zeros(3), torch.zeros(3)))


def test_rare_classes_weigh_more() -> None:
    # Balanced weights give each class the same total; a class without samples has none.
    labels = torch.tensor([0] * 8 + [1] * 2)
    weights = balanced_class_weights(labels, ["a", "b"])
    assert weights[0] * 8 == pytest.approx(weights[1] * 2)
    assert sampling_weights(labels)[:8].sum() == pytest.approx(sampling_weights(labels)[8:].sum())
    with pytest.raises(DataError, match="'c'"):
        balanced_class_weights(labels, ["a", "b", "c"])
    order = EpochBatches(10_000, 10, weights=sampling_weights(labels.repeat(1000)), seed=0)
    drawn = labels.repeat(1000)[torch.tensor(list(chain.from_iterable(order)))]
    assert drawn.float().mean() == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize(
    ("sample", "told"),
    [
        ((0, 0.7), r"float32 of shape \(2,\)"),  # was taken for 0
        ((0, torch.tensor([0, 1])), "no single numbers"),
        ({"labels": [1, 0, 1]}, r"int64 of shape \(2, 3\)"),
        ((0, "cat"), "no single numbers"),
        ({"input_ids": [1]}, "no single numbers"),
        ((0,), "no single numbers"),
    ],
)
def test_a_sample_with_another_label_than_one_integer_is_told(sample: object, told: str) -> None:
    # Of several labels, numbers, tags: torch and Python would tell it by errors of their own.
    with pytest.raises(
        DataError, match=f"labels are .*{told}.* for 2 samples; expected one integer each.*out: --sampler"
    ):
        labels_of([sample, sample])


def test_a_label_that_is_no_class_number_is_told_before_it_is_counted() -> None:
    # -1 is what data sets of images call a sample without a label.
    with pytest.raises(DataError, match="labels go from -1 to 1; expected 0 and above"):
        sampling_weights(torch.tensor([0, 1, -1]))
    with pytest.raises(DataError, match="labels go from -1 to 1; expected 0 to 1"):
        balanced_class_weights(torch.tensor([0, 1, -1]), ["a", "b"])
    with pytest.raises(DataError, match="labels go from 0 to 5; expected 0 to 1"):
        balanced_class_weights(torch.tensor([0, 1, 5]), ["a", "b"])


def test_labels_stand_in_a_column_of_a_table() -> None:
    # Hugging Face's data sets: a column by name, without loading a sample.
    class Table(dict):
        column_names: list[str]

        def __len__(self) -> int:
            return 3

    for name in ("labels", "label"):
        table = Table({name: [2, 0, 1], "text": ["a", "b", "c"]})
        table.column_names = ["text", name]
        assert labels_of(table).tolist() == [2, 0, 1]

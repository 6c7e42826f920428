"""Fingerprints of data: the same content gives the same, anything else another one."""

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from layerwise.training.fingerprint import fingerprint


def test_a_fingerprint_tells_data_apart_and_draws_nothing():
    # the same content gives the same; another value, label or order does not; a random data set has none
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return x + torch.randn(()), y

    x, y = torch.arange(80.0).reshape(40, 2), torch.arange(40) % 2
    before = torch.get_rng_state()
    first = fingerprint(TensorDataset(x, y))
    assert first == fingerprint(DataLoader(TensorDataset(x.clone(), y.clone())))
    others = [TensorDataset(x + 1, y), TensorDataset(x, 1 - y), TensorDataset(x.flip(0), y), TensorDataset(x)]
    assert len({first, *map(fingerprint, others)}) == 5
    assert fingerprint(Noisy(x, y)) is None
    assert fingerprint([{"ids": [1, 2], "name": "a"}]) != fingerprint([{"ids": [1, 3], "name": "a"}])
    assert torch.equal(before, torch.get_rng_state())


def test_arrays_images_and_streams():
    # what no tensor holds is told apart by its values too; a stream is not read
    class Stream(IterableDataset):
        def __iter__(self):
            yield from range(3)

        def __len__(self):
            return 3

    array, image = np.zeros((2, 2)), Image.new("L", (2, 2))
    assert fingerprint([(array, 0)]) == fingerprint([(array.copy(), 0)]) != fingerprint([(array + 1, 0)])
    assert fingerprint([(array, np.int64(0))]) != fingerprint([(array, np.int64(1))])
    assert fingerprint([image]) == fingerprint([image.copy()]) != fingerprint([Image.new("L", (2, 2), 9)])
    assert fingerprint(Stream()) is None

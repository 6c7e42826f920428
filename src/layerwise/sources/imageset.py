"""`ImageSet`: image files with a class each, as a map-style data set."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from layerwise.errors import DataError, shorten
from layerwise.sources.imagefile import read_image
from layerwise.sources.preprocessing import Augment, Preprocessing

if TYPE_CHECKING:
    from torch import Tensor


class ImageSet:
    """A map-style data set: ``set[i]`` is ``(image tensor, class number)``.

    Attributes:
        paths: of the image files, in order.
        targets: class number of each; -1 where it is not known (see `image_list`).
        classes: name of each class number.
        preprocessing: how the model wants its images.
        augment: what is varied at random.
        deterministic: whether ``set[i]`` is the same tensor each time, so that features can be cached.
    """

    def __init__(
        self,
        paths: Sequence[str | Path],
        targets: Sequence[int],
        classes: Sequence[str],
        preprocessing: Preprocessing,
        *,
        augment: Augment = "none",
    ) -> None:
        self.paths = tuple(map(str, paths))
        self.targets = tuple(targets)
        self.classes = tuple(classes)
        self.preprocessing = preprocessing
        self.augment: Augment = augment
        self._transform = preprocessing.transform(augment)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return the image as a float tensor (C, H, W) and its class number.

        Raises:
            DataError: the file has become unreadable; the message names it.
        """
        image = read_image(self.paths[index], channels=self.preprocessing.channels)
        return self._transform(image), self.targets[index]

    @property
    def deterministic(self) -> bool:
        """Whether an index gives the same tensor each time."""
        return self.augment == "none"

    @property
    def counts(self) -> dict[str, int]:
        """Number of images of each class, in the order of `classes`."""
        found = Counter(self.targets)
        return {name: found[number] for number, name in enumerate(self.classes)}

    def plain(self) -> ImageSet:
        """Return the same images without augmentation, for measuring and caching."""
        other = copy.copy(self)
        other.augment = "none"
        other._transform = self.preprocessing.transform("none")
        return other

    def subset(self, indices: Sequence[int]) -> ImageSet:
        """Return the images at `indices`, in that order, with all else the same."""
        other = copy.copy(self)
        other.paths = tuple(self.paths[index] for index in indices)
        other.targets = tuple(self.targets[index] for index in indices)
        return other

    def in_order(self, classes: Sequence[str]) -> ImageSet:
        """Return the same images, their classes numbered as in `classes`: those of a model, for example.

        Args:
            classes: of all the names there are; may have more.

        Raises:
            DataError: one of the set's own is missing.
        """
        number = {name: index for index, name in enumerate(classes)}
        if missing := [name for name in self.classes if name not in number]:
            raise DataError(f"no class {shorten(missing)} among {shorten(classes)}; leave its images out.")
        other = copy.copy(self)
        other.classes = tuple(classes)
        other.targets = tuple(number[self.classes[target]] for target in self.targets)
        return other

    def fingerprint(self) -> str:
        """Return a short hash of what the set yields: files (path, size, time), labels, transform.

        It is another one when a file was changed, a label moved or the transform differs. Augmented sets
        yield something else each time; their fingerprint says only from what.
        """
        settings = {"preprocessing": self.preprocessing.to_dict(), "augment": self.augment}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        for path, target in zip(self.paths, self.targets, strict=True):
            status = os.stat(path)
            digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\0{target}\0".encode())
        return digest.hexdigest()[:32]

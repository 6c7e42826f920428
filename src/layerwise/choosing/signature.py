"""`Signature`: a summary of a source domain in kilobytes, to ship beside a checkpoint.

For each layer group it keeps the mean and the variance of every feature, and a *sketch*: up to 128 samples,
standardised and projected on 32 random directions, in half precision. So the covariance is kept as a
diagonal plus its image in 32 random directions: not as leading eigenvectors, because directions fitted to
few samples fit those samples better than new ones of the same domain, which then would look shifted.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import nn

from layerwise.choosing.distances import Array
from layerwise.choosing.features import Features, mapped_features, require_alike
from layerwise.choosing.taps import Floats
from layerwise.errors import DataError, ModelError
from layerwise.files import write_file
from layerwise.layers.layermap import LayerMap

FORMAT = "1"
SKETCH_DIMENSIONS = 32
SKETCH_SAMPLES = 128
FLOOR = 0.1
"""Share of the average variance that is added to each feature's own, so that a dead one cannot dominate."""


@dataclass(frozen=True)
class GroupSketch:
    """What is kept of one layer group.

    Attributes:
        mean: float32[d].
        var: float32[d], over samples, unbiased.
        sketch: float32[samples, min(d, 32)]: see `project`.
    """

    mean: Floats
    var: Floats
    sketch: Floats


@dataclass(frozen=True)
class Signature:
    """A source domain as seen by one model.

    Attributes:
        model_class: of the model that made it.
        granularity: of its layer map.
        samples: number of samples the means and variances are taken over.
        shape: of one input, without the batch.
        modality: ``"image"``, ``"tokens"`` or ``"values"``.
        groups: layer group -> its sketch, input to output.
        inputs: figures for up to 128 samples, by name: of `layerwise.choosing.inputs` for images;
            ``"length"``, ``"fertility"`` and ``"unknown"`` of `layerwise.choosing.tokens` for texts (the
            length alone without a tokenizer); empty for all else.
    """

    model_class: str
    granularity: str
    samples: int
    shape: tuple[int, ...]
    modality: str
    groups: dict[str, GroupSketch]
    inputs: dict[str, npt.NDArray[np.float64]]

    def save(self, path: str | Path) -> Path:
        """Write the signature to a safetensors file, whole or not at all; return its path.

        The sketch is rounded to half precision. Reading it executes nothing.
        """
        from safetensors.numpy import save_file

        tensors: dict[str, npt.NDArray[Any]] = {}
        for name, group in self.groups.items():
            tensors[f"groups/{name}/mean"] = group.mean
            tensors[f"groups/{name}/var"] = group.var
            tensors[f"groups/{name}/sketch"] = group.sketch.astype(np.float16)
        for name, values in self.inputs.items():
            tensors[f"inputs/{name}"] = values.astype(np.float32)
        about = {
            "model_class": self.model_class,
            "granularity": self.granularity,
            "samples": self.samples,
            "shape": list(self.shape),
            "modality": self.modality,
            "groups": list(self.groups),
            "inputs": list(self.inputs),
        }
        target = Path(path)
        metadata = {"layerwise_signature": FORMAT, "about": json.dumps(about)}
        write_file(target, lambda temporary: save_file(tensors, str(temporary), metadata))
        return target

    @classmethod
    def load(cls, path: str | Path) -> Signature:
        """Read what `save` wrote.

        Args:
            path: of the file.

        Raises:
            DataError: there is no such file, it is damaged, or it is no signature of this format.
        """
        from safetensors import SafetensorError, safe_open

        source = Path(path)
        if not source.is_file():
            raise DataError(
                f"there is no signature at {source}. Make one: "
                f"layerwise signature MODEL --data SOURCE -o {source}"
            )
        try:
            with safe_open(str(source), framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            if metadata.get("layerwise_signature") != FORMAT:
                raise DataError(
                    f"{source} is a safetensors file but no layerwise signature of format {FORMAT} (its "
                    f"metadata are {sorted(metadata)}). Make one: layerwise signature MODEL --data SOURCE"
                )
            about = json.loads(metadata["about"])
            groups = {
                name: GroupSketch(
                    *(
                        tensors[f"groups/{name}/{part}"].astype(np.float32)
                        for part in ("mean", "var", "sketch")
                    )
                )
                for name in about["groups"]
            }
            inputs = {name: tensors[f"inputs/{name}"].astype(np.float64) for name in about["inputs"]}
            return cls(
                model_class=about["model_class"],
                granularity=about["granularity"],
                samples=about["samples"],
                shape=tuple(about["shape"]),
                modality=about["modality"],
                groups=groups,
                inputs=inputs,
            )
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{source} cannot be read as a signature ({type(error).__name__}: {error}). Make it again: "
                "layerwise signature MODEL --data SOURCE"
            ) from error


def signature(
    model: nn.Module,
    data: Any,
    *,
    layers: LayerMap | None = None,
    example_input: Any = None,
    max_samples: int | None = 512,
    batch_size: int = 32,
    collate: Any = None,
    seed: int = 0,
) -> Signature:
    """Return a signature of a source domain: what `model` makes of `data` at every layer group.

    Make it where the source data are, save it beside the checkpoint, and whoever fine-tunes the model can
    measure how far their own data are without ever seeing yours. It holds averages and random projections
    of features, no inputs; that is small, not anonymous.

    Args:
        model: the pretrained network; unchanged.
        data: of the source; as for `layerwise.choosing.features.collect_features`, labels are not used.
        layers: its layer map; one at granularity ``"stages"`` is made when None.
        example_input: to make the map from; None takes two samples of the data.
        max_samples: so many samples are drawn; None takes all.
        batch_size: of data that is no loader.
        collate: makes a batch of samples, of data that is no loader.
        seed: of the draw.

    Raises:
        DataError: fewer than two samples, or data of an unknown kind.
        ModelError: no layer group hands on one tensor with a row for each sample.
    """
    features, layers = mapped_features(
        model,
        data,
        layers,
        example_input,
        max_samples=max_samples,
        batch_size=batch_size,
        collate=collate,
        norms=False,
        seed=seed,
    )
    return summarise(features, layers, seed=seed)


def summarise(features: Features, layers: LayerMap, *, seed: int = 0) -> Signature:
    """Return the signature of features that are collected already.

    Args:
        features: of the source.
        layers: the map they were collected with.
        seed: of the draw of the samples in the sketch.

    Raises:
        DataError: fewer than two samples.
    """
    if features.samples < 2:
        raise DataError(
            f"a signature needs at least two samples, better some hundred; got {features.samples}."
        )
    drawn = np.sort(np.random.default_rng(seed).permutation(features.samples)[:SKETCH_SAMPLES])
    groups = {}
    for name, values in features.groups.items():
        mean, var = values.mean(0, dtype=np.float64), values.var(0, dtype=np.float64, ddof=1)
        groups[name] = GroupSketch(
            mean=mean.astype(np.float32),
            var=var.astype(np.float32),
            sketch=project(values[drawn], mean, var).astype(np.float32),
        )
    return Signature(
        model_class=layers.model_class,
        granularity=layers.granularity,
        samples=features.samples,
        shape=features.shape,
        modality=features.modality,
        groups=groups,
        inputs={name: values[drawn] for name, values in features.inputs.items()},
    )


def project(values: npt.ArrayLike, mean: npt.ArrayLike, var: npt.ArrayLike) -> Array:
    """Return features standardised by the source and projected on random orthonormal directions.

    ``(x - mean) / sqrt(var + 0.1 average(var))``, then times a fixed orthonormal matrix of shape
    (d, min(d, 32)). Distances between samples shrink by ``sqrt(32 / d)`` on average and keep their order
    closely (Johnson and Lindenstrauss). The matrix is a function of d alone: numpy keeps the stream of
    `RandomState` the same in all versions, so it need not be stored.

    Args:
        values: float[n, d].
        mean: of the source, float[d].
        var: of the source, float[d].
    """
    x = np.asarray(values, dtype=np.float64)
    standard = (x - np.asarray(mean, dtype=np.float64)) / np.sqrt(spread(var))
    d = x.shape[1]
    if d <= SKETCH_DIMENSIONS:
        return standard
    directions = np.linalg.qr(np.random.RandomState(0).standard_normal((d, SKETCH_DIMENSIONS)))[0]
    result: Array = standard @ directions
    return result


def spread(var: npt.ArrayLike) -> Array:
    """Return variances with the floor that keeps dead features from dominating; 1 where all are 0."""
    v = np.asarray(var, dtype=np.float64)
    floor = FLOOR * float(v.mean())
    result: Array = v + (floor if floor > 0 else 1.0)
    return result


def shared_groups(found: Signature, features: Features, layers: LayerMap) -> set[str]:
    """Return the layer groups that can be compared: all, but for a head of another width.

    Refuses a signature that was not made with this model, this layer map and inputs of this kind.

    Raises:
        DataError: modality or input shape (of all but texts) differ.
        ModelError: the layer groups, or the widths of those before the head, differ.
    """
    require_alike(found.modality, found.shape, features)
    widths = {name: len(group.mean) for name, group in found.groups.items()}
    ours = {name: values.shape[1] for name, values in features.groups.items()}
    head = layers.head.name if layers.head is not None else None
    shared = {name for name in widths.keys() & ours.keys() if widths[name] == ours[name]}
    if odd := sorted((widths.keys() | ours.keys()) - shared - ({head} if shared else set())):
        raise ModelError(
            f"the signature was made with {found.model_class or 'another model'} at granularity "
            f"{found.granularity!r}; its groups differ from this model's ({layers.model_class}, "
            f"{layers.granularity!r}) in {', '.join(odd[:6])}{', ...' if len(odd) > 6 else ''}. "
            "Use a signature of the same model and granularity."
        )
    return shared

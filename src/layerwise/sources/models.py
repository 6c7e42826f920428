"""Open a model by name: ``timm:NAME``, ``torchvision:NAME``, ``hf:PATH_OR_ID``, ``file.py:function``.

What differs between the libraries ends here: the caller gets the network with its weights, an output
layer for the classes at hand, and the preprocessing that the weights were trained with.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from layerwise.errors import ModelError
from layerwise.sources.fetching import fetch, hub_if_found, read_folder
from layerwise.sources.fitting import Mismatched, fit_head, load_file, output_layers, replace_head
from layerwise.sources.modelnames import TIMM_FOLDER, TIMM_HUB, check_timm, check_torchvision, split_spec
from layerwise.sources.opened import OpenedModel, Task, example_image
from layerwise.sources.preprocessing import Preprocessing, from_timm, from_torchvision
from layerwise.sources.userfile import call_function

if TYPE_CHECKING:
    from torch import nn

DEFAULT_PREPROCESSING = Preprocessing(crop=(224, 224), resize=256)
GREY_PREPROCESSING = Preprocessing(crop=(224, 224), resize=256, mean=(0.449,), std=(0.226,))


def open_model(
    spec: str,
    *,
    num_classes: int | None = None,
    weights: str | Path | None = None,
    pretrained: bool = True,
    input_size: int | tuple[int, int] | None = None,
    preprocessing: Preprocessing | None = None,
    task: Task | None = None,
    problem: str | None = None,
    mismatched: Mismatched = "error",
) -> OpenedModel:
    """Return the model called `spec`, its weights loaded and its output layer fit for `num_classes`.

    Args:
        spec: ``timm:NAME`` (timm's own ``timm:hf-hub:ID`` and ``timm:local-dir:FOLDER`` too),
            ``torchvision:NAME``, ``hf:FOLDER`` or ``hf:ID`` (transformers), or
            ``path/to/file.py:function``, your own function, which returns an ``nn.Module`` or a pair of
            one and its `Preprocessing`. The file is run, as by ``import``; code that comes with a model
            on a hub never is.
        num_classes: how many outputs are wanted. Where the model has another number, its output layer is
            replaced by a new one (randomly initialised from torch's global generator). None keeps it.
        weights: a file to load instead of the library's own: ``.safetensors``, or ``.pth`` and kin,
            which are refused if they hold more than tensors. Names may carry the prefix of a wrapper
            (``module.``); if names differ altogether, tensors are paired in order where shapes and last
            name components agree for every pair, and `notes` says so.
        pretrained: load the library's own pretrained weights (downloaded, or from its local store) when
            there are no `weights`. False gives a random initialisation.
        input_size: side, or height and width, in pixels, instead of the model's own.
        preprocessing: of images, instead of what the model's library names.
        task: for ``hf:``, what the model is for. None reads it from a configuration that names a classifier
            of images, texts or tokens; any other model, a language model too, becomes a classifier of images
            or texts with a new output layer.
        problem: for ``hf:`` text classification, transformers' ``problem_type``:
            ``"single_label_classification"``, ``"multi_label_classification"`` or ``"regression"``.
        mismatched: what to do with `weights` of another number of classes than asked for:
            ``"error"``, or ``"drop_head"``: load all but the output layer, and make that anew.

    Raises:
        ModelError: there is no such model (the closest names are listed), its weights cannot be
            fetched, read, or fitted to it, or `weights` has other classes.
        MissingExtraError: the library is not installed.
    """
    kind, name = split_spec(spec)
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}; expected at least 1.")
    if kind == "hf":
        from layerwise.sources import huggingface

        return huggingface.open_model(
            spec,
            name,
            num_classes=num_classes,
            weights=weights,
            pretrained=pretrained,
            input_size=input_size,
            preprocessing=preprocessing,
            task=task,
            problem=problem,
            mismatched=mismatched,
        )
    if task not in (None, "image_classification"):
        raise ModelError(
            f"task is {task!r}, but {spec!r} is an image model; only hf: models have other tasks."
        )

    wanted = _Wanted(spec, name, num_classes, pretrained and weights is None, preprocessing is not None)
    found = {"timm": _open_timm, "torchvision": _open_torchvision, "file": _open_file}[kind](wanted)
    model, own, notes = found.model, found.preprocessing, list(found.notes)
    if preprocessing is None and own is None:
        from layerwise.layers.inputs import image_channels

        grey = image_channels(model) == 1
        own = GREY_PREPROCESSING if grey else DEFAULT_PREPROCESSING
        colours = "read as grey, " if grey else ""
        notes.append(
            f"preprocessing not known: images {colours}cropped to 224 px, normalised as for ImageNet"
        )
    settings = preprocessing or own
    assert settings is not None  # one of the two is set
    if input_size is not None:
        exact = kind == "timm" and preprocessing is None
        settings = from_timm(model, input_size) if exact else settings.at(input_size)
    native = example_image(own or settings)

    origin = found.origin
    head_is_new = False
    classes = found.classes
    if weights is not None:
        loaded = load_file(
            spec,
            model,
            Path(weights),
            num_classes=num_classes,
            outputs=lambda: output_layers(model, native),
            resize=lambda classes: replace_head(model, classes, native),
            mismatched=mismatched,
        )
        origin, head_is_new, classes = str(weights), loaded.head_is_new, loaded.classes or classes
        notes.extend(loaded.notes)
    replaced = fit_head(model, num_classes, classes, native, is_new=head_is_new)
    if replaced is not None:
        notes.append(str(replaced))
    if own is not None and settings.crop != own.crop:
        _set_input_size(spec, model, settings.crop)
    return OpenedModel(
        model=model.eval(),
        spec=spec,
        task="image_classification",
        weights=origin,
        num_classes=num_classes if num_classes is not None else classes,
        preprocessing=settings,
        example_input=example_image(settings),
        replaced_head=replaced,
        notes=tuple(notes),
    )


def takes_texts(spec: str) -> bool:
    """Return whether the model called `spec` reads texts, as its configuration says; all others take images.

    Raises:
        ModelError: the name is not understood, or there is no such model.
    """
    kind, name = split_spec(spec)
    if kind != "hf":
        return False
    from layerwise.sources import huggingface

    return huggingface.task_of(spec, name) != "image_classification"


def reopen(record: Mapping[str, Any], *, spec: str | None = None) -> OpenedModel:
    """Return the network that `OpenedModel.to_dict` described, with random weights for a run's to go in.

    Nothing is downloaded, except by ``hf:ID`` the configuration and tokenizer where they are not in the
    local store.

    Args:
        record: what `OpenedModel.to_dict` returned.
        spec: another name for the same architecture, such as the folder that a run saved.

    Raises:
        ModelError: the model cannot be built; see `open_model`.
    """
    images = record.get("preprocessing")
    preprocessing = None if images is None else Preprocessing.from_dict(images)
    return open_model(
        spec or record["spec"],
        num_classes=record.get("num_classes"),
        pretrained=False,
        preprocessing=preprocessing,
        task=record.get("task"),
        problem=record.get("problem"),
    )


@dataclass(frozen=True)
class _Wanted:
    """What was asked for: the whole spec, the name in it, classes, whether to fetch weights.

    `preprocessed` is whether the caller's own preprocessing takes the place of the library's.
    """

    spec: str
    name: str
    num_classes: int | None
    download: bool
    preprocessed: bool


@dataclass
class _Found:
    """A model as its library makes it: with `classes` outputs where that is known."""

    model: nn.Module
    origin: str
    preprocessing: Preprocessing | None = None
    classes: int | None = None
    notes: tuple[str, ...] = ()


def _open_timm(wanted: _Wanted) -> _Found:
    check_timm(wanted.spec, wanted.name, download=wanted.download)
    import timm

    def create() -> Any:
        return timm.create_model(wanted.name, pretrained=wanted.download)

    on_hub = wanted.name.startswith(TIMM_HUB)  # its configuration too
    if wanted.name.startswith(TIMM_FOLDER):
        model = read_folder(wanted.spec, create)
    else:
        with hub_if_found() if wanted.download or on_hub else nullcontext():
            model = fetch(wanted.spec, create, folder="timm:local-dir:FOLDER" if on_hub else None)
    own = None
    try:
        own = from_timm(model)
    except ModelError:
        if not wanted.preprocessed:
            raise
    return _Found(
        model=model,
        origin="pretrained" if wanted.download else "random",
        preprocessing=own,
        classes=int(model.num_classes),
    )


def _open_torchvision(wanted: _Wanted) -> _Found:
    check_torchvision(wanted.spec, wanted.name)
    from torchvision import models

    name = wanted.name.lower()
    entry = models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {"weights": entry if wanted.download else None}
    if name in ("googlenet", "inception_v3") and not wanted.download:
        # Without weights these two warn until they are told to initialise, and leave the pixels as they
        # are; with them they undo ImageNet's normalisation inside. A file of weights expects the latter.
        options |= {"init_weights": True, "transform_input": True}
    model = fetch(wanted.spec, lambda: models.get_model(name, **options))
    return _Found(
        model=model,
        origin="pretrained" if wanted.download else "random",
        preprocessing=from_torchvision(entry),
        classes=len(entry.meta["categories"]),
    )


def _open_file(wanted: _Wanted) -> _Found:
    model, preprocessing = call_function(wanted.spec, wanted.num_classes)
    return _Found(model, "as returned", preprocessing)


def _set_input_size(spec: str, model: nn.Module, size: tuple[int, int]) -> None:
    """Tell a model that is built for one size that inputs have another, its weights loaded already."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if config.get("fixed_input_size"):
        if not hasattr(model, "set_input_size"):
            raise ModelError(
                f"{spec!r} works at {config['input_size'][1]} px only; expected no input_size, or a model "
                f"without a fixed size."
            )
        cast(Any, model).set_input_size(img_size=size)
    fixed = getattr(model, "image_size", None)  # torchvision's vision transformers
    if isinstance(fixed, int) and size != (fixed, fixed):
        raise ModelError(
            f"{spec!r} works at {fixed} px only, {size[0]}x{size[1]} was asked for. timm's vision "
            f"transformers take other sizes, e.g. timm:vit_base_patch16_224."
        )

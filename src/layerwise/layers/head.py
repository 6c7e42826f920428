"""`replace_head`: give a model an output layer for another number of classes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from layerwise.errors import ModelError, did_you_mean, repeated
from layerwise.layers.graph import Recording
from layerwise.layers.inputs import record_example
from layerwise.layers.isolation import unwrap
from layerwise.layers.order import order_of
from layerwise.layers.outputs import is_borrowed, output_layers
from layerwise.layers.owners import module_of

_SIZE_ATTRIBUTES = ("num_classes", "num_labels", "n_classes")


@dataclass(frozen=True)
class HeadChange:
    """What `replace_head` did.

    Attributes:
        modules: paths of the output layers that were replaced.
        auxiliary: paths of layers of the same size that only training uses (GoogLeNet's ``aux1.fc2``)
            and that were replaced with them.
        in_features: values that each of `modules` reads per position.
        old_classes: number of outputs that they had.
        num_classes: number of outputs that they have now.
        attributes: what else was set, as paths: ``"num_classes"``, ``"config.num_labels"``.
    """

    modules: tuple[str, ...]
    auxiliary: tuple[str, ...]
    in_features: tuple[int, ...]
    old_classes: int
    num_classes: int
    attributes: tuple[str, ...]

    def __str__(self) -> str:
        layers = ", ".join(
            f"{path} ({features} -> {self.num_classes})"
            for path, features in zip(self.modules, self.in_features, strict=True)
        )
        also = f"; also {', '.join(self.auxiliary)}" if self.auxiliary else ""
        attributes = f"; set {', '.join(self.attributes)}" if self.attributes else ""
        outputs = "output" if self.old_classes == 1 else "outputs"
        return f"new output layer {layers} instead of {self.old_classes} {outputs}{also}{attributes}"


def replace_head(
    model: nn.Module,
    num_classes: int,
    *,
    example_input: Any = None,
    outputs: Sequence[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> HeadChange:
    """Replace the output layers of `model` by new ones with `num_classes` outputs; return what was done.

    The output layers are found by walking back from the model's output, not by name. Linear layers,
    convolutions and transformers' ``Conv1D`` are replaced by one of the same class, bias, device and
    precision, with gradients on. Several output layers of one size (a distilled DeiT) are all replaced,
    and so are layers of that size that only training uses. A ``num_classes`` or ``num_labels`` attribute
    that held the old number, and a transformers configuration's ``num_labels`` and ``id2label``, follow.

    The new weights are torch's default initialisation, drawn from the global generator: call
    ``torch.manual_seed`` before for repeatable ones. The layer is new even where the old one already had
    `num_classes` outputs. An optimizer made before holds the old parameters: make it afterwards.

    Args:
        model: changed in place. To undo, keep ``model.get_submodule(path)`` and set it again.
        num_classes: at least 1.
        example_input: as for `layerwise.layer_map`; needed only where none can be derived.
        outputs: paths of the output layers, where the found ones are not the ones wanted.
        class_names: names for a transformers configuration's ``id2label``.

    Raises:
        ModelError: `num_classes`, `outputs` or `class_names` is wrong; there is no output layer; there are
            several of different sizes (say which by `outputs`); its weights are tied to another layer's; or
            it is of a class that cannot be made anew. Nothing is changed then.
        RecordingError: the forward pass raised with this input.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1000))
    >>> print(replace_head(net, 3))
    new output layer 2 (8 -> 3) instead of 1000 outputs
    >>> net[2]
    Linear(in_features=8, out_features=3, bias=True)
    """
    if not isinstance(num_classes, int | np.integer) or num_classes < 1:
        raise ModelError(f"num_classes is {num_classes!r}; expected a whole number of at least 1.")
    if class_names is not None and len(class_names) != num_classes:
        raise ModelError(f"{len(class_names)} class_names were given for {num_classes} classes.")
    if twice := repeated(class_names or ()):
        raise ModelError(f"class_names: {twice}; expected a name of its own for each. Rename one of them.")
    model = unwrap(model)
    recording, _, _ = record_example(model, example_input, mode="eval")
    order = order_of(recording)
    found = output_layers(recording, order)
    paths = tuple(dict.fromkeys(outputs)) if outputs is not None else found
    _check_paths(model, paths, found)
    layers = [model.get_submodule(path) for path in paths]
    for path in paths:
        if any(
            module_of(name) == path and is_borrowed(recording, order, name, paths) for name in order.position
        ):
            raise ModelError(
                f"the output layer {path!r} also runs earlier in the model, which applies its weight again "
                "at the end; a new one would break that. Untie it first."
            )
    sizes = {path: _size(path, layer, recording) for path, layer in zip(paths, layers)}
    if len({size for _, size in sizes.values()}) > 1:
        described = ", ".join(f"{path} ({size} outputs)" for path, (_, size) in sizes.items())
        raise ModelError(
            f"{type(model).__name__} has output layers of different sizes: {described}. "
            f"Say which to replace: outputs=[...]."
        )
    old = next(size for _, size in sizes.values())
    auxiliary = _unused_of_size(model, recording, old)
    replacements = {
        layer: _new_layer(path, layer, num_classes)
        for path, layer in [*zip(paths, layers), *((p, model.get_submodule(p)) for p in auxiliary)]
    }
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:  # a module may be registered under several names
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacements[module])
    return HeadChange(
        modules=paths,
        auxiliary=auxiliary,
        in_features=tuple(features for features, _ in sizes.values()),
        old_classes=old,
        num_classes=num_classes,
        attributes=_follow(model, [*paths, *auxiliary], old, num_classes, class_names),
    )


def _check_paths(model: nn.Module, paths: tuple[str, ...], found: tuple[str, ...]) -> None:
    if not paths:
        raise ModelError(
            f"no output layer was found in {type(model).__name__}: it ends in a norm or a block. Add one "
            f"(nn.Sequential(model, nn.Linear(features, classes))), or name it: outputs=[...]."
        )
    if isinstance(model, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ModelError(f"the {type(model).__name__} is itself the output layer; make a new one instead.")
    modules = dict(model.named_modules())
    for path in paths:
        if path in modules and path:
            continue
        if path in dict(model.named_parameters()):
            raise ModelError(
                f"the output layer of {type(model).__name__} is the bare parameter {path!r}, not a module, "
                f"so it cannot be replaced. Assign a new parameter to it yourself."
            )
        raise ModelError(
            f"outputs names {path!r}, which is no module of {type(model).__name__}; the output layers "
            f"found are {', '.join(found) or 'none'}.{did_you_mean(path, modules, count=1)}"
        )


def _size(path: str, layer: nn.Module, recording: Recording) -> tuple[int, int]:
    """Return (values read, values made) per position, or raise for a layer that cannot be replaced."""
    tied = [
        name
        for names in recording.names.values()
        for name in names
        if name.startswith(path + ".") and name.endswith("weight") and _owners(recording.model, names) > 1
    ]
    if tied:
        other = next(names for names in recording.names.values() if tied[0] in names)
        raise ModelError(
            f"the weight of the output layer {path!r} is tied ({' = '.join(other)}); a new one would break "
            f"that. Use the model's classification variant, or untie it first."
        )
    further = {name for name, _ in layer.named_parameters()} - {"weight", "bias"}
    if further and isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ModelError(
            f"the output layer {path!r} makes its weight of others ({', '.join(sorted(further))}), as "
            f"weight_norm and spectral_norm do; a new one would lose that. Replace it yourself: "
            f"model.{path} = weight_norm(nn.Linear(...))"
        )
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if layer.groups != 1:
            raise ModelError(
                f"the output layer {path!r} is a convolution in {layer.groups} groups, each with inputs "
                f"and outputs of its own. Replace it yourself: model.{path} = ..."
            )
        return layer.in_channels, layer.out_channels
    if _is_conv1d(layer):
        weight: Any = layer.weight
        return int(weight.shape[0]), int(weight.shape[1])
    kind = type(layer)
    is_torchs_name = getattr(nn, kind.__name__, kind) is not kind
    described = f"{kind.__module__}.{kind.__name__}" if is_torchs_name else kind.__name__
    raise ModelError(
        f"the output layer {path!r} is a {described}; expected nn.Linear, a convolution, or "
        f"transformers' Conv1D. Replace it yourself: model.{path} = ..."
    )


def _owners(model: nn.Module, names: tuple[str, ...]) -> int:
    """Return how many modules hold a parameter; one module under two names is one."""
    return len({id(model.get_submodule(name.rpartition(".")[0])) for name in names})


def _is_conv1d(layer: nn.Module) -> bool:
    return type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers.")


def _new_layer(path: str, layer: nn.Module, num_classes: int) -> nn.Module:
    new: nn.Module
    kind: Any = type(layer)
    try:
        if isinstance(layer, nn.Linear):
            new = kind(layer.in_features, num_classes, bias=layer.bias is not None)
        elif isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            new = kind(
                layer.in_channels,
                num_classes,
                layer.kernel_size,
                stride=layer.stride,
                padding=layer.padding,
                dilation=layer.dilation,
                bias=layer.bias is not None,
                padding_mode=layer.padding_mode,
            )
        else:
            weight: Any = layer.weight
            new = kind(num_classes, int(weight.shape[0]))
    except TypeError as error:
        raise ModelError(
            f"the output layer {path!r} is a {kind.__name__}, which cannot be made by its features and bias "
            f"alone ({error}). Replace it yourself: model.{path} = ..."
        ) from error
    old = next(layer.parameters())
    if old.device.type == "meta":
        return new.to_empty(device="meta").to(dtype=old.dtype).train(layer.training)
    return new.to(device=old.device, dtype=old.dtype).train(layer.training)


def _unused_of_size(model: nn.Module, recording: Recording, size: int) -> tuple[str, ...]:
    """Return paths of layers that the recorded pass never read and that have `size` outputs."""
    unread = {name.rpartition(".")[0] for name in recording.unread}
    return tuple(
        path
        for path, module in model.named_modules()
        if path in unread
        and (
            (isinstance(module, nn.Linear) and module.out_features == size)
            or (isinstance(module, nn.Conv2d) and module.out_channels == size and module.groups == 1)
        )
    )


def _follow(
    model: nn.Module, paths: list[str], old: int, new: int, class_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Set the attributes that hold the number of classes; return their paths."""
    changed: list[str] = []
    parts = [path.split(".") for path in paths]
    holders = {".".join(names[:depth]): None for names in parts for depth in range(len(names))}
    for path, attribute in itertools.product(holders, _SIZE_ATTRIBUTES):
        holder: Any = model.get_submodule(path)
        if type(vars(holder).get(attribute)) is int and vars(holder)[attribute] == old:
            setattr(holder, attribute, new)
            changed.append(f"{path}.{attribute}" if path else attribute)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "id2label") and hasattr(config, "num_labels"):
        names = [str(name) for name in class_names] if class_names else [f"LABEL_{n}" for n in range(new)]
        if class_names or config.num_labels != new:
            config.id2label = dict(enumerate(names))
            config.label2id = {name: number for number, name in enumerate(names)}
            changed += ["config.num_labels", "config.id2label"]
    return tuple(changed)

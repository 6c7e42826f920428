"""`replace_head`: give a model an output layer for another number of classes."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Sequence
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
from layerwise.layers.owners import is_under, module_of, paths_above
from layerwise.layers.randomness import kept_random_state
from layerwise.shown import Shown

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_SIZE_ATTRIBUTES = ("num_classes", "num_labels", "n_classes")


@dataclass(frozen=True)
class HeadChange(Shown):
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
    that held the old number, and a transformers configuration's ``num_labels`` and ``id2label``, follow. A
    class of your own gets again what its constructor takes and the old layer holds under the same name;
    where that is not all that the constructor was given, as far as its other attributes tell, it is refused.

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
            it is of a class that cannot be made anew, or would lose what the old one has. Nothing is changed.
        RecordingError: the forward pass raised with this input.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1000))
    >>> print(replace_head(net, 3))
    new output layer 2 (8 -> 3) instead of 1000 outputs
    >>> net[2]
    Linear(in_features=8, out_features=3, bias=True)
    """
    if isinstance(num_classes, bool) or not isinstance(num_classes, int | np.integer) or num_classes < 1:
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
    for path in paths:
        if any(
            module_of(name) == path and is_borrowed(recording, order, name, paths) for name in order.position
        ):
            raise ModelError(
                f"the output layer {path!r} also runs earlier in the model, which applies its weight again "
                "at the end; a new one would break that. Untie it first."
            )
    sizes = {path: _checked_sizes(path, model.get_submodule(path), recording) for path in paths}
    if len({size for _, size in sizes.values()}) > 1:
        described = ", ".join(f"{path} ({size} outputs)" for path, (_, size) in sizes.items())
        raise ModelError(
            f"{type(model).__name__} has output layers of different sizes: {described}. "
            f"Say which to replace: outputs=[...]."
        )
    old = next(size for _, size in sizes.values())
    auxiliary = _unused_of_size(recording, old)
    replacements = {}
    for path, (features, _) in (sizes | auxiliary).items():
        layer = model.get_submodule(path)
        replacements[layer] = _new_layer(path, layer, features, old, num_classes)
    for path, module in list(model.named_modules(remove_duplicate=False)):
        if module in replacements:  # a module may be registered under several names
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, replacements[module])
    return HeadChange(
        modules=paths,
        auxiliary=tuple(auxiliary),
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
    if isinstance(model, (nn.Linear, *_CONVOLUTIONS)):
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


def _checked_sizes(path: str, layer: nn.Module, recording: Recording) -> tuple[int, int]:
    """Return (values read, values made) per position, or raise for a layer that cannot be replaced."""
    tied = [
        name
        for names in recording.names.values()
        for name in names
        if is_under(name, path) and name.endswith("weight") and _owners(recording.model, names) > 1
    ]
    if tied:
        other = next(names for names in recording.names.values() if tied[0] in names)
        raise ModelError(
            f"the weight of the output layer {path!r} is tied ({' = '.join(other)}); a new one would break "
            f"that. Use the model's classification variant, or untie it first."
        )
    further = {name for name, _ in layer.named_parameters()} - {"weight", "bias"}
    if further and isinstance(layer, (nn.Linear, *_CONVOLUTIONS)):
        raise ModelError(
            f"the output layer {path!r} makes its weight of others ({', '.join(sorted(further))}), as "
            f"weight_norm and spectral_norm do; a new one would lose that. Replace it yourself: "
            f"model.{path} = weight_norm(nn.Linear(...))"
        )
    if isinstance(layer, _CONVOLUTIONS) and layer.groups != 1:
        raise ModelError(
            f"the output layer {path!r} is a convolution in {layer.groups} groups, each with inputs "
            f"and outputs of its own. Replace it yourself: model.{path} = ..."
        )
    if (sizes := _sizes(layer)) is not None:
        return sizes
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


def _sizes(layer: nn.Module) -> tuple[int, int] | None:
    """Return (values read, values made) per position; None for a layer that is never replaced."""
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if isinstance(layer, _CONVOLUTIONS):
        return (layer.in_channels, layer.out_channels) if layer.groups == 1 else None
    if type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers."):
        read, made = layer.get_parameter("weight").shape
        return read, made
    return None


def _new_layer(path: str, layer: nn.Module, features: int, old_classes: int, num_classes: int) -> nn.Module:
    kind: Any = type(layer)
    make: Callable[..., nn.Module] = functools.partial(kind, features)
    given: dict[str, Any] = {"bias": getattr(layer, "bias", None) is not None}
    if isinstance(layer, _CONVOLUTIONS):
        names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
        given |= {name: getattr(layer, name) for name in names}
    elif not isinstance(layer, nn.Linear):  # transformers' Conv1D takes the number of classes first
        make, given = kind, {"nx": features}
    if not kind.__init__.__module__.startswith(("torch.", "transformers.")):
        given = _arguments(path, layer, make, given, old_classes)
    new = make(num_classes, **given)
    old = next(layer.parameters())
    if old.device.type == "meta":
        return new.to_empty(device="meta").to(dtype=old.dtype).train(layer.training)
    return new.to(device=old.device, dtype=old.dtype).train(layer.training)


def _arguments(
    path: str, layer: nn.Module, make: Callable[..., nn.Module], given: dict[str, Any], old_classes: int
) -> dict[str, Any]:
    """Return the arguments with which the constructor of a class of the user's own makes such a `layer`.

    They are those of `given` that it takes and, where these do not do, attributes of `layer` that are called
    as its arguments. Whether they do is told by a layer made for `old_classes`. An attribute that holds that
    number is passed on last: it may follow from it.

    Raises:
        ModelError: none of them do.
    """
    kind = type(layer)
    parameters = inspect.signature(kind).parameters
    any_name = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given = {name: value for name, value in given.items() if any_name or name in parameters}
    held = {name: vars(layer)[name] for name in list(parameters)[2:] if name in vars(layer)}
    others = {
        name: value for name, value in held.items() if not (isinstance(value, int) and value == old_classes)
    }
    problem: object = None
    for arguments in (given, others | given, held | given):
        try:
            with kept_random_state():
                same = make(old_classes, **arguments)
        except Exception as error:  # whatever a user's constructor raises
            problem = error
            continue
        lost = _lost(layer, same)
        if not lost:
            return arguments
        problem = f"a new one would have {lost}"
    raise ModelError(
        f"the output layer {path!r} is a {kind.__name__}, which cannot be made by its features, bias and "
        f"attributes alone ({problem}). Replace it yourself: model.{path} = ..."
    )


def _lost(layer: nn.Module, same: nn.Module) -> str:
    """Return how `same` differs from `layer` in what its constructor sets; ``""`` where it does not."""
    shapes, others = ({n: p.shape for n, p in module.named_parameters()} for module in (layer, same))
    if shapes != others:
        return f"parameters {others} and not {shapes}"
    for name in [name for name in vars(same) if name not in vars(nn.Module())]:
        new, old = repr(vars(same)[name]), vars(layer).get(name)
        if isinstance(old, int | float | str | tuple | None) and new != repr(old):
            return f"{name} = {new} and not {old!r}"
    return ""


def _unused_of_size(recording: Recording, size: int) -> dict[str, tuple[int, int]]:
    """Return the layers that the recorded pass never read and that have `size` outputs -> their sizes."""
    unread = {name.rpartition(".")[0] for name in recording.unread}
    found = {path: _sizes(module) for path, module in recording.model.named_modules() if path in unread}
    return {path: sizes for path, sizes in found.items() if sizes is not None and sizes[1] == size}


def _follow(
    model: nn.Module, paths: list[str], old: int, new: int, class_names: Sequence[str] | None
) -> tuple[str, ...]:
    """Set the attributes that hold the number of classes; return their paths."""
    changed: list[str] = []
    holders = dict.fromkeys(above for path in paths for above in paths_above(path))
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

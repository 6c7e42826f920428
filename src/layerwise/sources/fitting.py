"""Fit a file of weights to a model, and the model's output layer to a number of classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from layerwise.errors import ModelError, plural, shorten
from layerwise.sources import weights as files
from layerwise.sources.opened import ReplacedHead

if TYPE_CHECKING:
    from torch import Tensor, nn

Mismatched = Literal["error", "drop_head"]


@dataclass(frozen=True)
class Loaded:
    """What was done to load a file.

    Attributes:
        notes: for people.
        head_is_new: the file gave no output layer, so the model's own is still the untrained one.
        new: module paths that a file without an output layer gave nothing for.
        classes: number of outputs of the file's output layer, where it differs from the model's before.
    """

    notes: tuple[str, ...]
    head_is_new: bool = False
    new: tuple[str, ...] = ()
    classes: int | None = None


def load_file(
    spec: str,
    model: nn.Module,
    path: Path,
    *,
    num_classes: int | None,
    outputs: Callable[[], tuple[str, ...]],
    resize: Callable[[int], object] | None,
    mismatched: Mismatched,
) -> Loaded:
    """Load the weights at `path` into `model` in one of the ways that are certain; otherwise raise.

    In this order: every tensor by name; every tensor by order (see `layerwise.sources.weights`); by name
    after the output layer was brought to the file's number of classes, if that is the wanted number; by
    name without the output layer, if the file has none, or has other classes and `mismatched` allows it.
    A file without an output layer may have further parts, such as the head of a language model.

    Args:
        spec: name of the model, for messages.
        model: changed in place.
        path: of the file.
        num_classes: wanted in the end; None for what the file has.
        outputs: gives the paths of the model's output layers, and of others that may be new; called only
            where they matter.
        resize: gives `model` an output layer of so many classes; None where that cannot be done.
        mismatched: whether a file of other classes is an error, or loses its output layer.

    Raises:
        ModelError: the file cannot be read, or fits in none of these ways; the message lists which
            tensors are missing, unexpected, or of another shape.
    """
    if mismatched not in ("error", "drop_head"):
        raise ModelError(f"mismatched is {mismatched!r}; expected 'error' or 'drop_head'.")
    state, prefix = files.strip_prefixes(files.read_weights(path), model)
    notes = [f"left out the prefix {prefix!r} of the names in {path.name}"] if prefix else []
    state, added = files.add_prefix(state, model)
    notes += [f"put {added!r} before the names in {path.name}"] if added else []
    state, unread = files.drop_unread(state, model)
    notes += tell_unused(unread)
    mismatch = files.compare(state, model)
    if not mismatch:
        files.load_state(model, state)
        return Loaded((*notes, f"loaded {len(state)} tensors of {path.name}, matched by name"))
    in_order = files.match_in_order(state, model)
    if in_order is not None:
        files.load_state(model, in_order)
        ours, theirs = next(iter(in_order)), next(iter(state))
        return Loaded(
            (
                *notes,
                f"loaded {len(in_order)} tensors of {path.name}, matched in order: names differ "
                f"({theirs} -> {ours}), every shape and last name component agrees",
            )
        )
    classes = files.output_rows(mismatch)
    if classes is not None and num_classes in (None, classes) and resize is not None:
        resize(classes)
        if not files.compare(state, model):
            files.load_state(model, state)
            what = (
                f"loaded {len(state)} tensors of {path.name}, its output layer of {classes} classes included"
            )
            return Loaded((*notes, what), classes=classes)
    elif classes is not None and mismatched == "error":
        wanted = "the model's configuration has others" if num_classes is None else f"not {num_classes}"
        raise ModelError(
            f"weights file {str(path)!r} is for {classes} classes{_class_names_beside(path)}, {wanted}. "
            f"Expected data with the same classes; to start a new output layer on top of these weights: "
            f"--mismatched drop_head (mismatched=)."
        )
    elif classes is not None:
        kept = {name: value for name, value in state.items() if name not in mismatch.shapes}
        files.load_state(model, kept)
        what = f"loaded {len(kept)} tensors of {path.name}, all but its output layer of {classes} classes"
        return Loaded((*notes, what), head_is_new=True)
    kept = {name: value for name, value in state.items() if name not in mismatch.unexpected}
    other_head = not _parts(kept) & _parts(mismatch.unexpected)
    if mismatch.missing and not mismatch.shapes and other_head and num_classes is not None:
        of_head = tuple(f"{output}." for output in outputs())
        if all(name.startswith(of_head) for name in mismatch.missing):
            files.load_state(model, kept)
            notes.append(f"loaded {len(kept)} tensors of {path.name}, which has no output layer")
            notes += tell_unused(mismatch.unexpected)
            new = dict.fromkeys(name.rpartition(".")[0] for name in mismatch.missing)
            return Loaded(tuple(notes), head_is_new=True, new=tuple(new))
    raise ModelError(
        f"weights file {str(path)!r} does not fit {spec!r}: {mismatch}. Expected the weights of this "
        f"architecture; list its parameters with: layerwise inspect {spec}"
    )


def tell_unused(names: Sequence[str]) -> list[str]:
    """Return a line about tensors of a file that go nowhere; none where there are none."""
    count = plural(len(names), "tensor of the file is", "tensors of the file are")
    return [f"{count} not used ({shorten(names)})"] if names else []


def _parts(names: Iterable[str]) -> set[str]:
    """Return the parts of a model, one level down, that parameters lie in."""
    return {name.partition(".")[0] for name in names}


def _class_names_beside(path: Path) -> str:
    """Return the class names of the run that `path` was saved by, for a message; "" for other files."""
    try:
        classes = json.loads((path.parent / "run.json").read_text(encoding="utf-8"))["task"]["classes"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return f" ({', '.join(map(str, classes))})" if isinstance(classes, list) else ""


def fit_head(
    model: nn.Module, num_classes: int | None, classes: int | None, example: Tensor, *, is_new: bool
) -> ReplacedHead | None:
    """Give `model` an output layer of `num_classes`, unless it has a loaded one of that size.

    Args:
        model: changed in place.
        num_classes: wanted; None leaves the head alone.
        classes: how many outputs it has, None where that is not known, 0 without an output layer.
        example: an input, to find the output layer with.
        is_new: the output layer holds no loaded weights, so it is made anew in any case.
    """
    if num_classes is None:
        return None
    if classes == 0 and hasattr(model, "reset_classifier"):
        # timm's pure backbones (DINOv2, CLIP towers) have no output layer that could be replaced.
        before = {name for name, _ in model.named_parameters()}
        cast(Any, model).reset_classifier(num_classes)
        new = {name.rpartition(".")[0] for name, _ in model.named_parameters() if name not in before}
        return ReplacedHead(tuple(sorted(new)), 0, num_classes)
    if classes is None:
        classes = count_outputs(model, example)
    if classes == num_classes and not is_new:
        return None
    return replace_head(model, num_classes, example, classes)


def replace_head(
    model: nn.Module, num_classes: int, example: Tensor, classes: int | None = None
) -> ReplacedHead:
    """Replace the output layers of `model` and say which; `classes` is how many outputs they had."""
    from layerwise.layers.head import replace_head as change_head

    change = change_head(model, num_classes, example_input=example)
    return ReplacedHead(change.modules, classes or change.old_classes, num_classes)


def output_layers(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """Return the paths of the output layers, from a recording of the model."""
    from layerwise.layers.mapping import layer_map

    return layer_map(model, example_input=example).outputs


def count_outputs(model: nn.Module, example: Tensor) -> int | None:
    """Return how many outputs the output layer has; None without one, or where several differ."""
    rows = set()
    for path in output_layers(model, example):
        weight = getattr(model.get_submodule(path), "weight", None)
        rows.add(None if weight is None else int(weight.shape[0]))
    return rows.pop() if len(rows) == 1 else None

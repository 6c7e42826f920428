"""A tuned transformers model as a normal transformers folder, and the body of one model moved to another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from layerwise.errors import ModelError, RunError
from layerwise.files import write_folder
from layerwise.sources.pooled import MeanPooledClassifier
from layerwise.sources.transformers_files import no_progress_bars
from layerwise.training.text_tasks import Regression

if TYPE_CHECKING:
    from torch import nn

    from layerwise.training.tasks import Task

FOLDER = "transformers"
"""Name of the folder inside a run."""

_PROBLEMS = {
    "text_classification": "single_label_classification",
    "multi_label": "multi_label_classification",
    "regression": "regression",
}
"""Task name -> transformers' ``problem_type``."""


def is_transformers(model: nn.Module) -> bool:
    """Return whether `model` is one of the transformers library; that library is not imported for it."""
    return any(cls.__module__ == "transformers.modeling_utils" for cls in type(model).__mro__)


def save_transformers(
    model: nn.Module, folder: str | Path, *, tokenizer: Any = None, task: Task | None = None
) -> Path:
    """Write a model so that ``AutoModel...from_pretrained(folder)`` loads it, with its tokenizer.

    Where `task` has classes, the configuration gets their names (``id2label``) and the kind of problem,
    so that ``transformers.pipeline`` answers with them. A regression of standardised numbers leaves its
    mean and scale in ``task_specific_params["regression"]``: transformers' own output is standardised.

    The folder is written whole or not at all; one that is there already is replaced.

    A classifier on the mean of all tokens (`layerwise.sources.pooled`) is no class of transformers: its
    tuned body is written, which ``AutoModel.from_pretrained`` loads, and beside it the output layer in
    ``classifier.safetensors``.

    Args:
        model: a transformers model. Its configuration is changed (labels); its weights are not.
        folder: where to; made anew.
        tokenizer: of the model; None writes none.
        task: what the outputs mean.

    Returns:
        The folder.

    Raises:
        ModelError: `model` is not a transformers model.
        RunError: the folder cannot be written.
    """
    head: nn.Module | None = None
    if isinstance(model, MeanPooledClassifier):
        pooled = model
        model, head = pooled.body, pooled.classifier
    if not is_transformers(model):
        raise ModelError(
            f"a {type(model).__qualname__} is not a transformers model, so it has no transformers folder. "
            "Save its weights with layerwise.fit(out=...), or torch.save(model.state_dict(), ...)."
        )
    name_labels(model, task)
    folder = Path(folder)

    def fill(temporary: Path) -> None:
        model.save_pretrained(temporary)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        if head is not None:
            save_file(head.state_dict(), temporary / "classifier.safetensors")

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with no_progress_bars():
            write_folder(folder, fill)
    except OSError as error:
        raise RunError(
            f"the transformers folder {folder} could not be written: {error}. Make room."
        ) from error
    return folder


def name_labels(model: nn.Module, task: Task | None) -> None:
    """Put the names of a task's classes into a transformers configuration, in place."""
    if task is None or not task.classes:
        return
    config: Any = model.config
    config.id2label = dict(enumerate(task.classes))
    config.label2id = {name: index for index, name in enumerate(task.classes)}
    if problem := _PROBLEMS.get(task.name):
        config.problem_type = problem
    if isinstance(task, Regression) and (task.mean or task.scale):
        own = dict(getattr(config, "task_specific_params", None) or {})
        own["regression"] = {"mean": list(task.mean), "scale": list(task.scale)}
        config.task_specific_params = own


@dataclass(frozen=True)
class MovedBody:
    """What `move_body` did.

    Attributes:
        moved: names of the tensors that were copied, relative to the body.
        kept: names of the target's tensors that the source does not have (a pooler); they are as before.
        left: names of the source's tensors that the target has no place for.
    """

    moved: tuple[str, ...]
    kept: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        kept = f", {len(self.kept)} of its own kept ({', '.join(self.kept)})" if self.kept else ""
        return f"{len(self.moved)} tensors of the language model's body moved into the classifier{kept}"


@torch.no_grad()
def move_body(source: nn.Module, target: nn.Module) -> MovedBody:
    """Copy the body of one transformers model into another with a different head.

    The body is transformers' ``base_model``: embeddings and layers, without output layers. Copied by
    name, so that what only the target has stays as it is: the pooler, which a language model lacks, keeps
    its pretrained weights.

    Args:
        source: a language model.
        target: a model of the same configuration; changed in place.

    Raises:
        ModelError: they are not transformers models of one kind, or a tensor has another shape.
    """
    for name, model in (("source", source), ("target", target)):
        if not is_transformers(model):
            raise ModelError(f"{name} is a {type(model).__qualname__}, not a transformers model.")
    ours: dict[str, torch.Tensor] = source.base_model.state_dict()  # type: ignore[union-attr]
    theirs: dict[str, torch.Tensor] = target.base_model.state_dict()  # type: ignore[union-attr]
    shared = [name for name in theirs if name in ours]
    wrong = [
        f"{name} {tuple(ours[name].shape)} -> {tuple(theirs[name].shape)}"
        for name in shared
        if ours[name].shape != theirs[name].shape
    ]
    if wrong or not shared:
        what = f"tensors differ in shape: {', '.join(wrong[:4])}" if wrong else "no tensor has the same name"
        raise ModelError(
            f"the body of {type(source).__qualname__} cannot move into {type(target).__qualname__}: {what}. "
            "Open both from the same folder."
        )
    for name in shared:
        theirs[name].copy_(ours[name])
    return MovedBody(
        tuple(shared),
        tuple(name for name in theirs if name not in ours),
        tuple(name for name in ours if name not in theirs),
    )

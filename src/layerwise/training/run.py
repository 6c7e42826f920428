"""`Run`, `load_run`: what a run's folder (`layerwise.training.run_folder`) holds, ready to predict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from layerwise.errors import DataError, ModelError, RunError
from layerwise.plans.plan import Plan
from layerwise.training.kept_weights import load_weights, weights_file
from layerwise.training.known_tasks import task_from_dict
from layerwise.training.run_folder import read_run
from layerwise.training.tasks import Scores, Task


@dataclass(frozen=True)
class Run:
    """A finished or interrupted run, ready to predict and to be measured.

    Attributes:
        path: its folder.
        model: with the run's weights, in eval mode, on the CPU.
        task: what its outputs mean.
        about: what ``run.json`` tells.
        preprocessing: of images, as `layerwise.sources.preprocessing.Preprocessing`; None where the run
            does not know one.
        tokenizer: of texts, a transformers tokenizer; None likewise.
    """

    path: Path
    model: nn.Module = field(repr=False)
    task: Task
    about: dict[str, Any] = field(repr=False)
    preprocessing: Any = None
    tokenizer: Any = None

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of the model's outputs."""
        return self.task.classes

    @property
    def plan(self) -> Plan:
        """The plan that the run carried out."""
        return Plan.model_validate(self.about["plan"])

    @property
    def table(self) -> dict[str, Any]:
        """How the tables of its data were read: columns and encoding, where they were named."""
        return self.about.get("table") or (self.about.get("job") or {}).get("text") or {}

    def predict(self, batch: Tensor | Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return one readable prediction for each sample of a batch of preprocessed inputs.

        Args:
            batch: inputs of the model: a tensor, or a mapping of keyword arguments.

        Returns:
            For classification, mappings with ``"label"``, ``"probability"`` and ``"probabilities"``.
        """
        from layerwise.training.evaluate import first_output

        whole = {**batch, "labels": None} if isinstance(batch, Mapping) else (batch, None)
        return self.task.decode(first_output(self.model, self.task.forward, whole))

    def evaluate(self, data: Any, *, batch_size: int = 32) -> Scores:
        """Return loss, metrics and tables on labelled data, as `fit` measures ``test``.

        Args:
            data: as `fit` takes it: a map-style data set, prepared as in training, or a `DataLoader`.
            batch_size: samples of one forward pass, for data sets.

        Raises:
            DataError: labels and outputs do not belong together, or the data set has other classes.
        """
        from layerwise.training.data import open_batches
        from layerwise.training.evaluate import evaluate, first_output
        from layerwise.training.setup import class_names, first_batch

        batches = open_batches(
            data, train=False, batch_size=batch_size, name="data", collate=self.task.collate
        )
        names = class_names(batches.data)
        if names and tuple(names) != self.classes:
            raise DataError(
                f"the data have the classes {list(names)}, and {self.path} was trained on "
                f"{list(self.classes)}: their numbers would mean other classes. Give data with these "
                "classes, in this order (a folder's images: data.in_order(run.classes))."
            )
        first = first_batch(batches)
        self.task.check(first_output(self.model, self.task.forward, first), first)
        return evaluate(self.model, batches, self.task)


def can_rebuild(about: Mapping[str, Any]) -> bool:
    """Return whether a run's model can be built from its name: it is no object and from no Python file."""
    spec = about["model"].get("spec")
    return spec is not None and ".py:" not in spec


def load_run(path: str | Path, *, model: nn.Module | str | None = None, task: Task | None = None) -> Run:
    """Return a run with its model, ready to predict.

    The model is built anew from the spec it was opened with, and gets the run's weights. Nothing in the
    folder is executed, nor a Python file that the model came from (``file.py:function``), unless `model`
    names it. A model that was an object of the caller's own must be given, and so must a task of that kind.

    Args:
        path: the run's folder.
        model: a model of the same architecture, to put the weights into: it is changed. Or a name, as
            `layerwise.sources.models.open_model` takes it, to build one from; a Python file is run.
        task: what the outputs mean; of the run's classes. None takes the run's own.

    Raises:
        RunError: there is no run, its weights are missing, damaged or do not fit, the run does not know how
            to build its model or task and none is given, or `task` has other classes.
    """
    folder = Path(path)
    about = read_run(folder)
    spec = about["model"].get("spec")
    if model is None and spec is None:
        raise RunError(
            f"the model of {folder} ({about['model'].get('class')}) was given as an object. Build it "
            "yourself and pass it: layerwise.load_run(path, model=model)."
        )
    if model is None and not can_rebuild(about):
        raise RunError(
            f"the model of {folder} ({about['model'].get('class')}) came from the Python file {spec!r}, "
            "which loading does not run unasked. Name it: layerwise predict RUN --model FILE.py:FUNCTION "
            "(model= of layerwise.load_run, which also takes the model itself)."
        )
    named, model = (model, None) if isinstance(model, str) else (None, model)
    task = _task_of(folder, about, task)
    tokenizer = None
    saved = folder / "transformers"  # a finished run of texts has its own configuration and tokenizer
    if model is None:
        from layerwise.sources.models import reopen
        from layerwise.sources.pooled import mean_pooled

        record = {"num_classes": len(task.classes) or None, **about["model"]}
        try:
            # With the size of its images too: a vision transformer's positions depend on it.
            opened = reopen(record, spec=named or (f"hf:{saved}" if saved.is_dir() else None))
            opened = mean_pooled(opened) if record.get("pooling") == "mean" else opened
        except ModelError as error:
            raise RunError(f"the model of {folder} cannot be built again: {error}") from error
        model, tokenizer = opened.model, opened.tokenizer
    elif (saved / "tokenizer_config.json").is_file():
        from layerwise.sources.huggingface import read_tokenizer

        try:
            tokenizer = read_tokenizer(f"hf:{saved}", str(saved))
        except ModelError as error:
            raise RunError(f"the tokenizer of {folder} cannot be read: {error}") from error
    load_weights(model, weights_file(folder), expected_sha256=about.get("weights_sha256"))
    preprocessing = about["model"].get("preprocessing")
    if preprocessing is not None:
        from layerwise.sources.preprocessing import Preprocessing

        preprocessing = Preprocessing.from_dict(preprocessing)
    return Run(folder, model.eval(), task, about, preprocessing, tokenizer)


def _task_of(folder: Path, about: Mapping[str, Any], given: Task | None) -> Task:
    """Return the task of a run: its own, or the one that is given, of its classes.

    Raises:
        RunError: none is given and the run's is no task of layerwise, or the one given has other classes.
    """
    if given is None and (name := about.get("task_class")):
        raise RunError(
            f"the task of {folder} ({name}) is your own, and its code is not in the run. Make it and "
            "pass it: layerwise.load_run(path, task=task)."
        )
    if given is None:
        return task_from_dict(about["task"])
    if list(given.classes) != about["task"].get("classes", []):
        raise RunError(
            f"the task has the classes {list(given.classes)}, and {folder} was trained on "
            f"{about['task'].get('classes')}. Give the task the run's classes, in that order."
        )
    return given

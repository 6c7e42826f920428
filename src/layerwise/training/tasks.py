"""`Task`: what a batch means: its loss, its metrics, and how an output reads for people.

A task is a small object that `fit` asks; the loop itself never looks into a batch. A new task is a
frozen dataclass with the members of `Task`; one of layerwise's own also has a line in
`layerwise.training.known_tasks.TASKS`, from which `load_run` makes it. Others are given to `load_run`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import Tensor, nn

from layerwise.errors import DataError, named_kind, repeated

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

Batch = Any
"""What a data loader yields: ``(inputs, labels)``, or a mapping with the key ``"labels"``, whose other keys
are the arguments of the model's forward."""


@dataclass(frozen=True)
class Scores:
    """Metrics of one pass over a data set.

    Attributes:
        values: metric name -> number.
        tables: what is more than one number: ``"per_class"`` (a list of rows) and ``"confusion"``
            (rows are true classes, columns predicted ones).
    """

    values: dict[str, float]
    tables: dict[str, Any] = dataclasses.field(default_factory=dict)


class Task(Protocol):
    """What `fit` needs to know about the meaning of a batch.

    Attributes:
        name: of the kind of task, stored in the run: of `layerwise.training.known_tasks.TASKS`, or another.
        classes: names of the classes in the order of the model's outputs; empty where there are none.
        monitor: the metric (or ``"loss"``) that picks the best epoch and stops early.
        mode: whether a higher (``"max"``) or a lower monitor is better.
    """

    @property
    def name(self) -> str:
        """The kind of task."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        ...

    @property
    def monitor(self) -> str:
        """The metric that picks the best epoch."""
        ...

    @property
    def mode(self) -> Literal["max", "min"]:
        """Whether more or less of it is better."""
        ...

    def collate(self, samples: list[Any]) -> Batch:
        """Return one batch of samples."""
        ...

    def size(self, batch: Batch) -> float:
        """Return over how much a batch's loss is a mean: its samples, scored tokens, or their weights."""
        ...

    def forward(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the model's output for a batch; labels are not shown to the model."""
        ...

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of a batch, a scalar."""
        ...

    def check(self, output: Tensor, batch: Batch) -> None:
        """Raise `DataError` where labels and output cannot belong together (asked once, at the start)."""
        ...

    def metrics(self) -> MetricCollection:
        """Return new, empty metrics."""
        ...

    def update(self, metrics: MetricCollection, output: Tensor, batch: Batch) -> None:
        """Count one batch into `metrics`."""
        ...

    def scores(self, metrics: MetricCollection) -> Scores:
        """Return what `metrics` counted."""
        ...

    def decode(self, output: Tensor) -> list[dict[str, Any]]:
        """Return one readable prediction for each sample of an output."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return the task as plain data for ``run.json``; of layerwise's own, `task_from_dict` makes it."""
        ...


def split_batch(batch: Batch) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return a batch as positional inputs, keyword inputs, and labels.

    >>> split_batch(("x", "y"))
    (('x',), {}, 'y')
    >>> split_batch({"input_ids": 1, "labels": 2})
    ((), {'input_ids': 1}, 2)

    Raises:
        DataError: it is neither a pair nor a mapping with ``"labels"``.
    """
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise DataError(f"a batch with the keys {sorted(map(str, batch))} has no 'labels'.")
        return (), {key: value for key, value in batch.items() if key != "labels"}, batch["labels"]
    if isinstance(batch, Sequence) and not isinstance(batch, str) and len(batch) == 2:
        return (batch[0],), {}, batch[1]
    size = f" of {len(batch)}" if isinstance(batch, Sequence) else ""
    raise DataError(
        f"a batch is {named_kind(batch)}{size}; expected a pair (inputs, labels) or a mapping with "
        "'labels'. Change the data set or give the loader a collate_fn that makes one."
    )


def class_labels(batch: Batch) -> Tensor:
    """Return the labels of a batch, integers of any width as int64: torch's loss takes few others."""
    labels: Tensor = split_batch(batch)[2]
    return labels if labels.is_floating_point() else labels.long()


def run_model(model: nn.Module, batch: Batch) -> Tensor:
    """Return the model's output tensor for a batch: its ``logits`` where it returns a structure.

    Raises:
        DataError: its forward does not take a key of the batch; it returns no tensor, or a single number.
    """
    args, kwargs, _ = split_batch(batch)
    try:
        output = model(*args, **kwargs)
    except TypeError as error:
        taken = inspect.signature(model.forward).parameters
        unknown = [str(key) for key in kwargs if key not in taken]
        if not unknown or any(each.kind is each.VAR_KEYWORD for each in taken.values()):
            raise
        raise DataError(
            f"a batch has {', '.join(map(repr, unknown))}, which {type(model).__name__}.forward does not "
            f"take (it takes {', '.join(taken)}). All keys but 'labels' are its arguments: rename or leave "
            "out what is none in the data set, or give fit a task whose forward picks them."
        ) from error
    if isinstance(output, Tensor):
        logits: Any = output
    elif isinstance(output, Mapping):
        logits = output.get("logits")
    else:
        logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Sequence) and output and isinstance(output[0], Tensor):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise DataError(
            f"the model returned {named_kind(output)}; expected a tensor, a structure with .logits, "
            "or a tuple that begins with the logits."
        )
    if not logits.ndim:
        raise DataError(
            "the model returned one number for a batch, such as its loss; expected outputs of one row a "
            "sample. Let forward return the logits."
        )
    return logits


_MODES: dict[str, Literal["max", "min"]] = {
    **dict.fromkeys(("loss", "rmse", "mae", "perplexity"), "min"),
    **dict.fromkeys(("r2", "pearson", "token_accuracy"), "max"),
}
"""Monitor -> the only mode that makes sense with it."""


def settle_mode(task: Any) -> None:
    """Give a task (a frozen dataclass under construction) the mode of its monitor, if there is but one.

    >>> from layerwise.training.classification import Classification
    >>> Classification(("a", "b"), monitor="loss").mode
    'min'
    """
    object.__setattr__(task, "mode", _MODES.get(task.monitor, task.mode))


def kind_of(labels: Any) -> str:
    """Return dtype and shape of labels, for messages."""
    if not isinstance(labels, Tensor):
        return named_kind(labels)
    return f"{labels.dtype} of shape {tuple(labels.shape)}"


def too_few(classes: Sequence[str], what: str = "class") -> list[str]:
    """Return the problem of a task with fewer than two classes, none of any other."""
    if len(classes) > 1:
        return []
    named = f"{'one' if classes else 'no'} {what} ({', '.join(classes)})"
    return [f"there is {named}; expected at least two, to tell apart"]


def same_names(classes: Sequence[str]) -> list[str]:
    """Return the problem of a task with two outputs of one name, none of any other."""
    twice = repeated(classes)
    return [f"{twice}; expected a name of its own for each. Give such: classes=[...]"] if twice else []


def raise_found(found: list[str]) -> None:
    """Raise one `DataError` that tells all problems, if there are any."""
    if found:
        raise DataError("; ".join(found) + ".")

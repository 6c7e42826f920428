"""The options that diagnose, advise, search, signature and curve share: a model and the data of a task."""

from __future__ import annotations

import dataclasses
import inspect
import shlex
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.cli import text
from layerwise.cli.output import given_options, say, seed_of_all, share

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap
    from layerwise.sources.opened import OpenedModel
    from layerwise.training.job import Prepared
    from layerwise.training.text_job import PreparedText

SourceOption = Annotated[
    str | None,
    typer.Option(help="Images of the source domain, any folder of them; or a table of its texts."),
]
SignatureOption = Annotated[
    Path | None, typer.Option(help="Signature of the source domain, from layerwise signature.")
]
SamplesOption = Annotated[int, typer.Option(min=2, help="Measure so many samples at most.")]
ValFracOption = Annotated[
    float, typer.Option(help="Share to validate on, where there is no val folder.", callback=share)
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Of training.")]
Mismatched = Annotated[
    Literal["error", "drop_head"],
    # as for the granularity, choices of this width do not fit into 80 columns
    typer.Option(help="Weights for other classes: error, or drop_head to leave it.", metavar="<name>"),
]
MetricOption = Annotated[str | None, typer.Option(help="Of the validation data; the task's own.")]


@dataclass(frozen=True)
class TaskOptions:
    """A model and data, as the command line names them.

    Each field is an option of every command under `with_task`.
    """

    model: Annotated[
        str, typer.Argument(help="timm:NAME, torchvision:NAME, hf:PATH_OR_ID or file.py:function.")
    ]
    data: Annotated[
        str,
        typer.Option(help="Folder with a folder of images a class, a table of paths, or a table of texts."),
    ]
    path_column: text.PathColumn = None
    text_column: text.TextColumn = None
    label_column: text.LabelColumn = None
    pair_column: text.PairColumn = None
    max_length: text.MaxLength = None
    weights: Annotated[Path | None, typer.Option(help="Weights file instead of the library's own.")] = None
    mismatched: Mismatched = "error"
    pretrained: Annotated[bool, typer.Option(help="Take the library's pretrained weights.")] = True
    input_size: Annotated[
        int | None, typer.Option(min=1, max=10**9, help="Side of the images in pixels.")
    ] = None
    granularity: Annotated[
        Literal["stages", "blocks", "layers"],
        # typer's own stages|blocks|layers does not fit into 80 columns beside the longest option
        typer.Option(help="What one layer group is: stages, blocks or layers.", metavar="<name>"),
    ] = "stages"
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.", callback=seed_of_all)] = 0

    def __post_init__(self) -> None:
        """Refuse what is said of weights that are not given."""
        if self.weights is None and self.mismatched != "error":
            raise typer.BadParameter(
                "--mismatched: it is for the file of --weights, which is not given; leave it out."
            )

    @property
    def text(self) -> dict[str, Any] | None:
        """What was said of a table; None for nothing."""
        return text.text_options(
            path_column=self.path_column,
            text_column=self.text_column,
            label_column=self.label_column,
            pair_column=self.pair_column,
            max_length=self.max_length,
        )

    @property
    def _how_opened(self) -> dict[str, Any]:
        """How model and data are opened, with labels or without."""
        names = ("mismatched", "pretrained", "input_size", "granularity", "seed", "text")
        weights = None if self.weights is None else str(self.weights)
        return {"weights": weights, **{name: getattr(self, name) for name in names}}

    def fit_command(self) -> str:
        """Return the beginning of the ``layerwise fit`` command for the same model and data."""
        parts = ["layerwise", "fit"]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is False:
                parts.append(f"--no-{field.name}")
            elif value != field.default and field.name != "granularity":  # which a plan file brings
                parts += [f"--{field.name.replace('_', '-')}", str(value)]
        return shlex.join(parts)

    def open(self, *, val_frac: float = 0.2, test_frac: float = 0.0) -> Prepared | PreparedText:
        """Return model, data and layer map, opened as ``layerwise fit`` opens them; print their notes."""
        from layerwise.choosing.named import open_task

        prepared = open_task(
            self.model, self.data, val_frac=val_frac, test_frac=test_frac, **self._how_opened
        )
        for note in prepared.notes:
            say(note)
        return prepared

    def open_inputs(self) -> tuple[OpenedModel, Any, LayerMap]:
        """Return model, data without labels, and layer map; print the notes of the model."""
        from layerwise.choosing.named import open_inputs

        found = open_inputs(self.model, self.data, **self._how_opened)
        for note in found[0].notes:
            say(note)
        return found


def with_task(command: Callable[..., None]) -> Callable[..., None]:
    """Return a command that has the fields of `TaskOptions` in place of its first parameter.

    Args:
        command: a function of ``task``, a `TaskOptions`, and of options of its own.
    """
    hints = typing.get_type_hints(TaskOptions, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(TaskOptions)
    ]
    own = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in list(inspect.signature(command, eval_str=True).parameters.values())[1:]
    ]
    names = {parameter.name for parameter in shared}

    def run(**given: Any) -> None:
        task = TaskOptions(**{name: value for name, value in given.items() if name in names})
        command(task, **{name: value for name, value in given.items() if name not in names})

    parameters = [*shared[:2], *own, *shared[2:]]  # model and data first, what is special next
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # what typer reads
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def refuse(context: typer.Context, names: Sequence[str], why: str) -> None:
    """Refuse those of the parameters `names` that stand on the command line: they would not be used.

    Raises:
        BadParameter: there are any; `why` is told.
    """
    if typed := [option for name, option in given_options(context).items() if name in names]:
        raise typer.BadParameter(f"{', '.join(typed)}: {why}; leave it out.")


def require_one_plan(context: typer.Context, strategy: str | None, plan: Path | None) -> None:
    """Refuse a strategy and a plan file at once, or neither, and a granularity beside the file.

    Raises:
        BadParameter: so it is.
    """
    if (strategy is None) == (plan is None):
        raise typer.BadParameter("give exactly one of --strategy and --plan.")
    if plan is not None and "granularity" in given_options(context):
        raise typer.BadParameter("--granularity and --plan are both given; a plan file has its own.")


def numbers(
    text: str, option: str, *, kind: Callable[[str], Any] = int, least: int | None = None
) -> list[Any]:
    """Return the numbers of a list with commas.

    Raises:
        BadParameter: a part is no number, or one below `least`.
    """
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{option} is {text!r}; expected numbers with commas between.") from None
    if least is not None and min(found) < least:
        raise typer.BadParameter(f"{option} is {text!r}; expected numbers of at least {least}.")
    return found

"""Rich tables of results; they only lay out what they are given."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from layerwise.cli.output import pasted
from layerwise.errors import figure, percent

if TYPE_CHECKING:
    from layerwise.training.result import Result
    from layerwise.training.run_list import RunSummary
    from layerwise.training.tasks import Scores


_LEAST_WORDS = 16
"""Letters of a cell of words that stay in one line where numbers need the room."""


class _Fitting(Table):
    """A table that moves closer, and leaves out its last `spare` columns, before a number is broken."""

    spare = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown = copy.copy(self)
        if not _fits(shown, console, options):
            shown.padding = (0, 1, 0, 0)
            shown.columns = [copy.copy(column) for column in self.columns]
            for column in shown.columns:
                if column.justify == "left":
                    column.max_width = _LEAST_WORDS
                else:
                    column.header = str(column.header).replace(" ", "\n")
            if self.spare and not _fits(shown, console, options):
                del shown.columns[-self.spare :]
            for column in shown.columns:
                column.max_width = None
        yield from Table.__rich_console__(shown, console, options)


def _fits(table: Table, console: Console, options: ConsoleOptions) -> bool:
    return console.measure(table, options=options.update(width=10_000)).maximum <= options.max_width


def new_table(title: str, columns: Sequence[str], *, left: int = 1, spare: int = 0) -> Table:
    """Return an empty table whose first `left` columns are words and the others numbers.

    Where the console is too narrow its columns move closer, and the last `spare` ones are left out.
    """
    table = _Fitting(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(columns),
        pad_edge=False,
        min_width=len(title),
    )
    table.spare = spare
    for index, name in enumerate(columns):
        # a long path goes on in the next line: its end tells the rows apart
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def result_tables(result: Result) -> Iterator[Table | Text]:
    """Yield what a person wants to see at the end of a run."""
    from layerwise.training.run import can_rebuild
    from layerwise.training.run_folder import read_run

    summary = new_table("Result", ["", ""])
    for name, value in result.metrics.items():
        summary.add_row(f"validation {name}", figure(value))
    for name, value in (result.test or {}).items():
        summary.add_row(f"test {name}", figure(value))
    summary.add_row("kept epoch", f"{result.best_epoch + 1} of {len(result.history)} ({result.stopped})")
    share = percent(result.trained_parameters, result.total_parameters)
    summary.add_row("trained parameters", f"{result.trained_parameters:,} ({share}%)")
    summary.add_row("seconds", f"{result.seconds:.1f}")
    if result.out is not None:
        summary.add_row("run", str(result.out))
    yield summary
    where = "test" if result.test_tables else f"validation, epoch {result.best_epoch + 1}"
    yield from class_tables(result.test_tables or result.tables, where, result.task.classes)
    if result.out is None:
        return
    about = read_run(result.out)
    command = f"Predict with it: layerwise predict {pasted(result.out)}"
    if not can_rebuild(about):  # its Python file, which is run where it is named
        command += f" --model {pasted(about['model']['spec'])}"
    if result.task.name == "image_classification":
        yield Text(f"{command} IMAGE...")
    elif (result.out / "transformers").is_dir():
        yield Text(f"{command} FILE (or texts on standard input)")
        yield Text(f"For transformers: {result.out / 'transformers'}")


def scores_tables(scores: Scores, samples: int, classes: Sequence[str]) -> Iterator[Table]:
    """Yield what a person wants to see of a run's scores on a data set of so many samples."""
    summary = new_table("Scores", ["", ""])
    summary.add_row("samples", f"{samples:,}")
    for name, value in scores.values.items():
        summary.add_row(name, figure(value))
    yield summary
    yield from class_tables(scores.tables, "", classes)


def class_tables(tables: Mapping[str, Any], where: str, classes: Sequence[str]) -> Iterator[Table]:
    """Yield the tables of `Scores`, those that there are; a confusion matrix of 12 classes at most."""
    if rows := tables.get("per_class"):
        yield per_class_table(rows, where)
    if (confusion := tables.get("confusion")) and len(confusion) <= 12:
        yield confusion_table(confusion, classes)


def per_class_table(rows: Sequence[Mapping[str, Any]], where: str) -> Table:
    """Return precision, recall and F1 of each class."""
    table = new_table(
        f"Per class ({where})" if where else "Per class", ["class", "precision", "recall", "F1", "samples"]
    )
    for row in rows:
        numbers = (f"{row[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(row["class"], *numbers, f"{row['samples']:,}")
    return table


def confusion_table(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> Table:
    """Return the confusion matrix: a row for each true class, a column for each predicted one."""
    table = new_table("Confusion (rows: true class, columns: predicted)", ["", *classes])
    for name, row in zip(classes, confusion):
        table.add_row(name, *(f"{count:,}" for count in row))
    return table


def prediction_table(rows: Sequence[Mapping[str, Any]], classes: Sequence[str], *, limit: int = 6) -> Table:
    """Return a row for each image: label, its probability, and (for few classes) all probabilities.

    A narrow console goes without the probabilities of all classes.
    """
    shown = list(classes) if len(classes) <= limit else []
    table = new_table("", ["image", "label", "probability", *shown], left=2, spare=len(shown))
    for row in rows:
        every = (f"{row['probabilities'][name]:.3f}" for name in shown)
        table.add_row(row["image"], row["label"], f"{row['probability']:.3f}", *every)
    return table


def runs_tables(runs: Sequence[RunSummary]) -> Iterator[Table]:
    """Yield a table for the runs of each metric; a narrow console goes without their models and rates."""
    columns = ["run", "strategy", "validation", "test", "trained", "seconds", "state", "lr", "model"]
    for metric, of_metric in itertools.groupby(runs, lambda run: run.monitor):
        table = new_table(metric, columns, left=2, spare=2)
        for run in of_metric:
            numbers = ("" if value is None else figure(value) for value in (run.validation, run.test))
            share = "" if run.trained_frac is None else f"{percent(run.trained_frac, 1)}%"
            seconds = "" if run.seconds is None else f"{run.seconds:.0f}"
            made = (f"{run.lr:.1e}", run.model)
            table.add_row(str(run.path), run.strategy, *numbers, share, seconds, run.state, *made)
        yield table

"""Rich tables of results; they only lay out what they are given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table
from rich.text import Text

from layerwise.cli.output import pasted
from layerwise.errors import percent

if TYPE_CHECKING:
    from layerwise.training.result import Result


def new_table(title: str, columns: Sequence[str], *, left: int = 1) -> Table:
    """Return an empty table whose first `left` columns are words and the others numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(columns),
        pad_edge=False,
        min_width=len(title),
    )
    for index, name in enumerate(columns):
        # a long path goes on in the next line: its end tells the rows apart
        table.add_column(name, justify="left" if index < left else "right", overflow="fold")
    return table


def result_tables(result: Result) -> Iterator[Table | Text]:
    """Yield what a person wants to see at the end of a run."""
    from layerwise.training.run import can_rebuild, read_run

    summary = new_table("Result", ["", ""])
    for name, value in result.metrics.items():
        summary.add_row(f"validation {name}", f"{value:.4f}")
    for name, value in (result.test or {}).items():
        summary.add_row(f"test {name}", f"{value:.4f}")
    summary.add_row("kept epoch", f"{result.best_epoch + 1} of {len(result.history)} ({result.stopped})")
    share = percent(result.trained_parameters, result.total_parameters)
    summary.add_row("trained parameters", f"{result.trained_parameters:,} ({share}%)")
    summary.add_row("seconds", f"{result.seconds:.1f}")
    if result.out is not None:
        summary.add_row("run", str(result.out))
    yield summary
    tables = result.test_tables or result.tables
    if rows := tables.get("per_class"):
        where = "test" if result.test_tables else f"validation, epoch {result.best_epoch + 1}"
        yield per_class_table(rows, where)
    if (confusion := tables.get("confusion")) and len(confusion) <= 12:
        yield confusion_table(confusion, result.task.classes)
    if result.out is None or not can_rebuild(read_run(result.out)):
        return
    command = f"Predict with it: layerwise predict {pasted(result.out)}"
    if result.task.name == "image_classification":
        yield Text(f"{command} IMAGE...")
    elif (result.out / "transformers").is_dir():
        yield Text(f"{command} FILE (or texts on standard input)")
        yield Text(f"For transformers: {result.out / 'transformers'}")


def per_class_table(rows: Sequence[Mapping[str, Any]], where: str) -> Table:
    """Return precision, recall and F1 of each class."""
    table = new_table(f"Per class ({where})", ["class", "precision", "recall", "F1", "samples"])
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
    """Return a row for each image: label, its probability, and (for few classes) all probabilities."""
    shown = list(classes) if len(classes) <= limit else []
    table = new_table("", ["image", "label", "probability", *shown], left=2)
    for row in rows:
        every = (f"{row['probabilities'][name]:.3f}" for name in shown)
        table.add_row(row["image"], row["label"], f"{row['probability']:.3f}", *every)
    return table

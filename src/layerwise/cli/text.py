"""The options that concern texts and tables, and how a job keeps them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layerwise.cli.output import above_zero

_TEXT = "Texts (with hf: models)"
_TABLE = "Tables"

TextTask = Literal[
    "text_classification", "multi_label", "regression", "token_classification", "causal_lm", "masked_lm"
]
Task = Annotated[
    TextTask | None,
    typer.Option(
        "--task",
        metavar="<kind>",  # all six are too wide for their column
        help="What the labels are: text_classification (one class a text), multi_label, regression, "
        "token_classification, causal_lm or masked_lm.",
        show_default="text_classification",
        rich_help_panel=_TEXT,
    ),
]


def _option(help: str, **limits: Any) -> Any:
    return typer.Option(help=help, rich_help_panel=_TEXT, **limits)


TextColumn = Annotated[str | None, _option("Column of the text; text.")]
PairColumn = Annotated[str | None, _option("Column of the second text of a pair.")]
PathColumn = Annotated[
    str | None,
    typer.Option(help="Column of the image files, relative to the table; path.", rich_help_panel=_TABLE),
]
LabelColumn = Annotated[
    str | None,
    typer.Option(help="Column of the label, the number or the tags; label.", rich_help_panel=_TABLE),
]
ResponseColumn = Annotated[
    str | None, _option("causal_lm: column of what is learned; the text is its prompt.")
]
GroupColumn = Annotated[str | None, _option("Rows with one value in it stay on one side of the split.")]
SplitColumn = Annotated[
    str | None, typer.Option(help="Column that says train, val or test.", rich_help_panel=_TABLE)
]
ValData = Annotated[Path | None, _option("A table to validate on.")]
TestData = Annotated[Path | None, _option("A table to test on.")]
Encoding = Annotated[str | None, _option("Of text files; utf-8.")]
LabelSeparator = Annotated[str | None, _option("multi_label: between the labels of a row; a comma.")]
SkipBadRows = Annotated[
    bool,
    typer.Option(
        "--skip-bad-rows", help="Leave out rows without path, text or label.", rich_help_panel=_TABLE
    ),
]
MaxLength = Annotated[int | None, _option("Tokens of a text at most; 256.", min=2)]
Padding = Annotated[
    Literal["auto", "batch", "all"] | None,
    _option("To one of a few lengths (auto), to the longest text of a batch (not cached), or of all."),
]
Pooling = Annotated[
    Literal["model", "mean"] | None,
    _option("Classify as the model's class does, or by the mean of all tokens (sentence encoders)."),
]
LmEpochs = Annotated[
    int | None, _option("First tune the language model on the texts for so many epochs (ULMFiT).", min=0)
]
LmLr = Annotated[float | None, _option("Base learning rate of that; 5e-5.", callback=above_zero)]
LmStrategy = Annotated[str | None, _option("Strategy of that; discriminative:decay=0.9.")]


def text_options(**given: Any) -> dict[str, Any] | None:
    """Return what was said of a table, as `Job.text` keeps it; None for nothing.

    Relative paths become absolute ones, so that a run can be resumed from another folder.
    """
    found = {name: value for name, value in given.items() if value not in (None, False)}
    for name in ("val", "test"):
        if name in found:
            found[name] = str(Path(found[name]).resolve())
    return found or None

"""``layerwise audit``: look over a training set-up."""

from __future__ import annotations

from typing import Annotated

import typer

from layerwise.cli.output import JsonFlag, friendly, print_json, print_table


@friendly
def audit(
    build: Annotated[
        str,
        typer.Argument(
            help="script.py:function. The function takes no arguments and returns the model, or the model "
            "and its optimizer (and scheduler, and loader)."
        ),
    ],
    as_json: JsonFlag = False,
) -> None:
    """Say what will go wrong in a training set-up, why, and what to do about it.

    THIS RUNS THE FILE AND THE FUNCTION, with all your rights: the audit looks at the real objects.

    With a loader one batch is run forward and backward as well; nothing is trained or saved.

    The exit code is 1 if there is a finding of severity error, else 0.
    """
    from layerwise.sources.usersetup import call_setup
    from layerwise.tuning.audit import audit as look_over

    parts = call_setup(build)
    report = look_over(
        parts["model"], parts["optimizer"], scheduler=parts["scheduler"], loader=parts["loader"]
    )
    if as_json:
        print_json(report.to_dict())
    else:
        print_table(report)
    if report.errors:
        raise typer.Exit(1)

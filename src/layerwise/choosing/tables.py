"""A table as text, for the ``print`` of results."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a heading, the first column flush left and all others flush right.

    >>> print(text_table(["group", "shift"], [["stem", "0.1"], ["layer1", "12.0"]]))
    group   shift
    stem      0.1
    layer1   12.0
    """
    widths = [max(len(line[i]) for line in [columns, *rows]) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in [columns, *rows]
    )

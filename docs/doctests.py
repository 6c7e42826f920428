"""For mkdocs: show the doctests of docstrings as code, which Markdown takes for quotations."""

from __future__ import annotations

from typing import Any

import griffe


class Doctests(griffe.Extension):
    """Puts a heading before each doctest at the margin of a docstring, by which mkdocstrings knows it."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Change the docstring of a module, class, function or attribute that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = with_heading(obj.docstring.value)


def with_heading(text: str) -> str:
    r"""Return a docstring in which doctests at the margin stand below "Examples:".

    >>> with_heading("Return 3.\n\n>>> 1 + 2\n3")
    'Return 3.\n\nExamples:\n    >>> 1 + 2\n    3'
    """
    made, inside = [], False
    for paragraph in text.split("\n\n"):
        lines = paragraph.split("\n")
        if lines[0].startswith(">>>"):
            heading = [] if inside else ["Examples:"]
            lines = [*heading, *("    " + line for line in lines)]
            inside = True
        else:
            inside = False
        made.append("\n".join(lines))
    return "\n\n".join(made)

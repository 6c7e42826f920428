"""`Shown`: what notebooks show of a result is what `print` shows."""

from __future__ import annotations

from typing import Any


class Shown:
    """A result with a text for people, which IPython and Jupyter show in place of its fields.

    ``repr`` stays the dataclass's own.
    """

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

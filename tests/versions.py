"""What the oldest packages that pyproject.toml allows do otherwise, or not at all."""

import importlib.metadata

import pytest
from torch.utils._python_dispatch import TorchDispatchMode

needs_operators_in_modes = pytest.mark.skipif(
    not hasattr(TorchDispatchMode, "supports_higher_order_operators"),
    reason="this torch shows a mode no operators that take functions",
)
_CLICK_JUDGES = not any("pydantic" in needed for needed in importlib.metadata.requires("typer") or ())


def is_told(said: str, text: str) -> bool:
    """Return whether `said` stands in `text`; of a number that click judged, what it is of."""
    named = said.partition(" is given;")[0].replace("'", "")
    return said in text or (_CLICK_JUDGES and named in text.replace("'", ""))

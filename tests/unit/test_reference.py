"""The reference names what ``import layerwise`` offers, and what the guide imports from its modules."""

import re
from pathlib import Path

import layerwise

DOCS = Path(__file__).parents[2] / "docs"
REFERENCE = (DOCS / "reference.md").read_text()
IMPORT = re.compile(r"^from (layerwise\.[\w.]+) import ([\w, ]+)$", re.MULTILINE)


def left_out(names: list[str], reference: str) -> list[str]:
    """Return the full names that no line ``::: NAME`` of `reference` covers, by itself or by its module."""
    shown = set(re.findall(r"^::: ([\w.]+)$", reference, re.MULTILINE))
    return [name for name in names if name not in shown and name.rpartition(".")[0] not in shown]


def imported(page: str) -> list[str]:
    """Return the full names that the Python of a page imports from modules of layerwise."""
    return [f"{home}.{name}" for home, names in IMPORT.findall(page) for name in names.split(", ")]


def test_every_name_of_the_package_is_in_the_reference():
    # What __all__ promises can be looked up.
    names = [f"{home}.{name}" for name, home in layerwise._HOME.items()]
    assert len(names) == len(layerwise.__all__) - 1  # all but __version__
    assert left_out(names, REFERENCE) == []


def test_what_the_guide_imports_is_in_the_reference():
    # A reader who copies an import finds what it does.
    names = [name for page in DOCS.glob("guide/*.md") for name in imported(page.read_text())]
    assert "layerwise.sources.text.encode" in names
    assert left_out(names, REFERENCE) == []


def test_a_missing_name_is_found():
    # The comparison must be able to fail: a name is not covered by a longer one, nor by a text.
    reference = "::: a.b\n::: a.c.d\nand a.e.f\n"
    assert left_out(["a.b.x", "a.c.d", "a.c", "a.e.f"], reference) == ["a.c", "a.e.f"]

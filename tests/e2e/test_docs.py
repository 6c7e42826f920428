"""The Python in the README and the guide is code that runs.

The ```python blocks of one page run top to bottom in one namespace, in an empty folder. What a page takes for
granted (a model, a loader) stands in a comment that readers do not see:

    <!-- setup
    model = ...
    -->

A block that cannot run here follows a line ``<!-- not run: REASON -->``.
"""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^<!-- setup\n(?P<setup>.*?)^-->$"
    r"|(?P<skip>^<!-- not run: .+? -->\n+)?^```python\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def blocks(page: str) -> list[tuple[int, str]]:
    """Return (line number, code) of all blocks of `page` that are to be run."""
    found = []
    for match in BLOCK.finditer(page):
        part = "setup" if match["setup"] is not None else "code"
        if match["skip"] is None:
            found.append((page.count("\n", 0, match.start(part)), match[part]))
    return found


def with_code(pages: list[Path]) -> list[Path]:
    return [page for page in pages if page.exists() and blocks(page.read_text())]


@pytest.mark.parametrize("page", with_code(PAGES), ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.filterwarnings("default")
def test_the_python_of_the_page_runs(page, tmp_path, monkeypatch):
    # A reader may paste every block of a page in order, and it works.
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    for line, code in blocks(page.read_text()):
        exec(compile("\n" * line + code, str(page), "exec"), namespace)


def test_blocks_are_found_and_numbered():
    # The extraction itself must find blocks, and leave out those marked.
    page = "a\n```python\nx = 1\n```\n<!-- not run: slow -->\n```python\n1/0\n```\n<!-- setup\ny = 2\n-->\n"
    assert blocks(page) == [(2, "x = 1\n"), (9, "y = 2\n")]

"""The folders are the data flow: a folder imports only from those before it."""

import ast
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import layerwise

SRC = Path(layerwise.__file__).parent
ORDER = [
    "shown",
    "errors",
    "files",
    "layers",
    "plans",
    "tuning",
    "cache",
    "sources",
    "training",
    "choosing",
    "report",
    "integrations",
    "cli",
]
# Of a folder with folders inside: its modules that these use, the folders, and all its other modules.
INSIDE = {
    "cache": [
        "remedies",
        "comparing",
        "traceless",
        "changes",
        "cutting",
        "replay",
        "store",
        "samples",
        "proof",
    ],
}
# What `import layerwise` and a plain `layerwise.fit` may need; anything else is an extra.
OPTIONAL = {
    "altair",
    "datasets",
    "fastai",
    "lightning",
    "optuna",
    "peft",
    "PIL",
    "sklearn",
    "timm",
    "torchvision",
    "transformers",
}


def imports_of(tree: ast.AST) -> list[tuple[str, bool]]:
    """Return every imported module, and whether it is imported when the file is (not in a function)."""
    inside = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in ast.walk(function)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) not in inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found += [(f"{node.module}.{alias.name}", id(node) not in inside) for alias in node.names]
    return found


def upward(path: Path, source: str) -> list[str]:
    """Return the imports of a file in `path` (relative to the package) that point the wrong way."""
    if path.name == "__init__.py" and len(path.parts) == 1:
        return []
    names = [name.split(".") for name, _ in imports_of(ast.parse(source))]
    parts = [part.removesuffix(".py") for part in path.parts]
    return [
        f"{path} imports {'.'.join(name)}"
        for name in names
        if name[0] == "layerwise" and name[1] in ORDER and place(name[1:]) > place(parts)
    ]


def place(parts: Sequence[str]) -> tuple[int, int]:
    """Return where a module stands in the order, given by folder and name."""
    inside = INSIDE.get(parts[0], [])
    own = inside.index(parts[1]) if len(parts) > 1 and parts[1] in inside else len(inside)
    return ORDER.index(parts[0]), own


def test_no_file_imports_from_a_later_folder():
    # The order of the folders is the order of the data; an upward import would be a cycle in the making.
    files = [path for path in SRC.rglob("*.py") if path.name != "__main__.py"]
    wrong = [w for path in files for w in upward(path.relative_to(SRC), path.read_text())]
    assert not wrong


def test_the_check_finds_an_upward_import():
    # The comparison itself must be able to fail.
    assert upward(Path("plans/plan.py"), "from layerwise.tuning.tuner import Tuner")
    assert upward(Path("plans/plan.py"), "def f():\n    import layerwise.cli.main")
    assert upward(Path("cache/replay/ghost.py"), "from layerwise.cache.samples.reading import Order")
    assert upward(Path("cache/cutting/cut.py"), "from layerwise.cache.frozen import FrozenPart")
    assert not upward(Path("cache/frozen.py"), "from layerwise.cache.cutting.cut import Cut")
    assert not upward(Path("tuning/tuner.py"), "from layerwise.plans.plan import Plan")


def test_plans_know_no_torch():
    # A plan is plain data: it can be read and written where there is no torch.
    for path in (SRC / "plans").rglob("*.py"):
        names = {name.split(".")[0] for name, _ in imports_of(ast.parse(path.read_text()))}
        assert "torch" not in names, path


def test_optional_packages_are_imported_where_they_are_used():
    # Importing any part of layerwise must not need an extra; only integrations may.
    wrong = [
        f"{path.relative_to(SRC)}: {name}"
        for path in SRC.rglob("*.py")
        if path.parent.name != "integrations"
        for name, at_import in imports_of(ast.parse(path.read_text()))
        if at_import and name.split(".")[0] in OPTIONAL and not in_type_checking(path, name)
    ]
    assert not wrong


def in_type_checking(path: Path, name: str) -> bool:
    """Return whether `name` is imported only under ``if TYPE_CHECKING``."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return any(found == name for found, _ in imports_of(node))
    return False


def test_every_exported_name_exists_and_is_sorted():
    # __all__ is what users see: every name must resolve, in order.
    assert layerwise.__all__ == ["__version__", *sorted(layerwise._HOME)]
    for name in layerwise.__all__:
        assert getattr(layerwise, name) is not None


def test_import_layerwise_does_not_import_torch():
    # `layerwise --help` answers at once because torch is imported when needed, not before.
    code = "import sys, layerwise, layerwise.cli.main; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)

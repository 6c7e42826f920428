"""Rich tables of shift and transferability; they only lay out what they are given."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from layerwise.cli.tables import new_table
from layerwise.errors import shorten

if TYPE_CHECKING:
    from layerwise.choosing.depths import Transferability
    from layerwise.choosing.shift_result import Shift

_FIGURES = (
    {"norms": "norms", "frechet": "Fréchet", "kl": "KL"},
    {"mmd": "MMD", "proxy_a": "proxy A", "cka": "CKA"},
)
"""Figure -> heading: of the whole features, and of the sketches of them."""


def shift_tables(found: Shift, classes: Sequence[str] = ()) -> Iterator[Table | Text]:
    """Yield the shift of each group, the input properties, and the label side."""
    against = {"norms": "running statistics", "signature": "a signature", "source": "a source sample"}
    titles = (
        f"Shift against {against[found.method]} ({found.samples} samples, {found.level:.0%} intervals)",
        "The same in sketches of the features (random directions)",
    )
    for title, figures in zip(titles, _FIGURES, strict=True):
        shown = [name for name in figures if any(getattr(g, name) is not None for g in found.groups)]
        if not shown:
            continue
        table = new_table(title, ["group", "depth", *(figures[name] for name in shown)])
        for group in found.groups:
            values = (getattr(group, name) for name in shown)
            table.add_row(group.group, str(group.depth), *("-" if v is None else str(v) for v in values))
        yield table
    yield Text(f"{found.summary}\n")
    if found.inputs:
        yield _input_table(found)
    if found.labels is not None:
        yield transfer_table(found.labels.transfer)
        counts = found.labels.counts
        named = [f"{classes[k] if k < len(classes) else k} {n}" for k, n in counts.items()]
        ratio = found.labels.imbalance
        even = "all equally frequent" if ratio == 1 else f"largest {ratio:.3g} times the smallest"
        yield Text(f"classes: {shorten(named, 12)}; {even}\n")
    for note in found.notes:
        yield Text(f"note: {note}")


def _input_table(found: Shift) -> Table:
    """Return the properties of the inputs; beside the source's where there is one to measure them on."""
    if all(entry.effect is None for entry in found.inputs):
        table = new_table("Inputs", ["property", "mean"])
        for entry in found.inputs:
            table.add_row(entry.name, f"{entry.target:.3g}")
        return table
    table = new_table("Inputs", ["property", "target", "source", "effect in sd", ""])
    for entry in found.inputs:
        table.add_row(
            entry.name,
            f"{entry.target:.3g}",
            "-" if entry.source is None else f"{entry.source:.3g}",
            "-" if entry.effect is None else str(entry.effect),
            "moved" if entry.moved else "",
        )
    return table


def transfer_table(found: Transferability) -> Table:
    """Return the scores of every depth; on a narrow console those of the probe and the neighbours alone."""
    table = new_table(
        f"Frozen features at each depth ({found.samples} samples; largest class {found.chance:.3f})",
        ["group", "depth", "linear probe", "kNN", "LogME", "NLEEP", "H-score"],
        spare=3,
    )
    for d in found.depths:
        table.add_row(*d.cells())
    return table

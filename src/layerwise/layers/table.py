"""A layer map as a table for people."""

from __future__ import annotations

import io
from collections.abc import Collection
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from layerwise.errors import percent, plural, shorten
from layerwise.layers.isolation import unwrap
from layerwise.shown import Shown

if TYPE_CHECKING:
    from torch import nn

    from layerwise.layers.layermap import LayerGroup, LayerMap

_MODULES_SHOWN = 3
_WIDTH = 110
_FIRST_TO_GO = ("modules", "share", "MFLOPs", "output KiB")


class LayerTable(Shown):
    """A map's groups for Rich, input first: depth, modules, parameters, share, and costs per sample.

    Where the console is too narrow for all columns, some are left out.

    Args:
        layers: the map.
        model: the live model, to show how many parameters of each group have ``requires_grad`` now; the
            column is left out without it.
    """

    def __init__(self, layers: LayerMap, model: nn.Module | None = None) -> None:
        self._layers = layers
        self._trainable = None if model is None else trainable_numel(layers, model)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table with as many columns as there is room for."""
        unbounded = options.update(width=10_000)
        for count in range(len(_FIRST_TO_GO) + 1):
            table = _table(self._layers, self._trainable, without=_FIRST_TO_GO[:count])
            if console.measure(table, options=unbounded).maximum <= options.max_width:
                break
        yield table

    def __str__(self) -> str:
        return as_text(self)


def _table(layers: LayerMap, trainable: dict[str, int] | None, without: Collection[str]) -> Table:
    title = f"{layers.model_class.rpartition('.')[2]}, {plural(len(layers), layers.granularity[:-1])}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    counts = (trainable or {}).values()
    flops = sum(group.flops or 0 for group in layers)
    columns = {
        "group": [*(group.name + _role(group) for group in layers), "total"],
        "depth": [*map(str, range(len(layers) - 1, -1, -1)), ""],
        "modules": [*(_shown(group.modules) for group in layers), ""],
        "parameters": [*(f"{group.numel:,}" for group in layers), f"{layers.numel:,}"],
        "trainable": [f"{count:,}" for count in (*counts, sum(counts))],
        "share": [*(f"{percent(group.numel, layers.numel)}%" for group in layers), ""],
        "MFLOPs": [
            *("" if group.flops is None else f"{group.flops / 1e6:,.1f}" for group in layers),
            f"{flops / 1e6:,.1f}",
        ],
        "output KiB": [
            *("" if (size := group.activation_bytes) is None else f"{size / 1024:,.1f}" for group in layers),
            "",
        ],
    }
    left_out = {*without, *(["trainable"] if trainable is None else [])}
    columns = {name: column for name, column in columns.items() if name not in left_out}
    for name in columns:
        if name == "group":
            table.add_column(name, overflow="fold")
        elif name == "modules":
            table.add_column(name, overflow="ellipsis", no_wrap=True, max_width=44)
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for depth, row in zip(range(len(layers) - 1, -2, -1), zip(*columns.values())):
        table.add_row(*map(Text, row), end_section=depth == 0)  # names may hold [red] or :x:
    lines = [*layers.notes]
    if layers.unused:
        lines.append(f"not read in the forward pass: {shorten(layers.unused, _MODULES_SHOWN)}")
    if lines:
        table.caption = Text("\n".join(f"note: {line}" for line in lines), style="table.caption")
    table.caption_justify = "left"
    return table


def _role(group: LayerGroup) -> str:
    return f" ({group.role})" if group.role != "trunk" else ""


def trainable_numel(layers: LayerMap, model: nn.Module) -> dict[str, int]:
    """Return group name -> number of scalars of `model` in it that have ``requires_grad``."""
    counts = {group.name: 0 for group in layers}
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad:
            counts[layers.group_of(name)] += parameter.numel()
    return counts


def as_text(table: RenderableType) -> str:
    """Return a table as plain text, 110 columns wide, whatever the environment says of colours."""
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH, no_color=True, force_terminal=False).print(table)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _shown(modules: tuple[str, ...]) -> str:
    more = len(modules) - _MODULES_SHOWN
    return " ".join(modules[:_MODULES_SHOWN]) + (f" +{more}" if more > 0 else "")

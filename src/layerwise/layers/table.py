"""A layer map as a table for people."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.table import Table

from layerwise.layers.isolation import unwrap

if TYPE_CHECKING:
    from torch import nn

    from layerwise.layers.layermap import LayerMap

_MODULES_SHOWN = 3
_WIDTH = 110


def layer_table(layers: LayerMap, model: nn.Module | None = None) -> Table:
    """Return a table of the groups, input first: depth, modules, parameters, share, and costs per sample.

    Args:
        layers: the map.
        model: the live model, to show how many parameters of each group have ``requires_grad`` now; the
            column is left out without it.
    """
    title = f"{layers.model_class.rpartition('.')[2]}, {len(layers)} {layers.granularity}"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("group", overflow="fold", no_wrap=True)
    table.add_column("depth", justify="right")
    table.add_column("modules", overflow="ellipsis", no_wrap=True, max_width=44)
    table.add_column("parameters", justify="right")
    if model is not None:
        table.add_column("trainable", justify="right")
    table.add_column("share", justify="right")
    table.add_column("MFLOPs", justify="right")
    table.add_column("output KiB", justify="right")
    trainable = {} if model is None else trainable_numel(layers, model)
    for depth, group in zip(range(len(layers) - 1, -1, -1), layers):
        role = f" ({group.role})" if group.role != "trunk" else ""
        table.add_row(
            group.name + role,
            str(depth),
            _shown(group.modules),
            f"{group.numel:,}",
            *([f"{trainable[group.name]:,}"] if model is not None else []),
            f"{group.numel / max(layers.numel, 1):.1%}",
            "" if group.flops is None else f"{group.flops / 1e6:,.1f}",
            "" if group.activation_bytes is None else f"{group.activation_bytes / 1024:,.1f}",
            end_section=depth == 0,
        )
    flops = sum(group.flops or 0 for group in layers)
    table.add_row(
        "total",
        "",
        "",
        f"{layers.numel:,}",
        *([f"{sum(trainable.values()):,}"] if model is not None else []),
        "",
        f"{flops / 1e6:,.1f}",
        "",
    )
    lines = [*layers.notes]
    if layers.unused:
        shown = ", ".join(layers.unused[:_MODULES_SHOWN])
        more = f" and {len(layers.unused) - _MODULES_SHOWN} more" * (len(layers.unused) > _MODULES_SHOWN)
        lines.append(f"not read in the forward pass: {shown}{more}")
    table.caption = "\n".join(f"note: {line}" for line in lines) or None
    table.caption_justify = "left"
    return table


def trainable_numel(layers: LayerMap, model: nn.Module) -> dict[str, int]:
    """Return group name -> number of scalars of `model` in it that have ``requires_grad``."""
    counts = {group.name: 0 for group in layers}
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad:
            counts[layers.group_of(name)] += parameter.numel()
    return counts


def as_text(layers: LayerMap) -> str:
    """Return the table as plain text, as ``print(layers)`` shows it."""
    buffer = io.StringIO()
    Console(file=buffer, width=_WIDTH).print(layer_table(layers))
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def _shown(modules: tuple[str, ...]) -> str:
    more = len(modules) - _MODULES_SHOWN
    return " ".join(modules[:_MODULES_SHOWN]) + (f" +{more}" if more > 0 else "")

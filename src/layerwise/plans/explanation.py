"""`Explanation`: what a plan does and when, as numbers, and as a timeline and a heat map to look at."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from layerwise.errors import percent, plural
from layerwise.layers.table import as_text
from layerwise.shown import Shown

JOINING = "joining groups warm up for"
"""How the note of a phase begins that holds from the second phase on."""
_SHADES = "·░▒▓█"
_MOST_ROWS = 40
_MOST_ROWS_OF_GROUPS = 80
_PHASE_WIDTH, _LEAST_PHASE_WIDTH = 44, 20
_LEAST_WORDS_WIDTH = 16
_FIRST_TO_GO = ("start", "end", "highest peak", "length")
_LEAST_COLUMNS, _GAP = 16, 2  # of the heat map, and between the names and it


@dataclass(frozen=True)
class GroupRates:
    """The rates of one group in one phase, as multiples of η or, with a base rate, absolute.

    Attributes:
        name: the group.
        start: at the first step of the phase.
        peak: the highest of the phase.
        end: at its last step.
        parameters: number of scalars that learn in the group.
    """

    name: str
    start: float
    peak: float
    end: float
    parameters: int


@dataclass(frozen=True)
class PhaseSummary:
    """One phase of a plan.

    Attributes:
        name: of the phase.
        first_step: number of its first optimiser step, from 0.
        steps: its length.
        epochs: its length in epochs where it is counted in epochs, else None.
        groups: those that learn, input -> output.
        trainable: number of scalars that learn; where groups are drawn, the most that do at a time. It leaves
            out norms that the norm policy holds, and counts those that it lets learn in frozen groups (a note
            says so); where `LayerMap.norms` is None, norms count with their groups. So do constants that the
            model freezes itself, which a map does not know.
        notes: what else is special: schedule, norms, regularisation.
    """

    name: str
    first_step: int
    steps: int
    epochs: int | None
    groups: tuple[GroupRates, ...]
    trainable: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Explanation(Shown):
    """What a plan does: ``print`` it, or take `to_dict` for a machine.

    Attributes:
        strategy: how the plan was made.
        lr: the base rate, or None where rates are multiples of it.
        steps_per_epoch: that lengths were computed with.
        assumed: whether `steps_per_epoch` was not given.
        total: number of scalars in the model.
        phases: in order.
        groups: all groups, input -> output.
        heat_edges: the steps at which the columns of the heat map begin, and the end.
        heat_steps: the steps at which `heat` was read, one in each column.
        heat: for each group its rate at each of `heat_steps`.
    """

    strategy: str
    lr: float | None
    steps_per_epoch: int
    assumed: bool
    total: int
    phases: tuple[PhaseSummary, ...]
    groups: tuple[str, ...]
    heat_edges: tuple[int, ...]
    heat_steps: tuple[int, ...]
    heat: tuple[tuple[float, ...], ...]

    @property
    def steps(self) -> int:
        """Length of the plan in optimiser steps."""
        return sum(phase.steps for phase in self.phases)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {**asdict(self), "steps": self.steps}

    def __str__(self) -> str:
        return as_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the timeline, with as many columns as there is room for, and the heat map."""
        unbounded = options.update(width=10_000)
        for count in range(len(_FIRST_TO_GO) + 1):
            without = _FIRST_TO_GO[:count]
            # words of groups fold only where the lengths would have to go else
            least = self._table(without, narrow=True, fold=_FIRST_TO_GO[count : count + 1] == ("length",))
            if console.measure(least, options=unbounded).maximum <= options.max_width:
                break
        yield Text(self._title())
        yield self._table(without)
        yield self._heat_map(options.max_width)
        yield Text(self._footnote(), style="dim")

    def _title(self) -> str:
        epochs = math.ceil(self.steps / self.steps_per_epoch)
        phases, length = plural(len(self.phases), "phase"), plural(epochs, "epoch")
        title = f"{self.strategy}: {phases}, {length}, {plural(self.steps, 'step')}"
        return "\n".join([title, *(f"  {note}" for note in self._common_notes())])

    def _common_notes(self) -> list[str]:
        """Return the notes that hold for all phases (nothing joins in the first one)."""
        later = self.phases[1:] or self.phases
        return [
            note
            for note in later[0].notes
            if all(note in phase.notes for phase in later)
            and (note in self.phases[0].notes or note.startswith(JOINING))
        ]

    def _footnote(self) -> str:
        rates = "rates are multiples of the learning rate" if self.lr is None else f"base rate {self.lr:g}"
        steps = f"{plural(self.steps_per_epoch, 'step')} an epoch{' (assumed)' if self.assumed else ''}"
        frozen = (
            "other groups are frozen; rates at start and end: --json"
            if self._is_long
            else "a group without a row is frozen"
        )
        return f"{rates}; {steps}; {frozen}"

    @property
    def _is_long(self) -> bool:
        """Whether a row for each phase and group would be too many: they grow with the square of groups."""
        return len(self.phases) > 2 and sum(len(phase.groups) for phase in self.phases) > _MOST_ROWS

    def _table(self, without: Collection[str] = (), *, narrow: bool = False, fold: bool = False) -> Table:
        """Return a row for each phase and group that learns; for a long plan a row for each phase.

        Args:
            without: titles of columns to leave out.
            narrow: the first column is as narrow as it may be; its words go on in the next line.
            fold: so is that of the groups in a long plan.
        """
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        words = "groups that learn" if self._is_long else "group"
        rates = ["highest peak", "lowest peak"] if self._is_long else ["start", "peak", "end"]
        titles = ["phase", "length", "trainable", words, *rates]
        shown = [title for title in titles if title not in without]
        for title in shown:
            if title == "phase":
                width = _LEAST_PHASE_WIDTH if narrow else _PHASE_WIDTH
                table.add_column(title, max_width=width, overflow="fold")
            elif title == words and self._is_long:
                longest = max(map(len, self.groups))
                least = max(longest, _LEAST_WORDS_WIDTH)
                table.add_column(title, max_width=least if fold else None, overflow="fold")
            elif title == words:
                table.add_column(title, no_wrap=True, overflow="fold")
            else:
                table.add_column(title, justify="right", no_wrap=True)
        common = self._common_notes()
        for number, phase in enumerate(self.phases):
            length = plural(phase.steps, "step")
            if phase.epochs is not None:
                length = plural(phase.epochs, "epoch")
            share = f"{_count(phase.trainable)} {percent(phase.trainable, self.total):>5}%"
            first = [f"{number + 1} {phase.name}", length, share]
            left = [first, *([f"  {note}", "", ""] for note in phase.notes if note not in common)]
            right = [self._range(phase)] if self._is_long else self._group_rows(phase)
            nothing = [""] * (1 + len(rates))
            last = number + 1 == len(self.phases)
            for row in range(max(len(left), len(right))):
                cells = [
                    *(left[row] if row < len(left) else ["", "", ""]),
                    *(right[row] if row < len(right) else nothing),
                ]
                table.add_row(
                    *(Text(cell) for title, cell in zip(titles, cells) if title in shown),
                    end_section=row + 1 == max(len(left), len(right)) and not last and not self._is_long,
                )
        return table

    def _group_rows(self, phase: PhaseSummary) -> list[list[str]]:
        """Return a row a group, output on top; of very many groups only the outermost."""
        rows = [
            [group.name, *(_rate(value) for value in (group.start, group.peak, group.end))]
            for group in reversed(phase.groups)
        ]
        if len(rows) > _MOST_ROWS_OF_GROUPS:
            rows[2:-2] = [[f"... {len(rows) - 4} between", "", "", ""]]
        return rows

    def _range(self, phase: PhaseSummary) -> list[str]:
        """Return which groups learn, from the output on, and the highest and the lowest of their peaks."""
        if not phase.groups:
            return ["none", "", ""]
        names = [group.name for group in phase.groups]
        first = self.groups.index(names[0])
        whole = names == list(self.groups[first : first + len(names)])
        words = names[0] if len(names) == 1 else f"{names[-1]} {'to' if whole else '...'} {names[0]}"
        peaks = [group.peak for group in phase.groups]
        return [f"{words} ({len(names)})", _rate(max(peaks)), _rate(min(peaks))]

    def _heat_map(self, width: int) -> Table:
        """Return groups (output on top) x time; darker and warmer is faster, on a logarithmic scale.

        Where `width` is too little it has fewer columns, and then names without their beginnings, which
        tell least apart.
        """
        most = max(width - _GAP - _LEAST_COLUMNS, 2)
        names = [name if len(name) <= most else f"…{name[1 - most :]}" for name in self.groups]
        columns = len(self.heat_steps)
        room = min(columns, max(width - _GAP - max(map(len, names)), _LEAST_COLUMNS))
        shown = [columns * i // room for i in range(room)]
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(justify="right")
        table.add_column(no_wrap=True)
        highest = max((rate for row in self.heat for rate in row), default=0.0)
        positive = [rate for row in self.heat for rate in row if rate > highest * 1e-3]
        lowest = min(positive, default=0.0)
        for name, row in reversed(list(zip(names, self.heat))):
            cells = Text()
            for column in shown:
                cells.append(*_cell(row[column], lowest, highest))
            table.add_row(Text(name), cells)
        table.add_row("", Text(self._axis([self.heat_steps[column] for column in shown])))
        return table

    def _axis(self, steps: Sequence[int]) -> str:
        """Return a line that marks where each phase starts, by its number; `steps` has one a column."""
        line = [" "] * len(steps)
        for number, phase in enumerate(self.phases):
            inside = range(phase.first_step, phase.first_step + phase.steps)
            column = next((i for i, step in enumerate(steps) if step in inside), None)
            label = str(number + 1)
            # a blank before each, or two numbers would read as one
            if column is not None and all(c == " " for c in line[max(column - 1, 0) : column + len(label)]):
                line[column : column + len(label)] = label
        return "".join(line[: len(steps)])


def _cell(rate: float, lowest: float, highest: float) -> tuple[str, str]:
    """Return the character and the style of one cell of the heat map."""
    if rate <= 0:
        return _SHADES[0], "dim"
    height = 1.0
    if highest > lowest:
        height = min(1.0, max(0.0, math.log(rate / lowest) / math.log(highest / lowest)))
    shade = _SHADES[1 + min(3, int(height * 4))]
    red, blue = round(60 + 195 * height), round(220 - 180 * height)
    return shade, f"#{red:02x}{round(90 + 60 * height):02x}{blue:02x}"


def _rate(value: float) -> str:
    return "0" if value == 0 else f"{value:.3g}" if value >= 0.01 else f"{value:.2e}"


def _count(number: int) -> str:
    for size, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)

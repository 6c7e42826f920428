"""CPU time of several ways to do the same work, taken by turns, and results kept as JSON.

The machine is shared: its speed changes within seconds. So the contenders take turns, of some steps where
they can be stopped there and run by run where not, and what is compared is always from one round.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from layerwise.files import write_json

RESULTS = Path(__file__).parent / "results"

Seconds = dict[str, float]
"""Contender -> CPU seconds in one round."""


def by_steps(
    contenders: Mapping[str, Callable[[], Iterator[Any]]], *, rounds: int, turn: int = 1
) -> list[Seconds]:
    """Run all contenders for `rounds` rounds, some steps of each by turns.

    Args:
        contenders: by name, a function that begins one round and gives an iterator; each of its items is
            one step. What it does before its first item and after its last counts as well.
        rounds: how many count, at least 1. One more is run before them and thrown away.
        turn: steps that a contender makes before it is the next one's turn.

    Returns:
        For each round, the seconds of each contender.
    """
    found = []
    for number in range(rounds + 1):
        names = list(contenders)
        shift = number % len(names)
        names = names[shift:] + names[:shift]
        under_way = {name: contenders[name]() for name in names}
        seconds = dict.fromkeys(contenders, 0.0)
        while under_way:
            for name in [name for name in names if name in under_way]:
                began_s = time.process_time()
                made = len(list(islice(under_way[name], turn)))
                seconds[name] += time.process_time() - began_s
                if made < turn:
                    del under_way[name]
        found.append(seconds)
    return found[1:]


def by_runs(
    contenders: Mapping[str, Callable[[], float]],
    *,
    rounds: int,
    after_round: Callable[[list[Seconds]], object] = lambda _: None,
) -> list[Seconds]:
    """Run each contender as a whole, by turns; another one begins each round.

    Args:
        contenders: by name, a function that does the whole work and returns the seconds that count.
        rounds: at least 1.
        after_round: called with the rounds so far, to save what was measured.

    Returns:
        For each round, the seconds of each contender.
    """
    found: list[Seconds] = []
    for number in range(rounds):
        names = list(contenders)
        shift = number % len(names)
        seconds = {name: contenders[name]() for name in names[shift:] + names[:shift]}
        found.append({name: seconds[name] for name in contenders})
        after_round(found)
    return found


def in_new_process(function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str]) -> Any:
    """Return what a function of a module gives in a new process with further environment variables."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(function, arguments)
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True)
class Ratio:
    """One contender's time over another's: median over the rounds, lowest and highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, rounds: Sequence[Seconds], one: str, other: str) -> Ratio:
        """Compare two contenders round by round."""
        ratios = [seconds[one] / seconds[other] for seconds in rounds]
        return cls(statistics.median(ratios), min(ratios), max(ratios))

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f}-{self.high:.3f})"

    def to_list(self) -> list[float]:
        """Return median, lowest and highest, for JSON."""
        return [round(value, 4) for value in (self.median, self.low, self.high)]


def verdict(value: float, limit: float | None) -> str:
    """Return ``<= limit: met`` or ``missed``; ``""`` where there is no limit."""
    if limit is None:
        return ""
    return f"<= {limit:g} {'met' if value <= limit else 'MISSED'}"


class Results:
    """Rows of one benchmark by name, in ``benchmarks/results/NAME.json``; written after each row."""

    def __init__(self, name: str) -> None:
        self.path = RESULTS / f"{name}.json"
        self.rows: dict[str, dict[str, Any]] = {}
        self._read()

    def _read(self) -> None:
        if self.path.exists():
            self.rows.update(json.loads(self.path.read_text()))

    def save(self, key: str, row: dict[str, Any]) -> None:
        """Put one row, with when and where it was measured, into the file."""
        about = {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} shared CPU cores, {platform.machine()}; one thread",
            "torch": str(torch.__version__),
        }
        self._read()  # another part may have been measured meanwhile, by another process
        self.rows[key] = {**row, **about}
        write_json(self.path, self.rows)

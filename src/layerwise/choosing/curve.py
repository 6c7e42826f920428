"""`transfer_curve`: what each depth of the pretrained network is worth, by training on top of it."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from layerwise.cache.stock import CachePool
from layerwise.choosing.features import map_for
from layerwise.choosing.space import names_by_depth, spread_depths
from layerwise.choosing.tables import text_table
from layerwise.choosing.terms import (
    SET_FOR_ALL,
    about_data,
    check_fit_options,
    mean_and_error,
    metric_and_mode,
    outcome_of,
    plain,
)
from layerwise.errors import DataError, PlanError, RunError, figure, plural
from layerwise.files import write_json
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.settings import Schedule
from layerwise.shown import Shown
from layerwise.training.fit import fit

Series = Literal["frozen", "fine-tuned"]
SERIES: tuple[Series, ...] = ("frozen", "fine-tuned")


@dataclass(frozen=True)
class TransferPoint:
    """One depth of the curve, over its seeds.

    Attributes:
        series: ``"frozen"``: what is kept of the pretrained network does not learn; ``"fine-tuned"``: it
            does.
        trained_groups: number of groups that start anew, at the output end.
        first: the first of them.
        mean: metric, averaged over seeds.
        error: standard error of that mean; 0 with one seed.
        seeds: how many there are.
    """

    series: Series
    trained_groups: int
    first: str
    mean: float
    error: float
    seeds: int

    def cells(self) -> list[str]:
        """Return the point as a row of a table; a single seed has no error."""
        error = figure(self.error) if self.seeds > 1 else "-"
        return [self.series, str(self.trained_groups), self.first, figure(self.mean), error, str(self.seeds)]


@dataclass(frozen=True)
class TransferCurve(Shown):
    """What training on top of each depth came to.

    Attributes:
        metric: on the validation data.
        points: of both series, few new groups first.
    """

    metric: str
    points: tuple[TransferPoint, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the curve as plain data for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        columns = ["kept groups", "new groups", "from", self.metric, "error", "seeds"]
        return text_table(columns, [point.cells() for point in self.points])


def transfer_curve(
    model: nn.Module,
    train: Any,
    val: Any,
    *,
    depths: Sequence[int] | None = None,
    epochs: int = 5,
    seeds: int = 1,
    lr: float = 1e-3,
    metric: str | None = None,
    layers: LayerMap | None = None,
    example_input: Any = None,
    batch_size: int = 32,
    fit_options: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> TransferCurve:
    """Return a metric against the depth at which the pretrained network is cut off.

    For each depth the last k groups start anew (initialised at random) and are trained on top of the groups
    before them, once with those frozen and once with all learning. Where the two part, the kept groups are
    too special for the task, or were torn from groups they had learned to work with; where both fall, what
    the pretrained network knows there is missed. It is an experiment to understand a network by, with two
    trainings a depth and seed (one where all groups start anew); to choose a plan, use `layerwise.search`.

    Args:
        model: the pretrained network; unchanged.
        train: as for `layerwise.fit`.
        val: measured after each epoch; what counts is the epoch that `layerwise.fit` keeps, the best by the
            task's monitor (and so not always by another metric).
        depths: numbers of groups that start anew; None takes about six, denser at the output.
        epochs: of each training.
        seeds: trainings of each point.
        lr: base rate of all of them.
        metric: of the validation data, in the history of `layerwise.fit`; None is the task's monitor.
        layers: the layer map; one at granularity ``"stages"`` is made when None.
        example_input: to make the map from.
        batch_size: of training.
        fit_options: further options of `layerwise.fit`, but for those that a curve sets itself.
        out: a JSON file; what it holds already is not trained again, so an interrupted experiment goes on.
        say: told of every training.

    Raises:
        PlanError: a depth is not between 1 and the number of groups, or there is none.
        DataError: no validation data, `seeds` below 1, the metric is not measured or of the training data, or
            `fit_options` that a curve sets itself.
        TrainingError: `fit_options` are out of range, or the metric came to NaN or infinity.
        RunError: `out` holds another experiment, or its folder is not there.

    Source: Yosinski et al. 2014, How transferable are features in deep neural networks?, section 4. Theirs
    are the curves BnB, AnB (here "frozen") and AnB+ ("fine-tuned") over layers.
    """
    if val is None:
        raise DataError(
            "the curve is of a validation metric, and val is None. Split some off train: --val-frac "
            "(in Python, give val)."
        )
    if seeds < 1:
        raise DataError(f"seeds is {seeds}; expected at least 1.")
    options = dict(fit_options or {})
    check_fit_options(options, SET_FOR_ALL, "transfer_curve")
    metric, _ = metric_and_mode(metric, train, options)
    layers = map_for(model, train, layers, example_input, batch_size=batch_size)
    groups = len(layers)
    chosen = spread_depths(groups) if depths is None else tuple(sorted(set(depths)))
    if not chosen:
        raise PlanError("there is no depth to cut at; give some, or None for about six")
    if wrong := [k for k in chosen if not 1 <= k <= groups]:
        raise PlanError(f"depths {wrong} are not between 1 and the {groups} groups of the layer map")
    about = {
        **about_data(model, layers, train, val),
        "epochs": epochs,
        "lr": lr,
        "metric": metric,
        "batch_size": batch_size,
        "fit_options": plain(options),
    }
    done = read_values(out, about)
    pool = CachePool(upcoming=names_by_depth(layers, chosen, epochs=epochs))
    for k, series, seed in itertools.product(chosen, SERIES, range(seeds)):
        key = f"{series}/{k}/{seed}"
        if key in done:
            continue
        same = f"frozen/{k}/{seed}"
        if k == groups and same in done:  # nothing is kept, so there is nothing to freeze
            done[key], told = done[same], " (as frozen: nothing is kept)"
        else:
            gc.collect()  # pins of frozen modules are reference cycles: the model before would stay
            result = fit(
                copy.deepcopy(model),
                train,
                val,
                plan=cut_plan(layers, k, series, epochs=epochs),
                lr=lr,
                seed=seed,
                layers=layers,
                batch_size=batch_size,
                cache_pool=pool,
                **{"progress": False, **options},
            )
            done[key], told = outcome_of(metric, result.metrics), ""
        if out is not None:
            write_json(Path(out), {"about": about, "values": done})
        say(f"{series}, {plural(k, 'new group')}, seed {seed}: {metric} {figure(done[key])}{told}")
    points = []
    for series in SERIES:
        for k in chosen:
            values = [done[f"{series}/{k}/{seed}"] for seed in range(seeds)]
            points.append(TransferPoint(series, k, layers.names[groups - k], *mean_and_error(values), seeds))
    return TransferCurve(metric, tuple(points))


def cut_plan(layers: LayerMap, k: int, series: Series, *, epochs: int) -> Plan:
    """Return the plan of one point: the last `k` groups start anew, the rest frozen or not.

    Args:
        layers: the map of the model.
        k: from 1 to the number of groups.
        series: what happens to the groups before.
        epochs: length of the plan.
    """
    fresh = layers.names[len(layers) - k :]
    learning = fresh if series == "frozen" else layers.names
    phase = Phase(
        name="train",
        rates=dict.fromkeys(learning, 1.0),
        epochs=epochs,
        schedule=Schedule(shape="cosine", warmup_frac=0.05),
        reinit=fresh,
    )
    strategy = f"transfer_curve(new={k}, kept={series})"
    return Plan(strategy=strategy, granularity=layers.granularity, groups=layers.names, phases=(phase,))


def read_values(out: str | Path | None, about: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Return the values of an interrupted curve in the file `out`; none where there is no file.

    Args:
        out: the file; None is none.
        about: what the curve is about; None is not compared.

    Raises:
        RunError: it holds no curve's values, or those of another experiment; or its folder is not there.
    """
    if out is not None and not Path(out).parent.is_dir():
        raise RunError(f"{out} cannot be written: {Path(out).parent} does not exist. Name another place.")
    if out is None or not Path(out).exists():
        return {}
    try:
        found = json.loads(Path(out).read_text(encoding="utf-8"))
    except (IsADirectoryError, ValueError):
        found = None
    if not isinstance(found, dict) or "values" not in found:
        raise RunError(f"{out} is there, and no curve's values are in it; give another file.")
    there = found.get("about") or {}
    if differing := [
        name for name, value in json.loads(json.dumps(about or {})).items() if there.get(name) != value
    ]:
        raise RunError(
            f"{out} holds the values of another experiment (not the same {', '.join(differing)}); give "
            "another file, or the same data and options."
        )
    return dict(found["values"])

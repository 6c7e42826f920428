"""`explain`: what a plan does to a model and when, computed before anything is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import pairwise

from layerwise.errors import PlanError, percent, plural
from layerwise.layers.layermap import LayerGroup, LayerMap
from layerwise.plans.explanation import JOINING, Explanation, GroupRates, PhaseSummary
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.rates import multipliers, run_problems, trained
from layerwise.plans.schedules import join_factor
from layerwise.plans.settings import Norms, Schedule
from layerwise.plans.timeline import joins, learning, phase_factor

ASSUMED_STEPS_PER_EPOCH = 100
COLUMNS = 48
"""Of the heat map."""


def explain(
    plan: Plan,
    layers: LayerMap,
    *,
    lr: float | None,
    steps_per_epoch: int | None,
    held: Collection[str] = (),
) -> Explanation:
    """Return what `plan` does to the model of `layers`; see `Plan.explain`.

    `held` are parameters that no plan trains, where the model is at hand to tell them.
    """
    plan.check(layers)
    if problems := run_problems(lr=lr, steps_per_epoch=steps_per_epoch):
        raise PlanError("; ".join(problems))
    assumed = steps_per_epoch is None
    per_epoch = ASSUMED_STEPS_PER_EPOCH if steps_per_epoch is None else steps_per_epoch
    summaries = []
    edges = _heat_edges([phase.length_steps(per_epoch) for phase in plan.phases])
    heat_steps = tuple((left + right) // 2 for left, right in pairwise(edges))
    heat: dict[str, list[float]] = {name: [] for name in layers.names}
    start = 0
    for number, phase in enumerate(plan.phases):
        length = phase.length_steps(per_epoch)
        values, planned = trained(phase, layers, held=held), learning(plan, number, layers)
        highest = {
            group.name: max(values[name] for name in group.parameters) if group.name in planned else 0.0
            for group in layers
        }
        top = {name: value * (1.0 if lr is None else lr) for name, value in highest.items()}
        read = _rates_reader(plan, number, layers, per_epoch, top)
        for step in heat_steps:
            if start <= step < start + length:
                for name, rate in read(step - start).items():
                    heat[name].append(rate)
        samples = [read(step) for step in _telling_steps(plan, number, per_epoch)]
        groups = tuple(
            GroupRates(
                name=group.name,
                start=samples[0][group.name],
                peak=max(sample[group.name] for sample in samples),
                end=samples[-1][group.name],
                parameters=_trainable(group, values),
            )
            for group in layers
            if top[group.name] > 0
        )
        summaries.append(
            PhaseSummary(
                name=phase.name,
                first_step=start,
                steps=length,
                epochs=phase.epochs,
                groups=groups,
                trainable=_at_once(phase, layers, held),
                notes=_notes(phase, layers, {group.name for group in groups}, first=number == 0),
            )
        )
        start += length
    return Explanation(
        strategy=plan.strategy,
        lr=lr,
        steps_per_epoch=per_epoch,
        assumed=assumed,
        total=layers.numel,
        phases=tuple(summaries),
        groups=layers.names,
        heat_edges=edges,
        heat_steps=heat_steps,
        heat=tuple(tuple(rates) for rates in heat.values()),
    )


def _trainable(group: LayerGroup, given: Mapping[str, float]) -> int:
    """Return the number of scalars of `group` that learn, by the multipliers of the parameters."""
    learning = [given[name] > 0 for name in group.parameters]
    if all(learning):
        return group.numel
    if len(group.sizes) == len(learning):
        return sum(size for size, learns in zip(group.sizes, learning) if learns)
    return round(group.numel * sum(learning) / len(learning))  # a map without sizes: as if all were equal


def _at_once(phase: Phase, layers: LayerMap, held: Collection[str]) -> int:
    """Return how many scalars learn, at most, at the same time."""
    values = trained(phase, layers, held=held)
    total = sum(_trainable(group, values) for group in layers)
    if phase.sample_groups is None:
        return total
    given = multipliers(phase, layers)
    trunk = [g for g in layers if g.role == "trunk" and any(given[name] > 0 for name in g.parameters)]
    rest = trained(phase, layers, resting=[group.name for group in trunk], held=held)
    more = sorted(
        _trainable(group, values) - _trainable(group, rest)
        for group in trunk
        if any(values[name] for name in group.parameters)
    )
    return total - sum(more[: -phase.sample_groups])


def _rates_reader(
    plan: Plan, phase: int, layers: LayerMap, steps_per_epoch: int, top: dict[str, float]
) -> Callable[[int], dict[str, float]]:
    """Return a function that gives each group's rate at a step of the phase, `top` being the peaks."""
    before = sum(earlier.length_steps(steps_per_epoch) for earlier in plan.phases[:phase])
    joined = joins(plan, phase, layers, steps_per_epoch)

    def read(step: int) -> dict[str, float]:
        value = phase_factor(plan, phase, step, steps_per_epoch)
        warmups = {name: join_factor(before + step - first, size) for name, (first, size) in joined.items()}
        return {name: rate * value * warmups.get(name, 1.0) for name, rate in top.items()}

    return read


def _telling_steps(plan: Plan, phase: int, steps_per_epoch: int) -> list[int]:
    """Return the steps of a phase that show its start, its peak and its end, in order.

    A factor has one rise and one fall. So its highest value lies beside the highest of a few hundred, and is
    sought there again until no step is left out.
    """
    length = plan.phases[phase].length_steps(steps_per_epoch)
    near = shown = range(0, length, max(1, length // 400))
    while True:
        peak = max(near, key=lambda step: phase_factor(plan, phase, step, steps_per_epoch))
        if near.step == 1:
            return sorted({*shown, peak, length - 1})
        low, high = max(peak - near.step, 0), min(peak + near.step + 1, length)
        near = range(low, high, max(1, (high - low) // 400))


def _heat_edges(lengths: Sequence[int]) -> tuple[int, ...]:
    """Return the steps at which the columns of the heat map begin, and the last step's end.

    A column begins at the start of each phase, so that none shows two of them; of more phases than columns
    the columns are of one width.
    """
    total = sum(lengths)
    room = COLUMNS - len(lengths)  # besides one for each phase
    if room < 0:
        return tuple(total * column // COLUMNS for column in range(COLUMNS + 1))
    edges, start, column = [], 0, 0
    for number, length in enumerate(lengths, start=1):
        end = number + room * (start + length) // total
        count = min(length, end - column)
        edges += [start + length * i // count for i in range(count)]
        start, column = start + length, end
    return (*edges, total)


def _notes(phase: Phase, layers: LayerMap, learning: Collection[str], *, first: bool) -> tuple[str, ...]:
    """Return what is special about `phase`, each in a few words, `learning` being the groups that learn."""
    found = []
    if phase.schedule != Schedule():
        found.append(_schedule(phase.schedule))
    if phase.patience_epochs is not None and phase.epochs is not None:
        patience = plural(phase.patience_epochs, "epoch")
        in_time = phase.patience_epochs + 1 < phase.epochs  # the first epoch is the best so far
        found.append(
            f"ends after {patience} without improvement"
            if in_time
            else f"too short for a patience of {patience}"
        )
    if phase.join_steps and not first:
        found.append(f"{JOINING} {plural(phase.join_steps, 'step')}")
    if phase.norms.policy != "follow" or phase.norms.rate is not None:
        found.append(f"norms: {_norms(phase.norms)}")
    apart: dict[str, list[str]] = {}
    for name in filter(phase.norms.groups.__contains__, layers.names):
        own = phase.norms.of(name)
        apart.setdefault(f"{_norms(own)}{', tuned' if own.tune else ''}", []).append(name)
    found += [f"norms of {', '.join(names)}: {told}" for told, names in apart.items()]
    values = trained(phase, layers)
    if any(values[name] for group in layers if group.name not in learning for name in group.parameters):
        found.append("norms of frozen groups learn")
    if phase.frozen_dropout:
        found.append("dropout stays active in frozen groups")
    if phase.l2_sp:
        found.append(f"L2-SP {phase.l2_sp:g}")
    if phase.reinit:
        found.append(f"starts anew: {', '.join(phase.reinit)}")
    if phase.adapt_rates == "auto_rgn":
        found.append("rates scaled by relative gradient norm")
    if phase.sample_groups:
        found.append(
            f"{phase.sample_groups} of the blocks at a time, drawn every "
            f"{plural(phase.sample_every_steps or 1, 'step')}"
        )
    return tuple(found)


def _norms(norms: Norms) -> str:
    until = f" {norms.until}" if norms.until else ""
    rate = f", rate {norms.rate:g}" if norms.rate is not None else ""
    return f"{norms.policy}{until}{rate}"


def _schedule(schedule: Schedule) -> str:
    warmup = ""
    if schedule.warmup_frac:
        warmup = f", warm-up {percent(schedule.warmup_frac, 1, digits=0)}%"
    if schedule.warmup_steps:
        warmup = f", warm-up {plural(schedule.warmup_steps, 'step')}"
    run = " over the run" if schedule.span == "run" else ""
    return f"{schedule.shape.replace('_', ' ')}{run}{warmup}"

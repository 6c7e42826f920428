"""Strategies of several phases, in which groups join one after another."""

from __future__ import annotations

import math
from typing import Any, Unpack

from layerwise.errors import PlanError
from layerwise.layers.layermap import LayerMap
from layerwise.plans.options import (
    DEFAULT_EPOCHS,
    PhaseOptions,
    call,
    check_lengths,
    length_given,
    make_plan,
    require_groups,
    require_head,
    settings,
    strategy,
)
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.rates import check_decay, decayed
from layerwise.plans.settings import Schedule

ULMFIT_DECAY = 1 / 2.6


@strategy
def gradual_unfreezing(
    layers: LayerMap,
    *,
    decay: float = 0.9,
    epochs_per_group: int | None = None,
    steps_per_group: int | None = None,
    last_epochs: int | None = None,
    last_steps: int | None = None,
    patience_epochs: int | None = None,
    **options: Unpack[PhaseOptions],
) -> Plan:
    """Return a plan that trains the head first and unfreezes one group after another, towards the input.

    Without a head the last group is the first to learn. The last phase trains everything, for several epochs.
    Rates are decayed: group l of L learns at ``eta * decay ** (L - l)`` in every phase it learns in. A group
    that joins warms up over `join_steps`.

    By epochs: `epochs_per_group` (1 where nothing is given) and `last_epochs` (3).
    By steps: `steps_per_group` and `last_steps` (three times as long where not given).
    When validation stalls: `patience_epochs`; `epochs_per_group` is then the limit (10 where not given).
    By total length: `epochs` or `steps` alone. Half of them, rounded down, unfreeze in equal phases: as many
    as groups but one or, where there are fewer epochs, one an epoch, several groups at once. The last phase
    gets the rest and trains everything. Phase i (from 0) of n before it trains the last
    ``1 + round(i * (groups - 1) / n)`` groups. With `last_epochs` (`last_steps`) as well, all before the last
    phase unfreezes, which has to divide; with `epochs_per_group` (`steps_per_group`), the last phase gets
    what is left.

    Args:
        layers: the model's layer map.
        decay: α; 1 trains all unfrozen groups at the same rate.
        epochs_per_group: length of each phase but the last.
        steps_per_group: the same in optimiser steps.
        last_epochs: length of the last phase.
        last_steps: the same in optimiser steps.
        patience_epochs: unfreeze the next group after so many epochs without improvement.
        **options: see `PhaseOptions`; `join_steps` is 20 where it is not given.

    Raises:
        PlanError: lengths contradict each other or leave nothing for the last phase.

    Source: Howard and Ruder 2018, section 3.3. There each phase is one epoch, and all but the first train
    everything above; the last phase is trained until convergence.
    """
    check_decay(decay)
    require_groups(layers, "gradual_unfreezing")
    lengths, last, per_phase = _lengths(
        len(layers),
        options,
        epochs_per_group=epochs_per_group,
        steps_per_group=steps_per_group,
        last_epochs=last_epochs,
        last_steps=last_steps,
        patience_epochs=patience_epochs,
    )
    fields = {"join_steps": 20, **settings(options)}
    table = decayed(layers.names, decay)
    phases = []
    for learning in _depths(len(layers), per_phase):
        final = learning == len(layers)
        joined = layers.names[len(layers) - learning :]
        size = last if final else lengths
        phases.append(
            Phase(
                name="all groups" if final else f"from {joined[0]}",
                rates={name: table[name] for name in joined},
                **{**fields, **size},
            )
        )
    strategy = call(
        "gradual_unfreezing",
        decay=decay,
        epochs_per_group=epochs_per_group,
        steps_per_group=steps_per_group,
        last_epochs=last_epochs,
        last_steps=last_steps,
        patience_epochs=patience_epochs,
    )
    return make_plan(layers, strategy, phases)


@strategy
def ulmfit(
    layers: LayerMap,
    *,
    epochs_per_group: int | None = None,
    last_epochs: int | None = None,
    **options: Unpack[PhaseOptions],
) -> Plan:
    """Return the whole ULMFiT recipe: gradual unfreezing, rates divided by 2.6, slanted triangular schedule.

    The schedule has cut_frac 0.1 and ratio 32 and starts anew at each phase.

    Args:
        layers: the model's layer map.
        epochs_per_group: length of each phase but the last; 1 where no length is given.
        last_epochs: length of the last phase; 3 where no length is given.
        **options: see `PhaseOptions`; a `schedule` replaces the recipe's. Groups join without a warm-up of
            their own, as the triangle is one.

    Raises:
        PlanError: as for `gradual_unfreezing`.

    Source: Howard and Ruder 2018, sections 3.2 and 3.3. Their classifier starts from a language model tuned
    on the target's text, which is a step of its own; and they train forwards and backwards models.
    """
    require_head(layers, "ulmfit")
    recipe: PhaseOptions = {
        "schedule": Schedule(shape="slanted_triangular", cut_frac=0.1, ratio=32),
        "join_steps": 0,
        **options,
    }
    plan = gradual_unfreezing(
        layers,
        decay=ULMFIT_DECAY,
        epochs_per_group=epochs_per_group,
        last_epochs=last_epochs,
        **recipe,
    )
    strategy = call("ulmfit", epochs_per_group=epochs_per_group, last_epochs=last_epochs)
    return plan.with_changes(strategy=strategy)


@strategy
def lp_ft(
    layers: LayerMap,
    *,
    probe_epochs: int | None = None,
    probe_steps: int | None = None,
    tune_rate: float = 1.0,
    decay: float | None = None,
    **options: Unpack[PhaseOptions],
) -> Plan:
    """Return a plan that first trains the head alone, then everything.

    A random head sends large, meaningless gradients into the pretrained features; a trained one does not.

    Args:
        layers: the model's layer map.
        probe_epochs: length of the first phase; half of `epochs`, rounded down, where not given, at least 1.
        probe_steps: the same in steps, for a plan in `steps`.
        tune_rate: multiplier of the second phase; the paper tunes its rate separately, and smaller rates than
            the probe's are usual.
        decay: decay the rates of the second phase by depth; None is the same rate for all groups.
        **options: see `PhaseOptions`; `epochs` or `steps` is the length of both phases.

    Raises:
        PlanError: the probe leaves nothing for the second phase, or the model has no head.

    Source: Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform
    Out-of-Distribution, section 3.4.
    """
    head = require_head(layers, "lp_ft")
    require_groups(layers, "lp_ft")
    check_lengths("lp_ft", {"probe_epochs": probe_epochs, "probe_steps": probe_steps})
    given = length_given(options, "lp_ft")
    unit, total = next(iter(given.items()), ("epochs", None))
    probe, other = (probe_steps, probe_epochs) if unit == "steps" else (probe_epochs, probe_steps)
    if other is not None:
        raise PlanError(
            f"lp_ft: the plan's length is in {unit}, the probe's is not; give probe_{unit}, "
            "or both in one unit"
        )
    total = max(DEFAULT_EPOCHS, 2 * (probe or 0)) if total is None else total
    probe = max(1, total // 2) if probe is None else probe
    if probe >= total:
        raise PlanError(
            f"lp_ft: {probe} of {total} {unit} for the probe leaves {total - probe} for the second phase; "
            "both need at least 1"
        )
    fields = settings(options)
    table = decayed(layers.names, decay)
    return make_plan(
        layers,
        call(
            "lp_ft",
            probe_epochs=probe_epochs,
            probe_steps=probe_steps,
            tune_rate=None if tune_rate == 1.0 else tune_rate,
            decay=decay,
        ),
        [
            Phase(name="probe", rates={head: 1.0}, **{**fields, unit: probe}),
            Phase(
                name="tune",
                rates={name: tune_rate * rate for name, rate in table.items()},
                **{**fields, unit: total - probe},
            ),
        ],
    )


@strategy
def fine_tune(
    layers: LayerMap,
    *,
    freeze_epochs: int = 1,
    lr_mult: float = 100.0,
    **options: Unpack[PhaseOptions],
) -> Plan:
    """Return fastai's `fine_tune` recipe: one frozen epoch, then everything at rates spread over 1/100 to 1.

    First the head alone with a one-cycle that falls only at the very end (pct_start 0.99, start at 1/25);
    then half the base rate, spread geometrically from ``1 / lr_mult`` of it at the first group to all of it
    at the head, with a one-cycle of pct_start 0.3 that starts at 1/5. Both end at 1e-5 of their peak.

    Args:
        layers: the model's layer map.
        freeze_epochs: length of the first phase.
        lr_mult: how many times slower the first group learns than the head.
        **options: see `PhaseOptions`; `epochs` is the length of both phases (fastai's `epochs` is that of the
            second alone). `steps` and `schedule` are not taken: the recipe has its own.

    Raises:
        PlanError: `freeze_epochs` leaves nothing for the second phase, or the schedule is given.

    Source: fastai 2.8 ``callback/schedule.py``, `Learner.fine_tune`. There the network has two or three
    groups, momentum cycles against the rate, and batch-norm of frozen groups trains (use
    ``norms="adapt"`` for that).
    """
    head = require_head(layers, "fine_tune")
    if options.get("steps") is not None or options.get("schedule"):
        raise PlanError(
            "fine_tune is counted in epochs and brings its own schedule; leave out steps and schedule"
        )
    if not isinstance(lr_mult, int | float) or not 1 < lr_mult < math.inf:
        raise PlanError(
            f"fine_tune(lr_mult={lr_mult!r}): expected a number above 1; at 1 all rates are equal"
        )
    require_groups(layers, "fine_tune")
    check_lengths("fine_tune", {"freeze_epochs": freeze_epochs})
    total = length_given(options, "fine_tune").get("epochs", max(DEFAULT_EPOCHS, freeze_epochs + 1))
    if freeze_epochs >= total:
        raise PlanError(
            f"fine_tune: {freeze_epochs} frozen of {total} epochs leaves {total - freeze_epochs} for "
            "everything; both phases need at least 1"
        )
    fields = settings(options)
    alpha = (1 / lr_mult) ** (1 / (len(layers) - 1))
    return make_plan(
        layers,
        call("fine_tune", freeze_epochs=freeze_epochs, lr_mult=None if lr_mult == 100 else lr_mult),
        [
            Phase(
                name="frozen",
                rates={head: 1.0},
                epochs=freeze_epochs,
                **{**fields, "schedule": _one_cycle(pct_start=0.99, div=25)},
            ),
            Phase(
                name="unfrozen",
                rates={name: 0.5 * rate for name, rate in decayed(layers.names, alpha).items()},
                epochs=total - freeze_epochs,
                **{**fields, "schedule": _one_cycle(pct_start=0.3, div=5)},
            ),
        ],
    )


def _one_cycle(*, pct_start: float, div: float) -> Schedule:
    return Schedule(shape="one_cycle", cut_frac=pct_start, ratio=div, floor=1e-5)


def _depths(groups: int, phases: int) -> list[int]:
    """Return how many groups learn in each of `phases` + 1 phases: 1 first, all last, evenly between.

    >>> _depths(4, 3), _depths(9, 3)
    ([1, 2, 3, 4], [1, 4, 6, 9])
    """
    return [1 + round(number * (groups - 1) / phases) for number in range(phases + 1)]


def _lengths(
    groups: int,
    options: PhaseOptions,
    *,
    epochs_per_group: int | None,
    steps_per_group: int | None,
    last_epochs: int | None,
    last_steps: int | None,
    patience_epochs: int | None,
) -> tuple[dict[str, Any], dict[str, Any], int]:
    """Return the length of each unfreezing phase, that of the last one, and the number of the former."""
    in_steps = {"steps_per_group": steps_per_group, "last_steps": last_steps, "steps": options.get("steps")}
    by_steps = any(value is not None for value in in_steps.values())
    in_epochs = {
        "epochs_per_group": epochs_per_group,
        "last_epochs": last_epochs,
        "epochs": options.get("epochs"),
        "patience_epochs": patience_epochs,
    }
    check_lengths("gradual_unfreezing", in_steps | in_epochs)
    if by_steps and any(value is not None for value in in_epochs.values()):
        raise PlanError(
            "gradual_unfreezing is counted in epochs or in steps, not both: give epochs_per_group, "
            "last_epochs, epochs and patience_epochs, or steps_per_group, last_steps and steps"
        )
    unit = "steps" if by_steps else "epochs"
    each, last = (steps_per_group, last_steps) if by_steps else (epochs_per_group, last_epochs)
    total = options.get("steps") if by_steps else options.get("epochs")
    phases = groups - 1
    if total is not None and each is None:
        room = total - last if last is not None else total // 2
        if room < 1:
            raise PlanError(
                f"gradual_unfreezing: {total} {unit} leave no room to unfreeze before the last phase; at "
                f"least 2 are needed, and for one group a phase {2 * phases}"
            )
        phases = min(phases, room)
        each = room // phases
    if each is None:
        each = 10 if patience_epochs is not None else 1 if unit == "epochs" else None
    if each is None:
        raise PlanError("gradual_unfreezing by steps needs steps_per_group, or steps for the whole plan")
    if total is not None:
        left = total - each * phases
        if left < 1 or (last is not None and last > left):
            raise PlanError(
                f"gradual_unfreezing: {phases} phases of {each} {unit} leave {left} of {total} for the last "
                "phase"
                + (f", which is asked to take {last}" if last is not None else "")
                + "; give more, or shorter phases"
            )
        if last is not None and last < left:
            raise PlanError(
                f"gradual_unfreezing: {phases} phases of {each} and a last one of {last} make "
                f"{total - left + last} {unit}, not {total}; give last_{unit}={left}, or "
                f"{unit}={total - left + last}"
            )
        last = left
    if last is None:
        last = 3 if unit == "epochs" else 3 * each
    size: dict[str, Any] = {unit: each}
    if patience_epochs is not None:
        size["patience_epochs"] = patience_epochs
    return size, {unit: last}, phases

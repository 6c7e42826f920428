"""`Plan` and `Phase`: a fine-tuning strategy as validated data, in and out of YAML.

A plan is a matrix of learning-rate multipliers, one row a phase, one column a layer group; 0 is frozen.
Around the matrix stand the settings that a row may have of its own: length, schedule, normalisation,
regularisation. A plan holds names, never a live model.

What goes wrong while a plan is built, edited or read is told in one `PlanError` that lists everything.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from layerwise.errors import PlanError, did_you_mean
from layerwise.plans.data import Data

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap
    from layerwise.plans.explanation import Explanation

Multiplier = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

Shape = Literal["constant", "linear", "cosine", "slanted_triangular", "one_cycle", "plateau"]
NormKind = Literal["follow", "freeze", "freeze_until", "calibrate", "adapt"]


class Schedule(Data):
    """One factor in [0, 1] over time, times each group's own rate; so ratios between groups hold.

    Attributes:
        shape: how the factor falls (`layerwise.plans.schedules` has the formulas).
        warmup_frac: share of the span over which the factor first rises linearly to where the shape starts,
            in w steps from 1 / (w + 1) of it.
        warmup_steps: the same in optimiser steps; at most one of the two is above 0.
        floor: lowest value the factor falls to after its peak, as a share of the peak; the slanted triangle
            does not begin below it either.
        span: ``"phase"`` starts anew at each phase, ``"run"`` goes once over the whole plan.
        cut_frac: share of the span in which the slanted triangle (in whole steps, rounded down) and the
            one-cycle rise.
        ratio: how much smaller than its peak the factor is at both ends of the slanted triangle and at
            the start of the one-cycle.
        patience_epochs: the plateau shape multiplies by `factor` after more than so many epochs in a row
            without improvement of the validation metric, as torch's ``ReduceLROnPlateau`` does.
        factor: what it multiplies by.
    """

    shape: Shape = "constant"
    warmup_frac: Fraction = 0.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    floor: Fraction = 0.0
    span: Literal["phase", "run"] = "phase"
    cut_frac: Fraction = 0.1
    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 32.0
    patience_epochs: Annotated[int, Field(ge=0)] = 2
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1

    @classmethod
    def _contradictions(cls, data: Mapping[str, Any]) -> list[str]:
        if data.get("warmup_frac") and data.get("warmup_steps"):
            return [
                f"warmup_frac ({data['warmup_frac']!r}) and warmup_steps ({data['warmup_steps']!r}) are both "
                "given; keep one"
            ]
        return []


class Norms(Data):
    """What batch-norm (and its kin with running statistics) does during a phase.

    Attributes:
        policy: ``"follow"``: frozen where its group is frozen, trained where it trains.
            ``"freeze"``: affine parameters and statistics fixed everywhere.
            ``"freeze_until"``: fixed in all groups before `until`, trained from there on.
            ``"calibrate"``: statistics measured anew on target data before the phase, then fixed.
            ``"adapt"``: statistics and affine parameters adapt everywhere, frozen groups included.
        until: first group whose norms adapt, for ``"freeze_until"``.
        samples: how many samples ``"calibrate"`` averages over; None is the whole training set.
        momentum: exponential average instead of the exact one (calibrate), or the momentum (adapt,
            freeze_until).
        rate: multiplier of the norms' affine parameters where they train in a frozen group
            (``"adapt"``, ``"freeze_until"``, `tune`), as a share of the base rate.
        tune: also train the affine parameters of LayerNorm, GroupNorm and RMSNorm in frozen groups.
    """

    policy: NormKind = "follow"
    until: str | None = None
    samples: Annotated[int, Field(gt=0)] | None = None
    momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    rate: Multiplier = 1.0
    tune: bool = False

    @classmethod
    def _contradictions(cls, data: Mapping[str, Any]) -> list[str]:
        policy, until = data.get("policy", "follow"), data.get("until")
        if policy == "freeze_until" and until is None:
            return ["policy 'freeze_until' needs `until`, the first group whose norms adapt"]
        if policy != "freeze_until" and until is not None:
            return [f"until is {until!r}, which only policy 'freeze_until' uses (policy is {policy!r})"]
        used = {"samples": ("calibrate",), "momentum": ("calibrate", "adapt", "freeze_until")}
        found = [
            f"{name} is {data[name]!r}, which is only for policy {' or '.join(map(repr, by))}, not {policy!r}"
            for name, by in used.items()
            if data.get(name) is not None and policy not in by
        ]
        rate = data.get("rate", 1.0)
        if rate != 1.0 and not data.get("tune") and policy not in ("adapt", "freeze_until"):
            only = "'adapt' or 'freeze_until', or with tune"
            found.append(f"rate is {rate!r}, which is only for policy {only}, not {policy!r}")
        return found


def _by_name(part: type[Data], field: str, known: Any, example: str) -> BeforeValidator:
    """Return what lets a name stand for a part of a phase: ``freeze`` for ``{policy: freeze}``."""
    names = get_args(known)

    def expand(value: Any) -> Any:
        if isinstance(value, Mapping | part):
            return value
        if isinstance(value, str) and value in names:
            return {field: value}
        close = did_you_mean(value, names, count=1) if isinstance(value, str) else ""
        raise ValueError(f"expected one of {', '.join(names)}, or settings like {example}.{close}")

    return BeforeValidator(expand)


class Phase(Data):
    """One row of the matrix, and how it is carried out.

    Attributes:
        name: for people and logs; unique in a plan.
        rates: group name -> learning-rate multiplier; 0, or leaving a group out, freezes it.
        overrides: parameter name -> multiplier, for single parameters that do not follow their group.
        epochs: length in epochs; exactly one of `epochs` and `steps` is given.
        steps: length in optimiser steps.
        patience_epochs: end the phase early when the validation metric has not improved for so many
            epochs (gradual unfreezing "when validation stalls"); `epochs` is then the upper limit.
        schedule: the factor over time; or the name of its shape.
        join_steps: length of the warm-up that a group gets when it joins in this phase, in steps.
        norms: the normalisation policy; or its name.
        frozen_dropout: whether dropout and stochastic depth stay active in frozen groups.
        l2_sp: strength of the pull towards the pretrained weights; 0 is none.
        reinit: groups whose parameters are initialised anew when the phase starts.
        adapt_rates: ``"auto_rgn"`` scales the multipliers by the relative gradient norm of each group,
            measured anew each epoch.
        sample_groups: train only so many randomly chosen trunk groups at a time (LISA); None is all.
        sample_every_steps: how often they are drawn.
    """

    name: str
    rates: dict[str, Multiplier]
    overrides: dict[str, Multiplier] = Field(default_factory=dict)
    epochs: Annotated[int, Field(gt=0)] | None = None
    steps: Annotated[int, Field(gt=0)] | None = None
    patience_epochs: Annotated[int, Field(gt=0)] | None = None
    schedule: Annotated[Schedule, _by_name(Schedule, "shape", Shape, "{shape: cosine, warmup_frac: 0.1}")] = (
        Schedule()
    )
    join_steps: Annotated[int, Field(ge=0)] = 0
    norms: Annotated[Norms, _by_name(Norms, "policy", NormKind, "{policy: freeze}")] = Norms()
    frozen_dropout: bool = False
    l2_sp: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    reinit: tuple[str, ...] = ()
    adapt_rates: Literal["auto_rgn"] | None = None
    sample_groups: Annotated[int, Field(gt=0)] | None = None
    sample_every_steps: Annotated[int, Field(gt=0)] | None = None

    @classmethod
    def _contradictions(cls, data: Mapping[str, Any]) -> list[str]:
        found = []
        lengths = [name for name in ("epochs", "steps") if data.get(name) is not None]
        if len(lengths) != 1:
            got = " and ".join(f"{name} = {data[name]!r}" for name in lengths) or "neither"
            found.append(f"exactly one of `epochs` and `steps` gives its length; received {got}")
        if data.get("patience_epochs") is not None and data.get("epochs") is None:
            found.append("patience_epochs ends a phase that is counted in epochs; give `epochs` as the limit")
        given = [name for name in ("sample_groups", "sample_every_steps") if data.get(name) is not None]
        if len(given) == 1:
            found.append(f"sample_groups and sample_every_steps go together; only {given[0]} is given")
        if not _trains(data):
            found.append("it trains nothing: no rate and no override is above 0, and no norm layer is tuned")
        return found

    def rate(self, group: str) -> float:
        """Return the multiplier of `group`: 0 where it is frozen."""
        return self.rates.get(group, 0.0)

    def trains(self, group: str) -> bool:
        """Return whether the phase gives `group` a rate above 0."""
        return self.rate(group) > 0

    def length_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the phase in optimiser steps.

        Args:
            steps_per_epoch: optimiser steps in an epoch, for a phase that is counted in epochs.
        """
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch


class Plan(Data):
    """A whole strategy: phases in order, over the groups of a layer map.

    Attributes:
        version: of the file format.
        strategy: how the plan was made, for people (``"top_k(k=2)"``).
        granularity: of the layer map that the group names belong to.
        groups: all group names, input to output: the columns of the matrix.
        phases: its rows.

    >>> plan = Plan(groups=["stem", "fc"], phases=[{"name": "probe", "rates": {"fc": 1.0}, "epochs": 2}])
    >>> plan.phases[0].rate("stem"), plan.total_steps(steps_per_epoch=10)
    (0.0, 20)
    >>> Plan(groups=["stem", "fc"], phases=[{"name": "probe", "rates": {"fx": -1.0}}])
    Traceback (most recent call last):
    layerwise.errors.PlanError: this plan is not valid, 4 problems:
      - phases[0] ('probe'): rates.fx is -1.0; expected greater than or equal to 0
      - phases[0] ('probe'): exactly one of `epochs` and `steps` gives its length; received neither
      - phases[0] ('probe'): it trains nothing: no rate and no override is above 0, and no norm layer is tuned
      - phase 'probe', rates: group 'fx' is not among the groups (stem, fc). Did you mean 'fc'?
    """

    version: Literal[1] = 1
    strategy: str = "custom"
    granularity: Literal["stages", "blocks", "layers"] = "stages"
    groups: tuple[str, ...]
    phases: tuple[Phase, ...]

    @classmethod
    def _contradictions(cls, data: Mapping[str, Any]) -> list[str]:
        groups = _strings(data.get("groups"))
        phases = data.get("phases")
        rows = [_row(phase) for phase in phases] if isinstance(phases, list | tuple) else []
        found = [f"{name!r} is empty" for name in ("groups", "phases") if data.get(name) in ([], ())]
        found += [
            f"group {name!r} stands {count} times in `groups`; names are unique"
            for name, count in Counter(groups).items()
            if count > 1
        ]
        names = Counter(row["name"] for row in rows if isinstance(row.get("name"), str))
        found += [f"{n} phases are called {name!r}; names are unique" for name, n in names.items() if n > 1]
        for number, row in enumerate(rows if groups else ()):  # where they are missing, that alone is told
            for field, used in _group_names(row):
                found += [
                    f"phase {row.get('name', number)!r}, {field}: group {name!r} is not among the groups "
                    f"({', '.join(groups)}).{did_you_mean(name, groups, count=1)}"
                    for name in used
                    if name not in groups
                ]
        return found

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the whole plan in optimiser steps, no phase ending early.

        Args:
            steps_per_epoch: optimiser steps in an epoch.
        """
        return sum(phase.length_steps(steps_per_epoch) for phase in self.phases)

    def total_epochs(self, steps_per_epoch: int) -> int:
        """Return the number of epochs that the plan takes, a last partial one counted as one.

        Args:
            steps_per_epoch: optimiser steps in an epoch.
        """
        return math.ceil(self.total_steps(steps_per_epoch) / steps_per_epoch)

    def check(self, layers: LayerMap) -> None:
        """Raise unless the plan fits `layers`: same granularity and groups, known parameter names.

        Raises:
            PlanError: with all differences, from both sides.
        """
        found = []
        if self.granularity != layers.granularity:
            found.append(
                f"the plan's groups are {self.granularity!r}, the layer map's {layers.granularity!r}; "
                f"map the model with granularity={self.granularity!r}"
            )
        missing = [name for name in self.groups if name not in layers.names]
        extra = [name for name in layers.names if name not in self.groups]
        if missing:
            found.append(f"only the plan has: {', '.join(missing)}")
        if extra:
            found.append(f"only the model has: {', '.join(extra)}")
        if not missing and not extra and self.groups != layers.names:
            found.append(
                f"same groups, another order: {', '.join(self.groups)} in the plan, "
                f"{', '.join(layers.names)} in the model"
            )
        known = [name for group in layers for name in group.parameters] + list(layers.aliases)
        for phase in self.phases:
            found += [
                f"phase {phase.name!r} overrides parameter {name!r}, which the model does not have."
                f"{did_you_mean(name, known)}"
                for name in phase.overrides
                if name not in known
            ]
        if found:
            model = layers.model_class or "this model"
            raise PlanError(
                f"the plan {self.strategy!r} was made for another model than {model}:"
                + "".join(f"\n  - {line}" for line in found)
                + "\nMake one for it: layerwise plan MODEL --strategy ... -o plan.yaml"
            )

    def explain(
        self, layers: LayerMap, *, lr: float | None = None, steps_per_epoch: int | None = None
    ) -> Explanation:
        """Return what the plan does to the model of `layers` and when: `print` it.

        Args:
            layers: the model's layer map.
            lr: the base rate η; None shows multiples of it.
            steps_per_epoch: optimiser steps per epoch; None assumes 100 and says so.

        Raises:
            PlanError: the plan does not fit `layers`.
        """
        from layerwise.plans.explain import explain

        return explain(self, layers, lr=lr, steps_per_epoch=steps_per_epoch)

    def save(self, path: str | Path) -> None:
        """Write the plan as YAML made to be edited by hand: defaults are left out, frozen groups too.

        The file is written whole or not at all; one that is there already is replaced.

        Args:
            path: of the file.

        Raises:
            OSError: the file cannot be written.
        """
        from layerwise.plans.storage import save

        save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan that `save`, ``layerwise plan`` or a person wrote.

        Reading never runs code (``yaml.safe_load``).

        Args:
            path: of the file.

        Raises:
            PlanError: the file is missing, is not YAML, has another version, or is not a valid plan.
        """
        from layerwise.plans.storage import load

        return load(Path(path))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data, defaults left out; ``Plan(**data)`` is its inverse."""
        return {"version": self.version, **self.model_dump(mode="json", exclude_defaults=True)}


def _strings(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple) else []


def _row(phase: Any) -> Mapping[str, Any]:
    if isinstance(phase, Phase):
        return {name: getattr(phase, name) for name in type(phase).model_fields}
    return phase if isinstance(phase, Mapping) else {}


def _group_names(row: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return for each field of a phase that names groups the names in it."""
    rates, norms = row.get("rates"), row.get("norms")
    until = norms.get("until") if isinstance(norms, Mapping) else getattr(norms, "until", None)
    return [
        ("rates", [name for name in rates if isinstance(name, str)] if isinstance(rates, Mapping) else []),
        ("reinit", _strings(row.get("reinit"))),
        ("norms.until", [until] if isinstance(until, str) else []),
    ]


def _trains(data: Mapping[str, Any]) -> bool:
    """Return whether a phase trains anything, as far as unchecked data tells (unreadable counts as yes)."""
    norms = data.get("norms")
    if isinstance(norms, str):
        return norms == "adapt" or _trains({**data, "norms": None})
    policy, tune = (
        (norms.get("policy"), norms.get("tune"))
        if isinstance(norms, Mapping)
        else (getattr(norms, "policy", None), getattr(norms, "tune", None))
    )
    if policy == "adapt" or tune:
        return True
    rates = [
        rate
        for field in ("rates", "overrides")
        if isinstance(table := data.get(field), Mapping)
        for rate in table.values()
    ]
    if not isinstance(data.get("rates"), Mapping):
        return True  # reported as such
    return any(map(_is_above_zero, rates))


def _is_above_zero(rate: Any) -> bool:
    try:
        return not float(rate) <= 0
    except (TypeError, ValueError):
        return True  # reported as such

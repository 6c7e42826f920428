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
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from layerwise.errors import PlanError, did_you_mean
from layerwise.plans.data import Data, by_name, fields_of
from layerwise.plans.settings import Multiplier, NormKind, Norms, Schedule, Shape
from layerwise.shown import Shown

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap
    from layerwise.plans.explanation import Explanation


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
    schedule: Annotated[Schedule, by_name(Schedule, "shape", Shape, "{shape: cosine, warmup_frac: 0.1}")] = (
        Schedule()
    )
    join_steps: Annotated[int, Field(ge=0)] = 0
    norms: Annotated[Norms, by_name(Norms, "policy", NormKind, "{policy: freeze}")] = Norms()
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


class Plan(Shown, Data):
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
        rows = [fields_of(phase) for phase in phases] if isinstance(phases, list | tuple) else []
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
            PlanError: with all differences, from both sides; or `layers` is no layer map.
        """
        from layerwise.layers.layermap import check_map

        check_map(layers)
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
            PlanError: the plan does not fit `layers`, or that is no layer map.
        """
        from layerwise.plans.explain import explain

        return explain(self, layers, lr=lr, steps_per_epoch=steps_per_epoch)

    def __str__(self) -> str:
        """Return the text of the plan's file."""
        from layerwise.plans.storage import to_yaml

        return to_yaml(self)

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
    """Return the items, or the keys, of `value` that are text."""
    return (
        [item for item in value if isinstance(item, str)] if isinstance(value, list | tuple | Mapping) else []
    )


def _group_names(row: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Return for each field of a phase that names groups the names in it."""
    norms = fields_of(row.get("norms"))
    return [
        ("rates", _strings(row.get("rates"))),
        ("reinit", _strings(row.get("reinit"))),
        ("norms.until", _strings([norms.get("until")])),
        ("norms.groups", _strings(norms.get("groups"))),
    ]


def _trains(data: Mapping[str, Any]) -> bool:
    """Return whether a phase trains anything, as far as unchecked data tells (unreadable counts as yes)."""
    if _asks(data.get("norms")):
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


def _asks(norms: Any) -> bool:
    """Return whether a norm policy, that of a group included, lets norms of frozen groups learn."""
    given = fields_of(norms)
    groups = given.get("groups")
    return (
        "adapt" in (norms, given.get("policy"))
        or bool(given.get("tune"))
        or (isinstance(groups, Mapping) and any(map(_asks, groups.values())))
    )


def _is_above_zero(rate: Any) -> bool:
    try:
        return not float(rate) <= 0
    except (TypeError, ValueError, OverflowError):
        return True  # reported as such

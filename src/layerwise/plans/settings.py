"""`Schedule` and `Norms`: settings that each phase of a plan may have of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field

from layerwise.plans.data import Data, by_name, fields_of

Multiplier = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

Shape = Literal["constant", "linear", "cosine", "slanted_triangular", "one_cycle", "plateau"]
NormKind = Literal["follow", "freeze", "freeze_until", "calibrate", "adapt"]
NormKindOfGroup = Literal["follow", "freeze", "calibrate", "adapt"]

_READERS: dict[str, tuple[Shape, ...]] = {
    "floor": ("linear", "cosine", "slanted_triangular", "one_cycle", "plateau"),
    "cut_frac": ("slanted_triangular", "one_cycle"),
    "ratio": ("slanted_triangular", "one_cycle"),
    "patience_epochs": ("plateau",),
    "factor": ("plateau",),
}
"""The settings that not every shape of a schedule reads, and the shapes that do."""


class Schedule(Data):
    """One factor in [0, 1] over time, times each group's own rate; so ratios between groups hold.

    A setting that its shape does not read is refused, unless it is the default.

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
        found = []
        if data.get("warmup_frac") and data.get("warmup_steps"):
            found.append(
                f"warmup_frac ({data['warmup_frac']!r}) and warmup_steps ({data['warmup_steps']!r}) are both "
                "given; keep one"
            )
        shape = data.get("shape", "constant")
        if shape not in get_args(Shape):  # pydantic tells that
            return found
        found += [
            f"{name} is {data[name]!r}, which is only for shape {' or '.join(map(repr, by))}, not {shape!r}"
            for name, by in _READERS.items()
            if shape not in by
            and data.get(name, cls.model_fields[name].default) != cls.model_fields[name].default
        ]
        return found


def _of_one_group(value: Any) -> Any:
    """Refuse settings that tell groups apart where those of one group belong."""
    given = fields_of(value)
    if given.get("policy") == "freeze_until" or given.get("until") is not None or given.get("groups"):
        raise ValueError(
            f"expected the policy of one group ({', '.join(get_args(NormKindOfGroup))}) and its settings: "
            "`freeze_until`, `until` and `groups` tell groups apart; move them to the norms of the phase"
        )
    return value


class Norms(Data):
    """What batch-norm (and its kin with running statistics) does during a phase.

    Attributes:
        policy: ``"follow"``: frozen where its group is frozen, trained where it trains.
            ``"freeze"``: affine parameters and statistics fixed everywhere.
            ``"freeze_until"``: fixed in all groups before `until`, trained from there on.
            ``"calibrate"``: statistics measured anew on target data before the phase, then fixed.
            ``"adapt"``: statistics and affine parameters adapt everywhere, frozen groups included.
        until: first group whose norms adapt, for ``"freeze_until"``.
        samples: how many samples ``"calibrate"`` averages over (`fit` draws them by its seed); None is the
            whole training set.
        momentum: exponential average instead of the exact one (calibrate), or the momentum (adapt,
            freeze_until).
        rate: multiplier of the norms' affine parameters, as a share of the base rate: wherever they learn by
            ``"adapt"`` or ``"freeze_until"``, and in frozen groups by `tune`. None: that of the group (0
            where it learns by `Phase.overrides` alone), and 1 in groups of which nothing learns. A parameter
            in `Phase.overrides` keeps that multiplier where something of its group learns.
        tune: also train the affine parameters of LayerNorm, GroupNorm and RMSNorm in frozen groups.
        groups: group name -> what its norms do instead of all of the above; or the name of a policy. None of
            these has `until` or `groups`. The statistics of a norm that stands in several groups go with the
            first of them, input to output, each affine parameter with its own. Where several calibrate,
            `samples` and `momentum` are the same in all.

    >>> norms = Norms(policy="freeze", groups={"layer3": Norms(policy="adapt", rate=0.5)})
    >>> norms.of("layer2").policy, norms.of("layer3").policy
    ('freeze', 'adapt')
    """

    policy: NormKind = "follow"
    until: str | None = None
    samples: Annotated[int, Field(gt=0)] | None = None
    momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    rate: Multiplier | None = None
    tune: bool = False
    groups: dict[
        str,
        Annotated[
            Norms,
            by_name(Norms, "policy", NormKindOfGroup, "{policy: freeze}"),
            BeforeValidator(_of_one_group),
        ],
    ] = Field(default_factory=dict)

    def of(self, group: str) -> Norms:
        """Return what the norms of `group` do: its own entry in `groups`, or all this."""
        return self.groups.get(group, self)

    def affine_rate(self, group_frozen: bool) -> float | None:
        """Return the multiplier of affine parameters that learn; None where it is that of their group."""
        if group_frozen:
            return 1.0 if self.rate is None else self.rate
        return self.rate if self.policy in ("adapt", "freeze_until") else None

    @property
    def calibration(self) -> Norms | None:
        """How statistics are measured before the phase, in whichever groups; None where they are not."""
        return next((own for own in (self, *self.groups.values()) if own.policy == "calibrate"), None)

    @classmethod
    def _contradictions(cls, data: Mapping[str, Any]) -> list[str]:
        found = _measured_apart(data)
        policy, until = data.get("policy", "follow"), data.get("until")
        if policy == "freeze_until" and until is None:
            return [
                *found,
                "policy 'freeze_until' needs `until`, the first group whose norms adapt: "
                "{policy: freeze_until, until: GROUP}",
            ]
        if policy != "freeze_until" and until is not None:
            return [
                *found,
                f"until is {until!r}, which only policy 'freeze_until' uses (policy is {policy!r})",
            ]
        used = {"samples": ("calibrate",), "momentum": ("calibrate", "adapt", "freeze_until")}
        found += [
            f"{name} is {data[name]!r}, which is only for policy {' or '.join(map(repr, by))}, not {policy!r}"
            for name, by in used.items()
            if data.get(name) is not None and policy not in by
        ]
        rate = data.get("rate")
        if rate not in (None, 1) and not data.get("tune") and policy not in ("adapt", "freeze_until"):
            only = "'adapt' or 'freeze_until', or with tune"
            found.append(f"rate is {rate!r}, which is only for policy {only}, not {policy!r}")
        return found


def _measured_apart(data: Mapping[str, Any]) -> list[str]:
    """Return what differs between groups that calibrate, in unchecked data of a `Norms`."""
    groups = data.get("groups")
    every = {"the phase": data}
    for name, own in groups.items() if isinstance(groups, Mapping) else ():
        every[repr(name)] = {"policy": own} if isinstance(own, str) else fields_of(own)
    measured = {who: own for who, own in every.items() if own.get("policy") == "calibrate"}
    found = []
    for name in ("samples", "momentum"):
        values = [own.get(name) for own in measured.values()]
        if any(value != values[0] for value in values):
            told = ", ".join(f"{value!r} in {who}" for who, value in zip(measured, values))
            found.append(
                f"{name} is {told}; expected one value, as statistics are measured together, layer by layer. "
                "Give the same to all that calibrate, or calibrate in phases of their own"
            )
    return found


def moves_and_learns(norms: Norms, group_frozen: bool, late: bool) -> tuple[bool, bool]:
    """Return whether a norm's running statistics move and whether its affine parameters learn.

    Args:
        norms: the policy.
        group_frozen: whether the norm's group does not learn.
        late: whether it stands in the group `Norms.until` or behind it.
    """
    match norms.policy:
        case "follow":
            return not group_frozen, not group_frozen
        case "freeze":
            return False, False
        case "freeze_until":
            return late, late
        case "calibrate":
            return False, not group_frozen
        case "adapt":
            return True, True


def affine_learns(norms: Norms, kind: str, group_frozen: bool, late: bool) -> tuple[bool, float | None]:
    """Return whether an affine parameter of a norm learns, and its multiplier; None for that of its group.

    Args:
        norms: the policy of the parameter's group.
        kind: of the norm (`layerwise.layers.norms.Kind`).
        group_frozen: whether the parameter's group does not learn.
        late: whether that is the group `Norms.until` or behind it.
    """
    if kind == "running":
        return moves_and_learns(norms, group_frozen, late)[1], norms.affine_rate(group_frozen)
    return not group_frozen or norms.tune, norms.affine_rate(True) if group_frozen else None

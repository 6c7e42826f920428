"""`Plan` and `Phase`: a fine-tuning strategy as validated data, in and out of YAML.

A plan is a matrix of learning-rate multipliers, one row a phase, one column a layer group; 0 is frozen.
Around the matrix stand the settings that a row may have of its own: length, schedule, normalisation,
regularisation. A plan holds names, never a live model.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Multiplier = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

Shape = Literal["constant", "linear", "cosine", "slanted_triangular", "one_cycle", "plateau"]
NormKind = Literal["follow", "freeze", "freeze_until", "calibrate", "adapt"]


class _Data(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Schedule(_Data):
    """One factor in [0, 1] over time, times each group's own rate; so ratios between groups hold.

    Attributes:
        shape: how the factor falls (`layerwise.plans.schedules` has the formulas).
        warmup_frac: share of the span over which the factor first rises linearly from 0.
        warmup_steps: the same in optimiser steps; at most one of the two is above 0.
        floor: lowest value the factor falls to after its peak, as a share of the peak.
        span: ``"phase"`` starts anew at each phase, ``"run"`` goes once over the whole plan.
        cut_frac: share of the span in which the slanted triangle and the one-cycle rise.
        ratio: how much smaller the lowest rate of the slanted triangle is than its peak.
        patience_epochs, factor: the plateau shape multiplies by `factor` after so many epochs without
            improvement of the validation metric.
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


class Norms(_Data):
    """What batch-norm (and its kin with running statistics) does during a phase.

    Attributes:
        policy: ``"follow"``: frozen where its group is frozen, trained where it trains.
            ``"freeze"``: affine parameters and statistics fixed everywhere.
            ``"freeze_until"``: fixed in all groups before `until`, trained from there on.
            ``"calibrate"``: statistics measured anew on target data before the phase, then fixed.
            ``"adapt"``: statistics and affine parameters adapt everywhere, frozen groups included.
        until: first group whose norms adapt, for ``"freeze_until"``.
        samples: how many samples ``"calibrate"`` averages over; None is the whole training set.
        momentum: exponential average instead of the exact one (calibrate), or the momentum (adapt).
        rate: multiplier of the norms' affine parameters where they train in a frozen group
            (``"adapt"``), as a share of the base rate.
        tune: also train the affine parameters of LayerNorm, GroupNorm and RMSNorm in frozen groups.
    """

    policy: NormKind = "follow"
    until: str | None = None
    samples: Annotated[int, Field(gt=0)] | None = None
    momentum: Annotated[float, Field(gt=0, le=1)] | None = None
    rate: Multiplier = 1.0
    tune: bool = False


class Phase(_Data):
    """One row of the matrix, and how it is carried out.

    Attributes:
        name: for people and logs; unique in a plan.
        rates: group name -> learning-rate multiplier; 0, or leaving a group out, freezes it.
        overrides: parameter name -> multiplier, for single parameters that do not follow their group.
        epochs: length in epochs; exactly one of `epochs` and `steps` is given.
        steps: length in optimiser steps.
        patience_epochs: end the phase early when the validation metric has not improved for so many
            epochs (gradual unfreezing "when validation stalls"); `epochs` is then the upper limit.
        schedule: the factor over time.
        join_steps: length of the warm-up that a group gets when it joins in this phase, in steps.
        norms: the normalisation policy.
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
    schedule: Schedule = Schedule()
    join_steps: Annotated[int, Field(ge=0)] = 0
    norms: Norms = Norms()
    frozen_dropout: bool = False
    l2_sp: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    reinit: tuple[str, ...] = ()
    adapt_rates: Literal["auto_rgn"] | None = None
    sample_groups: Annotated[int, Field(gt=0)] | None = None
    sample_every_steps: Annotated[int, Field(gt=0)] | None = None

    def rate(self, group: str) -> float:
        """Return the multiplier of `group`: 0 where it is frozen."""
        return self.rates.get(group, 0.0)

    def length_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the phase in optimiser steps."""
        return self.steps if self.steps is not None else (self.epochs or 0) * steps_per_epoch


class Plan(_Data):
    """A whole strategy: phases in order, over the groups of a layer map.

    Attributes:
        version: of the file format.
        strategy: how the plan was made, for people (``"top_k(k=2)"``).
        granularity: of the layer map that the group names belong to.
        groups: all group names, input to output: the columns of the matrix.
        phases: its rows.
    """

    version: Literal[1] = 1
    strategy: str = "custom"
    granularity: Literal["stages", "blocks", "layers"] = "stages"
    groups: tuple[str, ...]
    phases: tuple[Phase, ...]

    def total_steps(self, steps_per_epoch: int) -> int:
        """Return the length of the whole plan in optimiser steps, no phase ending early."""
        return sum(phase.length_steps(steps_per_epoch) for phase in self.phases)

    def total_epochs(self, steps_per_epoch: int) -> int:
        """Return the number of epochs that the plan takes, a last partial one counted as one."""
        return math.ceil(self.total_steps(steps_per_epoch) / steps_per_epoch)

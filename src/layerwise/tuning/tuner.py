"""`Tuner`: carries a plan out on a live model and optimiser, in anybody's training loop.

    tuner = layerwise.Tuner(model, plan, torch.optim.AdamW, lr=1e-3, steps_per_epoch=len(loader))
    for epoch in tuner.epochs():
        for x, y in loader:
            criterion(model(x), y).backward()
            tuner.step()                    # optimiser, schedule, zero_grad, phases by steps
        tuner.end_epoch(accuracy)           # only where a phase or a schedule waits for validation

At each phase change, in this order: modes and norms follow the phase's policy (`layerwise.tuning.norms`);
``requires_grad`` says who learns; the optimiser's param groups become those of the phase; and when its first
epoch begins, groups to be started anew are. There is one optimiser for the whole plan, so moments of groups
that go on learning go on too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from layerwise.errors import PlanError
from layerwise.layers.isolation import unwrap
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Phase, Plan
from layerwise.tuning.checks import (
    check_epoch,
    check_first_step,
    warn_of_end,
    warn_of_no_metric,
    warn_of_whole_epoch,
)
from layerwise.tuning.gradient_norms import RelativeGradientNorms, by_layer_group
from layerwise.tuning.learners import Learners
from layerwise.tuning.matching import check_ddp, check_numbers, check_plan, layers_for
from layerwise.tuning.norms import NormRecord
from layerwise.tuning.optimizers import OptimizerBuilder, OptimizerFactory
from layerwise.tuning.param_groups import GroupSpec
from layerwise.tuning.progress import Progress
from layerwise.tuning.rates import Rates
from layerwise.tuning.regularisers import L2SP
from layerwise.tuning.reinit import check_reinit, reinit
from layerwise.tuning.stall import Mode, Stalls
from layerwise.tuning.tuner_state import check_run, load_optimizer, run_of


class Tuner:
    """Drives a live model and its optimiser through a plan.

    Args:
        model: changed in place: ``requires_grad``, modes of frozen modules, weights. May be wrapped by
            ``torch.compile``, DistributedDataParallel or PEFT (what PEFT froze then stays frozen).
        plan: who learns when.
        optimizer: a torch optimiser class (any with param groups, also a third party's) or a callable that
            takes param groups. Not LBFGS.
        lr: base rate η; a group learns at η times its multiplier times the schedule's factor.
        steps_per_epoch: optimiser steps in an epoch: ``len(loader)``, divided by the accumulated batches.
        layers: the model's layer map; made here where not given.
        example_input: for `layerwise.layer_map`.
        weight_decay: of matrices; None is the optimiser's default. Vectors never decay.
        seed: of what the Tuner draws itself (LISA's groups, weights started anew); the global random state is
            left alone.
        **optimizer_options: passed on (``momentum=0.9``, ``fused=True``).

    Attributes:
        optimizer: the one optimiser; its param groups hold exactly what learns now, each with ``"name"`` and
            ``"layer_group"``. May be replaced by a wrapper of it: ``tuner.optimizer =
            accelerator.prepare(tuner.optimizer)``.
        layers: the layer map.
        plan: the plan.

    Raises:
        PlanError: the plan was made for another model; `layers` is no layer map; `lr` or `steps_per_epoch` is
            out of range; the optimiser cannot be used.
        ModelError: the model has parameters that the layer map does not know; or it is wrapped by a
            DistributedDataParallel that does not look for unused parameters, though the plan freezes; or a
            phase starts anew what knows no initialisation.

    Warns:
        LayerwiseWarning: the optimiser does not follow the rates that it is given (Rprop, relative steps).

    >>> from layerwise.plans.strategies import linear_probe
    >>> from layerwise.layers.layermap import LayerGroup, LayerMap
    >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    >>> groups = [("0", "stem"), ("1", "head")]
    >>> layers = LayerMap(
    ...     tuple(LayerGroup(n, role, (n,), (f"{n}.weight", f"{n}.bias"), 10) for n, role in groups), "layers"
    ... )
    >>> tuner = Tuner(
    ...     model, linear_probe(layers, epochs=2), torch.optim.SGD, lr=0.1, steps_per_epoch=3, layers=layers
    ... )
    >>> for epoch in tuner.epochs():
    ...     for _ in range(3):
    ...         model(torch.ones(1, 4)).sum().backward()
    ...         tuner.step()
    >>> tuner.done, tuner.step_count, tuner.rates()
    (True, 6, {'0': 0.0, '1': 0.1})
    """

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        optimizer: OptimizerFactory,
        *,
        lr: float,
        steps_per_epoch: int,
        layers: LayerMap | None = None,
        example_input: Any = None,
        weight_decay: float | None = None,
        seed: int = 0,
        **optimizer_options: Any,
    ) -> None:
        check_numbers(lr=lr, steps_per_epoch=steps_per_epoch, weight_decay=weight_decay)
        check_plan(plan)
        self._model = unwrap(model)
        self.layers = layers_for(self._model, plan, layers, example_input)
        plan.check(self.layers)
        self.plan = plan
        self._seed = seed
        self._builder = OptimizerBuilder(
            optimizer, lr=lr, weight_decay=weight_decay, options=optimizer_options
        )
        check_ddp(model, plan)
        check_reinit(self._model, self.layers, plan)
        self._learners = Learners(self._model, plan, self.layers)
        self._generator = torch.Generator().manual_seed(seed)
        self._rates = Rates(lr)
        self._stalls = Stalls()
        self._l2_sp = L2SP(plan, self.layers, self._learners)
        self._rgn = RelativeGradientNorms()
        self._told: set[str] = set()  # what was warned of
        self._open = False  # inside an epoch
        self._resumed_at: int | None = None  # step at which a state was loaded
        self._unchecked = True  # the next step is the first since groups changed

        self._progress = Progress(plan, steps_per_epoch)
        self._progress.enter(0)
        self.optimizer = self._builder.build(self._draw())
        self._settings = {
            "lr": lr,
            "steps_per_epoch": steps_per_epoch,
            "seed": seed,
            "optimizer_class": self._builder.name,
            "weight_decay": weight_decay,
        }
        self._set_rates()

    def __repr__(self) -> str:
        number, name = self.phase_index + 1, self.phase.name
        at = "done" if self.done else f"phase {number} of {len(self.plan.phases)}, {name!r}"
        return f"<Tuner of {self.plan.strategy!r}: {at}, epoch {self.epoch}, step {self.step_count}>"

    # ------------------------------------------------------------------ where the run stands

    @property
    def phase(self) -> Phase:
        """The phase that is being carried out (the last one, when the plan is done)."""
        return self._progress.row

    @property
    def phase_index(self) -> int:
        """Its number, from 0."""
        return self._progress.phase

    @property
    def epoch(self) -> int:
        """Number of the running epoch, from 0: how many are finished."""
        return self._progress.epoch

    @property
    def step_count(self) -> int:
        """Optimiser steps taken so far."""
        return self._progress.step

    @property
    def step_in_epoch(self) -> int:
        """Optimiser steps taken in the running epoch: above 0 after a resume in the middle of one."""
        return self._progress.step_in_epoch

    @property
    def step_in_phase(self) -> int:
        """Optimiser steps taken in this phase."""
        return self._progress.step_in_phase

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in an epoch, as the Tuner was told."""
        return self._progress.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Length of the run in steps, those of phases that ended early left out."""
        return self._progress.step + self._progress.steps_left

    @property
    def total_epochs(self) -> int:
        """Length of the run in epochs, a last partial one counted as one."""
        return self._progress.epoch + self._progress.epochs_left

    @property
    def done(self) -> bool:
        """Whether the plan is over."""
        return self._progress.done

    @property
    def norms(self) -> NormRecord:
        """What the norms do in this phase."""
        return self._learners.norms

    def rates(self) -> dict[str, float]:
        """Return the learning rate of the next step by layer group, input -> output; 0 is frozen.

        Where parameters of one group have different rates it is the highest.
        """
        found = dict.fromkeys(self.layers.names, 0.0)
        for group in self.optimizer.param_groups:
            name = group["layer_group"]
            found[name] = max(found[name], float(group["lr"]))
        return found

    def trainable_names(self, phase_index: int | None = None) -> frozenset[str]:
        """Return the names of the parameters that learn now, or that learn in another phase.

        With LISA a phase's answer holds everything that may be drawn in it.

        Args:
            phase_index: number of the phase; None is now.
        """
        learners = self._learners
        return learners.names_now() if phase_index is None else learners.names_in(phase_index)

    # ------------------------------------------------------------------ the loop

    def epochs(self) -> Iterator[int]:
        """Yield the number of each epoch until the plan is done; go on where `load_state_dict` left off.

        An epoch that the loop did not end itself is ended with ``end_epoch(None)``.
        """
        while not self.done:
            self.begin_epoch()
            yield self.epoch
            if self._open:
                self.end_epoch()

    def begin_epoch(self) -> None:
        """Start an epoch; `epochs` calls it. For loops that belong to somebody else (Lightning, Trainer).

        Raises:
            PlanError: the plan is done.
        """
        if self.done:
            raise PlanError(f"the plan {self.plan.strategy!r} is done; make a new Tuner to train on")
        if not self._progress.begun:
            self._begin_phase()
        if self._progress.step_in_epoch == 0:
            self._rgn.start_epoch()
        self._open = True

    def step(self, *, scaler: torch.amp.GradScaler | None = None) -> None:
        """Take one optimiser step: check, regularise, step, zero the gradients, move the schedule on.

        Called once per optimiser step, so after the last of the accumulated batches. When a plan by steps
        ends in the middle of an epoch, further calls in that epoch drop the gradients and change nothing;
        the batches before them still move the statistics of norms that learn. Leave the loop when `done`.

        Args:
            scaler: scales the gradients (mixed precision in fp16); None where there is none, or where the
                wrapped optimiser has its own, as Accelerate's does.

        Raises:
            ModelError: on the first step of a phase: no trainable parameter has a gradient; what the
                optimiser holds is not what should learn; or a DistributedDataParallel was built while some
                of it was frozen, and leaves its gradients to each process.
            PlanError: the plan is done, and its last epoch.
        """
        if self.done and self._open:
            warn_of_end(self._progress, self.norms, self._told)
            self.optimizer.zero_grad(set_to_none=True)
            return
        self.before_step()
        if scaler is None:
            self.optimizer.step()
        else:
            scaler.step(self.optimizer)
            scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step()

    def before_step(self) -> None:
        """Check, measure and regularise before an optimiser step that a framework takes itself.

        For loops that call ``optimizer.step()`` and ``zero_grad()`` out of reach (Lightning, Trainer): this
        before it, when the gradients lie there, and `after_step` after it. Everybody else calls `step`.

        Raises:
            ModelError: as for `step`.
        """
        if not self._open:
            self.begin_epoch()
        if self._progress.step == self._resumed_at:
            warn_of_whole_epoch(self._progress, self._told)
        if self._unchecked:
            check_first_step(self._progress, self._model, self._learners, self.optimizer, self._told)
            self._unchecked = False
        phase = self.phase
        if phase.adapt_rates == "auto_rgn" and self._rgn.measure(by_layer_group(self.optimizer)):
            self._set_rates()
        if phase.l2_sp:
            self._l2_sp.pull(self.optimizer, phase.l2_sp)

    def after_step(self) -> None:
        """Move the schedule and the phases on after an optimiser step that a framework took itself."""
        self._progress.count_step()
        if self._progress.phase_over:
            self._next_phase()
            return
        every = self.phase.sample_every_steps
        if every and self._progress.step_in_phase % every == 0:
            self._builder.sync(self.optimizer, self._draw())
            self._l2_sp.remember(self._progress.phase)
        self._set_rates()

    def end_epoch(self, metric: float | None = None, *, mode: Mode = "max") -> None:
        """End the running epoch; needed only where a phase or a plateau schedule waits for validation.

        Args:
            metric: the epoch's validation metric.
            mode: whether more of it is better (``"max"``) or less.

        Raises:
            PlanError: no epoch is running, or it had no step.
        """
        progress = self._progress
        if not self._open:
            raise PlanError(
                "end_epoch() ends an epoch that tuner.epochs() or begin_epoch() started; none is running"
            )
        check_epoch(progress, self._told)
        self._open = False
        progress.count_epoch()
        if self.done:
            return
        if metric is None:
            warn_of_no_metric(progress, self._told)
        stalled = metric is not None and self._stalls.take_in(progress, metric, mode)
        if stalled or progress.phase_over:
            self._next_phase()
        else:
            self._set_rates()

    def all_phases(self) -> AbstractContextManager[None]:
        """Let everything that any phase trains require gradients inside the context.

        For wrapping the model in a DistributedDataParallel that lives through all phases: it only ever
        averages the gradients of what required them when it was built. Give it
        ``find_unused_parameters=True``, as frozen parameters take no part in the backward pass.
        """
        return self._learners.all_phases()

    # ------------------------------------------------------------------ save and go on

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the model's weights, as data that ``weights_only=True`` loads.

        Tensors are the live ones, as in torch's own state dicts: copy or save before the next step. Where an
        epoch is over, call `end_epoch` first: until then it is the running one, which `epochs` goes on with.
        """
        return {
            **run_of(self.plan, **self._settings),
            "progress": self._progress.to_dict(),
            "open": self._open,
            **self._stalls.to_dict(),
            "rgn": self._rgn.to_dict(),
            "generator": self._generator.get_state(),
            "references": dict(self._l2_sp.references),
            "names": [group["name"] for group in self.optimizer.param_groups],
            "optimizer": self.optimizer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Stand where the Tuner stood whose `state_dict` this is; load the model's weights separately.

        The order of the two does not matter. `epochs` then goes on with the epoch that was running.

        Raises:
            PlanError: the state is of another plan, base rate or number of steps, or of another version.
        """
        check_run(state, run_of(self.plan, **self._settings))
        self._progress = self._progress.loaded(state["progress"])
        self._resumed_at = self._progress.step
        self._open = bool(state["open"])
        self._stalls = Stalls.from_dict(state)
        self._rgn = RelativeGradientNorms.from_dict(state["rgn"])
        self._generator.set_state(state["generator"].cpu())
        self._l2_sp.load(state["references"])
        self._builder.sync(self.optimizer, self._set_learners())
        load_optimizer(self.optimizer, state)

    # ------------------------------------------------------------------ phases

    def _begin_phase(self) -> None:
        """Do once what happens to weights when a phase starts: start groups anew, remember the pretrained."""
        self._progress.begun = True
        if self.phase.reinit:
            seed, parameters = self._seed + self._progress.phase, self._learners.parameters
            names = reinit(self._model, self.layers, self.phase.reinit, seed=seed)
            self._builder.forget(self.optimizer, (parameters[name] for name in names if name in parameters))
        self._l2_sp.remember(self._progress.phase)

    def _next_phase(self) -> None:
        self._progress.enter_next(self.layers)
        if self.done:
            return
        self._stalls.start_phase()
        self._rgn = RelativeGradientNorms()
        self._builder.sync(self.optimizer, self._draw())
        if self._open:  # in the middle of an epoch there is no begin_epoch to wait for
            self._begin_phase()
        self._set_rates()

    # ------------------------------------------------------------------ who learns

    def _draw(self) -> list[GroupSpec]:
        """Draw the trunk groups that learn until the next draw, if any; set who learns."""
        self._progress.drawn = self._learners.draw(self._progress.phase, self._generator)
        return self._set_learners()

    def _set_learners(self) -> list[GroupSpec]:
        """Make those learn that the phase trains; return its param groups."""
        specs = self._learners.set(self._progress.phase, self._progress.drawn)
        self._rates.multipliers = {spec.name: spec.multiplier for spec in specs}
        self._unchecked = True
        return specs

    def _set_rates(self) -> None:
        """Give each param group the rate of the next step."""
        self._rates.give(self.optimizer, self._progress, self._rgn.weights)

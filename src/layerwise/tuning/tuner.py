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

from layerwise.errors import PlanError, plural, shorten, warn
from layerwise.layers.isolation import unwrap
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Phase, Plan
from layerwise.tuning.checks import check_averaged, check_calibrated, check_first_step, check_norms
from layerwise.tuning.gradient_norms import RelativeGradientNorms, by_layer_group
from layerwise.tuning.learners import Learners
from layerwise.tuning.matching import check_ddp, check_numbers, check_plan, layers_for
from layerwise.tuning.norms import NormRecord
from layerwise.tuning.optimizers import OptimizerBuilder, OptimizerFactory
from layerwise.tuning.param_groups import GroupSpec
from layerwise.tuning.processes import distributed
from layerwise.tuning.progress import Progress
from layerwise.tuning.rates import Rates
from layerwise.tuning.regularisers import L2SP
from layerwise.tuning.reinit import check_reinit, reinit
from layerwise.tuning.stall import Mode, Stalls
from layerwise.tuning.tuner_state import check_param_groups, check_run, run_of


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
        self._lr = lr
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
        self._warned: set[str] = set()
        self._open = False  # inside an epoch
        self._whole = False  # inside one that had all its steps when it was loaded
        self._unchecked = True  # the next step is the first since groups changed

        self._progress = Progress(plan, steps_per_epoch)
        self._progress.enter(0)
        self._draw()
        self.optimizer = self._builder.build(self._set_learners())
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
        if phase_index is None:
            return self._learners.names_now()
        return self._learners.names_in(phase_index)

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
            raise PlanError(_over(self.plan))
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
        """
        if self.done:
            self._after_the_end()
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
        if self._whole:
            self._whole = False
            self._warn(
                "whole",
                f"epoch {self.epoch} had all its {plural(self._progress.step_in_epoch, 'step')} when its "
                "state was saved, and now gets more. Call tuner.end_epoch() before state_dict() where an "
                "epoch is over, or leave out the batches that it had",
            )
        if self._unchecked:
            name = self.phase.name
            check_first_step(name, self._model, self._learners.parameters, self.optimizer, self._warned)
            if distributed():
                check_averaged(name, self._model)
            check_norms(name, self._model, self.norms)
            if self._progress.step_in_phase == 0:
                check_calibrated(name, self._model, self.norms)
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
            self._draw()
            self._builder.sync(self.optimizer, self._set_learners())
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
        if progress.step_in_epoch == 0:
            raise PlanError(
                f"epoch {progress.epoch} ended without an optimiser step; call tuner.step() in the loop "
                "after loss.backward(), and check that the loader is not empty"
            )
        if progress.step_in_epoch != self.steps_per_epoch and not self.done:
            self._warn(
                "steps",
                f"epoch {progress.epoch} had {plural(progress.step_in_epoch, 'optimiser step')}, the "
                f"Tuner was made for steps_per_epoch={self.steps_per_epoch}; schedules are computed for "
                "the latter",
            )
        self._open = self._whole = False
        progress.count_epoch()
        if self.done:
            return
        if metric is None:
            self._warn_of_no_metric()
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
            **self._run(),
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
        check_run(state, self._run())
        self._progress = self._progress.loaded(state["progress"])
        self._open = bool(state["open"])
        is_whole = self._progress.step_in_epoch >= self.steps_per_epoch
        self._whole = self._open and is_whole and self.phase.epochs is not None  # by steps, none need end
        self._stalls = Stalls.from_dict(state)
        self._rgn = RelativeGradientNorms.from_dict(state["rgn"])
        self._generator.set_state(state["generator"].cpu())
        self._l2_sp.load(state["references"])
        self._builder.sync(self.optimizer, self._set_learners())
        place = {name: index for index, name in enumerate(state["names"])}
        self.optimizer.param_groups.sort(key=lambda group: place.get(group["name"], len(place)))
        check_param_groups(list(state["names"]), [group["name"] for group in self.optimizer.param_groups])
        self.optimizer.load_state_dict(state["optimizer"])
        self._unchecked = True

    def _run(self) -> dict[str, Any]:
        return run_of(
            self.plan,
            lr=self._lr,
            steps_per_epoch=self.steps_per_epoch,
            seed=self._seed,
            optimizer_class=self._builder.name,
            weight_decay=self._builder.weight_decay,
        )

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
        self._draw()
        self._builder.sync(self.optimizer, self._set_learners())
        if self._open:  # in the middle of an epoch there is no begin_epoch to wait for
            self._begin_phase()
        self._set_rates()

    # ------------------------------------------------------------------ who learns

    def _draw(self) -> None:
        """Draw the trunk groups that learn until the next draw, where the phase draws some."""
        self._progress.drawn = self._learners.draw(self._progress.phase, self._generator)

    def _set_learners(self) -> list[GroupSpec]:
        """Make those learn that the phase trains; return its param groups."""
        specs = self._learners.set(self._progress.phase, self._progress.drawn)
        self._rates.multipliers = {spec.name: spec.multiplier for spec in specs}
        self._unchecked = True
        return specs

    def _set_rates(self) -> None:
        """Give each param group the rate of the next step."""
        self._rates.give(self.optimizer, self._progress, self._rgn.weights)

    # ------------------------------------------------------------------ messages

    def _after_the_end(self) -> None:
        if not self._open:
            raise PlanError(_over(self.plan))
        moving = self.norms.adapting
        self._warn(
            "end",
            f"the plan ended at step {self.step_count}, in the middle of an epoch; this and further "
            "tuner.step() calls change nothing"
            + (
                f", but batches in train mode move the statistics of {plural(len(moving), 'norm')} that "
                f"learn ({shorten(moving)}) all the same"
                if moving
                else ""
            )
            + ". Leave the loop when tuner.done",
        )
        self.optimizer.zero_grad(set_to_none=True)

    def _warn_of_no_metric(self) -> None:
        patience, schedule = self.phase.patience_epochs, self.phase.schedule
        if self._progress.step_in_phase == 0 and schedule.span == "phase":
            return  # the epoch was one of the phase before
        if patience is not None or schedule.shape == "plateau":
            what = "phase ends when" if patience is not None else "schedule falls when"
            self._warn(
                "metric",
                f"the plan's {what} validation stalls, but end_epoch() got no metric; call "
                "tuner.end_epoch(metric) at the end of each epoch (with layerwise.fit: give val, or "
                "--val-frac)",
            )

    def _warn(self, key: str, message: str) -> None:
        """Warn once of each kind."""
        if f"!{key}" not in self._warned:
            self._warned.add(f"!{key}")
            warn(message)


def _over(plan: Plan) -> str:
    return f"the plan {plan.strategy!r} is done; make a new Tuner to train on"

"""Any optimiser class or factory: build it on named groups, and change these while it keeps its state."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, MutableMapping, Sequence, Set
from typing import Any

import torch
from torch import nn

from layerwise.errors import PlanError, warn
from layerwise.tuning.param_groups import GroupSpec, as_dict

OptimizerFactory = Callable[..., torch.optim.Optimizer]


class OptimizerBuilder:
    """Builds one optimiser, and keeps its param groups equal to a list of `GroupSpec`.

    Args:
        factory: a ``torch.optim.Optimizer`` class, or a callable that takes the param groups.
        lr: base rate; a class gets it as ``lr=``, any other callable only if it has such an argument. The
            rate of each group is set on the group anyway.
        weight_decay: of the groups that decay; None takes the optimiser's own default for them.
        options: further keyword arguments of the factory.

    Attributes:
        weight_decay: as given.
        name: of the class of what was built last.

    Raises:
        PlanError: an optimiser that cannot be used (an instance, LBFGS).
    """

    def __init__(
        self, factory: OptimizerFactory, *, lr: float, weight_decay: float | None, options: dict[str, Any]
    ) -> None:
        if isinstance(factory, torch.optim.Optimizer):
            raise PlanError(
                f"an optimiser instance ({type(factory).__name__}) was given; expected its class or a "
                f"factory, since the Tuner builds the param groups: "
                f"Tuner(model, plan, {type(factory).__name__}, lr=...)"
            )
        if not callable(factory):
            raise PlanError(f"optimizer is {factory!r}; expected a class (torch.optim.AdamW) or a factory")
        if isinstance(factory, type) and issubclass(factory, torch.optim.LBFGS):
            raise PlanError(_LBFGS)
        self._factory: Any = factory
        self._options = dict(options)
        if isinstance(factory, type) or "lr" in _arguments(factory):
            self._options["lr"] = lr
        self.weight_decay = weight_decay
        self.name = ""
        self._eager = False

    def build(self, specs: Sequence[GroupSpec]) -> torch.optim.Optimizer:
        """Return a new optimiser on the groups of `specs`.

        Raises:
            PlanError: it is an LBFGS; or `weight_decay` is given and the optimiser has none.

        Warns:
            LayerwiseWarning: it does not follow the rates of its groups (Rprop, relative steps).
        """
        optimizer: torch.optim.Optimizer = self._factory(
            [as_dict(spec, lr=self._options.get("lr", 0.0)) for spec in specs], **self._options
        )
        if isinstance(optimizer, torch.optim.LBFGS):
            raise PlanError(_LBFGS)
        _check_rates_are_read(optimizer)
        # torch adds it when it loads a state: what joins a resumed run would have one more (Adafactor's)
        optimizer.defaults.setdefault("differentiable", False)
        self.name = type(optimizer).__name__
        if self.weight_decay is not None and "weight_decay" not in optimizer.param_groups[0]:
            raise PlanError(
                f"weight_decay is {self.weight_decay!r}, but {type(optimizer).__name__} has no such option; "
                "leave it out"
            )
        for group, spec in zip(optimizer.param_groups, specs):
            self._set_decay(group, spec)
        # Adagrad and some others make the state of all parameters at once, and none for those that join.
        self._eager = any(states_of(optimizer))
        return optimizer

    def sync(self, optimizer: torch.optim.Optimizer, specs: Sequence[GroupSpec]) -> None:
        """Make the param groups of `optimizer` those of `specs`, in their order.

        The first group stays the first as long as it is there. What stays keeps its state, bit for bit, and
        its group's options, also in a group of another name. What joins starts without state. What leaves
        loses its state and its gradients.
        """
        groups: list[dict[str, Any]] = optimizer.param_groups
        first = groups[0]["name"]
        wanted = {spec.name: spec for spec in specs}
        stays = {id(parameter) for spec in specs for parameter in spec.parameters}
        joins = stays - {id(parameter) for group in groups for parameter in group["params"]}
        options: dict[str, dict[str, Any]] = {}
        former: dict[int, str] = {}  # parameter -> its group, of those that are made anew
        for group in list(groups):
            for parameter in group["params"]:
                if id(parameter) not in stays:
                    _drop_state(optimizer, parameter)
                    parameter.grad = None
            spec = wanted.get(group["name"])
            if spec is None or [*map(id, group["params"])] != [*map(id, spec.parameters)]:
                own = ("params", "param_names", "name", "layer_group")
                options[group["name"]] = {key: value for key, value in group.items() if key not in own}
                former |= dict.fromkeys(map(id, group["params"]), group["name"])
                # by identity: dicts of tensors have no usable equality
                del groups[next(index for index, other in enumerate(groups) if other is group)]
        present = {group["name"] for group in groups}
        for spec in specs:
            if spec.name not in present:
                source = next((former[id(p)] for p in spec.parameters if id(p) in former), spec.name)
                kept = copy.deepcopy(options.get(source, {}))  # of one group there may be two now
                optimizer.add_param_group({**as_dict(spec, lr=0.0), **kept})
                if not kept:
                    self._set_decay(groups[-1], spec)
        # Prodigy and its kin keep what holds for all groups in the first, and read it there.
        place = {spec.name: index for index, spec in enumerate(specs)} | {first: -1}
        groups.sort(key=lambda group: place[group["name"]])
        self._start(optimizer, joins)

    def forget(self, optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
        """Have parameters lose their state, and go on as those that join."""
        parameters = list(parameters)
        for parameter in parameters:
            _drop_state(optimizer, parameter)
        self._start(optimizer, set(map(id, parameters)))

    def _start(self, optimizer: torch.optim.Optimizer, parameters: Set[int]) -> None:
        """Give parameters, named by their ids, the state that they have in a new optimiser of this kind."""
        if not self._eager:
            _even_momentum(optimizer)
            return
        groups = [
            {**group, "params": those}
            for group in optimizer.param_groups
            if (those := [parameter for parameter in group["params"] if id(parameter) in parameters])
        ]
        for group in groups:
            group.pop("param_names", None)
        if groups:
            made = self._factory(groups, **self._options)
            for state, new in zip(states_of(optimizer), states_of(made)):
                state.update(new)

    def _set_decay(self, group: dict[str, Any], spec: GroupSpec) -> None:
        if "weight_decay" not in group:
            return
        if not spec.decays:
            group["weight_decay"] = 0.0
        elif self.weight_decay is not None:
            group["weight_decay"] = self.weight_decay


def states_of(optimizer: Any) -> list[MutableMapping[Any, Any]]:
    """Return the state by parameter of `optimizer`, and that of the optimisers inside it (Lookahead, SAM)."""
    inner = [value for value in vars(optimizer).values() if isinstance(value, torch.optim.Optimizer)]
    found = [optimizer.state, *(state for other in inner for state in states_of(other))]
    return list({id(state): state for state in found}.values())


def _drop_state(optimizer: Any, parameter: nn.Parameter) -> None:
    for state in states_of(optimizer):
        state.pop(parameter, None)


def _even_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Give joiners a momentum of zero beside others that have one: torch's fused SGD takes all or none."""
    for group in optimizer.param_groups:
        if not group.get("fused") or "dampening" not in group:
            continue
        for state in states_of(optimizer):
            lacking = [p for p in group["params"] if state.get(p, {}).get("momentum_buffer") is None]
            if len(lacking) < len(group["params"]):
                for parameter in lacking:
                    state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _check_rates_are_read(optimizer: torch.optim.Optimizer) -> None:
    if isinstance(optimizer, torch.optim.Rprop):
        how, after, other = "the rate of a parameter at its first step alone", " after it", ""
    elif any(group.get("relative_step") for group in optimizer.param_groups):
        how, after, other = "no rate, as relative_step is True", "", " relative_step=False, or"
    else:
        return
    warn(
        f"{type(optimizer).__name__} reads {how}: the plan's rates, warm-up and schedules do nothing{after}. "
        f"Take{other} an optimiser that reads its rate at each step (AdamW, SGD)"
    )


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a param group, in place where it is a tensor (capturable, compiled)."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


_LBFGS = (
    "LBFGS takes one param group with one rate, and a closure; a plan needs one group a layer group. Use a "
    "first-order optimiser (AdamW, SGD), or train a linear probe on cached features with LBFGS by hand"
)


def _arguments(factory: OptimizerFactory) -> Sequence[str]:
    try:
        return list(inspect.signature(factory).parameters)
    except (TypeError, ValueError):  # builtins have no signature
        return []

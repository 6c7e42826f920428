"""The options that every strategy takes besides its own, and how they become phases."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from typing import Any, TypedDict, TypeVar, cast, get_args

from layerwise.errors import PlanError, did_you_mean, named_kind
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Phase, Plan
from layerwise.plans.settings import NormKind, Norms, Schedule, Shape

DEFAULT_EPOCHS = 5
"""Length of a plan where neither epochs nor steps are given: fine-tuning, not training from scratch."""


_Strategy = TypeVar("_Strategy", bound=Callable[..., Plan])


class PhaseOptions(TypedDict, total=False):
    """What every strategy takes as keyword options.

    Attributes:
        epochs: length of the whole plan in epochs; 5 where neither this nor `steps` is given.
        steps: the same in optimiser steps. At most one of the two.
        schedule: a `Schedule`, or the name of a shape (``"cosine"``); constant where not given.
        norms: a `Norms`, or the name of a policy (``"freeze"``); ``"follow"`` where not given.
        join_steps: warm-up of a group that joins after the first phase, in steps; 0.
        l2_sp: strength of the pull towards the pretrained weights; 0.
        frozen_dropout: whether dropout stays active in frozen groups; False.
    """

    epochs: int
    steps: int
    schedule: Schedule | Shape
    norms: Norms | NormKind
    join_steps: int
    l2_sp: float
    frozen_dropout: bool


def strategy(function: _Strategy) -> _Strategy:
    """Have a strategy tell whoever gives it a model, or an option that it does not have, what it takes.

    Raises:
        PlanError: when it is called with something else than a layer map, or with an unknown option.
    """
    parameters = list(inspect.signature(function).parameters.values())[1:]  # after the layer map
    own = [parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD]
    known = [*own, *PhaseOptions.__annotations__]

    @functools.wraps(function)
    def checked(layers: LayerMap, *args: Any, **kwargs: Any) -> Plan:
        if not isinstance(layers, LayerMap):
            raise PlanError(
                f"{function.__name__} got {named_kind(layers)}; expected the layer map of a model: "
                f"{function.__name__}(layerwise.layer_map(model), ...)"
            )
        for name in kwargs:
            if name not in known:
                raise PlanError(
                    f"{function.__name__} has no option {name!r} (known: {', '.join(known)})."
                    f"{did_you_mean(name, known)}"
                )
        return function(layers, *args, **kwargs)

    return cast(_Strategy, checked)


def settings(options: PhaseOptions) -> dict[str, Any]:
    """Return the fields of a phase that `options` set, lengths left out.

    Raises:
        PlanError: the name of a schedule or a norm policy is not known.
    """
    given = {name: value for name, value in options.items() if name not in ("epochs", "steps")}
    schedule, norms = given.get("schedule"), given.get("norms")
    if isinstance(schedule, str):
        given["schedule"] = Schedule(shape=_known("schedule", schedule, get_args(Shape)))
    if isinstance(norms, str):
        given["norms"] = Norms(policy=_known("norms policy", norms, get_args(NormKind)))
    return given


def length(options: PhaseOptions) -> dict[str, int]:
    """Return the length of a one-phase plan: the given epochs or steps, or the default."""
    return _lengths(options) or {"epochs": DEFAULT_EPOCHS}


def length_given(options: PhaseOptions, strategy: str) -> dict[str, int]:
    """Return the length of a plan of several phases, as given: one of epochs and steps, or none.

    Raises:
        PlanError: both are given, or it is no whole number above 0.
    """
    given = _lengths(options)
    if len(given) > 1:
        raise PlanError(f"{strategy}: epochs = {given['epochs']!r} and steps = {given['steps']!r}; keep one")
    check_lengths(strategy, given)
    return given


def check_lengths(strategy: str, lengths: Mapping[str, Any]) -> None:
    """Raise `PlanError` unless each of `lengths`, by name, is a whole number above 0, or None."""
    for name, count in lengths.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise PlanError(f"{strategy}: {name} is {count!r}; expected a whole number of at least 1")


def make_plan(layers: LayerMap, strategy: str, phases: list[Phase]) -> Plan:
    """Return the plan of `phases` over the groups of `layers`."""
    return Plan(strategy=strategy, granularity=layers.granularity, groups=layers.names, phases=tuple(phases))


def one_phase(
    layers: LayerMap,
    strategy: str,
    rates: Mapping[str, float],
    options: PhaseOptions,
    **fields: Any,
) -> Plan:
    """Return a plan of one phase with `rates`, its length and settings from `options`."""
    phase = Phase(
        name="train",
        rates={group: rate for group, rate in rates.items() if rate != 0},
        **{**length(options), **settings(options), **fields},
    )
    return make_plan(layers, strategy, [phase])


def call(name: str, **arguments: Any) -> str:
    """Return how a strategy was called, for people: arguments that are None are left out.

    >>> call("top_k", k=2, norms=None)
    'top_k(k=2)'
    """
    shown = ", ".join(f"{key}={_short(value)}" for key, value in arguments.items() if value is not None)
    return f"{name}({shown})" if shown else name


def require_freezing(layers: LayerMap, trained: Collection[str], strategy: str) -> None:
    """Raise `PlanError` when a strategy that is meant to freeze groups leaves none frozen."""
    if len(set(trained) & set(layers.names)) == len(layers):
        raise PlanError(
            f"{strategy} freezes nothing: all {len(layers)} groups ({', '.join(layers.names)}) would learn. "
            "Select fewer, or ask for full() or discriminative(decay=...)"
        )


def require_groups(layers: LayerMap, strategy: str) -> None:
    """Raise `PlanError` for a map of a single group, which leaves a strategy nothing to tell apart."""
    if len(layers) < 2:
        raise PlanError(
            f"{strategy} needs at least two groups; this layer map has {len(layers)} "
            f"({', '.join(layers.names)}). Map the model with a finer granularity, or ask for full()"
        )


def require_head(layers: LayerMap, strategy: str) -> str:
    """Return the name of the head; raise `PlanError` for a model without one."""
    if layers.head is None:
        raise PlanError(
            f"{strategy} trains the head, and this layer map has none ({', '.join(layers.names)}). "
            "Add an output layer to the model, or name the groups with blocks([...])"
        )
    return layers.head.name


def _lengths(options: PhaseOptions) -> dict[str, int]:
    return {name: options[name] for name in ("epochs", "steps") if options.get(name) is not None}


def _known(what: str, name: str, names: tuple[str, ...]) -> Any:
    if name not in names:
        raise PlanError(f"{what} {name!r} is not known ({', '.join(names)}).{did_you_mean(name, names)}")
    return name


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)

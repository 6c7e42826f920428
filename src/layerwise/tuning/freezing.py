"""Freeze and unfreeze parameters by name, and count them. For loops that no plan drives."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

from torch import nn

from layerwise.errors import ModelError, PlanError, percent, plural
from layerwise.layers.isolation import require_module, unwrap
from layerwise.layers.norms import find_norms
from layerwise.plans.selection import match_names
from layerwise.shown import Shown
from layerwise.tuning.modes import first_encoder_layers, pin_eval, unpin

_SWITCHED: WeakSet[nn.Module] = WeakSet()
"""Modules that `freeze` pinned or `unfreeze` let go, in this process: not those that somebody else pinned."""
_HELD: WeakSet[nn.Module] = WeakSet()
"""Those of them that were pinned and not let go since."""


@dataclass(frozen=True)
class FreezeRecord(Shown):
    """What `freeze` or `unfreeze` changed.

    Attributes:
        action: which of the two.
        names: parameters whose ``requires_grad`` was switched, one name for a shared one.
        numel: number of scalars in them.
        modules: paths of the modules that were pinned in eval mode (`freeze`) or let go (`unfreeze`).
        skipped: parameters that cannot have gradients (integers of a quantised model) and so stayed as
            they are.
    """

    action: Literal["freeze", "unfreeze"]
    names: tuple[str, ...]
    numel: int
    modules: tuple[str, ...]
    skipped: tuple[str, ...] = ()
    _model: nn.Module = dataclasses.field(default_factory=nn.Module, repr=False, compare=False)
    _parameters: tuple[nn.Parameter, ...] = dataclasses.field(default=(), repr=False, compare=False)
    _modules: tuple[nn.Module, ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        what, how = ("froze", "held in eval mode") if self.action == "freeze" else ("unfroze", "let go")
        what += f" {plural(self.numel, 'parameter')} in {plural(len(self.names), 'tensor')}"
        return f"{what}; modules {how}: {len(self.modules)}"

    def undo(self) -> None:
        """Give the switched parameters and modules the state that they had before the call.

        Records may be undone in any order: a module that several of them stilled is held as long as all its
        parameters are frozen.
        """
        before = {module for module, _ in _wholly_frozen(self._model)}
        for parameter in self._parameters:
            parameter.requires_grad = self.action == "freeze"
        after = {module for module, _ in _wholly_frozen(self._model)}
        others = (module for module in before ^ after if module in _SWITCHED)
        if self.action == "freeze":
            _HELD.difference_update(unpin((*self._modules, *others)))
        else:
            _HELD.update(pin_eval((*(module for module in self._modules if module in after), *others)))

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for JSON."""
        fields = ("action", "names", "numel", "modules", "skipped")
        return {name: getattr(self, name) for name in fields}


@dataclass(frozen=True)
class ParameterCount(Shown):
    """Numbers of scalars in a model's parameters, shared ones counted once.

    Attributes:
        trainable: those that require gradients.
        frozen: the others.
    """

    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """Trainable and frozen together."""
        return self.trainable + self.frozen

    @property
    def percent(self) -> float:
        """Trainable share of the total, in percent; 0 for a model without parameters."""
        return 100 * self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        share = percent(self.trainable, self.total, digits=2)
        return f"{self.trainable:,} of {self.total:,} parameters are trainable ({share} %)"

    def to_dict(self) -> dict[str, Any]:
        """Return the numbers as plain data for JSON."""
        return {**dataclasses.asdict(self), "total": self.total, "percent": self.percent}


def freeze(model: nn.Module, *patterns: str) -> FreezeRecord:
    """Freeze the parameters that `patterns` match (all, without patterns), and still their modules.

    A module with such parameters that are all frozen afterwards, and everything below it, is pinned in eval
    mode: batch-norm statistics stop and dropout falls silent even when somebody calls ``model.train()``. So
    is one that was frozen before, by ``requires_grad`` alone. Gradients that lie on the parameters are
    dropped, so that an optimiser that already holds them leaves them alone, weight decay included.

    Args:
        model: changed in place; `unfreeze`, or the record's ``undo()``, takes it back.
        *patterns: full names, whole name components (``"layer1"``; ``"bn"`` never matches ``subnet``), globs
            (``"bn*"``, ``"*.bias"``), or ``re:`` and a regular expression (``"re:^conv1"`` is that of no
            block). Names are those in the model inside ``torch.compile`` and DistributedDataParallel.

    Returns:
        The record of the change; its ``undo()`` takes it back.

    Raises:
        PlanError: a pattern matches no parameter (the closest names are listed), or is no text.

    >>> model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    >>> freeze(model, "0").names
    ('0.weight', '0.bias')
    >>> count_parameters(model).percent
    50.0
    """
    return _switch(model, patterns, "freeze")


def unfreeze(model: nn.Module, *patterns: str) -> FreezeRecord:
    """Let the parameters that `patterns` match (all, without patterns) learn, and wake their modules.

    A module that is no longer wholly frozen follows ``train()`` again, and is in the mode that it was last
    asked to have. An optimiser that was built before does not know the parameters: add them with
    ``optimizer.add_param_group``, or let `layerwise.Tuner` do it.

    Args:
        model: changed in place.
        *patterns: as for `freeze`.

    Returns:
        The record of the change; its ``undo()`` takes it back.

    Raises:
        PlanError: a pattern matches no parameter, or is no text.
    """
    return _switch(model, patterns, "unfreeze")


def count_parameters(model: nn.Module) -> ParameterCount:
    """Return how many scalars of `model` are trainable and frozen; shared parameters count once.

    Args:
        model: as its ``requires_grad`` are now; unchanged.

    Raises:
        ModelError: `model` is none, or a lazy layer has no shape yet.
    """
    require_module(model)
    numbers = {True: 0, False: 0}
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ModelError(
                f"parameter {name!r} has no shape yet (a lazy layer); run one forward pass first"
            )
        numbers[parameter.requires_grad] += parameter.numel()
    return ParameterCount(trainable=numbers[True], frozen=numbers[False])


def _switch(
    model: nn.Module, patterns: tuple[str, ...], action: Literal["freeze", "unfreeze"]
) -> FreezeRecord:
    require_module(model)
    for given in patterns:
        if isinstance(given, nn.Module):
            raise PlanError(
                f"{action}(model, {type(given).__name__}(...)): patterns are texts, such as a module's path; "
                f"to {action} a module itself: {action}(module)"
            )
    every = dict(model.named_parameters(remove_duplicate=False))
    chosen = _matched(model, patterns, every) if patterns else list(every)
    wanted = action == "unfreeze"
    still_before = dict(_wholly_frozen(model))
    switched: dict[int, tuple[str, nn.Parameter]] = {}
    skipped = []
    for name in chosen:
        parameter = every[name]
        if wanted and not (parameter.is_floating_point() or parameter.is_complex()):
            skipped.append(name)
        elif parameter.requires_grad != wanted:
            parameter.requires_grad = wanted  # the method refuses lazy parameters, the attribute takes them
            switched[id(parameter)] = (name, parameter)
        if not parameter.requires_grad:
            parameter.grad = None
    still = dict(_wholly_frozen(model))
    if wanted:  # what was unfrozen by hand is held still
        still_before = {m: path for path, m in model.named_modules() if m in still_before or m in _HELD}
        changed = unpin(module for module in still_before if module not in still)
        _HELD.difference_update(changed)
    else:
        named = {id(every[name]) for name in chosen}
        whole = (module for module in still if any(id(p) in named for p in module.parameters()))
        inside = {below for module in whole for below in module.modules()}
        changed = pin_eval(module for module in still if module in inside)
        _HELD.update(changed)
    _SWITCHED.update(changed)
    paths = still_before if wanted else still
    return FreezeRecord(
        action=action,
        names=tuple(name for name, _ in switched.values()),
        numel=sum(
            parameter.numel() for _, parameter in switched.values() if not nn.parameter.is_lazy(parameter)
        ),
        modules=tuple(paths[module] for module in changed),
        skipped=tuple(skipped),
        _model=model,
        _parameters=tuple(parameter for _, parameter in switched.values()),
        _modules=changed,
    )


def _matched(model: nn.Module, patterns: tuple[str, ...], names: Collection[str]) -> list[str]:
    """Return those of `names` that `patterns` match; a wrapper's part of them may be left out."""
    root = unwrap(model)
    path = next(path for path, module in model.named_modules() if module is root)
    prefix = f"{path}." if path else ""
    full = {name.removeprefix(prefix): name for name in names}
    wanted = [p.removeprefix(prefix) if isinstance(p, str) else p for p in patterns]
    return [full[name] for name in match_names(wanted, full, apart=_without_parameters(root))]


def _without_parameters(model: nn.Module) -> dict[str, str]:
    """Return what to say of a pattern that names a module without parameters, by the module's path."""
    told = {
        path: f"names a {type(module).__name__} without parameters, which has nothing to freeze."
        for path, module in model.named_modules()
        if path and next(module.parameters(), None) is None
    }
    for norm in find_norms(model):
        if norm.name in told and norm.kind == "running":
            call = f"layerwise.freeze_batchnorm(model.get_submodule({norm.name!r}))"
            told[norm.name] += f" {call} holds its statistics."
    return told


def _wholly_frozen(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules that have parameters, none of them trainable, and all modules below these."""
    still: set[nn.Module] = set()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            still.update(module.modules())
    still -= first_encoder_layers(model, still)
    for path, module in model.named_modules():
        if module in still:
            yield module, path

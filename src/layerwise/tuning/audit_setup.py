"""What the checks of an audit look at, and what they return."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from layerwise.errors import LayerwiseError, ModelError, named_kind, shorten
from layerwise.layers.isolation import unwrap
from layerwise.layers.layermap import LayerMap
from layerwise.layers.norms import NormLayer, find_norms
from layerwise.tuning.modes import held_modes
from layerwise.tuning.norm_layers import ADAPTING, frozen_norms
from layerwise.tuning.norms import look_through, module_owners

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True)
class Finding:
    """One fault, or risk, of a training set-up.

    Attributes:
        severity: ``"error"``: the run will not do what it says. ``"warning"``: it likely will not, or does
            so at a cost. ``"info"``: worth knowing.
        code: stable name of the fault, for filters and tests.
        modules: names of the modules, parameters or param groups concerned.
        why: what goes wrong, in one or two sentences.
        fix: what to do.
    """

    severity: Severity
    code: str
    modules: tuple[str, ...]
    why: str
    fix: str

    @property
    def module(self) -> str:
        """The modules concerned in a few words."""
        return shorten(self.modules)

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain data for JSON."""
        return {**dataclasses.asdict(self), "module": self.module}


class Setup:
    """A model with its optimisers and schedulers, and what the checks need to know about them."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Any],
        schedulers: Sequence[Any],
        layers: LayerMap | None,
        batch_size: int | None,
    ) -> None:
        self.model = model
        self.root = unwrap(model) if layers is None else look_through(model, layers)
        self.optimizers = optimizers
        self.schedulers = schedulers
        self.layers = layers
        self.batch_size = batch_size

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """All parameters, shared ones once, by name."""
        return dict(self.root.named_parameters())

    @cached_property
    def names(self) -> dict[int, str]:
        """Name of each parameter by identity."""
        return {id(parameter): name for name, parameter in self.parameters.items()}

    @cached_property
    def aliases(self) -> dict[int, list[str]]:
        """All names of each parameter by identity."""
        found: dict[int, list[str]] = {}
        for name, parameter in self.root.named_parameters(remove_duplicate=False):
            found.setdefault(id(parameter), []).append(name)
        return found

    @cached_property
    def norms(self) -> tuple[NormLayer, ...]:
        """All normalisation layers."""
        return find_norms(self.root)

    @cached_property
    def frozen_norms(self) -> tuple[NormLayer, ...]:
        """Those with running statistics that are meant to be frozen."""
        return frozen_norms(self.root)

    @cached_property
    def learning_norms(self) -> tuple[NormLayer, ...]:
        """The others with running statistics."""
        frozen = {norm.module for norm in self.frozen_norms}
        return tuple(norm for norm in self.norms if norm.kind == "running" and norm.module not in frozen)

    @cached_property
    def training(self) -> dict[nn.Module, bool]:
        """The mode that each module has after ``model.train()``, which trainers call all the time.

        Where that would be a fault in a frozen part, it is the mode after a recorded forward pass, which may
        call ``eval()``.
        """
        was = self.model.training
        with held_modes(self.model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.model.train()
            modes = self.modes()
            held = {norm.module for norm in self.frozen_norms}
            held.update(module for module in self.still if drop_rate(module) > 0)
            if any(modes[module] for module in held):
                modes = self._modes_after_forward()
            self.model.train(was)  # a train() of the user's own may do more than set flags
        return modes

    def modes(self) -> dict[nn.Module, bool]:
        """Return the mode that each module has now."""
        return {module: module.training for module in self.root.modules()}

    def _modes_after_forward(self) -> dict[nn.Module, bool]:
        """Return the modes that a recorded pass leaves; those of now where none can be recorded."""
        from layerwise.layers.inputs import record_example

        seen = self.modes()
        hook = self.root.register_forward_hook(lambda *_: seen.update(self.modes()))
        with hook, contextlib.suppress(LayerwiseError):
            record_example(self.root, mode="keep")
        return seen

    @cached_property
    def still(self) -> frozenset[nn.Module]:
        """The modules of the frozen part: no parameter of theirs, or around them, learns.

        With a layer map, those of groups without a trainable parameter. Without one, modules with frozen
        parameters only, and parameterless ones where that holds for the innermost module around them
        that has parameters, or for their neighbours in an ``nn.Sequential``. Norms that adapt are none.
        """
        if self.layers is not None:
            owners = module_owners(self.root, self.layers)
            learning = {self.home(name) for name, p in self.parameters.items() if p.requires_grad}
            return frozenset(m for m, groups in owners.items() if not groups & learning and m not in ADAPTING)
        still: set[nn.Module] = set()
        paths = dict(self.root.named_modules())
        frozen: dict[str, bool] = {}
        for path, module in paths.items():
            flags = {parameter.requires_grad for parameter in module.parameters()}
            around = path.rpartition(".")[0]
            if flags:
                frozen[path] = flags == {False}
            else:
                frozen[path] = frozen.get(around, False) or _between_frozen(paths[around], module)
            if frozen[path]:
                still.add(module)
        return frozenset(still.difference(ADAPTING))

    def home(self, name: str) -> str:
        """Return the layer group of a parameter; "" for one that the map does not know (a late adapter)."""
        try:
            return "" if self.map is None else self.map.group_of(name)
        except LayerwiseError:
            return ""

    @cached_property
    def map(self) -> LayerMap | None:
        """The layer map given, else one made here; None where the model cannot be recorded."""
        if self.layers is not None:
            return self.layers
        from layerwise.layers.mapping import layer_map

        try:
            return layer_map(self.root)
        except LayerwiseError:
            return None

    @cached_property
    def param_groups(self) -> list[tuple[str, dict[str, Any]]]:
        """Param groups of all optimisers with a name for people."""
        several = len(self.optimizers) > 1
        return [
            (
                f"{f'optimizer {number}, ' if several else ''}param group {index}"
                + (f" ({group['name']})" if isinstance(group.get("name"), str) else ""),
                group,
            )
            for number, optimizer in enumerate(self.optimizers)
            for index, group in enumerate(_groups_of(optimizer))
        ]

    @cached_property
    def rated(self) -> list[tuple[str, dict[str, Any]]]:
        """Those that have a rate; Adafactor makes its own where the rate is None."""
        return [(name, group) for name, group in self.param_groups if group["lr"] is not None]

    def state_of(self, parameter: Tensor) -> Mapping[str, Any]:
        """Return what the optimisers have stored for a parameter."""
        for optimizer in self.optimizers:
            if optimizer.state.get(parameter):
                found: Mapping[str, Any] = optimizer.state[parameter]
                return found
        return {}

    def named(self, parameters: Iterable[Tensor]) -> tuple[str, ...]:
        """Return the names of `parameters`, those of the model only."""
        return tuple(self.names[id(p)] for p in parameters if id(p) in self.names)


def _groups_of(optimizer: Any) -> list[dict[str, Any]]:
    """Return the param groups of an optimiser, with the tensors of the model that it steps.

    DeepSpeed's ZeRO (stages 1 and 2) steps one flat copy for each group, and keeps what it was made of.
    """
    held = getattr(optimizer, "bit16_groups", None)
    groups: list[dict[str, Any]] = optimizer.param_groups
    if held is None:
        return groups
    return [{**group, "params": members} for group, members in zip(groups, held, strict=True)]


def drop_rate(module: nn.Module) -> float:
    """Return the largest rate of dropout that a module applies itself.

    A leaf whose class speaks of dropping keeps it in `p` or `drop_prob`; others apply functional dropout
    at a rate they keep in an attribute named after it (``attention_dropout``, ``layerdrop``).
    """
    own = {name: value for name, value in vars(module).items() if isinstance(value, float) and 0 < value <= 1}
    named = [value for name, value in own.items() if "drop" in name.lower()]
    kind = type(module).__name__.lower()
    if "drop" in kind or "stochasticdepth" in kind:
        named += [value for name, value in own.items() if name in ("p", "prob", "rate")]
    return max(named, default=0.0)


def _between_frozen(around: nn.Module, module: nn.Module) -> bool:
    """Return whether `module` stands between frozen ones in a Sequential, parameterless ones aside."""
    if not isinstance(around, nn.Sequential) or around is module:
        return False
    parts = list(around)
    place = parts.index(module)
    for side in (reversed(parts[:place]), parts[place + 1 :]):
        flags = ({parameter.requires_grad for parameter in part.parameters()} for part in side)
        if next(filter(None, flags), None) != {False}:
            return False
    return True


def optimizers_of(given: Any) -> list[Any]:
    """Return the optimisers in what a user passes: none, one, several, or a wrapper of one.

    Raises:
        ModelError: something has neither param groups nor an optimiser inside.
    """
    if given is None:
        return []
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, list | tuple):
        return [optimizer for item in given for optimizer in optimizers_of(item)]
    inner = given
    while not (hasattr(inner, "param_groups") and hasattr(inner, "state")):
        # fastai's OptimWrapper keeps torch's optimiser in `opt`, others in `optimizer`
        inner = getattr(inner, "opt", None) or getattr(inner, "optimizer", None)
        if inner is None:
            raise ModelError(
                f"the optimizer is {named_kind(given)}, which has no param_groups and state; expected a "
                "torch.optim.Optimizer, a list of them, or a wrapper that holds one as .opt or .optimizer."
            )
    return [inner]

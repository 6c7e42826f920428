"""Freeze batch-norm in any loop, and carry out a plan's normalisation policy on a live model.

A batch-norm has two halves: affine parameters, which the optimiser trains, and running statistics, which
every forward pass in train mode changes, whatever ``requires_grad`` says. So ``requires_grad=False`` alone
leaves a "frozen" network drifting; here a frozen norm is pinned in eval mode (`layerwise.tuning.modes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.errors import ModelError
from layerwise.layers.isolation import require_module, unwrap
from layerwise.layers.layermap import LayerMap
from layerwise.layers.norms import find_norms, norm_parameters
from layerwise.plans.rates import affine_rates, first_late
from layerwise.plans.settings import NormKind, Norms, moves_and_learns
from layerwise.tuning.modes import first_encoder_layers, held_modes, pin_eval, pinned, unpin
from layerwise.tuning.norm_layers import ADAPTING, frozen_norms

_MOMENTUM = "_layerwise_momentum"  # where a norm keeps its own momentum while a policy replaces it

# ------------------------------------------------------------------------- helpers for other people's loops


@dataclass(frozen=True)
class FrozenNorms:
    """What `freeze_batchnorm` changed.

    Attributes:
        names: module paths of all norms with running statistics, now in eval to stay.
        modules: the modules that were newly pinned.
        parameters: the affine parameters that no longer require gradients because of the call.
    """

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...] = dataclasses.field(repr=False)
    parameters: tuple[nn.Parameter, ...] = dataclasses.field(repr=False)

    def undo(self) -> None:
        """Let the norms follow ``train()`` and learn again, as before the call."""
        unpin(self.modules)
        for parameter in self.parameters:
            parameter.requires_grad = True


def freeze_batchnorm(model: nn.Module, *, affine: bool = True) -> FrozenNorms:
    """Freeze the batch-norms of `model`: statistics held, eval mode held, affine parameters frozen.

    For loops that layerwise does not run: call it once, before the optimiser is built and before
    DistributedDataParallel, on the model or on a part of it (``freeze_batchnorm(model.backbone)``).
    Whoever calls ``model.train()`` later does not undo it.

    Args:
        model: changed in place; every norm with running statistics in it.
        affine: whether weight and bias are frozen too. False trains them on fixed statistics.

    Returns:
        The record of the change; its ``undo()`` takes it back. Of a model without such norms it is empty.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    >>> freeze_batchnorm(model).names
    ('1',)
    >>> model.train()[1].training
    False
    """
    require_module(model)
    norms = [norm for norm in find_norms(model) if norm.kind == "running"]
    modules = pin_eval(module for norm in norms for module in norm.module.modules())
    parameters = tuple(
        dict.fromkeys(
            parameter
            for norm in norms
            for parameter in norm.module._parameters.values()
            if affine and parameter is not None and parameter.requires_grad
        )
    )
    for parameter in parameters:
        parameter.requires_grad = False  # the method refuses lazy parameters, the attribute takes them
    return FrozenNorms(tuple(norm.name for norm in norms), modules, parameters)


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Set train mode on everything but the frozen norms; on leaving, restore every module's mode.

    Frozen norms are those of `frozen_norms`; inside the context not even a further ``model.train()``
    wakes them. Modes come back on exceptions too.

    Args:
        model: its modes are changed inside the context, and only there.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).eval()
    >>> for part in model[:2].parameters(): _ = part.requires_grad_(False)
    >>> with training_mode(model):
    ...     tuple(module.training for module in model)
    (True, False, True)
    >>> model.training
    False
    """
    with held_modes(model):
        held = pin_eval(module for norm in frozen_norms(model) for module in norm.module.modules())
        try:
            model.train()
            yield
        finally:
            unpin(held)


# ------------------------------------------------------------------------------------- the policy of a phase


@dataclass(frozen=True)
class NormRecord:
    """What a phase's normalisation policy means for a model: returned by `apply_norms`.

    Attributes:
        policy: the policy of the phase.
        policies: module path of each norm with running statistics -> the policy that it follows.
        trainable: affine parameters that learn although their group is frozen.
        frozen: affine parameters that do not learn although their group does.
        rates: affine parameters with a rate of their own, all of `trainable` among them -> learning-rate
            multiplier, as a share of the base rate.
        adapting: module paths of the norms whose statistics move.
        fixed: module paths of the norms whose statistics are held.
        batch_only: module paths of batch-norms without running statistics in frozen groups.
        pinned: number of modules held in eval mode, norms included.
        idle: groups with a policy of their own that would change norms, and none to change.
    """

    policy: str
    policies: dict[str, NormKind]
    trainable: tuple[str, ...]
    frozen: tuple[str, ...]
    rates: dict[str, float]
    adapting: tuple[str, ...]
    fixed: tuple[str, ...]
    batch_only: tuple[str, ...]
    pinned: int
    idle: tuple[str, ...]

    @property
    def calibrate(self) -> bool:
        """Whether statistics are to be measured on target data before the phase starts."""
        return self.policy == "calibrate" or bool(self.calibrating)

    @property
    def calibrating(self) -> tuple[str, ...]:
        """Module paths of the norms whose statistics are to be measured: `calibrate_batchnorm` takes them."""
        return tuple(path for path, policy in self.policies.items() if policy == "calibrate")

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain data for JSON."""
        return dataclasses.asdict(self)


def apply_norms(
    model: nn.Module,
    layers: LayerMap,
    frozen_groups: Iterable[str],
    norms: Norms,
    *,
    frozen_dropout: bool = False,
) -> NormRecord:
    """Carry out the normalisation policy of a phase on a live model, and still its frozen groups.

    All pins and momenta that an earlier call (or `freeze_batchnorm`, or `layerwise.freeze`) left on the
    model are taken back first, so a call says everything and two equal calls are one.

    What is pinned in eval mode: every module of a frozen group (dropout and stochastic depth go silent),
    containers all of whose parameters are frozen, and the norms whose statistics the policy holds. A
    module that stands in several groups is still only when all of them are frozen. What cannot be
    reached: functional dropout that a container spanning frozen and learning groups applies itself.

    ``requires_grad`` is *not* touched; the caller sets it, a Tuner by `layerwise.plans.rates.trained`.
    The statistics of ``"calibrate"`` are not measured here either: see `calibrate_batchnorm`.

    | policy | statistics | affine parameters |
    |---|---|---|
    | follow | move where the group learns | learn where the group learns |
    | freeze | held | held |
    | freeze_until | held before `until`, move from there on | the same |
    | calibrate | held (after they were measured) | learn where the group learns |
    | adapt | move everywhere, with `momentum` if given | learn everywhere, at `rate` if given |

    Args:
        model: changed in place (modes and momenta); undo with `release_norms`. A compiled or
            DistributedDataParallel wrapper is looked through.
        layers: the model's layer map.
        frozen_groups: names of the groups that do not learn in this phase.
        norms: the policy, and those of single groups. The statistics of a norm in several groups go with the
            first of them, each affine parameter with its own.
        frozen_dropout: True holds only norms, and leaves the rest of the frozen groups in train mode.

    Raises:
        PlanError: a group, `Norms.until` or one of `Norms.groups` is not in `layers`.
        ModelError: `layers` was made from another model.
    """
    frozen = {layers[name].name for name in frozen_groups}
    first = first_late(norms, layers)
    norms = norms.with_changes(groups={layers[name].name: own for name, own in norms.groups.items()})
    root = look_through(model, layers)
    release_norms(root)
    owners = module_owners(root, layers)
    place = {name: number for number, name in enumerate(layers.names)}
    home = {name: group.name for group in layers for name in group.parameters}
    home_by_id = {id(root.get_parameter(name)): group for name, group in home.items()}

    woken: list[str] = []
    held: list[str] = []
    rates: dict[str, float] = {}
    for name, is_frozen, learns, rate in affine_rates(norms, layers, norm_parameters(root, home), frozen):
        if not learns and not is_frozen:
            held.append(name)
        elif learns and rate is not None:
            rates[name] = rate
            if is_frozen and rate:
                woken.append(name)
    adapting, fixed, batch_only = [], [], []
    policies: dict[str, NormKind] = {}
    reached = {home[name] for name in woken}
    keep_awake: set[nn.Module] = set()
    keep_still: set[nn.Module] = set()
    for norm in find_norms(root):
        # One that shares its weight with a norm of another group stands wholly in neither.
        own_parameters = map(id, norm.module._parameters.values())
        groups = owners.get(norm.module) or {home_by_id[key] for key in own_parameters if key in home_by_id}
        group_frozen = bool(groups) and groups <= frozen
        position = min(map(place.__getitem__, groups), default=0)
        own = norms.of(layers.names[position])
        if norm.kind != "running":
            batch_only += [norm.name] if norm.kind == "batch" and group_frozen else []
            continue
        policies[norm.name] = own.policy
        reached.add(layers.names[position])
        moves, _ = moves_and_learns(own, group_frozen, position >= first)
        if moves:
            adapting.append(norm.name)
            keep_awake.add(norm.module)
            if own.policy in ("adapt", "freeze_until"):
                ADAPTING.add(norm.module)
                if own.momentum is not None:
                    norm.module.__dict__[_MOMENTUM] = norm.module.momentum
                    norm.module.__dict__["momentum"] = own.momentum
        else:
            fixed.append(norm.name)
            keep_still.update(norm.module.modules())

    still = keep_still if frozen_dropout else keep_still | _still_modules(root, layers, frozen, owners)
    pin_eval(module for module in root.modules() if module in still - keep_awake)
    return NormRecord(
        policy=norms.policy,
        policies=policies,
        trainable=tuple(woken),
        frozen=tuple(held),
        rates=rates,
        adapting=tuple(adapting),
        fixed=tuple(fixed),
        batch_only=tuple(batch_only),
        pinned=sum(pinned(module) for module in root.modules()),
        idle=tuple(
            name
            for name, own in norms.groups.items()
            if own.policy in ("adapt", "calibrate") and name not in reached
        ),
    )


def release_norms(model: nn.Module) -> None:
    """Take back all pins and momenta that layerwise left on `model`; ``requires_grad`` stays as it is.

    Each module gets the mode that it was last asked to have.
    """
    unpin(model.modules())
    for module in model.modules():
        ADAPTING.discard(module)
        if _MOMENTUM in module.__dict__:
            module.__dict__["momentum"] = module.__dict__.pop(_MOMENTUM)


def look_through(model: nn.Module, layers: LayerMap) -> nn.Module:
    """Return the module whose paths `layers` speaks of: `model`, or what a wrapper around it holds.

    Raises:
        ModelError: neither has the first parameter that the map names.
    """
    wanted = next((name for group in layers for name in group.parameters), "")
    inner: Any = model
    while isinstance(inner, nn.Module):
        if wanted in dict(inner.named_parameters(remove_duplicate=False)):
            return inner
        inside = unwrap(inner)
        inner = inside if inside is not inner else getattr(inner, "module", None)
    raise ModelError(
        f"the layer map (of {layers.model_class or 'a model'}) names a parameter {wanted!r}, which this "
        f"{type(model).__name__} does not have. Make the map from the same model: layerwise.layer_map(model)"
    )


def module_owners(root: nn.Module, layers: LayerMap) -> dict[nn.Module, set[str]]:
    """Return for each module the names of the groups in which it, or one of its parameters, stands."""
    owners: dict[nn.Module, set[str]] = {}
    known = dict(root.named_modules(remove_duplicate=False))
    for group in layers:
        for path in group.modules:
            if path not in known:
                raise ModelError(
                    f"the layer map names a module {path!r}, which this {type(root).__name__} does not have. "
                    "Make the map from the same model: layerwise.layer_map(model)"
                )
            for module in known[path].modules():
                owners.setdefault(module, set()).add(group.name)
    return owners


def _still_modules(
    root: nn.Module, layers: LayerMap, frozen: set[str], owners: dict[nn.Module, set[str]]
) -> set[nn.Module]:
    """Return the modules of frozen groups, and the containers that hold nothing else."""
    names = (name for group in layers if group.name in frozen for name in group.parameters)
    dead = {id(root.get_parameter(name)) for name in names}
    still = {module for module, groups in owners.items() if groups <= frozen}
    for module in root.modules():
        if module is not root and module not in owners:
            parameters = [id(parameter) for parameter in module.parameters()]
            if parameters and dead.issuperset(parameters):
                still.add(module)
    return still - first_encoder_layers(root, still)

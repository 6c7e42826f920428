"""`LayerMap`: the ordered layer groups of a model, as plain data that knows no live model."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from layerwise.errors import PlanError, did_you_mean, named_kind
from layerwise.layers.norms import Kind
from layerwise.layers.owners import is_under
from layerwise.shown import Shown

if TYPE_CHECKING:
    from torch import nn

    from layerwise.layers.difference import MapDifference
    from layerwise.layers.table import LayerTable

Granularity = Literal["stages", "blocks", "layers"]
Role = Literal["stem", "trunk", "head"]
GRANULARITIES: tuple[str, ...] = get_args(Granularity)


@dataclass(frozen=True)
class LayerGroup:
    """One column of a plan: parameters that learn together.

    Attributes:
        name: a module path of the model (``"layer3"``, ``"encoder.layer.11"``, ``"head.fc"``), so that
            it can be typed. A stage is named after the module that holds it, else a group of several
            modules after its block; the stem after the first of them; the head after its output layer.
            A weight that is no module's (``x @ self.projection``) goes by its own name.
        role: ``"stem"`` for what stands before the first block, ``"head"`` for the output layer and
            what belongs to it, ``"trunk"`` for everything between.
        modules: paths of the top-most modules that lie wholly in the group, in order of execution,
            modules without parameters (dropout, activation, pooling) included.
        parameters: names of the parameters, in order of use; a shared parameter stands at its first
            use, under one name.
        numel: number of scalars in `parameters`.
        flops: floating-point operations of one forward pass of one sample (multiply and add count
            as two; what `layerwise.layers.flops` has no formula for, norms and activations, as 0), or
            None where the recording could not tell.
        sizes: number of scalars of each of `parameters`, in the same order; empty where a map made by hand
            does not tell.
        activation_bytes: size of what the group hands on to later groups or to the output, per sample,
            in bytes; None likewise. Both depend on the size of the example input, so that equality of
            groups leaves them out.
    """

    name: str
    role: Role
    modules: tuple[str, ...]
    parameters: tuple[str, ...]
    numel: int
    flops: int | None = field(default=None, compare=False)
    activation_bytes: int | None = field(default=None, compare=False)
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerMap(Shown):
    """The layer groups of a model in the order in which its input flows through them.

    Attributes:
        groups: from input to output.
        granularity: what one group is: ``"stages"``, ``"blocks"`` or ``"layers"``.
        model_class: qualified name of the model's class, for messages.
        aliases: other names of shared parameters (tied weights) -> the name that stands in a group.
        unused: parameters that the recorded forward pass does not read, or, behind the last block, whose
            result does not reach the output; each still stands in the group of the module it belongs to.
        outputs: module paths of the output layers (two for a distilled DeiT), empty without a head.
        norms: the parameters of normalisation layers -> the kind of the layer (`layerwise.layers.norms`);
            None where a map made by hand does not tell.
        notes: what was chosen or could not be found, for people: the example input that was made up,
            a recording that fell back to real samples.
    """

    groups: tuple[LayerGroup, ...]
    granularity: Granularity
    model_class: str = ""
    aliases: dict[str, str] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=(), compare=False)
    norms: dict[str, Kind] | None = field(default=None, compare=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the groups, input to output."""
        return tuple(group.name for group in self.groups)

    @cached_property
    def head(self) -> LayerGroup | None:
        """The group of the output layer; None for a model without one."""
        return next((group for group in self.groups if group.role == "head"), None)

    @cached_property
    def numel(self) -> int:
        """Number of scalars in all parameters, shared ones counted once."""
        return sum(group.numel for group in self.groups)

    @cached_property
    def _group_of(self) -> dict[str, LayerGroup]:
        found = {name: group for group in self.groups for name in group.parameters}
        return found | {alias: found[name] for alias, name in self.aliases.items()}

    def __len__(self) -> int:
        return len(self.groups)

    def __iter__(self) -> Iterator[LayerGroup]:
        return iter(self.groups)

    def __getitem__(self, name: str) -> LayerGroup:
        """Return the group called `name`: its name, ``"stem"``, ``"head"``, or a module inside it.

        Raises:
            PlanError: there is no such group, or a module path covers several groups.
        """
        if not isinstance(name, str):
            raise PlanError(
                f"{name!r} is {named_kind(name)}; expected the name of a group ({', '.join(self.names)}). By "
                "position: layers.groups[0] is the first, layers.groups[-1] the last"
            )
        for group in self.groups:
            if group.name == name:
                return group
        for group in self.groups:
            if name == group.role and name != "trunk":
                return group
        inside = self.inside(name)
        if len(inside) == 1:
            return inside[0]
        if inside:
            raise PlanError(
                f"{name!r} covers {len(inside)} groups of this layer map "
                f"({', '.join(group.name for group in inside)}); name one of them."
            )
        raise PlanError(
            f"group {name!r} is not in this layer map ({', '.join(self.names)})."
            f"{did_you_mean(name, self.names, count=1)} List them: layerwise inspect MODEL"
        )

    def inside(self, path: str) -> tuple[LayerGroup, ...]:
        """Return the groups that hold a parameter or a module at or below the module path `path`."""
        return tuple(
            group
            for group in self.groups
            if any(is_under(name, path) for name in (*group.modules, *group.parameters))
        )

    def group_of(self, parameter: str) -> str:
        """Return the name of the group that holds `parameter` (any of its names, if it is shared).

        Raises:
            PlanError: the model has no such parameter.
        """
        try:
            return self._group_of[parameter].name
        except KeyError:
            raise PlanError(
                f"parameter {parameter!r} is not in this layer map of {len(self._group_of)} parameters."
                f"{did_you_mean(parameter, self._group_of)}"
            ) from None

    def depth_of(self, name: str) -> int:
        """Return how many groups stand between `name` (a parameter or a group) and the output end.

        The last group, which is the head where there is one, has depth 0 and the first ``len(self) - 1``.
        This is the exponent of the rate: see `layerwise.plans.rates`.

        Raises:
            PlanError: there is no such parameter or group.
        """
        group = self.group_of(name) if name in self._group_of else self[name].name
        return len(self) - 1 - self.names.index(group)

    def diff(self, other: LayerMap) -> MapDifference:
        """Return what changes from this map to `other`; it is false, and prints so, if nothing does."""
        from layerwise.layers.difference import difference

        check_map(other)
        return difference(self, other)

    def table(self, model: nn.Module) -> LayerTable:
        """Return the table that ``print`` shows, with how much of each group of `model` is trainable now.

        Args:
            model: a live one of this map, as its ``requires_grad`` are; unchanged.

        Raises:
            PlanError: `model` has a parameter that is not in this map.
        """
        from layerwise.layers.table import LayerTable

        return LayerTable(self, model)

    def __rich__(self) -> LayerTable:
        from layerwise.layers.table import LayerTable

        return LayerTable(self)

    def __str__(self) -> str:
        return str(self.__rich__())

    def to_dict(self) -> dict[str, Any]:
        """Return the map as plain data for JSON; `from_dict` is its inverse."""
        return {**dataclasses.asdict(self), "numel": self.numel}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LayerMap:
        """Build a map from what `to_dict` returned (lists for tuples are fine, as JSON makes them).

        What ``layerwise inspect --json`` prints is one too; its further fields are left out.

        Raises:
            PlanError: `data` is nothing of the kind.
        """
        try:
            return cls(
                groups=tuple(map(_group_from, data["groups"])),
                granularity=_known_granularity(data["granularity"]),
                model_class=data["model_class"],
                aliases=dict(data["aliases"]),
                unused=tuple(data["unused"]),
                outputs=tuple(data["outputs"]),
                notes=tuple(data["notes"]),
                norms=data.get("norms"),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise PlanError(
                f"this is no layer map ({type(error).__name__}: {error}); expected what LayerMap.to_dict "
                "returns or layerwise inspect --json prints"
            ) from error


def _group_from(data: dict[str, Any]) -> LayerGroup:
    values: dict[str, Any] = {}
    for known in dataclasses.fields(LayerGroup):
        if known.name in data:
            value = data[known.name]
            values[known.name] = tuple(value) if isinstance(value, list) else value
    return LayerGroup(**values)


def _known_granularity(name: Any) -> Granularity:
    if name not in GRANULARITIES:
        raise ValueError(f"granularity is {name!r}, not one of {', '.join(GRANULARITIES)}")
    return cast(Granularity, name)


def check_map(layers: object) -> None:
    """Raise `PlanError` where something else was given for a layer map."""
    if not isinstance(layers, LayerMap):
        raise PlanError(
            f"layers is {named_kind(layers)}; expected the layer map of a model: "
            "layerwise.layer_map(model, example_input, granularity)"
        )

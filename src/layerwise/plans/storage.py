"""Plans as YAML files that are pleasant to edit by hand."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from layerwise.errors import PlanError, did_you_mean_beside, named_kind
from layerwise.files import write_text
from layerwise.plans.plan import Plan
from layerwise.plans.settings import Norms

HEADER = """\
# layerwise plan: which layer groups learn, when and how fast.
# A rate is a multiple of the learning rate; a group that is left out is frozen.
# After editing, see what it does: layerwise plan MODEL --plan FILE. Run it: layerwise fit --plan FILE ...
"""


class _Flow(list[Any]):
    """A list that YAML writes on one line."""


class _FlowMap(dict[str, Any]):
    """A mapping that YAML writes on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes the two above in flow style."""

    def ignore_aliases(self, data: Any) -> bool:
        return True  # a schedule that two phases share is written out twice, not as &id001


_Dumper.add_representer(
    _Flow, lambda dumper, data: dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)
)
_Dumper.add_representer(
    _FlowMap, lambda dumper, data: dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)
)


def to_yaml(plan: Plan) -> str:
    """Return the text of `plan`'s file."""
    data = plan.to_dict()
    data["granularity"] = plan.granularity
    data["groups"] = _Flow(data["groups"])
    order = {name: number for number, name in enumerate(plan.groups)}
    for phase in data["phases"]:
        phase["rates"] = dict(sorted(phase["rates"].items(), key=lambda item: order[item[0]]))
        for field in ("schedule", "norms"):
            if field in phase:
                phase[field] = _FlowMap(phase[field])
        if own := phase.get("norms", {}).get("groups"):
            told = {name: {"policy": Norms().policy, **own[name]} for name in plan.groups if name in own}
            phase["norms"] = {**phase["norms"], "groups": {name: _FlowMap(told[name]) for name in told}}
        if "reinit" in phase:
            phase["reinit"] = _Flow(phase["reinit"])
    fields = ["version", "strategy", "granularity", "groups", "phases"]
    ordered = {field: data[field] for field in fields if field in data}
    # Control characters and odd line ends in names survive only when they are written as escapes.
    plain = json.dumps(ordered, ensure_ascii=False).isprintable()
    return HEADER + yaml.dump(ordered, Dumper=_Dumper, sort_keys=False, allow_unicode=plain, width=100)


def save(plan: Plan, path: Path) -> None:
    """Write `plan` to `path`, whole or not at all."""
    write_text(path, to_yaml(plan))


def load(path: Path) -> Plan:
    """Read a plan from `path`; see `Plan.load`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise PlanError(
            f"the plan file {str(path)!r} does not exist.{did_you_mean_beside(path)} "
            "Make one: layerwise plan MODEL --strategy NAME -o FILE"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"the plan file {str(path)!r} cannot be read: {error}") from error
    return parse(text, str(path))


def parse(text: str, source: str) -> Plan:
    """Return the plan that `text` holds; `source` names it in messages.

    Raises:
        PlanError: as for `Plan.load`.
    """
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise PlanError(f"{source} is not a YAML file that can be read safely: {error}") from error
    if not isinstance(data, Mapping):
        held = "it is empty" if data is None else f"it holds {named_kind(data)}"
        raise PlanError(
            f"{source} is not a plan: {held}; expected a mapping with `groups` and `phases`. "
            "Write one: layerwise plan MODEL --strategy ... -o plan.yaml"
        )
    if unclear := _unclear_key(yaml.compose(text, Loader=yaml.SafeLoader), set()):
        raise PlanError(f"{source}: {unclear}")
    if data.get("version", 1) != 1:
        raise PlanError(
            f"{source} has format version {data['version']!r}; this layerwise reads version 1. "
            "Update layerwise, or make the plan anew: layerwise plan MODEL --strategy ... -o plan.yaml"
        )
    try:
        return Plan(**data)
    except PlanError as error:
        raise PlanError(f"{source}: {error}") from None


def _unclear_key(node: yaml.Node | None, seen: set[int]) -> str:
    """Return what is wrong with a mapping's key: given twice, or no text to YAML (8, on); else ``""``."""
    if node is None or id(node) in seen:
        return ""
    seen.add(id(node))
    children: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        line = node.start_mark.line + 1
        for name, count in Counter(key.value for key in keys).items():
            if count > 1:
                return f"the key {name!r} stands {count} times in the mapping at line {line}; keep one"
        odd = next((key.value for key in keys if not key.tag.endswith((":str", ":merge"))), None)
        if odd is not None:
            return f"the key {odd} at line {line} is no text to YAML; put it in quotes: '{odd}'"
        children = [value for _, value in node.value]
    elif isinstance(node, yaml.SequenceNode):
        children = node.value
    return next((found for child in children if (found := _unclear_key(child, seen))), "")

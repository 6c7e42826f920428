"""Which groups and which parameters a person means: names, ranges, globs and regular expressions."""

from __future__ import annotations

import fnmatch
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence

from layerwise.errors import PlanError, did_you_mean
from layerwise.layers.layermap import LayerMap
from layerwise.layers.owners import paths_above

GroupSelection = str | int | Sequence[str | int]


def select_groups(layers: LayerMap, selection: GroupSelection) -> list[str]:
    """Return the names of the groups that `selection` means, input -> output, each once.

    Args:
        layers: the layer map.
        selection: one of, or a sequence of:

            - a group name, ``"stem"``, ``"head"``, or a module path (``"layer3"``): every group with a
              parameter or module at or below it
            - a range, both ends included: ``"layer2:"`` (to the output end), ``":layer2"`` (from the
              input end), ``"layer1:layer3"``
            - a whole number: ``k > 0`` is the first k groups, ``-k`` the last k

    Raises:
        PlanError: a name is unknown (closest names are listed), a range runs backwards, a number is 0 or
            larger than the number of groups, or nothing is selected.

    >>> from layerwise.layers.layermap import LayerGroup
    >>> groups = [LayerGroup(n, "trunk", (n,), (f"{n}.weight",), 1) for n in ("a", "b", "c", "d")]
    >>> layers = LayerMap(groups=tuple(groups), granularity="blocks")
    >>> select_groups(layers, "b:c"), select_groups(layers, ["c:", "a"]), select_groups(layers, -1)
    (['b', 'c'], ['a', 'c', 'd'], ['d'])
    """
    parts: Sequence[str | int] = selection if isinstance(selection, list | tuple) else [selection]  # type: ignore[list-item]
    if not parts:
        raise PlanError(f"no group is selected; name some of: {', '.join(layers.names)}")
    if odd := [part for part in parts if isinstance(part, bool) or not isinstance(part, str | int)]:
        raise PlanError(
            f"{odd[0]!r} names no group: expected names, ranges or whole numbers ({', '.join(layers.names)})"
        )
    chosen = {name for part in parts for name in _select(layers, part)}
    return [name for name in layers.names if name in chosen]


def _select(layers: LayerMap, part: str | int) -> Sequence[str]:
    names = layers.names
    if isinstance(part, int):
        if not 0 < abs(part) <= len(names):
            raise PlanError(
                f"{part} groups are asked for; this layer map has {len(names)} ({', '.join(names)}). "
                f"Give a number from 1 to {len(names)}, negative to count from the output end"
            )
        return names[:part] if part > 0 else names[part:]
    if part in names or ":" not in part:
        return _named(layers, part)
    first, _, last = part.partition(":")
    start = names.index(_named(layers, first)[0]) if first else 0
    stop = names.index(_named(layers, last)[-1]) if last else len(names) - 1
    if start > stop:
        raise PlanError(
            f"the range {part!r} runs from output to input ({names[start]} stands after {names[stop]}); "
            f"write it as '{last}:{first}'"
        )
    return names[start : stop + 1]


def _named(layers: LayerMap, name: str) -> list[str]:
    if name not in layers.names:
        inside = [group.name for group in layers.inside(name)]
        if len(inside) > 1:
            return inside
    return [layers[name].name]


def match_names(
    patterns: Sequence[str], names: Iterable[str], *, apart: Mapping[str, str] | None = None
) -> list[str]:
    """Return those of `names` that at least one of `patterns` matches, in the order of `names`.

    Args:
        patterns: each is one of

            - a word, which matches whole components: ``"bn"`` matches ``layer1.bn.weight`` and never
              ``subnet.weight``; so does a dotted path: ``"layer.1"`` matches ``encoder.layer.1.fc.bias`` and
              never ``encoder.layer.11.fc.bias``
            - a dotted path at which a parameter or module stands, from the root: that alone.
              ``"conv1.weight"`` is that of no block
            - a glob (``*``, ``?``, ``[...]``), tried on the whole name and component by component:
              ``"bn*"`` matches ``layer1.bn1.weight``, ``"*.bias"`` every bias
            - ``re:`` and a regular expression that is searched for in the name

        names: dotted names of parameters.
        apart: other names -> what is said of a pattern that matches these alone.

    Raises:
        PlanError: a pattern matches nothing (closest names are listed), or is not a valid regular
            expression. All such patterns are told at once.

    >>> match_names(["bn*", "re:^fc"], ["conv.weight", "bn1.bias", "fc.weight"])
    ['bn1.bias', 'fc.weight']
    >>> match_names(["conv.weight"], ["conv.weight", "block.conv.weight"])
    ['conv.weight']
    """
    names = list(names)
    chosen: set[str] = set()
    if odd := [pattern for pattern in patterns if not isinstance(pattern, str)]:
        raise PlanError(
            f"{reprlib.repr(odd[0])} is no pattern; give each one as a text of its own: "
            "freeze(model, 'a', 'b')"
        )
    problems = []
    for pattern in patterns:
        try:
            found = [name for name in names if "." in pattern and f"{name}.".startswith(f"{pattern}.")]
            found = found or [name for name in names if _matches(pattern, name)]
        except re.error as error:
            problems.append(f"{pattern!r} is not a regular expression: {error}.")
            continue
        chosen.update(found)
        if not found:
            known = (why for name, why in (apart or {}).items() if _matches(pattern, name))
            why = next(known, f"matches no parameter.{_close(pattern, names)}")
            problems.append(f"pattern {pattern!r} {why}")
    if problems:
        raise PlanError(
            "; ".join(problems)
            + " A word matches whole name components, `*` any text, and `re:` starts a regular expression."
        )
    return [name for name in names if name in chosen]


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern.removeprefix("re:"), name) is not None
    if fnmatch.fnmatchcase(name, pattern):
        return True
    wanted, parts = pattern.split("."), name.split(".")
    return any(
        all(fnmatch.fnmatchcase(part, want) for part, want in zip(parts[start:], wanted))
        for start in range(len(parts) - len(wanted) + 1)
    )


def _close(pattern: str, names: Sequence[str]) -> str:
    """Return a hint with names close to `pattern`: full names, prefixes and components."""
    paths = {path for name in names for path in paths_above(name)[1:]}
    components = {part for name in names for part in name.split(".") if not part.isdigit()}
    return did_you_mean(pattern, sorted({*names, *paths, *components})) or (
        f" There are, for example: {', '.join(list(names)[:3])}." if names else ""
    )

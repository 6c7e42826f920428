"""Strategies by name: ``top_k:k=2`` or ``top_k(k=2)`` becomes a call with checked arguments."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from layerwise.errors import PlanError, did_you_mean, named_kind
from layerwise.layers.layermap import LayerMap
from layerwise.plans import recipes, strategies, unfreezing
from layerwise.plans.options import PhaseOptions, settings
from layerwise.plans.plan import Plan

STRATEGIES: dict[str, Callable[..., Plan]] = {
    "linear_probe": strategies.linear_probe,
    "top_k": strategies.top_k,
    "blocks": strategies.blocks,
    "pattern": strategies.pattern,
    "full": strategies.full,
    "discriminative": strategies.discriminative,
    "gradual_unfreezing": unfreezing.gradual_unfreezing,
    "ulmfit": unfreezing.ulmfit,
    "lp_ft": unfreezing.lp_ft,
    "fine_tune": unfreezing.fine_tune,
    "surgical": strategies.surgical,
    "auto_rgn": recipes.auto_rgn,
    "lisa": recipes.lisa,
    "reinit_last": recipes.reinit_last,
    "freeze_embeddings": strategies.freeze_embeddings,
}


class _Quoted(str):
    """A text that was in quotes: never a number."""

    __slots__ = ()


def parse_strategy(text: str, layers: LayerMap, **common: Any) -> Plan:
    """Return the plan that `text` asks for, made for `layers`.

    Args:
        text: the name of a strategy, with arguments after a colon or in parentheses: ``linear_probe``,
            ``top_k:k=2``, ``blocks(layer3:)``, ``discriminative(decay=1/2.6, frozen=1)``,
            ``blocks:[layer3, fc]``, ``discriminative:rates={layer4: 0.5, fc: 1},frozen=:layer3``. An argument
            without a name is the strategy's first one (several make a list). A number may be a fraction.
            What is in quotes is a name: ``blocks:'2'`` is the group called 2. ``blocks:2`` is the first two
            groups, or an error where one is called so (``discriminative:frozen=2`` likewise); ``blocks:1.0``
            is the group called 1.0.
        layers: the layer map.
        **common: options such as `epochs`, `schedule` and `norms`, as values or as text that may stand in
            braces; those that are None are left out, and those that `text` gives win.

    Raises:
        PlanError: `text` is none, the strategy or an argument is unknown, a value has the wrong type or is
            missing, or the strategy itself refuses.
    """
    if not isinstance(text, str):
        raise PlanError(
            "a strategy is a text such as 'top_k:k=2', given before the layer map; received "
            f"{named_kind(text)}"
        )
    name, given, positional = _split(text)
    if name == "auto":
        raise PlanError(
            "strategy 'auto' looks at the data, so only fit has it: layerwise fit --strategy auto. For its "
            "plan in a file: layerwise advise MODEL --data DATA -o plan.yaml"
        )
    _check_known(name)
    function = STRATEGIES[name]
    hints = _parameters(function)
    if positional:
        first = next(iter(hints))
        if first in given or first in PhaseOptions.__annotations__:
            a_list = f", and a list in brackets: {first}=[a, b]" if first in given else ""
            raise PlanError(f"strategy {text!r}: {positional[0]!r} has no name; write option=value{a_list}")
        given[first] = positional[0] if len(positional) == 1 else positional
    problems = []
    arguments: dict[str, Any] = {
        key: _in_braces(key, value) for key, value in common.items() if value is not None
    }
    for key, value in given.items():
        if key not in hints:
            problems.append(f"no option {key!r} (known: {', '.join(hints)}).{did_you_mean(key, hints)}")
            continue
        if unclear := _count_or_name(value, hints[key], layers):
            problems.append(f"{key}: {unclear}")
            continue
        try:
            arguments[key] = _converted(value, hints[key])
        except (ValidationError, ValueError):
            problems.append(f"{key} = {value!r} is not {_shown(hints[key])}")
    required = [
        key
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.default is parameter.empty
        and key in hints
        and parameter.kind is not parameter.VAR_KEYWORD
    ]
    problems += [f"{key} is missing: {name}:{key}=..." for key in required if key not in arguments | given]
    if problems:
        raise PlanError(f"strategy {text!r}: " + "; ".join(problems))
    return function(layers, **arguments)


def check_strategy(text: str, **common: Any) -> None:
    """Look at a strategy as far as that needs no layer map.

    Args:
        text: the strategy, as `parse_strategy` takes it.
        **common: options such as `epochs`, `schedule` and `norms`; those that are None are not given.

    Raises:
        PlanError: the strategy, the schedule or the norm policy is not known; or `text` repeats an option.
    """
    name, given, _ = _split(text)
    if name != "auto":
        _check_known(name)
    settings(cast(PhaseOptions, {key: _in_braces(key, value) for key, value in common.items()}))
    if twice := [name for name in given if common.get(name) is not None]:
        told = "; ".join(f"{name} is given twice: {given[name]} and {common[name]}" for name in twice)
        raise PlanError(f"strategy {text!r}: {told}. Leave one of them out.")


def _check_known(name: str) -> None:
    if name not in STRATEGIES:
        raise PlanError(
            f"strategy {name!r} is not known ({', '.join(STRATEGIES)}).{did_you_mean(name, STRATEGIES)}"
        )


def load_alone(path: str | Path, **others: Any) -> Plan:
    """Return the plan in a file, which no further options go with.

    Args:
        path: the file.
        **others: options such as `epochs`, `schedule` and `norms`; all should be None.

    Raises:
        PlanError: the file is wrong, or another option is given.
    """
    if ignored := [name for name, value in others.items() if value is not None]:
        raise PlanError(
            f"{', '.join(ignored)} and a plan file are both given; a plan file has its own. "
            f"Change it in {path}, or give a strategy."
        )
    return Plan.load(path)


def _split(text: str) -> tuple[str, dict[str, Any], list[Any]]:
    """Return the name, the named and the unnamed arguments in `text`, values still as text."""
    text = text.strip()
    cut = min((index for index in (text.find(":"), text.find("(")) if index >= 0), default=len(text))
    name, rest = text[:cut].strip(), text[cut:]
    if rest.startswith("("):
        if not rest.endswith(")"):
            raise PlanError(f"strategy {text!r}: the parenthesis is not closed; write {name}(option=value)")
        rest = rest[1:-1]
    else:
        rest = rest[1:]
    given: dict[str, Any] = {}
    positional: list[Any] = []
    for piece in _pieces(rest, text):
        key, equals, value = piece.partition("=")
        if equals and key.strip().isidentifier():
            if key.strip() in given:
                raise PlanError(f"strategy {text!r}: {key.strip()} is given twice")
            given[key.strip()] = _value(value, text)
        else:
            positional.append(_value(piece, text))
    return name.replace("-", "_"), given, positional


def _pieces(text: str, whole: str) -> list[str]:
    """Return `text` cut at the commas that stand outside of brackets."""
    pieces, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            pieces.append(current)
            current = ""
        else:
            current += letter
    if depth != 0:
        raise PlanError(f"strategy {whole!r}: its brackets do not match")
    return [piece.strip() for piece in [*pieces, current] if piece.strip()]


def _value(text: str, whole: str) -> Any:
    """Return a list for ``[...]``, a dict for ``{...}``, else the text without its quotes."""
    text = text.strip()
    if text.startswith("[") and text.endswith("]"):
        return [_value(piece, whole) for piece in _pieces(text[1:-1], whole)]
    if text.startswith("{") and text.endswith("}"):
        pairs = [_pair(piece) for piece in _pieces(text[1:-1], whole)]
        return {_value(key, whole): _value(value, whole) for key, value in pairs}
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        return _Quoted(text[1:-1])
    return text


def _in_braces(option: str, value: Any) -> Any:
    """Return the settings that an option in braces is, ``{policy: adapt, momentum: 0.1}``; else `value`.

    Raises:
        PlanError: they are wrong.
    """
    if not (isinstance(value, str) and value.startswith("{") and value.endswith("}")):
        return value
    return _converted(_value(value, value), get_type_hints(PhaseOptions)[option])


def _pair(text: str) -> tuple[str, str]:
    """Return `text` cut at the last colon outside of braces; the key may be a range with its own."""
    brace = text.find("{")
    end = text.rfind(":", 0, brace if brace >= 0 else None)
    return text[: max(end, 0)], text[end + 1 :]


@functools.cache
def _parameters(function: Callable[..., Plan]) -> Mapping[str, Any]:
    """Return the arguments that `function` takes besides the layer map, with their types."""
    hints = get_type_hints(function)
    own = [key for key in inspect.signature(function).parameters if key not in ("layers", "options")]
    return {key: hints[key] for key in own} | get_type_hints(PhaseOptions)


def _converted(value: Any, hint: Any) -> Any:
    """Return `value`, which is text or made of it, as the type `hint` asks for.

    Whole numbers are tried before words, so that ``frozen=2`` counts groups and ``frozen=layer2`` names one;
    a number that is also a name was refused before.
    Where groups are meant, no other number is tried.
    """
    value = _numbers(value, (int,) if _counts_or_names(hint) else (int, float))
    if value in ("true", "false") and _accepts(hint, bool):
        return value == "true"
    config = ConfigDict(arbitrary_types_allowed=True)
    return TypeAdapter(hint, config=None if _is_model(hint) else config).validate_python(value)


def _count_or_name(value: Any, hint: Any, layers: LayerMap) -> str:
    """Return what is unclear where a whole number counts groups and is the name of one; else ``""``."""
    if not _counts_or_names(hint):
        return ""
    parts = value if isinstance(value, list) else [value]
    for part in parts:
        if part in layers.names and not isinstance(part, _Quoted) and isinstance(_number(part, (int,)), int):
            return (
                f"{part} is a number of groups and the name of one; write '{part}' in quotes for the group, "
                f"or a range (:NAME) for the first ones"
            )
    return ""


def _numbers(value: Any, kinds: tuple[type[int] | type[float], ...]) -> Any:
    """Return `value` with the texts in it that are numbers of one of `kinds` as numbers."""
    if isinstance(value, list):
        return [_numbers(item, kinds) for item in value]
    if isinstance(value, dict):
        return {key: _numbers(item, kinds) for key, item in value.items()}
    return _number(value, kinds)


def _number(text: Any, kinds: tuple[type[int] | type[float], ...]) -> Any:
    """Return the number that `text` is (``3``, ``0.9``, ``1/2.6``), or `text`."""
    if not isinstance(text, str) or isinstance(text, _Quoted):
        return text
    over, slash, under = text.partition("/")
    for kind in kinds:
        try:
            return kind(over) / float(under) if slash else kind(text)
        except (ValueError, ZeroDivisionError):
            continue
    return text


def _counts_or_names(hint: Any) -> bool:
    """Return whether `hint` is that of groups, which are counted or named."""
    return _accepts(hint, int) and _accepts(hint, str)


def _accepts(hint: Any, kind: type) -> bool:
    return hint is kind or any(_accepts(part, kind) for part in get_args(hint))


def _is_model(hint: Any) -> bool:
    return isinstance(hint, type) and hasattr(hint, "model_fields")


def _shown(hint: Any) -> str:
    """Return the type `hint` in words."""
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(_shown(part) for part in get_args(hint) if part is not type(None))
    words = {int: "a whole number", float: "a number", str: "a name", bool: "true or false"}
    if hint in words:
        return words[hint]
    if str(hint).startswith("typing.Literal"):
        return "one of " + ", ".join(map(str, get_args(hint)))
    origin = get_origin(hint)
    if origin is not None:
        name = getattr(origin, "__name__", str(origin))
        return {"Sequence": "a list [a, b]", "Mapping": "a mapping {a: 1, b: 2}"}.get(name, name)
    return getattr(hint, "__name__", str(hint))

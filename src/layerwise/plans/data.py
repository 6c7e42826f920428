"""`Data`: the base of plans and their parts, which reports all its problems in one `PlanError`."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, Self, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from layerwise.errors import PlanError, did_you_mean

_depth: ContextVar[int] = ContextVar("_depth", default=0)

_short = reprlib.Repr()  # a value that YAML puts together of aliases may be larger than any memory
_short.maxlevel, _short.maxstring, _short.maxother, _short.maxlong = 3, 200, 200, 200


class _ProblemsError(ValueError):
    """What is wrong with a part, on its way to the whole that reports it (pydantic collects ValueErrors)."""

    def __init__(self, found: list[str]) -> None:
        super().__init__("; ".join(found))
        self.found = found


class Data(BaseModel):
    """Validated, immutable plain data.

    Building one checks everything and raises one `PlanError` that lists every problem of the whole,
    those of its parts included; pydantic's own error never reaches the caller.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    def __init__(self, /, **data: Any) -> None:
        token = _depth.set(_depth.get() + 1)
        found: list[str] = []
        try:
            super().__init__(**data)
        except ValidationError as error:
            found += [line for item in error.errors() for line in _readable(item, type(self).model_fields)]
        finally:
            _depth.reset(token)
        found += self._contradictions(data)
        if not found:
            return
        if _depth.get():  # a part: the whole collects its siblings' problems too
            raise _ProblemsError(found)
        raise PlanError(report(type(self).__name__.lower(), data, found)) from None

    def __hash__(self) -> int:
        values = [getattr(self, name) for name in type(self).model_fields]
        return hash(tuple(frozenset(value.items()) if isinstance(value, dict) else value for value in values))

    @classmethod
    def _contradictions(cls, data: Mapping[str, Any]) -> list[str]:
        """Return what is wrong between the fields of `data`, as far as it can be read.

        Works on unchecked input (a field may have any type), so that these problems are reported
        together with those of single fields.
        """
        return []

    def with_changes(self, **changes: Any) -> Self:
        """Return a checked copy in which the fields of `changes` have new values.

        Raises:
            PlanError: the changed whole is not valid.
        """
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **changes})


def by_name(part: type[Data], field: str, known: Any, example: str) -> BeforeValidator:
    """Return what lets a name stand for a part of a plan: ``freeze`` for ``{policy: freeze}``."""
    names = get_args(known)

    def expand(value: Any) -> Any:
        if isinstance(value, Mapping | part):
            return value
        if isinstance(value, str) and value in names:
            return {field: value}
        close = did_you_mean(value, names, count=1) if isinstance(value, str) else ""
        raise ValueError(f"expected one of {', '.join(names)}, or settings like {example}.{close}")

    return BeforeValidator(expand)


def fields_of(value: Any) -> Mapping[str, Any]:
    """Return the fields of a part of a plan that may be unchecked; none of what has none."""
    if isinstance(value, Data):
        return {name: getattr(value, name) for name in type(value).model_fields}
    return value if isinstance(value, Mapping) else {}


def report(kind: str, data: Mapping[str, Any], found: list[str]) -> str:
    """Return the message for the problems `found` in a plan or a part of one."""
    name = data.get("name")
    who = f"{kind} {name!r}" if isinstance(name, str) else f"this {kind}"
    if len(found) == 1:
        return f"{who} is not valid: {found[0]}"
    return f"{who} is not valid, {len(found)} problems:" + "".join(f"\n  - {line}" for line in found)


def _readable(item: Any, fields: Iterable[str]) -> list[str]:
    """Return pydantic's `item` in the words of a person who wrote the plan."""
    where = _path(item["loc"])
    inner = item.get("ctx", {}).get("error")
    if isinstance(inner, _ProblemsError):
        part = item["input"]
        name = part.get("name") if isinstance(part, Mapping) else None
        label = f"{where} ({name!r})" if isinstance(name, str) else where
        return [f"{label}: {line}" for line in inner.found]
    if item["type"] == "extra_forbidden":
        return [f"there is no setting {where!r} (known: {', '.join(fields)}).{did_you_mean(where, fields)}"]
    if item["type"] == "missing":
        return [f"{where!r} is missing"]
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
    return [f"{where} is {_short.repr(item['input'])}; {message}"]


def _path(loc: tuple[int | str, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text

"""Which module a parameter belongs to; `torch.nn.utils.parametrizations` are looked through.

A parametrized layer keeps its weight in modules inside it (``fc.parametrizations.weight.original0``). To
everybody else it is a layer with a weight.
"""

from __future__ import annotations

import re

from torch import nn
from torch.nn.utils import parametrize

_PARAMETRIZED = re.compile(r"(^|\.)parametrizations\..*")


def module_of(name: str) -> str:
    """Return the path of the module that a parameter belongs to.

    >>> module_of("fc.bias"), module_of("fc.parametrizations.weight.original0"), module_of("temperature")
    ('fc', 'fc', '')
    """
    return _PARAMETRIZED.sub("", name.rpartition(".")[0])


def is_under(name: str, path: str) -> bool:
    """Return whether a parameter or module stands at the module path `path` or below it.

    >>> is_under("layer1.0.weight", "layer1"), is_under("layer10.weight", "layer1")
    (True, False)
    """
    return name == path or name.startswith(f"{path}.")


def paths_above(name: str) -> list[str]:
    """Return the module paths above a parameter or module, the root (``""``) first and the closest last.

    >>> paths_above("layer1.0.weight")
    ['', 'layer1', 'layer1.0']
    """
    parts = name.split(".")
    return [".".join(parts[:depth]) for depth in range(len(parts))]


def is_list(module: nn.Module) -> bool:
    """Return whether a module only keeps parameters, each of which may be another layer's."""
    return isinstance(module, nn.ParameterList | nn.ParameterDict)


def is_leaf(module: nn.Module) -> bool:
    """Return whether a module is one layer: no other module with parameters is inside, and it is no list."""
    if is_list(module):
        return False
    parametrized = parametrize.is_parametrized(module)
    return not any(
        True
        for name, child in module.named_children()
        if not (parametrized and name == "parametrizations")
        for _ in child.parameters()
    )

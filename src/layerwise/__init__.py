"""layerwise: which layers of a pretrained network learn, when, how fast, and what its norms do.

Names are imported when first used, so ``import layerwise`` is quick and needs nothing optional.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.errors import LayerwiseError as LayerwiseError
    from layerwise.errors import LayerwiseWarning as LayerwiseWarning
    from layerwise.layers.layermap import LayerGroup as LayerGroup
    from layerwise.layers.layermap import LayerMap as LayerMap
    from layerwise.plans.plan import Norms as Norms
    from layerwise.plans.plan import Phase as Phase
    from layerwise.plans.plan import Plan as Plan
    from layerwise.plans.plan import Schedule as Schedule
    from layerwise.tuning.norms import freeze_batchnorm as freeze_batchnorm
    from layerwise.tuning.norms import training_mode as training_mode

_HOME = {
    "LayerGroup": "layerwise.layers.layermap",
    "LayerMap": "layerwise.layers.layermap",
    "LayerwiseError": "layerwise.errors",
    "LayerwiseWarning": "layerwise.errors",
    "Norms": "layerwise.plans.plan",
    "Phase": "layerwise.plans.plan",
    "Plan": "layerwise.plans.plan",
    "Schedule": "layerwise.plans.plan",
    "freeze_batchnorm": "layerwise.tuning.norms",
    "training_mode": "layerwise.tuning.norms",
}

__version__ = "0.1.0"
__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'layerwise' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])

"""layerwise: which layers of a pretrained network learn, when, how fast, and what its norms do.

Names are imported when first used, so ``import layerwise`` is quick and needs nothing optional.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from layerwise.cache.prefix import PrefixCache as PrefixCache
    from layerwise.cache.stock import CachePool as CachePool
    from layerwise.choosing.advice import Advice as Advice
    from layerwise.choosing.advice import advise as advise
    from layerwise.choosing.curve import transfer_curve as transfer_curve
    from layerwise.choosing.depths import transferability as transferability
    from layerwise.choosing.search import search as search
    from layerwise.choosing.shift import shift as shift
    from layerwise.choosing.shift_result import Shift as Shift
    from layerwise.choosing.signature import Signature as Signature
    from layerwise.choosing.signature import signature as signature
    from layerwise.errors import LayerwiseError as LayerwiseError
    from layerwise.errors import LayerwiseWarning as LayerwiseWarning
    from layerwise.layers.head import replace_head as replace_head
    from layerwise.layers.layermap import LayerGroup as LayerGroup
    from layerwise.layers.layermap import LayerMap as LayerMap
    from layerwise.layers.mapping import layer_map as layer_map
    from layerwise.plans.parsing import parse_strategy as parse_strategy
    from layerwise.plans.plan import Phase as Phase
    from layerwise.plans.plan import Plan as Plan
    from layerwise.plans.recipes import auto_rgn as auto_rgn
    from layerwise.plans.recipes import lisa as lisa
    from layerwise.plans.recipes import reinit_last as reinit_last
    from layerwise.plans.settings import Norms as Norms
    from layerwise.plans.settings import Schedule as Schedule
    from layerwise.plans.strategies import blocks as blocks
    from layerwise.plans.strategies import discriminative as discriminative
    from layerwise.plans.strategies import freeze_embeddings as freeze_embeddings
    from layerwise.plans.strategies import full as full
    from layerwise.plans.strategies import linear_probe as linear_probe
    from layerwise.plans.strategies import pattern as pattern
    from layerwise.plans.strategies import surgical as surgical
    from layerwise.plans.strategies import top_k as top_k
    from layerwise.plans.unfreezing import fine_tune as fine_tune
    from layerwise.plans.unfreezing import gradual_unfreezing as gradual_unfreezing
    from layerwise.plans.unfreezing import lp_ft as lp_ft
    from layerwise.plans.unfreezing import ulmfit as ulmfit
    from layerwise.sources.images import open_images as open_images
    from layerwise.sources.models import open_model as open_model
    from layerwise.sources.preprocessing import Preprocessing as Preprocessing
    from layerwise.training.bylength import by_length as by_length
    from layerwise.training.fit import fit as fit
    from layerwise.training.labelled import open_labelled as open_labelled
    from layerwise.training.result import Result as Result
    from layerwise.training.run import Run as Run
    from layerwise.training.run import load_run as load_run
    from layerwise.training.run_list import list_runs as list_runs
    from layerwise.tuning.audit import audit as audit
    from layerwise.tuning.calibration import calibrate_batchnorm as calibrate_batchnorm
    from layerwise.tuning.freezing import count_parameters as count_parameters
    from layerwise.tuning.freezing import freeze as freeze
    from layerwise.tuning.freezing import unfreeze as unfreeze
    from layerwise.tuning.lr_scheduler import LayerwiseLR as LayerwiseLR
    from layerwise.tuning.norms import freeze_batchnorm as freeze_batchnorm
    from layerwise.tuning.norms import training_mode as training_mode
    from layerwise.tuning.param_groups import param_groups as param_groups
    from layerwise.tuning.tuner import Tuner as Tuner
    from layerwise.tuning.watch import watch as watch

_HOME = {
    "Advice": "layerwise.choosing.advice",
    "CachePool": "layerwise.cache.stock",
    "LayerGroup": "layerwise.layers.layermap",
    "LayerMap": "layerwise.layers.layermap",
    "LayerwiseError": "layerwise.errors",
    "LayerwiseLR": "layerwise.tuning.lr_scheduler",
    "LayerwiseWarning": "layerwise.errors",
    "Norms": "layerwise.plans.settings",
    "Phase": "layerwise.plans.plan",
    "Plan": "layerwise.plans.plan",
    "PrefixCache": "layerwise.cache.prefix",
    "Preprocessing": "layerwise.sources.preprocessing",
    "Result": "layerwise.training.result",
    "Run": "layerwise.training.run",
    "Schedule": "layerwise.plans.settings",
    "Shift": "layerwise.choosing.shift_result",
    "Signature": "layerwise.choosing.signature",
    "Tuner": "layerwise.tuning.tuner",
    "advise": "layerwise.choosing.advice",
    "audit": "layerwise.tuning.audit",
    "auto_rgn": "layerwise.plans.recipes",
    "blocks": "layerwise.plans.strategies",
    "by_length": "layerwise.training.bylength",
    "calibrate_batchnorm": "layerwise.tuning.calibration",
    "count_parameters": "layerwise.tuning.freezing",
    "discriminative": "layerwise.plans.strategies",
    "fine_tune": "layerwise.plans.unfreezing",
    "fit": "layerwise.training.fit",
    "freeze": "layerwise.tuning.freezing",
    "freeze_batchnorm": "layerwise.tuning.norms",
    "freeze_embeddings": "layerwise.plans.strategies",
    "full": "layerwise.plans.strategies",
    "gradual_unfreezing": "layerwise.plans.unfreezing",
    "layer_map": "layerwise.layers.mapping",
    "linear_probe": "layerwise.plans.strategies",
    "lisa": "layerwise.plans.recipes",
    "list_runs": "layerwise.training.run_list",
    "load_run": "layerwise.training.run",
    "lp_ft": "layerwise.plans.unfreezing",
    "open_images": "layerwise.sources.images",
    "open_labelled": "layerwise.training.labelled",
    "open_model": "layerwise.sources.models",
    "param_groups": "layerwise.tuning.param_groups",
    "parse_strategy": "layerwise.plans.parsing",
    "pattern": "layerwise.plans.strategies",
    "reinit_last": "layerwise.plans.recipes",
    "replace_head": "layerwise.layers.head",
    "search": "layerwise.choosing.search",
    "shift": "layerwise.choosing.shift",
    "signature": "layerwise.choosing.signature",
    "surgical": "layerwise.plans.strategies",
    "top_k": "layerwise.plans.strategies",
    "training_mode": "layerwise.tuning.norms",
    "transfer_curve": "layerwise.choosing.curve",
    "transferability": "layerwise.choosing.depths",
    "ulmfit": "layerwise.plans.unfreezing",
    "unfreeze": "layerwise.tuning.freezing",
    "watch": "layerwise.tuning.watch",
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

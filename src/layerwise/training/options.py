"""The options of `fit`: which values are legal, and what a run remembers of them."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

from layerwise.errors import RunError, TrainingError, did_you_mean
from layerwise.plans.plan import Plan

Precision = Literal["fp32", "bf16", "fp16"]
Keep = Literal["best", "last"]
CacheMode = Literal["auto", "memory", "disk", "off"]

PRECISIONS: dict[str, str] = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
"""Our name of a precision -> accelerate's."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": torch.optim.RMSprop,
    "adafactor": torch.optim.Adafactor,
}

OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {"sgd": {"momentum": 0.9}}
"""What an optimiser chosen by name gets unless `optimizer_options` says otherwise."""

FUSED = ("adamw", "adam", "sgd")
"""Have one kernel for the whole step: faster than torch's default, with other last bits.
``optimizer_options={"fused": False}`` switches it off."""

FUSED_DEVICES = ("cpu", "cuda")

WORKERS_A_CORE = 16
"""Each is a process with torch in it. Where they wait for a slow disk, more than one a core may help."""


def find_optimizer(
    optimizer: str | Callable[..., torch.optim.Optimizer],
    options: Mapping[str, Any] | None,
    *,
    device: torch.device,
) -> tuple[Callable[..., torch.optim.Optimizer], dict[str, Any], str]:
    """Return the optimiser's factory, its options, and its name for the record.

    One chosen by name is fused where torch can (`FUSED`), unless `options` choose an implementation.

    Args:
        optimizer: a name of `OPTIMIZERS`, a class or a factory.
        options: its keyword options; they come before our defaults.
        device: where the parameters are.

    Raises:
        TrainingError: no optimiser has that name.
    """
    if not isinstance(optimizer, str):
        name = getattr(optimizer, "__qualname__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(optimizer))
        return optimizer, dict(options or {}), name
    if optimizer not in OPTIMIZERS:
        raise TrainingError(_unknown(optimizer))
    given = dict(options or {})
    defaults = dict(OPTIMIZER_DEFAULTS.get(optimizer, {}))
    if (
        optimizer in FUSED
        and device.type in FUSED_DEVICES
        and not {"foreach", "differentiable"} & given.keys()
    ):
        defaults["fused"] = True
    return OPTIMIZERS[optimizer], {**defaults, **given}, optimizer


def _unknown(optimizer: str) -> str:
    return (
        f"optimizer {optimizer!r} is not known by name ({', '.join(OPTIMIZERS)})."
        f"{did_you_mean(optimizer, OPTIMIZERS)} In Python, any torch optimiser class can be given."
    )


def check_options(values: Mapping[str, Any]) -> None:
    """Look at the options of `fit` all at once.

    Raises:
        TrainingError: one or several are out of range; all are listed.
    """
    found: list[str] = []

    def expect(name: str, legal: bool, expected: str) -> None:
        if not legal:
            found.append(f"{name} is {values[name]!r}; expected {expected}")

    def whole(name: str, least: int) -> bool:
        value = values[name]
        return isinstance(value, int) and not isinstance(value, bool) and value >= least

    def number(name: str) -> float:
        value = values[name]
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and math.isfinite(value) else math.nan

    expect("lr", number("lr") > 0, "a finite number above 0")
    expect("batch_size", whole("batch_size", 1), "a whole number of at least 1")
    expect("accumulate", whole("accumulate", 1), "a whole number of at least 1")
    most = WORKERS_A_CORE * (os.cpu_count() or 1)
    legal = whole("workers", 0) and values["workers"] <= most
    expect(
        "workers", legal, f"a whole number from 0 to {most}, {WORKERS_A_CORE} for each core of this machine"
    )
    expect("keep_checkpoints", whole("keep_checkpoints", 1), "a whole number of at least 1")
    expect("seed", whole("seed", 0) and values["seed"] < 2**32, "a whole number from 0 to 2**32 - 1")
    expect("precision", values["precision"] in list(PRECISIONS), f"one of {', '.join(PRECISIONS)}")
    expect("label_smoothing", 0 <= number("label_smoothing") < 1, "a number from 0 to below 1")
    expect("keep", values["keep"] in ("best", "last"), "'best' or 'last'")
    expect("sampler", values["sampler"] in (None, "weighted"), "None or 'weighted'")
    expect("cache", values["cache"] in ("auto", "memory", "disk", "off"), "'auto', 'memory', 'disk' or 'off'")
    expect("device", values["device"] in ("auto", "cpu"), "'auto' or 'cpu'")
    is_task = values["task"] == "auto" or hasattr(values["task"], "collate")
    expect(
        "task",
        is_task,
        "'auto' or a task object: Classification(classes) of layerwise.training.classification, "
        "MultiLabel(classes) or Regression() of layerwise.training.text_tasks, or one of your own",
    )
    classes = values["classes"]  # a set has no order, and a text would be one class a letter
    listed = isinstance(classes, Iterable) and not isinstance(classes, str | set | frozenset | Mapping)
    expect("classes", classes is None or listed, "None, or a list of names in the order of the outputs")
    trackers = values["trackers"]
    named = isinstance(trackers, list | tuple) and all(isinstance(name, str) for name in trackers)
    expect("trackers", named or isinstance(trackers, str | None), "None, or the names of trackers")
    if values["weight_decay"] is not None:
        expect("weight_decay", number("weight_decay") >= 0, "None or a finite number of at least 0")
    if values["clip_norm"] is not None:
        expect("clip_norm", number("clip_norm") > 0, "None or a finite number above 0")
    for name in ("early_stopping", "checkpoint_every_steps"):
        if values[name] is not None:
            expect(name, whole(name, 1), "None or a whole number of at least 1")
    weights = values["class_weights"]
    if isinstance(weights, str):
        expect("class_weights", weights == "balanced", "None, 'balanced' or one number for each class")
        if weights == "balanced" and values["sampler"] == "weighted":
            found.append(
                "class_weights is 'balanced' and sampler is 'weighted', which together count rare classes "
                "twice; expected one of them. Leave out class_weights (--class-weights) or sampler"
            )
    elif isinstance(weights, Sequence):
        legal = all(isinstance(w, int | float) and math.isfinite(w) and w >= 0 for w in weights)
        expect("class_weights", legal and any(weights), "finite numbers of at least 0, one above it")
    elif weights is not None:
        expect("class_weights", False, "None, 'balanced' or one number for each class")
    if isinstance(values["optimizer"], str) and values["optimizer"] not in OPTIMIZERS:
        found.append(_unknown(values["optimizer"]))
    if values["precision"] == "fp16" and not torch.cuda.is_available():
        found.append("precision is 'fp16', which needs a GPU; there is none here. Take 'fp32' or 'bf16'")
    if found:
        problems = "".join(f"\n  - {problem}" for problem in found)
        raise TrainingError(
            f"{len(found)} option{'s' if len(found) > 1 else ''} of fit cannot be used:{problems}"
        )


def check_same_run(about: Mapping[str, Any], *, now: Mapping[str, Any], plan: Plan, out: Any) -> None:
    """Compare what a run was started with and what it is to be resumed with.

    Raises:
        RunError: they differ; each difference is listed. A resumed run would not be the same run.
    """
    found = []
    now = {**now, "plan": plan.model_dump(mode="json")}
    for part in ("plan", "settings", "data", "task"):
        old, new = about.get(part) or {}, now.get(part) or {}
        for key in sorted(set(old) | set(new)):
            if _differ(key, old.get(key), new.get(key)):
                found.append(f"{part}.{key}: {old.get(key)!r} -> {new.get(key)!r}")
    for key in ("class", "spec"):
        if about["model"].get(key) != now["model"].get(key):
            found.append(f"model.{key}: {about['model'].get(key)!r} -> {now['model'].get(key)!r}")
    if found:
        listed = "".join(f"\n  - {_short(difference)}" for difference in found)
        raise RunError(
            f"{out} was started with other values than it is to be resumed with:{listed}\n"
            "Give the same values, or start a new run in another folder."
        )


def _differ(key: str, before: Any, now: Any) -> bool:
    """Return whether two values of a record differ; a fingerprint is None where it cannot be told."""
    unknown = key.endswith("_fingerprint") and None in (before, now)
    return bool(before != now) and not unknown


def _short(text: str, limit: int = 300) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."

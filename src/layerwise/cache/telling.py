"""What people are told of a cache: what is stored, where, why, and what it is expected to gain."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

from layerwise.cache.cutting.cut import Cut
from layerwise.cache.samples.feed import Phase
from layerwise.cache.samples.supply import Supply
from layerwise.cache.store.decision import Decision
from layerwise.cache.store.room import format_bytes
from layerwise.errors import shorten

_TOLD = 4  # sites that are named


def described(supplies: Sequence[Supply]) -> str:
    """Return what is known of all loaders that a cache has seen."""
    if not supplies:
        return "prefix cache: nothing seen yet"
    lines = []
    for number, supply in enumerate(supplies):
        name = "prefix cache" if len(supplies) == 1 else f"prefix cache (loader {number + 1})"
        if supply.reason:
            lines.append(f"{name}: off: {supply.reason}")
        phases = phases_of(supply)
        when = "until then: " if supply.reason else ""
        shown = (phase for phase in phases.values() if phase.decision or not supply.reason)
        lines += dict.fromkeys(f"{name}: {when}{told(phase)}" for phase in shown)
        key = next(reversed(phases), None)
        stored, samples = supply.stored(key), sum(feed.rows for feed in supply.feeds)
        if 0 < stored < samples:
            lines.append(f"{name}: {stored:,} of {samples:,} samples stored so far")
        if supply.is_idle(key):
            lines.append(
                f"{name}: no batch of this epoch was replayed: the model is called with other arguments "
                f"(pass a number that changes as a tensor), or in another state (train or eval, what learns, "
                f"autocast, a setting of torch), than when it was looked at"
            )
    if not lines and any(supply.is_watched for supply in supplies):
        return "prefix cache: waiting for a batch that comes to the model outside of a TorchDispatchMode"
    return "\n".join(lines) or "prefix cache: waiting for the first batch"


def last_phase(supply: Supply) -> Phase | None:
    """Return the phase for which something was chosen last, all shapes together; None before that."""
    if supply.reason:
        return Phase(Decision("off", supply.reason))
    chosen = [phase for phase in phases_of(supply).values() if phase.decision is not None]
    return chosen[-1] if chosen else None


def told(phase: Phase | None) -> str:
    """Return what was chosen for a phase, for people."""
    if phase is None or phase.decision is None:
        return "waiting for the first batch"
    if phase.reason:
        lost = _lost(phase, phase.decision)
        return f"off: {phase.reason.rstrip('.')}{lost}" if lost else f"off: {phase.reason}"
    cut, decision = phase.cut, phase.decision
    sites = shorten(cut.frontier, _TOLD)
    text = f"{decision.storage}, cut at {sites} ({cut.first_dirty}): {decision.reason}"
    text += cut.lost(cached=True)
    if cut.returned_bytes_per_sample * 2 > cut.bytes_per_sample:
        text += (
            f"; {format_bytes(cut.returned_bytes_per_sample)} a sample are stored only because the model "
            f"returns or keeps frozen values (of a decoder's keys and values: model.config.use_cache = False)"
        )
    return text


def _lost(phase: Phase, decision: Decision) -> str:
    """Return what speed is lost by a phase that is not cached, for people, and by which operation."""
    cut: Cut | None = getattr(phase, "cut", None)  # there is none where nothing can be skipped
    lost = "" if cut is None else cut.lost(cached=decision.samples > 0)  # the decision tells of the others
    return f"{lost} ({cut.first_dirty})" if cut is not None and lost else ""


def phases_of(supply: Supply) -> dict[Any, Phase]:
    """Return, by the state of the model, what was found for all shapes of a loader's samples together."""
    feeds = supply.feeds
    keys = dict.fromkeys(key for feed in feeds for key in feed.phases)
    return {key: merged([feed.phases[key] for feed in feeds if key in feed.phases]) for key in keys}


def merged(phases: Sequence[Phase]) -> Phase:
    """Return the phases of several shapes as one: what was chosen for all samples together."""
    chosen = [(phase.decision, phase) for phase in phases if phase.decision and not phase.reason]
    if len(phases) == 1 or not chosen:
        return phases[0]
    decision, first = max(chosen, key=lambda pair: pair[0].total_bytes)
    samples = sum(one.samples for one, _ in chosen)
    total = sum(one.total_bytes for one, _ in chosen)
    reason = f"{decision.reason}; samples have {len(phases)} shapes"
    if total:
        reason += f", {format_bytes(total)} in all"
    refused = [phase.reason for phase in phases if phase.reason]
    if refused:
        reason += f"; {len(refused)} of them not cached: {refused[0]}"
    whole = copy.copy(first)
    whole.decision = dataclasses.replace(
        decision, reason=reason, bytes_per_sample=-(-total // max(samples, 1)), samples=samples
    )
    return whole

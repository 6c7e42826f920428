"""Strategies whose rates or groups change while the plan runs, and those that start groups anew."""

from __future__ import annotations

from typing import Unpack

from layerwise.errors import PlanError
from layerwise.layers.layermap import LayerMap
from layerwise.plans.options import (
    PhaseOptions,
    call,
    one_phase,
    require_groups,
    require_head,
    strategy,
)
from layerwise.plans.plan import Plan
from layerwise.plans.rates import decayed


@strategy
def auto_rgn(layers: LayerMap, **options: Unpack[PhaseOptions]) -> Plan:
    """Return a plan in which each group learns in proportion to its relative gradient norm.

    RGN of a group is ``|gradient| / |weights|``. The largest one learns at η, the others at their share
    of it. It is measured on the live gradients of the first steps of each epoch, so it costs no pass of
    its own. For when it is not known where the data differ from the source.

    Args:
        layers: the model's layer map.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: there is one group alone, or an option is wrong.

    Source: Lee et al. 2023, section 4.2. There the norms are taken per parameter tensor on extra batches at
    the start of each epoch; here per group, on the first steps that train.
    """
    require_groups(layers, "auto_rgn")
    return one_phase(layers, "auto_rgn", dict.fromkeys(layers.names, 1.0), options, adapt_rates="auto_rgn")


@strategy
def lisa(
    layers: LayerMap, *, groups: int = 2, every_steps: int = 20, **options: Unpack[PhaseOptions]
) -> Plan:
    """Return a plan that trains the embeddings, the head and a few blocks drawn anew every so many steps.

    As much memory for gradients and moments as a few blocks take, while in the long run every block learns.

    Args:
        layers: the model's layer map; one with many blocks (``granularity="blocks"``).
        groups: how many blocks learn at a time; fewer than there are.
        every_steps: how many optimiser steps until the next draw.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: there are no more blocks than are drawn, so nothing would be frozen.

    Source: Pan et al. 2024, LISA: Layerwise Importance Sampling for Memory-Efficient Large Language Model
    Fine-Tuning, algorithm 1. Blocks are drawn with equal probability.
    """
    # An output layer that is tied to the embeddings learns with them, and is no group of its own.
    if not any(name.rpartition(".")[0] in layers.outputs for name in layers.aliases):
        require_head(layers, "lisa")
    trunk = [group.name for group in layers if group.role == "trunk"]
    if len(trunk) < 2:
        raise PlanError(
            f"lisa draws from the groups between stem and head; this layer map has {len(trunk)} of them "
            f"(of {', '.join(layers.names)}). Map the model with a finer granularity, or ask for full()"
        )
    if not isinstance(groups, int) or not 0 < groups < len(trunk):
        raise PlanError(
            f"lisa(groups={groups!r}) draws from the {len(trunk)} groups between stem and head; expected "
            f"1 to {len(trunk) - 1}. Map the model with a finer granularity for more"
        )
    return one_phase(
        layers,
        call("lisa", groups=groups, every_steps=every_steps),
        dict.fromkeys(layers.names, 1.0),
        options,
        sample_groups=groups,
        sample_every_steps=every_steps,
    )


@strategy
def reinit_last(
    layers: LayerMap, *, k: int, decay: float | None = None, **options: Unpack[PhaseOptions]
) -> Plan:
    """Return a plan that initialises the last `k` groups before the head anew, and the head, then trains all.

    The last layers of a pretrained network are the most specialised for its pretraining task, and can be a
    worse start than random ones; it steadies fine-tuning on few samples.

    Args:
        layers: the model's layer map.
        k: how many groups before the head; from 1 to the number of groups between stem and head.
        decay: decay the rates by depth; None is the full rate for all.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: `k` is out of range.

    Source: Zhang et al. 2021, Revisiting Few-sample BERT Fine-tuning, section 5.
    """
    head = require_head(layers, "reinit_last")
    trunk = [group.name for group in layers if group.role == "trunk"]
    if not trunk:
        raise PlanError(
            f"reinit_last starts groups between stem and head anew; this layer map has none "
            f"({', '.join(layers.names)}). Map the model with a finer granularity"
        )
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(trunk):
        raise PlanError(
            f"reinit_last(k={k!r}): k is a whole number from 1 to {len(trunk)}, the groups between stem "
            f"and head ({', '.join(trunk)})"
        )
    table = decayed(layers.names, decay)
    return one_phase(
        layers, call("reinit_last", k=k, decay=decay), table, options, reinit=(*trunk[-k:], head)
    )

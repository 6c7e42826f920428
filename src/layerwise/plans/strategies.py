"""Strategies of one phase: which groups learn, at which share of the rate. `LayerMap` in, `Plan` out.

Every strategy takes the options of `layerwise.plans.options.PhaseOptions` besides its own: `epochs` or
`steps`, `schedule`, `norms`, `join_steps`, `l2_sp`, `frozen_dropout`. Strategies of several phases stand in
`layerwise.plans.unfreezing`, published recipes of other kinds in `layerwise.plans.recipes`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Unpack

from layerwise.errors import PlanError, plural
from layerwise.layers.layermap import LayerMap
from layerwise.plans.options import (
    PhaseOptions,
    call,
    one_phase,
    require_freezing,
    require_groups,
    require_head,
    strategy,
)
from layerwise.plans.plan import Plan
from layerwise.plans.rates import decayed
from layerwise.plans.selection import GroupSelection, match_names, select_groups


@strategy
def linear_probe(layers: LayerMap, **options: Unpack[PhaseOptions]) -> Plan:
    """Return a plan that trains the head alone on frozen features.

    The cheapest strategy and the baseline of every other: on small data that resembles the source it is
    hard to beat. Not for data that the frozen features do not separate.

    Args:
        layers: the model's layer map.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: the model has no head, or an option is wrong.
    """
    head = require_head(layers, "linear_probe")
    require_freezing(layers, [head], "linear_probe")
    return one_phase(layers, "linear_probe", {head: 1.0}, options)


@strategy
def full(layers: LayerMap, **options: Unpack[PhaseOptions]) -> Plan:
    """Return a plan that trains every group at the full rate.

    Args:
        layers: the model's layer map.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: an option is wrong.
    """
    return one_phase(layers, "full", dict.fromkeys(layers.names, 1.0), options)


@strategy
def top_k(layers: LayerMap, *, k: int, **options: Unpack[PhaseOptions]) -> Plan:
    """Return a plan that trains the last `k` groups, the head counted as one of them.

    Args:
        layers: the model's layer map.
        k: how many groups learn, from 1 (a linear probe) to one less than there are.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: `k` is out of range; all groups would learn.
    """
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(layers):
        raise PlanError(
            f"top_k(k={k!r}): k is a whole number from 1 to {len(layers) - 1}; this layer map has "
            f"{plural(len(layers), 'group')} ({', '.join(layers.names)}). Another "
            "granularity gives more or fewer"
        )
    trained = layers.names[len(layers) - k :]
    require_freezing(layers, trained, f"top_k(k={k})")
    return one_phase(layers, call("top_k", k=k), dict.fromkeys(trained, 1.0), options)


@strategy
def blocks(layers: LayerMap, groups: GroupSelection, **options: Unpack[PhaseOptions]) -> Plan:
    """Return a plan that trains the named groups and freezes all others.

    Args:
        layers: the model's layer map.
        groups: names, ranges or counts as `layerwise.plans.selection.select_groups` takes them:
            ``["layer3", "fc"]``, ``"layer3:"``, ``-2``. The head learns only when it is named.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: a name is unknown, or all groups would learn.
    """
    trained = select_groups(layers, groups)
    strategy = call("blocks", groups=groups)
    require_freezing(layers, trained, strategy)
    return one_phase(layers, strategy, dict.fromkeys(trained, 1.0), options)


@strategy
def pattern(
    layers: LayerMap,
    *,
    train: str | Sequence[str] | None = None,
    freeze: str | Sequence[str] | None = None,
    **options: Unpack[PhaseOptions],
) -> Plan:
    """Return a plan that trains single parameters by the patterns their names match.

    With `train` only what matches it learns; with `freeze` what matches it does not; with both, what matches
    `train` and not `freeze`. Groups of which only a part learns stand in the plan with `overrides`.

    Args:
        layers: the model's layer map.
        train: patterns as `layerwise.plans.selection.match_names` takes them: full names, whole components
            (``"bn"`` never matches ``subnet``), globs, ``re:`` expressions.
        freeze: the same.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: neither is given, a pattern matches nothing, or nothing or everything would learn.
    """
    if train is None and freeze is None:
        raise PlanError("pattern() needs train=[...] or freeze=[...] (or both); neither is given")
    names = [name for group in layers for name in group.parameters]
    every = names + list(layers.aliases)
    chosen = set(names)
    if train is not None:
        chosen = {layers.aliases.get(name, name) for name in match_names(_listed(train), every)}
    if freeze is not None:
        chosen -= {layers.aliases.get(name, name) for name in match_names(_listed(freeze), every)}
    strategy = call("pattern", train=train, freeze=freeze)
    if not chosen:
        raise PlanError(
            f"{strategy} trains nothing: every parameter that `train` selects is frozen by `freeze`"
        )
    if chosen == set(names):
        raise PlanError(
            f"{strategy} freezes nothing: all {len(names)} parameters would learn; ask for full()"
        )
    rates: dict[str, float] = {}
    overrides: dict[str, float] = {}
    for group in layers:
        inside = [name for name in group.parameters if name in chosen]
        if 2 * len(inside) > len(group.parameters):
            rates[group.name] = 1.0
            overrides |= {name: 0.0 for name in group.parameters if name not in chosen}
        else:
            overrides |= dict.fromkeys(inside, 1.0)
    return one_phase(layers, strategy, rates, options, overrides=overrides)


@strategy
def discriminative(
    layers: LayerMap,
    *,
    decay: float | None = None,
    rates: Mapping[str, float] | None = None,
    frozen: GroupSelection | None = None,
    **options: Unpack[PhaseOptions],
) -> Plan:
    """Return a plan in which groups learn more slowly the nearer they are to the input.

    Group l of L learns at ``eta * decay ** (L - l)``; the head is group L and learns at η. By layer, by block
    or by stage: as fine as the granularity of `layers`, so one decay means different things at different
    granularities. Freezing the first stage, decayed rates from the second on and the full rate for the head
    is ``discriminative(layers, decay=0.8, frozen=1)``.

    Args:
        layers: the model's layer map.
        decay: α. 0.95-0.99 is gentle, 0.85-0.95 moderate, 0.7-0.85 aggressive; below 0.7 freeze instead.
            0.9 where neither `decay` nor `rates` is given.
        rates: group (name, alias, or range) -> multiplier, in place of the decayed one. Without `decay` every
            group that is not `frozen` has to be named.
        frozen: groups that do not learn at all, as `select_groups` takes them; 2 is the first two.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: a group is unknown or has no rate, all rates are equal, or nothing learns.

    Source: Howard and Ruder 2018, section 3.2 (division by 2.6 a layer); Clark et al. 2020, appendix B.
    """
    alpha = 0.9 if decay is None and rates is None else decay
    strategy = call(
        "discriminative", decay=alpha, rates=dict(rates) if rates is not None else None, frozen=frozen
    )
    held = select_groups(layers, frozen) if frozen is not None else []
    if len(held) == len(layers):
        raise PlanError(f"{strategy} trains nothing: all {len(layers)} groups are frozen")
    table = decayed(layers.names, alpha) if alpha is not None else {}
    for selection, value in (rates or {}).items():
        table |= dict.fromkeys(select_groups(layers, selection), value)
    unnamed = [name for name in layers.names if name not in table and name not in held]
    if unnamed:
        raise PlanError(
            f"{strategy} gives no rate to {', '.join(unnamed)}; name them in `rates`, freeze them with "
            "`frozen`, or give `decay` for the rest"
        )
    learning = {name: table[name] for name in layers.names if name not in held}
    if len(set(learning.values())) == 1 and len(learning) > 1:
        raise PlanError(
            f"{strategy} leaves the rates of all {len(learning)} learning groups equal "
            f"({next(iter(learning.values()))!r} of the base rate); give a decay "
            "below 1, or ask for full() or top_k()"
        )
    if not held:
        require_groups(layers, strategy)
    return one_phase(layers, strategy, learning, options)


@strategy
def surgical(
    layers: LayerMap,
    *,
    which: Literal["first", "middle", "last"] | GroupSelection = "first",
    head: Literal["train", "freeze"] = "train",
    **options: Unpack[PhaseOptions],
) -> Plan:
    """Return a plan that trains one part of the network, chosen by where the data differ from the source.

    First groups for a shift of the input (noise, blur, another sensor), middle ones for a shift of features,
    last ones for a shift of the labels.

    Args:
        layers: the model's layer map.
        which: a third of the groups before the head (where they do not divide evenly ``"first"`` takes one
            more, and ``"middle"`` where two are over), or groups as `select_groups` takes them.
        head: whether the head learns too. The paper keeps the source task's head; a new head has to learn.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: the model is too small to be divided, a group or `head` is unknown, or all groups would
            learn.

    Source: Lee et al. 2023, Surgical Fine-Tuning Improves Adaptation to Distribution Shifts, section 2.
    """
    last = require_head(layers, "surgical")
    if head not in ("train", "freeze"):
        raise PlanError(f"surgical(head={head!r}): expected 'train' or 'freeze'")
    body = [name for name in layers.names if name != last]
    if isinstance(which, str) and which in ("first", "middle", "last"):
        if len(body) < 3:
            raise PlanError(
                f"surgical(which={which!r}) divides the groups before the head in three; there are "
                f"{len(body)} ({', '.join(body)}). Map the model with a finer granularity, or name the groups"
            )
        chosen = thirds(body)[("first", "middle", "last").index(which)]
    else:
        try:
            chosen = select_groups(layers, which)
        except PlanError as error:
            raise PlanError(
                f"surgical(which={which!r}): expected 'first', 'middle' or 'last', or groups; {error}"
            ) from error
    trained = [*chosen, last] if head == "train" and last not in chosen else list(chosen)
    strategy = call("surgical", which=which, head=None if head == "train" else head)
    require_freezing(layers, trained, strategy)
    return one_phase(layers, strategy, dict.fromkeys(trained, 1.0), options)


@strategy
def freeze_embeddings(
    layers: LayerMap, *, decay: float | None = None, **options: Unpack[PhaseOptions]
) -> Plan:
    """Return a plan that freezes what stands before the first block and trains the rest.

    In a language model that is the embedding table, often a third of all parameters, of which a small data
    set touches few rows; in an image network it is the stem.

    Args:
        layers: the model's layer map.
        decay: also decay the rates of the rest; None is the full rate for all of it.
        **options: see `PhaseOptions`.

    Raises:
        PlanError: the layer map has no stem.
    """
    stem = [group.name for group in layers if group.role == "stem"]
    if not stem:
        raise PlanError(
            f"freeze_embeddings: this layer map has nothing before its first block "
            f"({', '.join(layers.names)}); name what to freeze with pattern(freeze=[...])"
        )
    table = decayed(layers.names, decay)
    learning = {name: rate for name, rate in table.items() if name not in stem}
    return one_phase(layers, call("freeze_embeddings", decay=decay), learning, options)


def thirds(names: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Return `names` cut in three runs whose lengths differ by one at most, longer ones first.

    >>> thirds(["a", "b", "c", "d"])
    (['a', 'b'], ['c'], ['d'])
    """
    size, extra = divmod(len(names), 3)
    first = size + (extra > 0)
    second = first + size + (extra > 1)
    return list(names[:first]), list(names[first:second]), list(names[second:])


def _listed(patterns: str | Sequence[str]) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns)

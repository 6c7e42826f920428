"""Checks of the optimiser: who is in it, at which rate, and what comes of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping

from layerwise.errors import plural
from layerwise.layers.layermap import LayerMap
from layerwise.tuning.audit_setup import Finding, Setup
from layerwise.tuning.lr_scheduler import LayerwiseLR


def nothing_trains(setup: Setup) -> Iterator[Finding]:
    """No parameter requires gradients."""
    if setup.parameters and not any(p.requires_grad for p in setup.parameters.values()):
        yield Finding(
            "error",
            "nothing-trains",
            (type(setup.root).__name__,),
            "No parameter of the model requires gradients, so there is nothing to train.",
            "layerwise.unfreeze(model, 'head'), or give a plan to layerwise.Tuner",
        )


def membership(setup: Setup) -> Iterator[Finding]:
    """Trainable parameters in no param group or in two, and tensors that are not the model's."""
    if not setup.optimizers:
        return
    count: dict[int, int] = {}
    foreign = []
    for name, group in setup.param_groups:
        for parameter in group["params"]:
            count[id(parameter)] = count.get(id(parameter), 0) + 1
            if id(parameter) not in setup.names:
                foreign.append(name)
    missing = [name for name, p in setup.parameters.items() if p.requires_grad and not count.get(id(p))]
    if missing:
        yield Finding(
            "error",
            "trainable-not-in-optimizer",
            tuple(missing),
            "These parameters require gradients but are in no param group: they will silently never "
            "learn. An optimiser knows only what it was built with; unfreezing later does not add to it, "
            "and Lightning's filter_on_optimizer leaves out tensors that equal another one in value.",
            "build the optimiser after unfreezing, optimizer.add_param_group(...), or layerwise.Tuner",
        )
    double = [name for name, p in setup.parameters.items() if count.get(id(p), 0) > 1]
    if double:
        yield Finding(
            "error",
            "in-two-param-groups",
            tuple(double),
            "These parameters are in more than one param group: each step updates them twice, at two rates.",
            "put each parameter into one group",
        )
    if foreign:
        yield Finding(
            "error",
            "optimizer-holds-strangers",
            tuple(dict.fromkeys(foreign)),
            f"{plural(len(foreign), 'tensor in the optimiser is', 'tensors in the optimiser are')} not "
            "of the model (any more): a "
            "module was replaced after the optimiser was built (a new head, or timm's freeze and "
            "unfreeze, which make new parameters), so what the optimiser moves is not what the model "
            "uses.",
            "build the optimiser after the model has its final form",
        )


def frozen_in_optimizer(setup: Setup) -> Iterator[Finding]:
    """Frozen parameters that the optimiser holds: harmless, costly, or moved all the same."""
    graded, stated, decayed, held = [], [], [], []
    for _, group in setup.param_groups:
        for parameter in group["params"]:
            name = setup.names.get(id(parameter))
            if name is None or parameter.requires_grad:
                continue
            if parameter.grad is not None:
                graded.append(name)
            elif setup.state_of(parameter):
                stated.append(name)
            elif group.get("weight_decay", 0):
                decayed.append(name)
            else:
                held.append(name)
    fix = "freeze before the optimiser is built, or use layerwise.Tuner, which takes frozen parameters out"
    if graded:
        yield Finding(
            "error",
            "frozen-with-gradient",
            tuple(graded),
            "These parameters are frozen, but the optimiser holds them and a gradient from before lies "
            "on them: the next step moves them, weight decay and momentum included.",
            f"set parameter.grad = None when freezing (layerwise.freeze does); {fix}",
        )
    if stated:
        yield Finding(
            "warning",
            "frozen-with-state",
            tuple(stated),
            "These parameters are frozen, but the optimiser holds moments of them: they trained before. "
            "After a resume this is the sign of a backbone that was silently frozen again (Lightning "
            "#21901); else it is memory without use, and zero_grad(set_to_none=False) lets momentum and "
            "decay move them.",
            f"unfreeze them if they should learn; otherwise {fix}",
        )
    if decayed:
        yield Finding(
            "warning",
            "frozen-with-decay",
            tuple(decayed),
            "These parameters are frozen, but are in a param group with weight decay: a gradient of "
            "zeros (from zero_grad(set_to_none=False)) is enough for the decay to move them.",
            fix,
        )
    if held:
        yield Finding(
            "info",
            "frozen-in-optimizer",
            tuple(held),
            "These frozen parameters are in the optimiser. They do not move as long as they have no "
            "gradient.",
            fix,
        )


def rate_zero(setup: Setup) -> Iterator[Finding]:
    """A learning rate, or multiplier, of 0 in place of freezing."""
    names: list[str] = []
    for _, group in setup.rated:
        # a rate that a warm-up will raise has its peak in initial_lr
        peak = max(float(group.get(key, 0)) for key in ("lr", "initial_lr", "max_lr"))
        if peak == 0 or group.get("lr_scale") == 0 or group.get("lr_mult") == 0:
            names += setup.named(p for p in group["params"] if p.requires_grad)
    if names:
        yield Finding(
            "warning",
            "rate-zero-is-not-frozen",
            tuple(names),
            "A rate of 0 is not freezing: gradients are still computed, statistics drift, dropout is "
            "active, and a warm-up, a schedule's floor or the decay of some optimisers moves the weights "
            "all the same.",
            "layerwise.freeze(model, ...), or a multiplier of 0 in a layerwise plan, which is true freezing",
        )


def decay_on_norms_and_biases(setup: Setup) -> Iterator[Finding]:
    """Weight decay on gains and biases, which it pulls to 0 without regularising anything."""
    in_norms = {id(p) for norm in setup.norms for p in norm.module._parameters.values()}
    gains, biases = [], []
    for _, group in setup.param_groups:
        if not group.get("weight_decay", 0):
            continue
        for parameter in group["params"]:
            name = setup.names.get(id(parameter))
            if name is None or not parameter.requires_grad:
                continue
            if id(parameter) in in_norms:
                gains.append(name)
            elif name.rpartition(".")[2] == "bias":
                biases.append(name)
    if gains:
        yield Finding(
            "warning",
            "decay-on-norms",
            tuple(gains),
            "Weight decay pulls the gains of these norms towards 0, away from their pretrained values. "
            "Hugging Face's Trainer does this to batch-norm: its list of exceptions knows LayerNorm and "
            "a few names.",
            "put norms into a param group with weight_decay=0 (layerwise.Tuner does)",
        )
    if biases:
        yield Finding(
            "info",
            "decay-on-biases",
            tuple(biases),
            "Weight decay on biases does not regularise, and pulls them away from their pretrained values.",
            "put biases into a param group with weight_decay=0 (layerwise.Tuner does)",
        )


def scales_without_effect(setup: Setup) -> Iterator[Finding]:
    """``lr_scale`` of timm's layer decay, which only timm's own schedulers read."""
    scaled = [(name, group) for name, group in setup.rated if "lr_scale" in group]
    if len(scaled) < 2:
        return
    scales = {float(group["lr_scale"]) for _, group in scaled}
    rates = {round(float(group["lr"]), 12) for _, group in scaled}
    if scales == {1.0}:
        yield Finding(
            "error",
            "layer-decay-without-effect",
            tuple(name for name, _ in scaled),
            "The param groups were made for layer-wise decay, but every scale is 1.0: timm knows the "
            "order of layers for its own models only, and does nothing for others.",
            "layerwise.discriminative(layerwise.layer_map(model), decay=...) with layerwise.Tuner",
        )
    elif len(rates) == 1:
        yield Finding(
            "error",
            "lr-scale-ignored",
            tuple(name for name, _ in scaled),
            f"{len(scales)} different lr_scale values, but one learning rate ({rates.pop():g}) everywhere: "
            "lr_scale is read by timm's own schedulers only, before their first step and under torch's "
            "schedulers it does nothing.",
            "multiply it into each group's lr, or use layerwise.Tuner",
        )


def broken_ratios(setup: Setup) -> Iterator[Finding]:
    """Groups that the schedule does not move together."""
    if any(isinstance(scheduler, LayerwiseLR) for scheduler in setup.schedulers):
        return  # it sets all rates anew before the next step, those of joining groups lower on purpose
    live = [(name, g) for name, g in setup.rated if any(p.requires_grad for p in g["params"])]
    known = [(name, g) for name, g in live if float(g.get("initial_lr", 0)) > 0]
    factors = {name: float(group["lr"]) / float(group["initial_lr"]) for name, group in known}
    late = [name for name, group in live if known and "initial_lr" not in group]
    advice = "let one factor f(t) scale every group's own rate: layerwise.Tuner does, late groups included"
    if late and any(abs(factor - 1) > 1e-6 for factor in factors.values()):
        factor = next(iter(factors.values()))
        yield Finding(
            "warning",
            "late-group-off-schedule",
            tuple(late),
            f"These groups joined after the scheduler was made. The others stand at {factor:.3g} of their "
            "initial rates, while these entered at a rate of their own that the schedule had no part in, "
            "so the ratio between groups is not the one that was asked for.",
            advice,
        )
    # timm's schedulers multiply lr_scale into lr, and leave initial_lr without it
    scaled = {name: factors[name] / (float(group.get("lr_scale", 1)) or 1.0) for name, group in known}
    if _differ(factors) and _differ(scaled):
        low, high = min(factors, key=factors.__getitem__), max(factors, key=factors.__getitem__)
        yield Finding(
            "warning",
            "ratio-broken",
            tuple(name for name, factor in factors.items() if factor != factors[high]),
            f"The schedule has moved the groups apart: {low} is at {factors[low]:.3g} of its initial "
            f"rate, {high} at {factors[high]:.3g}. A group that joined late, an absolute floor (eta_min) "
            "or a shape with steps counted from the start does this.",
            advice,
        )


def _differ(factors: Mapping[str, float]) -> bool:
    values = factors.values()
    return bool(values) and max(values) - min(values) > 1e-6 * max(1.0, *values)


def without_state(setup: Setup) -> Iterator[Finding]:
    """Trainable parameters that never received a gradient while others stepped."""
    among: list[str] = []
    whole: list[str] = []
    stepped = False
    for _, group in setup.param_groups:
        live = [p for p in group["params"] if p.requires_grad and id(p) in setup.names]
        never = [p for p in live if not setup.state_of(p)]
        if len(never) == len(live) and "dampening" in group and not group.get("momentum"):
            continue  # a step of plain SGD leaves no state
        if "line_search_fn" in group:
            continue  # LBFGS keeps all of it with the first parameter
        stepped = stepped or len(never) < len(live)
        waiting = setup.named(p for p in never if p.grad is None)
        if len(never) < len(live) and "layer_group" not in group:  # to those of a Tuner parameters are added
            among += waiting
        else:
            whole += waiting
    why = (
        "no gradient reaches them (a stale compiled graph, reentrant checkpointing behind frozen layers, "
        "a module that is not used)"
    )
    fix = "audit with loader=... to see where the gradient ends"
    if among:
        yield Finding(
            "warning",
            "never-stepped",
            tuple(among),
            f"The optimiser has stepped others of the same param group, but never these: {why}.",
            fix,
        )
    if stepped and whole:
        yield Finding(
            "info",
            "group-never-stepped",
            tuple(whole),
            f"The optimiser has stepped others, but never these: unless they have just joined, {why}.",
            fix,
        )


def head_slower_than_backbone(setup: Setup) -> Iterator[Finding]:
    """A head, fresh from initialisation, that learns more slowly than the pretrained layers."""
    if len({float(group["lr"]) for _, group in setup.rated}) < 2 or _of_two_kinds(setup):
        return
    layers = setup.map
    if layers is None or layers.head is None:
        return
    rates = _rates_by_group(setup, layers)
    head = rates.pop(layers.head.name, math.inf)  # than one that does not learn none is faster
    faster = {name: rate for name, rate in rates.items() if rate > head * (1 + 1e-9)}
    if faster:
        name = max(faster, key=faster.__getitem__)
        yield Finding(
            "warning",
            "head-slower-than-backbone",
            (layers.head.name,),
            f"The head learns at {head:g}, but {name} at {faster[name]:g}: usually the head is new and "
            "must move most, and the earlier a layer the less it should.",
            "give the head the largest rate: layerwise.discriminative(layers, decay=...)",
        )


def uneven_decay(setup: Setup) -> Iterator[Finding]:
    """One step in an otherwise even layer-wise decay that is skipped or taken twice."""
    if len({float(group["lr"]) for _, group in setup.rated}) < 4 or _of_two_kinds(setup):
        return
    if setup.map is None:
        return
    rates = _rates_by_group(setup, setup.map)
    neighbours = itertools.pairwise(setup.map.names)
    steps = [(a, b, rates[a] / rates[b]) for a, b in neighbours if rates.get(a) and rates.get(b)]
    usual = sorted(ratio for _, _, ratio in steps)[len(steps) // 2] if steps else 1.0
    off = [(a, b, ratio) for a, b, ratio in steps if abs(ratio - usual) > 1e-3 * usual]
    if len(steps) >= 3 and abs(usual - 1) > 1e-3 and len(off) == 1:
        a, b, ratio = off[0]
        if min(abs(ratio - 1), abs(ratio - usual**2)) > 1e-3 * ratio:
            return  # a rate that was chosen: of a new head, say
        yield Finding(
            "warning",
            "uneven-layer-decay",
            (a, b),
            f"The rate falls by {usual:.4g} from layer to layer, but by {ratio:.4g} between {a} and {b}: an "
            "off-by-one in the depth (ELECTRA published one).",
            "compare the table of rates with what was meant; layerwise counts the head as depth 0",
        )


def _of_two_kinds(setup: Setup) -> bool:
    """Return whether the optimisers are of several classes, whose rates say nothing of one another (Muon)."""
    return len({type(optimizer) for optimizer in setup.optimizers}) > 1


def _rates_by_group(setup: Setup, layers: LayerMap) -> dict[str, float]:
    """Return the highest rate of each layer group of which something learns, input to output."""
    found: dict[str, float] = {}
    for _, group in setup.rated:
        for name in setup.named(p for p in group["params"] if p.requires_grad):
            home = setup.home(name)
            found[home] = max(found.get(home, 0.0), float(group["lr"]))
    return {name: found[name] for name in layers.names if name in found}

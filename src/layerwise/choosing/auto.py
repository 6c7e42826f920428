"""``--strategy auto``: diagnose, advise, a short search, and the plan that came out of it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from layerwise.choosing.advice import Advice, advice_from
from layerwise.choosing.evidence import Evidence, gather_evidence
from layerwise.choosing.named import fit_options
from layerwise.choosing.search import search
from layerwise.choosing.search_result import SearchResult
from layerwise.choosing.space import spread_depths
from layerwise.errors import DataError, figure, plural, points
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan

if TYPE_CHECKING:
    from layerwise.training.dryrun import DryRun
    from layerwise.training.job import Prepared
    from layerwise.training.text_job import PreparedText

TRIALS = 8
"""Trials of the short search where no budget in minutes is given."""
CLEAR = 2.0
"""Standard errors from which on one other choice counts as better than the advice; see `clear_errors`."""
RATES = 10.0
"""Factor around the advised rate of plans that train more than the head, within which rates are tried."""


def choose_plan(
    prepared: Prepared | PreparedText,
    *,
    budget_minutes: float | None = None,
    search_share: float = 0.5,
    trials: int = TRIALS,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared | PreparedText:
    """Return a job whose plan, base rate and class weights have been chosen, every choice told to `say`.

    Advice comes first; then a short search tries the advised strategy and a few depths on the validation
    data, unless there are none. The advised plan stays where the search has nothing clearly better (`pick`).
    With a budget, plans are made shorter than advice would have them where the training that follows would
    not fit into what the search leaves (unless the job says how many epochs).

    Args:
        prepared: a job with model and data open; its plan is not used. The model is unchanged.
        budget_minutes: for choosing and for the training that follows; None for no limit.
        search_share: of the budget, for choosing; 0 leaves the search out.
        trials: of the search, where there is no budget.
        say: told every reason, trial and choice.

    Raises:
        DataError: the data cannot be advised on; or the budget is not above 0, or the share not in [0, 1].
        LayerwiseError: every trial failed.
    """
    if not (budget_minutes is None or budget_minutes > 0) or not 0 <= search_share <= 1:
        raise DataError(
            f"the budget is {budget_minutes} minutes and the search's share {search_share}; expected more "
            "than 0 minutes (or None), and a share between 0 and 1."
        )
    began_s = time.monotonic()
    job, layers = prepared.job, prepared.layers
    evidence, _ = gather_evidence(
        prepared.opened.model,
        prepared.data.train,
        layers=layers,
        batch_size=int(job.options.get("batch_size", 32)),
        seed=job.seed,
    )
    advice = advice_from(evidence, layers, epochs=job.epochs)
    for reason in advice.reasons:
        say(f"{reason.about} ({reason.confidence}): {reason.text}")
    say(f"advice: {advice.described} at lr {advice.lr:g} ({advice.confidence} confidence): {advice.why}")
    if budget_minutes is not None and search_share < 1:
        advice = _in_time(prepared, advice, evidence, (1 - search_share) * budget_minutes * 60, say)
    plan, lr, searched = advice.plan, advice.lr, None
    options = {**job.options, **_weights(job.options, advice)}
    minutes = None
    if budget_minutes is not None:
        minutes = search_share * budget_minutes - (time.monotonic() - began_s) / 60
    if why := _no_search(prepared, search_share, minutes):
        say(f"no search: {why}")
    else:
        searched = _search(prepared, advice, options, trials=trials, minutes=minutes, say=say)
        say(str(searched))
        plan, lr, why = pick(
            advice, searched, val_samples=len(prepared.data.val or ()), tried=_searchable(advice)
        )
        say(why)
    say(f"chosen: {plan.strategy} at lr {lr:.3g}, {plural(plan.total_epochs(1), 'epoch')}")
    options["lr"] = lr
    changed = dataclasses.replace(job, strategy="auto", plan=None, options=options)
    about = {
        **prepared.about,
        "job": dataclasses.asdict(changed),
        "advice": advice.to_dict(),
        "choice": why,
        "search": None if searched is None else searched.to_dict(),
    }
    return dataclasses.replace(prepared, job=changed, plan=plan, about=about)


def _in_time(
    prepared: Prepared | PreparedText,
    advice: Advice,
    evidence: Evidence,
    room_s: float,
    say: Callable[[str], None],
) -> Advice:
    """Return advice whose plan can be trained by in `room_s` seconds, or what was given where that is."""
    plan, length = advice.plan, advice.plan.total_epochs(1)
    needed_s = expected_s(dataclasses.replace(prepared, plan=plan).dry_run(), plan, prepared.layers)
    if needed_s <= room_s:
        return advice
    said = (
        f"{plural(length, 'epoch')} would take about {needed_s / 60:.1f} min, and {room_s / 60:.1f} are left"
    )
    if prepared.job.epochs is not None or length == 1:
        say(f"warning: {said}")
        return advice
    shorter = advice_from(evidence, prepared.layers, epochs=max(1, int(length * room_s / needed_s)))
    say(f"{said}: {plural(shorter.plan.total_epochs(1), 'epoch')} of {shorter.described} instead")
    return shorter


def expected_s(measured: DryRun, plan: Plan, layers: LayerMap) -> float:
    """Return how many seconds training by a plan takes about, if the frozen prefix is computed once a phase.

    The first epoch of a phase costs what was measured, the others the share of it that the groups from the
    first trained one on have in the operations of a forward pass.
    """
    flops = [group.flops or 0 for group in layers]
    total = 0.0
    for phase, cost in zip(plan.phases, measured.costs, strict=True):
        first = min((i for i, group in enumerate(layers) if phase.trains(group.name)), default=0)
        share = sum(flops[first:]) / sum(flops) if sum(flops) else 1.0
        steps = phase.length_steps(measured.steps_per_epoch)
        total += cost.epoch_s * (1 + max(0.0, steps / measured.steps_per_epoch - 1) * share)
    return total


def _no_search(prepared: Prepared | PreparedText, share: float, minutes: float | None) -> str:
    """Return why there is no search, or nothing."""
    if share == 0:
        return "none was asked for"
    if prepared.data.val is None:
        return "there is no validation data"
    if minutes is not None and minutes <= 0:
        return "advice took all the time that was for it"
    return ""


def _search(
    prepared: Prepared | PreparedText,
    advice: Advice,
    options: dict[str, Any],
    *,
    trials: int,
    minutes: float | None,
    say: Callable[[str], None],
) -> SearchResult:
    """Return what a short search finds; it begins with the advised plan at its own rate."""
    return search(
        prepared.opened.model,
        prepared.data.train,
        prepared.data.val,
        trials=trials if minutes is None else None,
        minutes=minutes,
        **space_around(advice, groups=len(prepared.layers)),
        layers=prepared.layers,
        batch_size=int(options.get("batch_size", 32)),
        fit_options={
            **fit_options(prepared),
            **{key: value for key, value in options.items() if key not in _OWN},
        },
        refit="none",
        seed=prepared.job.seed,
        say=say,
    )


def space_around(advice: Advice, *, groups: int) -> dict[str, Any]:
    """Return the options of `search` that follow from advice: what is tried, at which rates, for how long.

    The advised strategy comes first, at its own rate; then it and four depths of so many `groups` at rates
    within a factor of `RATES` around the lowest rate advised, and with the advised batch-norm policy.
    """
    body = min([advice.lr, *(other.lr for other in advice.alternatives)])
    tried, policy = _searchable(advice), advice.plan.phases[0].norms.policy
    return {
        "depths": spread_depths(groups, count=4),
        "strategies": [tried],
        "begin_with": [(tried, advice.lr)],
        "lr": (body / RATES, max(body * RATES, advice.lr)),
        "epochs": advice.plan.total_epochs(1),
        "norms": None if policy == "follow" else policy,
    }


def _searchable(advice: Advice) -> str:
    """Return the advised strategy as a search reads it, with the pull towards the pretrained weights."""
    pull = advice.plan.phases[0].l2_sp
    if not pull:
        return advice.strategy
    name, _, arguments = advice.strategy.removesuffix(")").partition("(")
    return f"{name}({', '.join(filter(None, [arguments, f'l2_sp={pull:g}']))})"


def pick(
    advice: Advice, found: SearchResult, *, val_samples: int, tried: str | None = None
) -> tuple[Plan, float, str]:
    """Return plan and base rate: the search's winner, or the advice where the winner is not clearly better.

    Clearly is by more than `clear_errors` standard errors of the difference of two accuracies on the
    validation data, ``sqrt((p (1 - p) + q (1 - q)) / n)``: the best of many choices on few samples is often
    luck, and the advice does not rest on them. An error, a loss and a metric outside [0, 1] are taken at
    their word.

    Args:
        advice: whose strategy was among the choices of the search.
        found: what the search found.
        val_samples: number of validation samples.
        tried: the choice of the search that stands for the advice; None is the advised strategy.
    """
    tried = advice.strategy if tried is None else tried
    advised = next((point for point in found.curve if point.choice == tried), None)
    best = found.best
    if best.choice == tried and len(found.curve) == 1:
        return advice.plan, advice.lr, "the search got to no other plan, so the advice stays"
    if best.choice == tried:
        return advice.plan, advice.lr, "the search agrees with the advice"
    if advised is None:
        return advice.plan, advice.lr, "the search did not get to the advised plan, which stays"
    gain = best.mean - advised.mean
    if found.mode == "min" or not 0 <= best.mean <= 1:
        return found.plan, found.lr, f"the search found better: {found.metric} {figure(best.mean)}"
    error = sum(p * (1 - p) for p in (best.mean, advised.mean)) / max(val_samples, 1)
    error = float(error**0.5)
    clear = clear_errors(len(found.curve) - 1)
    if gain > clear * error:
        return (
            found.plan,
            found.lr,
            f"the search gains {points(gain)} over the advice (standard error {100 * error:.1f})",
        )
    return (
        advice.plan,
        advice.lr,
        f"{best.choice} gains {points(gain)} over the advice on {val_samples} validation samples, which is "
        f"within {clear:.2g} standard errors of {100 * error:.1f}: the advice stays",
    )


def clear_errors(rivals: int) -> float:
    """Return the standard errors by which the best of so many other choices has to beat the advice.

    Every rival is one more chance of luck, so the probability of `CLEAR` errors is divided among them
    (Bonferroni).

    >>> [round(clear_errors(rivals), 2) for rivals in (1, 2, 4, 8)]
    [2.0, 2.28, 2.53, 2.77]
    """
    normal = NormalDist()
    return normal.inv_cdf(1 - (1 - normal.cdf(CLEAR)) / rivals)


_OWN = ("lr", "batch_size", "seed", "checkpoint_every_steps", "keep_checkpoints", "early_stopping")


def _weights(options: dict[str, Any], advice: Advice) -> dict[str, Any]:
    """Return the advised class weights, unless the caller decided about imbalance already."""
    if options.get("class_weights") is not None or options.get("sampler") is not None:
        return {}
    return advice.fit_options

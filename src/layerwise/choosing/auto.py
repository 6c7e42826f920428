"""``--strategy auto``: diagnose, advise, a short search, and the plan that came out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from layerwise.choosing.advice import Advice, advise
from layerwise.choosing.search import search
from layerwise.choosing.search_result import SearchResult
from layerwise.choosing.space import spread_depths
from layerwise.errors import DataError
from layerwise.plans.plan import Plan

if TYPE_CHECKING:
    from layerwise.training.job import Prepared
    from layerwise.training.text_job import PreparedText

TRIALS = 8
"""Trials of the short search where no budget in minutes is given."""
CLEAR = 2.0
"""Standard errors from which on the best of so many trials counts as better than the advice."""


def choose_plan(
    prepared: Prepared | PreparedText,
    *,
    search_with: Literal["trials", "minutes", "nothing"] = "trials",
    trials: int = TRIALS,
    minutes: float = 0.0,
    say: Callable[[str], None] = lambda _: None,
) -> Prepared | PreparedText:
    """Return a job whose plan, base rate and class weights have been chosen, every choice told to `say`.

    Advice comes first; then a short search tries the advised strategy and a few depths on the validation
    data, unless there are none. The advised plan stays where the search has nothing clearly better (`pick`).

    Args:
        prepared: a job with model and data open; its plan is not used. The model is unchanged.
        search_with: what limits the search.
        trials: with ``"trials"``: so many.
        minutes: with ``"minutes"``: so long.
        say: told every reason, trial and choice.

    Raises:
        DataError: the data cannot be advised on, or `minutes` is not above 0.
        LayerwiseError: every trial failed.
    """
    if search_with == "minutes" and not minutes > 0:
        raise DataError(f"the search is given {minutes} minutes; expected more than 0.")
    job = prepared.job
    batch_size = int(job.options.get("batch_size", 32))
    advice = advise(
        prepared.opened.model,
        prepared.data.train,
        layers=prepared.layers,
        epochs=job.epochs,
        batch_size=batch_size,
        seed=job.seed,
    )
    for reason in advice.reasons:
        say(f"{reason.about} ({reason.confidence}): {reason.text}")
    say(f"advice: {advice.strategy} at lr {advice.lr:g} (confidence: {advice.confidence})")
    plan, lr = advice.plan, advice.lr
    options = {**job.options, **_weights(job.options, advice)}
    if search_with == "nothing" or prepared.data.val is None:
        say(
            "no search: "
            + ("none was asked for" if search_with == "nothing" else "there is no validation data")
        )
    else:
        groups = len(prepared.layers)
        task = {"task": prepared.task} if hasattr(prepared, "task") else {}
        shared = {key: value for key, value in options.items() if key not in _OWN}
        found = search(
            prepared.opened.model,
            prepared.data.train,
            prepared.data.val,
            trials=trials if search_with == "trials" else None,
            minutes=minutes if search_with == "minutes" else None,
            depths=spread_depths(groups, count=4),
            strategies=[advice.strategy],
            epochs=plan.total_epochs(1),
            layers=prepared.layers,
            batch_size=batch_size,
            fit_options={"classes": prepared.data.classes or None, **shared, **task},
            refit="none",
            seed=job.seed,
            say=say,
        )
        say(str(found))
        plan, lr, why = pick(advice, found, val_samples=len(prepared.data.val))
        say(why)
    say(f"chosen: {plan.strategy} at lr {lr:.3g}")
    options["lr"] = lr
    changed = dataclasses.replace(job, strategy="auto", plan=None, options=options)
    about = {**prepared.about, "job": dataclasses.asdict(changed), "advice": advice.to_dict()}
    return dataclasses.replace(prepared, job=changed, plan=plan, about=about)


def pick(advice: Advice, found: SearchResult, *, val_samples: int) -> tuple[Plan, float, str]:
    """Return plan and base rate: the search's winner, or the advice where the winner is not clearly better.

    Clearly is by more than two standard errors of the difference of two accuracies on the validation data,
    ``sqrt((p (1 - p) + q (1 - q)) / n)``: the best of many trials on few samples is often luck, and the
    advice does not rest on them. A metric outside [0, 1] (a loss) is taken at its word.

    Args:
        advice: whose strategy was among the choices of the search.
        found: what the search found.
        val_samples: number of validation samples.
    """
    advised = next((point for point in found.curve if point.choice == advice.strategy), None)
    best = found.best
    if best.choice == advice.strategy:
        return advice.plan, advice.lr, "the search agrees with the advice"
    if advised is None:
        return advice.plan, advice.lr, "the search did not get to the advised plan, which stays"
    gain = best.mean - advised.mean
    if found.metric.endswith("loss") or not 0 <= best.mean <= 1:
        return found.plan, found.lr, f"the search found better: {found.metric} {best.mean:.4f}"
    error = sum(p * (1 - p) for p in (best.mean, advised.mean)) / max(val_samples, 1)
    error = float(error**0.5)
    if gain > CLEAR * error:
        return (
            found.plan,
            found.lr,
            f"the search gains {gain:+.1%} over the advice (standard error {error:.1%})",
        )
    return (
        advice.plan,
        advice.lr,
        f"{best.choice} gains {gain:+.1%} over the advice on {val_samples} validation samples, which is "
        f"within {CLEAR:g} standard errors of {error:.1%}: the advice stays",
    )


_OWN = ("lr", "batch_size", "seed", "checkpoint_every_steps", "keep_checkpoints", "early_stopping")


def _weights(options: dict[str, Any], advice: Advice) -> dict[str, Any]:
    """Return the advised class weights, unless the caller decided about imbalance already."""
    if options.get("class_weights") is not None or options.get("sampler") is not None:
        return {}
    return advice.fit_options

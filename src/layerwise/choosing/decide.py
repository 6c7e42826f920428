"""From evidence to a strategy: what adjusts the decision matrix. No model, no data, no files."""

from __future__ import annotations

from dataclasses import dataclass, replace

from layerwise.choosing.choice import BODY_RATE, HEAD_RATE, Choice, full, last_groups, probe
from layerwise.choosing.evidence import REFERENCE_WIDTH, Confidence, Evidence, thresholds
from layerwise.choosing.matrix import DECAY, MOST, calibrated, matrix_cell, size_of
from layerwise.errors import percent, plural, points
from layerwise.layers.layermap import LayerMap
from layerwise.plans.settings import Norms

LEAST_BATCH = 16
"""Samples in a batch from which on batch-norm is advised to learn; a run warns from half of it down."""
SATURATED = 0.97
STRONG, SOME = 2.5, 1.5
"""Standard errors of the gap between the best depth and the last one from which on it counts."""
STEPS_A_GROUP = 60
"""Optimiser steps that gradual unfreezing needs for each group: groups that join warm up for 20."""
PLAIN_RATE = 2e-4
"""Base rate for networks without batch-norm (transformers) of `REFERENCE_WIDTH`; see `body_rate`."""
_LOWEST_FIRST: tuple[Confidence, ...] = ("low", "medium", "high")
BASELINE = "the baseline that every other plan has to beat; takes minutes with the cache"


@dataclass(frozen=True)
class Reason:
    """One thing that was looked at, and what followed from it.

    Attributes:
        about: a word: ``"similarity"``, ``"size"``, ``"depth"``, ...
        text: a sentence with its figure.
        confidence: how much weight it can bear.
        figure: the number in it, or None.
    """

    about: str
    text: str
    confidence: Confidence
    figure: float | None = None


@dataclass(frozen=True)
class Decision:
    """What was decided.

    Attributes:
        choice: the advised strategy.
        alternatives: what else to try, best first.
        reasons: in the order in which they counted.
        confidence: of the whole.
        cell: the strategy that the matrix alone gives.
    """

    choice: Choice
    alternatives: tuple[Choice, ...]
    reasons: tuple[Reason, ...]
    confidence: Confidence
    cell: str


def decide(evidence: Evidence, layers: LayerMap, *, epochs: int = 10) -> Decision:
    """Return a strategy with its reasons: the matrix, overruled where the figures speak clearly.

    In this order: (1) Recalibrated batch-norm statistics are used where the probe gains from them, and
    dropped elsewhere; where the matrix wanted them, the last three groups learn then. (2) A gradual
    unfreezing that has too few steps becomes one phase of the last groups. (3) A probe in the middle of the
    network that beats the one at its end by 2.5 standard errors: the groups after it have to be trained, and
    if the data are unlike the source, or nothing is known, all of them. One that beats it by 1.5 turns a
    linear probe into the groups after it, and, for data unlike the source or of unknown similarity, the last
    three groups into most of them. (4) A shift that sits in the early groups, of data that are not similar,
    where (3) chose nothing: tune the first third and the head. (5) Below 10,000 samples, frozen features
    that separate the classes already: linear probe. Then batch size, imbalance and pretraining set norms,
    weights and decay.

    Args:
        evidence: what was measured.
        layers: the map of the model; at least two groups, the last a head.
        epochs: length of the plan.
    """
    cell = matrix_cell(evidence, layers, epochs=epochs)
    reasons = [_similarity_reason(evidence), _size_reason(evidence, cell)]
    choice = cell
    gain = evidence.gain_of_recalibration
    calibrating = choice.options.get("norms") is not None
    if gain is not None:
        error = evidence.error_of(evidence.probe)
        helps = gain > error
        reasons.append(
            Reason(
                "batch-norm",
                f"statistics of the target instead of the source's change the probe by {points(gain)} "
                f"(standard error {100 * error:.1f}): "
                f"{'they are recalibrated' if helps else 'the source is kept'}",
                "high" if abs(gain) > 2 * error else "low",
                gain,
            )
        )
        if calibrating and not helps:
            why = "the matrix's adaptation of the statistics does not help here"
            choice = last_groups(3, len(layers), why)
        calibrating = helps
    choice = _enough_steps(evidence, layers, choice, reasons, epochs)
    choice = _by_depth(evidence, layers, choice, reasons)
    if evidence.probe >= SATURATED and size_of(evidence.samples) in ("< 1K", "1K-10K"):
        choice = probe("frozen features separate the classes already")
        reasons.append(
            Reason("depth", f"a linear probe already reaches {evidence.probe:.1%}", "high", evidence.probe)
        )
    choice = _finished(evidence, choice, reasons, calibrating=calibrating)
    alternatives = list(_alternatives(layers, choice, cell, epochs, adapted=calibrating or gain is None))
    decisive = {"similarity", "depth", *(["size"] if evidence.at_least else [])}
    confidence = min((r.confidence for r in reasons if r.about in decisive), key=_LOWEST_FIRST.index)
    choice, *alternatives = (_with_rate(found, evidence) for found in (choice, *alternatives))
    return Decision(choice, tuple(alternatives), tuple(reasons), confidence, cell.strategy)


def body_rate(evidence: Evidence) -> float:
    """Return the base rate (AdamW) of a plan in which more than the head learns.

    With batch-norm 1e-3. Without, 2e-4 at width 384, and inversely as the width: 1e-4 for BERT-base.

    Source: Yang et al. 2022, "Tensor Programs V" (muP): the best rate of Adam goes as 1 / width.
    """
    return BODY_RATE if evidence.has_batchnorm else PLAIN_RATE * REFERENCE_WIDTH / evidence.width


def _with_rate(choice: Choice, evidence: Evidence) -> Choice:
    return choice if choice.lr == HEAD_RATE else replace(choice, lr=body_rate(evidence))


def _enough_steps(
    evidence: Evidence, layers: LayerMap, choice: Choice, reasons: list[Reason], epochs: int
) -> Choice:
    """Return a strategy of one phase where gradual unfreezing would have too few steps for its phases."""
    steps = epochs * -(-evidence.samples // evidence.batch_size)
    if not choice.strategy.startswith("gradual_unfreezing") or steps >= STEPS_A_GROUP * len(layers):
        return choice
    reasons.append(
        Reason(
            "length",
            f"{plural(steps, 'step')} in {plural(epochs, 'epoch')} are few to unfreeze {len(layers)} groups "
            f"one after another (below {STEPS_A_GROUP} a group): one phase instead, of the last groups",
            "medium",
            float(steps),
        )
    )
    k = 3 if evidence.gap_errors < SOME else round(MOST * len(layers))
    return last_groups(k, len(layers), "too few steps for gradual unfreezing: the last groups in one phase")


def _by_depth(evidence: Evidence, layers: LayerMap, choice: Choice, reasons: list[Reason]) -> Choice:
    """Return the choice after looking at where in depth the features are best and where the shift sits."""
    best = evidence.transfer.best
    if evidence.gap_errors >= STRONG:
        reasons.append(
            Reason(
                "depth",
                f"a probe on {best.group} reaches {best.accuracy:.1%}, at the end of the network "
                f"{evidence.probe:.1%} ({evidence.gap_errors:.1f} standard errors): the groups after it are "
                "too special for this task and have to learn",
                "high",
                evidence.gap,
            )
        )
        if evidence.level in ("dissimilar", "unknown"):
            return full("the frozen features lose much of what this task needs, from early on")
        k = max(best.depth, 2)
        return last_groups(
            k, len(layers), f"all groups after {best.group}, whose frozen features are the best"
        )
    if evidence.gap_errors >= SOME:
        reasons.append(
            Reason(
                "depth",
                f"the best probe is {plural(best.depth, 'group')} before the head ({best.accuracy:.1%} "
                f"against {evidence.probe:.1%}, {evidence.gap_errors:.1f} standard errors)",
                "medium",
                evidence.gap,
            )
        )
        if choice.strategy == "linear_probe":
            return last_groups(max(best.depth, 2), len(layers), "the groups after the best probe")
        few = last_groups(3, len(layers), "").strategy
        if choice.strategy == few and evidence.level in ("dissimilar", "unknown"):
            k = max(best.depth, round(MOST * len(layers)))
            return last_groups(k, len(layers), "the last groups may be too special: most groups learn")
    elif evidence.transfer.last.depth == 0:
        reasons.append(
            Reason(
                "depth",
                f"no depth beats the end of the network clearly (best {best.accuracy:.1%}, end "
                f"{evidence.probe:.1%}): nothing speaks against its last features",
                "medium",
                evidence.gap,
            )
        )
    shift, body = evidence.shift, len(layers) - (layers.head is not None)
    if shift is not None and shift.where == "early" and evidence.level != "similar" and body >= 3:
        reasons.append(
            Reason(
                "where",
                f"{percent(shift.early_share, 1, digits=0)}% of the shift sits in the first third of the "
                f"groups{_moved(evidence)}: the inputs changed, not what they mean, so the first groups are "
                "the ones to tune",
                "medium",
                shift.early_share,
            )
        )
        return Choice("surgical(which=first)", "the shift sits in the first groups")
    return choice


def _finished(evidence: Evidence, choice: Choice, reasons: list[Reason], *, calibrating: bool) -> Choice:
    """Return the choice with the norm policy that batch size and recalibration ask for."""
    options = dict(choice.options)
    options.pop("norms", None)
    if evidence.has_batchnorm:
        if calibrating:
            options["norms"] = calibrated(evidence)
        elif evidence.batch_size < LEAST_BATCH and choice.strategy != "linear_probe":
            options["norms"] = Norms(policy="freeze")
            reasons.append(
                Reason(
                    "batch size",
                    f"batches of {evidence.batch_size} are too small for batch-norm to learn from "
                    f"(below {LEAST_BATCH}): its statistics stay those of pretraining",
                    "high",
                    float(evidence.batch_size),
                )
            )
    if evidence.imbalanced:
        reasons.append(_classes_reason(evidence))
    if "decay=" in choice.strategy:
        reasons.append(
            Reason(
                "pretraining",
                f"decay {DECAY[evidence.pretraining]} a group, as published after "
                f"{evidence.pretraining.replace('_', '-')} pretraining"
                if evidence.pretraining != "unknown"
                else f"decay {DECAY['unknown']} a group; after self-supervised pretraining "
                f"{DECAY['self_supervised']} is usual (say pretraining=...)",
                "medium",
                DECAY[evidence.pretraining],
            )
        )
    return replace(choice, options=options)


def _alternatives(
    layers: LayerMap, choice: Choice, cell: Choice, epochs: int, *, adapted: bool
) -> tuple[Choice, ...]:
    """Return other strategies worth a try, without the advised one.

    `adapted` is whether batch-norm recalibration may stay in the matrix's own cell.
    """
    if not adapted:
        kept = {key: value for key, value in cell.options.items() if key != "norms"}
        why = BASELINE if cell.strategy == "linear_probe" else cell.why
        cell = replace(cell, why=why, options=kept)
    found = [
        cell,
        probe(BASELINE),
        last_groups(3, len(layers), "between the two: cheap, and rarely far from the best"),
        full("when the target is unlike the source and there is time"),
    ]
    if epochs > 1:
        found.append(Choice("lp_ft", "keeps out-of-distribution accuracy: probe first, then everything"))
    norms = {key: value for key, value in choice.options.items() if key == "norms"}
    different: dict[str, Choice] = {}
    for other in found:
        if other.strategy != choice.strategy and other.strategy not in different:
            different[other.strategy] = replace(other, options={**norms, **other.options})
    return tuple(different.values())[:4]


def _similarity_reason(evidence: Evidence) -> Reason:
    if evidence.shift is None:
        return Reason(
            "similarity",
            f"unknown: {evidence.unknown or 'how similar the data are to the source was not measured'}",
            "low",
        )
    limits = thresholds()["norms" if evidence.shift.method == "norms" else "source"]
    words = {"similar": "similar", "somewhat": "somewhat similar", "dissimilar": "dissimilar"}
    return Reason(
        "similarity",
        f"input-side shift {evidence.shift.input_side}: {words[evidence.level]} to the source (similar below "
        f"{limits['high']:.3g}, dissimilar from {limits['low']:.3g}){_moved(evidence)}",
        evidence.level_confidence,
        evidence.shift.input_side.value,
    )


def _size_reason(evidence: Evidence, cell: Choice) -> Reason:
    if evidence.at_least:
        return Reason(
            "size",
            f"unknown, at least {evidence.samples:,} samples of {evidence.classes} classes: for so many the "
            f"matrix says {cell.described}; give data with a length for more than that",
            "low",
            float(evidence.samples),
        )
    return Reason(
        "size",
        f"{evidence.samples:,} samples of {evidence.classes} classes ({size_of(evidence.samples)}): the "
        f"matrix says {cell.described}",
        "medium",
        float(evidence.samples),
    )


def _classes_reason(evidence: Evidence) -> Reason:
    found = evidence.weighting
    tried = ""
    if found is not None:
        tried = (
            f"; with weights a probe changes by {points(found.balanced_gain)} of balanced accuracy (standard "
            f"error {100 * found.balanced_error:.1f}) and {points(found.accuracy_gain)} of accuracy "
            f"({100 * found.accuracy_error:.1f})"
        )
    if evidence.weighted:
        then = "weight the classes (class_weights='balanced') and look at balanced accuracy"
    elif found is None:
        then = "look at balanced accuracy; a class of one sample cannot show whether class weights help"
    elif found.wins:
        then = (
            "look at balanced accuracy, for which class weights trade accuracy: take "
            "class_weights='balanced' if a rare class is worth as much as a frequent one"
        )
    else:
        then = "look at balanced accuracy; class weights bring nothing clear"
    return Reason(
        "classes",
        f"the largest class is {evidence.imbalance:.3g} times the smallest{tried}: {then}",
        "high" if found is not None and found.wins else "medium",
        evidence.imbalance,
    )


def _moved(evidence: Evidence) -> str:
    moved = evidence.shift.moved_most if evidence.shift is not None else ""
    return f" (moved: {moved})" if moved else ""

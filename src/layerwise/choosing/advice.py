"""`advise`: a plan for a model and its data, with the reasons, their figures, and the alternatives."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.choosing.choice import Choice
from layerwise.choosing.decide import Decision, Reason, decide
from layerwise.choosing.depths import Transferability
from layerwise.choosing.evidence import Confidence, Evidence, Level, Pretraining, gather_evidence
from layerwise.choosing.matrix import DECAY, Size, default_epochs, size_of
from layerwise.choosing.shift_result import Shift
from layerwise.errors import DataError, PlanError
from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.shown import Shown


@dataclass(frozen=True)
class Alternative:
    """Another plan worth a try.

    Attributes:
        strategy: its name with options.
        described: the same in words, with what the plan does to batch-norm and weights.
        plan: the plan.
        lr: base rate that goes with it.
        why: one sentence.
    """

    strategy: str
    described: str
    plan: Plan
    lr: float
    why: str


@dataclass(frozen=True)
class Advice(Shown):
    """What to do with a model on given data, and why.

    Attributes:
        plan: the advised plan.
        strategy: its name with options.
        described: the same in words, with what the plan does to batch-norm and weights.
        why: one sentence.
        lr: base rate that goes with it, for AdamW.
        fit_options: further keyword options for `layerwise.fit` (class weights).
        confidence: how sure the advice is: the lowest of the reasons that decided.
        similarity: of target and source.
        size: row of the decision matrix.
        cell: what the matrix alone would have said.
        reasons: in the order in which they counted.
        alternatives: best first.
        shift: the measured shift, or None.
        transfer: transferability at every depth.
        notes: what could not be measured.
    """

    plan: Plan
    strategy: str
    described: str
    why: str
    lr: float
    fit_options: dict[str, Any]
    confidence: Confidence
    similarity: Level
    size: Size
    cell: str
    reasons: tuple[Reason, ...]
    alternatives: tuple[Alternative, ...]
    shift: Shift | None
    transfer: Transferability
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {
            "strategy": self.strategy,
            "described": self.described,
            "why": self.why,
            "lr": self.lr,
            "fit_options": self.fit_options,
            "confidence": self.confidence,
            "similarity": self.similarity,
            "size": self.size,
            "cell": self.cell,
            "reasons": [dataclasses.asdict(reason) for reason in self.reasons],
            "alternatives": [
                {**{f.name: getattr(a, f.name) for f in dataclasses.fields(a)}, "plan": a.plan.to_dict()}
                for a in self.alternatives
            ],
            "plan": self.plan.to_dict(),
            "shift": None if self.shift is None else self.shift.to_dict(),
            "transferability": self.transfer.to_dict(),
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        options = "".join(f", {key}={value!r}" for key, value in self.fit_options.items())
        lines = [f"advice: {self.described}, lr={self.lr:g}{options} (confidence: {self.confidence})"]
        lines += [f"  {self.why}", ""]
        lines += [f"  {r.about} ({r.confidence}): {r.text}" for r in self.reasons]
        lines += ["", "alternatives:"]
        lines += [f"  {a.described}, lr={a.lr:g}: {a.why}" for a in self.alternatives]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes), "", str(self.plan)])


def advise(
    model: nn.Module,
    train: Any,
    source: Any = None,
    *,
    layers: LayerMap | None = None,
    example_input: Any = None,
    epochs: int | None = None,
    batch_size: int = 32,
    pretraining: Pretraining = "unknown",
    max_samples: int | None = 512,
    collate: Any = None,
    seed: int = 0,
) -> Advice:
    """Return the plan that the measured figures speak for, with every reason.

    The start is the decision matrix (similarity to the source x number of samples); what is measured
    on the data overrules it where it is clear: see `layerwise.choosing.decide.decide`. Costs one forward
    pass over at most `max_samples` samples (two where batch-norm could be recalibrated) and some linear
    probes. It trains nothing: `layerwise.search` tests plans against each other.

    Args:
        model: the pretrained network, with its old head or a new one; unchanged.
        train: the training data, labelled; see `layerwise.choosing.features.collect_features`.
        source: a sample of the source domain, a `Signature`, or the path of one. None uses the running
            statistics of batch-norm; a network without either gets advice from its features alone.
        layers: the layer map that the plan is for; one at granularity ``"stages"`` is made when None.
        example_input: to make the map from; None takes two samples of the data.
        epochs: length of the plans; None is 20, 10, 5 or 3 by the number of samples.
        batch_size: that training will use; also of the passes here.
        pretraining: ``"supervised"`` or ``"self_supervised"``: sets the decay.
        max_samples: measured at most; None measures all.
        collate: makes a batch of samples, of data that is no loader.
        seed: of sampling, folds and intervals.

    Raises:
        DataError: no labels, one class, fewer samples than classes, a source of another modality or size; a
            number or a kind of pretraining that is none.
        PlanError: the layer map has fewer than two groups or no head.
        ModelError: a signature of another model.
        MissingExtraError: scikit-learn is not installed.
    """
    if epochs is not None and epochs < 1:
        raise DataError(f"epochs is {epochs}; expected at least 1.")
    if pretraining not in DECAY:
        raise DataError(f"pretraining is {pretraining!r}; expected one of {', '.join(DECAY)}.")
    evidence, layers = gather_evidence(
        model,
        train,
        source,
        layers=layers,
        example_input=example_input,
        batch_size=batch_size,
        pretraining=pretraining,
        max_samples=max_samples,
        collate=collate,
        seed=seed,
    )
    return advice_from(evidence, layers, epochs=epochs)


def advice_from(evidence: Evidence, layers: LayerMap, *, epochs: int | None = None) -> Advice:
    """Return the advice that follows from evidence; see `advise`."""
    if len(layers) < 2 or layers.head is None:
        raise PlanError(
            f"advice is about which groups before the head learn, but this layer map has {len(layers)} "
            f"groups ({', '.join(layers.names)}) and {'no' if layers.head is None else 'a'} head. Use a "
            "finer granularity, or a model with an output layer"
        )
    length = default_epochs(evidence.samples) if epochs is None else epochs
    decision: Decision = decide(evidence, layers, epochs=length)

    def built(choice: Choice) -> Plan:
        return choice.plan(layers, epochs=length)

    return Advice(
        plan=built(decision.choice),
        strategy=decision.choice.strategy,
        described=decision.choice.described,
        why=decision.choice.why,
        lr=decision.choice.lr,
        fit_options={"class_weights": "balanced"} if evidence.weighted else {},
        confidence=decision.confidence,
        similarity=evidence.level,
        size=size_of(evidence.samples),
        cell=decision.cell,
        reasons=decision.reasons,
        alternatives=tuple(
            Alternative(c.strategy, c.described, built(c), c.lr, c.why) for c in decision.alternatives
        ),
        shift=evidence.shift,
        transfer=evidence.transfer,
        notes=evidence.notes,
    )

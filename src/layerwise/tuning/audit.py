"""`audit`: look over a training set-up, made with layerwise or not, and say what will go wrong and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from layerwise.errors import ModelError
from layerwise.layers.layermap import LayerMap, check_map
from layerwise.shown import Shown
from layerwise.tuning import audit_graph, audit_modes, audit_optimizer, audit_schedulers
from layerwise.tuning.audit_probe import probe
from layerwise.tuning.audit_setup import Finding, Setup, optimizers_of
from layerwise.tuning.passes import Forward, feed

CHECKS: tuple[Callable[[Setup], Iterator[Finding]], ...] = (
    audit_modes.frozen_norms_in_train_mode,
    audit_modes.norms_with_old_statistics,
    audit_modes.norms_that_move_in_frozen_parts,
    audit_modes.norms_without_statistics,
    audit_modes.dropout_in_frozen_parts,
    audit_modes.small_batches,
    audit_optimizer.nothing_trains,
    audit_optimizer.membership,
    audit_optimizer.frozen_in_optimizer,
    audit_optimizer.rate_zero,
    audit_optimizer.scales_without_effect,
    audit_optimizer.broken_ratios,
    audit_optimizer.head_slower_than_backbone,
    audit_optimizer.uneven_decay,
    audit_schedulers.schedulers_and_new_groups,
    audit_optimizer.without_state,
    audit_optimizer.decay_on_norms_and_biases,
    audit_graph.split_ties,
    audit_graph.reentrant_checkpointing,
    audit_graph.ddp_before_unfreezing,
    audit_graph.compiled_with_frozen_parts,
)
_ORDER = ("error", "warning", "info")
_STYLES = {"error": "bold red", "warning": "yellow", "info": "dim"}


@dataclass(frozen=True)
class RateRow:
    """One line of the table of rates: what trains, and how fast.

    Attributes:
        name: layer group, or param group where no layer map is at hand.
        lr: lowest and highest learning rate in it; None where nothing trains, or the optimiser makes its own.
        weight_decay: the highest weight decay of what trains; 0 where nothing does.
        trainable: number of scalars that train.
        frozen: number of scalars that do not: they need no gradient, or no optimiser holds them.
    """

    name: str
    lr: tuple[float, float] | None
    weight_decay: float
    trainable: int
    frozen: int


@dataclass(frozen=True)
class Audit(Shown):
    """The findings of an audit, gravest first. Print it, iterate over it, or take ``to_dict()``.

    Attributes:
        findings: what was found.
        rates: the table of rates, input to output; empty without an optimiser.
        notes: what could not be checked.
    """

    findings: tuple[Finding, ...]
    rates: tuple[RateRow, ...] = ()
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Finding]:
        return iter(self.findings)

    def __len__(self) -> int:
        return len(self.findings)

    def __getitem__(self, index: int) -> Finding:
        return self.findings[index]

    @property
    def codes(self) -> frozenset[str]:
        """The codes of all findings."""
        return frozenset(finding.code for finding in self.findings)

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of severity error."""
        return tuple(finding for finding in self.findings if finding.severity == "error")

    def raise_for_errors(self) -> None:
        """Raise `ModelError` with all findings of severity error, if there are any."""
        if self.errors:
            lines = [f"{found.code} ({found.module}): {found.why} Fix: {found.fix}." for found in self.errors]
            raise ModelError("the audit found faults in this set-up:\n" + "\n".join(lines))

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data for JSON."""
        return {
            "ok": not self.errors,
            "findings": [finding.to_dict() for finding in self.findings],
            "rates": [dataclasses.asdict(row) for row in self.rates],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        from layerwise.layers.table import as_text

        findings = [
            f"{found.severity}: {found.code}: {found.module}\n  {found.why}\n  fix: {found.fix}"
            for found in self.findings
        ]
        rates = [as_text(self._rate_table())] if self.rates else []
        return "\n".join((*(findings or ["audit: no findings"]), *rates, *self.notes))

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.padding import Padding
        from rich.text import Text

        shown: list[Any] = [] if self.findings else [Text("audit: no findings", style="bold")]
        for found in self.findings:
            severity = found.severity, _STYLES[found.severity]
            shown.append(Text.assemble(severity, "  ", (found.code, "bold"), "  ", found.module))
            shown.append(Padding(Text(found.why), (0, 0, 0, 2)))
            shown.append(Padding(Text(f"Fix: {found.fix}"), (0, 0, 1, 2)))
        if self.rates:
            shown.append(self._rate_table())
        return Group(*shown, *map(Text, self.notes))

    def _rate_table(self) -> Any:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        rates = Table(title="Rates", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for column in ("group", "learning rate", "weight decay", "learns", "does not"):
            rates.add_column(column, justify="left" if column == "group" else "right")
        for row in self.rates:
            rate = " .. ".join(f"{rate:g}" for rate in dict.fromkeys(row.lr or ()))
            settings = (rate or "its own", f"{row.weight_decay:g}") if row.trainable else ("-", "-")
            rates.add_row(Text(row.name), *settings, f"{row.trainable:,}", f"{row.frozen:,}")
        return rates


def audit(
    model: nn.Module,
    optimizer: Any = None,
    *,
    scheduler: Any = None,
    layers: LayerMap | None = None,
    loader: Iterable[Any] | None = None,
    forward: Forward = feed,
    batch_size: int | None = None,
) -> Audit:
    """Return what is wrong, or risky, in a training set-up; for any loop, made with layerwise or not.

    It looks at modes (what would be in train mode after ``model.train()``), at frozen batch-norm and
    dropout, at who is in the optimiser and at which rate, at schedulers, ties, checkpointing,
    DistributedDataParallel and compilation. ``docs/guide/audit.md`` lists all codes. Without `loader`
    nothing is computed and it takes milliseconds (plus one recording of the model, about half a second,
    where the head has to be known and no `layers` were given, and where a frozen part would be in train
    mode, which a ``forward`` may prevent). With `loader` one batch is run forward and backward, which
    measures what drifts and where no gradient arrives.

    The model, the optimiser, modes, gradients, buffers and random states are as before afterwards.

    Args:
        model: as it is about to train, or in the middle of a run; wrapped or not.
        optimizer: a torch optimiser, a list of them, or a wrapper with one inside (fastai, accelerate).
        scheduler: one, or a list.
        layers: the model's layer map. Without one, the frozen part is told by the module tree.
        loader: batches to take one from; see `calibrate_batchnorm` for their form.
        forward: ``forward(model, batch)`` for batches of another form.
        batch_size: samples in a batch; None takes those of the batch of `loader`, and without one nothing is
            said of small batches.

    Raises:
        ModelError: `layers` is of another model, or `optimizer` is none.
        PlanError: `layers` is no layer map.
        DataError: the batch begins with no tensor of samples, or the model's forward fails on it.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> for parameter in model[:2].parameters(): parameter.requires_grad = False
    >>> tuple((found.code, found.module) for found in audit(model))
    (('frozen-norm-trains', '1'),)
    """
    schedulers = [] if scheduler is None else scheduler
    schedulers = schedulers if isinstance(schedulers, list | tuple) else [scheduler]
    if layers is not None:
        check_map(layers)
    setup = Setup(model, optimizers_of(optimizer), schedulers, layers, batch_size)
    measured = [] if loader is None else list(probe(setup, loader, forward))  # first: it sees the modes too
    findings = [*(finding for check in CHECKS for finding in check(setup)), *measured]
    findings.sort(key=lambda finding: _ORDER.index(finding.severity))
    notes = []
    if "map" in vars(setup) and setup.map is None:
        notes.append(
            "The order of the layers could not be recorded, so the head's rate and the decay between "
            "layers were not checked. Pass layers=layerwise.layer_map(model, example_input)."
        )
    return Audit(tuple(findings), tuple(_rates(setup)), tuple(notes))


def _rates(setup: Setup) -> Iterator[RateRow]:
    """Yield the table of rates by layer group, or by param group where there is no map."""
    if not setup.optimizers:
        return
    if "map" not in vars(setup) and setup.layers is None:  # not worth a recording of its own
        for name, group in setup.param_groups:
            yield _row(name, [(p, group) for p in group["params"]])
        return
    homes = {id(p): group for _, group in setup.param_groups for p in group["params"]}
    layers = setup.map
    if layers is None:
        return
    for layer in layers:
        members = [setup.root.get_parameter(name) for name in layer.parameters]
        yield _row(layer.name, [(p, homes.get(id(p))) for p in members])


def _row(name: str, members: list[tuple[nn.Parameter, dict[str, Any] | None]]) -> RateRow:
    training = [(p, group) for p, group in members if p.requires_grad and group is not None]
    rates = [float(group["lr"]) for _, group in training if group["lr"] is not None]
    size = sum(p.numel() for p, _ in training)
    return RateRow(
        name=name,
        lr=(min(rates), max(rates)) if rates else None,
        weight_decay=max((float(group.get("weight_decay", 0)) for _, group in training), default=0.0),
        trainable=size,
        frozen=sum(p.numel() for p, _ in members) - size,
    )

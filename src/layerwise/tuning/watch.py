"""Watch a run: which weights and buffers moved, which did not, and whether anything frozen is among them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.errors import ModelError, plural, shorten
from layerwise.layers.forms import tensor_digest
from layerwise.layers.isolation import unwrap
from layerwise.shown import Shown
from layerwise.tuning.modes import pinned
from layerwise.tuning.norm_layers import ADAPTING, frozen_norms


@dataclass(frozen=True)
class WatchReport(Shown):
    """What moved between the beginning and the end of a watched run.

    A parameter is *frozen* if it required no gradients at the beginning and at the end and is not among
    those that the watcher was told will learn; a buffer is frozen if all parameters of its module are (of a
    module without any, those of the innermost one around it that has some), or if its module was pinned in
    eval mode at both ends.

    Attributes:
        moved: parameters whose bytes changed.
        still: parameters that were to learn and did not change.
        frozen_moved: frozen parameters that changed all the same: should be empty.
        buffers_moved: buffers that changed.
        frozen_buffers_moved: frozen buffers that changed all the same: should be empty.
        replaced: names that stand for another tensor object now, which an optimiser does not know.
        lost_state: parameters whose optimiser state (moments) was there and is gone, or has counted
            fewer steps than at the beginning, while they still train. Needs an optimiser to watch.
        frozen_tensors: number of frozen parameters watched.
        frozen_buffers: number of frozen buffers watched.
    """

    moved: tuple[str, ...]
    still: tuple[str, ...]
    frozen_moved: tuple[str, ...]
    buffers_moved: tuple[str, ...]
    frozen_buffers_moved: tuple[str, ...]
    replaced: tuple[str, ...]
    lost_state: tuple[str, ...]
    frozen_tensors: int
    frozen_buffers: int

    @property
    def ok(self) -> bool:
        """Whether nothing frozen moved: zero frozen tensors, zero frozen buffers."""
        return not self.frozen_moved and not self.frozen_buffers_moved

    def raise_if_frozen_moved(self) -> None:
        """Raise `ModelError` if a frozen parameter or buffer changed; the names are in the message."""
        if self.ok:
            return
        found = []
        if self.frozen_moved:
            found.append(
                f"{plural(len(self.frozen_moved), 'frozen parameter')} moved ({shorten(self.frozen_moved)})"
            )
        if self.frozen_buffers_moved:
            found.append(
                f"{plural(len(self.frozen_buffers_moved), 'buffer')} of frozen modules moved "
                f"({shorten(self.frozen_buffers_moved)})"
            )
        raise ModelError(
            f"{' and '.join(found)}, expected none. layerwise.audit(model, optimizer) says by what; "
            "layerwise.freeze and layerwise.freeze_batchnorm hold weights and statistics."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain data for JSON."""
        return {"ok": self.ok, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        lines = [
            f"{plural(len(self.moved), 'parameter')} moved, "
            f"{plural(len(self.buffers_moved), 'buffer')} moved",
            f"frozen: {len(self.frozen_moved)} of {self.frozen_tensors} parameters moved, "
            f"{len(self.frozen_buffers_moved)} of {self.frozen_buffers} buffers moved",
        ]
        for what, names in (
            ("frozen but moved", (*self.frozen_moved, *self.frozen_buffers_moved)),
            ("trainable but did not move", self.still),
            ("replaced by another tensor", self.replaced),
            ("lost their optimiser state", self.lost_state),
        ):
            if names:
                lines.append(f"{what}: {shorten(names, 5)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Snapshot:
    """Hashes and roles of everything in a model at one moment."""

    parameters: dict[str, nn.Parameter]
    digests: dict[str, str]
    requires_grad: dict[str, bool]
    buffers: dict[str, str]
    held: dict[str, tuple[str, ...]]  # frozen buffers, and the parameters that speak for each
    steps: dict[str, float]  # optimiser steps by parameter, -1 where its state does not count


class Watch:
    """The watcher that `watch` returns; its `report` is there when the block has ended."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        trained: Collection[str],
        adapting: Collection[str],
    ) -> None:
        self._model = unwrap(model)
        self._optimizer = optimizer
        self._trained = set(trained)
        self._adapting = set(adapting)
        self._measured: dict[str, str] = {}  # buffers of norms measured on the way: hashes of that moment
        self._before: _Snapshot | None = None
        self._report: WatchReport | None = None

    @property
    def report(self) -> WatchReport:
        """What moved.

        Raises:
            ModelError: the watched block has not ended.
        """
        if self._report is None:
            raise ModelError("the watched block has not ended yet; read the report after `with watch(...)`.")
        return self._report

    def expect(
        self,
        *,
        trained: Collection[str] = (),
        adapting: Collection[str] = (),
        measured: Collection[str] = (),
    ) -> None:
        """Say, while the run is on, what moves on purpose.

        For runs that freeze again what they trained: the watcher sees only the two ends by itself.

        Args:
            trained: names of parameters that learn.
            adapting: module paths of norms whose statistics adapt.
            measured: of norms whose statistics were measured just now: frozen ones may not move from here on.
        """
        self._trained.update(trained)
        self._adapting.update(adapting)
        for path in measured:
            for name, buffer in self._model.get_submodule(path).named_buffers(prefix=path):
                self._measured[name] = digest(buffer)

    def __enter__(self) -> Watch:
        self._before = _snapshot(self._model, self._optimizer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._before is not None  # __enter__ ran
        after = _snapshot(self._model, self._optimizer)
        self._report = _compare(self._before, after, self._trained, self._adapting, self._measured)


def watch(
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    trained: Collection[str] = (),
    adapting: Collection[str] = (),
) -> Watch:
    """Return a context manager that reports which weights and buffers a run moved.

    Every parameter and buffer is hashed at the beginning and at the end (SHA-256 over the bytes), so a
    change of one bit is seen and nothing is kept but the hashes. Costs two reads of the weights: about
    0.15 s per 100 MB at each end; nothing in between. Changes nothing. Also reports after an exception.

    Args:
        model: may be wrapped (compile, DistributedDataParallel).
        optimizer: watch its state as well: moments that were wiped are reported.
        trained: names of parameters that learn on the way, where they are frozen at both ends.
        adapting: module paths of norms whose statistics adapt on purpose in frozen groups.

    >>> model = nn.Linear(2, 1)
    >>> _ = model.bias.requires_grad_(False)
    >>> with watch(model) as watched:
    ...     _ = model.weight.data.add_(1)
    >>> print(watched.report)
    1 parameter moved, 0 buffers moved
    frozen: 0 of 1 parameters moved, 0 of 0 buffers moved
    >>> watched.report.raise_if_frozen_moved()
    """
    return Watch(model, optimizer, trained, adapting)


def _snapshot(model: nn.Module, optimizer: Optimizer | None) -> _Snapshot:
    parameters = dict(model.named_parameters())
    names = {id(parameter): name for name, parameter in parameters.items()}
    state = {} if optimizer is None else optimizer.state
    return _Snapshot(
        parameters=parameters,
        digests={name: digest(parameter) for name, parameter in parameters.items()},
        requires_grad={name: parameter.requires_grad for name, parameter in parameters.items()},
        buffers={name: digest(buffer) for name, buffer in model.named_buffers()},
        held=_held_buffers(model),
        steps={
            names[id(parameter)]: float(values.get("step", -1))
            for parameter, values in state.items()
            if id(parameter) in names and values
        },
    )


def digest(tensor: Tensor) -> str:
    """Return a hash of a tensor's type, shape and bytes; of a tensor without data, of the first two."""
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        return "uninitialized"
    tensor = tensor.detach()
    if hasattr(tensor, "to_local"):  # a shard of this process
        tensor = tensor.to_local()
    return f"{tensor.dtype} {tuple(tensor.shape)}" if tensor.is_meta else tensor_digest(tensor)


def _held_buffers(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the buffers that may not move, and for each the parameters that speak for it.

    Those are its module's own, else those inside of it, else those of the module around it.
    """
    norms = {norm.module for norm in frozen_norms(model)}
    learns = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    held: dict[str, tuple[str, ...]] = {}
    speakers: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules():
        own = [name for name, parameter in module._parameters.items() if parameter is not None]
        inside = own or [name for name, _ in module.named_parameters()]
        names = tuple(f"{path}.{name}".removeprefix(".") for name in inside)
        speakers[path] = names = names or speakers.get(path.rpartition(".")[0], ())
        frozen = names and module not in ADAPTING and not any(learns[name] for name in names)
        if pinned(module) or module in norms or frozen:
            held.update(
                dict.fromkeys((f"{path}.{name}".removeprefix(".") for name in module._buffers), names)
            )
    return held


def _compare(
    before: _Snapshot,
    after: _Snapshot,
    trained: set[str],
    adapting: set[str],
    measured: Mapping[str, str],
) -> WatchReport:
    both = [name for name in before.digests if name in after.digests]
    moved = [name for name in both if before.digests[name] != after.digests[name]]
    learning = {
        name for name in both if before.requires_grad[name] or after.requires_grad[name] or name in trained
    }
    still = learning.difference(moved)
    held = {
        name
        for name, speakers in before.held.items()
        if name in after.held and name.rpartition(".")[0] not in adapting and trained.isdisjoint(speakers)
    }
    buffers_moved = [
        name for name, value in before.buffers.items() if after.buffers.get(name, value) != value
    ]
    return WatchReport(
        moved=tuple(moved),
        still=tuple(name for name in both if name in still),
        frozen_moved=tuple(name for name in moved if name not in learning),
        buffers_moved=tuple(buffers_moved),
        frozen_buffers_moved=tuple(
            name
            for name, value in {**before.buffers, **measured}.items()
            if name in held and after.buffers.get(name, value) != value
        ),
        replaced=tuple(_replaced(before.parameters, after.parameters)),
        lost_state=tuple(
            name
            for name, steps in before.steps.items()
            if after.requires_grad.get(name) and after.steps.get(name, -2) < steps
        ),
        frozen_tensors=len(both) - len(learning),
        frozen_buffers=len(held),
    )


def _replaced(before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) is not after.get(name)]

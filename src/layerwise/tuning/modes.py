"""Train and eval mode that stays: pin modules in eval, and put every module's mode back.

``model.train()`` is called by every trainer, some of them at every step, and it reaches every module. A
frozen layer must not listen: in train mode its dropout is noise and its batch-norm statistics drift. So a
pinned module carries a stand-in for its ``train`` method as an *instance* attribute. The class, the
module tree and the state-dict keys stay as they are, and copies and pickles keep the pin. A pinned norm
carries a second one for ``reset_running_stats``, by which ``update_bn`` would empty what it cannot refill.

Who looks at the ``training`` attribute alone is safe; who *assigns* ``module.training = True`` by hand
goes round the pin (`layerwise.audit` reports it).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from layerwise.errors import warn

_RESET = "reset_running_stats"  # what batch-norm and instance-norm call it


@dataclass(slots=True, eq=False)
class _Pin:
    """Stands in for ``module.train``: notes what was asked for, and keeps the module in eval.

    It is an object and not a closure, so that deepcopy and pickle carry it over to the copied module. It
    keeps the module, as a bound method does: ``copy.deepcopy(model).train()`` drops the copy before the call.
    """

    module: nn.Module
    wanted: bool  # the mode that the module would have by now
    hidden: Any  # somebody else's instance attribute ``train`` that this one covers, or None

    def __call__(self, mode: bool = True) -> nn.Module:
        if not isinstance(mode, bool):
            raise ValueError(f"training mode must be a bool, got {mode!r}")
        self.wanted = mode
        self.module.training = False
        for child in self.module.children():  # a child that is not pinned follows
            child.train(mode)
        return self.module


@dataclass(slots=True, eq=False)
class _Kept:
    """Stands in for ``module.reset_running_stats`` of a pinned norm, and keeps the statistics.

    ``torch.optim.swa_utils.update_bn`` resets every batch-norm and then measures in train mode, where a
    pinned one is not: it would be left with mean 0 and variance 1.
    """

    module: nn.Module

    def __call__(self) -> None:
        if isinstance(self.module, LazyModuleMixin):  # it is getting its shape, and has no values yet
            type(self.module).reset_running_stats(self.module)  # type: ignore[attr-defined]


def _pin_of(module: nn.Module) -> _Pin | None:
    found = module.__dict__.get("train")
    # A shallow copy shares the attribute of its original; that is not a pin of the copy.
    return found if isinstance(found, _Pin) and found.module is module else None


def pinned(module: nn.Module) -> bool:
    """Return whether `module` itself is pinned in eval mode (its children are pinned one by one)."""
    return _pin_of(module) is not None


def pin_eval(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Put each of `modules` in eval mode and keep it there, whoever calls ``train()`` on it or above it.

    Only the listed modules are pinned, not their children: pass ``layer.modules()`` for a whole layer.
    The pin survives ``model.train()``, ``copy.deepcopy``, pickling (``torch.save`` of a whole module),
    ``load_state_dict``, ``torch.compile``, DistributedDataParallel, autocast and checkpointing.
    A class that overrides ``train`` has its override called once with False, and is left alone until
    `unpin`. The statistics of a pinned norm stay as they are in ``reset_running_stats`` too, and so in
    ``update_bn`` and in its ``reset_parameters``.

    Recurrent layers (``nn.LSTM`` and kin) without dropout between their layers are passed over: train
    and eval mode compute the same there, and cuDNN refuses to send gradients through one in eval mode.

    Args:
        modules: any iterable of modules. One that is pinned already stays so.

    Returns:
        The modules that are newly pinned. Undo with `unpin`.

    Warns:
        LayerwiseWarning: a TorchScript module is pinned: its deepcopy or saved form forgets the pin,
            and a traced one keeps the mode in which it was traced whatever is asked.

    >>> layer = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    >>> _ = pin_eval(layer.modules())
    >>> layer.train()[1].training
    False
    """
    new = tuple(
        module
        for module in dict.fromkeys(modules)
        if not pinned(module) and not (isinstance(module, nn.RNNBase) and module.dropout == 0)
    )
    scripted = sum(isinstance(module, torch.jit.ScriptModule) for module in new)
    if scripted:
        warn(
            f"{scripted} TorchScript modules are held in eval mode in this process, but a deepcopy or a "
            "saved file of them forgets it, and traced ones keep the mode in which they were traced. "
            "Train the Python model, and script it after training.",
        )
    for module in new:
        wanted = module.training
        if "train" in module.__dict__ or type(module).train is not nn.Module.train:
            with held_modes(module):  # the override does its eval-mode work, its children keep their mode
                module.train(False)
        module.training = False
        module.__dict__["train"] = _Pin(module, wanted, module.__dict__.get("train"))
        if hasattr(type(module), _RESET):
            module.__dict__.setdefault(_RESET, _Kept(module))
    return new


def first_encoder_layers(model: nn.Module, still: set[nn.Module]) -> set[nn.Module]:
    """Return the modules of `still` that must follow ``train()``, though all in them may be pinned.

    ``nn.TransformerEncoder`` asks its first layer alone whether it is in eval mode, and then leaves out the
    padding (nested tensors), which its layers in train mode refuse. The first layer's own mode decides
    nothing else: what applies its dropout has a mode of its own.

    Args:
        model: the whole.
        still: what is to be pinned.
    """
    encoders = (
        module
        for module in model.modules()
        if isinstance(module, nn.TransformerEncoder) and getattr(module, "use_nested_tensor", False)
    )
    return {one.layers[0] for one in encoders if one.layers[0] in still and not still.issuperset(one.layers)}


def unpin(modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Let each of `modules` follow ``train()`` again, and give it the mode it was last asked to have.

    A module that was told ``train()`` while pinned is in train mode afterwards, so a group that is
    unfrozen in the middle of an epoch learns at once. Only the listed modules are changed.

    Returns:
        The modules that were pinned.
    """
    freed = []
    for module in dict.fromkeys(modules):
        pin = _pin_of(module)
        if pin is None:
            continue
        del module.__dict__["train"]
        if isinstance(module.__dict__.get(_RESET), _Kept):
            del module.__dict__[_RESET]
        if pin.hidden is not None:
            module.__dict__["train"] = pin.hidden
        if pin.hidden is not None or type(module).train is not nn.Module.train:
            with held_modes(module):
                module.train(pin.wanted)
        module.training = pin.wanted
        freed.append(module)
    return tuple(freed)


def asked_modes(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the mode of every module of `model`; of a pinned one, the mode that it was last asked for."""
    return {m: m.training if (pin := _pin_of(m)) is None else pin.wanted for m in model.modules()}


def note_modes(asked: Mapping[nn.Module, bool]) -> None:
    """Let the pinned ones of the modules have been asked for these modes last; see `asked_modes`.

    For frameworks that call ``eval()``, and then put back the modes that they saw by assigning ``training``:
    of that a pin hears the first half only.
    """
    for module, mode in asked.items():
        if (pin := _pin_of(module)) is not None:
            pin.wanted = mode


@contextmanager
def held_modes(model: nn.Module) -> Iterator[None]:
    """Put the mode of every module of `model` back on leaving, exceptions included.

    Flags are assigned one by one, not through ``train()``, so pins and overrides do not interfere; a
    pinned module also forgets what it was asked to be in between.
    """
    modes = [(module, module.training, _pin_of(module)) for module in model.modules()]
    wanted = [(pin, pin.wanted) for _, _, pin in modes if pin is not None]
    try:
        yield
    finally:
        for module, training, _ in modes:
            module.training = training
        for pin, mode in wanted:
            pin.wanted = mode

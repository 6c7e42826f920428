"""`ModelState`: what a replay depends on as a number, looked at in every batch; and whether weights move."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from layerwise.cache.changes.settings import Settings
from layerwise.cache.changes.stillness import Stillness
from layerwise.errors import CacheError
from layerwise.layers.isolation import parameters_in

Modes = Mapping[nn.Module, bool]
"""Module -> whether it is in train mode; without those that do the same in either mode."""

_MODELESS = frozenset(
    {
        *(nn.Identity, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Flatten, nn.Unflatten),
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.LayerNorm, nn.GroupNorm),
        *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
        *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softmax, nn.LogSoftmax, nn.Softplus),
        *(nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
        *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.Upsample, nn.PixelShuffle, nn.ZeroPad2d),
    }
)
"""Layers whose forward does the same in train and in eval mode."""


class OtherStateError(CacheError):
    """The model is in another state than a batch was made for."""


class ModelState:
    """The state of a model: who learns, modes, settings, gradients on or off.

    Args:
        model: whose.

    Attributes:
        last: the number that `number` returned last.
        settings: of the model's modules.
        moves: how often frozen weights seemed to have changed, as far as `look_at_weights` saw.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._numbers: dict[Any, int] = {}
        self._seen: Any = None  # what `last` stands for
        self.settings = Settings(model.modules())
        self._all = list(model.modules())
        self._still = Stillness(self._all)
        self.moves = 0
        self.refresh()

    def refresh(self) -> None:
        """Look again which modules and parameters the model has; once an epoch, as it takes a while."""
        self.look_at_weights()
        self._all = list(self._model.modules())
        self._modules = [
            module
            for module in self._all
            if type(module) not in _MODELESS or module._forward_hooks or module._forward_pre_hooks
        ]
        self._parameters = parameters_in(self._all)
        self.settings.refresh(self._all)
        self._still = Stillness(self._all)
        self.number()

    def number(self) -> int:
        """Return a number: another one in another state, and the same again when the state is back."""
        seen = (
            [parameter.requires_grad for parameter in self._parameters],
            [module.training for module in self._modules],
            self.settings.number(),
            torch.is_grad_enabled(),
        )
        if seen != self._seen:
            learns, modes, settings, grad = self._seen = seen
            known = tuple(learns), tuple(modes), settings, grad
            self.last = self._numbers.setdefault(known, len(self._numbers))
        return self.last

    def differ_in_modes(self, one: int, other: int) -> bool:
        """Return whether two states differ in the modules' modes or in gradients, and in nothing else."""
        known = list(self._numbers)
        (learns, _, settings, _), (others, _, other_settings, _) = known[one], known[other]
        return one != other and (learns, settings) == (others, other_settings)

    def look_at_weights(self) -> int:
        """Return `moves`, after a look at the weights that were frozen when `refresh` was last called."""
        if not self._still.holds():
            self._still = Stillness(self._all)
            self.moves += 1
        return self.moves

    def modes(self) -> Modes:
        """Return the modes of the modules."""
        return {module: module.training for module in self._modules}

    def trainable(self) -> frozenset[str]:
        """Return the names of the parameters that learn."""
        return frozenset(name for name, p in self._model.named_parameters() if p.requires_grad)

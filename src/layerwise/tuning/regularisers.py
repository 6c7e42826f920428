"""L2-SP: a pull towards the pretrained weights, decoupled from the optimiser's moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan


def has_finite_gradients(parameters: Iterable[nn.Parameter]) -> bool:
    """Return whether no gradient holds infinity or NaN, as one does whose loss was scaled too far."""
    gradients = [p.grad for p in parameters if p.grad is not None and p.grad.layout == torch.strided]
    return not gradients or bool(torch.nn.utils.get_total_norm(gradients).isfinite())


def pretrained_names(plan: Plan, number: int, layers: LayerMap) -> frozenset[str]:
    """Return the parameters whose pretrained weights are there in a phase: no head, nothing started anew.

    Args:
        plan: says what is started anew.
        number: of the phase.
        layers: the model's layer map.
    """
    new = {name for phase in plan.phases[: number + 1] for name in phase.reinit}
    if layers.head is not None:
        new.add(layers.head.name)
    return frozenset(name for group in layers if group.name not in new for name in group.parameters)


class L2SP:
    """Pulls parameters towards the weights that they had when they were first unfrozen.

    One step moves each weight by ``w -= rate * strength * (w - w0)`` before the optimiser's own step, as
    AdamW does with its decay (which is the case w0 = 0): the pull does not enter Adam's moments, so it is
    not divided by them. A new head has no pretrained weights and is left out.

    Costs one copy of every parameter that learns; none of those that stay frozen.

    Source: Li, Grandvalet and Davoine 2018, Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks, section 3. There the pull is part of the loss, and new layers get a plain L2 penalty (use
    weight decay for that).
    """

    def __init__(self) -> None:
        self.references: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def remember(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Keep a copy of each of `parameters` that has none yet."""
        for name, parameter in parameters.items():
            if name not in self.references:
                self.references[name] = parameter.detach().clone()

    def forget(self, names: Iterable[str]) -> None:
        """Drop the copies of `names`, as no later phase pulls them or they have started anew."""
        for name in names:
            self.references.pop(name, None)

    @torch.no_grad()
    def pull(
        self, parameters: Mapping[str, nn.Parameter], rates: Mapping[str, float], strength: float
    ) -> None:
        """Move each of `parameters` that has a gradient towards its reference.

        Args:
            parameters: changed in place.
            rates: learning rate of each parameter.
            strength: λ; ``rate * strength`` above 1 would jump past the reference and is held at 1.
        """
        for name, parameter in parameters.items():
            reference = self.references.get(name)
            if reference is not None and parameter.grad is not None:
                if reference.device != parameter.device:
                    reference = self.references[name] = reference.to(parameter.device)
                parameter.lerp_(reference, min(1.0, rates[name] * strength))

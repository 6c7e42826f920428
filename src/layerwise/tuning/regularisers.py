"""L2-SP: a pull towards the pretrained weights, decoupled from the optimiser's moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from layerwise.layers.layermap import LayerMap
from layerwise.plans.plan import Plan
from layerwise.tuning.learners import Learners


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

    Args:
        plan: says which phases pull, and how hard.
        layers: the model's layer map.
        learners: who learns in which phase.

    Attributes:
        references: the pretrained weights, by the names of the parameters.

    Source: Li, Grandvalet and Davoine 2018, Explicit Inductive Bias for Transfer Learning with Convolutional
    Networks, section 3. There the pull is part of the loss, and new layers get a plain L2 penalty (use
    weight decay for that).
    """

    def __init__(self, plan: Plan, layers: LayerMap, learners: Learners) -> None:
        self._plan, self._layers, self._learners = plan, layers, learners
        self.references: dict[str, torch.Tensor] = {}

    def remember(self, number: int) -> None:
        """Copy the pretrained weights of what learns now and is pulled to them in a phase, or in a later one.

        What has a copy keeps it, until no later phase pulls the parameter or it has started anew.

        Args:
            number: of the phase.
        """
        pulling = [later for later, phase in enumerate(self._plan.phases) if later >= number and phase.l2_sp]
        pulled = frozenset[str]().union(*map(self._learners.names_in, pulling))
        pulled &= pretrained_names(self._plan, number, self._layers)
        now = self._learners.names_now()
        self.references = {
            name: parameter.detach().clone() if (known := self.references.get(name)) is None else known
            for name, parameter in self._learners.parameters.items()
            if name in pulled and (name in now or name in self.references)
        }

    @torch.no_grad()
    def pull(self, optimizer: Any, strength: float) -> None:
        """Move each parameter that learns and has a gradient towards its reference.

        Nothing moves where a gradient is not finite: a loss scaler skips that step.

        Args:
            optimizer: has the learning rates; its parameters change in place.
            strength: λ; ``rate * strength`` above 1 would jump past the reference and is held at 1.
        """
        parameters = self._learners.parameters
        if not has_finite_gradients(parameters.values()):
            return
        rates = {id(p): float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        for name, reference in self.references.items():
            parameter = parameters[name]
            if id(parameter) in rates and parameter.grad is not None:
                if reference.device != parameter.device:
                    reference = self.references[name] = reference.to(parameter.device)
                parameter.lerp_(reference, min(1.0, rates[id(parameter)] * strength))

    def load(self, references: Mapping[str, torch.Tensor]) -> None:
        """Take over the references that another one had."""
        parameters = self._learners.parameters
        self.references = {
            name: value.to(parameters[name].device, copy=True) for name, value in references.items()
        }

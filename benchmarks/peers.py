"""The same phases trained by fastai and by Lightning with finetuning-scheduler; both are optional.

They get the network, the loader, the optimiser's rate and, phase by phase, the parameters that learn. What
they do with frozen batch-norm and everything else is their own. No validation, no logging, no checkpoints.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader

Phases = Sequence[tuple[frozenset[str], int]]
"""For each phase, the names of the parameters that learn and its epochs; names only ever join."""


def fastai_run(model: nn.Module, loader: DataLoader[Any], phases: Phases, lr: float) -> float:
    """Return the CPU seconds that fastai's `Learner` takes: ``freeze_to`` and ``fit`` for each phase."""
    from fastai.callback.core import Callback
    from fastai.callback.core import CancelValidException as Cancel
    from fastai.callback.progress import ProgressCallback  # noqa: F401  # gives Learner its `no_bar`
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner

    class TrainOnly(Callback):  # type: ignore[misc]
        def before_validate(self) -> None:
            raise Cancel

    groups = _joining(model, phases)
    began_s = time.process_time()
    learner = Learner(
        DataLoaders(loader, loader),
        model,
        loss_func=nn.functional.cross_entropy,
        splitter=lambda _: groups,
        train_bn=False,
        cbs=TrainOnly(),
    )
    with learner.no_bar(), learner.no_logging():
        for number, (_, epochs) in enumerate(phases):
            learner.freeze_to(-number - 1)
            learner.fit(epochs, lr)
    return time.process_time() - began_s


def _joining(model: nn.Module, phases: Phases) -> list[list[nn.Parameter]]:
    """Return fastai's groups, first to last: what never learns, what joins last, ..., what learns first."""
    groups: list[list[nn.Parameter]] = []
    seen: frozenset[str] = frozenset()
    for names, _ in phases:
        groups.insert(0, [p for name, p in model.named_parameters() if name in names - seen])
        seen |= names
    rest = [p for name, p in model.named_parameters() if name not in seen]
    return [rest, *groups] if rest else groups


def scheduler_run(model: nn.Module, loader: DataLoader[Any], phases: Phases, lr: float) -> float:
    """Return the CPU seconds of Lightning's ``Trainer.fit`` with `FinetuningScheduler`."""
    import lightning
    from finetuning_scheduler import FinetuningScheduler

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def training_step(self, batch: Any) -> Tensor:
            images, labels = batch
            loss = nn.functional.cross_entropy(self.net(images), labels)
            self.log("loss", loss)  # the callback wants something to monitor
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=lr)

    schedule: dict[int, dict[str, Any]] = {}
    seen: frozenset[str] = frozenset()
    ends = 0
    for number, (names, epochs) in enumerate(phases):
        ends += epochs
        joining = [f"net.{name}" for name, _ in model.named_parameters() if name in names - seen]
        schedule[number] = {"params": joining, "max_transition_epoch": ends}
        seen |= names
    for logger in ("lightning.pytorch", "finetuning_scheduler"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = Path(folder) / "schedule.yaml"
        path.write_text(yaml.safe_dump(schedule))
        trainer = lightning.Trainer(
            max_epochs=ends,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
            callbacks=[
                FinetuningScheduler(ft_schedule=str(path), epoch_transitions_only=True, restore_best=False)
            ],
        )
        began_s = time.process_time()
        trainer.fit(Module(), loader)
        return time.process_time() - began_s


PEERS: dict[str, tuple[str, Callable[[nn.Module, DataLoader[Any], Phases, float], float]]] = {
    "fastai": ("fastai", fastai_run),
    "finetuning-scheduler": ("finetuning_scheduler", scheduler_run),
}
"""Name -> package that must be there, and the function that trains."""


def installed() -> list[str]:
    """Return the peers that can run here; say which cannot."""
    found = []
    for name, (package, _) in PEERS.items():
        if importlib.util.find_spec(package) is None:
            print(f"   {name} is not installed, so it is left out: pip install {name}", flush=True)
        else:
            found.append(name)
    return found

"""The demo: three strategies on the same real images, split, seed and number of epochs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from layerwise.training.job import DEMO_DATA, Job, Prepared, prepare
from layerwise.training.result import Result

TRAIN, VAL, TEST = 800, 300, 600
EPOCHS = 4
SEED = 0


@dataclass(frozen=True)
class Arm:
    """One strategy of the demo.

    Attributes:
        name: for people and for the run's folder.
        strategy: as the command line takes it.
        lr: base learning rate; a fresh head alone bears a higher one than pretrained weights do.
    """

    name: str
    strategy: str
    lr: float


ARMS = (
    Arm("linear probe", "linear_probe", 5e-3),
    Arm("full fine-tuning", "full", 1e-3),
    Arm("selective", "discriminative:decay=0.8,frozen=:blocks.4", 1e-3),
)
"""The baselines that any claim needs, and the middle way: the last blocks at decayed rates, the frozen
blocks with their batch-norm statistics as pretrained."""


@dataclass(frozen=True)
class Row:
    """One line of the closing table.

    Attributes:
        arm: name of the strategy.
        strategy: with its options.
        balanced_accuracy: on the test images, with the weights of the epoch that was best on validation.
        macro_f1: likewise.
        accuracy: likewise.
        trained_parameters: scalars that learned.
        total_parameters: of the whole model.
        seconds: of training and validation.
        run: folder.
    """

    arm: str
    strategy: str
    balanced_accuracy: float
    macro_f1: float
    accuracy: float
    trained_parameters: int
    total_parameters: int
    seconds: float
    run: str

    def to_dict(self) -> dict[str, Any]:
        """Return the row as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class DemoResult:
    """What the demo came to.

    Attributes:
        rows: one for each arm.
        examples: paths of some test images, to predict.
    """

    rows: tuple[Row, ...]
    examples: tuple[str, ...]


def demo_job(arm: Arm, *, sizes: tuple[int, int, int], epochs: int, seed: int, image_size: int) -> Job:
    """Return the job of one arm; all arms differ only in strategy and learning rate."""
    from layerwise.sources.demo import DEMO_MODEL, lite0_weights

    return Job(
        model=DEMO_MODEL,
        weights=str(lite0_weights()),
        data=f"{DEMO_DATA}:{'/'.join(map(str, sizes))}",
        strategy=arm.strategy,
        granularity="stages",
        epochs=epochs,
        schedule="cosine",
        input_size=image_size,
        options={"lr": arm.lr, "seed": seed},
    )


def run_demo(
    out: Path,
    *,
    sizes: tuple[int, int, int] = (TRAIN, VAL, TEST),
    epochs: int = EPOCHS,
    seed: int = SEED,
    image_size: int = 128,
    on_arm: Callable[[Arm, Prepared], None] = lambda _arm, _prepared: None,
) -> DemoResult:
    """Train every arm into a folder of its own below `out`; return the closing table.

    Args:
        out: folder of the runs.
        sizes: train, validation and test images of ELPV.
        epochs: of each arm.
        seed: of drawing, split, head and order; the same for all arms.
        image_size: side in pixels.
        on_arm: called with each arm once its model, data and plan are open, before it trains.

    Raises:
        MissingExtraError: the packages with weights and images are not installed.
        RunError: `out` already holds the runs.
    """
    rows: list[Row] = []
    examples: tuple[str, ...] = ()
    for arm in ARMS:
        prepared = prepare(demo_job(arm, sizes=sizes, epochs=epochs, seed=seed, image_size=image_size))
        on_arm(arm, prepared)
        folder = out / arm.name.replace(" ", "-")
        rows.append(row_of(arm, prepared.fit(out=folder), folder))
        examples = () if prepared.data.test is None else prepared.data.test.paths[:3]
    return DemoResult(tuple(rows), examples)


def row_of(arm: Arm, result: Result, folder: Path) -> Row:
    """Return the line of the closing table about a finished arm."""
    test = result.test or {}
    return Row(
        arm=arm.name,
        strategy=arm.strategy,
        balanced_accuracy=test["balanced_accuracy"],
        macro_f1=test["macro_f1"],
        accuracy=test["accuracy"],
        trained_parameters=result.trained_parameters,
        total_parameters=result.total_parameters,
        seconds=result.seconds,
        run=str(folder),
    )


def frozen_norms_of(prepared: Prepared) -> tuple[int, int]:
    """Return how many batch-norms stay frozen in the first phase of a plan, and how many there are.

    Counted from groups and policy, before the model is touched.
    """
    from layerwise.layers.norms import find_norms

    phase, layers = prepared.plan.phases[0], prepared.layers
    norms = [norm.name for norm in find_norms(prepared.opened.model) if norm.kind == "running"]
    groups = [layers.inside(name)[0].name for name in norms]
    frozen = [name for name in groups if phase.norms.of(name).policy == "freeze" or phase.rate(name) == 0]
    return len(frozen), len(norms)

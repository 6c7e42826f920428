"""The demo on texts: three strategies on the same real topics, split, seed and number of epochs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from layerwise.sources.demo import minilm_folder
from layerwise.training.demo import Arm, DemoResult, Row, row_of
from layerwise.training.job import Job
from layerwise.training.text_job import DEBIAN, PreparedText, prepare_text

PER_TOPIC = 60
EPOCHS = 4
SEED = 0
MAX_LENGTH = 20
"""Tokens; one synopsis in a hundred is longer."""

TEXT_ARMS = (
    Arm("linear probe", "linear_probe", 5e-3),
    Arm("full fine-tuning", "full", 2e-4),
    Arm("selective", "top_k:k=2", 3e-4),
)
"""The baselines that any claim needs, and the middle way: the last layer and the classifier, the layers below
computed once."""


def text_demo_job(
    arm: Arm,
    *,
    data: str,
    epochs: int,
    seed: int,
    model: str | None = None,
    pooling: str = "mean",
    cache: str = "auto",
    padding: str = "auto",
) -> Job:
    """Return the job of one arm; all arms differ only in strategy and learning rate."""
    return Job(
        model=model or f"hf:{minilm_folder()}",
        data=data,
        strategy=arm.strategy,
        epochs=epochs,
        schedule="linear",
        test_frac=0.0 if data.startswith(DEBIAN) else 0.25,  # Debian's are split so already
        options={"lr": arm.lr, "seed": seed, "cache": cache},
        text={"max_length": MAX_LENGTH, "pooling": pooling, "padding": padding},
    )


def run_text_demo(
    out: Path,
    *,
    per_topic: int = PER_TOPIC,
    epochs: int = EPOCHS,
    seed: int = SEED,
    data: str | None = None,
    model: str | None = None,
    on_arm: Callable[[Arm, PreparedText], None] = lambda _arm, _prepared: None,
) -> DemoResult:
    """Train every arm into a folder of its own below `out`; return the closing table.

    Args:
        out: folder of the runs.
        per_topic: texts of each of the 20 topics; 60 % are learned from, 25 % tested on.
        epochs: of each arm.
        seed: of drawing, split, head and order; the same for all arms.
        data: a table with ``text`` and ``label`` instead of Debian's package descriptions.
        model: spec of another encoder than the packaged MiniLM.
        on_arm: called with each arm once its model, data and plan are open, before it trains.

    Raises:
        ModelError: the package with the weights is not installed.
        DataError: this machine has no lists of packages.
        RunError: `out` already holds the runs.
    """
    rows: list[Row] = []
    examples: tuple[str, ...] = ()
    for arm in TEXT_ARMS:
        job = text_demo_job(arm, data=data or f"{DEBIAN}:{per_topic}", epochs=epochs, seed=seed, model=model)
        prepared = prepare_text(job)
        on_arm(arm, prepared)
        folder = out / arm.name.replace(" ", "-")
        rows.append(row_of(arm, prepared.fit(out=folder), folder))
        test = prepared.table.parts.get("test")
        examples = () if test is None else tuple(test.texts[:3])
    return DemoResult(tuple(rows), examples)

"""Tune MiniLM on topics of Debian packages: accuracy and time of each strategy, over several seeds.

``python -m benchmarks text`` runs the arms of ``layerwise demo text`` for 3 seeds, without and with the
prefix cache where a part is frozen and in all ways to pad (``--padding``), the linear probe on
transformers' own pooler, and the selective plan written out by hand for a bare transformers ``Trainer``.
It prints the mean test accuracy with the last epoch's weights, its standard error over the seeds, and CPU
seconds of training, validation and test on one thread: CPU time, because other work on the machine does
not change it much. Results are kept in ``benchmarks/results/text.json`` and only what is missing is run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from layerwise.files import write_json
from layerwise.training.demo import Arm
from layerwise.training.text_demo import EPOCHS, PER_TOPIC, TEXT_ARMS, text_demo_job
from layerwise.training.text_job import DEBIAN, PreparedText, prepare_text

RESULTS = Path(__file__).parent / "results" / "text.json"
PROBE, FULL, SELECTIVE = TEXT_ARMS


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks text", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--per-topic", type=int, default=PER_TOPIC)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--only", nargs="*", help="names of the arms to run; the others are only printed")
    parser.add_argument("--show", action="store_true", help="print what is there, run nothing")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    runs: dict[str, tuple[Arm, dict[str, str]]] = {
        "linear probe": (PROBE, {}),
        "linear probe, model's pooler": (PROBE, {"pooling": "model"}),
        "full": (FULL, {"cache": "off"}),
        "selective": (SELECTIVE, {}),
        "selective, cache off": (SELECTIVE, {"cache": "off"}),
        "selective, padded by batch, cache off": (SELECTIVE, {"cache": "off", "padding": "batch"}),
        "selective, one length, cached": (SELECTIVE, {"padding": "all"}),
        "selective, one length, cache off": (SELECTIVE, {"cache": "off", "padding": "all"}),
        "selective, bare Trainer": (SELECTIVE, {"loop": "trainer"}),
    }
    for seed in range(options.seeds):
        for name, (arm, changes) in runs.items():
            key = {"name": name, "seed": seed, "strategy": arm.strategy, "lr": arm.lr}
            key |= {"per_topic": options.per_topic, "epochs": options.epochs}
            known = any(all(row.get(k) == v for k, v in key.items()) for row in rows)
            if known or options.show or (options.only and name not in options.only):
                continue
            rows.append({**key, **measure(arm, changes, seed, options)})
            RESULTS.parent.mkdir(exist_ok=True)
            write_json(RESULTS, rows)
            print(json.dumps(rows[-1]), flush=True)
    wanted = {"per_topic": options.per_topic, "epochs": options.epochs}
    current = [(name, arm.strategy, arm.lr) for name, (arm, _) in runs.items()]
    print(table([row for row in rows if all(row[k] == v for k, v in wanted.items())], current))
    return 0


def measure(arm: Arm, changes: dict[str, str], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Run one arm with one seed; return test accuracy, CPU seconds and what was learned."""
    job = text_demo_job(
        arm,
        data=f"{DEBIAN}:{options.per_topic}",
        epochs=options.epochs,
        seed=seed,
        pooling=changes.get("pooling", "mean"),
        cache=changes.get("cache", "auto"),
        padding=changes.get("padding", "auto"),
    )
    prepared = prepare_text(job)
    began_s = time.process_time()
    by_hand = changes.get("loop") == "trainer"
    accuracy = by_trainer(prepared, arm, seed) if by_hand else evaluated(prepared)
    return {"accuracy": accuracy, "cpu_s": round(time.process_time() - began_s, 1)}


def evaluated(prepared: PreparedText) -> float:
    """Return the test accuracy of `layerwise.fit`, with the last epoch's weights."""
    result = prepared.fit(progress=False, keep="last")
    assert result.test is not None
    return result.test["accuracy"]


def by_trainer(prepared: PreparedText, arm: Arm, seed: int) -> float:
    """Return the test accuracy of a bare transformers Trainer with the same weights, groups and rates.

    Nothing of layerwise but the opened model, the data, and the list of groups that learn: parameters are
    frozen by ``requires_grad``, the optimiser and its linear schedule are torch's.
    """
    from torch.nn import functional as F
    from transformers import Trainer, TrainingArguments

    model, data, (phase,) = prepared.opened.model, prepared.data, prepared.plan.phases
    learning = {name for group in prepared.layers if phase.rate(group.name) for name in group.parameters}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in learning)
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=arm.lr)
    total = -(-len(data.train) // 32) * (phase.epochs or 0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)

    class Classifier(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *_: Any, **__: Any) -> Any:
            labels = inputs.pop("labels")
            return F.cross_entropy(model(**inputs), labels)

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            num_train_epochs=phase.epochs or 0,
            per_device_train_batch_size=32,
            seed=seed,
            use_cpu=True,
            max_grad_norm=0,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        Classifier(
            model,
            settings,
            train_dataset=data.train,
            data_collator=data.train.collate,
            optimizers=(optimizer, schedule),
        ).train()
    test = data.test
    assert test is not None
    model.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(test), 32):
            batch = test.collate([test[i] for i in range(start, min(start + 32, len(test)))])
            labels = batch.pop("labels")
            right += int((model(**batch).argmax(dim=-1) == labels).sum())
    return right / len(test)


def table(rows: list[dict[str, Any]], arms: list[tuple[str, str, float]]) -> str:
    """Return one line an arm: seeds, mean test accuracy with its standard error, mean CPU seconds."""
    lines = ["| run | plan | rate | seeds | test accuracy | CPU seconds |", "|---|---|---|---|---|---|"]
    for name, strategy, lr in arms:
        found = [r for r in rows if (r["name"], r["strategy"], r["lr"]) == (name, strategy, lr)]
        if not found:
            continue
        scores = [row["accuracy"] for row in found]
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else float("nan")
        seconds = statistics.mean(row["cpu_s"] for row in found)
        lines.append(
            f"| {name} | {strategy} | {lr:g} | {len(found)} | {statistics.mean(scores):.3f} ± {error:.3f} "
            f"| {seconds:.0f} |"
        )
    return "\n".join(lines)

"""`fit`: train as a plan says, on accelerate. All is opened, `Loop` runs, and what came of it is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from layerwise.cache.prefix import PrefixCache
from layerwise.cache.stock import CachePool
from layerwise.errors import RunError, warn
from layerwise.files import remove_leftovers, write_json
from layerwise.layers.randomness import seed_everything
from layerwise.plans.plan import Plan
from layerwise.training import setup
from layerwise.training.checkpoint import load_latest
from layerwise.training.data import open_batches
from layerwise.training.evaluate import evaluate
from layerwise.training.guard import check_start, explained, require_values
from layerwise.training.history import not_finite
from layerwise.training.kept_weights import load_weights, require_weights_file, weights_file
from layerwise.training.key_cache import without_key_cache
from layerwise.training.loop import Loop
from layerwise.training.options import (
    CacheMode,
    Keep,
    Precision,
    check_options,
    check_same_run,
    find_optimizer,
)
from layerwise.training.processes import open_accelerator, to_device
from layerwise.training.result import Result
from layerwise.training.run_folder import (
    create_run,
    finish_run,
    hold_run,
    read_run,
    require_free,
    write_audit,
)
from layerwise.training.tasks import Task, split_batch
from layerwise.tuning.tuner import Tuner
from layerwise.tuning.watch import watch

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap


def fit(
    model: nn.Module,
    train: Any,
    val: Any = None,
    *,
    plan: Plan,
    test: Any = None,
    out: str | Path | None = None,
    task: Task | Literal["auto"] = "auto",
    classes: Sequence[str] | None = None,
    lr: float = 1e-3,
    optimizer: str | Callable[..., torch.optim.Optimizer] = "adamw",
    weight_decay: float | None = None,
    optimizer_options: Mapping[str, Any] | None = None,
    batch_size: int = 32,
    drop_last: bool = False,
    seed: int = 0,
    precision: Precision = "fp32",
    accumulate: int = 1,
    clip_norm: float | None = None,
    class_weights: Literal["balanced"] | Sequence[float] | None = None,
    sampler: Literal["weighted"] | None = None,
    label_smoothing: float = 0.0,
    early_stopping: int | None = None,
    keep: Keep = "best",
    checkpoint_every_steps: int | None = None,
    keep_checkpoints: int = 2,
    cache: CacheMode = "auto",
    workers: int = 0,
    layers: LayerMap | None = None,
    device: Literal["auto", "cpu"] = "auto",
    trackers: str | Sequence[str] | None = None,
    audit: bool = True,
    progress: bool = True,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    on_epoch: Callable[[Mapping[str, Any]], object] | None = None,
    cache_pool: CachePool | None = None,
    cache_folder: str | Path | None = None,
) -> Result:
    """Fine-tune `model` as `plan` says, and return what came of it.

    The loop: for each epoch, forward, loss, backward, `Tuner.step` over all batches; then validation,
    one line of history, the best weights kept, a checkpoint. With `out` the run can be interrupted at
    any moment (Ctrl-C, SIGKILL, power) and resumed; on one process and a CPU it then ends in the same
    bits as an uninterrupted run: weights, optimiser state, history and metrics.

    Order of the samples: of epoch e, ``torch.randperm`` from a generator seeded by
    `layerwise.training.randomness.epoch_seed`. Random augmentation of a sample is a function of (seed,
    epoch, index). Everything else (dropout) draws from the global generators, which are seeded here.

    Use a loop of your own with `layerwise.Tuner` where a batch needs more than one forward, or several
    optimisers.

    Args:
        model: any module; changed in place, moved to the device, left in eval mode. One of transformers
            keeps no keys and values meanwhile (``config.use_cache``).
        train: a map-style data set of pairs ``(input, label)`` or of mappings with ``"labels"``; or a
            `DataLoader`, whose batch size, collate function and workers are then used, and whose order
            is replaced by ours unless it has a sampler of its own. A method ``set_epoch(epoch)`` of the
            data set is called before each epoch, as accelerate does.
        val: the same; validated after each epoch. None: nothing is measured, the last weights are kept.
        plan: which groups learn when and at which rate.
        test: evaluated once at the end, with the kept weights.
        out: folder of the run; must not hold one yet unless `resume`. None writes nothing.
        task: what a batch means; ``"auto"`` looks at the first one (integer labels: classification).
        classes: names of the classes; None takes ``train.classes``, or numbers.
        lr: base learning rate eta, finite and above 0; a group's multiplier in the plan times this.
        optimizer: ``"adamw"``, ``"adam"``, ``"sgd"`` (momentum 0.9), ``"nadam"``, ``"radam"``,
            ``"rmsprop"``, ``"adafactor"``; or any torch optimiser class or factory. The first three are
            fused (one kernel a step) on CPU and CUDA.
        weight_decay: None is the optimiser's own default. Norms and biases get none.
        optimizer_options: further keyword options of the optimiser.
        batch_size: samples of one forward pass, for data sets.
        drop_last: leave out the last, smaller batch of each epoch; for a batch-norm after the pooling,
            which cannot train on a single sample.
        seed: of order, augmentation, dropout and re-initialised groups.
        precision: ``"fp32"``; ``"bf16"`` or ``"fp16"`` for autocast (fp16 on a GPU only). bf16 is slow on
            a CPU without instructions for it.
        accumulate: batches for one optimiser step. Its gradient is that of the mean over all their samples
            (tokens, where the loss is a mean over tokens), so batches count by their size.
        clip_norm: largest norm of all gradients together; None does not clip.
        class_weights: weights of the classes in the loss: ``"balanced"`` is N / (K n_k); 0 leaves one out.
        sampler: ``"weighted"`` draws samples with replacement, all classes equally often. Choose one of
            `class_weights` and `sampler` for imbalanced data; together they count twice, so ``"balanced"``
            beside it is refused.
        label_smoothing: share of each target spread over all classes, in [0, 1).
        early_stopping: stop after so many epochs without a better monitor (the task's metric; the loss
            does not break its ties).
        keep: which weights the model and ``model.safetensors`` end with: of the ``"best"`` epoch by the
            task's monitor (of epochs with equal values the one with the lowest validation loss, then the
            earliest), or of the ``"last"``.
        checkpoint_every_steps: also inside epochs; None only at the end of each epoch and at phase
            changes.
        keep_checkpoints: how many stay.
        cache: how outputs of the frozen prefix are kept (`layerwise.PrefixCache`).
        workers: processes that load samples of data sets.
        layers: the model's layer map at the plan's granularity; None records it from the first batch.
        device: ``"auto"`` is what accelerate chooses; ``"cpu"``.
        trackers: accelerate's experiment trackers (``"tensorboard"``, ``"wandb"``, ...).
        audit: look the set-up over before training (`layerwise.audit`) and watch that nothing frozen
            moves (`layerwise.watch`); both go to ``audit.json``.
        progress: a bar on stderr, or a line an epoch where stderr is no terminal.
        resume: go on with the run in `out` with the same arguments. Without a checkpoint yet it begins
            at the start, so `model` must then be as it was; a finished run is only read.
        about: what else ``run.json`` shall tell, by its keys ``model``, ``data`` and others.
        on_epoch: called with each line of history once its epoch is saved; what it raises ends the run
            (a search prunes with it).
        cache_pool: shared by several runs in one process, so that they compute a frozen prefix once (see
            `layerwise.PrefixCache`, `pool`).
        cache_folder: where outputs of the frozen prefix are kept for later runs and for other processes
            (see `layerwise.PrefixCache`, `folder`). None forgets them at the end.

    Raises:
        TrainingError: an option is out of range (all are listed); the loss is not finite, memory ran out,
            or a batch is too small for batch-norm (the step is named, the last checkpoint stays); the
            task's monitor is not measured.
        ModelError: parameters or buffers of the model are on the meta device; or the audit finds an error.
        PlanError: the plan does not fit the model.
        DataError: data, labels, classes and output do not belong together.
        RunError: `out` already holds a run, or there is none to resume, or it was started with other
            values or data, or another process is training it, or it is finished and has no checkpoints, or
            its kept weights were altered, or the disk is full.
        KeyboardInterrupt: after Ctrl-C, once the step at hand is done and saved.

    Returns:
        The result; `model` itself holds the kept weights.
    """
    options = dict(locals())
    check_options(options)
    require_values(model)
    folder = None if out is None else Path(out)
    if resume and folder is None:
        raise RunError("resume=True needs out=, the folder of the run to go on with.")
    if folder is not None and not resume:
        require_free(folder)  # before a tracker writes into it

    # Data, task, and what the run is.
    accelerator = open_accelerator(precision, device, trackers, folder)
    rank, world = accelerator.process_index, accelerator.num_processes
    written = folder if accelerator.is_main_process else None  # one process writes
    seed_everything(seed + rank)
    share = {"batch_size": batch_size, "seed": seed, "workers": workers, "rank": rank, "world": world}
    share |= {} if task == "auto" else {"collate": task.collate}
    weighted = sampler == "weighted"
    batches = open_batches(train, train=True, weighted=weighted, drop_last=drop_last, **share)
    held_out = None if val is None else open_batches(val, train=False, **share)
    if early_stopping is not None and val is None:
        warn(
            f"early_stopping is {early_stopping}, and without validation data nothing is measured that could "
            "stop. Give val (--val-frac), or leave it out."
        )
    test_batches = None if test is None else open_batches(test, train=False, name="test", **share)
    model.to(accelerator.device)
    first = to_device(setup.first_batch(batches), accelerator.device)
    task = setup.find_task(
        model,
        batches,
        first,
        task=task,
        classes=classes,
        class_weights=class_weights,
        label_smoothing=label_smoothing,
    )
    task.metrics()  # imports torchmetrics now, and not in the time of the first epoch
    count = setup.batch_count(batches)
    steps_per_epoch = -(-count // accumulate)
    make_optimizer, optimizer_settings, optimizer_name = find_optimizer(
        optimizer, optimizer_options, device=accelerator.device
    )
    record = setup.describe(model, batches, held_out, task, options, optimizer_name, about)

    # What a resumed run goes on from.
    previous, before = None, dict[str, Any]()
    if resume:
        folder = cast(Path, folder)
        before = read_run(folder)
        require_weights_file(weights_file(folder))
        check_same_run(before, now=record, plan=plan, out=folder)
        if accelerator.is_main_process:
            with hold_run(folder):
                remove_leftovers(folder)  # of files that a kill left half-written
        previous = load_latest(folder / "checkpoints")
        if previous is None and before.get("result"):
            raise RunError(
                f"{folder} is finished and has no checkpoints any more, so there is nothing to go on with. "
                "Use its weights (layerwise predict, layerwise.load_run), or begin a run in another folder."
            )
    accelerator.wait_for_everyone()  # all have looked before one writes

    # The plan and the cache; then the folder.
    args, kwargs, _ = split_batch(first)
    tuner = Tuner(
        model,
        plan,
        make_optimizer,
        lr=lr,
        steps_per_epoch=steps_per_epoch,
        layers=layers,
        example_input=kwargs or args,
        weight_decay=weight_decay,
        seed=seed,
        **optimizer_settings,
    )
    if accelerator.scaler is not None:  # fp16: steps go through the loss scaler
        tuner.optimizer = accelerator.prepare_optimizer(tuner.optimizer)

    prefix = None
    if cache != "off":
        prefix = PrefixCache(
            model, batches.loader, storage=cache, tuner=tuner, pool=cache_pool, folder=cache_folder
        )
    inspected = setup.inspect(model, tuner, batches.batch_size) if audit else None
    if previous is None:
        check_start(model)
    if written is not None and not resume:  # nothing is written before all of the above went well
        create_run(written, plan=plan, about=record)
        if inspected is not None:
            write_audit(written, before=inspected.to_dict())
    elif written is not None and not (written / "plan.yaml").exists():  # killed right after run.json
        plan.save(written / "plan.yaml")

    # The epochs.
    learns = setup.names_that_learn(tuner)
    watched = watch(model, optimizer=tuner.optimizer, trained=learns) if audit else None
    loop = Loop(
        model=model,
        task=task,
        tuner=tuner,
        accelerator=accelerator,
        batches=batches,
        count=count,
        reopen=partial(open_batches, train, **share),
        held_out=held_out,
        prefix=prefix,
        watched=watched,
        folder=folder,
        written=written,
        accumulate=accumulate,
        clip_norm=clip_norm,
        precision=precision,
        early_stopping=early_stopping,
        keep=keep,
        checkpoint_every_steps=checkpoint_every_steps,
        keep_checkpoints=keep_checkpoints,
        progress=progress,
        on_epoch=on_epoch,
    )
    if previous is None:
        loop.begin()
    else:
        loop.put_back(previous, before)
    began_steps = tuner.step_count
    loop.run()

    # The kept weights, the test data, and the record.
    now, written, notes = loop.now, loop.written, loop.notes
    if folder is not None:
        accelerator.wait_for_everyone()
        load_weights(model, weights_file(folder), expected_sha256=now.best.sha256)
    elif now.kept is not None:
        model.load_state_dict(now.kept)
    model.eval()
    tested = None
    if test_batches is not None:
        with without_key_cache(model):
            tested = evaluate(
                model, test_batches, task, device=accelerator.device, autocast=accelerator.autocast
            )
    notes += loop.history.notes()
    if tested is not None and (note := not_finite(tested.values, "test data")):
        notes.append(note)
        loop.reporter.say(note)
    if watched is not None:
        made_steps = tuner.step_count > began_steps
        notes += setup.report_watch(watched.report, written if made_steps else None)
    notes += [loop.told_of_cache] if loop.told_of_cache else []
    result = Result(
        model=model,
        task=task,
        history=loop.history.entries,
        best_epoch=now.best.epoch,
        metrics=now.best.metrics,
        tables=now.best.tables,
        test=None if tested is None else tested.values,
        test_tables={} if tested is None else tested.tables,
        stopped="early" if now.stopped_early else "finished",
        trained_parameters=sum(p.numel() for n, p in model.named_parameters() if n in learns),
        total_parameters=sum(p.numel() for p in model.parameters()),
        steps=tuner.step_count,
        seconds=sum(t["seconds"] for t in now.timings),
        out=folder,
        notes=tuple(notes),
    )
    if written is not None:
        with explained(lambda: tuner.step_count, out=folder):  # the disk may be full here, too
            write_json(written / "timings.json", now.timings)
            finish_run(written, result.to_dict())
    for tracker in accelerator.trackers:  # end_training would end the process group too; others may need it
        tracker.finish()
    return result

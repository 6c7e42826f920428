"""`fit`: the training loop, from top to bottom, on accelerate."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from layerwise.cache.prefix import PrefixCache
from layerwise.cache.remedies import without_remedies
from layerwise.cache.stock import CachePool
from layerwise.errors import RunError, plural, warn
from layerwise.files import remove_leftovers, write_json
from layerwise.layers.randomness import seed_everything
from layerwise.plans.plan import Plan
from layerwise.training import setup
from layerwise.training.accumulating import Window
from layerwise.training.checkpoint import load_latest, resume_command, save_checkpoint
from layerwise.training.data import open_batches
from layerwise.training.evaluate import evaluate
from layerwise.training.guard import (
    Interrupt,
    check_start,
    check_weights,
    explained,
    finite_loss,
    require_values,
)
from layerwise.training.history import History, name_of, not_finite
from layerwise.training.kept_weights import load_weights, require_weights_file, save_weights, weights_file
from layerwise.training.key_cache import without_key_cache
from layerwise.training.monitoring import has_stalled, is_better, monitored_value
from layerwise.training.options import (
    CacheMode,
    Keep,
    Precision,
    check_options,
    check_same_run,
    find_optimizer,
)
from layerwise.training.processes import (
    gather_objects,
    joined,
    open_accelerator,
    sum_over_processes,
    to_device,
)
from layerwise.training.progress import Reporter
from layerwise.training.randomness import get_random_state, set_random_state
from layerwise.training.result import Result
from layerwise.training.run_folder import (
    create_run,
    finish_run,
    hold_run,
    read_run,
    require_free,
    write_audit,
)
from layerwise.training.standing import Best, Standing
from layerwise.training.tasks import Scores, Task, split_batch
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
    total_steps = tuner.total_steps
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

    # What changes during the run, and how it is saved and put back.
    history, now = History(None), Standing()
    go_on = "" if folder is None else f"go on with it: {resume_command(folder)}"
    described = ""  # what was said of the cache last
    notes: list[str] = []

    def save(*, inside: bool) -> None:
        """Write a checkpoint of the moment; `inside` says that the epoch at hand is not over."""
        randoms = gather_objects(accelerator, get_random_state())
        if folder is None or not accelerator.is_main_process:
            return
        state = {
            "model": model.state_dict(),
            "tuner": tuner.state_dict(),
            "random": randoms,
            "history": history.entries,
            **now.to_state(inside=inside, with_random=not batches.exact),
        }
        save_checkpoint(folder / "checkpoints", tuner.step_count, state, keep=keep_checkpoints)

    if previous is not None:
        state = previous.state
        model.load_state_dict(state["model"])
        tuner.load_state_dict(state["tuner"])
        now = Standing.from_state(state)
        over = now.stopped_early or tuner.done
        if finished := before.get("result") and over:  # a finished run is only read
            written, now.best.sha256 = None, now.best.sha256 or before.get("weights_sha256")
            notes.append(f"{folder} was finished already: nothing is trained, this is its result")
        if not over and (lost := now.forget_lost_weights(weights_file(cast(Path, folder)))):
            notes.append(lost)
        history = History(None if written is None else written / "history.jsonl", state["history"])
        set_random_state(state["random"][rank if rank < len(state["random"]) else 0])
        notes += [] if finished else [f"resumed from {previous.path} (step {previous.step})"]
        notes += previous.skipped
    elif folder is not None:
        history = History(None if written is None else written / "history.jsonl")
        save(inside=False)

    began_steps = tuner.step_count
    reporter = Reporter(
        enabled=progress and accelerator.is_main_process,
        total_steps=total_steps,
        total_epochs=tuner.total_epochs,
        done_steps=tuner.step_count,
    )
    for note in notes:
        reporter.say(note)

    learns = setup.names_that_learn(tuner)
    watched = watch(model, optimizer=tuner.optimizer, trained=learns) if audit else None
    enter_phase = partial(setup.enter_phase, model, tuner, task, batches, train, share, watched, written)
    with (
        Interrupt() as interrupt,
        reporter,
        explained(lambda: tuner.step_count, out=folder, precision=precision),
        watched or contextlib.nullcontext(),
        without_key_cache(model),
        prefix or contextlib.nullcontext(),
        contextlib.nullcontext() if written is None else hold_run(written),
    ):
        runner: nn.Module = model
        wrapped_for = frozenset[str]()
        for epoch in () if now.stopped_early else tuner.epochs():
            began_s = time.perf_counter()
            now.begin(epoch, tuner.phase.name, get_random_state())
            model.train()
            phase, rates = now.within.phase or tuner.phase.name, tuner.rates()  # "" of older checkpoints
            start = now.within.batch  # above 0 where a checkpoint inside this epoch was loaded
            batches.begin(epoch, start)  # before a phase measures statistics on the data
            enter_phase()
            stream = batches.epoch(epoch, start, random_state=now.began_random, cache=prefix)
            for index, batch in enumerate(stream, start):
                if index == count:
                    warn(
                        f"the training loader gives more than the {count} batches that its length tells; the "
                        "epoch ends without the others. Correct the __len__ of its data set, or give each "
                        "worker a share of the data."
                    )
                    break
                if world > 1 and wrapped_for != tuner.trainable_names():  # DDP must know what learns now
                    runner, wrapped_for = joined(accelerator, model), tuner.trainable_names()
                batch = to_device(batch, accelerator.device)
                with accelerator.autocast():
                    output = task.forward(runner, batch)
                    loss = task.loss(output, batch)
                value = finite_loss(
                    loss,
                    batch,
                    step=tuner.step_count,
                    epoch=epoch,
                    index=index,
                    out=folder,
                    precision=precision,
                    clip_norm=clip_norm,
                )
                if index % accumulate == 0:
                    window = Window(accelerator, batches=min(accumulate, count - index))
                size = task.size(batch)
                window.backward(loss, size)
                now.within.add(value, size)
                if (index + 1) % accumulate and index + 1 < count:
                    continue

                window.close(model)
                if clip_norm is not None:
                    accelerator.clip_grad_norm_(model.parameters(), clip_norm)
                phase_index, rates = tuner.phase_index, tuner.rates()
                tuner.step()
                reporter.step(epoch=epoch, phase=phase, step=tuner.step_count, loss=value, rates=rates)
                if tuner.done:
                    break
                if index + 1 == count:
                    continue  # the end of the epoch is saved below, with its validation
                changed = tuner.phase_index != phase_index
                every = checkpoint_every_steps
                due = every is not None and tuner.step_count % every == 0
                if due or changed or interrupt.requested:
                    check_weights(model, step=tuner.step_count, out=folder, clip_norm=clip_norm)
                    save(inside=True)
                    interrupt.raise_if_requested(go_on)
                if changed:  # after the checkpoint: resuming from it enters the phase
                    enter_phase()

            del stream  # a plan by steps may end inside an epoch; then the cache lets go of the model
            tuner.optimizer.zero_grad()  # of a window that a loader with fewer batches than it told left open
            check_weights(model, step=tuner.step_count, out=folder, clip_norm=clip_norm)  # they may be kept
            if prefix is not None:
                told = without_remedies(prefix.decision_text)  # they are for those who hold the cache
                if told not in ("", described):
                    described = told
                    reporter.say(told)
            scores = Scores({})
            if held_out is not None:
                scores = evaluate(
                    model,
                    held_out,
                    task,
                    device=accelerator.device,
                    autocast=accelerator.autocast,
                    on_batch=lambda: interrupt.tell_what_is_waited_for(reporter.say),
                    cache=prefix,
                )
            monitored = monitored_value(scores, task)
            steps = tuner.step_in_epoch
            tuner.end_epoch(monitored, mode=task.mode)
            loss_sum, size = sum_over_processes(accelerator, now.within.loss_sum, now.within.samples)
            entry = {
                "epoch": epoch,
                "phase": phase,
                "step": tuner.step_count,
                "steps": steps,
                "train_loss": loss_sum / size if size else 0.0,
                **{name_of(metric): value for metric, value in scores.values.items()},
                "rates": rates,
            }
            if note := not_finite(scores.values, f"validation of epoch {epoch + 1}"):
                entry["note"] = note
                reporter.say(note)
            history.append(entry)
            accelerator.log({k: v for k, v in entry.items() if isinstance(v, float)}, step=tuner.step_count)
            losses = {"loss": scores.values.get("loss"), "than_loss": now.best.metrics.get("loss")}
            if (
                monitored is None
                or keep == "last"
                or is_better(monitored, now.best.value, task.mode, **losses)
            ):
                now.best = Best.of(epoch, task.monitor, scores)
                if folder is None and keep == "best" and held_out is not None:
                    now.kept = {name: t.detach().clone() for name, t in model.state_dict().items()}
                elif folder is not None and accelerator.is_main_process:
                    now.best.sha256 = save_weights(model, weights_file(folder))
            if early_stopping is not None and monitored is not None:
                monitors = history.values(task.monitor)
                now.stopped_early = has_stalled(monitors, task.mode, patience_epochs=early_stopping)
            now.timings.append({"epoch": epoch, "seconds": time.perf_counter() - began_s})
            save(inside=False)
            reporter.epoch(
                entry,
                monitor=name_of(task.monitor),
                steps_left=total_steps - tuner.step_count,
                seconds=now.timings[-1]["seconds"],
            )
            interrupt.raise_if_requested(go_on)
            if on_epoch is not None:
                on_epoch(entry)
            if now.stopped_early:
                patience = plural(early_stopping or 0, "epoch")
                reporter.say(f"stopped early: {task.monitor} did not improve for {patience}")
                break

    # The kept weights, the test data, and the record.
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
                model,
                test_batches,
                task,
                device=accelerator.device,
                autocast=accelerator.autocast,
            )
    notes += history.notes()
    if tested is not None and (note := not_finite(tested.values, "test data")):
        notes.append(note)
        reporter.say(note)
    if watched is not None:
        made_steps = tuner.step_count > began_steps
        notes += setup.report_watch(watched.report, written if made_steps else None)
    notes += [described] if described else []
    result = Result(
        model=model,
        task=task,
        history=history.entries,
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

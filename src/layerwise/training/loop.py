"""`Loop`: what `fit` does once all is open: epochs of batches, their validation, what is kept and saved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from layerwise.cache.prefix import PrefixCache
from layerwise.cache.remedies import without_remedies
from layerwise.errors import plural, warn
from layerwise.training import setup
from layerwise.training.accumulating import Window
from layerwise.training.checkpoint import Checkpoint, resume_command, save_checkpoint
from layerwise.training.data import Batches
from layerwise.training.evaluate import evaluate
from layerwise.training.guard import Interrupt, check_weights, explained, finite_loss
from layerwise.training.history import History, name_of, not_finite
from layerwise.training.kept_weights import save_weights, weights_file
from layerwise.training.key_cache import without_key_cache
from layerwise.training.monitoring import has_stalled, is_better, monitored_value
from layerwise.training.options import Keep, Precision
from layerwise.training.processes import gather_objects, joined, sum_over_processes, to_device
from layerwise.training.progress import Reporter
from layerwise.training.randomness import get_random_state, set_random_state
from layerwise.training.run_folder import hold_run, read_audit, write_audit
from layerwise.training.standing import Best, Standing
from layerwise.training.tasks import Scores, Task
from layerwise.tuning.norm_layers import small_batch_warning
from layerwise.tuning.tuner import Tuner
from layerwise.tuning.watch import Watch

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Loop:
    """A run under way: what it works with, where it stands, and what it does until its plan is done.

    Attributes:
        model: trained in place, on the device of `accelerator`.
        task: what a batch means.
        tuner: carries the plan out.
        accelerator: device, precision and processes.
        batches: of training.
        count: how many of them an epoch has.
        reopen: opens the training data once more, as `open_batches` does; phases measure statistics on it.
        held_out: batches of validation; None measures nothing.
        prefix: cache of the frozen prefix; None for none.
        watched: sees what moves; None looks at nothing.
        folder: of the run; None writes nothing.
        written: the same in the process that writes; None in others, and where a finished run is only read.
        now: where the run stands.
        history: a line for each epoch.
        notes: for people, of the result.
        told_of_cache: what was said of the cache last.
        reporter: tells a person, once `run` has begun.

    The others are options of `layerwise.fit`.
    """

    model: nn.Module
    task: Task
    tuner: Tuner
    accelerator: Accelerator
    batches: Batches
    count: int
    reopen: Callable[..., Batches]
    held_out: Batches | None
    prefix: PrefixCache | None
    watched: Watch | None
    folder: Path | None
    written: Path | None
    accumulate: int
    clip_norm: float | None
    precision: Precision
    early_stopping: int | None
    keep: Keep
    checkpoint_every_steps: int | None
    keep_checkpoints: int
    progress: bool
    on_epoch: Callable[[Mapping[str, Any]], object] | None
    now: Standing = field(default_factory=Standing)
    history: History = field(default_factory=lambda: History(None))
    notes: list[str] = field(default_factory=list)
    told_of_cache: str = ""
    reporter: Reporter = field(init=False)

    def __post_init__(self) -> None:
        self._total_steps = self.tuner.total_steps  # of the whole plan: no phase has ended early yet
        self._interrupt = Interrupt()
        self._go_on = "" if self.folder is None else f"go on with it: {resume_command(self.folder)}"
        self._runner, self._runner_learns = self.model, frozenset[str]()

    # ------------------------------------------------------------------ saving and putting back

    def begin(self) -> None:
        """Write the first checkpoint of a new run, where it has a folder."""
        if self.folder is not None:
            self._open_history([])
            self._save(inside=False)

    def put_back(self, previous: Checkpoint, before: Mapping[str, Any]) -> None:
        """Put all back as a checkpoint has it; of a finished run nothing is written any more.

        Args:
            previous: the checkpoint.
            before: what ``run.json`` tells.
        """
        state, folder = previous.state, cast(Path, self.folder)
        self.model.load_state_dict(state["model"])
        self.tuner.load_state_dict(state["tuner"])
        self.now = now = Standing.from_state(state)
        over = now.stopped_early or self.tuner.done
        if finished := before.get("result") and over:
            self.written, now.best.sha256 = None, now.best.sha256 or before.get("weights_sha256")
            self.notes.append(f"{folder} was finished already: nothing is trained, this is its result")
        if not over and (lost := now.forget_lost_weights(weights_file(folder))):
            self.notes.append(lost)
        self._open_history(state["history"])
        rank = self.accelerator.process_index
        set_random_state(state["random"][rank if rank < len(state["random"]) else 0])
        self.notes += [] if finished else [f"resumed from {previous.path} (step {previous.step})"]
        self.notes += previous.skipped

    def _open_history(self, entries: list[dict[str, Any]]) -> None:
        self.history = History(None if self.written is None else self.written / "history.jsonl", entries)

    def _save(self, *, inside: bool) -> None:
        """Write a checkpoint of the moment; `inside` says that the epoch at hand is not over."""
        randoms = gather_objects(self.accelerator, get_random_state())
        if self.folder is None or not self.accelerator.is_main_process:
            return
        state = {
            "model": self.model.state_dict(),
            "tuner": self.tuner.state_dict(),
            "random": randoms,
            "history": self.history.entries,
            **self.now.to_state(inside=inside, with_random=not self.batches.exact),
        }
        step = self.tuner.step_count
        save_checkpoint(self.folder / "checkpoints", step, state, keep=self.keep_checkpoints)

    # ------------------------------------------------------------------ epochs

    def run(self) -> None:
        """Train until the plan is done, or stopped early."""
        tuner = self.tuner
        self.reporter = Reporter(
            enabled=self.progress and self.accelerator.is_main_process,
            total_steps=self._total_steps,
            total_epochs=tuner.total_epochs,
            done_steps=tuner.step_count,
        )
        for note in self.notes:
            self.reporter.say(note)
        with (
            self._interrupt,
            self.reporter,
            explained(lambda: tuner.step_count, out=self.folder, precision=self.precision),
            self.watched or contextlib.nullcontext(),
            without_key_cache(self.model),
            self.prefix or contextlib.nullcontext(),
            contextlib.nullcontext() if self.written is None else hold_run(self.written),
        ):
            for epoch in () if self.now.stopped_early else tuner.epochs():
                self._run_epoch(epoch)
                if self.now.stopped_early:
                    patience = plural(self.early_stopping or 0, "epoch")
                    self.reporter.say(f"stopped early: {self.task.monitor} did not improve for {patience}")
                    break

    def _run_epoch(self, epoch: int) -> None:
        """Train for what is left of an epoch, and validate; keep, save and tell what came of it."""
        tuner, task, now, reporter = self.tuner, self.task, self.now, self.reporter
        began_s = time.perf_counter()
        now.begin(epoch, tuner.phase.name, get_random_state())
        phase = now.within.phase or tuner.phase.name  # "" of older checkpoints
        rates = self._train_epoch(epoch, phase)
        tuner.optimizer.zero_grad()  # of a window that a loader with fewer batches than it told left open
        self._check_weights()  # they may be kept
        if self.prefix is not None:
            told = without_remedies(self.prefix.decision_text)  # they are for those who hold the cache
            if told not in ("", self.told_of_cache):
                self.told_of_cache = told
                reporter.say(told)
        scores = self._validate()
        monitored = monitored_value(scores, task)
        steps = tuner.step_in_epoch
        tuner.end_epoch(monitored, mode=task.mode)
        loss_sum, size = sum_over_processes(self.accelerator, now.within.loss_sum, now.within.samples)
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
        self.history.append(entry)
        self.accelerator.log({k: v for k, v in entry.items() if isinstance(v, float)}, step=tuner.step_count)
        self._keep_if_best(epoch, scores, monitored)
        if self.early_stopping is not None and monitored is not None:
            monitors = self.history.values(task.monitor)
            now.stopped_early = has_stalled(monitors, task.mode, patience_epochs=self.early_stopping)
        seconds = time.perf_counter() - began_s
        now.timings.append({"epoch": epoch, "seconds": seconds})
        self._save(inside=False)
        steps_left = self._total_steps - tuner.step_count
        reporter.epoch(entry, monitor=name_of(task.monitor), steps_left=steps_left, seconds=seconds)
        self._interrupt.raise_if_requested(self._go_on)
        if self.on_epoch is not None:
            self.on_epoch(entry)

    def _validate(self) -> Scores:
        if self.held_out is None:
            return Scores({})
        return evaluate(
            self.model,
            self.held_out,
            self.task,
            device=self.accelerator.device,
            autocast=self.accelerator.autocast,
            on_batch=lambda: self._interrupt.tell_what_is_waited_for(self.reporter.say),
            cache=self.prefix,
        )

    def _check_weights(self) -> None:
        check_weights(self.model, step=self.tuner.step_count, out=self.folder, clip_norm=self.clip_norm)

    def _keep_if_best(self, epoch: int, scores: Scores, monitored: float | None) -> None:
        """Keep the weights of the best epoch so far; of each, where none is measured or the last is kept."""
        now, task = self.now, self.task
        if monitored is not None and self.keep == "best":
            loss, than_loss = scores.values.get("loss"), now.best.metrics.get("loss")
            if not is_better(monitored, now.best.value, task.mode, loss=loss, than_loss=than_loss):
                return
        now.best = Best.of(epoch, task.monitor, scores)
        if self.folder is None and self.keep == "best" and self.held_out is not None:
            now.kept = {name: t.detach().clone() for name, t in self.model.state_dict().items()}
        elif self.folder is not None and self.accelerator.is_main_process:
            now.best.sha256 = save_weights(self.model, weights_file(self.folder))

    # ------------------------------------------------------------------ batches

    def _train_epoch(self, epoch: int, phase: str) -> dict[str, float]:
        """Train on the batches of an epoch that are left; return the rates of its last step.

        Args:
            epoch: its number.
            phase: name of the one in which it began.
        """
        tuner, accumulate, every = self.tuner, self.accumulate, self.checkpoint_every_steps
        self.model.train()
        rates = tuner.rates()
        start = self.now.within.batch  # above 0 where a checkpoint inside this epoch was loaded
        self.batches.begin(epoch, start)  # before a phase measures statistics on the data
        self._enter_phase()
        stream = self.batches.epoch(epoch, start, random_state=self.now.began_random, cache=self.prefix)
        for index, batch in enumerate(stream, start):
            if index == self.count:
                warn(
                    f"the training loader gives more than the {index} batches that its length tells; the "
                    "epoch ends without the others. Correct the __len__ of its data set, or give each worker "
                    "a share of the data."
                )
                break
            if index % accumulate == 0:
                window = Window(self.accelerator, batches=min(accumulate, self.count - index))
            loss = self._backward(batch, window, epoch=epoch, index=index)
            if (index + 1) % accumulate and index + 1 < self.count:
                continue

            window.close(self.model)
            if self.clip_norm is not None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), self.clip_norm)
            phase_index, rates = tuner.phase_index, tuner.rates()
            tuner.step()
            self.reporter.step(epoch=epoch, phase=phase, step=tuner.step_count, loss=loss, rates=rates)
            if tuner.done:
                break  # a plan by steps may end inside an epoch
            if index + 1 == self.count:
                continue  # the end of the epoch is saved with its validation
            changed = tuner.phase_index != phase_index
            due = every is not None and tuner.step_count % every == 0
            if due or changed or self._interrupt.requested:
                self._check_weights()
                self._save(inside=True)
                self._interrupt.raise_if_requested(self._go_on)
            if changed:  # after the checkpoint: resuming from it enters the phase
                self._enter_phase()
        return rates

    def _backward(self, batch: Any, window: Window, *, epoch: int, index: int) -> float:
        """Add the gradients of a batch to those of its window; return its loss."""
        accelerator, task = self.accelerator, self.task
        if accelerator.num_processes > 1 and self._runner_learns != self.tuner.trainable_names():
            self._runner = joined(accelerator, self.model)  # DDP must know what learns now
            self._runner_learns = self.tuner.trainable_names()
        batch = to_device(batch, accelerator.device)
        with accelerator.autocast():
            output = task.forward(self._runner, batch)
            loss = task.loss(output, batch)
        value = finite_loss(
            loss,
            batch,
            step=self.tuner.step_count,
            epoch=epoch,
            index=index,
            out=self.folder,
            precision=self.precision,
            clip_norm=self.clip_norm,
        )
        size = task.size(batch)
        window.backward(loss, size)
        self.now.within.add(value, size)
        return value

    # ------------------------------------------------------------------ phases

    def _enter_phase(self) -> None:
        """Do what a phase needs from the data and the watch: called at each epoch, and when a phase changes.

        The watch is told which statistics move on purpose. Where there is one, what is warned of goes into
        the audit of the run too; that of the first phase is there already.

        Warns:
            LayerwiseWarning: batch-norm trains in this phase on batches of 1-8 samples.
        """
        tuner, watched = self.tuner, self.watched
        if watched is not None:
            watched.expect(adapting=tuner.norms.adapting)
        if tuner.step_in_phase > 0:
            return
        size = self.batches.batch_size
        told = None if size is None else small_batch_warning(self.model, size)
        if told is not None:
            warn(f"phase {tuner.phase.name!r}: {told}")
            if self.written is not None and watched is not None and tuner.phase_index > 0:
                phases = read_audit(self.written)["phases"]
                write_audit(self.written, phases={**phases, tuner.phase.name: told})
        measured = setup.calibrate(self.model, tuner, self.task, self.reopen)
        if watched is not None:
            watched.expect(measured=measured)

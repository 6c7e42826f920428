"""A job on texts: its options, its model and data opened, and what happens around its `fit`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from layerwise.errors import DataError, ModelError
from layerwise.layers.randomness import seed_everything
from layerwise.plans.plan import Plan
from layerwise.training.checkpoint import list_checkpoints, resume_command
from layerwise.training.fit import fit
from layerwise.training.job import DEMO_DATA, Job, lay_out, option_name
from layerwise.training.known_tasks import task_of
from layerwise.training.progress import Reporter
from layerwise.training.result import Result
from layerwise.training.run_folder import LANGUAGE_MODEL, read_run
from layerwise.training.tasks import Task
from layerwise.training.transformers_folder import FOLDER, save_transformers

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap
    from layerwise.sources.opened import OpenedModel
    from layerwise.sources.text import TextData
    from layerwise.sources.texttable import TextTable
    from layerwise.training.dryrun import DryRun

DEBIAN = "demo:debian"
"""Data of this name are Debian's package descriptions; ``demo:debian:200`` says how many of each topic."""
MAX_LENGTH = 256
"""Tokens of a sample where nothing else is said; the model may take fewer."""
_OF_ALL_TEXTS = ("path_column", "max_length", "padding", "pooling", "lm_epochs", "lm_lr", "lm_strategy")
"""What can be said of texts that are no table (in vain of the paths of images, which is told)."""

_OF_TABLE = (
    "text_column",
    "pair_column",
    "label_column",
    "response_column",
    "split_column",
    "encoding",
    "label_separator",
    "prompt_template",
    "skip_bad_rows",
)
"""What is said of any table, also of one that is not split: all but the column of groups."""


@dataclass(frozen=True)
class TextOptions:
    """What a job on texts has beside the options of every job.

    Attributes:
        task: what the labels are, a key of `layerwise.sources.text.MODEL_TASKS`.
        text_column: None is ``"text"`` (``"tokens"`` for token classification).
        pair_column: of the second text of a pair.
        label_column: None is ``"label"`` (``"tags"`` for token classification).
        response_column: of what is learned of instruction data, whose prompts are in `text_column`.
        group_column: rows with one value in it stay on one side of the split.
        split_column: says train, val or test of each row.
        val: a table to validate on.
        test: a table to test on.
        encoding: of text files.
        label_separator: between the labels of a row, for several labels.
        prompt_template: how a prompt is written, with ``{prompt}`` in it.
        skip_bad_rows: leave out rows that cannot be used.
        max_length: tokens of a sample at most; None is 256, or what the model can take.
        padding: ``"auto"`` pads each sample to one of a few lengths, the same in every epoch, and makes
            batches of one length; ``"batch"`` pads each batch to its longest sample, which the prefix cache
            cannot use; ``"all"`` pads every batch to the longest sample there is.
        pooling: ``"model"`` classifies as the model's own class does, ``"mean"`` by the mean of all
            tokens (`layerwise.sources.pooled`).
        lm_epochs: first tune the language model on the texts for so many epochs (ULMFiT); 0 does not.
        lm_lr: base learning rate of that.
        lm_strategy: strategy of that.
    """

    task: str = "text_classification"
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    response_column: str | None = None
    group_column: str | None = None
    split_column: str | None = None
    val: str | None = None
    test: str | None = None
    encoding: str = "utf-8"
    label_separator: str = ","
    prompt_template: str = "{prompt}\n"
    skip_bad_rows: bool = False
    max_length: int | None = None
    padding: Literal["auto", "batch", "all"] = "auto"
    pooling: Literal["model", "mean"] = "model"
    lm_epochs: int = 0
    lm_lr: float = 5e-5
    lm_strategy: str = "discriminative:decay=0.9"

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> TextOptions:
        """Return the options in `Job.text`, without the column of images that may stand there in vain."""
        return cls(**{name: value for name, value in table.items() if name != "path_column"})

    def of_table(self) -> dict[str, Any]:
        """Return what `layerwise.sources.texttable.read_texts` is told of columns and rows."""
        return {name: getattr(self, name) for name in _OF_TABLE}

    def pad(self, data: TextData) -> None:
        """Make the parts of `data` be padded as `padding` says."""
        for part in data.parts().values():
            part.pads_samples = self.padding == "auto"
            part.pad_to = max(part.lengths) if self.padding == "all" else None


@dataclass(frozen=True)
class PreparedText:
    """A job on texts with its model and data open; the counterpart of `layerwise.training.job.Prepared`.

    Attributes:
        job: as given.
        options: what it says of texts.
        opened: the model and its tokenizer.
        table: the texts, split.
        data: the same as tokens.
        layers: the model's layer map at the plan's granularity.
        plan: what to do.
        task: what the labels mean; ``"auto"`` for one class a text.
        about: what ``run.json`` shall tell of all this.
        notes: what was chosen on the way, for people.
    """

    job: Job
    options: TextOptions
    opened: OpenedModel
    table: TextTable
    data: TextData
    layers: LayerMap
    plan: Plan
    task: Task | Literal["auto"]
    about: dict[str, Any]
    notes: tuple[str, ...]

    def fit(self, *, out: str | Path | None = None, resume: bool = False, **more: Any) -> Result:
        """Carry the job out: the language model first where it is asked for, then the task.

        With `out` the tuned model also lies there as a transformers folder (``transformers/``), and the
        language model's run in ``language-model/``. Interrupted in that, the job goes on when it is started
        again, or with `layerwise.training.resuming.resume_job`; interrupted later, with `resume` or that.

        Args:
            out: folder of the run.
            resume: go on with the run in it.
            more: further options of `layerwise.fit`.
        """
        folder = None if out is None else Path(out)
        notes: list[str] = []
        begun = resume and folder is not None and bool(list_checkpoints(folder / "checkpoints"))
        if self.options.lm_epochs and not begun:
            from layerwise.training.language_first import tune_language_model

            below = None if folder is None else folder / LANGUAGE_MODEL
            reporter = Reporter(enabled=more.get("progress", True), total_steps=0, total_epochs=0)
            try:
                notes += tune_language_model(self, out=below, say=reporter.say, **more)
            except KeyboardInterrupt as error:
                how = "" if folder is None else f"; go on with it: {resume_command(folder)}"
                raise KeyboardInterrupt(f"that was the language model's part{how}") from error
        result = fit(
            self.opened.model,
            self.data.train,
            self.data.val,
            test=self.data.test,
            plan=self.plan,
            layers=self.layers,
            task=self.task,
            classes=self.data.classes or None,
            about=self.about,
            out=folder,
            resume=resume,
            **{**self.job.options, **more},
        )
        from accelerate import PartialState  # fit has made it

        if folder is not None and PartialState().is_main_process:
            tokenizer = self.opened.tokenizer
            save_transformers(result.model, folder / FOLDER, tokenizer=tokenizer, task=result.task)
        return dataclasses.replace(result, notes=(*notes, *result.notes))

    def dry_run(self) -> DryRun:
        """Return what the job would do, measured on a few steps; the language model's part left out."""
        from layerwise.training.dryrun import dry_run

        return dry_run(
            self.opened.model,
            self.data.train,
            self.data.val,
            plan=self.plan,
            layers=self.layers,
            task=self.task,
            classes=self.data.classes or None,
            **self.job.options,
        )


def prepare_text(job: Job, *, plan: Plan | None = None) -> PreparedText:
    """Open the model and the texts of a job, and lay out its plan.

    The new head is initialised from ``job.seed``, so two calls give the same model.

    Args:
        job: with `Job.text`.
        plan: to use instead of the job's strategy.

    Raises:
        LayerwiseError: model, tokenizer, texts or plan cannot be opened, or do not fit each other.
    """
    from layerwise.plans.parsing import check_strategy
    from layerwise.sources.models import open_model
    from layerwise.sources.opened import in_order_of_outputs
    from layerwise.sources.pooled import mean_pooled
    from layerwise.sources.text import MODEL_TASKS, encode

    given = job.text or {}
    unused = {
        "--augment": job.augment != "none",
        "--skip-bad-images": job.skip_bad_images,
        "--input-size": job.input_size is not None,
        "--path-column": given.get("path_column") is not None,
    }
    options = TextOptions.of(given)
    if options.lm_epochs:  # what is quick to find wrong comes first
        check_strategy(options.lm_strategy, epochs=options.lm_epochs)
    if not job.model.startswith("hf:"):
        raise ModelError(
            f"texts need a model that brings its tokenizer; {job.model!r} does not. Give hf:FOLDER_OR_ID."
        )
    if (
        options.pooling == "mean"
        and MODEL_TASKS.get(cast(Any, options.task), ("",))[0] != "text_classification"
    ):
        raise ModelError(
            f"pooling 'mean' is for whole texts; the task is {options.task!r}. Leave pooling out."
        )
    table = open_texts(job, options)
    seed_everything(job.seed)
    model_task, problem = MODEL_TASKS[table.task]
    outputs = len(table.classes) or (1 if table.task == "regression" else None)
    opened = open_model(
        job.model,
        num_classes=outputs,
        weights=job.weights,
        pretrained=job.pretrained,
        mismatched=cast(Any, job.mismatched),
        task=cast(Any, model_task),
        problem=problem,
    )
    if options.pooling == "mean":
        opened = mean_pooled(opened)
    else:
        classes, told = in_order_of_outputs(table.classes, opened)
        table = dataclasses.replace(table, classes=classes, notes=(*table.notes, *told))
    data = encode(table, opened.tokenizer, max_length=length_for(options, opened))
    layers, plan = lay_out(job, opened, plan)
    options.pad(data)
    about = {
        "model": {**opened.to_dict(), "pooling": options.pooling},
        "data": {
            "source": job.data,
            "task": data.task,
            "classes": list(data.classes),
            "samples": {name: len(part) for name, part in data.parts().items()},
            "digest": {name: part.fingerprint()[:16] for name, part in data.parts().items()},
            "max_length": data.max_length,
            "pad_to": data.train.pad_to,
            "truncated": data.truncated,
            "skipped": [list(entry) for entry in data.skipped],
        },
        "job": dataclasses.asdict(job),
    }
    task: Task | Literal["auto"] = task_of(data.train) or "auto"
    skipped = [f"left out {row}: {reason}" for row, reason in data.skipped]
    ignored = [
        f"{name} is for images; {job.model} reads texts, so it is not used" for name in unused if unused[name]
    ]
    ignored += _not_used(given, options)
    notes = (*ignored, *opened.notes, *data.notes, *skipped)
    return PreparedText(job, options, opened, table, data, layers, plan, task, about, notes)


def _not_used(given: Mapping[str, Any], options: TextOptions) -> list[str]:
    """Return a line for each option of texts that was given in vain."""
    found = []
    if options.task in ("causal_lm", "masked_lm") and "label_column" in given:
        found.append(f"--label-column is for labels; the task {options.task!r} has none, so it is not used")
    if options.task != "multi_label" and "label_separator" in given:
        found.append(f"--label-separator is for the task 'multi_label', not {options.task!r}; it is not used")
    if not options.lm_epochs:
        names = (name for name in ("lm_lr", "lm_strategy") if name in given)
        found += [
            f"--{name.replace('_', '-')} is for --lm-epochs, of which there are none; it is not used"
            for name in names
        ]
    return found


def length_for(options: TextOptions, opened: OpenedModel) -> int:
    """Return how many tokens a sample has at most.

    Raises:
        DataError: more are asked for than the model can take.
    """
    limit = opened.max_length
    if options.max_length is None:
        return MAX_LENGTH if limit is None else min(MAX_LENGTH, limit)
    if limit is not None and options.max_length > limit:
        raise DataError(
            f"--max-length is {options.max_length}, and {opened.spec!r} takes {limit} tokens at most. "
            f"Give {limit} or fewer."
        )
    return options.max_length


def open_texts(job: Job, options: TextOptions) -> TextTable:
    """Return the texts of a job, checked and split.

    Raises:
        DataError: they cannot be read or split, or are named and options of a table are given.
    """
    from layerwise.sources.debian import debian_texts
    from layerwise.sources.splits import fracs_to_split
    from layerwise.sources.texttable import read_texts

    if job.data.startswith(DEMO_DATA):
        raise DataError(
            f"data {job.data!r} are images, and {job.model!r} reads texts. Give a table of texts, or a model "
            "of images (timm:, torchvision:)."
        )
    if job.data.startswith(DEBIAN):
        count = job.data.removeprefix(DEBIAN).lstrip(":")
        if count and not count.isdecimal():
            raise DataError(
                f"data {job.data!r}: expected {DEBIAN} or {DEBIAN}:NUMBER of texts of each topic."
            )
        if of_tables := [option_name(name) for name in job.text or {} if name not in _OF_ALL_TEXTS]:
            raise DataError(
                f"{', '.join(of_tables)}: {job.data!r} is no table. Leave it out, or give a table."
            )
        table = debian_texts(seed=job.seed, per_section=int(count or 200))
        _, unused = fracs_to_split(table.parts, val_frac=job.val_frac, test_frac=job.test_frac)
        return dataclasses.replace(table, notes=(*table.notes, *unused))
    return read_texts(
        job.data,
        task=cast(Any, options.task),
        group_column=options.group_column,
        val=options.val,
        test=options.test,
        val_frac=job.val_frac,
        test_frac=job.test_frac,
        seed=job.seed,
        **options.of_table(),
    )


def stage_exists(folder: Path | None) -> bool:
    """Return whether a run was begun in `folder`."""
    return folder is not None and (folder / "run.json").is_file() and bool(read_run(folder))

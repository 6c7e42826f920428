"""``layerwise fit``: train a model as a plan says, or go on with a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from layerwise.cli import text
from layerwise.cli.options import refuse, require_one_plan
from layerwise.cli.output import (
    JsonFlag,
    above_zero,
    check_output,
    friendly,
    given_options,
    print_json,
    print_table,
    say,
    seed_of_all,
    share,
)
from layerwise.errors import plural

if TYPE_CHECKING:
    from layerwise.training.job import Job
    from layerwise.training.result import Result

Granularity = Literal["stages", "blocks", "layers"]
_MODEL = "Model"
_DATA = "Data"
_PLAN = "Plan"
_TRAINING = "Training"
_ALSO_RESUMED = {"resume", "workers", "cache", "cache_folder", "as_json"}
"""Parameters that may be given beside ``--resume``: they do not shape the result."""


@friendly
def fit(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Option(
            help="timm:NAME, torchvision:NAME, hf:PATH_OR_ID or file.py:function.", rich_help_panel=_MODEL
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Weights file (.safetensors, .pth) to start from.", rich_help_panel=_MODEL),
    ] = None,
    mismatched: Annotated[
        Literal["error", "drop_head"],
        typer.Option(help="Weights for other classes: refuse, or leave their head.", rich_help_panel=_MODEL),
    ] = "error",
    pretrained: Annotated[
        bool, typer.Option(help="Start from the library's pretrained weights.", rich_help_panel=_MODEL)
    ] = True,
    input_size: Annotated[
        int | None,
        typer.Option(help="Side of the images in pixels.", min=1, max=10**9, rich_help_panel=_MODEL),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Folder with a folder of images a class, or a table of paths; for hf: text models of texts.",
            metavar="PATH",
            rich_help_panel=_DATA,
        ),
    ] = None,
    val_frac: Annotated[
        float,
        typer.Option(
            help="Share to validate on, where there is no val folder.", callback=share, rich_help_panel=_DATA
        ),
    ] = 0.2,
    test_frac: Annotated[
        float,
        typer.Option(
            help="Share to test on, where there is no test folder.", callback=share, rich_help_panel=_DATA
        ),
    ] = 0.0,
    augment: Annotated[
        str, typer.Option(help="none, flip, light, randaugment, trivialaugment.", rich_help_panel=_DATA)
    ] = "none",
    skip_bad_images: Annotated[
        bool,
        typer.Option(
            "--skip-bad-images", help="Leave out images that cannot be read.", rich_help_panel=_DATA
        ),
    ] = False,
    task: text.Task = None,
    text_column: text.TextColumn = None,
    pair_column: text.PairColumn = None,
    path_column: text.PathColumn = None,
    label_column: text.LabelColumn = None,
    response_column: text.ResponseColumn = None,
    group_column: text.GroupColumn = None,
    split_column: text.SplitColumn = None,
    val_data: text.ValData = None,
    test_data: text.TestData = None,
    encoding: text.Encoding = None,
    label_separator: text.LabelSeparator = None,
    skip_bad_rows: text.SkipBadRows = False,
    max_length: text.MaxLength = None,
    padding: text.Padding = None,
    pooling: text.Pooling = None,
    lm_epochs: text.LmEpochs = None,
    lm_lr: text.LmLr = None,
    lm_strategy: text.LmStrategy = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            help="A strategy with its options, like 'top_k:k=2'; or 'auto': advice and a short search.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    budget_minutes: Annotated[
        float | None,
        typer.Option(help="For auto: what all may take.", callback=above_zero, rich_help_panel=_PLAN),
    ] = None,
    search_share: Annotated[
        float,
        typer.Option(
            help="For auto: share of the budget for the search; 8 trials without a budget, none for 0.",
            min=0,
            max=1,
            rich_help_panel=_PLAN,
        ),
    ] = 0.5,
    plan: Annotated[
        Path | None, typer.Option(help="A plan file, from layerwise plan.", rich_help_panel=_PLAN)
    ] = None,
    granularity: Annotated[
        Granularity, typer.Option(help="What one layer group is.", rich_help_panel=_PLAN)
    ] = "blocks",
    epochs: Annotated[
        int | None, typer.Option(help="Length of the plan.", min=1, rich_help_panel=_PLAN)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, linear, cosine, ...", rich_help_panel=_PLAN)
    ] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            help="Batch-norm policy: follow, freeze, ...; with settings: '{policy: adapt, momentum: 0.05}'.",
            rich_help_panel=_PLAN,
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the new run.", rich_help_panel=_TRAINING)
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="A run to go on with; it knows all other options.", rich_help_panel=_TRAINING),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what would learn when, time and memory.", rich_help_panel=_TRAINING
        ),
    ] = False,
    lr: Annotated[
        float, typer.Option(help="Base learning rate.", callback=above_zero, rich_help_panel=_TRAINING)
    ] = 1e-3,
    optimizer: Annotated[
        str,
        typer.Option(help="adamw, adam, sgd, nadam, radam, rmsprop, adafactor.", rich_help_panel=_TRAINING),
    ] = "adamw",
    weight_decay: Annotated[
        float | None,
        typer.Option(
            help="The optimiser's own by default; none on norms and biases.", min=0, rich_help_panel=_TRAINING
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Samples of one forward pass.", min=1, rich_help_panel=_TRAINING)
    ] = 32,
    drop_last: Annotated[
        bool, typer.Option("--drop-last", help="Leave out a smaller last batch.", rich_help_panel=_TRAINING)
    ] = False,
    seed: Annotated[
        int,
        typer.Option(
            help="Of split, new head, order and augmentation.",
            callback=seed_of_all,
            rich_help_panel=_TRAINING,
        ),
    ] = 0,
    precision: Annotated[
        Literal["fp32", "bf16", "fp16"],
        typer.Option(help="Of the forward pass; fp16 needs a GPU.", rich_help_panel=_TRAINING),
    ] = "fp32",
    accumulate: Annotated[
        int, typer.Option(help="Batches for one optimiser step.", min=1, rich_help_panel=_TRAINING)
    ] = 1,
    clip_norm: Annotated[
        float | None,
        typer.Option(help="Largest norm of all gradients.", callback=above_zero, rich_help_panel=_TRAINING),
    ] = None,
    class_weights: Annotated[
        Literal["balanced"] | None, typer.Option(help="Weigh rare classes more.", rich_help_panel=_TRAINING)
    ] = None,
    sampler: Annotated[
        Literal["weighted"] | None,
        typer.Option(help="Draw all classes equally often.", rich_help_panel=_TRAINING),
    ] = None,
    label_smoothing: Annotated[
        float,
        typer.Option(
            help="Share of each target spread over all classes.", callback=share, rich_help_panel=_TRAINING
        ),
    ] = 0.0,
    early_stopping: Annotated[
        int | None,
        typer.Option(
            help="Stop after so many epochs without a better one.", min=1, rich_help_panel=_TRAINING
        ),
    ] = None,
    keep: Annotated[
        Literal["best", "last"],
        typer.Option(help="Which epoch's weights to keep.", rich_help_panel=_TRAINING),
    ] = "best",
    checkpoint_every_steps: Annotated[
        int | None, typer.Option(help="Also inside epochs.", min=1, rich_help_panel=_TRAINING)
    ] = None,
    keep_checkpoints: Annotated[
        int, typer.Option(help="How many of the last ones stay.", min=1, rich_help_panel=_TRAINING)
    ] = 2,
    cache: Annotated[
        Literal["auto", "memory", "disk", "off"],
        typer.Option(help="Where outputs of the frozen part are kept.", rich_help_panel=_TRAINING),
    ] = "auto",
    cache_folder: Annotated[
        Path | None,
        typer.Option(help="Keep them here for later runs (layerwise cache ls).", rich_help_panel=_TRAINING),
    ] = None,
    workers: Annotated[
        int, typer.Option(help="Processes that load images.", min=0, rich_help_panel=_TRAINING)
    ] = 0,
    tracker: Annotated[
        str | None, typer.Option(help="tensorboard, wandb, ...", rich_help_panel=_TRAINING)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Fine-tune a model on images or texts as a plan says; or resume a run.

    layerwise fit --model timm:resnet18 --data photos --strategy top_k:k=2 --out runs/a

    layerwise fit --model hf:FOLDER --data a.csv --label-column topic --strategy ulmfit --out runs/b
    """
    given = {"--model": model, "--data": data, "--out": out}
    if resume is not None:
        named = given_options(context)
        if extra := [option for name, option in named.items() if name not in _ALSO_RESUMED]:
            raise typer.BadParameter(
                f"a resumed run goes on as it began, so {', '.join(extra)} cannot be given beside --resume "
                "(only --workers, --cache, --cache-folder and --json). For others start a new run: --out."
            )
        from layerwise.training.resuming import resume_job

        more: dict[str, Any] = {"cache": cache} if "cache" in named else {}
        more |= {"cache_folder": cache_folder} if "cache_folder" in named else {}
        _show(resume_job(resume, say=say, workers=workers, **more), as_json)
        return
    if missing := [n for n, v in given.items() if v is None and not (dry_run and n == "--out")]:
        raise typer.BadParameter(
            f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing (or --resume RUN)."
        )
    require_one_plan(context, strategy, plan)
    if weights is None:
        refuse(context, ["mismatched"], "it is for the file of --weights, which is not given")
    if strategy == "auto" and dry_run:
        raise typer.BadParameter(
            "--dry-run shows a plan, and auto has to look for one first. See the advice: layerwise advise "
            "MODEL --data DATA -o plan.yaml; then give --plan plan.yaml --dry-run."
        )
    if strategy != "auto":
        refuse(context, ["budget_minutes", "search_share"], "only --strategy auto searches")

    from layerwise.training.job import Job, data_name

    options: dict[str, Any] = {
        "lr": lr,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
        "drop_last": drop_last,
        "seed": seed,
        "precision": precision,
        "accumulate": accumulate,
        "clip_norm": clip_norm,
        "class_weights": class_weights,
        "sampler": sampler,
        "label_smoothing": label_smoothing,
        "early_stopping": early_stopping,
        "keep": keep,
        "checkpoint_every_steps": checkpoint_every_steps,
        "keep_checkpoints": keep_checkpoints,
        "cache": cache,
        "cache_folder": None if cache_folder is None else str(cache_folder.resolve()),
    }
    job = Job(
        model=str(model),
        data=data_name(str(data)),
        strategy=strategy,
        plan=None if plan is None else str(plan.resolve()),
        weights=None if weights is None else str(weights.resolve()),
        mismatched=mismatched,
        pretrained=pretrained,
        granularity=granularity,
        epochs=epochs,
        schedule=schedule,
        norms=norms,
        input_size=input_size,
        val_frac=val_frac,
        test_frac=test_frac,
        augment=augment,
        skip_bad_images=skip_bad_images,
        options=options,
        text=text.text_options(
            task=task,
            text_column=text_column,
            pair_column=pair_column,
            path_column=path_column,
            label_column=label_column,
            response_column=response_column,
            group_column=group_column,
            split_column=split_column,
            val=val_data,
            test=test_data,
            encoding=encoding,
            label_separator=label_separator,
            skip_bad_rows=skip_bad_rows,
            max_length=max_length,
            padding=padding,
            pooling=pooling,
            lm_epochs=lm_epochs,
            lm_lr=lm_lr,
            lm_strategy=lm_strategy,
        ),
    )
    if dry_run:
        _dry_run(job, workers, as_json)
    else:
        budget = {"budget_minutes": budget_minutes, "search_share": search_share}
        _show(_start(job, Path(str(out)), budget, workers=workers, trackers=tracker), as_json)


def _start(job: Job, out: Path, budget: dict[str, Any], **more: Any) -> Result:
    """Run a new job; `budget` are the options of a strategy "auto"."""
    from layerwise.training.job import open_job
    from layerwise.training.processes import check_trackers
    from layerwise.training.run_folder import require_free

    check_trackers(more["trackers"])
    require_free(out, data=job.data)  # before a model is downloaded or an image is read
    check_output(out, "--out", folder=True)
    auto = job.strategy == "auto"
    # The thresholds of the advice were measured by stages; the strategy is only a place holder.
    first = dataclasses.replace(job, strategy="full", granularity="stages") if auto else job
    prepared = open_job(first, **more)
    for note in prepared.notes:
        say(note)
    if auto:
        from layerwise.choosing.auto import choose_plan

        prepared = choose_plan(prepared, **budget, say=say)
    return prepared.fit(out=out, **more)


def _dry_run(job: Job, workers: int, as_json: bool) -> None:
    from layerwise.training.job import open_job

    prepared = open_job(job, workers=workers)
    for note in prepared.notes:
        say(note)
    if epochs := (job.text or {}).get("lm_epochs"):
        say(f"not in what follows: {plural(epochs, 'epoch')} of the language model (--lm-epochs) before it")
    found = prepared.dry_run()
    if as_json:
        print_json(found.to_dict())
    else:
        print_table(found)


def _show(result: Result, as_json: bool) -> None:
    from layerwise.cli.tables import result_tables

    if as_json:
        print_json({**result.to_dict(), "history": result.history})
        return
    for table in result_tables(result):
        print_table(table)

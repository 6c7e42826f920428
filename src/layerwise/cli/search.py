"""``layerwise search``: plans tested against each other, on one shared frozen prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from layerwise.cli.options import (
    BatchSizeOption,
    MetricOption,
    TaskOptions,
    ValFracOption,
    numbers,
    with_task,
)
from layerwise.cli.output import (
    JsonFlag,
    above_zero,
    check_output,
    friendly,
    print_json,
    print_table,
    say,
    share,
)
from layerwise.errors import figure

_BUDGET = "Budget"
_SPACE = "What is tried"


@friendly
@with_task
def search(
    task: TaskOptions,
    out: Annotated[Path, typer.Option(help="Folder: trials, the plan, and the winner's run.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many trials; 20.", rich_help_panel=_BUDGET)
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(help="Stop this process after so long.", callback=above_zero, rich_help_panel=_BUDGET),
    ] = None,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each depth's best setting.", rich_help_panel=_BUDGET)
    ] = 1,
    depths: Annotated[
        str | None,
        typer.Option(help="Numbers of groups that learn, like 1,2,4; about six.", rich_help_panel=_SPACE),
    ] = None,
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="A strategy to try besides; may be repeated.", rich_help_panel=_SPACE),
    ] = None,
    lr: Annotated[
        str, typer.Option(help="Lowest and highest base rate.", rich_help_panel=_SPACE)
    ] = "1e-4,1e-2",
    decay: Annotated[
        str, typer.Option(help="Lowest and highest decay a group.", rich_help_panel=_SPACE)
    ] = "0.7,1",
    epochs: Annotated[int, typer.Option(min=1, help="Of every trial.", rich_help_panel=_SPACE)] = 5,
    metric: MetricOption = None,
    storage: Annotated[
        str | None, typer.Option(help="Journal file or Optuna storage URL; several workers share one.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the study in the storage.")] = "search",
    batch_size: BatchSizeOption = 32,
    class_weights: Annotated[
        Literal["balanced"] | None, typer.Option(help="Weigh rare classes more.")
    ] = None,
    val_frac: ValFracOption = 0.2,
    test_frac: Annotated[
        float, typer.Option(help="Share to test on, without a test folder.", callback=share)
    ] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Also draw accuracy against depth (.png, .svg).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find freeze depth, learning rate and decay by trials; go on with a search that was interrupted.

    layerwise search timm:resnet18 --data photos --out searches/a --minutes 10 --plot curve.png
    """
    check_output(out, "--out", folder=True, outside=task.data)
    check_output(plot, "--plot")
    from layerwise.choosing.named import fit_options
    from layerwise.choosing.search import require_own
    from layerwise.choosing.search import search as run
    from layerwise.choosing.space import check_space
    from layerwise.report.pictures import check_picture, depth_picture, save_picture
    from layerwise.training.transformers_folder import FOLDER, save_transformers

    if plot is not None:
        check_picture(plot)
    counts = None if depths is None else numbers(depths, "--depths", least=1)
    rates, decays = _range(lr, "--lr"), _range(decay, "--decay")
    check_space(strategies=strategy or (), lr=rates, decay=decays)
    require_own(out)
    prepared = task.open(val_frac=val_frac, test_frac=test_frac)
    # so that the winner's run knows how to build its model; the job would be another one to resume
    about = {**{name: prepared.about[name] for name in ("model", "data")}, "table": prepared.job.text}
    options = {**fit_options(prepared), "about": about}
    if class_weights is not None:
        options["class_weights"] = class_weights
    try:
        found = run(
            prepared.opened.model,
            prepared.data.train,
            prepared.data.val,
            test=prepared.data.test,
            trials=trials,
            minutes=minutes,
            seeds=seeds,
            depths=counts,
            strategies=strategy or (),
            lr=rates,
            decay=decays,
            epochs=epochs,
            out=out,
            storage=storage,
            name=name,
            metric=metric,
            layers=prepared.layers,
            batch_size=batch_size,
            fit_options=options,
            seed=task.seed,
            say=say,
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("finished trials are kept; the same command goes on.") from None
    tokenizer, tuned = prepared.opened.tokenizer, found.run
    if tokenizer is not None and tuned is not None and tuned.out is not None:
        save_transformers(tuned.model, tuned.out / FOLDER, tokenizer=tokenizer, task=tuned.task)
    if plot is not None:
        say(f"wrote {save_picture(depth_picture(found.to_dict()['curve'], metric=found.metric), plot)}")
    if as_json:
        print_json(found.to_dict())
        return
    from layerwise.choosing.search_result import CURVE_COLUMNS
    from layerwise.cli.tables import new_table

    table = new_table(
        f"Best setting of each choice, by {found.metric} on the validation data",
        [found.metric.replace("_", " ") if name == "metric" else name for name in CURVE_COLUMNS],
        left=2,
        spare=1,
    )
    for point in found.curve:
        choice, *cells = point.cells()
        table.add_row(choice + (" *" if point == found.best else ""), *cells)
    print_table(table)
    best = found.best
    error = f" ± {figure(best.error)}" if best.seeds > 1 else ""
    typer.echo(f"* best: {best.described}: {found.metric} {figure(best.mean)}{error}")
    if found.run is not None and found.run.test:
        measured = ", ".join(f"{key} {figure(value)}" for key, value in found.run.test.items())
        typer.echo(f"its run on the test data: {measured}")
    typer.echo(found.counted)
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"plan: {out / 'plan.yaml'}" + (f"; run: {found.run.out}" if found.run is not None else ""))


def _range(text: str, option: str) -> tuple[float, float]:
    parts = numbers(text, option, kind=float)
    if len(parts) not in (1, 2):
        raise typer.BadParameter(f"{option} is {text!r}; expected one number or two, like 1e-4,1e-2.")
    return parts[0], parts[-1]

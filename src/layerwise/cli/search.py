"""``layerwise search``: plans tested against each other, on one shared frozen prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from layerwise.cli import text
from layerwise.cli.diagnose import DataOption, GranularityOption, ModelArgument, SizeOption, WeightsOption
from layerwise.cli.output import JsonFlag, friendly, print_json, print_table, say

_BUDGET = "Budget"
_SPACE = "What is tried"


@friendly
def search(
    model: ModelArgument,
    data: DataOption,
    out: Annotated[Path, typer.Option(help="Folder: trials, the plan, and the winner's run.")],
    trials: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many trials; 20.", rich_help_panel=_BUDGET)
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Stop this process after so long.", rich_help_panel=_BUDGET)
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
    metric: Annotated[str, typer.Option(help="Of the validation data.")] = "balanced_accuracy",
    storage: Annotated[
        str | None, typer.Option(help="Journal file or Optuna storage URL; several workers share one.")
    ] = None,
    name: Annotated[str, typer.Option(help="Of the study in the storage.")] = "search",
    text_column: text.TextColumn = None,
    label_column: text.LabelColumn = None,
    pair_column: text.PairColumn = None,
    max_length: text.MaxLength = None,
    weights: WeightsOption = None,
    input_size: SizeOption = None,
    granularity: GranularityOption = "stages",
    batch_size: Annotated[int, typer.Option(min=1)] = 32,
    class_weights: Annotated[
        Literal["balanced"] | None, typer.Option(help="Weigh rare classes more.")
    ] = None,
    val_frac: Annotated[float, typer.Option(help="Share to validate on, without a val folder.")] = 0.2,
    test_frac: Annotated[float, typer.Option(help="Share to test on, without a test folder.")] = 0.0,
    seed: Annotated[int, typer.Option()] = 0,
    plot: Annotated[Path | None, typer.Option(help="Also draw accuracy against depth (.png, .svg).")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Find freeze depth, learning rate and decay by trials; go on with a search that was interrupted.

    layerwise search timm:resnet18 --data photos --out searches/a --minutes 10 --plot curve.png
    """
    from layerwise.choosing.named import open_task
    from layerwise.choosing.search import search as run

    options: dict[str, Any] = {"class_weights": class_weights} if class_weights else {}
    prepared = open_task(
        model,
        data,
        weights=None if weights is None else str(weights),
        input_size=input_size,
        granularity=granularity,
        val_frac=val_frac,
        test_frac=test_frac,
        seed=seed,
        text=text.text_options(
            text_column=text_column, label_column=label_column, pair_column=pair_column, max_length=max_length
        ),
    )
    for note in prepared.notes:
        say(note)
    if hasattr(prepared, "task"):
        options["task"] = prepared.task
    found = run(
        prepared.opened.model,
        prepared.data.train,
        prepared.data.val,
        test=prepared.data.test,
        trials=trials,
        minutes=minutes,
        seeds=seeds,
        depths=None if depths is None else [_number(int, part, "--depths") for part in depths.split(",")],
        strategies=strategy or (),
        lr=_range(lr, "--lr"),
        decay=_range(decay, "--decay"),
        epochs=epochs,
        out=out,
        storage=storage,
        name=name,
        metric=metric,
        layers=prepared.layers,
        batch_size=batch_size,
        fit_options={"classes": prepared.data.classes or None, **options},
        seed=seed,
        say=say,
    )
    if plot is not None:
        from layerwise.report.pictures import depth_picture, save_picture

        points = [p for p in found.to_dict()["curve"] if p["trained_groups"] is not None]
        say(f"wrote {save_picture(depth_picture(points, metric=metric), plot)}")
    if as_json:
        print_json(found.to_dict())
        return
    from layerwise.cli.tables import new_table

    table = new_table(
        f"Best setting of each choice, by {metric} on the validation data",
        ["trained", "from", metric, "error", "seeds", "lr", "decay"],
        left=2,
    )
    for p in found.curve:
        shown = p.choice + (" *" if p == found.best else "")
        figures = f"{p.mean:.4f}", f"{p.error:.4f}", str(p.seeds), f"{p.lr:.2g}", f"{p.decay:.2f}"
        table.add_row(shown, p.first, *figures)
    print_table(table)
    counts = {
        state: sum(t.state == state for t in found.trials) for state in ("complete", "pruned", "failed")
    }
    typer.echo(f"{len(found.trials)} trials: " + ", ".join(f"{n} {s}" for s, n in counts.items() if n))
    for note in found.notes:
        typer.echo(note)
    typer.echo(f"plan: {out / 'plan.yaml'}" + (f"; run: {found.run.out}" if found.run is not None else ""))


def _range(text: str, option: str) -> tuple[float, float]:
    parts = [_number(float, part, option) for part in text.split(",")]
    if len(parts) not in (1, 2):
        raise typer.BadParameter(f"{option} is {text!r}; expected one number or two, like 1e-4,1e-2.")
    return parts[0], parts[-1]


def _number(kind: Any, text: str, option: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise typer.BadParameter(f"{option}: {text!r} is not a number.") from None

"""``layerwise plan``: make a plan, look at one, or print the table of the rate formula."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from layerwise.cli.options import numbers, refuse, require_one_plan
from layerwise.cli.output import (
    JsonFlag,
    above_zero,
    check_output,
    friendly,
    pasted,
    print_json,
    print_table,
)

if TYPE_CHECKING:
    from layerwise.layers.layermap import LayerMap
    from layerwise.plans.explanation import Explanation
    from layerwise.plans.plan import Plan

_SOURCE = "Where the plan comes from"
_SHOW = "What is shown"


@friendly
def plan(
    ctx: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(help="timm:NAME, torchvision:NAME, hf:PATH_OR_ID or file.py:function."),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="A strategy with its options, like 'top_k:k=2'.", rich_help_panel=_SOURCE),
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("--plan", help="A plan file to check and show.", rich_help_panel=_SOURCE)
    ] = None,
    granularity: Annotated[
        Literal["stages", "blocks", "layers"],
        typer.Option(help="What one layer group is.", rich_help_panel=_SOURCE),
    ] = "blocks",
    epochs: Annotated[
        int | None, typer.Option(help="Length of the plan.", min=1, rich_help_panel=_SOURCE)
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(help="constant, linear, cosine, ...", rich_help_panel=_SOURCE)
    ] = None,
    norms: Annotated[
        str | None,
        typer.Option(
            help="Batch-norm policy: follow, freeze, ...; with settings: '{policy: adapt, momentum: 0.05}'.",
            rich_help_panel=_SOURCE,
        ),
    ] = None,
    num_classes: Annotated[
        int | None, typer.Option(help="Outputs of a new head.", min=1, max=10**9, rich_help_panel=_SOURCE)
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan to this file.", rich_help_panel=_SHOW)
    ] = None,
    lr: Annotated[
        float | None,
        typer.Option(
            help="Base rate; without one, multiples of it.", callback=above_zero, rich_help_panel=_SHOW
        ),
    ] = None,
    steps_per_epoch: Annotated[
        int | None, typer.Option(help="Optimiser steps in an epoch.", min=1, rich_help_panel=_SHOW)
    ] = None,
    rate_table: Annotated[
        bool,
        typer.Option(
            "--rate-table",
            help="Print lr * decay^(L - l) for a network of --layers layers instead.",
            rich_help_panel=_SHOW,
        ),
    ] = False,
    layers: Annotated[
        int, typer.Option(help="L, for --rate-table.", min=1, max=10_000, rich_help_panel=_SHOW)
    ] = 12,
    decay: Annotated[
        str, typer.Option(help="Decays, for --rate-table.", rich_help_panel=_SHOW)
    ] = "0.95,0.9,0.8,0.7",
    as_json: JsonFlag = False,
) -> None:
    """Make a plan for a model, or check and show one that you edited.

    layerwise plan timm:resnet18 --strategy gradual_unfreezing -o plan.yaml

    layerwise plan timm:resnet18 --plan plan.yaml --lr 1e-3 --steps-per-epoch 25
    """
    if rate_table:
        own = ("rate_table", "layers", "decay", "lr", "as_json")
        refuse(ctx, [name for name in ctx.params if name not in own], "--rate-table has no use for it")
        _rate_table(layers, lr, decay, as_json)
        return
    refuse(ctx, ["layers", "decay"], "only --rate-table uses it")
    if model is None:
        raise typer.BadParameter("MODEL is missing (or give --rate-table).")
    require_one_plan(ctx, strategy, plan_file)
    check_output(out, "-o", new=True)
    from layerwise.plans.explain import explain
    from layerwise.plans.parsing import check_strategy, load_alone, parse_strategy

    made, common = None, {"epochs": epochs, "schedule": schedule, "norms": norms}
    if plan_file is not None:
        made = load_alone(plan_file, **common)
    else:
        check_strategy(str(strategy), **common)
    mapped, held = _map(model, made.granularity if made is not None else granularity, num_classes)
    if made is None:
        assert strategy is not None
        made = parse_strategy(strategy, mapped, **common)
    explained = explain(made, mapped, lr=lr, steps_per_epoch=steps_per_epoch, held=held)
    _show(made, explained, lr, out, as_json)


def _map(
    model: str, granularity: Literal["stages", "blocks", "layers"], num_classes: int | None
) -> tuple[LayerMap, frozenset[str]]:
    """Return the model's map, and the parameters that no plan trains."""
    from layerwise.cli.inspect import map_opened
    from layerwise.sources.models import open_model
    from layerwise.tuning.matching import constants_of

    # The weights are not read: a plan holds names alone.
    opened = open_model(model, num_classes=num_classes, pretrained=False)
    mapped = map_opened(opened, granularity)
    return mapped, constants_of(opened.model, mapped)


def _show(plan: Plan, explanation: Explanation, lr: float | None, out: Path | None, as_json: bool) -> None:
    if out is not None:
        plan.save(out)
    if as_json:
        print_json({"plan": plan.to_dict(), "timeline": explanation.to_dict(), "out": out})
        return
    print_table(explanation)
    if out is not None:
        rate = "" if lr is None else f" --lr {lr:g}"
        typer.echo(
            f"Written to {out}. Run it: layerwise fit --plan {pasted(out)}{rate} --model ... --data ... "
            "--out ..."
        )


def _rate_table(layers: int, lr: float | None, decay: str, as_json: bool) -> None:
    from layerwise.plans.rates import check_decay, rate_table

    alphas = numbers(decay, "--decay", kind=float)
    for alpha in alphas:
        check_decay(alpha)
    eta = 3e-5 if lr is None else lr
    table = rate_table(layers, eta, alphas)
    if as_json:
        print_json({"layers": layers, "lr": eta, "rates": {str(alpha): row for alpha, row in table.items()}})
        return
    from layerwise.cli.tables import new_table

    shown = new_table(
        f"Rate of layer l of {layers}: {eta:g} * decay^({layers} - l)",
        ["layer", *(f"decay {alpha:g}" for alpha in alphas)],
    )
    for layer in range(layers, 0, -1):
        shown.add_row(str(layer), *(f"{table[alpha][layer]:.2e}" for alpha in alphas))
    print_table(shown)

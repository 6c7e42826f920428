"""Pictures of plans, shifts and searches, from plain data. They compute nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerwise.errors import DataError, MissingExtraError
from layerwise.files import write_file, write_text

Chart = Any
"""An Altair chart."""
FORMATS = (".png", ".svg", ".html", ".json")
BLUE, ORANGE, GREY = "#2f6fab", "#c8641b", "#8a8a8a"
_TICKS = 12  # at most, for epochs
_SERIES = [BLUE, ORANGE, "#3b8a5a", "#8a4fa3", GREY]
# Metrics that are no shares -> title of their panel.
_PANELS = {
    "rmse": "validation error",
    "mae": "validation error",
    "perplexity": "validation perplexity",
}
_INPUT_FIRST = "layer group, input to output"
_LABEL_LIMIT = 200
_NUMBER_ROOM = 58  # pixels: a number such as 0.6935 in a wide font, and space to the axis' title
_FIGURE_TITLES = {
    "norms": "shift of norm inputs, in source variances",
    "frechet": "Fréchet distance, in source variances",
}


def _altair() -> Any:
    try:
        import altair
    except ImportError as error:
        raise MissingExtraError("altair", "report", "drawing a picture") from error
    return altair


def save_picture(chart: Chart, path: str | Path) -> Path:
    """Write a chart to a file, whole or not at all; the format is that of the file name. Return the path.

    PNG is written at twice the size in pixels. HTML shows values under the pointer and holds Vega itself
    (about 1 MB), so it opens without a network, as SVG and PNG do.

    Raises:
        DataError: the name ends in none of .png, .svg, .html, .json.
        MissingExtraError: vl-convert is not installed (for all but .json).
    """
    target = check_picture(path)
    kind = target.suffix.lower()
    if kind == ".png":
        png: bytes = _converter().vegalite_to_png(chart.to_dict(), scale=2)
        write_file(target, lambda temporary: temporary.write_bytes(png))
        return target
    if kind == ".html":
        text = _converter().vegalite_to_html(chart.to_dict(), bundle=True)
    else:
        text = as_svg(chart) if kind == ".svg" else chart.to_json()
    write_text(target, text)
    return target


def check_picture(path: str | Path) -> Path:
    """Return the path if `save_picture` can write to it, so that hours of work do not end in a wrong name.

    Raises:
        DataError: as `save_picture`; or the path is a folder, or the folder it names is not there.
        MissingExtraError: Altair or (for all but .json) vl-convert is not installed.
    """
    target = Path(path)
    if target.suffix.lower() not in FORMATS or target.is_dir():
        raise DataError(
            f"a picture cannot be written to {str(path)!r}; expected the name of a file that ends in one of "
            f"{', '.join(FORMATS)}."
        )
    require_folder_of(target, "a picture")
    _altair()
    if target.suffix.lower() != ".json":
        _converter()
    return target


def require_folder_of(target: Path, what: str) -> None:
    """Raise `DataError` unless the folder that `target` is to be written to is there."""
    if not target.parent.is_dir():
        raise DataError(
            f"{what} cannot be written to {str(target)!r}: there is no folder {str(target.parent)!r}. "
            "Make it, or name another."
        )


def as_svg(chart: Chart) -> str:
    """Return a chart as the text of an SVG picture.

    Raises:
        MissingExtraError: vl-convert is not installed.
    """
    svg: str = _converter().vegalite_to_svg(chart.to_dict())
    return svg


def _converter() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise MissingExtraError("vl-convert-python", "report", "writing a picture") from error
    return vl_convert


def shift_picture(shift: Mapping[str, Any]) -> Chart:
    """Return the shift of each layer group with its interval, input on the left.

    Args:
        shift: what `layerwise.choosing.shift_result.Shift.to_dict` returned.
    """
    alt = _altair()
    figure = "frechet" if any(group["frechet"] for group in shift["groups"]) else "norms"
    rows = [
        {"group": group["group"], **group[figure]} for group in shift["groups"] if group[figure] is not None
    ]
    order = [row["group"] for row in rows]
    x = alt.X("group:N", sort=order, title=_INPUT_FIRST, axis=_axis(order, -40))
    base = alt.Chart(alt.Data(values=rows))
    none = not any(row[key] for row in rows for key in ("value", "low", "high"))
    scale = alt.Scale(domain=[0, 1]) if none else alt.Scale(zero=True, nice=True)
    y = alt.Y("value:Q", title=_FIGURE_TITLES[figure], scale=scale)
    parts = [
        base.mark_bar(color=BLUE, opacity=0.85, tooltip=True).encode(x=x, y=y),
        base.mark_rule(color="black", strokeWidth=1.5).encode(
            x=x, y=alt.Y("low:Q", scale=scale), y2="high:Q"
        ),
    ]
    return _finished(
        alt.layer(*parts),
        "Domain shift per layer group",
        f"{shift['samples']} samples, {shift['level']:.0%} intervals{', all exactly 0' if none else ''}",
        width=max(360, 44 * len(rows)),
    )


def plan_picture(explanation: Mapping[str, Any]) -> Chart:
    """Return a plan as a heat map: groups (output on top) against time, darker is faster, grey is frozen.

    Args:
        explanation: what ``plan.explain(layers).to_dict()`` returned.
    """
    alt = _altair()
    edges = explanation["heat_edges"]
    rows = [
        {"group": name, "from": start, "to": end, "rate": rate if rate > 0 else None}
        for name, rates in zip(explanation["groups"], explanation["heat"])
        for start, end, rate in zip(edges, edges[1:], rates)
    ]
    order = list(reversed(explanation["groups"]))
    # two lines: one would be cut where the font is wide
    title = "rate" if explanation["lr"] is not None else ["multiple", "of the rate"]
    lowest = min((row["rate"] for row in rows if row["rate"] is not None), default=1.0)
    notation = ".2~r" if lowest >= 1e-4 else ".1~e"  # "g" would mix 0.000001 with 1e-7
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X(
            "from:Q",
            title="optimiser step",
            axis=alt.Axis(tickCount=min(10, explanation["steps"])),
            scale=alt.Scale(domain=[0, explanation["steps"]], nice=False),
        ),
        x2="to:Q",
        y=alt.Y("group:N", sort=order, title="layer group", axis=_axis(order, 0)),
    )
    cells = base.mark_rect().encode(
        color=alt.Color(
            "rate:Q",
            title=title,
            scale=alt.Scale(type="log", scheme="blues"),
            legend=alt.Legend(format=notation, tickCount=4),
        )
    )
    frozen = base.transform_filter("datum.rate === null").mark_rect(color="#e4e4e4")
    learning = cells.transform_filter("datum.rate !== null")
    limits = [{"step": phase["first_step"], "phase": phase["name"]} for phase in explanation["phases"][1:]]
    rules = alt.Chart(alt.Data(values=limits)).mark_rule(color=ORANGE, strokeDash=[4, 3]).encode(x="step:Q")
    return _finished(
        alt.layer(frozen, learning, rules),
        f"{explanation['strategy']}: who learns when",
        "grey: frozen",
        width=560,
        height=max(140, 26 * len(explanation["groups"])),
    )


def history_picture(history: Sequence[Mapping[str, Any]]) -> Chart:
    """Return learning curves: losses above, validation metrics below, one point an epoch.

    Metrics with a unit of their own (errors in that of the numbers, the perplexity) have a panel each, on
    whose axis others would be flat.

    Args:
        history: lines of a run's ``history.jsonl``.

    Raises:
        DataError: there are none.
    """
    if not history:
        raise DataError("the history has no epochs, so there are no curves. Train for one at least.")
    alt = _altair()
    losses = {"train_loss": "training loss", "val_loss": "validation loss"}
    numbers = dict.fromkeys(k for entry in history for k, value in entry.items() if isinstance(value, float))
    metrics = [key for key in numbers if key not in losses and not key.endswith("_s")]
    epochs = [entry["epoch"] + 1 for entry in history]
    ticks = list(range(min(epochs), max(epochs) + 1, -(-len(epochs) // _TICKS)))  # no half epochs

    def lines(names: Mapping[str, str], title: str, height: int) -> Chart:
        rows = [
            {"epoch": entry["epoch"] + 1, "series": text, "value": entry[key]}
            for entry in history
            for key, text in names.items()
            if entry.get(key) is not None
        ]
        return (
            alt.Chart(alt.Data(values=rows))
            .mark_line(point=alt.OverlayMarkDef(size=40, filled=True), strokeWidth=2)
            .encode(
                x=alt.X("epoch:Q", title="epoch", axis=alt.Axis(values=ticks, format="d")),
                # the axis of a single value would round it to a whole number
                y=alt.Y(
                    "value:Q",
                    title=title,
                    scale=alt.Scale(zero=False, padding=8),
                    axis=alt.Axis(format=".6~g"),
                ),
                color=alt.Color(
                    "series:N", title=None, sort=list(names.values()), scale=alt.Scale(range=_SERIES)
                ),
            )
            .properties(width=560, height=height)
        )

    charts = [lines(losses, "loss", 180)]
    panels: dict[str, dict[str, str]] = {}
    for key in metrics:
        panels.setdefault(_PANELS.get(key, "validation metric"), {})[key] = key.replace("_", " ")
    charts += [lines(names, title, 180) for title, names in panels.items()]
    whole = (
        alt.vconcat(*charts)
        .resolve_scale(color="independent")
        .properties(title="Learning curves", padding=12)
    )
    return _styled(whole)


def depth_picture(
    rows: Sequence[Mapping[str, Any]], *, metric: str = "accuracy", counted: str = "groups that learn"
) -> Chart:
    """Return a metric against a number of groups at the output, with one line a series and error bars.

    Args:
        rows: mappings with ``"trained_groups"``, ``"first"`` (name of the first group that learns),
            ``"mean"``, ``"error"`` (standard error, 0 if unknown), and perhaps ``"series"``. Those without a
            number of groups (a search's named strategies) are left out.
        metric: title of the vertical axis.
        counted: what the number of groups is of.
    """
    alt = _altair()
    metric = metric.replace("_", " ")
    values = [
        {
            "series": "search",
            **row,
            "low": row["mean"] - row["error"],
            "high": row["mean"] + row["error"],
            "label": f"{row['trained_groups']}: from {row['first']}",
        }
        for row in rows
        if row["trained_groups"] is not None
    ]
    labels = {row["trained_groups"]: row["label"] for row in values}
    order = [labels[count] for count in sorted(labels)]
    series = list(dict.fromkeys(row["series"] for row in values))
    colour = alt.value(BLUE)
    if len(series) > 1:
        colour = alt.Color("series:N", title=None, sort=series, scale=alt.Scale(range=[BLUE, ORANGE, GREY]))
    x = alt.X("label:N", sort=order, title=counted, axis=_axis(order, -30))
    scale = alt.Scale(zero=False, padding=12)
    y = alt.Y("mean:Q", title=metric, scale=scale)
    low = alt.Y("low:Q", title=metric, scale=scale)
    parts = []
    for number, name in enumerate(series):
        aside = 6 * (number - (len(series) - 1) / 2)  # pixels, so that no error bar hides another
        own = [row for row in values if row["series"] == name]
        base = alt.Chart(alt.Data(values=own)).encode(x=x, color=colour)
        parts += [
            base.mark_line(strokeWidth=2, xOffset=aside).encode(y=y),
            base.mark_rule(strokeWidth=1.5, xOffset=aside).encode(y=low, y2="high:Q"),
            base.mark_point(filled=True, size=60, opacity=1, xOffset=aside, tooltip=True).encode(y=y),
        ]
    bars = "bars: one standard error" if any(row["error"] for row in values) else ""
    return _finished(
        alt.layer(*parts), f"{metric.capitalize()} by depth", bars, width=max(360, 72 * len(order))
    )


def transfer_picture(transfer: Mapping[str, Any]) -> Chart:
    """Return the accuracies of frozen features at each depth: linear probe and neighbours.

    Args:
        transfer: what `layerwise.choosing.depths.Transferability.to_dict` returned.
    """
    alt = _altair()
    rows = [
        {"group": entry["group"], "features": title, "accuracy": entry[key]}
        for entry in transfer["depths"]
        for key, title in (("probe", "linear probe"), ("knn", "5 neighbours"))
        if entry[key] is not None
    ]
    order = [entry["group"] for entry in transfer["depths"]]
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=50, filled=True), strokeWidth=2)
        .encode(
            x=alt.X("group:N", sort=order, title=_INPUT_FIRST, axis=_axis(order, -40)),
            y=alt.Y("accuracy:Q", title="held-out accuracy", scale=alt.Scale(zero=False, padding=10)),
            color=alt.Color("features:N", title=None, scale=alt.Scale(range=[BLUE, ORANGE])),
        )
    )
    chance = (
        alt.Chart(alt.Data(values=[{"accuracy": transfer["chance"]}]))
        .mark_rule(color=GREY, strokeDash=[4, 3])
        .encode(y="accuracy:Q")
    )
    return _finished(
        alt.layer(lines, chance),
        "What frozen features tell at each depth",
        "dashed: always the largest class",
        width=max(360, 44 * len(order)),
    )


def _axis(labels: Sequence[str], angle: int) -> Any:
    """Return an axis whose title keeps clear of its labels, turned by `angle` degrees, in any font.

    The picture is laid out in one font and may be looked at in a wider one.
    """
    length = min(_LABEL_LIMIT, 7.0 * max(map(len, labels), default=0))  # pixels, of a wide font at 12
    side = abs(math.sin(math.radians(angle))) if angle else 1.0  # turned labels stand below the picture
    return _altair().Axis(labelAngle=angle, labelLimit=_LABEL_LIMIT, minExtent=round(length * side + 16))


def _finished(chart: Chart, title: str, subtitle: str, *, width: int, height: int = 260) -> Chart:
    """Return a chart with its titles, in two lines: one long line would be cut where the font is wide."""
    titles = {"text": title, **({"subtitle": subtitle} if subtitle else {})}
    return _styled(chart.properties(title=titles, width=width, height=height, padding=12))


def _styled(chart: Chart) -> Chart:
    return (
        chart.configure_axis(labelFontSize=12, titleFontSize=12, titleFontWeight="normal", gridOpacity=0.5)
        .configure_axisY(minExtent=_NUMBER_ROOM)  # where no names stand
        .configure_title(fontSize=14, anchor="start", offset=12)
        .configure_legend(labelFontSize=12, titleFontSize=12, titleFontWeight="normal")
        .configure_view(stroke=None)
    )

"""Pictures hold the data they were given, and are written in every format."""

import json
import re

import pytest

from helpers import named_map
from layerwise.errors import DataError
from layerwise.plans.strategies import full
from layerwise.plans.unfreezing import ulmfit
from layerwise.report import pictures

GROUPS = ["stem", "layer1", "layer2", "fc"]


def explanation():
    return {
        "strategy": "top_k(k=2)",
        "lr": 0.1,
        "steps": 20,
        "heat_edges": [0, 10, 20],
        "groups": GROUPS,
        "heat": [[0.0, 0.0], [0.0, 0.0], [0.05, 0.02], [0.1, 0.04]],
        "phases": [{"name": "a", "first_step": 0}, {"name": "b", "first_step": 10}],
    }


def values_of(chart):
    """Return all rows of data in a chart's specification."""
    found = []

    def walk(part):
        if isinstance(part, dict):
            if isinstance(part.get("values"), list):
                found.extend(row for row in part["values"] if isinstance(row, dict))  # no ticks
            for inside in part.values():
                walk(inside)
        elif isinstance(part, list):
            for inside in part:
                walk(inside)

    walk(chart.to_dict())
    return found


def test_plan_picture_shows_every_group_at_every_time():
    # frozen cells are null (grey), learning ones have their rate; the second phase's start is marked
    rows = values_of(pictures.plan_picture(explanation()))
    cells = {(row["group"], row["from"]): row["rate"] for row in rows if "group" in row}
    assert len(cells) == 8
    assert cells["stem", 0] is None
    assert cells["layer2", 10] == 0.02
    assert [row["step"] for row in rows if "step" in row] == [10]


def test_no_column_of_a_plan_shows_two_phases():
    # a group learns from the line of its phase on, no sooner or later
    told = ulmfit(named_map("a", "b", "c")).explain(named_map("a", "b", "c"), steps_per_epoch=37).to_dict()
    rows = values_of(pictures.plan_picture(told))
    firsts = [phase["first_step"] for phase in told["phases"]]
    assert [row["step"] for row in rows if "step" in row] == firsts[1:]
    assert set(firsts) <= set(told["heat_edges"])
    for name, first in zip(("c", "b", "a"), firsts):
        cells = [row for row in rows if row.get("group") == name]
        assert all((row["rate"] is not None) == (row["from"] >= first) for row in cells)
        assert cells[-1]["to"] == told["steps"]


@pytest.mark.parametrize("steps", [1, 4, 400])
def test_plan_picture_counts_whole_steps_with_room_between_them(steps):
    # no label at a fifth of a step, and few enough that none touches the next
    told = full(named_map("a", "b"), steps=steps).explain(named_map("a", "b")).to_dict()
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", pictures.as_svg(pictures.plan_picture(told)))
    axis = labels[: labels.index(str(steps)) + 1]
    assert all(label.isdigit() for label in axis)
    assert len(axis) <= 12


@pytest.mark.parametrize(
    ("lowest", "highest", "written"),
    [(1e-9, 1e-4, {"1e-9", "1e-7", "1e-4"}), (1e-4, 1e-4, {"0.0001"}), (0.02, 0.1, {"0.02", "0.1"})],
)
def test_the_legend_of_a_plan_has_one_notation(lowest, highest, written):
    # very low rates are all powers, others all decimals; the title has lines short enough for a wide font
    told = explanation() | {"heat": [[0.0, 0.0], [0.0, lowest], [lowest, lowest], [highest, highest]]}
    svg = pictures.as_svg(pictures.plan_picture(told))
    labels = set(re.findall(r">([\d.]+(?:e[+-]\d+)?)<", svg[svg.index("role-legend") :]))
    assert written <= labels
    assert {"e" in label for label in labels} == {lowest < 1e-4}
    lines = re.findall(r">([^<]+)<", pictures.as_svg(pictures.plan_picture(told | {"lr": None})))
    assert {"multiple", "of the rate"} <= set(lines)


def test_shift_picture_takes_the_figure_that_was_measured():
    # running statistics when there is no source, the Fréchet distance when there is one
    estimate = {"value": 0.5, "low": 0.4, "high": 0.6}
    group = {"group": "stem", "norms": estimate, "frechet": None}
    shift = {"groups": [group], "samples": 10, "level": 0.9}
    rows = values_of(pictures.shift_picture(shift))
    assert rows[0] == {"group": "stem", **estimate}
    other = {**group, "frechet": {"value": 2.0, "low": 1.0, "high": 3.0}}
    rows = values_of(pictures.shift_picture({**shift, "groups": [other]}))
    assert rows[0]["value"] == 2.0


def test_depth_picture_has_bars_of_one_standard_error():
    # low and high are mean minus and plus the error; the label names the first group that learns
    rows = values_of(
        pictures.depth_picture([{"trained_groups": 2, "first": "layer2", "mean": 0.8, "error": 0.05}])
    )
    assert rows[0]["low"] == pytest.approx(0.75)
    assert rows[0]["high"] == pytest.approx(0.85)
    assert rows[0]["label"] == "2: from layer2"


def test_depth_picture_leaves_out_named_strategies():
    # a search's curve has them, without a number of groups
    depth = {"trained_groups": 2, "first": "layer2", "mean": 0.8, "error": 0.05}
    named = {**depth, "trained_groups": None, "first": "lp_ft"}
    assert {row["first"] for row in values_of(pictures.depth_picture([named, depth]))} == {"layer2"}


def test_history_picture_leaves_out_what_was_not_measured():
    # a run without validation has one curve
    history = [{"epoch": i, "train_loss": 1.0 / (i + 1), "rates": {"fc": 0.1}} for i in range(3)]
    rows = values_of(pictures.history_picture(history))
    assert {row["series"] for row in rows} == {"training loss"}
    assert [row["epoch"] for row in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("epochs", "ticks"), [(1, [1]), (3, [1, 2, 3]), (30, [1, 4, 7, 10, 13, 16, 19, 22, 25, 28])]
)
def test_history_picture_has_whole_epochs(epochs, ticks):
    history = [{"epoch": i, "train_loss": 1.0 / (i + 1)} for i in range(epochs)]
    (chart,) = pictures.history_picture(history).to_dict()["vconcat"]
    assert chart["encoding"]["x"]["axis"]["values"] == ticks


@pytest.mark.parametrize(
    ("measured", "panels"),
    [
        ({"perplexity": 90.0, "token_accuracy": 0.5}, [["perplexity"], ["token accuracy"]]),
        ({"rmse": 8.0, "mae": 7.0, "r2": 0.5, "pearson": 0.6}, [["rmse", "mae"], ["r2", "pearson"]]),
        ({"accuracy": 0.5, "macro_f1": 0.4}, [["accuracy", "macro f1"]]),
    ],
)
def test_history_picture_has_a_panel_for_each_unit(measured, panels):
    # a perplexity of 90 would flatten the accuracy beside it
    entry = {"epoch": 0, "train_loss": 1.0, **measured}
    _, *charts = pictures.history_picture([entry]).to_dict()["vconcat"]
    assert [chart["encoding"]["color"]["sort"] for chart in charts] == panels


def test_history_picture_keeps_a_metric_that_was_no_number_in_the_last_epoch():
    # null in the file; where it was a number is what one looks for then
    history = [{"epoch": i, "train_loss": 1.0, "r2": value} for i, value in enumerate([None, 0.5, None])]
    rows = values_of(pictures.history_picture(history))
    assert [(row["epoch"], row["value"]) for row in rows if row["series"] == "r2"] == [(2, 0.5)]


def test_history_picture_of_one_epoch_does_not_round_its_value():
    # an accuracy of 0.5 is no 1
    history = [{"epoch": 0, "train_loss": 0.25, "accuracy": 0.5}]
    svg = pictures.as_svg(pictures.history_picture(history))
    labels = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "0.5" in labels
    assert "0.25" in labels


def test_a_history_without_epochs_has_no_curves():
    with pytest.raises(DataError, match="no epochs"):
        pictures.history_picture([])


def test_titles_of_axes_keep_clear_of_long_names():
    # a browser's font may be wider than the one the picture was laid out in: seven pixels a letter
    long = {**explanation(), "groups": ["bert.encoder.layer.5", *GROUPS[1:]]}
    text = json.dumps(pictures.plan_picture(long).to_dict())
    assert f'"minExtent": {20 * 7 + 16}' in text
    narrow = json.dumps(pictures.plan_picture(explanation()).to_dict())
    assert f'"minExtent": {6 * 7 + 16}' in narrow


def test_titles_of_axes_keep_clear_of_numbers():
    # a loss that hardly moves reads 0.6935
    history = [{"epoch": i, "train_loss": 0.694 + i / 2000} for i in range(3)]
    axis = pictures.history_picture(history).to_dict()["config"]["axisY"]
    assert axis["minExtent"] >= 6 * 7 + 16  # as much as a name of six letters gets


def test_transfer_picture_skips_a_probe_that_could_not_be_measured():
    # null accuracies are left out, the neighbours stay
    depth = {"group": "fc", "probe": None, "knn": 0.5}
    rows = values_of(pictures.transfer_picture({"depths": [depth], "chance": 0.25}))
    assert {"group": "fc", "features": "5 neighbours", "accuracy": 0.5} in rows
    assert not any(row.get("features") == "linear probe" for row in rows)


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<svg"), ("a.json", b"{"), ("a.html", b"")]
)
def test_every_format_is_written(tmp_path, name, start):
    # the file is there and begins as its format does
    path = pictures.save_picture(pictures.plan_picture(explanation()), tmp_path / name)
    content = path.read_bytes()
    assert content.startswith(start)
    assert len(content) > 500
    if name == "a.json":
        assert json.loads(content)["title"]["text"].startswith("top_k(k=2)")


def test_html_opens_without_a_network(tmp_path):
    # Vega is inside: no script is loaded from anywhere
    page = pictures.save_picture(pictures.plan_picture(explanation()), tmp_path / "a.html").read_text()
    assert not re.findall(r"<(?:script|link)[^>]*(?:src|href)=", page)


def test_the_axis_of_a_shift_reaches_beyond_its_intervals(tmp_path):
    # the last label of the axis lies above the highest interval, and the lowest at 0
    estimate = {"value": 0.711, "low": 0.688, "high": 0.734}
    shift = {"groups": [{"group": "stem", "norms": estimate, "frechet": None}], "samples": 9, "level": 0.9}
    svg = pictures.as_svg(pictures.shift_picture(shift))
    axis = re.search(r"Y-axis titled '[^']*' for a linear scale with values from ([\d.]+) to ([\d.]+)", svg)
    assert axis is not None
    assert float(axis[1]) == 0
    assert float(axis[2]) > estimate["high"]


def test_a_shift_of_nothing_has_an_axis_and_says_so():
    # the source's own data: no bar stands, on an axis from 0 to one variance
    groups = [
        {"group": name, "norms": None, "frechet": {"value": 0.0, "low": 0.0, "high": 0.0}} for name in GROUPS
    ]
    svg = pictures.as_svg(pictures.shift_picture({"groups": groups, "samples": 9, "level": 0.9}))
    assert "linear scale with values from 0.0 to 1.0" in svg
    assert "9 samples, 90% intervals, all exactly 0" in svg


def test_unknown_format_is_refused(tmp_path):
    # the formats are listed
    with pytest.raises(DataError, match=r"a\.bmp.*\.png"):
        pictures.save_picture(pictures.plan_picture(explanation()), tmp_path / "a.bmp")
    with pytest.raises(DataError, match="name of a file"):
        pictures.check_picture(tmp_path)
    assert pictures.check_picture(tmp_path / "a.svg") == tmp_path / "a.svg"


def test_a_folder_that_is_not_there_is_told_before_the_work(tmp_path):
    # the folder is named, no temporary file
    with pytest.raises(DataError, match=r"there is no folder '[^']*nope'"):
        pictures.check_picture(tmp_path / "nope" / "x.png")

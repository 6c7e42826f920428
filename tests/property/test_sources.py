"""Sources over random inputs: what is written is what is read, and no near miss is taken for a match."""

import csv
import itertools
import json

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from layerwise.sources.preprocessing import INTERPOLATIONS, Preprocessing
from layerwise.sources.tables import read_rows
from layerwise.sources.weights import compare, match_in_order, strip_prefixes

# No surrogates, which no file can hold, and no NUL, which csv cannot.
cells = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)
in_folder = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=50
)


@in_folder
@given(
    rows=st.lists(st.tuples(cells, cells), min_size=1, max_size=10), suffix=st.sampled_from([".csv", ".tsv"])
)
def test_any_text_survives_a_delimited_table(tmp_path, rows, suffix):
    path = tmp_path / f"t{suffix}"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="," if suffix == ".csv" else "\t", quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "label"), *rows])
    assert [(row["text"], row["label"]) for row in read_rows(path)] == rows


@in_folder
@given(
    rows=st.lists(
        st.dictionaries(st.sampled_from(["a", "b", "c"]), cells, min_size=1), min_size=1, max_size=10
    )
)
def test_any_text_survives_json_lines(tmp_path, rows):
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    names = {name for row in rows for name in row}
    assert read_rows(path) == [{name: row.get(name) for name in read_rows(path)[0]} for row in rows]
    assert set(read_rows(path)[0]) == names


sides = st.integers(1, 600)
shares = st.floats(0.01, 1, allow_nan=False)


@given(
    crop=st.tuples(sides, sides),
    resize=st.one_of(st.none(), sides, st.tuples(sides, sides)),
    statistics=st.sampled_from([1, 3]).flatmap(lambda n: st.tuples(*[st.tuples(*[shares] * n)] * 2)),
    interpolation=st.sampled_from(INTERPOLATIONS),
)
def test_preprocessing_survives_json(crop, resize, statistics, interpolation):
    mean, std = statistics
    made = Preprocessing(crop, resize, mean, std, interpolation)
    assert Preprocessing.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def network(widths):
    layers = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.BatchNorm1d(after)]
    return nn.Sequential(*layers)


widths = st.lists(st.integers(1, 4), min_size=2, max_size=6)


@given(widths=widths, prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3))
def test_any_pile_of_wrappers_is_taken_off(widths, prefixes):
    model = network(widths)
    prefix = "".join(prefixes)
    state, removed = strip_prefixes({prefix + name: v for name, v in model.state_dict().items()}, model)
    assert removed == prefix
    assert not compare(state, model)


@given(widths=widths, data=st.data())
def test_a_swap_that_changes_a_pair_is_never_matched_in_order(widths, data):
    model = network(widths)
    renamed = [
        (f"m.{name}", value) for name, value in model.state_dict().items() if "num_batches" not in name
    ]
    assert match_in_order(dict(renamed), model) is not None
    one = data.draw(st.integers(0, len(renamed) - 1))
    other = data.draw(st.integers(0, len(renamed) - 1))
    kinds = [(name.rpartition(".")[2], tuple(value.shape)) for name, value in renamed]
    renamed[one], renamed[other] = renamed[other], renamed[one]
    found = match_in_order(dict(renamed), model)
    assert (found is None) == (kinds[one] != kinds[other])
    if found is not None:
        assert all(torch.equal(a, b) for a, (_, b) in zip(found.values(), renamed, strict=True))

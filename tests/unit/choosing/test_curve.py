"""The curve of training on top of each depth: its plans, its two series, and going on after a stop."""

import json

import pytest
import torch
from torch.utils.data import TensorDataset

from layerwise.choosing import curve as module
from layerwise.choosing.curve import cut_plan, transfer_curve
from layerwise.errors import DataError, PlanError, RunError, TrainingError
from layerwise.training.classification import Classification

from .small import images, map_of, pretrained


@pytest.fixture(scope="module")
def model():
    return pretrained()


@pytest.fixture(scope="module")
def data():
    x, y = images(160, seed=5)
    return TensorDataset(x[:96], y[:96]), TensorDataset(x[96:], y[96:])


def curve(model, data, **options):
    given = {"depths": (1, 5), "epochs": 2, "lr": 3e-3, **options}
    return transfer_curve(model, *data, layers=map_of(model), **given)


def test_plans_start_the_last_groups_anew(model):
    # both kinds start the same groups anew; only the frozen kind freezes the rest
    layers = map_of(model)
    frozen, tuned = (cut_plan(layers, 2, series, epochs=3).phases[0] for series in module.SERIES)
    assert frozen.reinit == tuned.reinit == ("stage3", "fc")
    assert [n for n in layers.names if frozen.rate(n)] == ["stage3", "fc"]
    assert [n for n in layers.names if tuned.rate(n)] == list(layers.names)


def test_what_is_kept_and_what_starts_anew(model, data, monkeypatch):
    # frozen: the kept groups end as they were; fine-tuned: they moved; new groups are not the pretrained ones
    ends, real = {}, module.fit

    def kept(*args, **options):
        result = real(*args, **options)
        ends[options["plan"].strategy] = {k: v.clone() for k, v in result.model.state_dict().items()}
        return result

    monkeypatch.setattr(module, "fit", kept)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = curve(model, data)
    frozen, tuned = (ends[f"transfer_curve(new=1, kept={series})"] for series in module.SERIES)
    assert torch.equal(frozen["stage0.0.weight"], before["stage0.0.weight"])
    assert not torch.equal(tuned["stage0.0.weight"], before["stage0.0.weight"])
    assert (frozen["fc.weight"] - before["fc.weight"]).abs().max() > 0.05
    value = {(p.series, p.trained_groups): p.mean for p in found.points}
    assert value["frozen", 5] == value["fine-tuned", 5]  # nothing is kept, so there is no difference
    assert set(value) == {("frozen", 1), ("frozen", 5), ("fine-tuned", 1), ("fine-tuned", 5)}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert "fine-tuned" in str(found)


def test_an_interrupted_curve_goes_on(model, data, tmp_path, monkeypatch):
    # two trainings, an interruption, then only the one that is missing; another experiment is refused
    real, calls = module.fit, []

    def counted(*args, **options):
        calls.append(options["plan"].strategy)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "fit", counted)
    out = tmp_path / "curve.json"
    with pytest.raises(KeyboardInterrupt):
        curve(model, data, out=out)
    found = curve(model, data, out=out)
    assert calls[2:] == ["transfer_curve(new=5, kept=frozen)"] * 2
    assert len(json.loads(out.read_text())["values"]) == len(found.points) == 4
    with pytest.raises(RunError, match="another experiment"):
        curve(model, data, out=out, epochs=3)


def test_a_metric_that_is_no_number_is_told(model, data, tmp_path):
    # NaN among the validation images; JSON could not hold it
    train, val = data
    blind = TensorDataset(val.tensors[0] * float("nan"), val.tensors[1])
    with pytest.raises(TrainingError, match="val_loss is nan, by which no plan can be compared"):
        curve(model, (train, blind), metric="val_loss", out=tmp_path / "curve.json")


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        ({"seeds": 0}, DataError, "seeds is 0; expected at least 1"),
        ({"depths": ()}, PlanError, "there is no depth"),
        ({"out": "missing/curve.json"}, RunError, "missing does not exist"),
        ({"out": ""}, RunError, "no curve's values are in it"),
    ],
)
def test_what_no_curve_comes_of_is_told_before_the_first_training(
    model, data, tmp_path, wrong, error, message
):
    # no seed, no depth, a file in no folder, a folder for the file
    if "out" in wrong:
        wrong = {"out": tmp_path / wrong["out"]}
    with pytest.raises(error, match=message):
        curve(model, data, say=pytest.fail, **wrong)


def test_where_nothing_is_kept_both_series_are_one_training(model, data, monkeypatch):
    # the deepest point; its figures are those of the two trainings that it was
    one, other = (cut_plan(map_of(model), 5, series, epochs=2) for series in module.SERIES)
    assert one.phases == other.phases
    calls, said, real = [], [], module.fit

    def counted(*args, **options):
        calls.append((options["plan"].strategy, options["seed"]))
        return real(*args, **options)

    monkeypatch.setattr(module, "fit", counted)
    found = curve(model, data, depths=(5,), seeds=2, say=said.append)
    assert calls == [("transfer_curve(new=5, kept=frozen)", seed) for seed in (0, 1)]
    frozen, tuned = found.points
    assert (frozen.mean, frozen.error) == (tuned.mean, tuned.error)
    assert len(said) == 4
    assert said[2].endswith(" (as frozen: nothing is kept)")


def test_seeds_give_errors(model, data):
    # two seeds: the mean lies between them and the error is half their distance
    found = curve(model, data, depths=(1,), seeds=2)
    assert all(point.seeds == 2 for point in found.points)
    assert any(point.error > 0 for point in found.points)


def test_bad_depths_and_missing_validation(model, data):
    # nothing is trained
    with pytest.raises(PlanError, match=r"\[0, 9\]"):
        curve(model, data, depths=(0, 9))
    with pytest.raises(DataError, match=r"val is None.*--val-frac"):
        transfer_curve(model, data[0], None, layers=map_of(model))


def test_values_of_other_weights_or_options_are_refused(model, data, tmp_path):
    # the same class with other weights, and another optimiser; and a file from before these were kept
    out = tmp_path / "curve.json"
    options = {"depths": (1,), "epochs": 1, "out": out}
    curve(model, data, **options)
    with pytest.raises(RunError, match=r"another experiment \(not the same weights\)"):
        curve(pretrained(seed=1), data, **options)
    with pytest.raises(RunError, match=r"another experiment \(not the same fit_options\)"):
        curve(model, data, **options, fit_options={"optimizer": "sgd"})
    old = json.loads(out.read_text())
    del old["about"]["weights"], old["about"]["fit_options"]
    out.write_text(json.dumps(old))
    with pytest.raises(RunError, match=r"not the same weights, fit_options"):
        curve(model, data, **options)


@pytest.mark.parametrize("content", ["no JSON", "[1]", "{}"])
def test_a_file_of_something_else_is_refused(model, data, tmp_path, content):
    # and left as it is
    out = tmp_path / "mine.json"
    out.write_text(content)
    with pytest.raises(RunError, match=r"mine\.json is there, and no curve's values .* another file"):
        curve(model, data, depths=(1,), epochs=1, out=out)
    assert out.read_text() == content


def test_options_that_a_curve_sets_itself_are_refused_by_name(model, data):
    # and a metric of the training data; nothing is trained
    with pytest.raises(DataError, match="fit_options has lr, which transfer_curve sets"):
        curve(model, data, fit_options={"lr": 1.0})
    with pytest.raises(DataError, match="'train_loss' is of the training data"):
        curve(model, data, metric="train_loss")


def test_a_metric_that_nobody_measures_is_refused_with_those_there_are(model, data, monkeypatch):
    # before any training; the loss goes by both of its names
    with monkeypatch.context() as patched:
        patched.setattr(module, "fit", None)
        with pytest.raises(DataError, match="'speed' is not measured on this data; expected one of val_loss"):
            curve(model, data, metric="speed")
    losses = [curve(model, data, depths=(1,), epochs=1, metric=name) for name in ("loss", "val_loss")]
    assert losses[0].points == losses[1].points


def test_the_tasks_monitor_is_the_default_metric(model, data, tmp_path):
    # a task that looks at accuracy gives a curve of accuracy
    task = Classification(tuple("abcd"), monitor="accuracy")
    found = curve(model, data, depths=(1,), epochs=1, fit_options={"task": task})
    assert found.metric == "accuracy"

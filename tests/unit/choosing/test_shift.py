"""Shift on a small trained network: where it sits, what moved, and that nothing is not called something."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import nn

from layerwise.choosing.advice import advise
from layerwise.choosing.distances import Estimate
from layerwise.choosing.evidence import similarity
from layerwise.choosing.group_shift import shift_from_source, shift_of_norms
from layerwise.choosing.shift import shift
from layerwise.choosing.shift_result import Shift
from layerwise.choosing.signature import GroupSketch, Signature, project, signature
from layerwise.choosing.taps import NormInputs
from layerwise.errors import DataError, ModelError
from layerwise.layers.mapping import layer_map
from layerwise.tuning.calibration import calibrate_batchnorm

from .small import Net, images, map_of, pretrained


@pytest.fixture(scope="module")
def model():
    return pretrained()


@pytest.fixture(scope="module")
def sketch(model):
    return signature(model, images(400, seed=1)[0], layers=map_of(model))


def measured(model, target, source=None, **options):
    return shift(model, target, source, layers=map_of(model), **options)


def corrupted(x, kind, strength):
    generator = torch.Generator().manual_seed(5)
    if kind == "noise":
        return x + strength * torch.randn(x.shape, generator=generator)
    if kind == "contrast":
        return (x - x.mean((1, 2, 3), keepdim=True)) / (1 + 2 * strength)
    if kind == "grey":
        return x.mean(1, keepdim=True).expand_as(x)
    small = nn.functional.interpolate(x, scale_factor=1 / 4, mode="area")
    return nn.functional.interpolate(small, size=x.shape[2:], mode="bilinear")


def test_fresh_data_of_the_same_domain_shows_no_shift(model, sketch):
    # against running statistics, a signature and a source sample the overall interval contains zero
    x, _ = images(300, seed=2)
    for source in (None, sketch, images(400, seed=1)[0]):
        found = measured(model, x, source)
        assert found.overall.nothing
        assert found.where == "none"
        assert found.moved == ()


def test_halves_of_rare_and_related_features_show_no_shift():
    # drawn feature by feature, as a Gaussian's, the source's moments hardly moved: 5 of 40 splits held 0
    def features(count: int) -> np.ndarray:
        shared = rng.normal(size=(count, 1))  # of all features of a sample
        return np.maximum(shared + rng.normal(size=(count, 64)) - 2, 0).astype(np.float32)

    rng, held = np.random.default_rng(0), 0
    for split in range(40):
        target, source = features(100), features(100)
        mean, var = source.mean(0), source.var(0, ddof=1)
        sketch = GroupSketch(mean, var, project(source[:20], mean, var).astype(np.float32))
        _, found = shift_from_source(target, sketch, 100, draws=100, level=0.9, seed=split, rng=rng)
        held += found["frechet"].low == 0
    assert held >= 34


def test_identical_arrays_show_no_shift(model):
    # the same tensor as source and as target: every distance has zero in its interval
    x, _ = images(200, seed=3)
    found = measured(model, x, x)
    assert found.overall.nothing
    for group in found.groups:
        assert group.frechet.nothing, group
        assert group.mmd.nothing, group
        assert group.proxy_a.nothing, group
        assert group.cka.high > 0.95, group


def test_inputs_of_equal_means_have_no_effect(model):
    # a difference of means has no excess to be taken off, as distances have
    x, _ = images(60, seed=3)
    for entry in measured(model, x, x).inputs:
        assert entry.effect.value == pytest.approx(0, abs=1e-3), entry
        assert entry.effect.nothing


@pytest.mark.parametrize("against", ["norms", "signature"])
def test_low_level_corruption_raises_the_early_groups_first(model, sketch, against):
    # slight pixel noise: the first stage leaves zero while the last has not; more noise, more shift
    x, _ = images(300, seed=2)
    source = None if against == "norms" else sketch
    weak, strong = (measured(model, corrupted(x, "noise", s), source) for s in (0.3, 1.0))
    assert weak.method == against
    assert not weak.groups[0].main.nothing
    assert weak.groups[0].main.value > 2 * weak.groups[3].main.value
    assert weak.where == "early"
    assert strong.overall.low > weak.overall.high


@pytest.mark.parametrize(
    ("kind", "name", "sign"),
    [("noise", "noise", 1), ("contrast", "contrast", -1), ("grey", "colour", -1), ("blur", "resolution", -1)],
)
def test_the_dimension_that_moved_is_named(model, sketch, kind, name, sign):
    # each corruption is found on the raw inputs, with its direction
    x, _ = images(300, seed=2)
    source = signature(model, corrupted(x, "noise", 0.2), layers=map_of(model)) if kind == "blur" else sketch
    found = measured(model, corrupted(x, kind, 1.0), source)
    moved = {entry.name: entry.effect.value for entry in found.moved}
    assert name in moved
    assert np.sign(moved[name]) == sign
    assert f"{name} {moved[name]:+.1f} sd" in found.summary
    if kind != "blur":  # which also takes the noise away
        assert found.moved[0].name == name


def test_label_permutation_is_not_an_input_shift_and_lowers_logme(model, sketch):
    # the inputs are the same, so the shift is; transferability falls at every depth
    x, y = images(300, seed=2)
    permuted = y[torch.randperm(300, generator=torch.Generator().manual_seed(0))]
    found, shuffled = (measured(model, (x, labels), sketch) for labels in (y, permuted))
    assert shuffled.overall == found.overall
    assert shuffled.overall.nothing
    assert "the inputs changed" not in shuffled.summary
    for before, after in zip(found.labels.transfer.depths, shuffled.labels.transfer.depths):
        assert after.logme < before.logme
    assert found.labels.separable > shuffled.labels.separable + 0.3


def test_signature_and_its_source_give_the_same_figures(model, tmp_path):
    # measuring against data, its signature, and the saved file agree (the file within half precision)
    source, target = images(100, seed=1)[0], corrupted(images(100, seed=2)[0], "noise", 0.5)
    made = signature(model, source, layers=map_of(model))
    path = made.save(tmp_path / "sig.safetensors")
    direct, stored, read = (measured(model, target, s, draws=50) for s in (source, made, path))
    assert [g.frechet for g in direct.groups] == [g.frechet for g in stored.groups]
    for one, other in zip(direct.groups, read.groups):
        assert other.frechet.value == pytest.approx(one.frechet.value, rel=1e-4)
        assert other.mmd.value == pytest.approx(one.mmd.value, abs=2e-3)
    assert path.stat().st_size < 40_000


def test_shift_leaves_model_modes_hooks_and_random_state_alone(model):
    # weights, buffers, train flags, hooks and generators are as before, also when a batch fails
    subject = copy.deepcopy(model).train()
    subject.stage1.eval()
    before = {k: v.clone() for k, v in subject.state_dict().items()}
    modes = [m.training for m in subject.modules()]
    state = torch.get_rng_state()
    measured(subject, images(40)[0])
    with pytest.raises(RuntimeError):
        measured(subject, torch.ones(4, 5, 8, 8))  # five channels do not fit
    assert all(torch.equal(before[k], v) for k, v in subject.state_dict().items())
    assert [m.training for m in subject.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in subject.modules())
    assert torch.equal(state, torch.get_rng_state())


def test_result_is_a_function_of_its_arguments(model, sketch):
    # equal arguments, equal result; another seed draws other samples
    x, _ = images(300, seed=2)
    one, same, other = (measured(model, x, sketch, max_samples=64, seed=s) for s in (1, 1, 2))
    assert one == same
    assert one.overall != other.overall


def test_printing_and_plain_data(model, sketch):
    # the table names every group and every moved input; the dictionary survives JSON
    x, y = images(60, seed=2)
    found = measured(model, (corrupted(x, "grey", 1), y), sketch, draws=50)
    text = str(found)
    assert all(name in text for name in ("stage0", "fc", "frechet", "colour", "moved", "LogME"))
    data = json.loads(json.dumps(found.to_dict()))
    assert data["moved"] == [entry.name for entry in found.moved]
    assert data["groups"][0]["frechet"]["value"] == found.groups[0].frechet.value
    assert isinstance(found, Shift)


def test_network_without_norms_and_source_says_what_is_missing():
    # the message names the command that makes a signature
    model = Net(norm=False)
    with pytest.raises(ModelError, match=r"no layer with running statistics.*layerwise signature MODEL"):
        measured(model, images(20)[0])


def test_network_without_norms_works_with_a_source():
    # the same network is measured once there is a source
    model = pretrained(norm=False)
    x, _ = images(200, seed=2)
    assert measured(model, x, images(200, seed=1)[0]).overall.nothing
    assert not measured(model, corrupted(x, "noise", 1.0), images(200, seed=1)[0]).overall.nothing


def test_source_of_another_resolution_or_modality_is_refused(model):
    # 24 and 32 pixels, and token ids, are not comparable; both sides are named
    with pytest.raises(DataError, match=r"3x32x32.*3x24x24"):
        measured(model, images(20)[0], images(20, size=32)[0])
    other = signature(model, images(20)[0], layers=map_of(model))
    tokens = Signature(**{**other.__dict__, "modality": "tokens", "shape": (7,)})
    with pytest.raises(
        DataError, match=r"source is texts .token ids. of shape 7 and the target images of shape 3x24x24"
    ):
        measured(model, images(20)[0], tokens)


@pytest.mark.parametrize(
    ("source", "named"),
    [
        (torch.zeros(20, 9, dtype=torch.long), "the source is texts .token ids. and the target images"),
        (torch.zeros(20, 1, 24, 24), "the source's inputs have the shape 1x24x24"),
    ],
)
def test_a_source_that_the_model_cannot_run_on_is_told_before_it_does(model, source, named):
    # not by the convolution, in torch's words; advice says the same
    x, y = images(20)
    with pytest.raises(DataError, match=named):
        measured(model, x, source)
    with pytest.raises(DataError, match=named):
        advise(model, (x, y), source, layers=map_of(model))


def test_signature_of_another_network_is_refused(model):
    # widths differ: the groups are named
    wide = pretrained(widths=(8, 12, 20, 24))
    made = signature(wide, images(20)[0], layers=map_of(wide))
    with pytest.raises(ModelError, match="stage2"):
        measured(model, images(20)[0], made)


def test_one_class_is_noted_and_the_shift_still_measured(model):
    # labels of one class tell nothing; the inputs still do
    x, _ = images(40)
    found = measured(model, (x, torch.zeros(40, dtype=torch.long)))
    assert found.labels is None
    assert any("the label 0" in note for note in found.notes)
    assert found.groups


def test_bad_arguments_are_named(model):
    # one sample, too few draws, no data, unequal numbers of inputs and labels, float labels
    x, y = images(20)
    with pytest.raises(DataError, match="at least two samples"):
        measured(model, x[:1])
    with pytest.raises(DataError, match="draws is 3"):
        measured(model, x, draws=3)
    with pytest.raises(DataError, match="no samples"):
        measured(model, x[:0])
    with pytest.raises(DataError, match="20 inputs came with 19 labels"):
        measured(model, (x, y[:19]))
    with pytest.raises(DataError, match="one integer for each sample"):
        measured(model, (x, y.float()))


def test_damaged_and_foreign_signature_files_are_refused(model, tmp_path):
    # missing, truncated, and a safetensors file of something else
    from safetensors.torch import save_file

    path = signature(model, images(20)[0], layers=map_of(model)).save(tmp_path / "sig.safetensors")
    with pytest.raises(DataError, match="no signature at"):
        Signature.load(tmp_path / "none.safetensors")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="cannot be read"):
        Signature.load(tmp_path / "cut.safetensors")
    save_file({"w": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(DataError, match="no layerwise signature"):
        Signature.load(tmp_path / "weights.safetensors")


@pytest.mark.parametrize("samples", [65, 127, 200])
def test_running_statistics_are_compared_with_every_sample(samples):
    # the last 63 samples, ten sd away, count as much as the first: the figure is that of all moments
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.ReLU(), nn.Flatten(), nn.Linear(48, 2))
    x = torch.randn(samples, 2, 4, 4)
    x[-63:] += 10
    mean, sd = x.mean((0, 2, 3)), x.std((0, 2, 3), correction=0)
    expected = float(((mean**2 + (sd - 1) ** 2) / 1.1).mean())
    found = shift(model.eval(), x, draws=400).groups[0].norms
    # and the interval is about that of re-drawn samples
    drawn = [x[torch.randint(samples, (samples,))] for _ in range(400)]
    moments = [(d.mean((0, 2, 3)), d.std((0, 2, 3), correction=0)) for d in drawn]
    spread = torch.stack([((m**2 + (s - 1) ** 2) / 1.1).mean() for m, s in moments]).std().item()
    assert found.value == pytest.approx(expected, rel=0.05)
    assert 0.5 < (found.high - found.low) / (2 * 1.645 * spread) < 2


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(model, value):
    # one pixel of one image, against running statistics as against a source
    x, _ = images(40, seed=2)
    x[5, 0, 3, 3] = value
    for source in (None, images(40, seed=1)[0]):
        with pytest.raises(DataError, match="NaN or infinite values in 1 of 40 samples"):
            measured(model, x, source)


def test_running_statistics_that_are_not_finite_are_refused():
    # of a damaged checkpoint, and of inputs that only the norm shows; each is told by itself
    found = NormInputs("a", np.ones(2), *(np.ones((2, 3), np.float32),) * 2, *(np.ones(3, np.float32),) * 2)
    for name, message in (
        ("running_var", "running statistics of a norm in group 'a'"),
        ("mean", "what a norm in group 'a' receives"),
    ):
        bad = getattr(found, name).copy()
        bad.flat[0] = np.nan
        with pytest.raises(DataError, match=message):
            shift_of_norms([dataclasses.replace(found, **{name: bad})], draws=20, level=0.9, seed=0)


def test_a_shift_that_is_no_number_says_nothing(model):
    # NaN is below no threshold: it must not read as similar
    found = measured(model, images(40)[0])
    nan = Estimate(float("nan"), float("nan"), float("nan"))
    assert similarity(found)[0] != "unknown"
    assert similarity(dataclasses.replace(found, input_side=nan)) == ("unknown", "low")


def test_one_standard_deviation_off_is_as_documented():
    # 10 % of the mean variance is added to the unit: 1 / 1.1, and for KL 0.5 / 1.1
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(256, 2))
    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True)
    found = shift(model.eval(), x + 1).groups[0]
    assert found.norms.value == pytest.approx(1 / 1.1, rel=0.01)
    assert found.kl.value == pytest.approx(0.5 / 1.1, rel=0.01)


def test_a_norm_of_single_samples_is_compared_with_their_own_variances():
    # InstanceNorm's running variance is the mean of the samples' own: how their levels differ is not in it.
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    rest = (nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    net = nn.Sequential(nn.Conv2d(3, 4, 3), norm, *rest)
    x = torch.randn(200, 3, 9, 9) + 2 * torch.randn(200, 3, 1, 1)
    calibrate_batchnorm(net, [x])
    assert shift(net, x, layers=layer_map(net, x[:2])).overall.nothing
    assert shift(net, 3 * x, layers=layer_map(net, x[:2])).overall.low > 0.5


def test_values_far_from_zero_are_no_shift():
    # years, say: the variance is small beside the square of the mean, of which float32 has seven digits
    x = torch.randn(400, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([2015.0, 1e4, -3e3])
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    model[0].running_mean.copy_(x.double().mean(0))
    model[0].running_var.copy_(x.double().var(0))
    found = shift(model, x, layers=layer_map(model, x[:2], granularity="layers")).groups[0]
    assert found.norms.value < 1e-4
    assert found.kl.value < 1e-4


def test_a_norm_that_does_not_run_is_left_out(model):
    # a spare one beside those that run: the same figures as without it
    x, _ = images(60, seed=2)
    spare = copy.deepcopy(model)
    spare.stage1.spare = nn.BatchNorm2d(3)
    spare.stage1.forward = lambda value: spare.stage1[2](spare.stage1[1](spare.stage1[0](value)))
    assert measured(spare, x).to_dict() == measured(model, x).to_dict()


def test_a_norm_that_is_given_its_input_by_name_counts(model):
    # bn(input=x) is what it is called with, too
    class Named(nn.BatchNorm2d):
        def __call__(self, x):
            return super().__call__(input=x)

    x, _ = images(60, seed=2)
    named = copy.deepcopy(model)
    named.stage0[1].__class__ = Named
    assert measured(named, x).to_dict() == measured(model, x).to_dict()


def test_values_without_labels_are_printed_without_tables_of_them():
    # neither image figures nor transferability: only the groups
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    x = torch.randn(40, 4)
    text = str(shift(net, x + 1, x, draws=20))
    assert "frechet" in text
    assert "labels:" not in text
    assert "effect (sd)" not in text


def test_a_group_without_features_is_left_out_of_a_shift_from_a_source():
    # it is named, and the others are measured
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(5, 8)

        def forward(self, x):
            return self.proj(x).unflatten(2, (4, 2)).transpose(1, 2)

    class OfHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads, self.fc = Heads(), nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.heads(x).transpose(1, 2).flatten(2).mean(1))

    torch.manual_seed(0)
    x = torch.randn(40, 7, 5)
    net = OfHeads().eval()
    found = shift(net, x + 1, x, layers=layer_map(net, x[:2]), draws=20)
    assert [group.group for group in found.groups] == ["fc"]
    assert found.notes[0].startswith("no features of heads")


def test_one_sample_is_no_source(model):
    # of a single one there is no variance
    with pytest.raises(DataError, match="a signature needs at least two samples, better some hundred; got 1"):
        signature(model, images(1)[0], layers=map_of(model))


def test_a_chunk_counts_by_its_samples():
    # one sample in a chunk and 99 in the other: the mean is 0.01, not 0.5
    mean, square = np.float32([[1], [0]]), np.float32([[2], [1]])
    norm = NormInputs("a", np.array([1, 99]), mean, square, np.zeros(1, np.float32), np.ones(1, np.float32))
    (value, drawn), _ = shift_of_norms([norm], draws=50, level=0.9, seed=0)
    assert value == pytest.approx((0.01**2 + ((1.01 - 0.01**2) ** 0.5 - 1) ** 2) / 1.1, rel=1e-5)
    assert drawn.max() > 0.5  # a draw of the small chunk alone


class Both(Net):
    """A `Net` whose new head gets the average and the highest value of each channel."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(48, 4)

    def forward(self, x):
        for i in range(4):
            x = getattr(self, f"stage{i}")(x)
        return self.fc(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))


def test_a_head_of_another_width_is_left_out(model, sketch):
    # a head is new as a rule: what its output layer gets cannot be compared then, all else can
    other = Both()
    found = shift(other, images(40)[0], sketch, layers=map_of(other))
    assert [group.group for group in found.groups] == ["stage0", "stage1", "stage2", "stage3"]


@pytest.mark.parametrize("about", ["3", "[]", '{"groups": [], "inputs": []}'])
def test_a_signature_whose_description_was_altered_is_told(sketch, tmp_path, about):
    # it is JSON, and not what was written
    path = sketch.save(tmp_path / "a.safetensors")
    save_file(load_file(path), path, {"layerwise_signature": "1", "about": about})
    with pytest.raises(DataError, match="cannot be read as a signature"):
        Signature.load(path)

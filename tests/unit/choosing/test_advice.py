"""Advice from data to plan on a small trained network: it follows the measured figures."""

import json

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from layerwise.choosing.advice import advise
from layerwise.choosing.signature import signature
from layerwise.errors import DataError, ModelError, PlanError
from layerwise.layers.mapping import layer_map
from layerwise.layers.randomness import drawn
from layerwise.plans.plan import Plan
from layerwise.plans.storage import parse

from .small import Net, images, map_of, pretrained


@pytest.fixture(scope="module")
def model():
    return pretrained()


def advised(model, x, y, source=None, **options):
    return advise(model, TensorDataset(x, y), source, layers=map_of(model), **options)


def test_the_task_it_was_trained_for_gets_a_linear_probe(model):
    # same domain, same classes, 200 samples: similar, and the features separate the classes
    found = advised(model, *images(200, seed=2))
    assert found.similarity == "similar"
    assert found.strategy == "linear_probe"
    assert found.size == "< 1K"
    assert [name for name, rate in found.plan.phases[0].rates.items() if rate] == ["fc"]


def test_strong_noise_is_dissimilar_and_is_not_probed_blindly(model):
    # the same images under strong noise: another level, another plan, and the reasons say why
    x, y = images(200, seed=2)
    noisy = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    found = advised(model, noisy, y)
    assert found.similarity == "dissimilar"
    assert any(r.about == "batch-norm" for r in found.reasons)
    plain = advised(model, x, y)
    assert (found.strategy, found.plan.phases[0].norms) != (plain.strategy, plain.plan.phases[0].norms)


def test_advice_is_a_function_of_its_arguments_and_changes_nothing(model):
    # twice the same; weights, modes and random state as before
    x, y = images(120, seed=3)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    assert advised(model, x, y).to_dict() == advised(model, x, y).to_dict()
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not model.training


def test_what_is_printed_holds_reasons_alternatives_and_the_plan_as_yaml(model):
    # every reason's text, every alternative, and a plan that reads back as the same plan
    found = advised(model, *images(120, seed=3))
    text = str(found)
    assert all(reason.text in text for reason in found.reasons)
    assert all(other.strategy in text for other in found.alternatives)
    start = next(i for i, line in enumerate(text.splitlines()) if line.startswith(("version:", "# ")))
    assert parse("\n".join(text.splitlines()[start:]), "the text") == found.plan
    data = json.loads(json.dumps(found.to_dict()))
    assert Plan(**data["plan"]) == found.plan


def test_class_weights_are_not_advised_where_a_probe_loses_by_them(model):
    # labels that no feature tells: weights only turn samples of the large class to the small one
    x, _ = images(300, seed=4)
    y = (torch.rand(300, generator=torch.Generator().manual_seed(0)) < 0.12).long()
    found = advised(model, x, y)
    assert found.fit_options == {}
    assert "bring nothing clear" in next(r.text for r in found.reasons if r.about == "classes")


def test_network_without_norms_and_source_is_advised_with_low_confidence():
    # similarity is unknown, the message names the command, and the features still speak
    model = pretrained(norm=False)
    found = advised(model, *images(120, seed=3))
    assert found.similarity == "unknown"
    assert found.confidence == "low"
    assert "layerwise signature" in found.reasons[0].text
    assert str(found).count("layerwise signature") == 1
    assert found.notes == ()


def test_network_without_norms_uses_a_source():
    # with a source sample the same network knows its similarity
    model = pretrained(norm=False)
    found = advised(model, *images(120, seed=3), source=images(200, seed=4)[0])
    assert found.similarity == "similar"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.zeros(12, dtype=torch.long), "label 0"),
        (torch.arange(12), "12 samples of 12 classes"),
        (torch.rand(12), "one integer for each sample"),
    ],
)
def test_labels_that_cannot_be_advised_on(model, labels, message):
    # one class, as many classes as samples, regression targets
    with pytest.raises(DataError, match=message):
        advised(model, images(12)[0], labels)


def test_fewer_samples_than_declared_classes(model):
    # the data set says it has 40 classes and holds 12 samples
    data = TensorDataset(*images(12))
    data.classes = [f"class {i}" for i in range(40)]
    with pytest.raises(DataError, match="12 training samples for 40 classes"):
        advise(model, data, layers=map_of(model))


def test_classes_that_the_draw_missed_are_counted(model):
    # 512 of many samples need not show every class that the data set names
    data = TensorDataset(*images(60))
    data.classes = [f"class {i}" for i in range(40)]
    found = advise(model, data, layers=map_of(model), max_samples=30)
    assert "60 samples of 40 classes" in next(r.text for r in found.reasons if r.about == "size")


def test_source_of_another_size_is_refused(model):
    # the error of shift reaches the caller
    with pytest.raises(DataError, match="3x32x32"):
        advised(model, *images(40), source=images(40, size=32)[0])


def test_a_signature_of_another_network_is_refused(model):
    # and not taken for a network without a summary of its source
    x, y = images(60, seed=2)
    other = pretrained(widths=(4, 4, 6, 6))
    with pytest.raises(ModelError, match="its groups differ from this model's"):
        advised(model, x, y, signature(other, x, layers=map_of(other)))


def test_data_without_labels_and_wrong_options(model):
    # unlabelled data is sent to shift; batch size 0 is no batch size, a method no kind
    with pytest.raises(DataError, match=r"layerwise\.shift"):
        advise(model, images(20)[0], layers=map_of(model))
    with pytest.raises(DataError, match="batch_size is 0"):
        advised(model, *images(20), batch_size=0)
    with pytest.raises(
        DataError, match="pretraining is 'simclr'; expected one of supervised, self_supervised"
    ):
        advised(model, *images(20), pretraining="simclr")


def test_model_without_a_head_is_refused():
    # nothing to probe with
    from layerwise.layers.layermap import LayerMap

    model = Net()
    layers = LayerMap(map_of(model).groups[:4], "stages")
    with pytest.raises(PlanError, match="no head"):
        advise(model, TensorDataset(*images(40)), layers=layers)


class Stream(IterableDataset):
    """Samples that are made as they are asked for; with a length or without."""

    def __init__(self, x, y, times):
        self.x, self.y, self.times = x, y, times

    def __iter__(self):
        return (pair for _ in range(self.times) for pair in zip(self.x, self.y.tolist()))


class Sized(Stream):
    def __len__(self):
        return self.times * len(self.x)


class Once(IterableDataset):
    """An open connection: what was read is gone."""

    def __init__(self, pairs):
        self.pairs = pairs

    def __iter__(self):
        return self.pairs


def test_a_stream_is_not_taken_for_what_was_measured_of_it(model):
    # 20,000 samples, 128 measured: by its length, or, without one, with low confidence in the size
    x, y = images(200, seed=2)
    sized, bare = (
        advise(
            model, DataLoader(kind(x, y, 100), batch_size=32), layers=map_of(model), max_samples=128
        )
        for kind in (Sized, Stream)
    )  # fmt: skip
    assert sized.size == "10K-100K"
    reason = next(r for r in bare.reasons if r.about == "size")
    assert reason.text.startswith("unknown, at least 128 samples")
    assert (reason.confidence, bare.confidence) == ("low", "low")


@pytest.mark.parametrize("kind", ["iterator", "loader"])
def test_what_can_be_gone_through_once_is_enough(model, kind):
    # dissimilar data on a batch-norm net need a second pass: it goes over what the first one saw
    x, y = images(96, seed=2)
    noisy = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    again = advise(model, TensorDataset(noisy, y), layers=map_of(model))
    pairs = zip(noisy.split(32), y.split(32))
    data = pairs if kind == "iterator" else DataLoader(Once(zip(noisy, y.tolist())), batch_size=32)
    found = advise(model, data, layers=map_of(model))
    assert any(r.about == "batch-norm" for r in found.reasons)
    assert [r.text for r in found.reasons] == [r.text for r in again.reasons]


def test_what_a_collate_function_draws_is_undone(model):
    # in both passes, the second one for the recalibration of batch-norms included
    def collate(samples):
        x, y = (torch.stack(parts) for parts in zip(*samples))
        return x + 3 * torch.randn(x.shape), y

    before = drawn()
    found = advised(model, *images(96, seed=2), collate=collate)
    assert any(r.about == "batch-norm" for r in found.reasons)
    assert drawn() == before


class Named(torch.nn.Module):
    """A network whose inputs have a name."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, pixels):
        return self.net(pixels)


class Pair(Named):
    def forward(self, pair):
        return self.net(pair[0] + pair[1])


def test_recalibration_takes_inputs_of_every_form(model):
    # named ones and pairs, as batches that the second pass joins, say the same as plain images
    x, y = images(96, seed=2)
    noisy = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    plain = advised(model, noisy, y)
    assert any(r.about == "batch-norm" for r in plain.reasons)
    named = [{"pixels": image, "labels": label} for image, label in zip(noisy, y)]
    pairs = [((image, torch.zeros_like(image)), label) for image, label in zip(noisy, y)]
    for wrapper, data in ((Named, named), (Pair, pairs)):
        wrapped = wrapper(model)
        example = {"pixels": x[:2]} if wrapper is Named else ([x[:2], x[:2]],)
        found = advise(wrapped, data, layers=layer_map(wrapped, example, "stages"))
        assert [r.text for r in found.reasons if r.about == "batch-norm"] == [
            r.text for r in plain.reasons if r.about == "batch-norm"
        ]


def test_recalibration_takes_batches_of_several_sizes(model):
    # images of 24 and of 30 pixels cannot be joined to one batch
    x, y = images(96, seed=2)
    noisy = x + 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    larger = torch.nn.functional.interpolate(noisy[48:], size=(30, 30))
    found = advise(model, iter([(noisy[:48], y[:48]), (larger, y[48:])]), layers=map_of(model))
    assert any(r.about == "batch-norm" for r in found.reasons)

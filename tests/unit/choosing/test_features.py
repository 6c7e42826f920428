"""Pooled features: the right axis, the right samples, and norm inputs that are the true statistics."""

import dataclasses
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from layerwise.choosing.depths import score_depths, transferability
from layerwise.choosing.features import collect_features, map_for
from layerwise.choosing.pooling import pool, pool_all
from layerwise.choosing.samples import KeptBatches, parts_of, split_inputs
from layerwise.errors import DataError, ModelError
from layerwise.layers.mapping import layer_map
from layerwise.layers.randomness import drawn

from .small import Net, images, map_of, pretrained


def test_features_are_the_pooled_outputs_of_the_groups():
    # each group's row is its own output, averaged over positions; the head's is what fc receives
    model = Net().eval()
    x, y = images(10)
    found = collect_features(model, (x, y), map_of(model), batch_size=4)
    with torch.no_grad():
        value = x
        for i in range(4):
            value = getattr(model, f"stage{i}")(value)
            np.testing.assert_allclose(
                found.groups[f"stage{i}"], value.mean((2, 3)).numpy(), rtol=1e-5, atol=1e-6
            )
        np.testing.assert_allclose(found.groups["fc"], value.mean((2, 3)).numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.outputs, model(x).numpy(), rtol=1e-5, atol=1e-6)
    assert list(found.groups) == ["stage0", "stage1", "stage2", "stage3", "fc"]
    assert found.depth == {"stage0": 4, "stage1": 3, "stage2": 2, "stage3": 1, "fc": 0}
    assert found.labels.tolist() == y.tolist()
    assert (found.samples, found.total, found.shape, found.modality) == (10, 10, (3, 24, 24), "image")


def test_norm_inputs_are_the_statistics_of_what_the_norm_receives():
    # mean and mean square over the chunks are those of the convolution's output
    model = pretrained()
    x, _ = images(64)
    found = collect_features(model, x, map_of(model), batch_size=10)
    with torch.no_grad():
        before = model.stage1[0](model.stage0(x))
    norm = found.norms["stage1.1"]
    assert norm.group == "stage1"
    np.testing.assert_allclose(norm.mean.mean(0), before.mean((0, 2, 3)).numpy(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(norm.square.mean(0), (before**2).mean((0, 2, 3)).numpy(), rtol=1e-4)
    np.testing.assert_array_equal(norm.running_mean, model.stage1[1].running_mean.numpy())


@pytest.mark.parametrize(
    ("shape", "widths", "mask", "ratio", "axis"),
    [
        ((2, 5, 7, 7), {5}, None, 1.0, 1),  # (N, C, H, W)
        ((2, 7, 7, 5), {5}, None, 1.0, 3),  # (N, H, W, C), as Swin's blocks hand on
        ((2, 7, 7, 7), {7}, None, 1.0, 1),  # nothing to tell them apart: channels first
        ((2, 8, 4, 8), {8}, None, 2.0, 3),  # the two positions have the ratio of the image
        ((2, 9, 6), {6}, None, 1.0, 2),  # (N, T, C)
        ((2, 6, 9), {6}, None, 1.0, 1),  # (N, C, T)
        ((2, 6, 6), {6}, None, 1.0, 2),
        ((2, 1, 6), {1}, None, 1.0, 2),  # one entry is a position: CoaT's aggregation of three branches
        ((2, 1, 7, 7), set(), None, 1.0, 1),
    ],
)
def test_pool_finds_the_channels(shape, widths, mask, ratio, axis):
    # the mean over all other axes but the batch
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = value.movedim(axis, 1).flatten(2).mean(2)
    torch.testing.assert_close(pool(value, widths=widths, mask=mask, ratio=ratio), expected)


def test_pool_refuses_what_it_cannot_tell():
    # attention heads x tokens x width: no axis is a channel of the group, and no sides are an image's
    assert pool(torch.zeros(2, 8, 50, 19), widths={152}) is None
    assert pool_all([torch.zeros(2, 8, 50, 19)], widths={152}) is None
    assert pool_all([], widths={152}) is None


def test_branches_are_pooled_side_by_side():
    # two resolutions of three axes each; the table of four axes beside them is no feature
    one, two, table = torch.randn(2, 9, 4), torch.randn(2, 4, 6), torch.randn(2, 8, 9, 9)
    found = pool_all([one, two, table], widths={4, 6})
    torch.testing.assert_close(found, torch.cat([one.mean(1), two.mean(1)], dim=1))


class Mixer(nn.Module):
    """A block that calls a module which all blocks share, as CoaT's position encodings are."""

    def __init__(self, shared):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.proj = nn.Linear(8, 8)
        self.shared = shared

    def forward(self, x):
        heads = self.norm(x).unflatten(2, (4, 2)).transpose(1, 2)  # [N, heads, T, 2]
        return x + self.proj(self.shared(heads).transpose(1, 2).flatten(2))


class Shared(nn.Module):
    """Lists of blocks which are never called as lists, and share a module."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(5, 8))
        self.drop = nn.Dropout(0.1)
        self.shared = nn.Linear(2, 2)
        self.early = nn.ModuleList([Mixer(self.shared) for _ in range(2)])
        self.late = nn.ModuleList([Mixer(self.shared) for _ in range(2)])
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.drop(self.embed(x))
        for block in [*self.early, *self.late]:
            x = self.drop(block(x))
        return self.head(x.mean(1))


@pytest.mark.parametrize("granularity", ["stages", "blocks"])
def test_a_block_hands_on_its_own_output_and_not_that_of_a_module_inside(granularity):
    # the shared module runs last inside, on heads; the features are those of the block around it
    torch.manual_seed(0)
    model = Shared().eval()
    x = torch.randn(3, 7, 5)
    layers = layer_map(model, x, granularity)
    found = collect_features(model, x, layers)
    with torch.no_grad():
        value, outputs = model.embed(x), []
        embedded = value.mean(1).numpy()
        for block in [*model.early, *model.late]:
            value = block(value)
            outputs.append(value.mean(1).numpy())
    wanted = outputs if granularity == "blocks" else outputs[1::2]
    trunk = [found.groups[group.name] for group in layers if group.role == "trunk"][-len(wanted) :]
    assert found.notes == ()
    np.testing.assert_allclose(found.groups[layers.names[0]], embedded, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(trunk, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@dataclasses.dataclass
class Step:
    """What a block of `Stepwise` hands on."""

    x: torch.Tensor


class StepBlock(nn.Module):
    """Two layers on what the block before hands on."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, step: Step) -> Step:
        return Step(step.x + self.two(self.one(step.x).relu()))


class Stepwise(nn.Module):
    """Blocks that hand on an object of a class of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.fc = nn.Sequential(StepBlock(), StepBlock()), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.blocks(Step(x)).x)


def test_features_may_be_handed_on_in_an_object() -> None:
    """A layer map sees the tensors in it, and so do its features."""
    model, data = Stepwise(), torch.randn(8, 4)
    found = collect_features(model, data, layer_map(model, data[:2]))
    assert list(found.groups) == ["blocks.0", "blocks.1", "fc"]
    assert not found.notes


def test_a_group_without_features_is_named():
    # what it hands on is heads x tokens: left out with the reason, and the others are there
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(5, 8)

        def forward(self, x):
            return self.proj(x).unflatten(2, (4, 2)).transpose(1, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = Heads()
            self.fc = nn.Linear(8, 3)

        def forward(self, x):
            return self.fc(self.heads(x).transpose(1, 2).flatten(2).mean(1))

    model = Net().eval()
    x = torch.randn(3, 7, 5)
    found = collect_features(model, x, layer_map(model, x))
    assert list(found.groups) == ["fc"]
    assert "heads" in found.notes[0]
    assert "channels" in found.notes[0]


def test_pool_leaves_padding_out():
    # only the positions that the attention mask names count
    value = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    found = pool(value, widths={3}, mask=mask)
    torch.testing.assert_close(found, torch.stack([value[0, :2].mean(0), value[1].mean(0)]))


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        yield from self.x


@pytest.mark.parametrize("kind", ["tensor", "dataset", "loader", "stream", "list"])
def test_every_kind_of_data_gives_the_same_features(kind):
    # a tensor, a data set, a loader, an iterable loader and a list hold the same samples
    model = Net().eval()
    x, _ = images(12)
    data = {
        "tensor": x,
        "dataset": TensorDataset(x),
        "loader": DataLoader(TensorDataset(x), batch_size=5, shuffle=True),
        "stream": DataLoader(Stream(x), batch_size=5),
        "list": list(x),
    }[kind]
    found = collect_features(model, data, map_of(model))
    expected = collect_features(model, (x, torch.zeros(12, dtype=torch.long)), map_of(model))
    if kind == "loader":  # rows may come in any order
        assert found.labels is None
    np.testing.assert_allclose(found.groups["stage3"], expected.groups["stage3"], rtol=1e-4, atol=1e-6)


def test_the_drawn_sample_depends_on_the_seed_alone():
    # 8 of 40 samples: the same seed the same ones, labels still with their inputs
    model = Net().eval()
    x, y = images(40)
    one, same, other = (
        collect_features(model, (x, y), map_of(model), max_samples=8, seed=s) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one.groups["fc"], same.groups["fc"])
    assert not np.array_equal(one.groups["fc"], other.groups["fc"])
    whole = collect_features(model, (x, y), map_of(model), max_samples=None)
    where = [int(np.abs(whole.groups["fc"] - row).sum(1).argmin()) for row in one.groups["fc"]]
    assert len(set(where)) == 8
    assert one.labels.tolist() == y[where].tolist()
    assert (one.samples, one.total) == (8, 40)


def test_unusable_data_is_named():
    # a string, a batch of three, and a mapping without tensors
    model = Net().eval()
    with pytest.raises(DataError, match="is a str"):
        collect_features(model, "folder", map_of(model))
    with pytest.raises(DataError, match="tuple of 3"):
        collect_features(model, iter([(torch.zeros(1), 2, 3)]), map_of(model))
    with pytest.raises(DataError, match="no tensor"):
        collect_features(model, iter([{"text": "words"}]), map_of(model))
    with pytest.raises(DataError, match="7 labels came with 8 samples"):
        collect_features(model, iter([(torch.zeros(8, 3, 9, 9), torch.zeros(7).long())]), map_of(model))


def test_data_without_samples_is_refused():
    # an iterator that is over, and a loader of an empty stream, with a layer map and without one
    model = Net().eval()
    empty = DataLoader(Stream([]))
    with pytest.raises(DataError, match="holds no samples"):
        collect_features(model, iter([]), map_of(model))
    with pytest.raises(DataError, match="holds no samples"):
        map_for(model, empty, None, None)


def test_a_model_that_mixes_its_samples_has_no_features():
    # the mean over the batch comes first: no output has a row a sample
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            return self.b(self.a(x.mean(0)))

    model = Mean().eval()
    with pytest.raises(ModelError, match="row for each sample"):
        collect_features(model, torch.randn(8, 4), layer_map(model, torch.randn(8, 4), "layers"))


def test_transferability_rises_with_depth_on_the_task_the_network_knows():
    # trained on these classes: the last depth separates them better than the first, and LEEP of its own
    # head is near 0
    model = pretrained()
    x, y = images(240, seed=2)
    found = transferability(model, (x, y), layers=map_of(model))
    first, last = found.depths[0], found.last
    assert last.group == "fc"
    assert last.probe > first.probe
    assert last.logme > first.logme
    assert found.head_leep > -0.5
    assert found.chance == 0.25
    assert found.best.probe >= last.probe
    assert "stage0" in str(found)
    # the first depth trails the last on the same samples, which does not lead itself
    assert first.lead is not None
    assert first.lead < -2
    assert last.lead == 0


@pytest.mark.parametrize("outputs", [1, 3])
def test_outputs_that_are_no_classes_have_no_score_of_their_own(outputs):
    # one number, or one for each position: the depths are scored all the same
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(4, 6), nn.Linear(6, outputs)

        def forward(self, x):
            x = self.fc(self.body(x))
            return x if outputs > 1 else x.mean(1)

    torch.manual_seed(0)
    model, x = Positions().eval(), torch.randn(24, 5, 4)
    found = transferability(model, (x, (x[:, 0, 0] > 0).long()))
    assert found.head_leep is None
    assert len(found.depths) == 2


def test_one_sample_a_class_cannot_be_scored():
    # as many classes as samples: the message gives the numbers
    model = Net().eval()
    x, _ = images(6)
    with pytest.raises(DataError, match="6 samples of 6 classes"):
        score_depths(collect_features(model, (x, torch.arange(6)), map_of(model)))


def test_scores_without_labels_are_refused():
    # unlabelled data has no transferability
    model = Net().eval()
    with pytest.raises(DataError, match="no labels"):
        transferability(model, images(6)[0], layers=map_of(model))


def test_model_of_values_without_positions():
    # a plain network on vectors: features are the outputs themselves, and there are no image figures
    from layerwise.layers.layermap import LayerGroup, LayerMap

    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    layers = LayerMap(
        (LayerGroup("0", "trunk", ("0", "1"), ("0.weight", "0.bias"), 30),
         LayerGroup("2", "head", ("2",), ("2.weight", "2.bias"), 14)),
        "layers",
        outputs=("2",),
    )  # fmt: skip
    x = torch.randn(9, 4)
    found = collect_features(model, x, layers)
    np.testing.assert_allclose(found.groups["0"], model[:2](x).detach().numpy(), rtol=1e-6)
    assert found.modality == "values"
    assert found.inputs == {}


class Sized(Stream):
    def __len__(self):
        return len(self.x)


@pytest.mark.parametrize(("kind", "total"), [(Sized, 40), (Stream, None)])
def test_a_stream_says_its_length_where_it_has_one(kind, total):
    # 8 of 40 samples measured; one that ends was measured whole, so its size is known
    model = Net().eval()
    x, _ = images(40)
    loader = DataLoader(kind(x), batch_size=8)
    assert collect_features(model, loader, map_of(model), max_samples=8).total == total
    assert collect_features(model, loader, map_of(model), max_samples=99).total == 40


def test_a_stream_of_whole_batches_does_not_say_how_many_samples_it_has():
    # five batches are not five samples
    model = Net().eval()
    batches = list(images(40)[0].split(8))
    loader = DataLoader(Sized(batches), batch_size=None)
    assert collect_features(model, loader, map_of(model), max_samples=8).total is None


def test_kept_batches_can_be_gone_through_again():
    # of an iterator so many as are wanted; it goes on behind them
    batches = iter(images(40)[0].split(8))
    kept = KeptBatches(batches, 16, None, seed=0)
    assert len(list(kept)) == len(list(kept)) == 2
    assert kept.total is None
    assert len(list(batches)) == 3
    assert KeptBatches(iter(images(40)[0].split(8)), 99, None, seed=0).total == 40


class Noisy(torch.utils.data.Dataset):
    """Random augmentation from all three global generators."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index] + torch.rand(()) + random.random() + np.random.rand()


class NoisyStream(Stream):
    def __iter__(self):
        return (row + torch.rand(()) + random.random() + np.random.rand() for row in self.x)


@pytest.mark.parametrize("kind", ["dataset", "loader", "stream"])
def test_random_samples_depend_on_the_seed_and_leave_all_generators_alone(kind):
    # equal whatever was drawn before; another seed draws others; a loader's own generator stays too
    model = Net().eval()
    x, _ = images(12)
    own = torch.Generator().manual_seed(3)
    data = {
        "dataset": Noisy(x),
        "loader": DataLoader(Noisy(x), batch_size=5, shuffle=True, generator=own),
        "stream": DataLoader(NoisyStream(x), batch_size=5, generator=own),
    }[kind]
    before, state = drawn(), own.get_state()
    one = collect_features(model, data, map_of(model), seed=1)
    map_for(model, data, None, None)
    assert drawn() == before
    assert torch.equal(own.get_state(), state)
    torch.rand(5), random.random(), np.random.rand(3)
    same, other = (collect_features(model, data, map_of(model), seed=s) for s in (1, 2))
    np.testing.assert_array_equal(one.groups["fc"], same.groups["fc"])
    assert not np.allclose(one.groups["fc"], other.groups["fc"])


def test_a_map_is_made_whatever_the_labels_are():
    # numbers and several labels a sample: they are not looked at
    model = Net().eval()
    x, _ = images(12)
    for labels in (torch.rand(12), torch.rand(12, 2), torch.zeros(12, dtype=torch.long)):
        assert map_for(model, TensorDataset(x, labels), None, None).names


def test_a_random_sample_is_the_same_whichever_others_are_drawn():
    # as in fit: by its index and the seed, not by its place in the pass
    model = Net().eval()
    x, _ = images(20)
    some, whole = (
        collect_features(model, Noisy(x), map_of(model), max_samples=n).groups["fc"] for n in (6, None)
    )
    nearest = np.abs(whole[None] - some[:, None]).sum(2).min(1)
    np.testing.assert_allclose(nearest, 0, atol=1e-5)


def test_a_single_layer_is_told_to_stand_in_a_model():
    # nothing is wrong with its batch axis; in a Sequential its input is looked at
    x = torch.randn(9, 4)
    for layer in (nn.Linear(4, 2), nn.BatchNorm1d(4)):
        with pytest.raises(ModelError, match=rf"{type(layer).__name__} has no modules inside.*nn.Sequential"):
            collect_features(layer, x, layer_map(layer, x))
    model = nn.Sequential(nn.Linear(4, 2))
    assert collect_features(model, x, layer_map(model, x)).groups["0"].shape == (9, 4)


@pytest.mark.parametrize("labels", [["cat", "dog"], [{"boxes": 1}, {"boxes": 2}], {"boxes": 1}, [None, None]])
def test_labels_that_no_tensor_holds_are_told(labels):
    # names of classes, boxes: as for any other labels that are no integers
    with pytest.raises(DataError, match=r"expected one integer for each sample"):
        split_inputs((torch.zeros(2, 3), labels))


def test_a_batch_of_one_letter_is_told():
    # whose first entry is itself
    with pytest.raises(DataError, match="a batch is a str of 1"):
        parts_of(["a"])


@pytest.mark.parametrize("wrong", [{"max_samples": 0}, {"max_samples": -1}, {"batch_size": 0}, {"seed": -1}])
def test_numbers_out_of_range_are_told(wrong):
    # by name, whatever measures; -1 left one sample out
    with pytest.raises(DataError, match=f"{next(iter(wrong))} (is )?{next(iter(wrong.values()))}"):
        transferability(Net(), images(8), layers=map_of(Net()), **wrong)

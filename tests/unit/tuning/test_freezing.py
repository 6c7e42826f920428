"""freeze, unfreeze and count_parameters on live models."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torchvision.models import resnet18

import layerwise
from helpers import changed, snapshot, tiny_cnn, tiny_mlp
from layerwise.errors import ModelError, PlanError
from layerwise.tuning.freezing import ParameterCount, count_parameters, freeze, unfreeze
from layerwise.tuning.modes import pinned
from layerwise.tuning.norms import freeze_batchnorm

NAMES = [name for name, _ in tiny_cnn().named_parameters()]


@pytest.mark.parametrize(
    "call",
    [
        freeze,
        unfreeze,
        count_parameters,
        freeze_batchnorm,
        lambda model: layerwise.fit(model, [], plan=None),
    ],
)
def test_the_name_of_a_model_is_no_model(call: Any) -> None:
    # As where a layer map is made of it.
    with pytest.raises(ModelError, match=r"model is 'timm:a', a str; expected a torch.nn.Module"):
        call("timm:a")


def state(model: nn.Module) -> dict[str, object]:
    """Return everything that freezing may change."""
    return {
        **{name: parameter.requires_grad for name, parameter in model.named_parameters()},
        **{f"{path} mode": (module.training, pinned(module)) for path, module in model.named_modules()},
    }


def test_freeze_by_component_and_glob() -> None:
    """A word freezes a whole module, a glob single parameters; the record names what was switched."""
    model = tiny_cnn()
    record = freeze(model, "layer1", "stem.0.w*")
    assert set(record.names) == {
        "stem.0.weight", "layer1.0.weight", "layer1.0.bias", "layer1.1.weight", "layer1.1.bias"
    }  # fmt: skip
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == set(record.names)
    assert record.numel == sum(model.get_parameter(name).numel() for name in record.names)


def test_a_full_name_is_that_parameter_alone() -> None:
    """ResNet's first convolution, and none of its name in the blocks; in a wrapper too, by either name."""
    assert freeze(resnet18(), "conv1.weight", "layer1.0.bn1").names == (
        "conv1.weight", "layer1.0.bn1.weight", "layer1.0.bn1.bias"
    )  # fmt: skip
    record = freeze(torch.compile(resnet18(), backend="eager"), "re:^conv1", "_orig_mod.fc.bias")
    assert record.names == ("_orig_mod.conv1.weight", "_orig_mod.fc.bias")
    assert record.modules == ("_orig_mod.conv1",)
    assert len(freeze(resnet18(), "conv1").names) == 9


def test_frozen_stays_frozen_after_train_deepcopy_and_steps() -> None:
    """No parameter, buffer or output of a frozen part moves, also in a copy and under weight decay."""
    model = tiny_cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.5)
    images = torch.randn(4, 3, 8, 8)
    model(images).sum().backward()
    freeze(model, "stem", "layer1")  # drops the gradients that lie there, or this step would move them
    model.train()
    before = snapshot(model)
    for _ in range(2):
        optimizer.step()
        optimizer.zero_grad()
        model(images).sum().backward()
    moved = changed(before, snapshot(model))
    assert moved
    assert not {name for name in moved if name.startswith(("stem", "layer1"))}
    copied = copy.deepcopy(model).train()
    assert not copied.layer1[3].training
    assert torch.equal(copied.layer1(copied.stem(images)), model.layer1(model.stem(images)))


def test_what_was_frozen_by_hand_is_held_once_it_is_named() -> None:
    """``requires_grad`` was False before the call, which the norms' statistics do not stop at."""
    model = tiny_cnn()
    for name in ("stem", "layer1"):
        model.get_submodule(name).requires_grad_(False)
    before = state(model.train())
    record = freeze(model, "stem")
    assert record.names == ()
    assert record.modules == ("stem", *(f"stem.{number}" for number in range(len(model.stem))))
    assert not any(module.training for module in model.train().stem.modules())
    assert all(module.training for module in model.layer1.modules())
    record.undo()
    assert state(model) == before


def test_modules_of_which_a_part_learns_are_not_pinned() -> None:
    """Freezing one parameter of a batch-norm leaves it in train mode."""
    model = tiny_cnn()
    freeze(model, "stem.1.weight")
    assert model.train().stem[1].training
    freeze(model, "stem.1.bias")
    assert not model.train().stem[1].training
    assert model.stem.training


def test_unfreeze_wakes_what_freeze_stilled() -> None:
    """A module follows the mode that it was last asked to have once a parameter of it learns."""
    model = tiny_cnn()
    freeze(model)
    assert count_parameters(model).trainable == 0
    model.train()
    record = unfreeze(model, "layer2", "fc")
    assert "layer2.1" in record.modules
    assert model.layer2[1].training
    assert not model.stem[1].training
    unfreeze(model)
    assert all(module.training for module in model.modules())
    assert count_parameters(model).frozen == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_takes_padded_sequences_whichever_layers_are_frozen() -> None:
    """Layers in train mode after frozen ones get no nested tensors; undone, every mode is the old one."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3)
    padding = torch.tensor([[False, False, False], [False, False, True]])
    records, states = [], []
    for number in range(3):
        states.append(state(encoder))
        records.append(freeze(encoder, f"layers.{number}"))
        encoder.train()(torch.randn(2, 3, 8), src_key_padding_mask=padding)
    assert not any(module.training for module in encoder.layers.modules())
    for record, before in zip(records[::-1], states[::-1]):
        record.undo()
        assert state(encoder) == before
        encoder.train()(torch.randn(2, 3, 8), src_key_padding_mask=padding)


def test_unfreezing_one_part_leaves_other_peoples_pins() -> None:
    """A batch-norm that somebody pinned, with parameters that learn, is not woken by unfreezing the head."""
    from layerwise.tuning.norms import freeze_batchnorm

    model = tiny_cnn()
    freeze(model, "fc")
    freeze_batchnorm(model, affine=False)
    unfreeze(model, "fc")
    assert not model.train().stem[1].training


@settings(deadline=None, max_examples=25)
@given(
    st.lists(st.sampled_from(NAMES), unique=True), st.lists(st.sampled_from(NAMES), min_size=1, unique=True)
)
def test_undo_is_the_inverse(first: list[str], second: list[str]) -> None:
    """freeze then undo, and unfreeze then undo, give back flags, modes and pins, from any start."""
    model = tiny_cnn()
    if first:
        freeze(model, *first)
    for action in (freeze, unfreeze):
        before = state(model)
        record = action(model, *second)
        record.undo()
        assert state(model) == before


def test_records_are_undone_in_any_order() -> None:
    """After each undo exactly the wholly frozen modules are held; dropout beside what learns is not."""
    for action, other in ((freeze, unfreeze), (unfreeze, freeze)):
        model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2)), nn.Linear(2, 2))
        other(model)
        before = state(model.train())
        first, second = action(model, "0.0"), action(model, "0.2")
        first.undo()
        part = [pinned(module) for module in (model, model[0], *model[0])]
        assert part == (
            [False, False, False, False, True] if action is freeze else [False, False, True, False, False]
        )
        second.undo()
        assert state(model) == before


def test_unfreeze_lets_go_what_was_unfrozen_by_hand() -> None:
    """``requires_grad`` alone wakes no module that `freeze` holds; others' pins stay all the same."""
    net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), nn.BatchNorm1d(2)).train()
    freeze(net, "0")
    freeze_batchnorm(net[1], affine=False)
    net.requires_grad_(True)
    assert not net[0][1].training
    assert unfreeze(net, "0.0").modules == ("0", "0.0", "0.1")
    assert net[0][1].training
    assert not net[1].training
    freeze_batchnorm(net, affine=False)
    unfreeze(net)
    assert not net[0][1].training


def test_undo_leaves_other_peoples_pins() -> None:
    """A norm that was held before by itself is held after the record of its surroundings is undone."""
    model = tiny_cnn()
    freeze_batchnorm(model, affine=False)
    before = state(model)
    freeze(model).undo()
    assert state(model) == before


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    """Nothing is frozen then, and the close names are told."""
    model = tiny_cnn()
    with pytest.raises(PlanError, match=r"'layer3' matches no parameter. Did you mean 'layer"):
        freeze(model, "stem", "layer3")
    assert count_parameters(model).frozen == 0


def test_a_module_without_parameters_is_told_from_an_unknown_name() -> None:
    """A norm without gains has statistics to hold all the same, and the message says by what."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.ReLU())
    model.add_module("bn_last", nn.BatchNorm1d(2, affine=False))
    with pytest.raises(
        PlanError, match=r"'1' names a BatchNorm1d without parameters.*freeze_batchnorm\(model"
    ):
        freeze(model, "0", "1")
    with pytest.raises(PlanError, match=r"'bn\*' names a BatchNorm1d without parameters"):
        freeze(model, "bn*")
    with pytest.raises(PlanError, match=r"'2' names a ReLU without parameters, which has nothing to freeze"):
        freeze(model, "2")
    assert all(parameter.requires_grad for parameter in model.parameters())  # all or nothing
    freeze_batchnorm(model.get_submodule("1"))
    assert not model.train().get_submodule("1").training


def test_shared_parameters_are_counted_and_named_once() -> None:
    """Tied weights are one parameter, whatever name freezes it."""
    model = tiny_mlp(blocks=1, classes=6)
    model.head.weight = model.b0[0].weight
    total = count_parameters(model).total
    assert total == 36 + 6 + 6
    record = freeze(model, "head.weight")
    assert (record.names, record.numel) == (("head.weight",), 36)
    assert count_parameters(model).frozen == 36


def test_counts_are_told_in_words_and_data() -> None:
    """percent, str and to_dict agree; an empty model has 0 percent."""
    model = tiny_mlp(blocks=1)
    freeze(model, "b0")
    count = count_parameters(model)
    assert (count.trainable, count.frozen, count.total) == (21, 42, 63)
    assert str(count) == "21 of 63 parameters are trainable (33.33 %)"
    assert count.to_dict() == {"trainable": 21, "frozen": 42, "total": 63, "percent": pytest.approx(100 / 3)}
    assert count_parameters(nn.ReLU()).percent == 0.0
    assert str(ParameterCount(20_000, 1)) == "20,000 of 20,001 parameters are trainable (>99.99 %)"


def test_integers_are_skipped_and_lazy_layers_are_told() -> None:
    """A quantised weight stays as it is; a layer without shape cannot be counted but can be frozen."""
    model = nn.Module()
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    model.scale = nn.Parameter(torch.ones(1))
    freeze(model)
    record = unfreeze(model)
    assert record.names == ("scale",)
    assert record.skipped == ("codes",)
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert freeze(lazy).names == ("0.weight", "0.bias")
    with pytest.raises(ModelError, match="run one forward pass"):
        count_parameters(lazy)


def test_patterns_are_given_one_by_one() -> None:
    """A list of them is no pattern."""
    with pytest.raises(PlanError, match=r"\['0', '1'\] is no pattern"):
        freeze(nn.Sequential(nn.Linear(2, 2)), ["0", "1"])  # type: ignore[arg-type]


def test_a_module_in_the_place_of_a_pattern_is_told_how() -> None:
    """As other libraries take modules; what would be printed of a large one is no help."""
    model = tiny_cnn()
    told = r"freeze\(model, Sequential\(\.\.\.\)\): patterns are texts.*a module itself: freeze\(module\)"
    with pytest.raises(PlanError, match=told) as caught:
        freeze(model, model.get_submodule("stem"))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    with pytest.raises(PlanError, match=r"unfreeze\(model, Sequential"):
        unfreeze(model, "head", model.get_submodule("stem"))  # type: ignore[arg-type]
    assert count_parameters(model).frozen == 0


def test_the_record_is_plain_data() -> None:
    """JSON holds all of it, and none of the live parameters that undo() needs."""
    record = freeze(tiny_cnn(), "stem")
    told = json.loads(json.dumps(record.to_dict()))
    assert told["action"] == "freeze"
    assert told["names"] == list(record.names)
    assert sorted(told) == ["action", "modules", "names", "numel", "skipped"]


def test_the_record_prints_as_one_line() -> None:
    """A long list of names is for undo() and to_dict(); printed, a record tells how much it changed."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Linear(2, 2))
    assert str(freeze(model, "0")) == "froze 6 parameters in 2 tensors; modules held in eval mode: 1"
    assert str(unfreeze(model)) == "unfroze 6 parameters in 2 tensors; modules let go: 1"

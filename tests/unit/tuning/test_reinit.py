"""Groups that are started anew."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import changed, map_by_children, snapshot, tiny_cnn
from layerwise.errors import LayerwiseWarning, ModelError
from layerwise.layers.layermap import LayerGroup, LayerMap
from layerwise.plans.plan import Plan
from layerwise.tuning.norms import freeze_batchnorm
from layerwise.tuning.reinit import reinit
from layerwise.tuning.tuner import Tuner


def test_parameters_and_statistics_of_the_groups_start_anew() -> None:
    """Weights are drawn again, batch-norm statistics are back at 0 and 1, other groups are untouched."""
    model = tiny_cnn()
    model(torch.randn(4, 3, 8, 8))  # moves the statistics
    before = snapshot(model)
    names = reinit(model, map_by_children(model), ("layer2", "fc"), seed=3)
    moved = changed(before, snapshot(model))
    assert set(names) == {name for name, _ in model.named_parameters() if name.startswith(("layer2", "fc"))}
    assert {name.split(".")[0] for name in moved} == {"layer2", "fc"}
    assert torch.equal(model.layer2[1].running_mean, torch.zeros(4))


def test_statistics_that_are_held_start_anew_too_and_stay_held() -> None:
    """A phase that freezes the norms of a group it starts anew leaves no statistics of the old weights."""
    model = tiny_cnn()
    model(torch.randn(4, 3, 8, 8))
    freeze_batchnorm(model)
    reinit(model, map_by_children(model), ("layer2",), seed=3)
    assert torch.equal(model.layer2[1].running_mean, torch.zeros(4))
    assert not model.train().layer2[1].training


def test_the_seed_alone_decides() -> None:
    """Equal seeds give equal weights, others do not, and the global state is put back."""
    results = []
    for seed in (1, 1, 2):
        model = tiny_cnn()
        torch.rand(seed)
        state = torch.get_rng_state()
        reinit(model, map_by_children(model), ("fc",), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        results.append(snapshot(model))
    assert not changed(results[0], results[1])
    assert changed(results[0], results[2])


def test_attention_is_started_anew_too() -> None:
    """nn.MultiheadAttention calls its initialisation by another name."""
    model = nn.Sequential()
    model.add_module("stem", nn.Linear(4, 4))
    model.add_module("attention", nn.MultiheadAttention(4, 2))
    model.add_module("head", nn.Linear(4, 2))
    before = snapshot(model)
    reinit(model, map_by_children(model), ("attention",), seed=0)
    assert "attention.in_proj_weight" in changed(before, snapshot(model))


def test_a_tied_weight_of_another_group_is_left() -> None:
    """An output layer starts anew with its bias alone where its weight is the embedding table."""
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9))
    model[2].weight = model[0].weight
    groups = {"0": "stem", "1": "trunk", "2": "head"}
    own = {"0": ("0.weight",), "1": ("1.weight", "1.bias"), "2": ("2.bias",)}
    layers = LayerMap(
        tuple(LayerGroup(name, role, (name,), own[name], 9) for name, role in groups.items()),
        "layers",
        aliases={"2.weight": "0.weight"},
    )
    before = snapshot(model)
    assert reinit(model, layers, ("2",), seed=3) == ("2.bias",)
    assert changed(before, snapshot(model)) == {"2.bias"}
    assert {"0.weight", "2.bias"} <= set(reinit(model, layers, ("0", "2"), seed=3))
    assert changed(before, snapshot(model)) == {"0.weight", "2.weight", "2.bias"}


def test_a_module_without_initialisation_is_named_and_nothing_changes() -> None:
    """A class with a matrix of its own and no reset_parameters cannot be started anew."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.ones(3, 3))

    model = nn.Sequential()
    model.add_module("stem", nn.Linear(3, 3))
    model.add_module("scale", Scale())
    model.add_module("head", nn.Linear(3, 2))
    before = snapshot(model)
    with pytest.raises(ModelError, match=r"scale \(Scale\)"):
        reinit(model, map_by_children(model), ("scale", "head"), seed=0)
    assert not changed(before, snapshot(model))
    layers = map_by_children(model)
    rows = [
        {"name": "a", "rates": {"head": 1.0}, "epochs": 9},
        {"name": "b", "rates": {"scale": 1.0}, "epochs": 1, "reinit": ["scale"]},
    ]
    plan = Plan(groups=layers.names, phases=rows)
    with pytest.raises(ModelError, match=r"scale \(Scale\)"):  # at once, not when the phase begins
        Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=1, layers=layers)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_vector_without_initialisation_is_kept_and_told() -> None:
    """A block's own layer scale keeps its values, with a warning; the rest of the group starts anew."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)
            self.gamma = nn.Parameter(torch.full((3,), 0.3))

    model = nn.Sequential()
    model.add_module("stem", nn.Linear(3, 3))
    model.add_module("block", Block())
    model.add_module("head", nn.Linear(3, 2))
    before = snapshot(model)
    with pytest.warns(LayerwiseWarning, match=r"1 vector keeps its values, .*block\.gamma"):
        names = reinit(model, map_by_children(model), ("block",), seed=0)
    assert changed(before, snapshot(model)) == set(names) == {"block.linear.weight", "block.linear.bias"}


def test_a_transformers_model_uses_its_own_initialisation() -> None:
    """BERT's layers are drawn with its initializer_range, though the weights were marked as loaded."""
    transformers = pytest.importorskip("transformers")
    from layerwise.layers.mapping import layer_map

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        initializer_range=0.5,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.25)
            parameter._is_hf_initialized = True
    layers = layer_map(model)
    last = layers.names[-2]
    before = snapshot(model)
    reinit(model, layers, (last,), seed=0)
    moved = changed(before, snapshot(model))
    assert moved == set(layers[last].parameters)
    weight = next(p for name, p in model.named_parameters() if name in moved and p.ndim == 2)
    assert float(weight.detach().std()) == pytest.approx(0.5, rel=0.1)


def test_only_transformers_own_initialisation_is_used() -> None:
    """Other libraries have a method of that name that leaves norms as they are, or takes more arguments."""

    class Net(nn.Sequential):
        def _init_weights(self, module: nn.Module, name: str) -> None:
            raise AssertionError("not called")

    model = Net(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    with torch.no_grad():
        model[1].weight.fill_(7.0)
    names = reinit(model, map_by_children(model), ("1", "2"), seed=0)
    assert names == ("1.weight", "1.bias", "2.weight", "2.bias")
    assert torch.equal(model[1].weight, torch.ones(4))

"""Which value a tensor holds: its own, that of what it views, or a constant's."""

import torch
from torch import nn

from layerwise.layers.recording import record
from layerwise.layers.values import Values


def test_a_tensor_is_known_by_itself_and_by_its_storage() -> None:
    # a view holds the value of the whole; what nobody made is a constant from the first time it is asked for
    model = nn.Linear(4, 2)
    values = Values(model)
    weight, bias = map(values.find, (model.weight, model.bias))
    assert [values.all[key].name for key in (weight, bias)] == ["weight", "bias"]
    assert values.find(model.weight.detach()[0]) == weight
    alone = torch.ones(3)
    assert values.find(alone) is None
    assert values.key(alone) == values.key(alone[1:]) == values.find(alone)
    assert values.all[values.key(alone)].kind == "constant"


def test_weights_that_lie_in_one_storage_are_told_apart() -> None:
    # flattened weights (recurrent networks on a GPU, FSDP) are views of one tensor; each is its own value
    flat = torch.zeros(6)
    model = nn.Module()
    model.first, model.second = nn.Parameter(flat[:4]), nn.Parameter(flat[4:])
    values = Values(model)
    assert values.key(model.first) != values.key(model.second)


def test_views_are_the_value_they_view_and_writes_add_a_writer() -> None:
    # a write through a view is seen by who reads the whole
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y[:, 0] = 1.0
            y.view(-1).add_(1)
            return y.sum()

    recording = record(Writes(), (torch.zeros(2, 4),))
    names = [op.name for op in recording.ops]
    assert names == ["mul", "fill_", "add_", "sum"] or names == ["mul", "copy_", "add_", "sum"]
    assert recording.ops[-1].sources == (2,)
    assert recording.ops[2].sources == (1,)
    assert recording.ops[1].mutates == recording.ops[0].writes

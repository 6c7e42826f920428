"""What a notebook shows of results and of what is under way is for people."""

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import layerwise


class Printer:
    """Keeps what IPython's printer would print."""

    shown = ""

    def text(self, text: str) -> None:
        self.shown += text


def shown(result: object) -> str:
    printer = Printer()
    result._repr_pretty_(printer, False)
    return printer.shown


def test_notebooks_show_the_text_of_a_result() -> None:
    # In place of a dataclass's fields, which are pages for a large model.
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers = layerwise.layer_map(model, torch.zeros(2, 4), granularity="layers")
    plan = layerwise.full(layers, epochs=1)
    record = layerwise.freeze(model, "0")
    for result in (layers, plan, plan.explain(layers), record, layerwise.audit(model)):
        assert shown(result) == str(result)
    assert "(head)" in shown(layers)
    assert repr(layers).startswith("LayerMap(groups=(")


def test_what_is_under_way_says_where_it_stands() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    layers = layerwise.layer_map(model, torch.zeros(2, 4), granularity="layers")
    loader = DataLoader(TensorDataset(torch.randn(8, 4)), batch_size=4)
    plan = layerwise.gradual_unfreezing(layers, last_epochs=1)
    tuner = layerwise.Tuner(model, plan, torch.optim.SGD, lr=0.1, steps_per_epoch=2, layers=layers)
    cache = layerwise.PrefixCache(model, loader, tuner=tuner, storage="memory")
    assert repr(cache) == "<PrefixCache of Sequential: nothing seen yet>"
    found = []
    for _ in tuner.epochs():
        found.append(repr(tuner))
        for (x,) in cache.batches():
            model(x).sum().backward()
            tuner.step()
    of = "<Tuner of 'gradual_unfreezing(decay=0.9, last_epochs=1)': "
    assert found[0] == f"{of}phase 1 of 2, 'from 1', epoch 0, step 0>"
    assert found[1] == f"{of}phase 2 of 2, 'all groups', epoch 1, step 2>"
    assert repr(tuner) == f"{of}done, epoch 2, step 4>"
    assert repr(cache).startswith("<PrefixCache of Sequential: memory, cut at 0 (")

"""Weight files are read without running code, and fitted by name or in order."""

import pickle
import re
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from layerwise.errors import ModelError
from layerwise.sources import weights


def small_net(classes=3):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, classes))


class Attack:
    """Writes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


def test_a_pickle_that_runs_code_is_refused_and_nothing_runs(tmp_path):
    victim = tmp_path / "victim"
    torch.save({"state_dict": Attack(victim)}, tmp_path / "bad.pth")
    with pytest.raises(ModelError, match=r"was refused.*'_?io.open'.*Nothing of it was run"):
        weights.read_weights(tmp_path / "bad.pth")
    assert not victim.exists()
    # The attack is real: a plain unpickling does run it.
    pickle.loads(pickle.dumps(Attack(victim))).close()
    assert victim.exists()


def test_a_plain_pickle_is_refused_without_a_warning_of_torch(tmp_path):
    # `pickle.dump` writes a protocol that torch warns of, with the advice to file an issue
    victim = tmp_path / "victim"
    (tmp_path / "bad.pth").write_bytes(pickle.dumps(Attack(victim), protocol=4))
    with pytest.raises(ModelError, match=r"cannot be read as a torch file \(.*save it as safetensors"):
        weights.read_weights(tmp_path / "bad.pth")
    assert not victim.exists()


@pytest.mark.parametrize("key", ["state_dict", "model", "model_state_dict"])
def test_a_state_dict_is_found_under_the_usual_keys(tmp_path, key):
    model = small_net()
    torch.save({key: model.state_dict(), "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "c.pth")
    state = weights.read_weights(tmp_path / "c.pth")
    assert not weights.compare(state, model)


def test_what_is_no_tensor_beside_the_weights_is_left_out(tmp_path):
    # a version number, or the extra state of a layer
    torch.save({**small_net().state_dict(), "version": 3}, tmp_path / "w.pth")
    assert weights.read_weights(tmp_path / "w.pth").keys() == small_net().state_dict().keys()


def test_averaged_weights_are_preferred(tmp_path):
    torch.save(
        {"state_dict": {"a": torch.zeros(1)}, "state_dict_ema": {"a": torch.ones(1)}}, tmp_path / "c.pth"
    )
    assert weights.read_weights(tmp_path / "c.pth")["a"].item() == 1


def test_safetensors_and_pth_hold_the_same(tmp_path):
    model = small_net()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pt")
    for name in ("m.safetensors", "m.pt"):
        weights.check_weights(tmp_path / name)
    one, two = (weights.read_weights(tmp_path / name) for name in ("m.safetensors", "m.pt"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def spoil(path: Path, size: int | None = None, content: bytes | None = None) -> Path:
    path.write_bytes(path.read_bytes()[:size] if content is None else content)
    return path


def test_damaged_files_are_named(tmp_path):
    model = small_net()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "m.safetensors")
    torch.save(model.state_dict(), tmp_path / "m.pth")
    bad = [
        spoil(tmp_path / "m.safetensors", size=200),
        spoil(tmp_path / "m.pth", size=300),
        spoil(tmp_path / "empty.pth", content=b""),
        spoil(tmp_path / "text.pth", content=b"<html>not found</html>"),
    ]
    for path in bad:
        with pytest.raises(ModelError, match=path.name) as caught:
            weights.read_weights(path)
        assert "again" in str(caught.value)
        assert "weights_only" not in str(caught.value)  # torch's advice to let the file run code
        with pytest.raises(ModelError, match=re.escape(str(caught.value))):
            weights.check_weights(path)


def test_paths_that_are_no_weight_files(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match=r"is a folder.*model.safetensors"):
        weights.read_weights(tmp_path)
    with pytest.raises(ModelError, match=r"does not exist. Did you mean 'model.safetensors'"):
        weights.read_weights(tmp_path / "model.safetensor")
    (tmp_path / "weights.h5").touch()
    with pytest.raises(ModelError, match=r"'.h5'; expected one of .safetensors"):
        weights.read_weights(tmp_path / "weights.h5")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ModelError, match="holds a list, not a state dict"):
        weights.read_weights(tmp_path / "list.pth")
    torch.save({"epoch": 1}, tmp_path / "none.pth")
    with pytest.raises(ModelError, match=r"the keys \['epoch'\]"):
        weights.read_weights(tmp_path / "none.pth")


@pytest.mark.parametrize(
    "prefix",
    ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "backbone.", "module.encoder."],
)
def test_prefixes_of_wrappers_go(prefix):
    model = small_net()
    wrapped = {prefix + name: value for name, value in model.state_dict().items()}
    state, removed = weights.strip_prefixes(wrapped, model)
    assert removed == prefix
    assert not weights.compare(state, model)


def test_the_names_of_one_part_get_its_path():
    # of two parts alike neither is meant, and names that fit are left alone
    class Outer(nn.Module):
        def __init__(self, *parts):
            super().__init__()
            for part in parts:
                setattr(self, part, small_net())
            self.head = nn.Linear(2, 3)

    body = small_net().state_dict()
    state, added = weights.add_prefix(body, Outer("body"))
    assert added == "body."
    assert set(state) == {f"body.{name}" for name in body}
    assert weights.add_prefix(body, Outer("left", "right")) == (body, "")
    assert weights.add_prefix(body, small_net()) == (body, "")


def test_a_prefix_that_belongs_to_the_model_stays():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_net()

    state, removed = weights.strip_prefixes(Outer().state_dict(), Outer())
    assert removed == ""
    assert not weights.compare(state, Outer())


def test_all_differences_are_reported():
    model = small_net()
    state = model.state_dict()
    state["extra.weight"] = torch.zeros(2)
    del state["1.bias"]
    state["0.weight"] = torch.zeros(4, 3, 5, 5)
    found = weights.compare(state, model)
    assert (found.missing, found.unexpected, set(found.shapes)) == (
        ("1.bias",),
        ("extra.weight",),
        {"0.weight"},
    )
    text = str(found)
    assert "1 missing in the file (1.bias)" in text
    assert "extra.weight" in text
    assert "0.weight: 4x3x5x5 in the file, 4x3x3x3 in the model" in text


def test_counters_may_be_missing_and_tied_weights_saved_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.n = nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)
            self.b.weight = self.a.weight

    state = Tied().state_dict()
    del state["b.weight"], state["n.num_batches_tracked"]
    assert not weights.compare(state, Tied())
    del state["a.weight"]  # now neither name is there
    assert weights.compare(state, Tied()).missing == ("a.weight", "b.weight")


def test_in_order_needs_every_shape_and_last_name():
    model = small_net()
    renamed = {
        f"x{number}.{name.rpartition('.')[2]}": value
        for number, (name, value) in enumerate(model.state_dict().items())
        if not name.endswith("num_batches_tracked")
    }
    paired = weights.match_in_order(renamed, model)
    assert paired is not None
    other = small_net()
    weights.load_state(other, paired)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))

    swapped = dict(renamed)  # running_mean and running_var have one shape: the names must tell them apart
    keys = list(swapped)
    order = [*keys[:4], keys[5], keys[4], *keys[6:]]
    assert weights.match_in_order({key: swapped[key] for key in order}, model) is None
    assert weights.match_in_order(dict(list(renamed.items())[:-1]), model) is None
    wrong = dict(renamed)
    wrong[keys[0]] = torch.zeros(1)
    assert weights.match_in_order(wrong, model) is None


def test_only_a_differing_output_layer_has_a_number_of_classes():
    assert weights.output_rows(weights.compare(small_net(7).state_dict(), small_net(3))) == 7
    assert weights.output_rows(weights.compare(small_net(3).state_dict(), small_net(3))) is None
    state = small_net(7).state_dict()
    state["0.weight"] = torch.zeros(5, 3, 3, 3)
    assert weights.output_rows(weights.compare(state, small_net(3))) is None
    flat = {**small_net(3).state_dict(), "3.weight": torch.zeros(7 * 16)}
    assert weights.output_rows(weights.compare(flat, small_net(3))) is None

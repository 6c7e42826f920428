"""What devices do in other ways than a CPU is known in one place."""

import pytest
import torch

from apple import on_apple
from layerwise.cache.cutting.cut import CallId, Site
from layerwise.cache.folding import relative_difference
from layerwise.cache.proof.outputs import Result
from layerwise.choosing.inputs import measure_images
from layerwise.layers.devices import clock_s, widest_float


def test_a_clock_waits_for_what_works_beside_python(monkeypatch: pytest.MonkeyPatch) -> None:
    # Else it tells how long it took to ask, and a cache is chosen by that.
    waited: list[torch.device] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    assert clock_s(torch.device("cpu")) <= clock_s(torch.device("cuda", 1))
    assert waited == [torch.device("cuda", 1)]


def test_float64_is_not_asked_of_apples_gpus() -> None:
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cpu")) == torch.float64
    one, other = torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8)
    with pytest.raises(TypeError, match="float64"):
        on_apple(one).double()
    there = measure_images(on_apple(one))
    for name, values in measure_images(one).items():
        assert (there[name] == values).all()
    site = Site(CallId("a", 0), "out", 0)
    gaps = [relative_difference({site: f(one)}, {site: f(other)}) for f in (on_apple, torch.clone)]
    assert gaps[0] == gaps[1] > 0
    told = [Result.of(f(one)).difference(f(other)) for f in (on_apple, torch.clone)]
    assert told[0] == told[1]
    assert "differs by up to" in told[0]

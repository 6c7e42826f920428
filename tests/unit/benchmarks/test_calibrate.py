"""The benchmark that calibrates similarity: its rows do not depend on which of them were measured before."""

import json

import torch
from benchmarks import calibrate
from torch import nn


def network():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(4, 2))


def pixels(level):
    def make(size):
        drawn = torch.rand(40, 3, size, size, generator=torch.Generator().manual_seed(level))
        labels = torch.arange(40) % 2
        return (drawn * (0.3 + 0.2 * level) + labels.view(-1, 1, 1, 1) * 0.1).clamp(0, 1), labels

    return make


def test_rows_of_other_domains_are_the_same_in_whatever_order(monkeypatch, tmp_path):
    # a row that was lost is measured on the samples that it was measured on before
    monkeypatch.setattr(calibrate, "RESULTS", tmp_path / "rows.json")
    monkeypatch.setattr(calibrate, "PIXELS", {name: pixels(i) for i, name in enumerate("abc")})
    monkeypatch.setattr(calibrate, "CORRUPTIONS", ("noise",))
    monkeypatch.setattr(calibrate, "lite0", network)
    for name, value in {"SIZE": 8, "SOURCE": 24, "TARGET": 16}.items():
        monkeypatch.setattr(calibrate, name, value)
    rows = []
    calibrate.measure_source("a", rows)
    again = [row for row in rows if row["kind"] != "domain:c"]
    assert len(again) == len(rows) - 1
    calibrate.measure_source("a", again)
    assert again == rows == json.loads((tmp_path / "rows.json").read_text())

"""``layerwise cache`` lists and removes what a shelf published."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from layerwise.cache.store.column import RowSpec
from layerwise.cache.store.shelf import Shelf
from layerwise.cli.main import app

RUN = CliRunner()


@pytest.fixture
def folder(tmp_path):
    shelf, spec = Shelf(tmp_path), RowSpec((256,), torch.float32, torch.float32)
    columns = [shelf.create(key, 3, spec, "ResNet layer3") for key in ("a" * 40, "b" * 40)]
    for column in columns:
        column.put(torch.arange(3), torch.zeros(3, 256))
    shelf.publish_complete()
    return tmp_path


def test_list(folder) -> None:
    shown = RUN.invoke(app, ["cache", "ls", str(folder)])
    assert shown.exit_code == 0
    assert "aaaaaaaaaaaa" in shown.output
    assert "3.0 KB" in shown.output
    assert "3 samples  ResNet layer3" in shown.output
    assert "2 cached values, 6.0 KB" in shown.output
    found = json.loads(RUN.invoke(app, ["cache", "ls", str(folder), "--json"]).output)
    assert [(e["rows"], e["bytes"]) for e in found] == [(3, 3072), (3, 3072)]


def test_remove_some_and_all(folder) -> None:
    one = RUN.invoke(app, ["cache", "rm", str(folder), "aaaa"])
    assert one.exit_code == 0
    assert "removed 1 cached value, 3.0 KB" in one.output
    assert json.loads(RUN.invoke(app, ["cache", "rm", str(folder), "--all", "--json"]).output) == ["b" * 40]
    assert list(folder.iterdir()) == []


def test_usage(folder) -> None:
    # neither keys nor --all: usage; an unknown key or folder: failure, and nothing is removed
    assert RUN.invoke(app, ["cache", "rm", str(folder)]).exit_code == 2
    assert RUN.invoke(app, ["cache", "rm", str(folder), "aa", "--all"]).exit_code == 2
    unknown = RUN.invoke(app, ["cache", "rm", str(folder), "ff"])
    assert unknown.exit_code == 1
    assert "no cached value" in unknown.output
    assert len(list(folder.iterdir())) == 2
    for arguments in (["ls"], ["rm", "--all"]):
        missing = RUN.invoke(app, ["cache", *arguments, str(folder / "nowhere")])
        assert missing.exit_code == 1
        assert "there is no folder" in missing.output

"""What a demo prints at its end: a command that can be pasted as it stands."""

import json
import shlex
from pathlib import Path

import pytest

from layerwise.cli.demo_output import show_demo
from layerwise.training.demo import Row

ROW = Row("selective", "top_k:k=2", 0.7, 0.7, 0.7, 10, 20, 1.0, "runs/a")


@pytest.mark.parametrize("folder", ["here", "else where"])
def test_the_command_can_be_pasted(tmp_path: Path, monkeypatch, capsys, folder: str) -> None:
    # A line for each file, all but the last going on; files below the current folder by their short names.
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    files = [str(tmp_path / folder / ("long" * 20) / f"{number}.png") for number in range(3)]
    common = {"what": "images", "seconds": 1.0, "where": "", "command": "layerwise predict runs/a"}
    show_demo([ROW], about={}, **common, files=files, as_json=False)
    _, _, printed = capsys.readouterr().out.partition("Predict with one of them:")
    show_demo([ROW], about={}, **common, files=files, as_json=True)
    told = json.loads(capsys.readouterr().out)["predict"]
    names = shlex.split(told)[3:]
    assert [str(Path(name).absolute()) for name in names] == files
    assert all(Path(name).is_absolute() == (folder != "here") for name in names)
    assert shlex.split(printed.replace("\\\n", " ")) == shlex.split(told)
    assert printed.count("\\\n") == 3

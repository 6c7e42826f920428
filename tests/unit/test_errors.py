"""Warnings show the line of the user's code that they are about; a wrong path is told a close one."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import layerwise
from layerwise.errors import did_you_mean_beside, warn

LIBRARIES = (layerwise.__file__, "/x/lib/python3.11/site-packages/torch/nn/modules/module.py")


def test_a_warning_passes_over_what_is_installed() -> None:
    # layerwise and torch call one another: a loop calls a model, whose hook is the cache's
    call: Any = warn
    for file in LIBRARIES * 2:
        names = {"call": call}
        exec(compile("def through(text): call(text)", file, "exec"), names)
        call = names["through"]
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        call("far below")
    assert [one.filename for one in found] == [__file__]


def test_a_warning_of_one_line_is_shown_once() -> None:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for _ in range(2):
            warn("again")
        warn("again")
    assert found[0].lineno < found[1].lineno
    assert len(found) == 2


def test_a_close_name_is_looked_for_where_the_path_would_lie(tmp_path: Path) -> None:
    (tmp_path / "plan.yaml").touch()
    assert did_you_mean_beside(tmp_path / "plans.yaml") == " Did you mean 'plan.yaml'?"
    assert did_you_mean_beside(tmp_path / "plans.yaml", "*.py") == ""
    assert did_you_mean_beside(tmp_path / "no such folder" / "plan.yaml") == ""
    assert did_you_mean_beside(tmp_path / "plan.yaml" / "plan.yaml") == ""

"""``layerwise audit script.py:build`` on scripts of people who never heard of layerwise."""

import json

import pytest

from forked import Forked, layerwise

SCRIPT = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

def faulty():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[:2].requires_grad_(False)
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)

def sound():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)

def everything():
    model, optimizer = faulty()
    loader = DataLoader(TensorDataset(torch.randn(8, 3), torch.zeros(8)), batch_size=4)
    return {"model": model, "optimizer": optimizer, "loader": loader,
            "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}
"""


def run(*arguments, cwd):
    return Forked(layerwise, "audit", *arguments, folder=cwd).finish()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_a_faulty_set_up_is_told_with_exit_code_1(folder):
    done = run("script.py:faulty", cwd=folder)
    assert done.returncode == 1, done.stderr
    assert "frozen-norm-trains" in done.stdout
    assert "freeze_batchnorm" in done.stdout


def test_a_sound_set_up_has_exit_code_0(folder):
    done = run("script.py:sound", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "no findings" in done.stdout


def test_json_is_one_document_on_stdout_and_a_loader_measures_the_drift(folder):
    done = run("script.py:everything", "--json", cwd=folder)
    told = json.loads(done.stdout)
    codes = {finding["code"] for finding in told["findings"]}
    assert {"frozen-norm-trains", "frozen-statistics-drift"} <= codes
    assert told["ok"] is False
    assert done.returncode == 1


def test_a_wrong_call_says_what_to_do_without_a_traceback(folder):
    done = run("script.py:fualty", cwd=folder)
    assert done.returncode == 1
    assert "Did you mean 'faulty'" in done.stderr
    assert "Traceback" not in done.stderr

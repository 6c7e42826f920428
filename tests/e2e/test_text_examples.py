"""The examples of texts run as they stand, small."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_the_small_decoder_reports_three_plans():
    # A line for each plan, with a measured peak above zero.
    pytest.importorskip("transformers")
    size = [
        "--layers",
        "3",
        "--width",
        "32",
        "--tokens",
        "32",
        "--batch",
        "2",
        "--steps",
        "3",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [sys.executable, EXAMPLES / "small_decoder.py", *size],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    line = r"^ *(full|last 2|lisa) +([0-9.]+)% +([0-9,]+) MiB +([0-9,]+) MiB"
    rows = {name: (float(share), float(peak)) for name, share, _, peak in re.findall(line, done.stdout, re.M)}
    assert rows.keys() == {"full", "last 2", "lisa"}, done.stdout
    assert all(peak > 0 for _, peak in rows.values()), done.stdout
    assert rows["full"][0] == 100.0
    assert max(rows["last 2"][0], rows["lisa"][0]) < 100.0

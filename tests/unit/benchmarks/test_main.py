"""`python -m benchmarks`: which benchmarks run, and what the program ends with."""

import sys

import pytest
from benchmarks import __main__ as program
from benchmarks import advice


def test_what_a_benchmark_could_not_do_is_the_exit_code(monkeypatch):
    # advice left a task out
    monkeypatch.setattr(advice, "main", lambda options: 1 if options == ["--run"] else 0)
    for options, code in ((["--run"], 1), ([], 0)):
        monkeypatch.setattr(sys, "argv", ["benchmarks", "advice", *options])
        with pytest.raises(SystemExit) as ended:
            program.main()
        assert ended.value.code == code

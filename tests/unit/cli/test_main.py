"""The `layerwise` command itself: how it starts, and what it makes of the system's errors."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from layerwise.cli import main, output


def test_python_m_layerwise_is_the_command_line() -> None:
    # For where no script is installed.
    done = subprocess.run([sys.executable, "-m", "layerwise", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("layerwise ")


def test_a_terminal_without_the_letters_gets_question_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    # No UnicodeEncodeError; JSON is escaped and so keeps every letter.
    def shown() -> None:
        output.print_table("L · l")
        output.print_json({"name": "Übung"})

    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    monkeypatch.setattr(main, "app", shown)
    main.main()
    sys.stdout.flush()
    first, rest = written.getvalue().decode("ascii").split("\n", 1)
    assert first == "L ? l"
    assert json.loads(rest) == {"name": "Übung"}


def test_errors_of_the_system_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file and the reason, exit code 1; the traceback with --debug alone.
    from safetensors import SafetensorError

    app = typer.Typer()

    @app.command()
    @output.friendly
    def write(ours: bool = False) -> None:
        if ours:
            raise SafetensorError("disk is full")
        (tmp_path / "no" / "file").write_text("")

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert (
        result.stderr == f"{tmp_path / 'no' / 'file'} cannot be read or written: No such file or directory\n"
    )
    assert CliRunner().invoke(app, ["--ours"]).stderr == "disk is full\n"
    monkeypatch.setattr(output, "debug", True)
    assert isinstance(CliRunner().invoke(app, []).exception, FileNotFoundError)

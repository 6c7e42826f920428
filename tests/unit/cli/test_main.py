"""The `layerwise` command itself: how it starts, and what it makes of the system's errors."""

import errno
import gc
import io
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import layerwise
from layerwise.choosing.depths import DepthScores, Transferability
from layerwise.cli import main, output
from layerwise.cli.choosing_tables import transfer_table
from layerwise.cli.tables import new_table, prediction_table
from layerwise.errors import DataError, LayerwiseWarning
from layerwise.files import write_file
from versions import is_told


def test_python_m_layerwise_is_the_command_line() -> None:
    # For where no script is installed.
    done = subprocess.run([sys.executable, "-m", "layerwise", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("layerwise ")


def test_the_version() -> None:
    result = CliRunner().invoke(main.app, ["--version"])
    assert result.exit_code == 0
    assert result.output == f"layerwise {layerwise.__version__}\n"


def test_a_folder_without_the_right_to_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # before any work: the option, the path and the folder
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(typer.BadParameter, match=r"--out .*a\.csv cannot be written: no right to write in"):
        output.check_output(tmp_path / "a.csv", "--out")


def test_a_device_is_no_file_to_write(tmp_path: Path) -> None:
    # told before any work
    with pytest.raises(typer.BadParameter, match=r"-o /dev/null is a device or a pipe; name a file"):
        output.check_output(Path("/dev/null"), "-o")


def test_a_link_to_nothing_is_no_folder_to_make(tmp_path: Path) -> None:
    # the system says that it exists, and only when all is read
    (tmp_path / "run").symlink_to(tmp_path / "nowhere")
    with pytest.raises(typer.BadParameter, match=r"--out .*run is a link to nothing"):
        output.check_output(tmp_path / "run", "--out", folder=True)


def test_a_link_in_a_circle_is_told_as_one(tmp_path: Path) -> None:
    # Path.resolve raises a RuntimeError for it, which is no fault of the program
    link = tmp_path / "data.csv"
    link.symlink_to(link)
    shown = CliRunner().invoke(
        main.app,
        ["fit", "--model", "timm:resnet10t", "--data", str(link), "--strategy", "full", "--out", "x"],
    )
    assert shown.exit_code == 1
    assert "data.csv" in shown.stderr
    assert "symbolic links" in shown.stderr or "does not exist" in shown.stderr  # from Python 3.13 on
    assert "Did you mean" not in shown.stderr


def test_warnings_of_other_libraries_are_shown_as_python_does(monkeypatch: pytest.MonkeyPatch) -> None:
    # with their place; ours are one line
    app = typer.Typer()

    @app.command()
    @output.friendly
    def warn() -> None:
        warnings.warn("ours", LayerwiseWarning, stacklevel=1)
        warnings.warn("theirs", UserWarning, stacklevel=1)

    shown: list[str] = []
    monkeypatch.setattr(output, "_shown_by_python", lambda message, *_, **__: shown.append(str(message)))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert CliRunner().invoke(app, []).stderr == "warning: ours\n"
    assert shown == ["theirs"]


def test_ctrl_c_is_exit_code_130_and_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    # commands that can go on say so in the interrupt's message
    app = typer.Typer()

    @app.command()
    @output.friendly
    def interrupted(ours: bool = False) -> None:
        raise DataError("no images") if ours else KeyboardInterrupt

    result = CliRunner().invoke(app, [])
    assert (result.exit_code, result.stderr) == (130, "Interrupted.\n")
    assert CliRunner().invoke(app, ["--ours"]).stderr == "DataError: no images\n"
    monkeypatch.setattr(output, "debug", True)
    assert isinstance(CliRunner().invoke(app, ["--ours"]).exception, DataError)


@pytest.mark.parametrize("sizes", ["2**50", "2**40, 2**40"])
def test_what_memory_does_not_hold_is_one_message(sizes: str) -> None:
    # with torch's reason, and without its traceback
    app = typer.Typer()

    @app.command()
    @output.friendly
    def make() -> None:
        torch.empty(eval(sizes))

    shown = CliRunner().invoke(app, [])
    assert shown.exit_code == 1
    assert re.search(
        r"^memory does not suffice \(.*(allocate|overflowed).*\)\. Take .* smaller", shown.stderr
    )
    assert "Traceback" not in shown.stderr


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


def test_garbage_is_looked_for_more_rarely(monkeypatch: pytest.MonkeyPatch) -> None:
    # 1,400 times while a fit imports its libraries, by Python's own threshold: a second
    before = gc.get_threshold()
    found = []
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(main, "app", lambda: found.append(gc.get_threshold()))
    try:
        main.main()
    finally:
        gc.set_threshold(*before)
    assert found == [(10_000, *before[1:])]


@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_output_that_was_cut_short_is_a_failure(tmp_path: Path, unbuffered: str) -> None:
    # On a disk that gets full, here a limit of 1,000 bytes; Python without buffers drops the rest in silence.
    script = (
        "import resource; from layerwise.cli import main, output\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "main.app = lambda: output.friendly(output.print_json)(['a' * 1500])\n"
        "main.main()\n"
    )
    with (tmp_path / "out.json").open("w") as file:
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert "standard output cannot be written: File too large" in done.stderr
    assert "ignored" not in done.stderr  # Python's own second try


def test_numbers_that_are_not_finite_are_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    # As in a run's files: NaN is Python's own, and no JSON that other programs read.
    output.print_json({"loss": math.nan, "rows": [(1.0, -math.inf)], "out": Path("a")})
    assert json.loads(capsys.readouterr().out) == {"loss": None, "rows": [[1.0, None]], "out": "a"}


def test_a_name_that_is_no_text_can_be_read_back_from_json(capsys: pytest.CaptureFixture[str]) -> None:
    # A file's name may hold any bytes; letters stay as they are where all can be printed.
    name = os.fsdecode(b"bad\xff.png")
    output.print_json({"image": name})
    printed = capsys.readouterr().out
    assert printed.isascii()
    assert json.loads(printed) == {"image": name}
    output.print_json({"image": "Übung"})
    assert "Übung" in capsys.readouterr().out


def test_names_of_the_user_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    # Classes, files and texts are shown letter for letter; a closing tag ended in a traceback.
    names = ["[red]", "[/INST] a", ":smile:", "x [b]"]
    table = new_table("Per class [bold]", names)
    table.add_row(*names)
    output.print_table(table)
    shown = capsys.readouterr().out
    assert "Per class [bold]" in shown
    assert all(shown.count(name) == 2 for name in names)


@pytest.mark.parametrize("width", [200, 80, 60])
def test_a_narrow_terminal_breaks_no_number(width: int) -> None:
    # Columns move closer, then probabilities of classes and the rarer scores are left out, all or none.
    every = {"defective": 0.998, "functional": 0.002}
    row = {"image": "new/cell1501.png", "label": "defective", "probability": 0.998, "probabilities": every}
    depth = DepthScores("blocks.0", 8, -0.342, -0.36, 0.683, 0.938, 0.891)
    scores = Transferability((depth,), 64, 2, 0.5, None)
    closing = new_table("", ["strategy", "balanced accuracy", "macro F1", "trained parameters", "seconds"])
    closing.add_row("full fine-tuning", "0.650", "0.662", "2,562 (0.1%)", "6")
    search = new_table("", ["trained", "from", "accuracy", "error", "seeds", "lr", "decay"], left=2, spare=1)
    search.add_row("last 10 *", "conv_stem", "0.8125", "0.0000", "2", "0.001", "0.90")
    shown = []
    for table in (prediction_table([row], list(every)), transfer_table(scores), closing, search):
        console = Console(width=width)
        with console.capture() as printed:
            console.print(table)
        shown.append(printed.get())
    wide = width > 60
    assert "new/cell1501.png" in shown[0]
    assert "2,562 (0.1%)" in shown[2]
    assert ["conv_stem" in shown[3], "0.90" in shown[3]] == [True, wide]
    assert [shown[0].count("0.998"), shown[0].count("functional")] == ([2, 1] if wide else [1, 0])
    assert [number in shown[1] for number in ("0.891", "0.938")] == [True, True]
    assert [number in shown[1] for number in ("-0.342", "-0.360", "0.683")] == [wide] * 3


def test_errors_of_the_system_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file and the reason, exit code 1; the traceback with --debug alone.
    from safetensors import SafetensorError

    app = typer.Typer()

    def cut_short(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @app.command()
    @output.friendly
    def write(ours: bool = False, full: bool = False) -> None:
        if ours:
            raise SafetensorError("disk is full")
        if full:
            write_file(tmp_path / "page.html", cut_short)
        (tmp_path / "no" / "file").write_text("")

    result = CliRunner().invoke(app, [])
    assert result.exit_code == 1
    assert (
        result.stderr == f"{tmp_path / 'no' / 'file'} cannot be read or written: No such file or directory\n"
    )
    assert CliRunner().invoke(app, ["--ours"]).stderr == "disk is full\n"
    told = CliRunner().invoke(app, ["--full"]).stderr
    reason = r"No space left on device \([\d,]+ MiB free there\)"
    assert re.fullmatch(rf"\S+page.html cannot be read or written: {reason}. Make room, or .* place.\n", told)
    monkeypatch.setattr(output, "debug", True)
    assert isinstance(CliRunner().invoke(app, []).exception, FileNotFoundError)


@pytest.mark.parametrize(
    "name", ["inspect", "plan", "fit", "search", "curve", "advise", "diagnose", "signature"]
)
def test_help_is_whole_at_80_columns(name: str) -> None:
    # The kind of an option, as in <a|b>, is not broken over two lines.
    shown = CliRunner().invoke(main.app, [name, "--help"], env={"COLUMNS": "80"}).stdout
    assert "--granularity" in shown
    assert max(map(len, shown.splitlines())) == 80
    assert [line for line in shown.splitlines() if re.search(r"<\w[^>]*$", line)] == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "--epochs", "-1"], "'--epochs': '-1' is given; expected greater than or equal to 1"),
        (["fit", "--batch-size", "0"], "'--batch-size': '0' is given; expected greater than or equal to 1"),
        (["fit", "--search-share", "2"], "'--search-share': '2' is given; expected less than or equal to 1"),
        (["fit", "--epochs", "two"], "'--epochs': 'two' is given; expected a valid integer"),
        (["fit", "--seed", "4294967296"], "'--seed': 4294967296 is given; expected a whole number from 0 to"),
        (["advise", "m", "--data", "d", "--seed", "-1"], "'--seed': -1 is given; expected a whole number"),
        (["search", "m", "--data", "d", "--out", "o", "--minutes", "0"], "0.0 is given; expected a finite"),
        (
            ["curve", "m", "--data", "d", "--out", "o", "--lr", "inf"],
            "inf is given; expected a finite number",
        ),
        (
            ["fit", "--budget-minutes", "0"],
            "'--budget-minutes': 0.0 is given; expected a finite number above",
        ),
        (["fit", "--lr", "nan"], "'--lr': nan is given; expected a finite number above 0"),
        (["fit", "--clip-norm", "-1"], "'--clip-norm': -1.0 is given; expected a finite number above 0"),
        (["fit", "--label-smoothing", "1"], "'--label-smoothing': 1.0 is given; expected a share"),
        (["plan", "m", "--epochs", "0"], "'--epochs': '0' is given; expected greater than or equal to 1"),
        (["fit", "--keep", "all"], "'--keep': 'all' is not one of 'best', 'last'."),
    ],
)
def test_a_number_out_of_range_is_named_with_its_option(arguments: list[str], said: str) -> None:
    # The value too, and what is legal; before a model is opened.
    result = CliRunner().invoke(main.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert is_told(said, result.stderr)


@pytest.mark.parametrize(
    ("arguments", "after"),
    [
        (["fit", "--data", ""], "--data"),
        (["fit", "--resume", ""], "--resume"),
        (["fit", "--out=", "--lr", "1"], "--out"),
        (["advise", "m", "--data", "d", "-o", ""], "-o"),
        (["cache", "rm", "", "--all"], "rm"),
        (["predict", "run", ""], "run"),
    ],
)
def test_an_empty_text_is_no_path(arguments: list[str], after: str) -> None:
    # As an unset variable of a shell gives one: Python takes it for the current folder.
    result = CliRunner().invoke(main.app, arguments, env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert f"an empty text is given after {after!r}; expected" in result.stderr

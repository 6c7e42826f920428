"""Processes for tests, forked from one that has imported the libraries, so that each begins at once.

They are real: they can be interrupted and killed, and share nothing with the tests but their files. What only
a fresh interpreter can show (what it imports, how it is started and ends) needs `subprocess`.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(
    [
        "torch._dynamo",
        "accelerate",
        "torchmetrics.classification",
        "timm",
        "torchvision",
        "transformers",
        "layerwise.training.job",
    ]
)


class Forked:
    """A process that runs a function; its output and errors go to files.

    Args:
        function: of a module that can be imported.
        arguments: of the function, as texts.
        environment: of the process; default: this one's.
        folder: to run in; default: this one's.
        stdin: what it can read.
    """

    def __init__(
        self,
        function: Callable[..., object],
        *arguments: object,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
        stdin: str = "",
    ) -> None:
        texts = [str(argument) for argument in arguments]
        self._files = tempfile.TemporaryDirectory()
        self._streams = [Path(self._files.name, name) for name in ("in", "out", "err")]
        for stream in self._streams:
            stream.write_text(stdin if stream.name == "in" else "")
        given = (function, texts, self._streams, dict(environment or os.environ), str(folder or Path.cwd()))
        self._process = _SERVER.Process(target=_run, args=given)
        self._process.start()
        atexit.register(self._process.kill)  # else Python waits at its end for what a failed test left

    def wait_for(self, text: str, times: int = 1) -> None:
        """Return when `text` is so many times in what the process has written."""
        while sum(stream.read_text().count(text) for stream in self._streams[1:]) < times:
            assert self._process.is_alive(), self._streams[2].read_text()
            time.sleep(0.01)

    def interrupt(self) -> None:
        """Send what Ctrl-C sends."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGINT)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()

    def finish(self, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
        """Wait for its end; return exit code (negative for a signal), output and errors."""
        self._process.join(timeout_s)
        code = self._process.exitcode
        if code is None:
            self._process.kill()
            self._process.join()
            raise subprocess.TimeoutExpired("a forked process", timeout_s)
        out, err = (stream.read_text() for stream in self._streams[1:])
        self._files.cleanup()
        return subprocess.CompletedProcess([], code, out, err)


def free_port() -> str:
    """Return a port at which processes can meet."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def layerwise(*arguments: str) -> None:
    """Run the command line, in a process of `Forked`."""
    from layerwise.cli.main import main

    sys.argv = ["layerwise", *arguments]
    main()


def script(path: str, *arguments: str) -> None:
    """Run a Python file as ``python PATH ARGUMENTS`` does, in a process of `Forked`."""
    sys.argv = [path, *arguments]
    runpy.run_path(path, run_name="__main__")


def _run(
    function: Callable[..., Any],
    arguments: list[str],
    streams: list[Path],
    environment: dict[str, str],
    folder: str,
) -> None:
    import numpy as np
    import torch

    for number, stream in enumerate(streams):
        os.dup2(os.open(stream, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_APPEND), number)
    sys.stdin = open(0)  # noqa: SIM115  (multiprocessing gives another one)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    torch.set_num_threads(1)
    np.random.seed()  # else all begin in the state that numpy drew when it was imported
    function(*arguments)

"""A run's folder: what was done, with what, and what came of it; enough to predict and to go on.

runs/x/
  run.json           plan, model, task and classes, preprocessing, settings, versions, git state; at
                     the end also the result
  plan.yaml          the plan, to edit and use again
  model.safetensors  the weights that the run keeps (the best epoch's)
  history.jsonl      one line an epoch
  timings.json       seconds of each epoch
  audit.json         what the audit before training found, what later phases warned of, what moved
  checkpoints/       to go on from
  transformers/      of texts: the tuned model and its tokenizer as a transformers folder; with mean pooling
                     its encoder, and the output layer in classifier.safetensors
  language-model/    with --lm-epochs: the run of the first half, the language model
  report.html        what `layerwise report` wrote
"""

from __future__ import annotations

import contextlib
import datetime
import difflib
import errno
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from layerwise.errors import RunError, shorten
from layerwise.files import remove_leftovers, sha256, with_nulls, write_json
from layerwise.plans.plan import Plan
from layerwise.training.checkpoint import resume_command
from layerwise.training.kept_weights import PUT_BACK, weights_file

FORMAT = 1
"""Version of the format of ``run.json``."""

_PARTS = ("model", "plan", "task", "settings", "data")
"""Mappings that each ``run.json`` has."""

_PACKAGES = (
    "layerwise",
    "torch",
    "accelerate",
    "torchmetrics",
    "numpy",
    "timm",
    "torchvision",
    "transformers",
)


LANGUAGE_MODEL = "language-model"
"""Name of the folder of the language model's run, inside the classifier's."""

_BEGUN = (LANGUAGE_MODEL, "layerwise")
"""What may lie in a folder before its ``run.json``: the first half of ULMFiT, and a tracker's files."""


def require_free(out: Path, *, data: str | None = None) -> None:
    """Look whether a new run can be made in the folder `out`.

    Args:
        out: may exist, and hold hidden files and what a run that was only begun leaves.
        data: where the run's data lie, where that is known.

    Raises:
        RunError: `out` holds a run or other files, is a file, or is, holds or lies in the folder `data`.
    """
    if (out / "run.json").exists():
        raise RunError(
            f"{out} already holds a run. Go on with it: {resume_command(out)} (in "
            "Python: resume=True), or name another folder: --out (out=)."
        )
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; --out (out=) names the folder of the new run.")
    if data is not None and Path(data).is_dir():
        here, there = out.resolve(), Path(data).resolve()
        if here == there or here in there.parents or there in here.parents:
            raise RunError(
                f"the run's folder {out} and the data {data} lie in each other, so the run's files would be "
                "taken for data. Name a folder outside of the data: --out (out=)."
            )
    others = sorted(p.name for p in out.iterdir()) if out.exists() else []
    if others := [name for name in others if name not in _BEGUN and not name.startswith(".")]:
        raise RunError(
            f"{out} holds files that are none of a run's ({shorten(others)}). Name a new folder: "
            "--out (out=)."
        )


def create_run(out: Path, *, plan: Plan, about: Mapping[str, Any]) -> None:
    """Make a new run folder with ``run.json`` and ``plan.yaml``.

    Args:
        out: the folder; `require_free` has looked at it.
        plan: stored twice, as part of ``run.json`` and as YAML to use again.
        about: what else ``run.json`` tells: model, task, settings, data.

    Raises:
        RunError: the folder cannot be written, or holds a run by now: another process was faster.
    """
    if (out / "run.json").exists():
        require_free(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        remove_leftovers(out)
        data = {
            "format": FORMAT,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            **about,
            "plan": plan.model_dump(mode="json"),
            "versions": versions(),
            "git": git_state(),
            "result": None,
        }
        write_json(out / "run.json", data)  # first: it makes the folder a run
        plan.save(out / "plan.yaml")
    except OSError as error:
        raise RunError(f"the run folder {out} cannot be written: {error}. Choose another: --out.") from error


def read_run(path: str | Path) -> dict[str, Any]:
    """Return what ``run.json`` of a run tells.

    Raises:
        RunError: there is no run, or its ``run.json`` cannot be read.
    """
    folder = Path(path)
    file = folder / "run.json"
    if not file.is_file():
        there = "is not a run (it has no run.json)" if folder.is_dir() else "does not exist"
        if folder.is_file():
            there = "is a file, and a run is a folder"
        known = runs_in(folder) or runs_beside(folder)
        raise RunError(f"{folder} {there}.{known} Make one: layerwise fit --out FOLDER")
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # the last one of JSON nested too deeply
        raise RunError(f"{file} cannot be read: {error}. {PUT_BACK}") from error
    if not isinstance(data, dict) or "format" not in data:
        raise RunError(f"{file} is not the record of a run, so it was altered. {PUT_BACK}")
    if data["format"] != FORMAT:
        raise RunError(
            f"{file} has format {data['format']!r}; this version of layerwise reads {FORMAT}. Use the one "
            "that wrote it."
        )
    if missing := [key for key in _PARTS if not isinstance(data.get(key), dict)]:
        raise RunError(
            f"{file} does not tell {', '.join(missing)}, so it was altered or cut short. {PUT_BACK}"
        )
    return data


def whole_of(folder: Path) -> dict[str, Any] | None:
    """Return job and plan of a run of which only the language model's part was begun; None for other folders.

    That part knows them (one that an older version wrote does not: None).
    """
    first = folder / LANGUAGE_MODEL
    if (folder / "run.json").exists() or not (first / "run.json").exists():
        return None
    return read_run(first).get("whole")


def runs_beside(folder: Path) -> str:
    """Return what runs lie beside `folder`: names like its own first, eight at most; ``""`` for none."""
    return runs_in(folder.parent, like=folder.name)


def runs_in(folder: Path, *, like: str = "") -> str:
    """Return what runs lie in `folder`, as `runs_beside` does."""
    names = sorted(p.parent.name for p in folder.glob("*/run.json"))
    if not names:
        return ""
    close = difflib.get_close_matches(like, names, n=3, cutoff=0.5)
    shown = [*close, *(name for name in names if name not in close)]
    return f" Runs in {folder}: {shorten(shown, 8)}."


@contextlib.contextmanager
def hold_run(out: Path) -> Iterator[None]:
    """Keep other processes of this machine from training a run, in the body.

    The lock ends with this process, however it ends, and is not that of the processes that it starts: one
    that loads samples may outlive it for some seconds. Where nothing can be locked (on a read-only disk, on
    Windows) nobody is kept out.

    Raises:
        RunError: another process has the lock.
    """
    try:
        import fcntl

        (out / "checkpoints").mkdir(exist_ok=True)
        file = (out / "checkpoints" / "lock").open("ab")
    except (ImportError, OSError):
        yield
        return
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise RunError(
                    f"another process is training the run {out} at this moment. Wait until it ends, or end "
                    "it, and resume then."
                ) from error
        yield


def finish_run(out: Path, result: Mapping[str, Any]) -> None:
    """Add the result, and the hash of the kept weights, to ``run.json``; numbers not finite are null."""
    added = {"weights_sha256": sha256(weights_file(out)), "result": with_nulls(dict(result))}
    write_json(out / "run.json", {**read_run(out), **added})


def read_audit(out: Path) -> dict[str, Any]:
    """Return what ``audit.json`` of a run tells so far.

    Raises:
        RunError: what is there cannot be read.
    """
    file = out / "audit.json"
    there: Any = {}
    if file.exists():
        try:
            there = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            there = None
    if not isinstance(there, dict):
        raise RunError(
            f"{file} cannot be read, so it was altered or cut short. Put the run's own file back, or remove "
            "it, and resume."
        )
    return {"before": None, "phases": {}, "after": None, **there}


def write_audit(out: Path, **parts: Mapping[str, Any]) -> None:
    """Write ``audit.json`` of a run: before it, as phases began, and after; what is not given stays.

    Raises:
        RunError: what is there cannot be read.
    """
    write_json(out / "audit.json", {**read_audit(out), **parts})


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a run, where installed."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Return commit and cleanness of the git checkout that the process runs in; None outside of one."""
    try:
        commit = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.strip(), "dirty": bool(changed.strip())}


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout

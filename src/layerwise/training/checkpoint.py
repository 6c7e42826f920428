"""Checkpoints: written whole or not at all, and believed only when their hashes agree.

    checkpoints/
      step-00000050/
        manifest.json    format version, step, epoch, and the SHA-256 of each other file
        state.pt         tensors and plain data, read with ``weights_only=True``

A folder is filled under a temporary name, flushed and renamed, so a process killed at any moment leaves
either the whole checkpoint or none. What was altered or cut short later does not match its hash: it is
named, and the checkpoint before it is used.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from layerwise.errors import RunError, first_line
from layerwise.files import free_room, remove_leftovers, sha256, write_folder, write_json

FORMAT = 1
"""Version of the checkpoint format; another one is refused."""

_PREFIX = "step-"
_CUT_SHORT = re.compile("enforce fail|PytorchStreamWriter")
_NAME = re.compile(rf"{_PREFIX}[0-9]{{8,}}")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_latest` read.

    Attributes:
        path: folder of the checkpoint.
        step: optimiser steps made when it was written.
        state: what was given to `save_checkpoint`, tensors on the CPU.
        skipped: one message for each later checkpoint that could not be believed.
    """

    path: Path
    step: int
    state: dict[str, Any]
    skipped: tuple[str, ...] = ()


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], *, keep: int = 2) -> Path:
    """Write `state` as the checkpoint of `step` into `folder`, then remove all but it and those just before.

    Others are removed only once the new one is on the disk. Later ones are removed too: a run that writes
    this one went on from an earlier one, so it did not believe them.

    Args:
        folder: the run's ``checkpoints`` folder; made when missing.
        step: optimiser steps made so far; names the checkpoint.
        state: tensors and plain data (dict, list, tuple, str, int, float, bool, None).
        keep: how many checkpoints stay, at least 1.

    Returns:
        The folder of the new checkpoint.

    Raises:
        RunError: it could not be written (a full disk, a missing right). Earlier ones are untouched.
    """
    path = folder / f"{_PREFIX}{step:08d}"

    def fill(temporary: Path) -> None:
        torch.save(state, temporary / "state.pt")
        manifest = {
            "format": FORMAT,
            "step": step,
            "sha256": {"state.pt": sha256(temporary / "state.pt")},
        }
        write_json(temporary / "manifest.json", manifest)

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_folder(path, fill)
    except (OSError, RuntimeError) as error:
        told = first_line(error)
        if not isinstance(error, OSError):  # how torch's own writer reports a full disk
            part = "only a part of its file could be written" if _CUT_SHORT.search(told) else told
            told = f"{part} ({free_room(folder)} free there)"
        left = ", ".join(p.name for p in list_checkpoints(folder)) or "none"
        raise RunError(
            f"the checkpoint of step {step} could not be written to {folder}: {told}. "
            f"Checkpoints that are whole: {left}. "
            f"Make room, then go on with: {resume_command(folder.parent)}"
        ) from error
    there = list_checkpoints(folder)
    kept = [p for p in there if p.name <= path.name][-keep:]
    for other in there:
        if other not in kept:
            shutil.rmtree(other, ignore_errors=True)
    return path


def resume_command(run: Path) -> str:
    """Return the command that goes on with the run in a folder."""
    return f"layerwise fit --resume {shlex.quote(str(run))}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in `folder`, by step, whether or not they can be believed."""
    return sorted(p for p in folder.glob(f"{_PREFIX}*") if _NAME.fullmatch(p.name) and p.is_dir())


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state in the checkpoint folder `path`, after its hashes were checked.

    Loading runs no code from the file: `torch.load` is called with ``weights_only=True``.

    Raises:
        RunError: something is missing, altered or cut short, or of another format version.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        version, hashes = manifest["format"], manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"checkpoint {path} has no readable manifest.json ({error}).") from error
    if version != FORMAT:
        raise RunError(f"checkpoint {path} has format {version!r}; this version of layerwise reads {FORMAT}.")
    if not isinstance(hashes, dict) or "state.pt" not in hashes:
        raise RunError(f"checkpoint {path} has an altered manifest.json: no hash of state.pt is in it.")
    for name, expected in hashes.items():
        file = path / name
        if not file.is_file():
            raise RunError(f"checkpoint {path} lacks its file {name}.")
        if sha256(file) != expected:
            raise RunError(
                f"checkpoint {path} is damaged: {name} ({file.stat().st_size} bytes) does not match the "
                "hash in its manifest, so it was altered or cut short."
            )
    try:
        state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        raise RunError(
            f"checkpoint {path} cannot be read: state.pt holds something else than tensors and plain data, "
            f"or is no file of torch ({first_line(error)})."
        ) from error
    return state


def load_latest(folder: Path) -> Checkpoint | None:
    """Return the last checkpoint in `folder` that can be believed; None when there is none at all.

    What a kill left half-written is removed first.

    Raises:
        RunError: there are checkpoints, but all of them are damaged; each is named.
    """
    if not folder.is_dir():
        return None
    remove_leftovers(folder)
    skipped: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            state = load_checkpoint(path)
        except RunError as error:
            skipped.append(str(error))
            continue
        return Checkpoint(path, int(path.name.removeprefix(_PREFIX)), state, tuple(skipped))
    if skipped:
        raise RunError(
            f"none of the {len(skipped)} checkpoints in {folder} can be used:\n  "
            + "\n  ".join(skipped)
            + "\nStart the run anew in another folder."
        )
    return None

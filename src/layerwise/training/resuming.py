"""`resume_job`: go on with a run that knows its own model, data and options."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from layerwise.errors import RunError, shorten
from layerwise.plans.plan import Plan
from layerwise.training.checkpoint import list_checkpoints, resume_command
from layerwise.training.fit import fit
from layerwise.training.job import Job, open_job
from layerwise.training.result import Result
from layerwise.training.run_folder import LANGUAGE_MODEL, read_run, whole_of


def resume_job(path: str | Path, *, say: Callable[[str], None] = lambda _: None, **more: Any) -> Result:
    """Go on with the run in the folder `path`, which knows its own model, data and options.

    Also where only the first half of one with ``--lm-epochs`` was begun in it. The weights file that it began
    with need not be there any more, once there is a checkpoint.

    Args:
        path: the run's folder.
        say: told the notes of opening model and data.
        more: options of `layerwise.fit` that do not shape the result (`progress`, `workers`).

    Raises:
        RunError: there is no run, or it is part of a search or of a run with ``--lm-epochs``, or it was
            started from Python with objects that have no names.
    """
    begun_alone = whole_of(Path(path))
    about = begun_alone or read_run(path)
    if about.get("job") is None:
        raise RunError(_without_job(path, about))
    job = job_from_dict(about["job"])
    begun = list_checkpoints(Path(path) / "checkpoints")
    if job.weights is not None and begun and not Path(job.weights).exists():
        say(f"weights file {job.weights!r} is gone; all weights are in the checkpoint")
        job = dataclasses.replace(job, weights=None, pretrained=False)
    prepared = open_job(job, plan=Plan.model_validate(about["plan"]), **more)
    for note in prepared.notes:
        say(note)
    return prepared.fit(out=path, resume=begun_alone is None, **more)


def _without_job(path: str | Path, about: Mapping[str, Any]) -> str:
    """Return how to go on with a run that knows no job: what it is part of, or that it was made in Python."""
    folder = Path(path).resolve()
    if about.get("whole"):
        return f"{path} is the first half of a run, which goes on with it: {resume_command(folder.parent)}"
    named = Path(str(about.get("winner") or folder))
    if named.name != folder.name:
        return (
            f"{path} is the run of a search's winner under another name, so the search does not know it. "
            f"Move it back to {str(named)!r}; then give the command or the call again that made "
            f"{str(named.parent)!r}."
        )
    winner = folder.name.startswith("winner-trial-")
    if winner or (folder.name == LANGUAGE_MODEL and about["model"].get("spec") is not None):
        return (
            f"{path} is part of a {'search' if winner else 'run with --lm-epochs'}, which goes on with "
            f"it. Give the command or the call again that made {str(folder.parent)!r}."
        )
    return (
        f"{path} was started from Python with a model or data that have no names. Resume it there: "
        f"layerwise.fit(model, train, val, plan=plan, out={str(path)!r}, resume=True)."
    )


def job_from_dict(data: Mapping[str, Any]) -> Job:
    """Return the job that ``dataclasses.asdict`` made `data` of.

    Raises:
        RunError: it holds what no job of this version has.
    """
    known = {field.name for field in dataclasses.fields(Job)}
    options = {*inspect.signature(fit).parameters}
    odd = sorted({*data} - known | {*data.get("options", ())} - options)
    if odd or not {"model", "data"} <= {*data}:
        raise RunError(
            f"the job of this run {f'has {shorten(odd)}, unknown to' if odd else 'lacks model or data for'} "
            "this version of layerwise: another version wrote it, or its run.json was altered. Resume it "
            "with the version that is named there."
        )
    return Job(**data)

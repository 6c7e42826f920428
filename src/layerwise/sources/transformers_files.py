"""What transformers reads from a local folder or a hub: its errors become ours, its logging is kept quiet."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from layerwise.errors import MissingExtraError, ModelError, did_you_mean_beside, first_line
from layerwise.sources.fetching import hub_if_found, is_download_error


def import_transformers(spec: str) -> Any:
    """Return the library.

    Raises:
        MissingExtraError: it is not installed; `spec` names the model that needs it.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingExtraError("transformers", "text", f"The model {spec!r}") from error
    return transformers


def local_folder(name: str) -> Path | None:
    """Return the folder that `name` means, with ``~`` as the home folder; None for a hub id.

    Raises:
        ModelError: there is no such folder, or no model in it.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            inside = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
            raise ModelError(
                f"folder {name!r} has no config.json, so it is not a transformers model (it holds {inside}). "
                f"Expected what save_pretrained writes."
            )
        return path
    looks_local = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.is_file()
    if looks_local:
        raise ModelError(
            f"{_no_folder(name)} Expected one with config.json and weights, or a hub id such as "
            f"hf:google-bert/bert-base-uncased."
        )
    return None


def _no_folder(name: str) -> str:
    return f"there is no folder {name!r}.{did_you_mean_beside(Path(name).expanduser())}"


def read(spec: str, call: Any, what: str = "model") -> Any:
    """Return what `call` reads of the model `spec`.

    Raises:
        ModelError: the library raised anything; says what to do.
    """
    name = spec.partition(":")[2]
    local = Path(name).expanduser().is_dir()
    try:
        with quiet(), nullcontext() if local else hub_if_found():
            return call()
    except Exception as error:  # the library, its formats and its downloads raise all kinds
        reason = first_line(error)
        if "trust_remote_code" in str(error) or "custom code" in str(error):
            raise ModelError(
                f"{spec!r} brings its own Python code, which layerwise never runs. Open the model yourself "
                f"in a function after reading that code, and give FILE.py:FUNCTION."
            ) from error
        if unknown := re.search(r"Unrecognized configuration class.*(AutoModelFor\w+)", str(error)):
            raise ModelError(
                f"the model of {spec!r} is of a kind that transformers has no {unknown[1]} for, so it cannot "
                "do the task. Choose another --task (task=), or another model."
            ) from error
        if is_download_error(error) and not local:
            # what has the form of an id may be a path: then the folder that it would lie in is there
            missing = (
                f"{_no_folder(name)} As for an id, " if "/" in name and Path(name).parent.is_dir() else ""
            )
            raise ModelError(
                f"{missing}the {what} of {spec!r} could not be downloaded ({reason}). Check the id; without "
                f"a network, fetch the folder elsewhere and give hf:FOLDER."
            ) from error
        raise ModelError(
            f"the {what} of {spec!r} cannot be opened: {type(error).__name__}: {reason}. Expected a folder "
            f"or hub id with a transformers configuration, weights, and a tokenizer or image processor."
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from printing what stands in `OpenedModel.notes`; its settings are put back."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bars():
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers from showing bars; its setting is put back."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""The file of weights in a run's folder: written whole, and read only where it is what the run kept."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from layerwise.errors import RunError
from layerwise.files import sha256, write_file
from layerwise.training.checkpoint import resume_command

PUT_BACK = "Put the run's own file back, or start the run anew in another folder."
"""What to do about a damaged file of a run."""


def weights_file(path: Path) -> Path:
    """Return where a run keeps its weights."""
    return path / "model.safetensors"


def require_weights_file(path: Path) -> None:
    """Look whether a folder lies where a run keeps its weights.

    Raises:
        RunError: so it is.
    """
    if path.is_dir():
        raise RunError(
            f"{path} is a folder, and a run keeps its weights in a file of that name. Move the folder away. "
            "Then put the run's own file back, or, where the run was not finished, go on with it: "
            f"{resume_command(path.parent)}"
        )


def save_weights(model: nn.Module, path: Path) -> str:
    """Write all parameters and buffers of `model` to a safetensors file, shared tensors once.

    Returns:
        The file's SHA-256.

    Raises:
        RunError: the file cannot be written; one that was there before is untouched.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_model

    try:
        write_file(path, lambda temporary: save_model(model, str(temporary)))
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"the weights could not be written to {path}: {error}. Make room and resume."
        ) from error
    return sha256(path)


def load_weights(model: nn.Module, path: Path, *, expected_sha256: str | None = None) -> None:
    """Put the weights of a safetensors file into `model`.

    Raises:
        RunError: the file is missing, damaged or altered, or does not fit the model, and in what.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file, load_model

    require_weights_file(path)
    if not path.is_file() and expected_sha256 is not None:
        raise RunError(f"{path} is missing, though the run had kept it. {PUT_BACK}")
    if not path.is_file():
        raise RunError(f"{path} is missing: the run has kept no weights yet. Go on with it: --resume.")
    if expected_sha256 is not None and sha256(path) != expected_sha256:
        raise RunError(
            f"{path} does not match the hash that the run keeps of it: it was altered or cut short. "
            f"{PUT_BACK}"
        )
    try:
        load_model(model, str(path))
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} does not fit {type(model).__name__}: {error}") from error
    except RuntimeError as error:  # it tells every name, which may be hundreds
        from layerwise.sources.weights import compare

        mismatch = compare(load_file(path), model)
        raise RunError(
            f"{path} does not fit {type(model).__name__}: {mismatch or error}. Expected a model of the "
            "architecture, and with the classes, that the run trained."
        ) from error

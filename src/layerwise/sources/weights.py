"""Read weight files without running code, and fit them to a model, name by name or in order.

A ``.pth`` file is a pickle, and a pickle is a program. Files are read by safetensors, or by torch with
``weights_only=True``, which builds tensors and plain containers and refuses everything else.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from layerwise.errors import ModelError, did_you_mean_beside, named_kind, shorten

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

SAFETENSORS = (".safetensors",)
PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# Keys under which training programs keep the state dict, the ones with averaged weights first.
WRAPPERS = ("model_ema", "state_dict_ema", "state_dict", "model_state_dict", "model", "module")
# What wrappers of a module (DataParallel and DDP, torch.compile, Lightning, timm's EMA) put before names, and
# programs that pretrain one under a head of their own.
PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "backbone.", "encoder.")
_COUNTER = "num_batches_tracked"
# What transformers passes over in every file, and a pooler.
_PASSED_OVER = (r"position_ids$", r"rotary_emb\.inv_freq$", r"(^|\.)pooler\.")
SHOWN = 5


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the tensors of a weight file by name, on the CPU, wrappers and name prefixes as they are.

    Args:
        path: ``.safetensors``, or ``.pth``, ``.pt``, ``.bin``, ``.ckpt`` (read with ``weights_only=True``).
            The state dict may stand under a key such as ``"state_dict"`` or ``"model"``.

    Raises:
        ModelError: the file is missing, damaged, of another kind, holds no tensors, or is a pickle that
            asks for more than tensors and plain containers; in the last case nothing of it was run.
    """
    path = _weights_file(path)
    return _read_safetensors(path) if path.suffix in SAFETENSORS else _unwrap(_read_pickle(path), path)


def check_weights(path: str | Path) -> None:
    """Look whether `read_weights` can read a file, without its tensors where its form allows that.

    Raises:
        ModelError: as `read_weights`.
    """
    path = _weights_file(path)
    if path.suffix in SAFETENSORS:
        _read_safetensors(path, header=True)
    else:
        _unwrap(_read_pickle(path, mmap=zipfile.is_zipfile(path)), path)


def _weights_file(path: str | Path) -> Path:
    """Return `path` if it is a file of a kind that can be read."""
    path = Path(path)
    if path.is_dir():
        inside = sorted(file.name for file in path.iterdir() if file.suffix in SAFETENSORS + PICKLES)
        hint = f"Name the file in it: {', '.join(inside)}." if inside else "It holds no weight file."
        raise ModelError(f"weights {str(path)!r} is a folder; expected a file. {hint}")
    if not path.is_file():
        raise ModelError(
            f"weights file {str(path)!r} does not exist.{did_you_mean_beside(path)} "
            f"Give the path of a .safetensors or .pth file."
        )
    if path.suffix not in SAFETENSORS + PICKLES:
        raise ModelError(
            f"weights file {str(path)!r} ends in {path.suffix!r}; expected one of "
            f"{', '.join(SAFETENSORS + PICKLES)}."
        )
    return path


def _read_safetensors(path: Path, *, header: bool = False) -> dict[str, Tensor]:
    import safetensors
    import safetensors.torch

    try:
        if header:
            with safetensors.safe_open(path, framework="pt"):
                return {}
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(
            f"weights file {str(path)!r} is not a whole safetensors file ({error}). Fetch it again."
        ) from error


def _read_pickle(path: Path, *, mmap: bool = False) -> Any:
    import torch

    try:
        with warnings.catch_warnings():
            # torch says of any protocol but its own to file an issue; the error below says what to do
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is None:
            # torch's own message begins with the advice to let the file run code
            reason = re.search(r"WeightsUnpickler error:\s*(.+)", str(error))
            raise ModelError(
                f"weights file {str(path)!r} cannot be read as a torch file"
                f"{f' ({reason[1]})' if reason else ''}. Fetch it again, or save it as safetensors."
            ) from error
        raise ModelError(
            f"weights file {str(path)!r} was refused: it is a pickle that asks for {refused[1]!r}, and to "
            f"load that can run code. Nothing of it was run. Expected tensors only; where you trust its "
            f"source, save its state_dict as safetensors in the program that made it."
        ) from error
    except (OSError, EOFError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(
            f"weights file {str(path)!r} is damaged or not a torch file "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'it ends early'}). "
            f"Fetch it again."
        ) from error


def _unwrap(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in what a checkpoint file held."""
    import torch

    while isinstance(content, Mapping):
        if content and all(isinstance(value, torch.Tensor) for value in content.values()):
            return {str(name): value for name, value in content.items()}
        inner = next((key for key in WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            # A state dict may hold a few entries that are no tensors (``_extra_state``, a version number).
            tensors = {str(name): v for name, v in content.items() if isinstance(v, torch.Tensor)}
            if tensors:
                return tensors
            break
        content = content[inner]
    found = f"the keys {list(content)[:8]}" if isinstance(content, Mapping) else named_kind(content)
    raise ModelError(
        f"weights file {str(path)!r} holds {found}, not a state dict. Expected names with tensors, "
        f"directly or under one of {', '.join(WRAPPERS)}."
    )


@dataclass(frozen=True)
class Mismatch:
    """How the tensors of a file and of a model differ, by the model's names.

    Attributes:
        missing: the model has them, the file has not.
        unexpected: the file has them, the model has not.
        shapes: name -> (shape in the file, shape in the model), where both have it.
    """

    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.shapes)

    def __str__(self) -> str:
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} missing in the file ({shorten(self.missing, SHOWN)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} that the model has not ({shorten(self.unexpected, SHOWN)})")
        if self.shapes:
            wrong = [
                f"{name}: {_shape(file)} in the file, {_shape(model)} in the model"
                for name, (file, model) in self.shapes.items()
            ]
            parts.append(f"{len(wrong)} of another shape ({shorten(wrong, SHOWN)})")
        return "; ".join(parts) or "no difference"


def compare(state: Mapping[str, Tensor], model: nn.Module) -> Mismatch:
    """Return how `state` differs from the state dict of `model`; an empty one is falsy.

    ``num_batches_tracked`` counters may be missing: old files have none, and nothing reads them where
    batch-norm has a momentum.
    """
    own = model.state_dict()
    tied = _tied(model)
    return Mismatch(
        missing=tuple(
            name
            for name in own
            if name not in state
            and not name.endswith(_COUNTER)
            and not any(other in state for other in tied.get(name, ()))
        ),
        unexpected=tuple(name for name in state if name not in own and not name.endswith(_COUNTER)),
        shapes={
            name: (tuple(state[name].shape), tuple(own[name].shape))
            for name in own
            if name in state and state[name].shape != own[name].shape
        },
    )


def _tied(model: nn.Module) -> dict[str, list[str]]:
    """Return, for each parameter with several names, its other names (tied weights)."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: [n for n in group if n != name] for group in names.values() for name in group}


def strip_prefixes(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return `state` without the prefix that a wrapper (DDP, compile) gave all names, and that prefix.

    A prefix goes only where all names share it and more names fit the model without it.
    """
    own = set(model.state_dict())
    current, removed = dict(state), ""
    while True:
        fitting = len(own.intersection(current))
        for prefix in PREFIXES:
            if current and all(name.startswith(prefix) for name in current):
                shorter = {name[len(prefix) :]: value for name, value in current.items()}
                nested = any(name.startswith(PREFIXES) for name in shorter)
                if len(own.intersection(shorter)) > fitting or (fitting == 0 and nested):
                    current, removed = shorter, removed + prefix
                    break
        else:
            return current, removed


def add_prefix(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], str]:
    """Return `state` with the path of the part of `model` that it is of before its names, and that path.

    So the file of a body (``embeddings.…``) fits a classifier that holds it (``bert.embeddings.…``). That is
    the one part that has all names, or the body of a transformers model: then names of other parts (a head)
    stay as they are. Nothing is put before the names where one fits that part as it is.
    """
    own = set(model.state_dict())
    first = next(iter(state), "")
    found = [name.removesuffix(first) for name in own if name.endswith(f".{first}")]
    fitting = [prefix for prefix in found if all(prefix + name in own for name in state)]
    if len(fitting) == 1 and not own.intersection(state):
        return {fitting[0] + name: value for name, value in state.items()}, fitting[0]
    body = f"{getattr(model, 'base_model_prefix', '')}."
    inside = {name.removeprefix(body) for name in own if name.startswith(body)}
    if not inside.intersection(state) or any(name.startswith(body) for name in state):
        return dict(state), ""
    parts = {name.partition(".")[0] for name in inside}
    added = {name: body + name for name in state if name.partition(".")[0] in parts and name not in own}
    return {added.get(name, name): value for name, value in state.items()}, body


def drop_unread(state: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Return `state` without what a transformers model does not read of its own files, and those names.

    That is what its class names so (``attn.bias``, a mask, of GPT-2), what transformers passes over in every
    file (counted positions), and a pooler that a classifier lacks. Of other models nothing is dropped.
    """
    if not getattr(model, "base_model_prefix", ""):
        return dict(state), []
    passed = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *_PASSED_OVER]
    own, unread = set(model.state_dict()), re.compile("|".join(passed))
    dropped = [name for name in state if name not in own and unread.search(name)]
    return {name: value for name, value in state.items() if name not in dropped}, dropped


def match_in_order(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor] | None:
    """Return `state` under the model's names by pairing both in order, or None where they do not pair.

    Two implementations of one network often differ in names alone. The pairs are taken as the same
    tensor only if there are equally many and each pair agrees in shape and in the last component of the
    name (``weight``, ``running_mean``), the ``num_batches_tracked`` counters left out. That is strong
    evidence, no proof: blocks of one shape registered in another order would be swapped.
    """
    own = {name: value for name, value in model.state_dict().items() if not name.endswith(_COUNTER)}
    theirs = {name: value for name, value in state.items() if not name.endswith(_COUNTER)}
    if len(own) != len(theirs):
        return None
    paired = {}
    for (name, mine), (other, value) in zip(own.items(), theirs.items(), strict=True):
        if mine.shape != value.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            return None
        paired[name] = value
    return paired


def load_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into `model`, which must match it (see `compare`); counters may be missing.

    Args:
        model: changed in place; its own values are gone.
        state: tensors by the model's names; other dtypes are converted.
    """
    model.load_state_dict(dict(state), strict=False)


def output_rows(mismatch: Mismatch) -> int | None:
    """Return the number of classes in the file, if the output layer's shape is all that differs.

    That is so where nothing is missing or unexpected and all wrong shapes differ in their first
    dimension alone, which has one value in the file.
    """
    shapes = mismatch.shapes
    if mismatch.missing or mismatch.unexpected or not shapes:
        return None
    if any(len(f) != len(m) or not f or f[1:] != m[1:] for f, m in shapes.values()):
        return None
    rows = {file[0] for file, _ in shapes.values()}
    return rows.pop() if len(rows) == 1 else None


def _shape(shape: tuple[int, ...] | torch.Size) -> str:
    return "x".join(map(str, shape)) or "scalar"

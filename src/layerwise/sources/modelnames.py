"""What the name of a model means, and whether there is such a model, before anything is opened."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

from layerwise.errors import MissingExtraError, ModelError, did_you_mean, named_kind
from layerwise.sources.userfile import check_file

SOURCES = ("timm", "torchvision", "hf")
TIMM_HUB = ("hf-hub:", "hf_hub:")
TIMM_FOLDER = "local-dir:"
TIMM_ELSEWHERE = (*TIMM_HUB, TIMM_FOLDER)


def split_spec(spec: str) -> tuple[str, str]:
    """Return the kind of source (``"timm"``, ``"torchvision"``, ``"hf"``, ``"file"``) and the rest."""
    if not isinstance(spec, str):
        raise ModelError(
            f"model is {named_kind(spec)}; expected its name, such as 'timm:resnet18'. One that is built "
            "already needs no opening."
        )
    kind, colon, name = spec.partition(":")
    if kind in SOURCES and name:
        return kind, name
    path, colon, function = spec.rpartition(":")
    if colon and path.endswith(".py") and function.isidentifier():
        return "file", spec
    if Path(spec.partition(":")[0]).suffix == ".py":
        hint = f"Name the function in it: {path or spec}:build_model"
    elif kind in SOURCES:
        hint = f"Add a name after {kind}:"
    elif Path(spec).is_dir():
        hint = f"For a transformers folder: hf:{spec}"
    else:
        hint = (did_you_mean(kind, SOURCES, count=1) if colon else _named_alone(spec)).strip()
    raise ModelError(
        f"model {spec!r} is not understood; expected timm:NAME, torchvision:NAME, hf:FOLDER_OR_ID or "
        f"FILE.py:FUNCTION. {hint}".rstrip()
    )


def _named_alone(name: str) -> str:
    """Return what a name without a source may stand for: models that there are, or how to write hf:."""
    try:
        import timm
        from torchvision import models
    except ImportError:
        return f"For a model of timm: timm:{name}"
    if "/" in name:
        return f"For a model of the Hugging Face hub: hf:{name}"
    known = {"timm": timm.list_models(), "torchvision": models.list_models(module=models)}
    if same := [source for source, names in known.items() if name.partition(".")[0] in names]:
        return f"Did you mean {' or '.join(repr(f'{source}:{name}') for source in same)}?"
    longer = [found for found in known["timm"] if found.startswith(name)]
    if close := longer[:3] or difflib.get_close_matches(name, known["timm"], n=3, cutoff=0.6):
        return f"Did you mean {' or '.join(repr(f'timm:{found}') for found in close)}?"
    return f"Neither timm nor torchvision has a model {name!r}; for one of transformers: hf:FOLDER_OR_ID"


def check_name(spec: str, *, pretrained: bool = False) -> None:
    """Check what is quick to check of the name of a model, before anything is opened.

    Args:
        spec: as `open_model` takes it.
        pretrained: the library's own weights are wanted.

    Raises:
        ModelError: the name is not understood, timm or torchvision knows no such model, timm has no weights
            for it, or there is no such file. Of ``hf:`` the configuration would have to be read.
        MissingExtraError: the library is not installed.
    """
    kind, name = split_spec(spec)
    if kind == "timm":
        check_timm(spec, name, download=pretrained)
    elif kind == "torchvision":
        check_torchvision(spec, name)
    elif kind == "file":
        check_file(spec)


def check_timm(spec: str, name: str, *, download: bool) -> None:
    """Raise `ModelError` where timm knows no model `name`, or, to `download` them, no weights for it."""
    try:
        import timm
    except ImportError as error:
        raise MissingExtraError("timm", "vision", f"The model {spec!r}") from error

    architecture, _, tag = name.partition(".")
    elsewhere = name.startswith(TIMM_ELSEWHERE)  # names a place, not an architecture
    if name.startswith(TIMM_FOLDER) and not (Path(name.partition(":")[2]) / "config.json").is_file():
        raise ModelError(
            f"{spec!r} names a folder without config.json; expected one that timm's save_for_hf wrote."
        )
    if not elsewhere and not timm.is_model(architecture):
        raise _unknown(spec, architecture, timm.list_models(), "timm")
    tags = [] if elsewhere else [n for n in timm.list_pretrained(f"{architecture}.*") if "." in n]
    if tag and not elsewhere and name not in tags:
        raise _unknown(spec, name, tags, "timm")
    if download and not tags and not elsewhere:
        raise ModelError(
            f"timm has no pretrained weights for {name!r}. Give a file (--weights FILE, weights= in "
            f"Python), or start from random weights: --no-pretrained (pretrained=False)."
        )


def check_torchvision(spec: str, name: str) -> None:
    """Raise `ModelError` where torchvision knows no image classifier `name`."""
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtraError("torchvision", "vision", f"The model {spec!r}") from error

    name = name.lower()
    known = models.list_models(module=models)
    if name not in known:
        if name in models.list_models():
            raise ModelError(
                f"torchvision's {name!r} is not an image classifier, so it cannot be opened by name. "
                f"Write a function that returns it, and give FILE.py:FUNCTION."
            )
        raise _unknown(spec, name, known, "torchvision")


def _unknown(spec: str, name: str, known: Iterable[str], library: str) -> ModelError:
    known = list(known)
    listing = {
        "timm": "python -c 'import timm; print(timm.list_models())'",
        "torchvision": "python -c 'import torchvision; print(torchvision.models.list_models())'",
    }[library]
    return ModelError(
        f"{library} has no model {spec.partition(':')[2]!r}.{did_you_mean(name, known)} "
        f"Names are listed by: {listing}"
    )

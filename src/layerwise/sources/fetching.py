"""Downloads that libraries do on their own: recognise their failures, and say what to do instead."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from layerwise.errors import ModelError, first_line

T = TypeVar("T")


def fetch(spec: str, create: Callable[[], T], *, folder: str | None = None) -> T:
    """Return what `create` makes, which may download pretrained weights.

    Args:
        spec: for the message.
        create: makes the model.
        folder: for a model that is only on a hub, how to give a folder of it instead.

    Raises:
        ModelError: the download failed; the message names `spec` and the ways to do without.
    """
    try:
        return create()
    except Exception as error:
        if not is_download_error(error):
            raise
        if folder is not None:
            raise ModelError(
                f"the model of {spec!r} could not be downloaded ({first_line(error)}). Check the id; without "
                f"a network, fetch the folder elsewhere and give {folder}."
            ) from error
        raise ModelError(
            f"the pretrained weights of {spec!r} could not be downloaded ({first_line(error)}). Fetch the "
            f"file on a machine with a network and give it: --weights FILE (weights= in Python). Random "
            f"weights: --no-pretrained (pretrained=False)."
        ) from error


def read_folder(spec: str, create: Callable[[], T]) -> T:
    """Return what `create` makes of a folder that timm's ``save_for_hf`` wrote.

    Raises:
        ModelError: it fails, whatever the reason: the folder is not as it was written.
    """
    try:
        return create()
    except Exception as error:  # timm, safetensors and json raise all kinds
        raise ModelError(
            f"the model of {spec!r} cannot be opened: {type(error).__name__}: {first_line(error)}. Expected "
            f"a folder with config.json and weights, as timm's save_for_hf writes it."
        ) from error


@contextmanager
def hub_if_found() -> Iterator[None]:
    """Keep huggingface_hub to its local store while the name of its host cannot be resolved.

    It would ask six times for each file, for half a minute and with two warnings a time. A proxy resolves
    names itself, so behind one nothing is changed. The library's setting is put back at the end.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    behind_proxy = bool({"http", "https", "all"} & getproxies().keys())
    constants.HF_HUB_OFFLINE = before or not (behind_proxy or _is_found(constants.ENDPOINT))
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _is_found(address: str) -> bool:
    try:
        return bool(socket.getaddrinfo(urlsplit(address).hostname, None))
    except OSError:
        return False


def is_download_error(error: BaseException) -> bool:
    """Return whether `error` is one that the libraries' downloads fail with."""
    # huggingface_hub lets errors of its HTTP library through, which are no OSErrors, beside its own.
    names = {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, OSError) or bool(names & {"HTTPError", "HfHubHTTPError", "TransportError"})

"""Downloads: what cannot succeed fails at once and quietly, and nothing is lost where it can."""

import logging
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from layerwise.errors import DataError, ModelError
from layerwise.sources.fetching import hub_if_found
from layerwise.sources.models import open_model
from layerwise.sources.texttable import read_texts

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # No name is resolved, nothing is stored, and whoever waits for better times fails.
    def fail(*args: Any, **options: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    def wait(seconds: float) -> None:
        raise AssertionError(f"waits for {seconds} s")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    monkeypatch.setattr(time, "sleep", wait)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("spec", ["hf:nobody/nothing", "timm:resnet10t", "timm:hf-hub:nobody/nothing"])
def test_a_hub_that_is_not_found_is_asked_once(
    spec: str, no_network: None, caplog: pytest.LogCaptureFixture
) -> None:
    # One message, no retries, no warnings of the hub's library; its setting is as before.
    before = constants.HF_HUB_OFFLINE
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="could not be downloaded"):
        open_model(spec)
    assert caplog.messages == []
    assert before == constants.HF_HUB_OFFLINE


def test_a_model_that_is_only_on_a_hub_is_replaced_by_a_folder(no_network: None) -> None:
    # Neither a file of weights nor random ones would do: the configuration is missing too.
    told = r"the model of 'timm:hf-hub:nobody/nothing' could not .*give timm:local-dir:FOLDER\.$"
    with pytest.raises(ModelError, match=told):
        open_model("timm:hf-hub:nobody/nothing", pretrained=False)


def test_data_of_a_hub_that_is_not_found_are_asked_for_once(
    no_network: None, caplog: pytest.LogCaptureFixture
) -> None:
    # As of models: one message.
    pytest.importorskip("datasets")
    with caplog.at_level(logging.WARNING), pytest.raises(DataError, match="'hf:nobody/nothing' cannot be op"):
        read_texts("hf:nobody/nothing")
    assert caplog.messages == []


def test_a_hub_behind_a_proxy_is_asked_as_ever(no_network: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # The proxy resolves the name; without it the library keeps to its store.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub_if_found():
        assert constants.HF_HUB_OFFLINE
    monkeypatch.setenv("HTTPS_PROXY", "http://localhost:9")
    with hub_if_found():
        assert not constants.HF_HUB_OFFLINE


def test_a_hub_that_is_found_is_asked_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    # A mirror too, which has a name or an address of its own.
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9000/hub")
    with hub_if_found():
        assert not constants.HF_HUB_OFFLINE

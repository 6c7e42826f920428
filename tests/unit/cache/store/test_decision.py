"""The choice of storage weighs time against bytes, and gives its reason."""

from __future__ import annotations

import pytest

from layerwise.cache.store.decision import decide
from layerwise.cache.store.room import free_disk_bytes, free_memory_bytes

USUAL = {
    "bytes_per_sample": 1_000,
    "samples": 1_000,
    "batch": 10,
    "prefix_s": 1.0,
    "suffix_s": 0.1,
    "epochs": 5,
    "memory_bytes": 10**9,
    "disk_bytes": 10**9,
}


@pytest.mark.parametrize(
    ("storage", "changes", "expected", "why"),
    [
        ("auto", {}, "memory", "77% of a step; about 4.3x faster"),
        ("auto", {"memory_bytes": 10}, "disk", "faster"),
        ("auto", {"memory_bytes": 10, "disk_bytes": 10}, "off", "fit neither in the memory budget (10 B)"),
        ("auto", {"prefix_s": 0.001}, "off", "too little to gain"),
        ("auto", {"epochs": 1}, "off", "seen only once"),
        ("auto", {"epochs": 1, "shared": True}, "disk", "faster"),
        ("auto", {"epochs": None}, "memory", "faster"),
        ("auto", {"epochs": 4, "processes": 4}, "off", "seen only once by each of 4 processes"),
        ("auto", {"epochs": 5, "processes": 4}, "memory", "faster"),
        ("auto", {"bytes_per_sample": 10**9, "memory_bytes": 10**13}, "off", "too little to gain"),
        ("memory", {"prefix_s": 0.001, "epochs": 1}, "memory", "asked for"),
        ("memory", {"memory_bytes": 10}, "off", "do not fit into the budget of 10 B"),
        ("disk", {}, "disk", "asked for"),
        ("disk", {"disk_bytes": 10}, "off", "do not fit on the disk"),
        ("off", {}, "off", "switched off"),
    ],
)
def test_choice(storage, changes, expected, why) -> None:
    choice = decide(storage, **{**USUAL, **changes})
    assert choice.storage == expected
    assert why in choice.reason


def test_expected_gain() -> None:
    # p = 1 s, forward and backward of the rest 0.3 s, 10 KB to read in 5 microseconds
    choice = decide("auto", **USUAL)
    assert choice.speedup == pytest.approx(1.3 / 0.300005)
    assert choice.prefix_frac == pytest.approx(1 / 1.3)
    assert choice.total_bytes == 1_000_000


def test_what_is_free(tmp_path) -> None:
    assert free_memory_bytes() > 0
    assert free_disk_bytes(tmp_path / "not" / "there") > 0


def test_processes_on_one_machine_share_its_memory(monkeypatch) -> None:
    alone = free_memory_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_memory_bytes() < alone / 4

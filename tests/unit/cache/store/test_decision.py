"""The choice of storage weighs time against bytes, and gives its reason."""

from __future__ import annotations

import pytest

from layerwise.cache.cutting.cut import Cut
from layerwise.cache.store import room
from layerwise.cache.store.decision import decide, kept
from layerwise.cache.store.room import free_memory_bytes
from layerwise.files import free_disk_bytes

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
        ("auto", {"suffix_s": 0.001}, "memory", ">99% of a step; over 30x faster"),
        ("auto", {"memory_bytes": 10}, "disk", "faster"),
        ("auto", {"memory_bytes": 10, "disk_bytes": 10}, "off", "fit neither in the budget of memory (10 B)"),
        ("auto", {"prefix_s": 0.001}, "off", "too little to gain"),
        ("auto", {"epochs": 1}, "off", "seen only once"),
        ("auto", {"epochs": 1, "shared": True}, "disk", "faster"),
        ("auto", {"epochs": None}, "memory", "faster"),
        ("auto", {"epochs": 4, "processes": 4}, "off", "seen only once by each of 4 processes"),
        ("auto", {"epochs": 5, "processes": 4}, "memory", "faster"),
        ("auto", {"bytes_per_sample": 10**9, "memory_bytes": 10**13}, "off", "too little to gain"),
        ("memory", {"prefix_s": 0.001, "epochs": 1}, "memory", "asked for"),
        ("memory", {"prefix_s": 0.001}, "memory", "<1% of a step; hardly faster once cached"),
        ("memory", {"bytes_per_sample": 4 * 10**8, "memory_bytes": 10**13}, "memory", "about 1.8x slower"),
        ("auto", {"bytes_per_sample": 0}, "memory", "once cached (stored in an earlier pass, but for a few"),
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


@pytest.mark.parametrize(
    ("skipped", "why"),
    [
        (1, "hardly faster by its operations"),
        (50, "about 1.3x faster by its operations"),
        (100, "hardly any"),
    ],
)
def test_the_gain_of_what_was_stored_before(skipped, why) -> None:
    # told from operations alone; forward and backward of what is left count three times
    cut = Cut({}, {}, {}, {}, (), (), frozenset(), {}, {}, flops=100, skipped_flops=skipped)
    assert why in kept(cut, "memory", samples=9).reason


def test_what_is_free(tmp_path) -> None:
    assert free_memory_bytes() > 0
    assert free_disk_bytes(tmp_path / "not" / "there") > 0


def test_processes_on_one_machine_share_its_memory(monkeypatch) -> None:
    alone = free_memory_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert free_memory_bytes() < alone / 4


@pytest.mark.parametrize(("limit", "left"), [("max", None), ("5000", 3500), ("1000", 0)])
def test_a_control_group_leaves_less(monkeypatch, tmp_path, limit, left) -> None:
    # of 2000 bytes in use, 500 hold files that were read: these are given up when room is needed
    monkeypatch.setattr(room, "_CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = free_memory_bytes()
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1400\nfile 600\ninactive_file 500\n")
    assert free_memory_bytes() > alone / 2 if left is None else free_memory_bytes() == left


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KB"), (3 * 2**20, "3.0 MB"), (2.5 * 2**40, "2560.0 GB")],
)
def test_sizes_for_people(count, text) -> None:
    assert room.format_bytes(count) == text

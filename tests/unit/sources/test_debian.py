"""Package descriptions become a topic table that keeps packages of one source on one side."""

import shutil

import pytest

from layerwise.errors import DataError
from layerwise.sources import debian

LISTING = """\
Package: chess-a
Source: chess (1.2)
Section: games
Description: play chess
Description-md5: aa

Package: chess-b
Source: chess
Section: non-free/games
Description: play chess on a board
 with long text
 .
 and more

Package: chess-a
Section: games
Description: an older version

Package: nothing

Package: mailer
Section: mail
Description-en: read mail
"""


def test_stanzas_become_packages():
    found = debian.packages_of(
        debian.parse_stanzas(LISTING.splitlines()), {"aa": "play chess\n against the machine"}
    )
    assert [package.name for package in found] == ["chess-a", "chess-b", "mailer"]
    assert found[0] == debian.Package(
        "chess-a", "chess", "games", "play chess", "play chess. against the machine"
    )
    assert found[1].section == "games"
    assert found[1].description == "play chess on a board. with long text and more"
    assert (found[2].source, found[2].description) == ("mailer", "read mail")


def made(sections=("games", "mail"), count=60):
    return [
        debian.Package(
            f"{s}{n}", f"{s}-src{n // 3}", s, f"{s} tool number {n}", f"{s} tool number {n}. Long."
        )
        for s in sections
        for n in range(count)
    ]


def test_a_table_keeps_sources_on_one_side_and_draws_by_seed(monkeypatch):
    monkeypatch.setattr(debian, "read_packages", lambda lists: made())
    table = debian.debian_texts(sections=("mail", "games"), per_section=40, seed=3)
    assert table.classes == ("games", "mail")
    assert sum(len(part) for part in table.parts.values()) == 80
    sides = [set(part.groups) for part in table.parts.values()]
    assert len(set.union(*sides)) == sum(map(len, sides))
    assert all(
        text.startswith(label) for p in table.parts.values() for text, label in zip(p.texts, p.targets)
    )
    assert debian.debian_texts(sections=("games", "mail"), per_section=40, seed=3) == table
    other = debian.debian_texts(sections=("games", "mail"), per_section=40, seed=4)
    assert other.parts["test"].texts != table.parts["test"].texts
    long = debian.debian_texts(sections=("games", "mail"), text="description")
    assert long.parts["train"].texts[0].endswith("Long.")


def test_equal_texts_are_taken_once(monkeypatch):
    copies = [debian.Package(f"p{n}", f"p{n}", "mail", "same words", "same words") for n in range(30)]
    monkeypatch.setattr(debian, "read_packages", lambda lists: [*made(), *copies])
    table = debian.debian_texts(sections=("games", "mail"), per_section=100)
    texts = [text for part in table.parts.values() for text in part.texts]
    assert texts.count("same words") == 1


def test_what_is_missing_is_said(monkeypatch):
    monkeypatch.setattr(debian, "read_packages", lambda lists: made())
    with pytest.raises(DataError, match=r"section 'game' has 0 packages\. Did you mean 'games'"):
        debian.debian_texts(sections=("game", "mail"))
    with pytest.raises(DataError, match="0 packages of each section are asked for; expected at least 3"):
        debian.debian_texts(sections=("games", "mail"), per_section=0)
    short = [debian.Package(p.name, p.source, p.section, p.synopsis, p.synopsis) for p in made()]
    monkeypatch.setattr(debian, "read_packages", lambda lists: short)
    with pytest.raises(DataError, match="one-line descriptions only"):
        debian.debian_texts(sections=("games", "mail"), text="description")
    with pytest.raises(DataError, match="lists are empty"):
        debian.packages_of([], {})


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Write a shell script that stands for a program of apt."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")

    def write(name, text):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
        return str(path)

    return write


def test_lists_are_fetched_into_the_folder_alone(program, tmp_path):
    # apt-get is told the folder, which is made; an archive that cannot be reached is told
    program("apt-get", f'printf "%s\\n" "$@" > {tmp_path}/given')
    lists = debian.fetch_lists(tmp_path / "apt")
    given = (tmp_path / "given").read_text().split()
    assert lists == tmp_path / "apt" / "lists"
    assert f"Dir::State::lists={lists}" in given
    assert given[-1] == "update"
    assert (lists / "partial").is_dir()
    program("apt-get", 'echo "E: no route to host" >&2; exit 100')
    with pytest.raises(DataError, match=r"apt-get failed \(E: no route to host\)"):
        debian.fetch_lists(tmp_path / "apt")
    program("apt-get", "exit 7")
    with pytest.raises(DataError, match=r"apt-get failed \(exit code 7\)"):
        debian.fetch_lists(tmp_path / "apt")


def test_whole_descriptions_are_read_from_the_translations(program, tmp_path, monkeypatch):
    # by the hash of the description; several blank lines are one border, a line of nothing belongs to nothing
    monkeypatch.setattr(debian, "APT_HELPER", program("helper", 'cat "$2"'))
    text = " lost\n\n\nDescription-md5: aa\nDescription-en: play\n chess\n\nPackage: without\n"
    (tmp_path / "deb_i18n_Translation-en").write_text(text)
    assert debian._long_descriptions(tmp_path) == {"aa": "play\nchess"}
    assert list(debian.parse_stanzas(text.splitlines()))[1] == {"Package": "without"}
    monkeypatch.setattr(debian, "APT_HELPER", str(tmp_path / "gone"))
    with pytest.raises(DataError, match="gone could not be run"):
        debian._long_descriptions(tmp_path)


def test_a_machine_without_apt(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="apt-cache, which this machine does not have"):
        debian.read_packages()
    with pytest.raises(DataError, match="apt-get, which this machine does not have"):
        debian.fetch_lists(tmp_path)


@pytest.mark.skipif(shutil.which("apt-cache") is None, reason="needs apt-cache")
def test_lists_that_are_empty_are_said_to_be(tmp_path):
    (tmp_path / "partial").mkdir()
    with pytest.raises(DataError, match=r"lists are empty|failed"):
        debian.read_packages(tmp_path)

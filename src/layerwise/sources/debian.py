"""A real topic task that every Debian machine holds: package descriptions, and the archive section of each.

The archive's own list of packages is read with apt's tools. A section (``games``, ``mail``, ``science``) is
the label, the one-line synopsis or the whole description the text. Packages built from one source are
described in nearly the same words, so a split keeps them on one side, and equal texts are taken once.
The list changes with the archive: figures belong to a release and a day, which the notes name.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import random
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from layerwise.errors import DataError, did_you_mean
from layerwise.sources.splits import grouped_split
from layerwise.sources.texttable import TextPart, TextTable

# Sections that name a topic and have at least 190 packages in Debian 12. Sections that name a kind of
# file (libs, doc) or a programming language (perl, rust) are left out: the first are no topics, the
# second are told by one word.
TOPICS = (
    "admin",
    "database",
    "devel",
    "editors",
    "electronics",
    "fonts",
    "games",
    "gnome",
    "graphics",
    "kde",
    "mail",
    "math",
    "net",
    "science",
    "sound",
    "text",
    "utils",
    "video",
    "web",
    "x11",
)
APT_HELPER = "/usr/lib/apt/apt-helper"
FETCH_TIMEOUT_S = 300
_FEWEST = 3  # packages of a section: some to train, validate and test on


@dataclass(frozen=True)
class Package:
    """What is read of one package.

    Attributes:
        name: of the package.
        source: name of the source package that it is built from.
        section: of the archive, without the area (``non-free/games`` is ``games``).
        synopsis: one line.
        description: synopsis and all that follows; the synopsis alone where apt has no more.
    """

    name: str
    source: str
    section: str
    synopsis: str
    description: str


def debian_texts(
    *,
    text: Literal["synopsis", "description"] = "synopsis",
    sections: Sequence[str] = TOPICS,
    per_section: int = 200,
    val_frac: float = 0.15,
    test_frac: float = 0.25,
    seed: int = 0,
    lists: str | Path | None = None,
) -> TextTable:
    """Return package texts with their section as label, split so that sources stay on one side.

    Args:
        text: ``"synopsis"`` is there on every Debian machine; ``"description"`` needs the translation
            lists, which `fetch_lists` gets.
        sections: which are the classes.
        per_section: packages drawn of each section at most; 3 or more.
        val_frac: share for validation.
        test_frac: share for testing.
        seed: of the drawing and of the split.
        lists: folder of apt's lists (`fetch_lists`); None for the machine's own.

    Raises:
        DataError: `per_section` is below 3; this is no Debian machine, apt's lists are empty, a section is
            unknown or has too few packages, or descriptions are asked for and not there.
    """
    if per_section < _FEWEST:
        raise DataError(
            f"{per_section} packages of each section are asked for; expected at least {_FEWEST}, as some "
            f"of them validate and test."
        )
    packages = read_packages(lists)
    by_section: dict[str, list[Package]] = defaultdict(list)
    seen: set[str] = set()
    for package in packages:
        value = package.synopsis if text == "synopsis" else package.description
        if value not in seen:
            seen.add(value)
            by_section[package.section].append(package)
    if text == "description" and all(package.description == package.synopsis for package in packages):
        raise DataError(
            "apt's lists hold one-line descriptions only. Fetch the whole ones: "
            "layerwise.sources.debian.fetch_lists(FOLDER), then lists=FOLDER; or take text='synopsis'."
        )
    sizes = {name: len(found) for name, found in by_section.items()}
    problems = [
        f"section {name!r} has {sizes.get(name, 0)} packages.{did_you_mean(name, sizes, count=1)}"
        for name in sections
        if sizes.get(name, 0) < _FEWEST
    ]
    if problems:
        raise DataError(f"expected at least {_FEWEST} packages of each section: {' '.join(problems)}")
    generator = random.Random(seed)
    chosen: list[Package] = []
    for name in sorted(sections):
        pool = sorted(by_section[name], key=lambda package: package.name)
        chosen += generator.sample(pool, min(per_section, len(pool)))
    split = grouped_split([package.source for package in chosen], [val_frac, test_frac], seed=seed)
    whole = TextPart(
        texts=[package.synopsis if text == "synopsis" else package.description for package in chosen],
        targets=[package.section for package in chosen],
        groups=[package.source for package in chosen],
    )
    names = ("train", "val", "test")
    parts = {name: whole.take(indices) for name, indices in zip(names, split, strict=True) if indices}
    counts = ", ".join(f"{len(part)} {name}" for name, part in parts.items())
    digest = hashlib.sha256("\n".join(whole.texts).encode()).hexdigest()[:8]
    note = (
        f"Debian package {text}: {counts} of {len(packages)} packages, {len(sections)} sections, "
        f"seed {seed}, texts {digest}"
    )
    return TextTable("text_classification", parts, tuple(sorted(sections)), notes=(note,))


def read_packages(lists: str | Path | None = None) -> list[Package]:
    """Return all packages of apt's lists, each name once.

    Args:
        lists: folder of the lists; None for the machine's own.

    Raises:
        DataError: apt is not there, fails, or knows no packages.
    """
    if shutil.which("apt-cache") is None:
        raise DataError(
            "package descriptions are read with apt-cache, which this machine does not have; expected Debian "
            "or a system made of it. Use a table of your own: layerwise fit --data FILE.csv"
        )
    options = [] if lists is None else ["-o", f"Dir::State::lists={Path(lists).resolve()}"]
    stanzas = list(parse_stanzas(_run(["apt-cache", *options, "dumpavail"]).splitlines()))
    folder = Path("/var/lib/apt/lists") if lists is None else Path(lists)
    return packages_of(stanzas, _long_descriptions(folder))


def packages_of(stanzas: Iterable[dict[str, str]], descriptions: dict[str, str]) -> list[Package]:
    """Return the packages of `stanzas`, with the long description whose hash a stanza names.

    Args:
        stanzas: of apt's list of packages; those without section or description are left out.
        descriptions: ``Description-md5`` -> text.

    Raises:
        DataError: there are no packages.
    """
    found: dict[str, Package] = {}
    for stanza in stanzas:
        text = stanza.get("Description-en") or stanza.get("Description", "")
        name, section = stanza.get("Package"), stanza.get("Section")
        if not name or not section or not text or name in found:
            continue
        text = descriptions.get(stanza.get("Description-md5", ""), text)
        synopsis, _, rest = text.partition("\n")
        # A source is named only where it differs, with its version in brackets where that differs.
        source = stanza.get("Source", name).partition(" ")[0]
        body = " ".join(line.strip() for line in rest.splitlines() if line.strip() not in ("", "."))
        whole = f"{synopsis.rstrip('.')}. {body}" if body else synopsis
        found[name] = Package(name, source, section.rpartition("/")[2], synopsis, whole)
    if not found:
        raise DataError("apt's lists are empty. Fetch them: apt-get update (or debian.fetch_lists(FOLDER)).")
    return list(found.values())


def parse_stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    r"""Return the stanzas of a Debian control file: field -> value, further lines joined by newlines.

    >>> list(parse_stanzas(["Package: a", "Description: one", " two", "", "Package: b"]))
    [{'Package': 'a', 'Description': 'one\ntwo'}, {'Package': 'b'}]
    """
    stanza: dict[str, str] = {}
    field = ""
    for line in lines:
        if not line.strip():
            if stanza:
                yield stanza
            stanza, field = {}, ""
        elif line[0] in " \t":
            if field:
                stanza[field] += "\n" + line[1:]
        else:
            field, _, value = line.partition(":")
            stanza[field] = value.strip()
    if stanza:
        yield stanza


def fetch_lists(folder: str | Path) -> Path:
    """Fetch apt's lists with whole descriptions into `folder`; the machine's own lists stay as they are.

    About 16 MB from the archive that the machine is set up for. Needs no rights but those to write the
    folder. Existing lists in it are brought up to date.

    Args:
        folder: made where it is missing.

    Returns:
        The folder of the lists, for `debian_texts`.

    Raises:
        DataError: apt is not there, or the archive cannot be reached.
    """
    if shutil.which("apt-get") is None:
        raise DataError("package lists are fetched with apt-get, which this machine does not have.")
    base = Path(folder).resolve()
    lists, cache = base / "lists", base / "cache"
    for needed in (lists / "partial", cache / "archives" / "partial"):
        needed.mkdir(parents=True, exist_ok=True)
    _run(
        [
            "apt-get",
            *("-o", f"Dir::State::lists={lists}"),
            *("-o", f"Dir::Cache={cache}"),
            *("-o", "Acquire::Languages=en"),
            *("-o", f"APT::Sandbox::User={getpass.getuser()}"),  # apt's own user cannot write here
            *("-o", "APT::Update::Error-Mode=any"),  # an unreachable archive is a failure, no warning
            "update",
        ]
    )
    return lists


def _long_descriptions(folder: Path) -> dict[str, str]:
    """Return ``Description-md5`` -> whole description, from the translation lists in `folder`."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*_i18n_Translation-en*")):
        # The helper unpacks whatever way apt keeps its lists.
        text = _run([APT_HELPER, "cat-file", str(path)])
        for stanza in parse_stanzas(text.splitlines()):
            if "Description-md5" in stanza and "Description-en" in stanza:
                found[stanza["Description-md5"]] = stanza["Description-en"]
    return found


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(
            command,
            check=True,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip() or f"exit code {error.returncode}").splitlines()[-1]
        raise DataError(f"{command[0]} failed ({reason}). Is the archive reachable?") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DataError(f"{command[0]} could not be run ({error}).") from error
    return done.stdout

"""Run one benchmark by name: ``python -m benchmarks layer_maps``; without a name, those of `USUAL`.

``--resume`` (and every option that all of `USUAL` know) may stand without a name: what a broken run measured
is then not measured again.
"""

from __future__ import annotations

import importlib
import sys

BENCHMARKS = {
    "advice": "benchmarks.advice",
    "cache": "benchmarks.cache",
    "calibrate": "benchmarks.calibrate",
    "cuts": "benchmarks.cuts",
    "gradual": "benchmarks.gradual",
    "layer_maps": "benchmarks.layer_maps",
    "recording": "benchmarks.recording",
    "text": "benchmarks.text",
}
"""Name -> module; each has a ``main(arguments)`` that prints its figures and may return an exit code."""

USUAL = ("cache", "gradual", "recording")
"""What the prefix cache is held to. The others take hours, or print what an earlier ``--run`` left."""


def main() -> None:
    given = sys.argv[1:]
    names, options = (given[:1], given[1:]) if given and not given[0].startswith("-") else ([], given)
    others = [] if names else [name for name in BENCHMARKS if name not in USUAL]
    names = names or list(USUAL)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    code = 0
    for name in names:
        print(f"== {name}", flush=True)
        code = importlib.import_module(BENCHMARKS[name]).main(options) or code
    if others:
        print(f"== others, by name: {', '.join(others)}")
    sys.exit(code)


if __name__ == "__main__":
    main()

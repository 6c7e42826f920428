"""Run one benchmark by name, or list them: ``python -m benchmarks layer_maps``."""

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
    "text": "benchmarks.text",
}
"""Name -> module; each has a ``main(arguments)`` that prints its figures."""


def main() -> None:
    names = sys.argv[1:2] or list(BENCHMARKS)
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"unknown benchmark {unknown[0]!r}; there are: {', '.join(BENCHMARKS)}")
    for name in names:
        print(f"== {name}", flush=True)
        importlib.import_module(BENCHMARKS[name]).main(sys.argv[2:])


if __name__ == "__main__":
    main()

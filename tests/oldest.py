"""Print the oldest versions that pyproject.toml allows, as a constraints file for pip: `make test-oldest`."""

import itertools
import re
import tomllib
from pathlib import Path


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    extras = itertools.chain.from_iterable(project["optional-dependencies"].values())
    for needed in (*project["dependencies"], *extras):
        if found := re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\d.]+)", needed):
            print(f"{found[1]}=={found[2]}")
    print("pyarrow<19")  # later ones need numpy 2, which the oldest datasets does not tell pip


if __name__ == "__main__":
    main()

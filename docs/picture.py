r"""Run a command and save what it printed as an SVG picture, for the README and the guide.

    python docs/picture.py docs/img/inspect.svg -- \
        layerwise inspect timm:tf_efficientnet_lite0 --granularity stages

The picture shows the command and its real output, colours included. Nothing is edited.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

WIDTH_COLUMNS = 110


def main() -> int:
    """Run the command after ``--`` and write its picture to the path before it."""
    target, dashes, *command = sys.argv[1:]
    if dashes != "--" or not command:
        raise SystemExit(__doc__)
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH_COLUMNS), "TERM": "xterm-256color"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.stderr.write(run.stderr)
        return run.returncode
    shown = Text.from_ansi(run.stdout)
    width = max(WIDTH_COLUMNS, *(line.cell_len for line in shown.split()))  # a command is never broken
    with open(os.devnull, "w") as nowhere:
        console = Console(record=True, width=width, file=nowhere, force_terminal=True)
        console.print(Text("$ " + " ".join(command), style="bold"))
        console.print(shown)
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    console.save_svg(target, title=" ".join(command[:2]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

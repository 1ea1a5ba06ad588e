"""docs/images/inspect.svg: what `omnidata inspect` shows on a terminal, for two photographs of the demo.

python docs/picture.py DATASET --limit 1      # a dataset of docs/first_hour.md
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from rich.console import Console  # noqa: E402

from omnidata import cli  # noqa: E402
from omnidata.inspect import terminal  # noqa: E402

WIDTH = 96  # columns


def main(arguments: list[str]) -> int:
    """Run the command with a console that records."""
    console = Console(
        record=True,
        width=WIDTH,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
        markup=False,
        emoji=False,
    )
    terminal.make_console = lambda: console
    code = cli.run(["inspect", *arguments])
    text = console.export_svg(title=f"omnidata inspect {arguments[0]}", unique_id="inspect")
    text = re.sub(r"@font-face \{.*?\}\s*", "", text, flags=re.DOTALL)  # nothing is fetched to show it
    (ROOT / "docs" / "images" / "inspect.svg").write_text(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

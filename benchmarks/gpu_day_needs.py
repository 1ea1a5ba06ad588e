"""Are the packages of pyproject.toml here, and what they need? If not, which wheels to carry.

    python benchmarks/gpu_day_needs.py      the first part of gpu_day.sh

Installed or unpacked on PYTHONPATH. Needs none of them itself. What a missing package needs shows when that
one is there: where all are, ``python benchmarks/gpu_day_needs.py --all`` lists them.
"""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

FETCH = """not here: {names}
Where there is a network:
  pip download --no-deps --only-binary=:all: --python-version {python} --platform manylinux_2_28_x86_64 \\
      --platform manylinux2014_x86_64 -d wheels {names}
and carry the folder wheels/ with the repository: gpu_day.sh unpacks and uses it."""


def needed() -> dict[str, bool]:
    """Distribution -> is it on the path? But for torch's own needs, which come with it."""
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    lines, found = list(project["dependencies"]), {}
    while lines:
        line = lines.pop()
        name = re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")
        if name in found or re.search(
            r"extra ==|win32|Windows|emscripten|darwin|python_version <|implementation", line
        ):
            continue
        try:
            found[name] = bool(metadata.version(name))
        except metadata.PackageNotFoundError:
            found[name] = False
        else:
            lines += [] if name in ("torch", "torchvision") else metadata.requires(name) or []
    return found


def main() -> None:
    """See the module's docstring."""
    found = needed()
    if "--all" in sys.argv:
        print(" ".join(sorted(found.keys() - {"torch"})))
    missing = sorted(name for name, is_there in found.items() if not is_there)
    if missing:
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        sys.exit(FETCH.format(names=" ".join(missing), python=python))


if __name__ == "__main__":
    main()

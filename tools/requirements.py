"""Print the project's dependencies and those of the named extras, from pyproject.toml, for pip -r."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(extras: list[str]) -> None:
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        from pip._vendor import tomli as tomllib
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        r for e in extras for r in project["optional-dependencies"][e]
    ]
    # torch is the user's own choice (TORCH=...), and installed before anything else
    print("\n".join(r for r in wanted if re.split(r"[\s<>=!~\[;]", r)[0] != "torch"))


if __name__ == "__main__":
    main(sys.argv[1:])

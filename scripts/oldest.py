"""Print the lower bounds of pyproject.toml's dependencies as pins, torch left out (constraints.txt pins it)."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
requirements = project["dependencies"] + [r for name in ("corpus", "evaluate", "hub", "serve") for r in extras[name]]
print("# Made by scripts/oldest.py from pyproject.toml")
for requirement in sorted(requirements):
    name, bound = re.fullmatch(r"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={bound}")

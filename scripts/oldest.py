"""Print the lower bounds of pyproject.toml's dependencies as pins, torch left out (constraints.txt pins it)."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
tested = ("constrain", "corpus", "evaluate", "hub", "plan", "serve")
requirements = project["dependencies"] + [requirement for name in tested for requirement in extras[name]]
print("# Made by scripts/oldest.py from pyproject.toml")
for requirement in sorted(set(requirements)):
    name, bound = re.fullmatch(r"([\w-]+)(?:\[[^]]*\])?>=([\w.]+)(?:[,;].*)?", requirement).groups()
    if name != "torch":
        print(f"{name}=={bound}")

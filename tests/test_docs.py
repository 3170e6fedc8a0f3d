"""The commands and programs of README.md and docs/ run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# these pages' programs need a running server, or have a test of their own
ELSEWHERE = {"serving.md", "corpus.md", "evaluation.md"}


def blocks(page: Path, language: str) -> list[str]:
    """Fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def run(command: list[str], directory: Path) -> None:
    """Run in an empty directory with our commands on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=directory, env={**os.environ, "PATH": path}, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.asset
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "bash") and page.name != "serving.md"], ids=lambda page: page.name
)
def test_shell_blocks_run(page: Path, tmp_path: Path) -> None:
    run(["bash", "-euo", "pipefail", "-c", "\n".join(blocks(page, "bash"))], tmp_path)


@pytest.mark.asset
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page.name not in ELSEWHERE],
    ids=lambda page: page.name,
)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    run([sys.executable, "-c", "\n".join(blocks(page, "python"))], tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_the_readme_names_every_command() -> None:
    from gristmill.cli import VERBS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"gristmill {verb}" in readme for verb in VERBS)

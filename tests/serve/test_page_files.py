"""The page's files as they are shipped: complete, served with their types, and without a door for markup."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from serve.conftest import Served

PAGE = Path(str(files("gristmill.serve") / "page"))
OWN = sorted(path for path in PAGE.iterdir() if path.suffix in (".js", ".css", ".html"))
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}


def addresses(path: Path) -> set[Path]:
    """The files that this one loads."""
    text = path.read_text()
    absolute = re.findall(r'"/static/([^"]+)"', text)
    relative = re.findall(r'(?:from|import\() ?"\./([^"]+)"', text) if path.suffix == ".js" else []
    fonts = re.findall(r"url\(([^)]+)\)", text) if path.suffix == ".css" else []
    return {PAGE / name for name in absolute} | {path.parent / name for name in (*relative, *fonts)}


def test_every_file_that_is_named_is_served(served: Served) -> None:
    waiting, seen = [PAGE / "index.html"], set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        response = served.http.get(f"/static/{path.relative_to(PAGE)}")
        assert response.status_code == 200, path
        assert response.headers["content-type"].startswith(TYPES.get(path.suffix, "font/woff2"))
        if path.suffix in (".html", ".js", ".css"):
            waiting.extend(addresses(path))
    assert {path for path in seen if path.parent == PAGE} == {*OWN, PAGE / "icon.svg"}
    assert sum(path.suffix == ".woff2" for path in seen) == 20


@pytest.mark.parametrize(
    "name",
    [
        "",
        "../app.py",
        "%2e%2e/app.py",
        "..%2fapp.py",
        "vendor",
        "vendor/README.md",
        "none.js",
        "%00.js",
        "a" * 300 + ".js",
    ],
)
def test_nothing_else_is_served(served: Served, name: str) -> None:
    assert served.http.get(f"/static/{name}").status_code == 404


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_no_file_opens_a_door_for_markup_or_asks_elsewhere(path: Path) -> None:
    text = path.read_text()
    doors = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\b|new Function|srcdoc|\son\w+="
    assert not re.search(doors, text)
    assert not re.findall(r"https?://(?!www\.w3\.org/2000/svg)", text)
    assert len(text.splitlines()) < 400


def test_others_files_come_with_their_licences() -> None:
    for folder in (PAGE / "vendor").iterdir():
        assert folder.name == "README.md" or "MIT" in (folder / "LICENSE").read_text()

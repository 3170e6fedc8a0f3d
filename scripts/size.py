"""Lines of Python by folder, tests beside them."""

from pathlib import Path

root = Path(__file__).parents[1]


def lines(folder: Path) -> int:
    """Lines of all Python files below a folder."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in folder.rglob("*.py"))


source, tests = root / "src" / "gristmill", root / "tests"
for folder in sorted(path for path in source.iterdir() if path.is_dir() and path.name != "__pycache__"):
    print(f"{folder.name:12} {lines(folder):6}")
print(f"{'all source':12} {lines(source):6}\n{'tests':12} {lines(tests):6}")

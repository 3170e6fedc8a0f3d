"""docs/methods.csv: every object can be imported and every test exists."""

import ast
import csv
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
with (ROOT / "docs" / "methods.csv").open(encoding="utf-8", newline="") as handle:
    ROWS = list(csv.DictReader(handle))


def test_the_columns_are_as_documented() -> None:
    assert ROWS
    assert list(ROWS[0]) == ["id", "name", "object", "test", "source"]
    assert all(row["id"] and row["name"] for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=[f"{row['id']} {row['object']}" for row in ROWS])
def test_a_method_has_its_object_and_its_test(row: dict[str, str]) -> None:
    module, _, name = row["object"].rpartition(".")
    assert hasattr(import_module(module), name)
    file, *names = row["test"].split("::")
    found = {
        node.name for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if hasattr(node, "name")
    }
    assert set(names) <= found

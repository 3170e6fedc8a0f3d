import re
from pathlib import Path

import pytest

pytest.importorskip("rensa")

PAGE = Path(__file__).parents[2] / "docs" / "corpus.md"


def test_the_how_to_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), flags=re.DOTALL)
    names = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert names["funnel"].kept == 1
    assert names["batch"].target_count == names["dataset"].tokens - len(names["dataset"])

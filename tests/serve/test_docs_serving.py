"""The commands and programs of docs/serving.md, against a server of their own."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from test_docs import ROOT, blocks, run

pytestmark = [pytest.mark.asset, pytest.mark.peer]
PAGE = ROOT / "docs" / "serving.md"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    command = [sys.executable, "-m", "gristmill", "serve", "smollm2-135m", "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        told = next(found for line in process.stdout if (found := re.search(r"at http://(127\.0\.0\.1:\d+) ", line)))
        yield told[1]
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


def test_the_shell_commands_run(address: str, tmp_path: Path) -> None:
    script = "\n".join(blocks(PAGE, "bash")).replace("127.0.0.1:8000", address)
    run(["bash", "-euo", "pipefail", "-c", script], tmp_path)


@pytest.mark.parametrize("number", range(len(blocks(PAGE, "python"))))
def test_the_programs_run(address: str, number: int, tmp_path: Path) -> None:
    run([sys.executable, "-c", blocks(PAGE, "python")[number].replace("127.0.0.1:8000", address)], tmp_path)

"""A server with a scripted model, which answers as clients need it, and a tiny real one; and who runs the clients."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gristmill import LLM
from gristmill.serve.app import create_app
from serve.running import running
from serve.scripted_engine import ScriptedEngine, ScriptedLLM
from serve.tiny import save_tiny_model

SCRIPTS = Path(__file__).parent / "scripts"
HELLO = "Hello there."
CITY = {"city": "Paris", "millions": 2}
AFTER_CALL = "The sum is 5."


def script(prompt: str) -> str:
    """A call where there is a tool to call and nothing was called yet; what was asked for otherwise."""
    asked = prompt.rpartition("<|im_start|>user")[2]
    if "JSON" in asked:
        return _call("City", CITY) if '"City"' in prompt and "<tools>" in prompt else json.dumps(CITY)
    if "<tool_response>" in asked:
        return AFTER_CALL
    return _call("add", {"a": 2, "b": 3}) if "2 + 3" in asked else HELLO


def _call(name: str, arguments: dict[str, Any]) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@dataclass
class Place:
    """Where the clients are sent."""

    url: str
    llm: LLM
    path: Path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    path = save_tiny_model(tmp_path_factory.mktemp("tiny"))
    llm = LLM(path)
    with running(create_app([ScriptedLLM(ScriptedEngine(script, max_model_len=8192)), llm])) as url:
        yield Place(url, llm, path)


@pytest.fixture(scope="session")
def client(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Runs a script of scripts/ with arguments in .venv-clients and returns the JSON that it printed last."""
    beside = Path(__file__).parents[3] / ".venv-clients" / "bin" / "python"
    python = Path(os.environ.get("GRISTMILL_CLIENTS_PYTHON", beside))
    if not python.exists():
        pytest.skip("the clients are not installed: scripts/test.sh does it")
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("hf"))}

    def run(name: str, *arguments: object, folder: str = ".") -> Any:
        command = [str(python), str(SCRIPTS / name), *map(str, arguments)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
        done = subprocess.run(
            command, cwd=SCRIPTS / folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, (done.stderr or done.stdout)[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run

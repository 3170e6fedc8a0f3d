"""The command itself: help, unknown verbs, exit codes, and what it does not import."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from gristmill import cli
from gristmill.errors import GristmillError

HEAVY = ("torch", "transformers", "jsonargparse", "rich", "matplotlib", "numpy", "tokenizers")


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def imported(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint('\\nloaded', *[name for name in {HEAVY!r} if name in sys.modules])"
    return set(python(code).splitlines()[-1].split()[1:])


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert imported("import gristmill; gristmill.SamplingParams(temperature=0)") == set()


def test_help_imports_nothing_heavy() -> None:
    assert imported("from gristmill.cli import main; main(['--help']); main([]); main(['--version'])") == set()
    assert imported("from gristmill.cli import main; main(['quickstrat'])") == set()


def test_the_help_of_the_verbs_that_need_no_model_does_not_import_torch() -> None:
    for verb in ("assets", "tokens", "serve", "import", "export", "inspect", "bench"):
        code = f"from gristmill.cli import main\ntry: main(['{verb}', '--help'])\nexcept SystemExit: pass"
        assert "torch" not in imported(code), verb


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(verb in out and purpose in out for verb, purpose in cli.VERBS.items())


def test_every_verb_has_a_module_with_config_and_run() -> None:
    folder = Path(cli.__file__).parent
    for verb in cli.VERBS:
        module = import_module(cli.module_of(verb))
        assert module.Config.__dataclass_params__.frozen
        assert callable(module.run)
    helpers = {"__init__", "ladder_report", "loading", "options", "sampling", "stream"}
    modules = {cli.module_of(verb).rpartition(".")[2] for verb in cli.VERBS}
    assert {path.stem for path in folder.glob("*.py")} - helpers == modules, "a module without a verb"


def test_python_m_is_the_same() -> None:
    script = Path(sys.executable).parent / "gristmill"
    module = subprocess.run([sys.executable, "-m", "gristmill", "--help"], capture_output=True, check=True)
    assert module.stdout == subprocess.run([script, "--help"], capture_output=True, check=True).stdout
    wrong = subprocess.run([sys.executable, "-m", "gristmill", "nonsense"], capture_output=True, check=False)
    assert wrong.returncode == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    import gristmill

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == gristmill.__version__


def test_an_unknown_verb_offers_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["quikstart", "--preset", "nano"]) == 2
    captured = capsys.readouterr()
    assert captured.err.strip() == "gristmill: unknown command 'quikstart'. Did you mean quickstart?"
    assert captured.out == ""


def test_our_errors_are_one_line_and_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise GristmillError("the disk is full")

    monkeypatch.setattr("gristmill.cli.assets.run", fail)
    assert cli.main(["assets", "list"]) == 1
    assert capsys.readouterr().err == "gristmill: the disk is full\n"


def test_an_interrupt_is_code_130_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("gristmill.cli.assets.run", interrupted)
    assert cli.main(["assets", "list"]) == 130
    assert capsys.readouterr().err == "\ngristmill: interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["assets", "list"], ["tokens", "--help"]])
def test_a_reader_that_goes_away_is_no_complaint(arguments: list[str], tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "gristmill", *arguments]
    environment = {**os.environ, "GRISTMILL_CACHE": str(tmp_path)}
    process = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, check=False, env=environment)
    os.close(writing)
    assert process.stderr == b""
    assert process.returncode in (0, 1, 141), "argparse ends with 0 and rich with 1, both without a word"

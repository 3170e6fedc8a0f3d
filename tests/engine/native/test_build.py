"""Compiling and loading the native kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path

import pytest

from gristmill.engine.native import build
from gristmill.engine.native.build import NativeUnavailable, compile_library, native_library, native_refusal

pytestmark = pytest.mark.peer  # needs a C++ compiler

SOURCE = 'extern "C" int answer() { return 42; }\n'
FLAGS = ("-O0", "-shared", "-fPIC")


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    folder = tmp_path / "kernels"
    folder.mkdir()
    (folder / "a.cpp").write_text(SOURCE)
    return folder


def test_compiles_once_until_source_or_flags_change(sources: Path, tmp_path: Path) -> None:
    def path(*more: str) -> Path:
        return compile_library((*FLAGS, *more), sources=sources, cache=tmp_path)

    first = path()
    written = first.stat().st_mtime_ns
    assert path() == first
    assert first.stat().st_mtime_ns == written
    assert path("-DOTHER") != first
    (sources / "a.h").write_text("// a header counts too\n")
    assert path() != first
    assert len(list((tmp_path / "native").iterdir())) == 3  # nothing half-made is left


def test_two_at_once_both_get_a_whole_library(sources: Path, tmp_path: Path) -> None:
    script = (
        "import ctypes, pathlib, sys; from gristmill.engine.native.build import compile_library;"
        f"at = pathlib.Path({str(tmp_path)!r}); p = compile_library({FLAGS!r}, sources=at / 'kernels', cache=at);"
        "sys.exit(ctypes.CDLL(str(p)).answer() - 42)"
    )
    with ThreadPoolExecutor() as pool:
        done = list(pool.map(lambda _: subprocess.run([sys.executable, "-c", script], check=False), range(2)))
    assert [process.returncode for process in done] == [0, 0]
    assert len(list((tmp_path / "native").iterdir())) == 1


def test_a_complaint_of_the_compiler_is_shown_and_nothing_is_cached(sources: Path, tmp_path: Path) -> None:
    (sources / "a.cpp").write_text("int answer() { return missing; }\n")
    with pytest.raises(NativeUnavailable, match="missing"):
        compile_library(FLAGS, sources=sources, cache=tmp_path)
    assert not list((tmp_path / "native").iterdir())


def test_no_compiler_is_named_with_what_to_install(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NativeUnavailable, match=r"no C\+\+ compiler.*install"):
        compile_library(FLAGS, sources=sources, cache=tmp_path)
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    with pytest.raises(NativeUnavailable, match="CXX names no-such-compiler"):
        compile_library(FLAGS, sources=sources, cache=tmp_path)


def test_another_processor_is_another_library(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = compile_library(FLAGS, sources=sources, cache=tmp_path)
    monkeypatch.setattr(build, "_processor", lambda: "flags: sse2")
    assert compile_library(FLAGS, sources=sources, cache=tmp_path) != here


@pytest.mark.parametrize(("wish", "reason"), [("0", "turns them off"), ("yes", "may be 0, 1 or portable")])
def test_can_be_switched_off(wish: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRISTMILL_NATIVE", wish)
    assert native_library() is None
    assert reason in str(native_refusal())
    with pytest.raises(NativeUnavailable, match=reason):
        build.require_native_library()


def test_other_machines_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert "riscv64" in str(build._load(("-not-used",)))


def test_shares_the_openmp_runtime_of_torch() -> None:
    if native_library() is None:
        pytest.skip(str(native_refusal()))
    script = (
        "from gristmill.engine.native.build import native_library; assert native_library();"
        "print(*{l.split()[-1] for l in open('/proc/self/maps') if 'gomp' in l or 'libomp' in l or 'iomp' in l})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=os.environ)
    runtimes = done.stdout.split()
    assert len(runtimes) == 1, runtimes


def test_a_wheel_holds_every_source() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["gristmill"]
    package = Path(build.__file__).parents[2]
    for path in build.SOURCES.iterdir():
        assert any(fnmatch(str(path.relative_to(package)), pattern) for pattern in patterns), path

"""Compile the C++ kernels with the user's own compiler on first use, and load them.

The library lies in the cache under a hash of its sources, the flags, the compiler and the processor, so it is built
once for each machine. GRISTMILL_NATIVE=0 leaves it out and everything runs on PyTorch; GRISTMILL_NATIVE=portable builds
it without the instructions that only some processors have.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path

import torch  # noqa: F401  before the library, which then shares torch's OpenMP runtime and its threads

from gristmill.assets import cache_root
from gristmill.errors import GristmillError
from gristmill.files import atomic_path

SOURCES = Path(__file__).parent / "kernels"
FLAGS = ("-O3", "-std=c++17", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
NATIVE = (*FLAGS, "-march=native")
PORTABLE = (*FLAGS, "-march=x86-64-v3", "-DGRISTMILL_PORTABLE")
_SHOWN = 5
"""Lines of a compiler's complaint that are repeated."""


class NativeUnavailable(GristmillError):
    """The kernels cannot be used here; the message tells why and what mends it."""


def native_library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they cannot be had: see `native_refusal`."""
    library = _find()
    return library if isinstance(library, ctypes.CDLL) else None


def native_refusal() -> str | None:
    """Why there is no native library here; None when there is one."""
    library = _find()
    return None if isinstance(library, ctypes.CDLL) else library


def require_native_library() -> ctypes.CDLL:
    """The compiled kernels. Raises NativeUnavailable."""
    library = _find()
    if isinstance(library, str):
        raise NativeUnavailable(f"no native kernels: {library}")
    return library


def compile_library(flags: tuple[str, ...] = NATIVE, *, sources: Path = SOURCES, cache: Path | None = None) -> Path:
    """Path of the shared library made of `sources`, compiled when the cache does not hold it yet.

    Any number of processes may do so at once: each compiles to a file of its own and renames it into place.
    Raises NativeUnavailable with the compiler's first lines, or when there is no compiler.
    """
    compiler = find_compiler()
    files = sorted(path for path in sources.iterdir() if path.suffix in (".h", ".cpp"))
    parts = [_version(compiler), _processor(), *flags]
    digest = hashlib.sha256("\0".join(parts).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    library = (cache or cache_root()) / "native" / f"gristmill-{digest.hexdigest()[:20]}.so"
    if not library.exists():
        with atomic_path(library) as temporary:
            units = [str(path) for path in files if path.suffix == ".cpp"]
            _run([*compiler, *flags, *units, "-o", str(temporary)])
    return library


def find_compiler() -> list[str]:
    """The command of the C++ compiler: CXX where it is set, otherwise g++, clang++ or c++.

    Raises NativeUnavailable when there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if shutil.which(command[0]):
            return command
    wanted = f"CXX names {named[0]}, which is not there" if named else "there is no C++ compiler"
    raise NativeUnavailable(f"{wanted}; install g++ (Debian and Ubuntu: apt install g++)")


def _find() -> ctypes.CDLL | str:
    wish = os.environ.get("GRISTMILL_NATIVE", "1")
    if wish == "0":
        return "GRISTMILL_NATIVE=0 turns them off"
    if wish not in ("1", "portable"):
        return f"GRISTMILL_NATIVE is {wish!r}; it may be 0, 1 or portable"
    return _load(PORTABLE if wish == "portable" else NATIVE)


@functools.cache
def _load(flags: tuple[str, ...]) -> ctypes.CDLL | str:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they are written for x86-64 Linux, this is {platform.machine()} {platform.system()}"
    try:
        library = compile_library(flags)
    except GristmillError as error:
        return str(error)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        return f"{library} cannot be loaded ({error}); delete it to have it built again"


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    except OSError as error:
        raise NativeUnavailable(f"{command[0]} cannot be run ({error.strerror})") from error
    if done.returncode != 0:
        complaint = "\n".join(done.stderr.strip().splitlines()[:_SHOWN])
        raise NativeUnavailable(f"{shlex.join(command[:1])} failed with status {done.returncode}:\n{complaint}")
    return done.stdout


@functools.cache
def _version_of(command: str) -> str:
    return _run([*shlex.split(command), "--version"])


def _version(compiler: list[str]) -> str:
    return shlex.join(compiler) + _version_of(shlex.join(compiler))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("vendor_id", "cpu family", "model", "flags")
    return "\n".join(dict.fromkeys(line for line in lines if line.split("\t")[0] in names))

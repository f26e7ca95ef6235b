"""C++ for the CPU, compiled where it runs: once per machine, by its own compiler, for its own instructions.

A source of the package becomes a shared library in the folder `native` of our cache, named after all that it
depends on, so that a home directory shared by different machines holds one for each. The compiler is $CXX,
otherwise c++, g++ or clang++. Where there is none, the callers have another way."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from proxytune.config import cache_folder

FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
)
COMPILERS = ("c++", "g++", "clang++")
LIMIT = 300
"""Seconds that a compiler may take; it takes one or two."""


class NotBuilt(RuntimeError):
    """Why there is no library, in one line, and what would help."""


@cache
def library(name: str) -> ctypes.CDLL:
    """The library of `name`.cpp beside this file (`cpu_attention`), compiled if it is not yet. NotBuilt
    where it cannot be; a second call raises anew."""
    source = Path(__file__).parent / f"{name}.cpp"
    compiler = find_compiler()
    built = cache_folder() / "native" / f"{source.stem}-{digest_of(source, compiler)}.so"
    if not built.exists():
        _compile(compiler, source, built)
    try:
        return ctypes.CDLL(str(built))
    except OSError as error:
        raise NotBuilt(f"{built} cannot be loaded ({error}): delete it to have it compiled again") from error


def find_compiler() -> str:
    """The C++ compiler: $CXX, or the first of COMPILERS that is there; NotBuilt without one."""
    asked = os.environ.get("CXX")
    for name in (asked,) if asked else COMPILERS:
        found = shutil.which(name)
        if found:
            return found
    tried = f"CXX={asked}" if asked else ", ".join(COMPILERS)
    raise NotBuilt(f"no C++ compiler found ({tried}): install one (apt-get install g++)")


def digest_of(source: Path, compiler: str) -> str:
    """Of the source, the flags, the compiler and the processor that -march=native means."""
    digest = hashlib.sha256(source.read_bytes())
    digest.update("\0".join((*FLAGS, compiler, platform.platform(), processor())).encode())
    return digest.hexdigest()[:16]


def processor() -> str:
    """Name and instruction sets of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features", "CPU part"))})
    )


def _compile(compiler: str, source: Path, built: Path) -> None:
    """Into a file of its own first, so that processes that compile at the same time do not meet."""
    try:
        built.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            made = Path(folder) / built.name
            command = [compiler, *FLAGS, "-shared", "-fPIC", str(source), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            if done.returncode != 0:
                reason = next(iter(done.stderr.strip().splitlines()), f"exit code {done.returncode}")
                raise NotBuilt(f"{compiler} does not compile {source.name}: {reason}")
            os.replace(made, built)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{source.name} could not be compiled: {error}") from error

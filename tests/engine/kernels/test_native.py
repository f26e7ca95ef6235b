"""Compiling C++ where it runs: once, for this machine, and with a plain reason where it cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxytune.config import cache_folder
from proxytune.engine.kernels import native
from proxytune.engine.kernels.native import NotBuilt, library
from tests.support.require import require_or_skip

GOOD = 'extern "C" int answer() { return 42; }\n'


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of one source, and a cache of its own."""
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native.py"))
    monkeypatch.delenv("PROXYTUNE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "thing.cpp"
    path.write_text(GOOD)
    library.cache_clear()
    compiler()
    yield path
    library.cache_clear()


def compiler() -> str:
    """What compiles here."""
    try:
        return native.find_compiler()
    except NotBuilt as reason:
        require_or_skip("compiler", str(reason))
        raise


def built(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "proxytune" / "native").iterdir())


def test_compiled_once_and_again_when_it_changes(source: Path, tmp_path: Path) -> None:
    assert library("thing").answer() == 42
    [first] = built(tmp_path)
    written = first.stat().st_mtime_ns
    library.cache_clear()
    assert library("thing").answer() == 42 and first.stat().st_mtime_ns == written
    source.write_text(GOOD.replace("42", "43"))
    library.cache_clear()
    assert library("thing").answer() == 43
    assert len(built(tmp_path)) == 2 and first in built(tmp_path)


def test_no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(NotBuilt, match=r"CXX=no-such-compiler.*apt-get install g\+\+"):
        library("thing")


def test_a_compiler_that_fails_leaves_nothing_behind(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source.write_text("no C++\n")
    with pytest.raises(NotBuilt, match=r"does not compile thing\.cpp: .*error"):
        library("thing")
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(NotBuilt, match="exit code 1"):
        library("thing")
    assert built(tmp_path) == []


def test_a_cache_that_cannot_be_written(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(NotBuilt, match=r"thing\.cpp could not be compiled"):
        library("thing")


def test_a_broken_library_says_what_to_do(source: Path, tmp_path: Path) -> None:
    path = cache_folder() / "native" / f"thing-{native.digest_of(source, compiler())}.so"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"broken")
    with pytest.raises(NotBuilt, match="delete it"):
        library("thing")


def test_processors_and_flags_are_part_of_the_name(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = native.digest_of(source, "c++")
    assert name == native.digest_of(source, "c++") != native.digest_of(source, "clang++")
    monkeypatch.setattr(native, "processor", lambda: "another")
    other = native.digest_of(source, "c++")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-g"))
    assert len({name, other, native.digest_of(source, "c++")}) == 3


def test_the_threads_are_torchs_own() -> None:
    """Two OpenMP runtimes in one process would fight for the cores."""
    import torch  # its runtime is loaded first

    compiler()
    library("cpu_attention")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    lines = maps.read_text().splitlines()
    runtimes = {line.split()[-1] for line in lines if "libgomp" in line and "scikit_learn" not in line}
    assert torch.get_num_threads() > 0 and len(runtimes) == 1

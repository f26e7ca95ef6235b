"""Who writes to a run folder, and whether what is read is what was written."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from proxytune import results, run_files
from proxytune.errors import UserError
from proxytune.records import Metric
from proxytune.results import RunFolder
from proxytune.run_files import WRITER
from tests.support.checkout import ROOT
from tests.support.new_runs import new

OPENS = """
import fcntl, sys, time
from pathlib import Path
fcntl.flock = lambda fd, operation: None
from proxytune.results import RunFolder
from tests.support.new_runs import new
folder = RunFolder.open(Path(sys.argv[1]), new())
print("open", flush=True)
time.sleep(600)
"""


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system whose locks do nothing."""
    monkeypatch.setattr(fcntl, "flock", lambda fd, operation: None)


def row(name: str) -> dict[str, Any]:
    """A stored prediction."""
    return {"id": name, "output": name, "responses": [{"text": name, "tokens": 3}]}


def stored(folder: Path) -> list[str]:
    """The ids of the rows in a folder."""
    return [found["id"] for found in results.read_rows(folder)]


def finished(path: Path, names: str = "abc") -> Path:
    """A finished, traced run of these examples."""
    with RunFolder.open(path, new(trace="tokens")) as folder:
        for name in names:
            folder.append(row(name), [{"id": name, "sample": 0, "tokens": []}], {"seconds": 1.0})
        folder.finish(folder.run.model_copy(update={"status": "done", "n": len(names)}), list(names))
    return path


# Who writes


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_process_of_this_machine_is_refused_at_once(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new()) as first:
        with pytest.raises(UserError, match="another process is writing to"):
            RunFolder.open(tmp_path, new())
        first.append(row("a"))
    asked = [sys.executable, "-c", OPENS, str(tmp_path)]
    with subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "open\n"
        with pytest.raises(UserError, match="another process is writing to"):
            RunFolder.open(tmp_path, new())
        with pytest.raises(UserError, match="another process is writing to"), results.holding(tmp_path):
            pass
        other.send_signal(signal.SIGKILL)
    assert (tmp_path / WRITER).exists(), "it was killed"
    with RunFolder.open(tmp_path, new()) as second:
        assert second.done == {"a"}
    assert not (tmp_path / WRITER).exists()


def test_what_a_killed_process_had_started_is_waited_for(tmp_path: Path) -> None:
    """A process that was begun in the middle of its work has its lock until it runs its own program."""
    holds = (
        "import fcntl, os, sys, time\n"
        "lock = os.open(sys.argv[1], os.O_RDONLY)\n"
        "fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "if os.fork():\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
        "time.sleep(0.4)\n"
    )
    asked = [sys.executable, "-c", holds, str(tmp_path)]
    with subprocess.Popen(asked, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        other.send_signal(signal.SIGKILL)
        other.wait()
        with RunFolder.open(tmp_path, new()) as folder:
            folder.append(row("a"))
    assert stored(tmp_path) == ["a"]


def test_a_folder_that_was_moved_away_and_back_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "run"
    with RunFolder.open(path, new()) as folder:
        path.rename(tmp_path / "away")
        with pytest.raises(UserError, match="deleted or moved"):
            folder.append(row("a"))
    (tmp_path / "away").rename(path)
    with RunFolder.open(path, new()) as folder:
        folder.append(row("a"))
    assert stored(path) == ["a"]


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_first_of_two_machines_finds_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunFolder.open(tmp_path, new()) as first:
        first.append(row("a"))
        with monkeypatch.context() as there:
            there.setattr(run_files, "_machine", lambda: "another")
            second = RunFolder.open(tmp_path, new())
        second.append(row("b"))
        for write in (lambda: first.append(row("c")), lambda: first.save(first.run)):
            with pytest.raises(UserError, match=r"another process has begun to write to .* this one stops"):
                write()
        second.append(row("c"))
    assert (tmp_path / WRITER).exists(), "the first leaves the token of the second alone"
    second.close()
    assert stored(tmp_path) == ["a", "b", "c"]


def test_rows_of_somebody_else_are_found_out_at_the_next_row(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new()) as folder:
        folder.append(row("a"))
        with (tmp_path / results.PREDICTIONS).open("a") as file:
            file.write("{}\n")
        with pytest.raises(UserError, match=r"predictions\.jsonl' was changed by somebody else"):
            folder.append(row("b"))


def replaced(folder: Path) -> None:
    """Another run in the same place."""
    folder.rename(folder.with_name("away"))
    finished(folder, "xyz")


def moved(folder: Path) -> None:
    """No folder there any more."""
    folder.rename(folder.with_name("away"))


def emptied(folder: Path) -> None:
    """The folder without anything in it."""
    for path in folder.glob("*"):
        path.unlink()


def cleared(folder: Path) -> None:
    """The folder without what `rm folder/*` deletes."""
    for path in folder.glob("[!.]*"):
        path.unlink()


def copied_back(folder: Path) -> None:
    """The same files, but not those that are open."""
    shutil.copy(folder / results.PREDICTIONS, folder / "copy")
    (folder / "copy").rename(folder / results.PREDICTIONS)


@pytest.mark.parametrize(
    ("happens", "line"),
    [
        (shutil.rmtree, "deleted or moved"),
        (moved, "deleted or moved"),
        (replaced, "was replaced"),
        (emptied, "was emptied"),
        (cleared, "cost.jsonl' was deleted"),
        (copied_back, "predictions.jsonl' was replaced"),
    ],
)
def test_what_happens_to_the_folder_ends_the_run_at_the_next_row(
    tmp_path: Path, happens: Callable[[Path], None], line: str
) -> None:
    path = tmp_path / "run"
    with RunFolder.open(path, new()) as folder:
        folder.append(row("a"))
        happens(path)
        before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        for write in (lambda: folder.append(row("b")), lambda: folder.save(folder.run)):
            with pytest.raises(UserError, match=f"{line}.*it stops here") as error:
                write()
            assert "\n" not in str(error.value)
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert {file: text for file, text in before.items() if file.name != WRITER} == {
        file: text for file, text in after.items() if file.name != WRITER
    }


def test_what_killed_processes_left_is_removed_at_the_next_start(tmp_path: Path) -> None:
    strays = (".run.json.99999999", ".predictions.jsonl.99999999", ".new.cost.jsonl", "..writer.99999999")
    others = (".run.json.old", ".gitignore", "notes.txt", f".run.json.{os.getppid()}")
    for name in (*strays, *others):
        (tmp_path / name).write_bytes(b"{")
    RunFolder.open(tmp_path, new(trace="tokens")).close()
    files = {results.RUN, results.PREDICTIONS, results.COST, results.TRACE}
    assert {path.name for path in tmp_path.iterdir()} == {*others, *files}
    finished(tmp_path)
    for name in (*strays, WRITER):
        (tmp_path / name).write_bytes(b"{")
    RunFolder.open(tmp_path, new(trace="tokens")).close()
    assert {path.name for path in tmp_path.iterdir()} == {*others, *files}


# What is read


def drop(lines: list[bytes]) -> list[bytes]:
    """Without the second row."""
    return [lines[0], *lines[2:]]


def double(lines: list[bytes]) -> list[bytes]:
    """With the second row twice."""
    return [*lines, lines[1]]


def change(lines: list[bytes]) -> list[bytes]:
    """With another output in the second row."""
    return [lines[0], lines[1].replace(b'"output": "b"', b'"output": "B"'), *lines[2:]]


def add(lines: list[bytes]) -> list[bytes]:
    """With a row of another example."""
    return [*lines, lines[1].replace(b'"id": "b"', b'"id": "z"')]


@pytest.mark.parametrize("ended", [True, False])
@pytest.mark.parametrize(
    ("tamper", "says"),
    [
        (drop, "'b' is missing"),
        (double, "'b' is there twice"),
        (change, "'b' is not what was stored"),
        (add, "'z' is none that this run stored"),
    ],
)
def test_a_row_that_is_not_as_it_was_is_named(
    tmp_path: Path, tamper: Callable[[list[bytes]], list[bytes]], says: str, ended: bool
) -> None:
    if ended:
        finished(tmp_path)
    else:
        with RunFolder.open(tmp_path, new(trace="tokens")) as folder:
            for name in "abc":
                folder.append(row(name), [{"id": name, "sample": 0, "tokens": []}])
    path = tmp_path / results.PREDICTIONS
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    for read in (
        lambda: results.read_run(tmp_path),
        lambda: results.read_rows(tmp_path),
        lambda: results.find_runs(tmp_path),
        lambda: RunFolder.open(tmp_path, new(trace="tokens")),
    ):
        with pytest.raises(UserError, match=f"predictions.jsonl' is damaged: {says}") as error:
            read()
        assert "\n" not in str(error.value)


def test_the_end_of_an_unfinished_run_may_be_lost(tmp_path: Path) -> None:
    """A crash of the machine takes the end of a file: those examples are made again."""
    with RunFolder.open(tmp_path, new()) as folder:
        for name in "abc":
            folder.append(row(name))
    path = tmp_path / results.PREDICTIONS
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:1]))
    with RunFolder.open(tmp_path, new()) as folder:
        assert folder.done == {"a"} == set(folder.records)
        folder.append(row("b"))
    assert stored(tmp_path) == ["a", "b"]


@pytest.mark.parametrize("name", [results.RUN, results.PREDICTIONS, results.COST, results.TRACE])
def test_a_file_that_is_a_folder_is_named(tmp_path: Path, name: str) -> None:
    finished(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name}'"):
        results.read_run(tmp_path)


@pytest.mark.parametrize("change", [{"status": "running"}, {"n": 2}, {"headline": "x"}, {"seal": None}])
def test_a_run_that_was_changed_by_hand_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    path = finished(tmp_path) / results.RUN
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=r"run\.json' is damaged: it was changed by hand"):
        results.read_run(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8))
    with pytest.raises(UserError, match="it was changed by hand"):
        RunFolder.open(tmp_path, new(trace="tokens"))


def test_a_seal_is_of_files_in_its_own_folder(tmp_path: Path) -> None:
    """Whoever makes one that names others must not have them moved about."""
    path = finished(tmp_path / "run") / results.RUN
    content = json.loads(path.read_text())
    files = content.pop("seal")["files"] | {"../x": run_files.digest(b"")}
    path.write_text(json.dumps({**content, "seal": run_files.seal_of(content, files)}))
    with pytest.raises(UserError, match="it was changed by hand"):
        results.read_run(path.parent)


def test_a_run_that_is_set_otherwise_is_the_same(tmp_path: Path) -> None:
    run, path = results.read_run(finished(tmp_path)), tmp_path / results.RUN
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8, ensure_ascii=True))
    assert results.read_run(tmp_path) == run


@pytest.mark.parametrize("steps", range(5))
def test_a_judging_that_is_killed_is_none_or_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """Stopped before any of its renames, the folder is as it was, or as it was to be."""
    run = results.read_run(finished(tmp_path))
    judged = run.model_copy(update={"judge": "j", "metrics": {"m": Metric(value=1)}})
    real, count = Path.replace, 0

    def replace(self: Path, target: Path) -> Path:
        nonlocal count
        count += 1
        if count > steps + 1:  # the first is the token's
            raise KeyboardInterrupt
        return real(self, target)

    rows = [{**one, "scores": {"m": 1}} for one in results.read_rows(tmp_path)]
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt), results.holding(tmp_path):
        results.replace_rows(tmp_path, rows, judged)
    monkeypatch.undo()
    assert results.read_run(tmp_path) == (judged if steps >= 3 else run)
    assert ("scores" in results.read_rows(tmp_path)[0]) == (steps >= 3)
    with results.holding(tmp_path):
        results.replace_rows(tmp_path, rows, judged)
    assert results.read_run(tmp_path) == judged and not list(tmp_path.glob(".*"))


def test_an_older_version_s_run_is_continued(tmp_path: Path) -> None:
    """It has no records of what its examples took, and no digests."""
    with RunFolder.open(tmp_path, new(trace="tokens")) as folder:
        folder.append(row("a"), [{"id": "a", "sample": 0, "tokens": []}], {"seconds": 1.0})
    old = json.loads((tmp_path / results.RUN).read_text())
    del old["seal"]
    (tmp_path / results.RUN).write_text(json.dumps(old))
    (tmp_path / results.COST).unlink()
    with RunFolder.open(tmp_path, new(trace="tokens")) as folder:
        assert folder.done == {"a"}
        assert folder.records["a"]["generated_tokens"] == 3 and "seconds" not in folder.records["a"]
        folder.append(row("b"), [{"id": "b", "sample": 0, "tokens": []}])
    with RunFolder.open(tmp_path, new(trace="tokens")) as folder:
        assert folder.done == {"a", "b"}


def test_which_of_several_ids_is_told() -> None:
    def line(name: str, text: str = "x") -> tuple[dict[str, Any], bytes]:
        return {"id": name}, f"{name}{text}\n".encode()

    def record(name: str, *own: bytes) -> dict[str, Any]:
        return {"row": run_files.digest(b"".join(own)), "trace": run_files.digest(b"t")}

    lines = [line("a"), line("b"), line("a", "y")]
    records = {"a": record("a", b"ax\n", b"ay\n"), "b": record("b", b"bx\n")}
    assert run_files.by_id(lines) == {"a": b"ax\nay\n", "b": b"bx\n"}
    more = {**records, "c": {}, "d": {}}
    assert run_files.problem_of(lines, records, "row", whole=True) is None
    assert run_files.problem_of(lines, more, "row") is None
    assert run_files.problem_of(lines, more, "row", whole=True) == "'c' is missing (and 1 more)"
    del more["d"]
    assert run_files.problem_of(lines, more, "row", whole=True) == "'c' is missing"
    assert run_files.problem_of(lines, records, "trace") == "'a' is not what was stored"
    twice = [*lines, line("b")]
    assert run_files.problem_of(twice, records, "row") == "'b' is there twice"
    assert run_files.problem_of([line("z")], records, "row") == "'z' is none that this run stored"
    for length, shown in ((80, "n" * 80), (81, "n" * 80 + "...")):
        assert run_files.problem_of([line("n" * length)], {}, "row") == (
            f"'{shown}' is none that this run stored"
        )


def test_seals_are_of_the_files_and_all_else() -> None:
    seal = run_files.seal_of({"n": 1}, {"a": "0"})
    content = json.dumps([{"n": 1}, {"a": "0"}]).encode()
    assert seal == {"files": {"a": "0"}, "sha256": run_files.digest(content)}
    assert run_files.seal_of({"n": 2}, {"a": "0"}) != seal != run_files.seal_of({"n": 1}, {"a": "1"})
    assert run_files.files_of(seal) == {"a": "0"}
    for none in (None, [], {}, {"files": []}, {"files": {"../a": "0"}}):
        assert run_files.files_of(none) == {}
    record = run_files.sealed({"b": 1, "a": 2})
    assert record["sha256"] == run_files.digest(b'{"a": 2, "b": 1}')
    assert run_files.sealed({**record, "sha256": "other"}) == record and list(record) == ["b", "a", "sha256"]


def test_lines_are_plain_json() -> None:
    assert run_files.encode({"a": "\u00e9\ud800"}) == b'{"a": "\xc3\xa9\xed\xa0\x80"}\n'
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_files.encode({"a": float("nan")})


@pytest.mark.parametrize(
    ("number", "more"),
    [
        (errno.ENOSPC, True), (errno.EFBIG, True), (errno.EDQUOT, True), (errno.EACCES, False),
        (errno.EROFS, False),
    ],
)  # fmt: skip
def test_what_is_said_of_a_disk(number: int, more: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError) as raised, run_files.disk_errors_in_one_line(tmp_path / "x"):
        raise OSError(number, "reason")
    room = "; finished examples are kept: make room and run the same command again to continue"
    assert str(raised.value) == f"cannot write '{tmp_path / 'x'}': reason{room if more else ''}"
    assert str(run_files.damaged(Path("f"), "it is odd")) == (
        "'f' is damaged: it is odd. Restore it, or delete the folder to run it again"
    )

"""What is said about a busy CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxytune import cpu_load
from proxytune.cpu_load import CpuLoad, advice


def load(cores: int = 2, waiting: float | None = 0.0, runnable: float = 0.0, machine: int = 2) -> CpuLoad:
    return CpuLoad(cores, waiting, runnable, machine)


@pytest.mark.parametrize(
    ("threads", "seen"),
    [
        (2, load()),
        (1, load(waiting=0.9, runnable=7.0)),  # one thread waits for nobody
        (2, load(runnable=9.0)),  # a load of a minute ago, or of other containers
        (2, load(waiting=None, runnable=2.5)),
        (2, load(waiting=None, runnable=40.0, machine=64)),
    ],
)
def test_nothing_to_say(threads: int, seen: CpuLoad) -> None:
    assert advice(threads, seen) is None


def test_a_busy_machine() -> None:
    said = advice(2, load(waiting=0.5, runnable=3.2))
    assert said is not None and said.startswith("the CPU is busy with other work")
    assert "50% of the last 10 seconds, load 3.2 on 2 cores" in said and said.endswith("Try --threads 1")
    said = advice(8, load(cores=8, waiting=None, runnable=70.0, machine=64))
    assert said is not None and "load 70.0 on 64 cores" in said


def test_more_threads_than_cores() -> None:
    assert advice(4, load(cores=1)) == (
        "4 threads share 1 core and wait for each other: --threads 1 is faster"
    )


def test_where_the_pressure_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, machine = tmp_path / "cpu.pressure", tmp_path / "cpu"
    monkeypatch.setattr(cpu_load, "PRESSURE", (own, machine))
    assert cpu_load._waiting() is None
    machine.write_text("some avg10=12.50 avg60=0.50 avg300=4.48 total=47\nfull avg10=0.00 avg60=0.00\n")
    assert cpu_load._waiting() == 0.125
    own.write_text("some avg10=50.00 avg60=0.50 avg300=4.48 total=47\n")
    assert cpu_load._waiting() == 0.5
    own.write_text("")
    assert cpu_load._waiting() == 0.125


def test_this_machine() -> None:
    found = CpuLoad(1, None, 0.0, 1).busy, cpu_load.read()
    assert found[0] is False and found[1].cores >= 1

"""What is said about a busy CPU."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from proxytune import cpu_load
from proxytune.cpu_load import CpuLoad, advice, read


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


@pytest.mark.parametrize(
    ("seen", "busy"),
    [
        (load(waiting=0.2), True),
        (load(waiting=0.199, runnable=9.0), False),
        (load(waiting=None, runnable=3.0), True),
        (load(waiting=None, runnable=2.99), False),
        (load(cores=1, waiting=None, runnable=3.0, machine=3), False),
    ],
)
def test_from_when_on_a_cpu_is_busy(seen: CpuLoad, busy: bool) -> None:
    assert seen.busy is busy


def test_as_many_threads_as_cores_are_not_too_many() -> None:
    assert advice(2, load(cores=2)) is None
    assert advice(3, load(cores=2)) == (
        "3 threads share 2 cores and wait for each other: --threads 2 is faster"
    )


def test_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`read` as it is, which other tests have replaced."""
    pressure = tmp_path / "cpu"
    pressure.write_text("some avg10=12.50 avg60=0.50\n")
    monkeypatch.setattr(cpu_load, "PRESSURE", (pressure,))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 4, 5})
    monkeypatch.setattr(os, "getloadavg", lambda: (1.5, 2.5, 3.5))
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert read() == CpuLoad(cores=3, waiting=0.125, runnable=1.5, machine_cores=8)
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert read().machine_cores == 1
    pressure.unlink()
    assert read().waiting is None

"""Workers on a real Ray cluster on this machine: the rows of one process, whatever is lost on the way."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.config import RunSpec, Sampling, System
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, RayOptions
from proxytune.runs.alpha_sweep import parse_alphas, sweep
from proxytune.runs.evaluation import Evaluation
from proxytune.scale import RayPool, ray_decoder
from tests.support.checkout import environment
from tests.support.require import require_or_skip
from tests.support.runs import evaluated, evaluation_of

if importlib.util.find_spec("ray") is None:
    require_or_skip("ray", "ray is not installed")
import ray

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),  # one cluster at a time
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own pipes
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]
SAMPLING = Sampling(max_new_tokens=24, temperature=1.0, n=2)
TWO = RayOptions(ray="local", workers=2)


def rows(folder: Path) -> dict[str, Any]:
    """What was stored, by example."""
    return {row["id"]: row for row in results.read_rows(folder)}


def on_ray(asked: Evaluation, options: RayOptions = TWO) -> Evaluation:
    return dataclasses.replace(asked, open_decoder=ray_decoder(options))


def test_the_same_predictions(system: System, models: Models, tmp_path: Path) -> None:
    """Two samples of each example, traced; float64: bit for bit."""
    settings: dict[str, Any] = {"limit": 20, "sampling": SAMPLING, "trace": "tokens", "batch": 4}
    evaluated(system, "gsm", models=models, out=tmp_path / "one", **settings)
    run, _ = on_ray(evaluation_of(system, "gsm", **settings)).run("proxy", tmp_path / "two")
    assert rows(tmp_path / "two") == rows(tmp_path / "one") and run.status == "done"

    cost = results.read_run(tmp_path / "two").cost
    assert len(cost.workers) == 2 and str(os.getpid()) not in {str(w.pid) for w in cost.workers.values()}
    assert sum(worker.examples for worker in cost.workers.values()) == 20
    assert sum(worker.generated_tokens for worker in cost.workers.values()) == cost.generated_tokens
    assert all(w.process_peak > 1e8 and w.log and w.seconds > 0 for w in cost.workers.values() if w.examples)


def test_a_sweep_and_likelihoods(system: System, models: Models, tmp_path: Path) -> None:
    alphas = parse_alphas("0,1,first:4")
    for task, settings in (("gsm", {"sampling": SAMPLING}), ("truthfulqa_mc", {})):
        asked = evaluation_of(system, task, models, limit=6, **settings)
        sweep(asked, alphas, tmp_path / task / "one")
        sweep(on_ray(asked), alphas, tmp_path / task / "two")
        for folder in sorted((tmp_path / task / "one").glob("alpha=*")):
            assert rows(tmp_path / task / "two" / folder.name) == rows(folder)


def test_a_worker_is_killed(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had is decoded by another, every row is there once, and the run says so."""
    settings: dict[str, Any] = {"limit": 30, "sampling": SAMPLING, "batch": 2}
    evaluated(system, "gsm", models=models, out=tmp_path / "one", **settings)
    killed: list[str] = []
    note = RayPool._note

    def heard(pool: RayPool, member: Any, found: Any) -> None:
        note(pool, member, found)
        if not killed:
            killed.append(member.state.facts.name)
            os.kill(member.state.facts.pid, signal.SIGKILL)

    monkeypatch.setattr(RayPool, "_note", heard)
    run, _ = on_ray(evaluation_of(system, "gsm", **settings)).run("proxy", tmp_path / "two")
    assert rows(tmp_path / "two") == rows(tmp_path / "one")
    stored = [row["id"] for row in results.read_rows(tmp_path / "two")]
    assert len(stored) == len(set(stored)) == 30
    assert any(f"{killed[0]} was lost" in remark for remark in run.notes)
    assert killed[0] in run.cost.workers and sum(w.examples for w in run.cost.workers.values()) == 30


def test_a_worker_that_joins_late(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cluster has room for one of two workers. When a second machine joins in the middle of the run, the
    other worker begins, and takes its part of what is left."""
    from ray.cluster_utils import Cluster

    settings: dict[str, Any] = {"limit": 30, "sampling": SAMPLING, "batch": 2}
    evaluated(system, "gsm", models=models, out=tmp_path / "one", **settings)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = [str(Path(sys.executable).with_name("ray")), "start", "--address", cluster.address]
    note, before, machines = RayPool._note, list[int](), list[subprocess.Popen[bytes]]()

    def heard(pool: RayPool, member: Any, found: Any) -> None:
        note(pool, member, found)
        if not before:
            before.append(len(pool.workers))
            machines.append(subprocess.Popen([*second, "--num-cpus=1", "--block"], env=environment()))
            [waiting] = [other for other in pool._members if other.state is None]
            ready, _ = ray.wait([waiting.loading], timeout=120)
            assert ready, "the late worker did not start"

    monkeypatch.setattr(RayPool, "_note", heard)
    try:
        asked = on_ray(evaluation_of(system, "gsm", **settings), RayOptions(ray=cluster.address, workers=2))
        run, _ = asked.run("proxy", tmp_path / "two")
    finally:
        for machine in machines:
            machine.terminate()
            machine.wait(timeout=60)
        cluster.shutdown()
    assert before == [1] and len(run.cost.workers) == 2
    assert all(worker.examples >= 4 for worker in run.cost.workers.values())
    assert rows(tmp_path / "two") == rows(tmp_path / "one") and run.status == "done"


def test_what_kills_every_worker_comes_to_an_end(
    system: System, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    note = RayPool._note

    def heard(pool: RayPool, member: Any, found: Any) -> None:
        note(pool, member, found)
        os.kill(member.state.facts.pid, signal.SIGKILL)

    monkeypatch.setattr(RayPool, "_note", heard)
    monkeypatch.setattr("proxytune.scale.ray_pool.LOSSES_PER_WORKER", 1)
    asked = on_ray(
        evaluation_of(system, "gsm", limit=12, sampling=SAMPLING), RayOptions(ray="local", workers=1)
    )
    with pytest.raises(UserError, match=r"2 workers were lost, the last one .*messages are in"):
        asked.run("proxy", tmp_path / "run")


def test_the_driver_is_killed_and_the_same_command_goes_on(yaml: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "proxytune", "eval", "gsm", "--system", str(yaml), "--limit", "12"]
    command += ["--batch", "2", "--ray", "--out", "run"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stderr=subprocess.DEVNULL) as driver:
        stored = tmp_path / "run" / results.PREDICTIONS
        deadline = time.monotonic() + 120
        while not (stored.exists() and stored.read_bytes().count(b"\n") >= 2) and driver.poll() is None:
            assert time.monotonic() < deadline, "no rows within two minutes"
            time.sleep(0.02)
        driver.kill()
    assert results.read_run(tmp_path / "run").status == "running"
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    plain = [*command[:-3], "--out", "plain"]
    assert subprocess.run(plain, cwd=tmp_path, env=environment(), capture_output=True).returncode == 0
    assert rows(tmp_path / "run") == rows(tmp_path / "plain")
    assert len(list(results.read_rows(tmp_path / "run"))) == 12


def spec_of(system: System) -> RunSpec:
    return RunSpec(
        task="gsm",
        system=system,
        role="proxy",
        alpha=system.alpha,
        sampling=SAMPLING,
        data="generated",
        data_sha256="",
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ray": "127.0.0.1:1"}, "no Ray cluster there .*ray start --head"),
        ({"ray": "nowhere"}, "an address is HOST:PORT"),
        ({"ray": "local", "gpus_per_worker": 1}, "the Ray cluster has 0 GPUs"),
    ],
)
def test_no_such_cluster(options: dict[str, Any], reason: str, system: System) -> None:
    with pytest.raises(UserError, match=reason):
        ray_decoder(RayOptions(**options))(spec_of(system), DecodeOptions(progress=False))


def test_a_worker_without_the_models_says_so(system: System) -> None:
    base = system.base.model_copy(update={"model": "/nowhere/base"})
    lacking = system.model_copy(update={"base": base})
    with pytest.raises(UserError, match=r"the worker on .*: .*/nowhere/base"):
        ray_decoder(TWO)(spec_of(lacking), DecodeOptions(progress=False))

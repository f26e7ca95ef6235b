"""Run folders: nothing finished gets lost, nothing gets mixed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from proxytune import results, run_files
from proxytune.config import ExpertSpec, ModelSpec, Sampling, parse_alpha
from proxytune.errors import UserError
from proxytune.records import Cost, Metric, Run
from proxytune.results import RunFolder
from tests.support.checkout import ROOT
from tests.support.new_runs import SYSTEM, new, spec


def row(name: str) -> dict[str, Any]:
    """A stored prediction; non-ASCII text and line separators belong to what models say."""
    return {"id": name, "output": "día\u2028\n", "score": 1.0}


def finished(folder: RunFolder) -> Run:
    """The folder's run as it ends."""
    return folder.run.model_copy(
        update={"status": "done", "n": len(folder.done), "metrics": {"m": Metric(value=1)}}
    )


def test_default_settings_live_in_the_plain_folder(tmp_path: Path) -> None:
    assert results.folder_for(tmp_path, spec(), spec()) == tmp_path / "tiny" / "gsm" / "base"


def test_other_settings_live_beside_it_each_in_its_own_folder(tmp_path: Path) -> None:
    folders = [
        results.folder_for(tmp_path, spec(**changes), spec())
        for changes in (
            {"limit": 5},
            {"limit": 6},
            {"sampling": Sampling(temperature=0.5)},
            {"shots": 4},
        )
    ]  # fmt: skip
    assert len(set(folders)) == 4
    files = [{"data": "test.jsonl", "data_sha256": digit * 64} for digit in "12"]
    assert len({results.folder_for(tmp_path, spec(**changes), spec()) for changes in files}) == 2
    assert all(f.parent == tmp_path / "tiny" / "gsm" / "base" for f in folders)
    assert folders[0].name.startswith("limit=5-") and folders[2].name.startswith("temperature=0.5-")
    assert folders[3].name.startswith("shots=4-")


def test_names_stay_inside_the_root(tmp_path: Path) -> None:
    odd = SYSTEM.model_copy(update={"name": "../../x y"})
    assert results.folder_for(tmp_path, spec(system=odd), spec(system=odd)).is_relative_to(tmp_path)
    assert ".." not in str(
        results.folder_for(tmp_path, spec(system=odd), spec(system=odd)).relative_to(tmp_path)
    )


def test_a_run_is_written_read_and_sorted(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new()) as folder:
        for name in ("b", "c", "a"):
            folder.append(row(name))
        folder.finish(finished(folder), ["a", "b", "c"])
    assert results.read_rows(tmp_path) == [row("a"), row("b"), row("c")]
    assert results.read_run(tmp_path).status == "done"
    assert [run.n for _, run in results.find_runs(tmp_path)] == [3]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cost.jsonl", "predictions.jsonl", "run.json"]


QUOTIENTS = ("acceptance", "accepted_per_step", "tokens_per_step")


def stored_cost(path: Path, cost: Cost) -> dict[str, Any]:
    """What run.json says of a cost."""
    with RunFolder.open(path, new()) as folder:
        folder.save(folder.run.model_copy(update={"cost": cost}))
    found: dict[str, Any] = json.loads((path / results.RUN).read_text())["cost"]
    return found


def test_run_json_says_how_many_drafts_stood(tmp_path: Path) -> None:
    cost = Cost(generated_tokens=30, row_steps=12, drafted=40, examined=24, accepted=18)
    stored = stored_cost(tmp_path / "drafts", cost)
    assert [stored[name] for name in QUOTIENTS] == [18 / 24, 18 / 12, 30 / 12]
    plain = stored_cost(tmp_path / "plain", Cost(generated_tokens=12, row_steps=12))
    assert [plain[name] for name in QUOTIENTS] == [None, 0, 1]
    nothing = stored_cost(tmp_path / "nothing", Cost())
    assert [nothing[name] for name in QUOTIENTS] == [None] * 3


@pytest.mark.parametrize("stored", [{}, dict.fromkeys(QUOTIENTS, 9.0), dict.fromkeys(QUOTIENTS, "wrong")])
def test_stored_quotients_are_not_read(tmp_path: Path, stored: dict[str, Any]) -> None:
    """Files of before have none; what a file says never goes before its counts."""
    cost = Cost(generated_tokens=30, row_steps=12, drafted=40, examined=24, accepted=18)
    kept = {name: value for name, value in stored_cost(tmp_path, cost).items() if name not in QUOTIENTS}
    file = tmp_path / results.RUN
    old = {**json.loads(file.read_text()), "cost": {**kept, **stored}}
    del old[results.SEAL]
    file.write_text(json.dumps(old))
    (tmp_path / results.COST).unlink()
    read = results.read_run(tmp_path).cost
    assert read == cost and read.acceptance == 0.75
    with RunFolder.open(tmp_path, new()) as folder:
        folder.save(folder.run)
    assert json.loads(file.read_text())["cost"]["tokens_per_step"] == 2.5


def test_an_unfinished_run_continues(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new()) as folder:
        folder.append(row("a"))
    with RunFolder.open(tmp_path, new()) as folder:
        assert folder.done == {"a"} and folder.run.status == "running" and not folder.cut


@pytest.mark.parametrize("torn", [b'{"id": "b", "out', b'{"id": "b"}', b"\xff\xfe", b"{}\n", b"\0\0\0\n"])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    with RunFolder.open(tmp_path, new()) as folder:
        folder.append(row("a"))
    with (tmp_path / "predictions.jsonl").open("ab") as file:
        file.write(torn)
    with RunFolder.open(tmp_path, new()) as folder:
        assert folder.done == {"a"} and folder.cut
        folder.append(row("b"))
    assert results.read_rows(tmp_path) == [row("a"), row("b")]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new()) as folder:
        folder.append(row("a"))
    stored = (tmp_path / "predictions.jsonl").read_bytes()
    (tmp_path / "predictions.jsonl").write_bytes(b"oops\n" + stored)
    with pytest.raises(UserError, match="line 1"):
        RunFolder.open(tmp_path, new())


def test_traces_of_unfinished_examples_are_dropped(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new(trace="tokens")) as folder:
        folder.append(row("a"), [{"id": "a", "sample": 0}])
    with (tmp_path / "trace.jsonl").open("a") as stored:  # killed before its prediction
        stored.write(json.dumps({"id": "b", "sample": 0}) + "\n")
    with RunFolder.open(tmp_path, new(trace="tokens")) as folder:
        folder.append(row("b"), [{"id": "b", "sample": 1}, {"id": "b", "sample": 0}])
        folder.finish(finished(folder), ["b", "a"])
    stored = [json.loads(line) for line in (tmp_path / "trace.jsonl").read_text().splitlines()]
    assert stored == [{"id": "b", "sample": 0}, {"id": "b", "sample": 1}, {"id": "a", "sample": 0}]


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new()) as folder:
        folder.append(row("a"))
    with pytest.raises(UserError, match=r"sampling\.temperature is 0\.0 there and 0\.7 now.*--out") as error:
        RunFolder.open(tmp_path, new(sampling=Sampling(temperature=0.7)))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"data_sha256 is 0{12}\.{3} there and 1{12}\.{3} now"):
        RunFolder.open(tmp_path, new(data_sha256="1" * 64))


def test_a_run_without_rows_gives_way(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, new(trace="tokens")).close()
    with RunFolder.open(tmp_path, new(limit=5)) as folder:
        assert folder.run.spec.limit == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cost.jsonl", "predictions.jsonl", "run.json"]


def test_what_decides_nothing_may_differ() -> None:
    described = SYSTEM.model_copy(update={"description": "new words", "data": {"gsm": "hub"}})
    assert results.differences(spec(), spec(system=described)) == {}
    weaker = SYSTEM.model_copy(update={"alpha": parse_alpha(0.5)})
    assert results.differences(spec(), spec(system=weaker, alpha=parse_alpha(0.5))) == {}
    as_proxy = {"role": "proxy", "system": weaker, "alpha": parse_alpha(0.5)}
    assert set(results.differences(spec(role="proxy"), spec(**as_proxy))) == {"alpha", "system.alpha"}
    traced = spec(system=weaker, alpha=parse_alpha(0.5), trace="agreement")
    assert set(results.differences(spec(), traced)) == {"alpha", "system.alpha", "trace"}
    assert set(results.differences(traced, spec())) == {"alpha", "system.alpha", "trace"}


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, new()) as folder:
        folder.append(row("a"))
        folder.finish(finished(folder), ["a"])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with RunFolder.open(tmp_path, new()) as folder:
        assert folder.run.status == "done"
    assert before == {p.name: p.read_bytes() for p in tmp_path.iterdir()}


def test_two_processes_cannot_share_a_folder(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
from proxytune.results import RunFolder
from tests.support.new_runs import new
RunFolder.open(Path(sys.argv[1]), new())
"""
    with RunFolder.open(tmp_path, new()):
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path)],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )
    assert "another process is writing" in other.stderr
    RunFolder.open(tmp_path, new()).close()


def test_a_folder_with_predictions_of_unknown_origin_is_refused(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="cannot be continued"):
        RunFolder.open(tmp_path, new())


@pytest.mark.parametrize("content", ["{", "[]", '{"schema_version": 1}', '{"schema_version": 99}'])
def test_a_damaged_run_is_one_clear_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError) as error:
        results.read_run(tmp_path)
    assert "run.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("bytes_left", [230, 390])
def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bytes_left: int) -> None:
    """Whether it is full at the record of what an example took, or at its row."""
    real, room = os.write, [bytes_left]

    def write(fd: int, data: bytes) -> int:
        """A disk with `room` bytes left: a partial write first, then the error."""
        part = min(room[0], len(data))
        if part == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        room[0] -= part
        return real(fd, data[:part])

    with RunFolder.open(tmp_path, new()) as folder:
        folder.append(row("a"))
        monkeypatch.setattr(os, "write", write)
        with pytest.raises(UserError, match="No space left on device; finished examples are kept"):
            for name in ("b", "c"):
                folder.append(row(name))
        monkeypatch.undo()
    names = [r["id"] for r in results.read_rows(tmp_path)]
    assert names == ["a", "b"]
    with RunFolder.open(tmp_path, new()) as folder:
        assert folder.done == set(names) and not folder.cut


def test_run_json_is_replaced_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_files.write_atomically(tmp_path / "x", b"old")

    def fail(_: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="File too large"):
        run_files.write_atomically(tmp_path / "x", b"new")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x", b"old")]


# Settings and folders


def test_settings_by_their_dotted_names() -> None:
    experts = (ExpertSpec(model="e"), ExpertSpec(model="f", weight=0.5, antiexpert=ModelSpec(model="a")))
    system = SYSTEM.model_copy(update={"experts": experts, "data": {"gsm": "hub"}})
    found = results.settings(spec(system=system, sampling=Sampling(stop=("a", "\u00e9")), limit=3))
    told = {
        "task": "gsm", "role": "base", "alpha": "1", "limit": 3, "forced": None, "sampling.temperature": 0.0,
        "sampling.stop": '["a", "\u00e9"]', "sampling.ban": "[]", "system.name": "tiny",
        "system.base.model": "nowhere", "system.base.trust_remote_code": False, "system.data.gsm": "hub",
        "system.experts.0.model": "e", "system.experts.1.model": "f", "system.experts.1.weight": 0.5,
        "system.experts.1.antiexpert.model": "a", "system.experts.0.antiexpert": None, "system.expert": None,
    }  # fmt: skip
    assert {name: found[name] for name in told} == told
    assert "system.experts" not in found and "system" not in found and "system.judges" not in found


def folder_of(changes: dict[str, Any], label: str, sha256: str = "") -> str:
    """The name of a folder: a label, and the beginning of the hash of what it is of."""
    content = json.dumps({**changes, "data_sha256": sha256}, sort_keys=True).encode()
    return f"{label}-{hashlib.sha256(content).hexdigest()[:8]}"


def test_the_names_of_folders_stay_what_they_are(tmp_path: Path) -> None:
    """Runs of before are found again: the label says what differs, the hash is of that and the data."""
    for given, changes, label, sha256 in [
        ({"limit": 5}, {"limit": 5}, "limit=5", ""),
        ({"limit": 5, "shots": 2}, {"limit": 5, "shots": 2}, "limit=5,shots=2", ""),
        ({"sampling": Sampling(seed=3)}, {"sampling.seed": 3}, "seed=3", ""),
        ({"data": "a b.jsonl", "data_sha256": "7"}, {"data": "a b.jsonl"}, "data=a-b.jsonl", "7"),
        ({"forced": " (x"}, {"forced": " (x"}, "forced=-x", ""),
        ({"forced": "y" * 50}, {"forced": "y" * 50}, "forced=" + "y" * 33, ""),
        ({"forced": "y" * 30 + "/-/z"}, {"forced": "y" * 30 + "/-/z"}, "forced=" + "y" * 30, ""),
    ]:
        made = results.folder_for(tmp_path, spec(**given), spec())
        assert made == tmp_path / "tiny" / "gsm" / "base" / folder_of(changes, label, sha256)
    plain = tmp_path / "tiny" / "gsm" / "base"
    assert results.folder_for(tmp_path, spec(data_sha256="7"), spec()) == plain, "items alone change none"
    odd = SYSTEM.model_copy(update={"name": "...", "description": "x"})
    assert results.folder_for(tmp_path, spec(system=odd), spec(system=odd)).parts[-3] == "unnamed"


def test_differences_are_told_from_there_to_here() -> None:
    found = results.differences(spec(limit=3), spec(shots=2, sampling=Sampling(top_k=4)))
    assert found == {"sampling.top_k": (0, 4), "limit": (3, None), "shots": (0, 2)}
    half = spec(alpha=parse_alpha(0.5))
    assert results.differences(spec(), half) == {}, "alpha is of the proxy"
    roles = results.differences(spec(), spec(role="tuned", alpha=parse_alpha(0.5)))
    assert roles == {"role": ("base", "tuned"), "alpha": ("1", "0.5")}
    proxies = results.differences(spec(role="proxy"), spec(role="proxy", alpha=parse_alpha(0.5)))
    assert proxies == {"alpha": ("1", "0.5")}
    judged = SYSTEM.model_copy(update={"judges": {"gsm": "j"}})
    assert results.differences(spec(), spec(system=judged)) == {}
    named = SYSTEM.model_copy(update={"name": "other"})
    assert results.differences(spec(), spec(system=named)) == {"system.name": ("tiny", "other")}


def test_a_run_of_another_version_is_left_out_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, status in (("b", "done"), ("a", "done"), ("c", "running")):
        with RunFolder.open(tmp_path / name, new()) as folder:
            folder.append(row("x"))
            if status == "done":
                folder.finish(finished(folder), ["x"])
    (tmp_path / "aa").mkdir()
    (tmp_path / "aa" / results.RUN).write_text('{"schema_version": 99}')
    assert [path.name for path, _ in results.find_runs(tmp_path)] == ["a", "b"]
    said = capsys.readouterr().err
    assert "note: left out: " in said and "has schema version 99; this proxytune reads version 1" in said


def test_what_an_example_took_is_stored_with_digests_of_its_lines(tmp_path: Path) -> None:
    traces = [{"id": "a", "sample": 1}, {"id": "a", "sample": 0}]
    with RunFolder.open(tmp_path, new(trace="tokens")) as folder:
        folder.append(row("a"), traces, {"seconds": 2.5})
        [record] = [json.loads(line) for line in (tmp_path / results.COST).read_text().splitlines()]
        assert folder.records == {"a": record} and folder.done == {"a"}
    content = {
        "id": "a", "seconds": 2.5,
        "row": hashlib.sha256((tmp_path / results.PREDICTIONS).read_bytes()).hexdigest(),
        "trace": hashlib.sha256((tmp_path / results.TRACE).read_bytes()).hexdigest(),
    }  # fmt: skip
    sealed = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert record == {**content, "sha256": sealed}
    samples = [json.loads(line)["sample"] for line in (tmp_path / results.TRACE).read_text().splitlines()]
    assert samples == [0, 1] and [one["sample"] for one in results.read_traces(tmp_path)] == [0, 1]

"""What analyses share, and those by position: shares, shifts, divergences and their intervals by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from proxytune.analysis import analysis
from proxytune.analysis.positions import agreement, positions
from proxytune.analysis.tokens import ngrams
from proxytune.errors import UserError
from proxytune.records import JsonRow
from proxytune.results import read_traces
from tests.support.made_runs import response, token, write

ENDS = {"responses": response("x")}
CUT = {"responses": response("x", reason="length")}


def traced(folder: Path) -> Path:
    """Two responses: one of two tokens and end-of-sequence, one of a single token that was cut."""
    first = [
        token("A", 0.1, 0.6, top_base="B"),
        token("b", 0.5, 0.5),
        token("</s>", 0.0, 0.9, top_base="c"),
    ]
    return write(folder, [ENDS, CUT], traces=[first, [token("A", 0.2, 0.4)]])


def test_positions_by_hand(tmp_path: Path) -> None:
    found = positions(traced(tmp_path / "run"))
    assert [(row.first, row.last, row.n) for row in found.rows] == [(0, 0, 2), (1, 1, 1)]
    assert [row.changed.value for row in found.rows] == [0.5, 0.0]
    assert found.rows[0].shift.value == pytest.approx((0.5 + 0.2) / 2)
    assert found.rows[1].shift.value == 0.0 and found.rows[1].shift.low is None
    assert found.tokens == 3, "end-of-sequence is left out, as in the paper's code"
    assert found.changed.value == pytest.approx(1 / 3) and found.shift.value == pytest.approx(0.7 / 3)
    assert found.paper_changed == 0.135 and found.source.title == "made gsm as proxy, alpha 1"


def test_the_table_is_also_csv_and_json(tmp_path: Path) -> None:
    found = positions(traced(tmp_path / "run"))
    lines = list(csv.DictReader(io.StringIO(found.csv())))
    assert list(lines[0]) == [
        *("first", "last", "n", "changed", "changed_low", "changed_high"),
        *("shift", "shift_low", "shift_high"),
    ]
    assert float(lines[0]["changed"]) == 0.5 and lines[1]["shift_low"] == ""
    again = type(found).model_validate(json.loads(found.model_dump_json()))
    assert again == found


def test_of_long_responses_the_first_positions_have_rows(tmp_path: Path) -> None:
    folder = traced(tmp_path / "run")
    whole, few = positions(folder), positions(folder, singles=1)
    assert len(whole.rows) > 1 and few == whole.model_copy(update={"rows": whole.rows[:1]})


def test_a_page_reads_a_trace_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, other, read = traced(tmp_path / "run"), traced(tmp_path / "other"), []

    def counted(path: Path) -> Iterator[JsonRow]:
        read.append(path)
        return read_traces(path)

    monkeypatch.setattr(analysis, "read_traces", counted)
    alone = positions(folder)
    with analysis.read_once():
        assert [positions(folder), positions(folder)] == [alone, alone], "no analysis changes what is kept"
        assert len(ngrams(folder, min_count=1).rows) == 2 and positions(other).tokens == 3
    assert read == [folder, folder, other]
    positions(folder)
    assert read == [folder, folder, other, folder], "and nothing is kept afterwards"


def test_what_a_token_lacks_is_no_number(tmp_path: Path) -> None:
    """A schedule that stops steering leaves the experts out; half a surrogate pair is written out."""
    first = token("A", 0.1, 0.6) | {"probability": {"base": 0.1, "expert": 0.3, "proxy": 0.6}}
    folder = write(
        tmp_path / "run",
        [CUT, CUT],
        traces=[[token("b", 0.5, 0.5, kl=(1.0, 2.0))], [first, token("\ud800", 0.2, 0.4)]],
    )
    tokens = analysis.tokens_of(folder, analysis.finished(folder))
    assert [*tokens["text"]] == ["b", "A", "\\ud800"] and [*tokens["response"]] == [0, 1, 1]
    assert tokens["p_expert"].isna().tolist() == [True, False, True]
    assert tokens["kl_base"].isna().tolist() == [False, True, True]
    assert [*tokens["position"]] == [0, 0, 1] and [*tokens["end"]] == [False] * 3


def test_positions_are_grouped_for_people() -> None:
    assert analysis.bands(0) == [(0, 0)]
    assert analysis.bands(9) == [(0, 0), (1, 1), (2, 2), (3, 3), (4, 7), (8, 9)]
    covered = [at for first, last in analysis.bands(700) for at in range(first, last + 1)]
    assert covered == list(range(701))


def test_intervals() -> None:
    share = analysis.share(8, 10)
    assert share.low == pytest.approx(0.4901625, abs=1e-6) and share.high == pytest.approx(
        0.9433178, abs=1e-6
    )
    none = analysis.share(0, 5)
    assert none.low == 0 and none.high == pytest.approx(0.4344825, abs=1e-6)  # Wilson: 0 of 5
    mean = analysis.mean([1.0, 2.0, 3.0])
    assert mean.high == pytest.approx(2 + 4.302653 / np.sqrt(3), abs=1e-5)  # t of 2 degrees of freedom
    same = analysis.ratio_over_responses(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    assert (same.low, same.value, same.high) == (0.5, 0.5, 0.5)
    wide = analysis.ratio_over_responses(np.array([0.0, 4.0] * 8), np.array([4.0, 4.0] * 8))
    assert wide.low is not None and wide.high is not None and wide.low < 0.4 and wide.high > 0.6


def test_runs_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run in"):
        positions(tmp_path)
    with pytest.raises(
        UserError, match="no such trace: `proxytune eval gsm --system made --as proxy --trace`"
    ):
        positions(write(tmp_path / "plain", [ENDS]))
    with pytest.raises(UserError, match="of the base: this needs a traced run of the proxy"):
        positions(write(tmp_path / "base", [ENDS], traces=[[token("A", 1, 1)]], role="base"))
    with pytest.raises(UserError, match="--trace agreement` makes one"):
        agreement(traced(tmp_path / "tokens"))
    with pytest.raises(UserError, match="does not hold every response"):
        positions(write(tmp_path / "torn", [ENDS, CUT], traces=[[token("A", 1, 1)]]))
    with pytest.raises(UserError, match="all empty"):
        positions(write(tmp_path / "empty", [ENDS], traces=[[token("</s>", 1, 1)]]))
    running = traced(tmp_path / "running")
    text = (running / "run.json").read_text()
    (running / "run.json").write_text(text.replace('"status":"done"', '"status":"running"'))
    with pytest.raises(UserError, match="not finished"):
        positions(running)


def test_agreement_by_hand(tmp_path: Path) -> None:
    first = [
        token("A", 0.1, 0.6, kl=(0.1, 0.5), top_base="B"),
        token("</s>", 0.1, 0.6, kl=(0.0, 1.0), top_base="B", top_proxy="C"),
    ]
    second = [token("A", 0.1, 0.6, kl=(0.3, 0.7))]
    folder = write(tmp_path / "run", [ENDS, CUT], traces=[first, second], trace="agreement", role="tuned")
    found = agreement(folder)
    assert found.source.role == "tuned" and found.tokens == 3
    assert found.first_step.kl_proxy.median == pytest.approx(0.2)
    assert found.first_step.kl_base.median == pytest.approx(0.6)
    assert found.first_step.kl_base.quarter == pytest.approx(0.55)
    assert found.kl_proxy.value == pytest.approx(0.4 / 3) and found.kl_base.value == pytest.approx(2.2 / 3)
    assert found.first_step.same_proxy.value == 1.0 and found.first_step.same_base.value == 0.5
    assert found.same_proxy.value == pytest.approx(2 / 3) and found.same_base.value == pytest.approx(1 / 3)
    assert found.paper_first_step == {"proxy": 0.147, "base": 0.239}
    with pytest.raises(UserError, match="of proxy and tuned runs"):
        agreement(write(tmp_path / "base", [ENDS], traces=[first], trace="agreement", role="base"))

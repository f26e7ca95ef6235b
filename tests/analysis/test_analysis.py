"""What analyses share, and those by position: shares, shifts, divergences and their intervals by hand."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from proxytune.analysis import analysis
from proxytune.analysis.analysis import EDGES, Source, flat
from proxytune.analysis.positions import _spread, agreement, positions
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
    assert found.csv().endswith("\n") and "\r" not in found.csv()
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


def test_nested_figures_become_columns() -> None:
    metric = {"value": 1.0, "low": 0.5, "high": 2.0, "unit": "share", "n": None, "of": None}
    row = {"a": metric, "b": {"c": 3, "d": {**metric, "n": 7, "low": None}}, "e": None, "f": {"value": 4}}
    assert list(flat(row)) == [
        ("a", 1.0), ("a_low", 0.5), ("a_high", 2.0), ("b_c", 3), ("b_d", 1.0), ("b_d_low", None),
        ("b_d_high", 2.0), ("b_d_n", 7), ("e", None), ("f_value", 4),
    ]  # fmt: skip


def test_the_run_that_an_analysis_is_of(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "run", [ENDS, CUT, CUT], task="toxigen", role="expert", alpha="first:4", metric="overall"
    )
    source = Source.of(folder, analysis.finished(folder))
    assert source == Source(
        folder=str(folder), system="made", task="toxigen", role="expert", alpha="first:4", n=3,
        lower_is_better=True, hateful=True,
    )  # fmt: skip
    assert source.title == "made toxigen as expert", "alpha is the proxy's"
    proxy = source.model_copy(update={"role": "proxy"})
    assert proxy.title == "made toxigen as proxy, alpha first:4"
    plain = write(tmp_path / "plain", [ENDS])
    found = Source.of(plain, analysis.finished(plain))
    assert (found.lower_is_better, found.hateful, found.n) == (False, False, 1)
    with pytest.raises(UserError, match="this needs a traced run of the proxy"):
        analysis.steered_tokens(folder, analysis.finished(folder))


def test_the_edges_of_groups() -> None:
    assert EDGES == (0, 1, 2, 3, 4, 8, 16, 32, 64, 128, 256, 512)
    assert analysis.bands(512)[-2:] == [(256, 511), (512, 512)]
    assert analysis.bands(511)[-1] == (256, 511) and analysis.bands(600)[-1] == (512, 600)
    assert analysis.bands(5, edges=(0, 2, 4)) == [(0, 1), (2, 3), (4, 5)]


def test_intervals_that_are_not_alike_on_both_sides() -> None:
    """Wilson for 1 of 4 by its formula, t for four values, the bootstrap over three responses written out."""
    z = 1.959964
    share = analysis.share(1, 4)
    middle = (0.25 + z * z / 8) / (1 + z * z / 4)
    half = z * np.sqrt(0.25 * 0.75 / 4 + z * z / 64) / (1 + z * z / 4)
    assert (share.value, share.unit, share.n) == (0.25, "share", None)
    assert (share.low, share.high) == (pytest.approx(middle - half), pytest.approx(middle + half))
    mean = analysis.mean([0.0, 1.0, 1.0, 4.0])
    half = 3.182446 * np.sqrt(3.0 / 4)  # t of 3 degrees of freedom; the variance is 9 / 3
    assert (mean.value, mean.unit) == (1.5, "number")
    assert (mean.low, mean.high) == (pytest.approx(1.5 - half, abs=1e-5), pytest.approx(1.5 + half, abs=1e-5))
    assert analysis.mean([2.0]).model_dump(exclude_none=True) == {"value": 2.0, "unit": "number"}
    draws = np.random.default_rng(0).multinomial(3, [1 / 3] * 3, size=2000).tolist()
    ratios = [(a * 1 + b * 0 + c * 5) / (a * 2 + b * 3 + c * 5) for a, b, c in draws]
    ratio = analysis.ratio_over_responses(np.array([1.0, 0.0, 5.0]), np.array([2.0, 3.0, 5.0]))
    assert ratio.value == 0.6
    assert ratio.low == pytest.approx(np.quantile(ratios, 0.025))
    assert ratio.high == pytest.approx(np.quantile(ratios, 0.975))
    alone = analysis.ratio_over_responses(np.array([1.0]), np.array([4.0]))
    assert (alone.value, alone.low, alone.high) == (0.25, None, None)


def test_how_a_quantity_is_spread() -> None:
    found = _spread(pd.Series([10.0, 0.0, 1.0, 2.0]))
    assert (found.quarter, found.median, found.three_quarters, found.mean) == (0.75, 1.5, 4.0, 3.25)


def test_agreement_by_position_and_its_columns(tmp_path: Path) -> None:
    """The first token agrees in the proxy alone, the second in the base alone."""
    tokens = [
        token("A", 0.1, 0.6, kl=(0.25, 0.5), top_base="B"),
        token("b", 0.1, 0.6, kl=(2.0, 1.0), top_proxy="C"),
        token("c", 0.1, 0.6, kl=(3.0, 4.0)),
        token("d", 0.1, 0.6, kl=(5.0, 6.0)),
        token("e", 0.1, 0.6, kl=(7, 8)),
        token("f", 0.1, 0.6, kl=(9.0, 8.0)),
    ]
    folder = write(tmp_path / "run", [CUT], traces=[tokens], trace="agreement")
    found = agreement(folder)
    rows = [(row.first, row.last, row.n, row.kl_proxy.mean, row.kl_base.mean) for row in found.rows]
    assert rows == [
        (0, 0, 1, 0.25, 0.5),
        (1, 1, 1, 2, 1),
        (2, 2, 1, 3, 4),
        (3, 3, 1, 5, 6),
        (4, 4, 1, 7, 8),
        (5, 5, 1, 9, 8),
    ]
    assert [(row.same_proxy.value, row.same_base.value) for row in found.rows[:3]] == [(1, 0), (0, 1), (1, 1)]
    assert [(row.first, row.last, row.n) for row in found.bands] == [
        (0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 3, 1), (4, 5, 2),
    ]  # fmt: skip
    assert found.bands[4].kl_proxy.mean == 8 and found.kl_proxy.unit == found.kl_base.unit == "number"
    assert found.same_proxy.unit == "share" and found.first_step == found.rows[0]
    few = agreement(folder, singles=2)
    assert few == found.model_copy(update={"rows": found.rows[:2]})
    header = found.csv().splitlines()[0].split(",")
    assert header[:8] == [
        "first",
        "last",
        "n",
        "kl_proxy_median",
        "kl_proxy_quarter",
        "kl_proxy_three_quarters",
        "kl_proxy_mean",
        "kl_base_median",
    ]


def test_positions_in_groups_and_over_responses(tmp_path: Path) -> None:
    long = [token("x", 0.5, 0.25, top_base="y" if at % 2 else "x") for at in range(6)]
    folder = write(tmp_path / "run", [CUT, CUT], traces=[long, [token("A", 0.25, 1.0, top_base="B")]])
    found = positions(folder)
    assert (found.responses, found.tokens) == (2, 7)
    assert [(row.first, row.last, row.n, row.changed.value, row.shift.value) for row in found.bands] == [
        (0, 0, 2, 0.5, 0.25), (1, 1, 1, 1.0, -0.25), (2, 2, 1, 0.0, -0.25), (3, 3, 1, 1.0, -0.25),
        (4, 5, 2, 0.5, -0.25),
    ]  # fmt: skip
    assert found.changed.value == pytest.approx(4 / 7) and found.changed.unit == "share"
    assert found.shift.value == pytest.approx((6 * -0.25 + 0.75) / 7) and found.shift.unit == "number"
    other = write(tmp_path / "other", [CUT], traces=[[token("A", 0.1, 0.2)]], task="alpaca_farm")
    assert positions(other).paper_changed == analysis.published("changed_top1")["share"].get("alpaca_farm")

"""The benchmarks run, in miniature: every ratio, equal tokens, finite figures. No time is asserted."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cases_cpu, cases_cuda, cpu_kernels, decode, lm_eval_speed, real_models, shapes, tables
from benchmarks.baselines import PaperLoop
from benchmarks.lab import CUDA, SMOKE, Lab
from benchmarks.measure import Contender, Outcome, Timed, observe
from benchmarks.ours import Ours
from benchmarks.record import Oracle, Report
from benchmarks.workloads import log_uniform, random_contexts, uniform, workload
from proxytune.engine.kernels.linear import RowLinear
from tests.support import oracle, tiny
from tests.support.checkout import ROOT, WEIGHTS, environment
from tests.support.on_device import as_on_a_device, on_launch
from tests.support.require import require_demo
from tests.support.tiers import WHOLE, slow

pytestmark = pytest.mark.xdist_group("benchmarks")  # the tests of one run stay in one process

CPU = torch.device("cpu")
WANTED = {
    "mixed_vs_paper_best_batch",
    "long_tail_vs_paper_best_batch",
    "mixed_trio_vs_paper_best_batch",
    "speculative_vs_plain_demo",
    "speculative_vs_plain_trio",
    "speculative_trio_vs_paper_batch1",
    "speculative_trio_vs_base_hf",
    "shared_pair_vs_two_models",
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the smallest run prints."""
    require_demo()
    command = [sys.executable, str(ROOT / "benchmarks" / "decode.py"), "--device", "cpu", "--smoke", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path_factory.mktemp("run"), env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


@pytest.mark.slow
def test_every_ratio_is_there_and_positive(found: dict[str, Any]) -> None:
    assert set(found) == {"ratios", "rows", "environment"}
    assert set(found["ratios"]) >= WANTED
    assert all(math.isfinite(value) and value > 0 for value in found["ratios"].values())


@pytest.mark.slow
def test_every_row_says_what_the_oracle_says(found: dict[str, Any]) -> None:
    assert {row["case"] for row in found["rows"]} == set(cases_cpu.CASES)
    for row in found["rows"]:
        assert row["tokens_equal"] and row["diverged"] == 0, row
        assert row["widest_tie"] is None


@pytest.mark.slow
def test_every_figure_is_a_number(found: dict[str, Any]) -> None:
    optional = {"syncs_per_token", "acceptance", "accepted_per_step", "widest_tie", "dial", "versus_plain"}
    optional |= {"memory_mb"} if sys.platform != "linux" else set()
    for row in found["rows"]:
        assert row["runs"] and all(math.isfinite(speed) and speed > 0 for speed in row["runs"])
        for key, value in row.items():
            if value is None:
                unseen = {"gb_per_s", "floor_percent"} if "Hugging Face continuous" in row["name"] else set()
                assert key in optional | unseen, (key, row)
            elif isinstance(value, float):
                assert math.isfinite(value) and value >= 0, (key, row)
        if "speculative, k =" in row["name"]:
            assert 0 <= row["acceptance"] <= 1
    made = found["environment"]
    assert made["copy_gb_per_s"] > 0 and made["packages"]["torch"] and made["systems"]["demo"]


@pytest.mark.slow
def test_the_tables_hold_every_ratio_and_case(found: dict[str, Any]) -> None:
    text = tables.as_text(found)
    assert all(f"`{name}`" in text for name in found["ratios"])
    assert all(f"### {case}" in text for case in cases_cpu.CASES)
    assert "41.55 (2.54x)" in text, "the paper's own figures stand beside ours"


@pytest.mark.slow
def test_tables_are_written_between_the_marks(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readme, stored = tmp_path / "README.md", tmp_path / "cpu.json"
    readme.write_text(f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n")
    stored.write_text(json.dumps(found))
    monkeypatch.setattr(tables, "README", readme)
    tables.main(["--write", str(stored)])
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert "`mixed_vs_paper_best_batch`" in written
    tables.main(["--write", str(stored)])
    assert readme.read_text() == written


@pytest.mark.slow
def test_only_takes_cases_and_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    decode.main(["--smoke", "--json", "--only", "speculative_trio_vs_base_hf"])
    assert {row["case"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"trio_batch1"}


def test_what_is_known_is_printed_before_a_case_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(lab: Lab) -> Report:
        raise RuntimeError("the second case")

    cases = {"trio_batch1": cases_cpu.CASES["trio_batch1"], "broken": (broken, ())}
    monkeypatch.setattr(cases_cpu, "CASES", cases)
    lines = tmp_path / "rows.jsonl"
    with pytest.raises(RuntimeError, match="the second case"):
        decode.main(["--smoke", "--lines", str(lines)])
    printed = capsys.readouterr().out
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert "### trio_batch1" in printed and "`speculative_vs_plain_trio`" in printed
    assert len(rows) > 3 and all(row["name"] in printed for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "mixd"], "Did you mean: mixed"),
        (["--shape", "13b"], "13b+7b+7b"),
        (["--device", "cuda"], "CUDA"),
    ],
)
def test_user_errors_are_one_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "cuda" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(SystemExit) as ended:
        decode.main(arguments)
    shown = capsys.readouterr()
    assert ended.value.code == 2 and shown.out == "" and message in shown.err and shown.err.count("\n") == 1


def test_the_kernels_of_the_cpu_are_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu_kernels, "SHAPES", ((96, 352), (700, 600)))
    monkeypatch.setattr(cpu_kernels, "QUERIES", ((5, 2, 8, 12),))
    monkeypatch.setattr(cpu_kernels, "BEYOND_CACHE", 1_000_000)
    cpu_kernels.main(["--calls", "1"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    products = [line for line in lines if line.startswith(("| 96 x 352", "| 700 x 600"))]
    assert len(products) == 2 * len(cpu_kernels.ROWS) and len(lines) == 4 + len(products) + 4
    assert all(float(cell) > 0 for line in products for cell in line.strip("| ").split(" | ")[1:])


def test_the_gpu_cases_have_keys_with_the_prefix() -> None:
    keys = {key for _, names in cases_cuda.cases("70b-int8+7b+7b").values() for key in names}
    assert "h200_70b_int8_speculative_vs_base" in keys and all(
        key.startswith("h200_70b") or key == cases_cuda.TRAINED for key in keys
    )
    goals = {name for name in (*tables.GOALS, *tables.LIMITS) if name.startswith("h200_13b")}
    assert goals <= {key for _, names in cases_cuda.cases(CUDA.trio).values() for key in names}


BOTH_WAYS = [(case, way) for case in cases_cuda.cases("smoke") for way in (False, True)]
BOTH_WAYS.remove(("trained_batch1", False))  # the smoke run has it
MINIATURES = [slow(*one) if one[0] == "trained_batch1" else one for one in BOTH_WAYS]


@pytest.mark.parametrize(("case", "on_device"), MINIATURES)
@pytest.mark.every(4)
def test_the_gpu_cases_run_in_miniature_on_the_cpu(
    case: str, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With slots, and in steps over pages as on a GPU: drafts with synthetic acceptance too."""
    lengths = set[int]()
    if on_device:
        as_on_a_device(monkeypatch)
        on_launch(monkeypatch, lambda loop, rows, shape, steady: lengths.add(shape.ahead.k))
    run, keys = cases_cuda.cases("smoke")[case]
    report = run(Lab(CPU, SMOKE))
    assert set(report.ratios) == set(keys)
    assert all(math.isfinite(value) and value > 0 for value in report.ratios.values())
    assert all(row.tokens_equal for row in report.lines)
    assert not on_device or (0 in lengths and (max(lengths) > 0 or case == "table12"))


def test_the_papers_loop_says_what_full_forwards_say() -> None:
    bench = shapes.random_bench("smoke", CPU, torch.float64, 4)
    work = workload("ragged", random_contexts(5, 3, 12, 512), [6, 9, 4, 7, 5])
    batched, single = PaperLoop(bench, work, 4).run().tokens, PaperLoop(bench, work, 1).run().tokens
    for item in work.items:
        context = item.contexts["base"]
        plain = bench.plain
        wanted, _, _ = oracle.generate(
            plain["base"],
            [(1.0, plain["expert"], plain["antiexpert"])],
            context,
            [(context, context)],
            oracle.Settings(max_new=item.new_tokens),
        )
        assert list(batched[item.tag]) == list(single[item.tag]) == wanted


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.every(2)
def test_synthetic_acceptance_leaves_the_tokens(on_device: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if on_device:
        as_on_a_device(monkeypatch)
    bench = shapes.random_bench("smoke", CPU, torch.float64, 8)
    work = workload("synthetic", random_contexts(6, 3, 12, 512), [60] * 6)
    plain = Ours(bench, work, max_rows=6)
    truth = plain.run().tokens
    for share in (0.0, 0.5, 1.0):
        outcome = plain.with_synthetic_acceptance(share, truth, 3).run()
        assert outcome.tokens == truth
        assert abs(outcome.accepted / outcome.drafted - share) < 0.1


def test_baselines_run_hugging_faces_layers_and_ours_run_ours() -> None:
    benches = [shapes.random_bench("smoke", CPU, torch.float32, 4)]
    if WEIGHTS.is_dir():
        benches.append(shapes.demo_bench(4))
    for bench in benches:
        ours = {name: model.module for name, model in bench.decoder("proxy").loaded.items()}
        for role in shapes.TRIO:
            kinds = {type(part) for part in bench.plain[role].modules() if isinstance(part, torch.nn.Linear)}
            assert kinds == {torch.nn.Linear} and bench.plain[role].config._attn_implementation == "sdpa"
        assert any(isinstance(part, RowLinear) for part in ours["base"].modules())
        assert ours["base"].config._attn_implementation == "proxytune"


def test_divergence_is_found_with_its_margin() -> None:
    bench = shapes.random_bench("smoke", CPU, torch.float64, 4)
    work = workload("one", random_contexts(1, 5, 5, 512), [5])
    paper = PaperLoop(bench, work).contender("paper's loop")
    timed = Timed(paper, observe(paper, print))
    generated = [list(timed.observed.outcome.tokens[0])]
    assert Oracle(bench, work, dict(enumerate(generated))).check(timed) == (0, None)
    generated[0][3] += 1
    diverged, margin = Oracle(bench, work, dict(enumerate(generated))).check(timed)
    assert diverged == 1 and margin is not None and margin > 0


def test_a_quantised_base_decodes_like_the_papers_loop() -> None:
    if not shapes.SHAPES["70b-int8+7b+7b"][0].int8:
        pytest.fail("the 70B base is meant to be quantised")
    bench = shapes.random_bench("smoke-int8", CPU, torch.float32, 4)
    kinds = {type(part).__name__ for part in bench.plain["base"].modules()}
    assert "Int8Linear" in kinds
    work = workload("ragged", random_contexts(2, 4, 8, 512), [6, 8], one_by_one=True)
    assert Ours(bench, work).run().tokens == PaperLoop(bench, work).run().tokens


def test_lengths_follow_their_distribution() -> None:
    flat, tail = uniform(4000, 8, 256), log_uniform(4000, 8, 256)
    assert (min(flat), max(flat)) == (8, 256) and 8 <= min(tail) < 10 and 250 < max(tail) <= 256
    assert abs(sum(flat) / 4000 - 132) < 4
    assert abs(sum(tail) / 4000 - (256 - 8) / math.log(256 / 8)) < 4
    assert flat == uniform(4000, 8, 256)


@pytest.mark.slow
@pytest.mark.skipif(not WHOLE, reason="every case at real sizes: with PROXYTUNE_WHOLE=1")
def test_the_quick_mode_runs_whole() -> None:
    """Every case at real sizes, as `--quick --json` prints it."""
    command = [sys.executable, "benchmarks/decode.py", "--device", "cpu", "--quick", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found["ratios"]) >= WANTED and all(value > 0 for value in found["ratios"].values())
    assert all(row["widest_tie"] is None or row["widest_tie"] < 1e-3 for row in found["rows"])


def test_a_contender_that_makes_graphs_is_warmed_up_again() -> None:
    """Until a run has made none."""
    runs = list[int]()

    def run() -> Outcome:
        runs.append(1)
        return Outcome(1.0, {0: [1]}, [0.1], [0.1])

    observe(Contender("it", run, list, graphs_made=lambda: min(len(runs), 3)), lambda text: None)
    assert len(runs) == 4
    runs.clear()
    observe(Contender("it", run, list), lambda text: None)
    assert len(runs) == 1


def test_real_models_in_miniature(tmp_path: Path) -> None:
    """Both contenders are timed at both batch sizes."""
    folder = str(tiny.save(tmp_path / "model", tiny.build("llama", 1).float()))
    prompts = real_models.texts(tiny.tokenizer())
    assert len(prompts) == real_models.BATCH == 24 and prompts[0].startswith("Question: ")
    theirs = real_models.by_transformers(folder, prompts, 6)
    ours = real_models.by_us(folder, "none", prompts, 6)
    assert set(theirs) == {1, 24} and all(speed > 0 for speed in theirs.values())
    assert set(ours) == {(1, "off"), (1, "auto"), (24, "off"), (24, "auto")}
    assert all(speed > 0 for speed in ours.values())


def test_lm_eval_speed_in_miniature(tmp_path: Path) -> None:
    """Both models are asked the same, and answer the same."""
    model = tiny.build("llama", 1, max_position_embeddings=1024).float()
    folder = str(tiny.save(tmp_path / "model", model))
    asked = lm_eval_speed.requests(2, 4)
    assert [len(own) for own in asked.values()] == [8, 8, 2]
    theirs = lm_eval_speed.by_hf(folder, asked, [1, 4])
    ours = lm_eval_speed.by_us(folder, asked, "proxy")
    for kind in lm_eval_speed.KINDS:
        assert ours[kind][0] > 0 and theirs[kind][0] > 0 and theirs[kind][1] in (1, 4)
        agreement = lm_eval_speed.agreement(ours[kind][1], theirs[kind][2])
        assert agreement == "2 of 2 equal" if "responses" in kind else float(agreement) < 1e-3

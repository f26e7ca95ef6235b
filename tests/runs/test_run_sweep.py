"""Sweeps: many alphas in one engine give what single runs give; nothing finished is lost or done twice."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from proxytune import results
from proxytune.analysis.sweeps import sweep as curve
from proxytune.config import AlphaSchedule, ModelSpec, Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.request import Work
from proxytune.engine.runners.runner import ModelRunner
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, RunOptions
from proxytune.records import Completion, Run
from proxytune.runs import alpha_sweep as run_sweep
from proxytune.runs import evaluation as run
from proxytune.runs.alpha_sweep import parse_alphas, run_name
from tests.support.checkout import environment
from tests.support.runs import QUIET, evaluated

SHORT = Sampling(max_new_tokens=12)
QUIET = QUIET
ALPHAS = parse_alphas("0:2:0.5,first:4")


def texts(alphas: list[AlphaSchedule]) -> list[str]:
    """Alphas as they are written."""
    return [alpha.text for alpha in alphas]


def test_alphas_are_ranges_and_lists() -> None:
    assert texts(parse_alphas("0:2:0.2")) == [
        *("0", "0.2", "0.4", "0.6", "0.8", "1", "1.2", "1.4", "1.6", "1.8", "2"),
    ]
    assert texts(parse_alphas("0.1:0.45:0.1")) == ["0.1", "0.2", "0.3", "0.4"]
    assert texts(parse_alphas(" 0, 0.5,first:4 ,linear:0:1:200")) == ["0", "0.5", "first:4", "linear:0:1:200"]
    assert texts(parse_alphas("0:1:0.5,1,first:2:2,0.50")) == ["0", "0.5", "1", "first:2:2"]
    assert texts(parse_alphas("1")) == ["1"]


@pytest.mark.parametrize("text", ["", ",", "0:2:0", "2:0:0.5", "0:2:-1", "0:1:0.0001", "0:nan:1", "0:inf:1"])
def test_bad_ranges(text: str) -> None:
    with pytest.raises(UserError, match="--alphas"):
        parse_alphas(text)


@pytest.mark.parametrize("text", ["much", "0:2", "a:b:c", "first:x"])
def test_bad_alphas(text: str) -> None:
    with pytest.raises(UserError, match="is not a number"):
        parse_alphas(text)


def test_every_alpha_has_a_folder() -> None:
    assert [run_name(alpha) for alpha in parse_alphas("0.4,first:16,linear:0:1:9")] == [
        *("alpha=0.4", "alpha=first-16", "alpha=linear-0-1-9"),
    ]


def swept(system: System, models: Models, out: Path | None, **more: Any) -> tuple[Path, list[Run]]:
    """A quiet short sweep."""
    settings: dict[str, Any] = {"sampling": SHORT, "limit": 6, **more}
    resources = settings.pop("resources", QUIET)
    task = settings.pop("task", "gsm")
    asked = run.Evaluation(system, task, RunOptions(**settings), resources, loaded=models)
    return run_sweep.sweep(asked, ALPHAS, out)


@pytest.mark.parametrize("rows", [3, 128])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.every(4)
def test_a_sweep_says_what_single_runs_say(
    system: System, models: Models, tmp_path: Path, rows: int, sampled: bool
) -> None:
    """In float64 every alpha's rows are those of a run of its own, whatever shares its engine."""
    sampling = SHORT.model_copy(update={"temperature": 1.0, "n": 2}) if sampled else SHORT
    resources = DecodeOptions(progress=False, batch=rows)
    folder, runs = swept(system, models, tmp_path / "sweep", sampling=sampling, resources=resources)
    for alpha, made in zip(ALPHAS, runs, strict=True):
        single = tmp_path / "single" / run_name(alpha)
        alone = evaluated(
            system, "gsm", alpha=alpha, sampling=sampling, limit=6, out=single, models=models, progress=False
        )
        assert made.spec == alone.spec and made.metrics == alone.metrics
        assert results.read_rows(folder / run_name(alpha)) == results.read_rows(single)
        assert made.cost.generated_tokens == alone.cost.generated_tokens
        assert made.cost.prompt_tokens == alone.cost.prompt_tokens
    seconds = json.loads((folder / "sweep.json").read_text())["seconds"]
    assert sum(made.cost.seconds for made in runs) == pytest.approx(seconds)


def test_a_forced_opener_begins_the_responses_of_every_alpha(
    system: System, models: Models, tmp_path: Path
) -> None:
    folder, runs = swept(system, models, tmp_path / "sweep", forced=" Ex", limit=2)
    for alpha, made in zip(ALPHAS, runs, strict=True):
        rows = results.read_rows(folder / run_name(alpha))
        assert made.spec.forced == " Ex" and len(rows) == 2
        assert all(row["responses"][0]["text"].startswith(" Ex") for row in rows)


def test_every_alpha_counts_its_prompts_where_responses_differ_in_length(
    system: System, models: Models, tmp_path: Path
) -> None:
    """A share by generated tokens would give a long-winded alpha more of the prompts."""
    sampling = Sampling(max_new_tokens=40, temperature=1.0, stop=("a", "e", "t", "1"))
    _, runs = swept(system, models, tmp_path / "sweep", sampling=sampling)
    assert len({made.cost.generated_tokens for made in runs}) > 2
    asked = run.plan(system, "gsm", "proxy", RunOptions(limit=6)).data.examples
    words = models.tokenizer("base")
    prompts = sum(len(words.encode(example.prompt.plain)) for example in asked)
    assert [made.cost.prompt_tokens for made in runs] == [prompts] * len(ALPHAS)


def test_prompts_are_computed_once(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fed tokens: every prompt but its last token once, and a token per step of every row."""
    plainly = DecodeOptions(progress=False, speculate="off")
    decoder = Decoder(models, "proxy")  # loaded before anything is counted: models are tried when they are
    fed = 0
    real = ModelRunner.forward

    def forward(self: ModelRunner, work: Work) -> Any:
        nonlocal fed
        fed += sum(len(segment.ids) for segment in work.segments)
        return real(self, work)

    monkeypatch.setattr(ModelRunner, "forward", forward)
    monkeypatch.setattr("proxytune.engine.scheduler.WORTH_SHARING", 10**6)  # whole prompts only
    _, runs = swept(system, models, tmp_path, resources=plainly)
    job = run.plan(system, "gsm", "proxy", RunOptions(limit=6))
    contexts = [decoder.contexts(e.prompt) for e in job.data.examples]
    prompts = sum(len(ids) - 1 for by_model in contexts for ids in by_model.values())
    generated = 3 * sum(made.cost.generated_tokens for made in runs)
    assert fed == prompts + generated


def test_models_are_loaded_once(system: System, tmp_path: Path) -> None:
    loaded: list[str] = []

    def hear(name: str, _: ModelSpec) -> None:
        loaded.append(name)

    swept(system, Models(system, on_load=hear), tmp_path)
    assert sorted(loaded) == ["antiexpert", "base", "expert"]


def test_likelihoods_of_all_alphas_come_from_one_pass(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[int] = []
    real = ModelRunner.forward
    for role in ("base", "expert", "antiexpert"):
        models.get(role)  # which tries it

    def forward(self: ModelRunner, work: Work) -> Any:
        counted.append(len(work.keep))
        return real(self, work)

    options: dict[str, Any] = {"mode": "likelihood", "limit": 4}
    monkeypatch.setattr(ModelRunner, "forward", forward)
    _, runs = swept(system, models, tmp_path / "sweep", task="truthfulqa_mc", sampling=None, **options)
    for_all = len(counted)
    for alpha, made in zip(ALPHAS, runs, strict=True):
        counted.clear()
        single = tmp_path / run_name(alpha)
        alone = evaluated(
            system, "truthfulqa_mc", alpha=alpha, out=single, models=models, progress=False, **options
        )
        assert alone.metrics == made.metrics and len(counted) == for_all
        assert results.read_rows(single) == results.read_rows(tmp_path / "sweep" / run_name(alpha))
    assert runs[0].metrics["mc2"].value != runs[2].metrics["mc2"].value


def test_an_interrupted_sweep_continues(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = swept(system, models, tmp_path / "whole")
    real, asked = Decoder.sweep, list[str]()

    def stopping(self: Decoder, *args: Any, **kwargs: Any) -> Iterator[tuple[AlphaSchedule, Completion]]:
        for i, found in enumerate(real(self, *args, **kwargs)):
            if i == 17:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Decoder, "sweep", stopping)
    with pytest.raises(KeyboardInterrupt, match="17 of 36 examples of all alphas are kept"):
        swept(system, models, tmp_path / "parts")

    def listening(self: Decoder, pairs: Any, *args: Any, **kwargs: Any) -> Any:
        asked.extend(f"{example.id} {alpha.text}" for example, alphas in pairs for alpha in alphas)
        return real(self, pairs, *args, **kwargs)

    monkeypatch.setattr(Decoder, "sweep", listening)
    folder, runs = swept(system, models, tmp_path / "parts")
    assert len(asked) == len(set(asked)) == 36 - 17
    assert json.loads((folder / "sweep.json").read_text())["sessions"] == 2
    for alpha, made in zip(ALPHAS, runs, strict=True):
        assert made.status == "done" and made.cost.sessions in (1, 2)
        assert results.read_rows(folder / run_name(alpha)) == results.read_rows(whole / run_name(alpha))
    monkeypatch.setattr(Decoder, "__init__", lambda *_: pytest.fail("decoded again"))
    assert swept(system, models, tmp_path / "parts")[1] == runs


def test_a_sweep_takes_its_place_and_grows(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder, _ = swept(system, models, None)
    assert folder.parent.parent == Path("results/tiny/gsm/proxy") and folder.name == "sweep"
    assert folder.parent == run.plan(system, "gsm", "proxy", RunOptions(sampling=SHORT, limit=6)).folder(
        run.RESULTS
    )
    options = RunOptions(sampling=SHORT, limit=6)
    asked = run.Evaluation(system, "gsm", options, QUIET, loaded=models)
    more, _ = run_sweep.sweep(asked, parse_alphas("1,first:2"))
    assert more == folder and len(curve(folder).points) == len(ALPHAS) + 1


def test_bad_alphas_are_refused_before_anything_is_written(system: System, tmp_path: Path) -> None:
    asked = run.Evaluation(system, "gsm", RunOptions(limit=2))
    with pytest.raises(UserError, match="alpha = 11 is out of range"):
        run_sweep.sweep(asked, parse_alphas("0,11"), tmp_path / "x")
    with pytest.raises(UserError, match="allow-negative-alpha"):
        run_sweep.sweep(asked, parse_alphas("-1"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def lines_in(folder: Path) -> int:
    """Rows that the runs of a sweep have stored so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.rglob("predictions.jsonl"))


@pytest.mark.slow
def test_kill_9_loses_nothing(yaml: Path, system: System, models: Models, tmp_path: Path) -> None:
    """Killed again and again at any moment, the sweep ends as one that was left alone."""
    sampling = Sampling(max_new_tokens=24)
    options = RunOptions(sampling=sampling, limit=40)
    asked = run.Evaluation(system, "gsm", options, QUIET, loaded=models)
    whole, _ = run_sweep.sweep(asked, ALPHAS, tmp_path / "w")
    command = ["sweep-alpha", "gsm", "--system", str(yaml), "--alphas", "0:2:0.5,first:4", "--limit", "40"]
    command += ["--max-new-tokens", "24", "--batch", "16", "--out", str(tmp_path / "k")]
    code = f"from proxytune.cli.app import app; app({command!r})"
    kills = 0
    for _ in range(40):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment(), stderr=subprocess.DEVNULL)
        stored = lines_in(tmp_path / "k")
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if lines_in(tmp_path / "k") > stored + 60:
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.02)
        if process.wait() == 0:
            break
    assert kills >= 2 and process.returncode == 0
    for alpha in ALPHAS:
        one, other = (folder / run_name(alpha) for folder in (whole, tmp_path / "k"))
        assert results.read_rows(one) == results.read_rows(other)
        assert results.read_run(one).metrics == results.read_run(other).metrics

"""evaluate and generate: what is stored, what resume leaves out, and what kill -9 cannot spoil."""

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
from proxytune.config import Sampling, System, load_system
from proxytune.decoding.decoder import Decoder
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, RunOptions
from proxytune.records import Completion, Example, Prompt
from proxytune.results import RunFolder
from proxytune.runs import evaluation as run
from proxytune.runs import session as run_session
from proxytune.runs.decoders import decoder_here
from proxytune.runs.session import run_job
from proxytune.runs.steered import generate
from tests.support.checkout import environment
from tests.support.runs import QUIET, evaluated, unfinish
from tests.support.tiers import slow

SHORT = Sampling(max_new_tokens=12)


def evaluate(system: System, models: Models, out: Path, **options: Any) -> Any:
    """A quiet short evaluation."""
    settings = {"task": "gsm", "sampling": SHORT, "limit": 6, "models": models, "progress": False, **options}
    return evaluated(system, out=out, **settings)


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int, error: BaseException) -> None:
    """Make decoding fail after `count` completions."""
    real = Decoder.stream

    def stream(self: Decoder, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        for i, completion in enumerate(real(self, *args, **kwargs)):
            if i == count:
                raise error
            yield completion

    monkeypatch.setattr(Decoder, "stream", stream)


def test_a_run_explains_itself(system: System, models: Models, tmp_path: Path) -> None:
    made = evaluate(system, models, tmp_path)
    stored = results.read_run(tmp_path)
    assert stored == made and made.status == "done" and made.n == 6
    assert made.spec.system == system and made.spec.sampling == SHORT and made.spec.data == "generated"
    assert {"torch", "transformers"} <= made.made.packages.keys() and made.made.proxytune
    assert made.cost.generated_tokens > 0 and made.cost.seconds > 0 and made.cost.sessions == 1
    assert set(made.cost.memory) == {"base", "expert", "antiexpert"}
    assert all(m.weights > 0 and m.kv_peak > 0 for m in made.cost.memory.values())
    assert made.cost.process_peak > sum(m.weights for m in made.cost.memory.values())
    assert made.headline in made.metrics
    rows = results.read_rows(tmp_path)
    assert [row["id"] for row in rows] == [str(i) for i in range(6)]
    assert all(row["responses"][0]["tokens"] <= 12 and "scores" in row for row in rows)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("a crash")])
def test_an_interrupted_run_ends_like_an_uninterrupted_one(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    options = {
        "sampling": SHORT.model_copy(update={"n": 3, "temperature": 1.0}),
        "trace": "tokens",
        "batch": 4,
    }
    whole = evaluate(system, models, tmp_path / "whole", **options)
    stop_after(monkeypatch, 13, error)
    with pytest.raises(type(error)) as caught:
        evaluate(system, models, tmp_path / "parts", **options)
    if isinstance(error, KeyboardInterrupt):
        assert "of 6 examples are kept" in str(caught.value) and "same command" in str(caught.value)
    monkeypatch.undo()
    halfway = results.read_run(tmp_path / "parts")
    kept = {row["id"] for row in results.read_rows(tmp_path / "parts")}
    assert (
        halfway.status == "running" and 0 < halfway.n == len(kept) < 6 and halfway.cost.generated_tokens > 0
    )
    parts = evaluate(system, models, tmp_path / "parts", **options)
    assert parts.metrics == whole.metrics and parts.n == whole.n == 6 and parts.cost.sessions == 2
    assert parts.cost.generated_tokens >= whole.cost.generated_tokens
    for name in (results.PREDICTIONS, results.TRACE):
        assert _ids(tmp_path / "parts" / name) == _ids(tmp_path / "whole" / name)
    assert results.read_rows(tmp_path / "parts") == results.read_rows(tmp_path / "whole")


def test_memory_is_that_of_the_session_that_took_most(system: System, models: Models, tmp_path: Path) -> None:
    whole = evaluate(system, models, tmp_path)
    unfinish(tmp_path, 5)
    again = evaluate(system, models, tmp_path)
    assert again.cost.memory == whole.cost.memory and again.cost.sessions == 2


def test_the_drafts_of_all_sessions_are_counted(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What run.json says of drafts is about both sessions of a continued run."""
    used: list[Decoder] = []
    init = Decoder.__init__

    def noted(self: Decoder, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        used.append(self)

    def stored() -> dict[str, Any]:
        found: dict[str, Any] = json.loads((tmp_path / results.RUN).read_text())["cost"]
        return found

    def quotients_are_right(cost: dict[str, Any]) -> None:
        assert cost["acceptance"] == cost["accepted"] / cost["examined"]
        assert cost["accepted_per_step"] == cost["accepted"] / cost["row_steps"]
        assert cost["tokens_per_step"] == cost["generated_tokens"] / cost["row_steps"]

    # a random model loops, so its own tokens make good drafts
    options = {"as_": "base", "batch": 2, "speculate": 3, "sampling": Sampling(max_new_tokens=80)}
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 3, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            evaluate(system, models, tmp_path, **options)
    halfway = stored()
    monkeypatch.setattr(Decoder, "__init__", noted)
    made = evaluate(system, models, tmp_path, **options)
    ended, (second,) = stored(), used
    for name in ("generated_tokens", "row_steps", "drafted", "examined", "accepted"):
        assert halfway[name] > 0 and halfway[name] <= ended[name], name
        assert ended[name] == halfway[name] + getattr(second.stats, name), name
    for cost in (halfway, ended):
        quotients_are_right(cost)
    assert ended["sessions"] == 2 and made.cost.acceptance == ended["acceptance"]


def _ids(path: Path) -> list[tuple[str, int]]:
    return [(row["id"], row.get("sample", 0)) for row in map(json.loads, path.read_text().splitlines())]


def test_resume_decodes_only_what_is_missing(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(system, models, tmp_path)
    stored = results.read_run(tmp_path)
    unfinish(tmp_path, 4)
    asked: list[str] = []
    real = Decoder.stream

    def stream(self: Decoder, examples: Any, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        asked.extend(example.id for example in examples)
        return real(self, examples, *args, **kwargs)

    monkeypatch.setattr(Decoder, "stream", stream)
    assert evaluate(system, models, tmp_path).metrics == stored.metrics
    assert asked == ["4", "5"]


def test_a_finished_run_is_returned_and_not_decoded_again(
    system: System,
    models: Models,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = evaluate(system, models, tmp_path)
    monkeypatch.setattr(Decoder, "__init__", lambda *_: pytest.fail("decoded again"))
    assert evaluate(system, models, tmp_path, progress=True) == first
    assert "done already" in capsys.readouterr().err


def test_a_folder_that_vanishes_ends_the_run_at_the_next_row(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = Decoder.stream, list[str]()

    def stream(self: Decoder, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        for completion in real(self, *args, **kwargs):
            if len(asked) == 2:
                (tmp_path / "run").rename(tmp_path / "away")
            asked.append(completion.example_id)
            yield completion

    monkeypatch.setattr(Decoder, "stream", stream)
    with pytest.raises(UserError, match="was deleted or moved while this run was going on: it stops here"):
        evaluate(system, models, tmp_path / "run", batch=1)
    assert len(asked) == 3 and not (tmp_path / "run").exists()
    assert len(results.read_rows(tmp_path / "away")) == 2


def test_a_row_of_no_example_is_found_before_anything_is_decoded(
    system: System, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(system, models, tmp_path)
    unfinish(tmp_path, 3)
    with RunFolder.open(tmp_path, results.read_run(tmp_path)) as folder:
        folder.append({"id": "another", "responses": [], "scores": {}})
    monkeypatch.setattr(Decoder, "__init__", lambda *_: pytest.fail("decoded"))
    with pytest.raises(
        UserError, match=r"predictions\.jsonl' is damaged: 'another' is no example of this run"
    ):
        evaluate(system, models, tmp_path)


def test_other_settings_are_refused(system: System, models: Models, tmp_path: Path) -> None:
    evaluate(system, models, tmp_path)
    with pytest.raises(UserError, match=r"alpha is 1 there and 0\.5 now"):
        evaluate(system, models, tmp_path, alpha=0.5)
    with pytest.raises(UserError, match=r"sampling.seed is 0 there and 3 now"):
        evaluate(system, models, tmp_path, seed=3)


def test_default_settings_and_others_get_their_folders(system: System, tmp_path: Path) -> None:
    plain = run.plan(system, "gsm", "base", RunOptions())
    assert plain.folder(tmp_path) == tmp_path / "tiny" / "gsm" / "base"
    assert plain.spec.model_copy(update={"data_sha256": ""}) == plain.defaults.model_copy(
        update={"data_sha256": ""}
    )
    other = run.plan(system, "gsm", "proxy", RunOptions(alpha=0.4, limit=3))
    assert other.folder(tmp_path).parent == tmp_path / "tiny" / "gsm" / "proxy"
    assert other.folder(tmp_path).name.startswith("alpha=0.4,limit=3-")


def test_alpha_is_the_proxys(system: System) -> None:
    with pytest.raises(UserError, match="proxy only"):
        run.plan(system, "gsm", "base", RunOptions(alpha=0.5))
    with pytest.raises(UserError, match="allow-negative-alpha"):
        run.plan(system, "gsm", "proxy", RunOptions(alpha=-1))
    assert (
        run.plan(system, "gsm", "proxy", RunOptions(alpha=-1, allow_negative_alpha=True)).spec.alpha.end == -1
    )


def test_all_roles_in_one_go(system: System, tmp_path: Path) -> None:
    options = RunOptions(sampling=SHORT, limit=3, alpha=0.5)
    runs = run.Evaluation(system, "truthfulqa_mc", options, QUIET).run_all(tmp_path)
    assert list(runs) == ["base", "antiexpert", "expert", "proxy", "tuned"]
    assert {folder.name for folder, _ in results.find_runs(tmp_path)} == set(runs)
    assert runs["proxy"].spec.alpha.text == "0.5" and runs["base"].spec.alpha.text == "1"


def test_forced_text_begins_every_response(system: System, models: Models, tmp_path: Path) -> None:
    job = run.plan(system, "gsm", "base", RunOptions(sampling=SHORT, limit=2, forced=" Exactly"))
    run_job(job, tmp_path, decoder_here(models), QUIET)
    assert all(row["responses"][0]["text"].startswith(" Exactly") for row in results.read_rows(tmp_path))


def test_examples_are_whole_and_in_order() -> None:
    examples = [Example(id=name, prompt=Prompt(plain="", user="")) for name in "ab"]

    def completion(name: str, sample: int) -> Completion:
        return Completion(name, sample, "", (), "eos", 0.0)

    stream = iter([completion("b", 1), completion("a", 0), completion("b", 0), completion("a", 1)])
    counts = {e.id: 2 for e in examples}
    found = [(e.id, [c.sample for c in cs]) for e, cs in run_session.whole_examples(stream, examples, counts)]
    assert found == [("b", [0, 1]), ("a", [0, 1])]


def test_generate_keeps_the_order_of_prompts(system: System, models: Models) -> None:
    sampling = Sampling(max_new_tokens=5, n=2, temperature=1.0)
    prompts = ["a long prompt that takes its time", "b", "short"]
    outs = generate(system, prompts, sampling=sampling, models=models)
    assert [o.sample for o in outs] == [0, 1] * 3
    assert [o.example_id for o in outs[::2]] == [o.example_id for o in outs[1::2]]
    alone = generate(system, prompts[:1], sampling=sampling, models=models)
    assert [o.token_ids for o in alone] == [o.token_ids for o in outs[:2]]
    with pytest.raises(UserError, match="list of texts"):
        generate(system, "oops", models=models)


def test_the_public_names_are_the_ones_documented() -> None:
    import proxytune

    assert proxytune.evaluate is run.evaluate and proxytune.generate is generate
    assert (
        proxytune.System is System and proxytune.Sampling is Sampling and proxytune.load_system is load_system
    )
    with pytest.raises(AttributeError):
        _ = proxytune.nothing


def wait_for_rows(path: Path, count: int, process: subprocess.Popen[str]) -> None:
    """Wait until `count` rows are stored; fails when the process ends before."""
    for _ in range(6000):
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        assert process.poll() is None, f"ended too early: {process.communicate()[1]}"
        time.sleep(0.02)
    pytest.fail("no rows within two minutes")


@pytest.mark.parametrize("how", [slow(signal.SIGKILL), signal.SIGINT])
def test_a_killed_process_is_continued(
    yaml: Path, system: System, models: Models, tmp_path: Path, how: signal.Signals
) -> None:
    options = ["--limit", "30", "--batch", "1", "--max-new-tokens", "20", "--out", str(tmp_path / "killed")]
    process = subprocess.Popen(
        [sys.executable, "-m", "proxytune", "eval", "gsm", "--system", str(yaml), *options],
        cwd=tmp_path,
        env=environment(OMP_NUM_THREADS="1"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell that runs the tests in the background has its children ignore Ctrl-C
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for_rows(tmp_path / "killed" / results.PREDICTIONS, 4, process)
    process.send_signal(how)
    _, printed = process.communicate()
    assert process.returncode == (-9 if how == signal.SIGKILL else 130)
    if how == signal.SIGINT:
        assert "30 examples are kept" in printed.splitlines()[-1] and "Traceback" not in printed
    assert results.read_run(tmp_path / "killed").status == "running"
    same = {"limit": 30, "batch": 15, "sampling": Sampling(max_new_tokens=20)}  # the batch decides nothing
    done = {name: evaluate(system, models, tmp_path / name, **same) for name in ("killed", "whole")}
    assert done["killed"].metrics == done["whole"].metrics and done["killed"].cost.sessions == 2
    assert results.read_rows(tmp_path / "killed") == results.read_rows(tmp_path / "whole")


@pytest.mark.parametrize("speculate", ["auto", 0, 1, 5])
@pytest.mark.every(2)
def test_speculation_changes_no_token(speculate: str | int, system: System) -> None:
    sampling = Sampling(max_new_tokens=12, temperature=0.8, n=2)
    off, how = DecodeOptions(speculate="off"), DecodeOptions(speculate=speculate)  # type: ignore[arg-type]
    plain = generate(system, ["ab", "c d"], sampling=sampling, decode=off)
    assert generate(system, ["ab", "c d"], sampling=sampling, decode=how) == plain


def test_sampled_text_does_not_depend_on_what_else_is_asked(system: System, models: Models) -> None:
    hot = Sampling(max_new_tokens=6, temperature=1.0)
    one, other = generate(system, ["a", "b"], sampling=hot, models=models)
    assert [c.text for c in generate(system, ["b", "a"], sampling=hot, models=models)] == [
        other.text,
        one.text,
    ]
    twice = generate(system, ["a", "a"], sampling=hot, models=models)
    assert twice[0].text == one.text and twice[1].token_ids != one.token_ids


def test_a_mistyped_task_under_data_is_refused(system: System, tmp_path: Path) -> None:
    wrong = system.model_copy(update={"data": {"gms": "generated"}})
    with pytest.raises(UserError, match="Did you mean: gsm"):
        evaluated(wrong, "gsm", out=tmp_path)


def test_invalid_unicode_is_one_line(system: System, models: Models) -> None:
    with pytest.raises(UserError, match="not valid Unicode"):
        generate(system, ["a\ud800b"], models=models)

"""What a run says beside its figures: changed prompts, responses that failed, were cut or are empty."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from proxytune import results
from proxytune.analysis import analysis
from proxytune.config import Sampling, System, load_system, parse_alpha
from proxytune.records import Run
from proxytune.runs import alpha_sweep
from proxytune.runs.steered import generate
from tests.support import tiny, tiny_system
from tests.support.chat_templates import CHOOSY, GEMMA, TURNS
from tests.support.command_line import proxytune, refused
from tests.support.runs import QUIET, evaluated, evaluation_of

SHORT = Sampling(max_new_tokens=6)


def chat_system(folder: Path, template: str) -> System:
    """The tiny system with a chat expert."""
    system = load_system(tiny_system.write(folder))
    assert system.expert is not None and system.expert.model is not None
    tiny.tokenizer(chat_template=template).save_pretrained(system.expert.model)
    return system.model_copy(update={"expert": system.expert.model_copy(update={"chat": "tokenizer"})})


def test_a_changed_prompt_is_said_once_per_role(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system, asked = chat_system(tmp_path, GEMMA), {"limit": 3, "sampling": SHORT, "progress": True}
    made = evaluated(system, "truthfulqa", out=tmp_path / "run", **asked)
    [note] = [note for note in made.notes if "expert" in note]
    assert "takes no system message: the system text begins the first user message" in note
    assert capsys.readouterr().err.count(note) == 1
    assert results.read_run(tmp_path / "run") == made
    evaluated(system, "truthfulqa", out=tmp_path / "run", **asked)
    assert capsys.readouterr().err.count(note) == 1, "a stored result says it again"
    plain = evaluated(system, "gsm", out=tmp_path / "gsm", **asked)
    assert not any("system message" in note for note in plain.notes), "gsm has none"


def test_one_bad_example_is_stored_with_its_reason(tmp_path: Path) -> None:
    system = chat_system(tmp_path, TURNS)
    asked = {"limit": 4, "sampling": SHORT, "trace": "tokens"}
    whole = evaluated(system, "gsm", out=tmp_path / "whole", **asked)
    questions = [row["question"] for row in results.read_rows(tmp_path / "whole")]
    word = next(
        word for word in questions[2].split() if not any(word in q for q in (*questions[:2], questions[3]))
    )
    system = chat_system(tmp_path, CHOOSY.replace("zebra", word) + TURNS)
    made = evaluated(system, "gsm", out=tmp_path / "run", **asked)
    assert made.n == 4 and made.cost.generated_tokens < whole.cost.generated_tokens
    rows, others = results.read_rows(tmp_path / "run"), results.read_rows(tmp_path / "whole")
    assert [row["id"] for row in rows] == [row["id"] for row in others]
    reason = "the chat template of the expert fails on gsm: no animals"
    [failed] = rows[2]["responses"]
    assert failed == {"text": "", "finish_reason": "template", "tokens": 0, "remark": reason}
    assert [row for row in rows if row["id"] != rows[2]["id"]] == [
        row for row in others if row["id"] != rows[2]["id"]
    ]
    assert f"1 of 4 responses were not asked: {reason}" in made.notes
    assert made.metrics["faulty"].value == 0.25 and rows[2]["scores"] == {} and rows[2]["fault"] == "template"
    tokens = analysis.tokens_of(tmp_path / "run", made)
    assert set(tokens["response"]) == {0, 1, 3}


def test_a_prompt_that_a_template_refuses_is_an_error_of_generate(tmp_path: Path) -> None:
    """There is no other example that could go on."""
    chat_system(tmp_path, CHOOSY + TURNS)
    path = tmp_path / "tiny.yaml"
    path.write_text(path.read_text().replace("./expert,", "./expert, chat: tokenizer,"))
    for more in ([], ["--compare"], ["--json"]):
        reason = "the chat template of the expert fails: no animals"
        refused(proxytune("generate", "a zebra", "--system", path, "--max-new-tokens", 3, *more), reason)
    assert proxytune("generate", "a cat", "--system", path, "--max-new-tokens", 3).exit_code == 0


def test_responses_that_a_window_cut_are_counted(system: System, tmp_path: Path) -> None:
    long = Sampling(max_new_tokens=5000, min_new_tokens=5000)
    made = evaluated(system, "gsm", as_="antiexpert", out=tmp_path, limit=2, sampling=long)
    [note] = [note for note in made.notes if "cut short" in note]
    assert note.startswith(
        "2 of 2 responses were cut short: the context window of the antiexpert (1024 tokens)"
    )
    for row in results.read_rows(tmp_path):
        [said] = row["responses"]
        assert said["finish_reason"] == "length" and said["remark"] in note and said["tokens"] < 1024


def silent(folder: Path) -> System:
    """A model that ends at once, whatever it is asked."""
    model = tiny.build("llama", 1, max_position_embeddings=1024)
    model.generation_config.eos_token_id = list(range(tiny.VOCABULARY))  # type: ignore[union-attr]
    path = folder / "silent.yaml"
    tiny.save(folder / "model", model)
    path.write_text(
        "base: {model: ./model, dtype: float64}\ndata: {gsm: generated, truthfulqa_mc: generated}\n"
    )
    return load_system(path)


def test_many_empty_responses_are_pointed_out(tmp_path: Path, system: System) -> None:
    system_that_is_silent = silent(tmp_path)
    made = evaluated(system_that_is_silent, "gsm", as_="base", out=tmp_path / "gsm", limit=3)
    [note] = made.notes
    assert note.startswith("3 of 3 responses are empty: ") and "chat: tokenizer" in note
    scored = evaluated(
        system_that_is_silent, "truthfulqa_mc", as_="base", out=tmp_path / "mc", limit=2, mode="likelihood"
    )
    assert scored.notes == (), "texts that are scored are not generated"
    with pytest.warns(UserWarning, match="1 of 1 responses are empty"):
        generate(system_that_is_silent, ["hi"], as_="base", decode=QUIET)
    done = proxytune("generate", "hi", "--system", tmp_path / "silent.yaml", "--as", "base")
    assert done.exit_code == 0 and "note: 1 of 1 responses are empty" in done.stderr
    assert evaluated(system, "gsm", as_="base", out=tmp_path / "other", limit=3, sampling=SHORT).notes == ()


def test_every_alpha_of_a_sweep_has_its_notes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = chat_system(tmp_path, GEMMA)
    asked = evaluation_of(system, "truthfulqa", limit=2, sampling=SHORT, progress=True)
    _, runs = alpha_sweep.sweep(asked, [parse_alpha(0), parse_alpha(1)], tmp_path / "sweep")
    assert all(any("takes no system message" in note for note in run.notes) for run in runs)
    assert "note: alpha=1: the chat template of the expert" in capsys.readouterr().err


def test_a_run_without_notes_is_still_read(system: System, tmp_path: Path) -> None:
    """Runs that were stored before there were any."""
    made = evaluated(system, "gsm", as_="base", out=tmp_path, limit=1, sampling=SHORT)
    stored = json.loads((tmp_path / "run.json").read_text())
    del stored["notes"], stored["seal"]
    assert Run.model_validate(stored) == made.model_copy(update={"notes": ()})

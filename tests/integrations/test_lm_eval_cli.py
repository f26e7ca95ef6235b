"""`proxytune lm-eval`: lm-eval's files, our runs of them, and one line for what is wrong."""

from __future__ import annotations

import functools
import json
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from proxytune.integrations import lm_eval_cli
from proxytune.records import Run
from proxytune.results import find_runs, read_rows
from tests.support import lm_eval_tasks
from tests.support.checkout import ROOT
from tests.support.command_line import proxytune, python, refused
from tests.support.require import require_or_skip

try:
    import datasets
    import lm_eval.tasks
    import lm_eval.utils
    from lm_eval.api.registry import get_model
except ImportError:
    require_or_skip("lm-eval", "lm-eval is not installed")


@pytest.fixture(scope="module", autouse=True)
def _quick_and_offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No index of lm-eval's own tasks, which takes ten seconds; no hub; no log that outlives its stream."""
    without_index = functools.partialmethod(lm_eval.tasks.TaskManager.__init__, include_defaults=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval.tasks.TaskManager, "__init__", without_index)
        patch.setattr(lm_eval.utils, "setup_logging", lambda level: None)
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr("proxytune.hub.reachable", lambda: False)
        yield


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A task of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "sums": lm_eval_tasks.write(folder, "sums", lm_eval_tasks.GENERATE, lm_eval_tasks.sums(4)),
        "choose": lm_eval_tasks.write(folder, "choose", lm_eval_tasks.CHOOSE, lm_eval_tasks.choices(4)),
        "read": lm_eval_tasks.write(folder, "read", lm_eval_tasks.READ, lm_eval_tasks.texts(2)),
    }


def runs(folder: Path) -> dict[str, Run]:
    return {str(path.relative_to(folder)): run for path, run in find_runs(folder)}


def test_results_are_lm_evals_files_and_runs(yaml: Path, tasks: dict[str, Path], tmp_path: Path) -> None:
    named = ",".join(map(str, tasks.values()))
    done = proxytune("lm-eval", "--system", yaml, "--tasks", named, "--num_fewshot", 1, "--out", tmp_path)
    assert done.exit_code == 0, (done.output, done.exception)
    assert "exact_match" in done.stdout and "word_perplexity" in done.stdout
    [path] = (tmp_path / "tiny" / "lm-eval").glob("*/results_*.json")
    stored = json.loads(path.read_text())
    assert len(list(path.parent.glob("samples_*.jsonl"))) == 3
    assert stored["config"]["proxytune"]["system"]["name"] == "tiny" and stored["n-shot"]["sums"] == 1
    found = runs(tmp_path)
    assert list(found) == [f"tiny/lm-eval:{name}/proxy" for name in ("choose", "read", "sums")]
    for name in tasks:
        run = found[f"tiny/lm-eval:{name}/proxy"]
        theirs = {key: v for key, v in stored["results"][name].items() if "," in key and "stderr" not in key}
        assert {key.removesuffix(",none"): v for key, v in theirs.items()} == pytest.approx(
            {key: metric.value for key, metric in run.metrics.items()}
        )
        assert run.status == "done" and run.spec.shots == (1 if name != "read" else run.spec.shots)
        assert "lm-eval 0." in run.notes[0] and "3 tasks ran together" in run.notes[-1]
    assert found["tiny/lm-eval:sums/proxy"].spec.sampling.stop == ("Question:",)
    rows = read_rows(tmp_path / "tiny" / "lm-eval:choose" / "proxy")
    assert [row["id"] for row in rows] == ["0", "1", "2", "3"] and len(rows[0]["responses"]) == 4
    assert all(response["logprob"] < 0 for response in rows[0]["responses"])
    shown = proxytune("report", tmp_path, "--html", tmp_path / "page.html", "--examples", 1)
    assert shown.exit_code == 0 and "lm-eval:sums" in (tmp_path / "page.html").read_text(), shown.output


@pytest.mark.slow
def test_runs_of_other_settings_get_folders_of_their_own(
    yaml: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    usual = ["lm-eval", "--system", yaml, "--tasks", tasks["choose"], "--out", tmp_path]
    for more in ([], [], ["--alpha", "0.5"], ["--num_fewshot", "2"], ["--limit", "2"], ["--as", "base"]):
        done = proxytune(*usual, *more)
        assert done.exit_code == 0, (done.output, done.exception)
    found = runs(tmp_path / "tiny" / "lm-eval:choose")
    assert len(found) == 5 and {"base", "proxy"} <= set(found)
    assert found["proxy"].cost.generated_tokens > 0 and found["proxy"].cost.memory
    by_alpha = {run.spec.alpha.text for run in found.values() if run.spec.role == "proxy"}
    assert by_alpha == {"1", "0.5"} and {run.n for run in found.values()} == {2, 4}
    assert found["base"].metrics["acc"].low is not None


# One line


BROKEN = """\
task: broken
dataset_path: json
dataset_kwargs: {data_files: {test: not-there.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "x"
metric_list: [{metric: exact_match}]
"""
ON_THE_HUB = BROKEN.replace("dataset_path: json", "dataset_path: openai/gsm8k").replace("dataset_kwargs", "#")
RAISES = BROKEN.replace('"{{question}}"', "!function raises.text")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--tasks", "gsm9k"], ["Tasks not found: gsm9k", "lm-eval ls tasks"]),
        (["--tasks", "x", "--nonsense", "1"], ["unrecognized arguments: --nonsense 1", "lm-eval run --help"]),
        (["--tasks", "x", "--model", "hf"], ["--model 'hf' is not for a system: use --system"]),
        (["--tasks", "x", "--device", "cpu"], ["--device 'cpu' is not for a system: use `device_map`"]),
        (["--tasks", "x", "--fewshot_as_multiturn", "true"], ["`apply_chat_template` must be set"]),
        (["--tasks", "x", "--limit", "many"], ["argument --limit/-L: invalid float value: 'many'"]),
        (["--tasks", "./broken.yaml"], ["not-there.jsonl"]),
        (["--tasks", "./hub.yaml"], ["needs data from the hub, which cannot be reached", "openai/gsm8k"]),
        (["--tasks", "./raises.yaml"], ["this is no task"]),
        (["--tasks", "{sums}", "--gen_kwargs", "num_beams=4"], ["num_beams=4"]),
        (["--tasks", "{sums}", "--apply_chat_template"], ["no model of system 'tiny' has a chat format"]),
        (["--tasks", "{sums}", "--model_args", "kv=4GB"], ["unknown key 'kv'. Known: batch"]),
        (["--tasks", "{sums}", "--as", "expret"], ["Unknown role 'expret'. Did you mean: expert"]),
        (["--tasks", "{sums}", "--alpha", "-1"], ["alpha = -1 is negative", "--allow-negative-alpha"]),
    ],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str],
    parts: list[str],
    yaml: Path,
    tasks: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.yaml").write_text(BROKEN)
    Path("hub.yaml").write_text(ON_THE_HUB)
    Path("raises.yaml").write_text(RAISES)
    Path("raises.py").write_text("raise RuntimeError('this is no task')\n")
    given = [text.format(sums=tasks["sums"]) for text in arguments]
    done = proxytune("lm-eval", "--system", yaml, *given)
    assert done.exit_code == 2, (done.output, done.exception)
    line = done.stderr.splitlines()[-1]
    assert line.startswith("error: ") and all(part in line for part in parts), line
    assert "loading " not in done.stderr and not list(tmp_path.rglob("run.json"))


def test_what_fails_while_the_model_answers_keeps_its_traceback(
    yaml: Path, tasks: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr("proxytune.integrations.lm_eval.likelihoods", fails)
    done = proxytune("lm-eval", "--system", yaml, "--tasks", tasks["choose"], "--out", tmp_path)
    assert done.exit_code == 1 and isinstance(done.exception, ValueError)


def test_a_missing_extra_is_named(yaml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    refused(proxytune("lm-eval", "--system", yaml, "--tasks", "x"), "pip install 'proxytune[lmeval]'")


@pytest.mark.parametrize(
    "arguments", [["--system", "demoo"], ["--as", "expret"], ["--alpha", "11"], ["--alpha", "much"]]
)
def test_a_wrong_system_role_or_alpha_waits_for_nothing(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom proxytune.cli.app import app\n"
        "try:\n    app(['lm-eval', '--tasks', 'x', *sys.argv[1:]])\n"
        "except SystemExit as end:\n"
        "    print(end.code, {'torch', 'lm_eval', 'datasets'} & set(sys.modules))\n"
    )
    assert python(code, *arguments).stdout.split("\n")[0] == "2 set()"


def test_the_entry_point_is_the_model() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert declared["lm_eval.models"] == {lm_eval_cli.NAME: lm_eval_cli.TARGET}
    module, _, name = lm_eval_cli.TARGET.partition(":")
    lm_eval_cli.register()
    lm_eval_cli.register()
    assert get_model(lm_eval_cli.NAME) is getattr(import_module(module), name)


def test_where_its_results_are(tmp_path: Path) -> None:
    """In a folder of the model's name below a folder; beside a file, whose name gets the date."""
    names = (
        "out_2026-11-30T10-00-00.json",
        "outer_2026.json",
        "m/results_2026.json",
        "m/samples_gsm_2026.json",
    )
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    assert lm_eval_cli._results_in(tmp_path / "out.json") == [tmp_path / names[0]]
    assert lm_eval_cli._results_in(tmp_path) == [tmp_path / names[2]]

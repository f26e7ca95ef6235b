"""The command line: quick help, JSON alone on stdout, and one clear line with exit code 2 for bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from proxytune import hub, results
from proxytune.cli import app as cli
from proxytune.decoding.decoder import Decoder
from proxytune.engine.speculative.drafter import Speculation
from proxytune.errors import UserError
from proxytune.options import DecodeOptions
from proxytune.records import Completion
from proxytune.report import tables
from proxytune.sandbox.sandbox import Sandbox
from tests.support import tiny, tiny_system
from tests.support.command_line import proxytune, python, refused

pytestmark = pytest.mark.usefixtures("somewhere_else")

COMMANDS = (
    *("demo", "generate", "eval", "score", "judge", "export", "report", "reproduce", "tasks", "systems"),
    *("sweep-alpha", "check"),
)
GSM = {"question": "Ann has 2 nuts and finds 3. How many?", "answer": "2+3=5\n#### 5"}


# Help


HEAVY = "torch transformers pandas datasets peft numpy"


def test_help_and_import_load_nothing_heavy() -> None:
    code = f"""
import sys
import proxytune
from proxytune.cli.app import app
for command in {COMMANDS!r}:
    try:
        app([command, "--help"])
    except SystemExit as end:
        assert not end.code
print([name for name in "{HEAVY}".split() if name in sys.modules])
"""
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_loads_few_modules() -> None:
    """What `proxytune --help` costs is what it imports: counted, since seconds are the machine's."""
    done = python(
        "import sys\nfrom proxytune.cli.app import app\ntry:\n    app(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code\nprint(len(sys.modules))"
    )
    assert done.returncode == 0 and "eval" in done.stdout
    assert int(done.stdout.splitlines()[-1]) < 600


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    shown = proxytune(command, "--help")
    assert shown.exit_code == 0 and f"Example: proxytune {command}" in " ".join(shown.stdout.split())


def test_version_and_python_m() -> None:
    done = python(
        "import runpy, sys; sys.argv = ['x', '--version']; runpy.run_module('proxytune', run_name='__main__')"
    )
    assert done.stdout.startswith("proxytune 0.")


# What commands print


def test_tasks_and_systems() -> None:
    assert "gsm" in proxytune("tasks").stdout and "demo" in proxytune("systems").stdout
    assert set(json.loads(proxytune("tasks", "--json").stdout)["tasks"]) >= {
        "gsm",
        "truthfulqa",
        "truthfulqa_mc",
    }
    assert json.loads(proxytune("systems", "--json").stdout)["systems"]["demo"]["alpha"] == "1"


def test_tasks_say_what_can_run_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)

    def listed() -> dict[str, Any]:
        found: dict[str, Any] = json.loads(proxytune("tasks", "--json").stdout)["tasks"]
        return found

    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setattr(hub, "stored", lambda name, kind="model": False)
    offline = listed()
    assert len(offline) == 9 and not any(task["runs_here"] for task in offline.values())
    assert all("the hub does not answer: --data FILE" in task["missing"] for task in offline.values())
    assert offline["gsm"]["runs_on_demo"] and offline["toxigen"]["missing_judge"]
    assert "the judge needs OPENAI_API_KEY" in offline["alpaca_farm"]["missing"]

    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(Sandbox, "open", lambda *_: None)
    monkeypatch.setenv("OPENAI_API_KEY", "x")
    online = listed()
    assert all(task["runs_here"] for name, task in online.items() if name not in ("ds1000", "alpaca_farm"))
    assert {name: task["items"] for name, task in online.items()} == {
        "alpaca_farm": 805, "gsm": 1319, "toxigen": 2800, "truthfulqa": 817, "truthfulqa_mc": 817,
        "humaneval": 164, "ds1000": 200, "triviaqa": 11313, "realtimeqa": 3531,
    }  # fmt: skip
    assert all(task["licence"] and task["data"] for task in online.values())

    def refuse(*_: object) -> None:
        raise UserError("nothing isolates here")

    monkeypatch.setattr(Sandbox, "open", refuse)
    assert "no sandbox: nothing isolates here" in listed()["humaneval"]["missing"]


def short_eval(yaml: Path, *more: object) -> Result:
    """A short evaluation of the tiny system."""
    return proxytune("eval", "gsm", "--system", yaml, "--limit", 3, "--max-new-tokens", 6, *more)


def test_eval_prints_stores_and_scores_again(yaml: Path, tmp_path: Path) -> None:
    printed = short_eval(yaml, "--out", "run", "--trace", "--kv-memory", "64MB", "--batch", 2)
    assert printed.exit_code == 0, printed.output
    assert "exact_match" in printed.stdout and "stored in run" in printed.stdout
    again = short_eval(yaml, "--out", "run", "--trace", "--json")
    run = json.loads(again.stdout)
    assert run["status"] == "done" and "done already" in again.stderr
    assert (tmp_path / "run" / "trace.jsonl").read_text().count("\n") == 3
    scored = json.loads(proxytune("score", "gsm", "run/predictions.jsonl", "--json").stdout)
    assert scored["metrics"] == run["metrics"] and scored["n"] == 3
    assert "exact_match" in proxytune("score", "gsm", "run/predictions.jsonl").stdout


def test_eval_all_prints_the_gap(yaml: Path, tmp_path: Path) -> None:
    found = json.loads(short_eval(yaml, "--as", "all", "--json").stdout)
    assert set(found["runs"]) == {"base", "expert", "antiexpert", "proxy", "tuned"} and "gap_closed" in found
    assert "cost" not in found["runs"]["base"] and found["runs"]["base"]["status"] == "done"
    shown = short_eval(yaml, "--as", "all")
    assert shown.exit_code == 0 and "proxy" in shown.stdout and "memory" in shown.stdout
    assert len(results.find_runs(tmp_path / "results" / "tiny" / "gsm")) == 5
    tables = proxytune("report", "results", "--markdown")
    assert tables.exit_code == 0 and "| proxy |" in tables.stdout
    written = proxytune("report", "results", "--write")
    assert written.exit_code == 0 and (tmp_path / "results" / "README.md").exists()


def test_eval_as_several_roles(yaml: Path, tmp_path: Path) -> None:
    made = short_eval(yaml, "--as", "proxy, base", "--out", "two", "--json", "--verbose")
    found = json.loads(made.stdout)
    assert list(found["runs"]) == ["base", "proxy"] and "cost" in found["runs"]["proxy"]
    assert {path.name for path in (tmp_path / "two").iterdir()} == {"base", "proxy"}
    one = json.loads(short_eval(yaml, "--as", "base", "--out", "two/base", "--json").stdout)
    assert one["folder"] == "two/base" and one["as"] == "base" and "cost" not in one and "spec" not in one
    assert one["metrics"] == found["runs"]["base"]["metrics"]
    for roles, part in (
        ("base,bsae", "Did you mean: base"),
        ("base,all", "role 'all'"),
        ("base,", "role ''"),
    ):
        refused(short_eval(yaml, "--as", roles), part)


def test_the_readme_gets_the_demo_table_between_its_markers(yaml: Path, tmp_path: Path) -> None:
    named_demo = yaml.with_name("demo.yaml")
    named_demo.write_text(yaml.read_text())
    assert short_eval(named_demo, "--as", "all").exit_code == 0
    for role in (tmp_path / "results" / "demo" / "gsm").iterdir():
        [folder] = role.iterdir()
        for path in folder.iterdir():  # as if these were the task's default settings
            path.rename(role / path.name)
        folder.rmdir()
    (tmp_path / "README.md").write_text("before\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nafter\n")
    assert proxytune("report", "--write").exit_code == 0
    text = (tmp_path / "README.md").read_text()
    made = tables.readme_table([found for _, found in results.find_runs(tmp_path / "results")])
    assert text == f"before\n<!-- demo-table -->\n{made}<!-- /demo-table -->\nafter\n"
    assert made.splitlines()[2].startswith("| gsm (exact_match, %) |") and made.endswith("| 3 |\n")


def test_generate_streams_and_compares(yaml: Path) -> None:
    common = ("generate", "Ann has", "--system", yaml, "--max-new-tokens", 8)
    streamed = proxytune(*common)
    assert streamed.exit_code == 0, streamed.output
    printed = json.loads(proxytune(*common, "--json").stdout)["responses"]
    assert streamed.stdout == printed[0]["text"] + "\n" and len(printed[0]["token_ids"]) <= 8
    several = json.loads(proxytune(*common, "--json", "-n", 2, "--temperature", 1, "--as", "expert").stdout)
    assert len(several["responses"]) == 2 and several["as"] == "expert"
    compared = json.loads(proxytune(*common, "--compare", "--json").stdout)
    assert set(compared["roles"]) == {"base", "expert", "antiexpert", "proxy", "tuned"}
    assert compared["roles"]["proxy"] == printed[0]
    shown = proxytune(*common, "--compare")
    assert f"{len(compared['changed'])} of {len(compared['proxy_tokens'])} tokens" in shown.stdout
    unchanged = json.loads(proxytune(*common, "--compare", "--alpha", 0, "--json").stdout)
    assert unchanged["changed"] == []
    assert unchanged["roles"]["proxy"]["text"] == unchanged["roles"]["base"]["text"]


def test_generate_shows_responses_by_number_whichever_ends_first(
    yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ("generate", "Ann has", "--system", yaml, "--max-new-tokens", 4, "-n", 3, "--temperature", 1)
    shown, printed = proxytune(*common).stdout, proxytune(*common, "--json").stdout
    stream = Decoder.stream

    def last_first(self: Decoder, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        return reversed(list(stream(self, *args, **kwargs)))

    monkeypatch.setattr(Decoder, "stream", last_first)
    assert proxytune(*common).stdout == shown and shown.count("--- ") == 3
    assert proxytune(*common, "--json").stdout == printed
    texts = [response["text"] for response in json.loads(printed)["responses"]]
    assert len(set(texts)) == 3 and shown.startswith(f"--- 1\n{texts[0]}\n--- 2\n{texts[1]}\n--- 3\n")


@pytest.fixture
def decoders(monkeypatch: pytest.MonkeyPatch) -> list[Decoder]:
    """Whatever has decoded, in order."""
    found: list[Decoder] = []
    stream = Decoder.stream

    def noted(self: Decoder, *args: Any, **kwargs: Any) -> Iterator[Completion]:
        found.append(self)
        return stream(self, *args, **kwargs)

    monkeypatch.setattr(Decoder, "stream", noted)
    return found


HOW_FAR = {"off": 0, "3": 3, "auto": None}
"""--speculate -> the draft length that the decoder is given."""
BAD_DRAFTS = [
    (("--speculate", "maybe"), "--speculate 'maybe': give 'auto', 'off' or a length from 0 to 15"),
    (("--speculate", "16"), "--speculate '16'"),
    (("--drafter", "typo"), "no expert 'typo' to draft: choose expert or lookup"),
]


def test_generate_speculates_as_asked(yaml: Path, decoders: list[Decoder]) -> None:
    common = ("generate", "Ann has", "--system", yaml, "--max-new-tokens", 8, "--json")
    drafted = []
    for how in HOW_FAR:
        printed = json.loads(proxytune(*common, "--speculate", how, "--drafter", "expert").stdout)
        drafted.append([response["token_ids"] for response in printed["responses"]])
    assert drafted[0] == drafted[1] == drafted[2]
    assert [d.speculation for d in decoders] == [Speculation(k=k, drafter="expert") for k in HOW_FAR.values()]
    assert decoders[0].stats.examined == 0 < decoders[1].stats.examined
    printed = json.loads(proxytune(*common, "--drafter", "lookup").stdout)
    assert [response["token_ids"] for response in printed["responses"]] == drafted[0]
    assert (
        decoders[3].speculation == Speculation(drafter="lookup")
        and decoders[3].ensemble.draft_models("lookup") == ()
    )
    for options, line in BAD_DRAFTS:
        refused(proxytune(*common, *options), line)


def test_eval_speculates_as_asked(yaml: Path, tmp_path: Path, decoders: list[Decoder]) -> None:
    costs, rows = [], []
    for how in HOW_FAR:
        ended = short_eval(
            yaml, "--out", how, "--json", "--verbose", "--speculate", how, "--drafter", "expert"
        )
        costs.append(json.loads(ended.stdout)["cost"])
        rows.append(results.read_rows(tmp_path / how))
    assert rows[0] == rows[1] == rows[2] and len(rows[0]) == 3
    assert [d.speculation for d in decoders] == [Speculation(k=k, drafter="expert") for k in HOW_FAR.values()]
    assert costs[0]["examined"] == 0 < costs[1]["examined"]
    assert costs[0]["acceptance"] is None and costs[0]["tokens_per_step"] == 1
    for number, (options, line) in enumerate(BAD_DRAFTS):
        refused(short_eval(yaml, "--out", f"bad{number}", *options), line)
        assert not results.find_runs(tmp_path / f"bad{number}")


def test_compare_refuses_what_it_would_ignore(yaml: Path) -> None:
    common = ("generate", "Ann has", "--system", yaml, "--max-new-tokens", 3)
    refused(proxytune(*common, "--compare", "-n", 2), "one response of each role: leave -n 2 out")
    refused(proxytune(*common, "--compare", "--as", "base"), "leave --as base out")
    refused(proxytune(*common, "--as", "all"), "--compare shows all of them side by side")
    assert proxytune(*common, "--compare", "--as", "all").exit_code == 0


def test_a_mistyped_model_is_an_error_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's own library tries for half a minute before it says that there is no network."""
    monkeypatch.setattr(hub, "reachable", lambda: False)
    Path("typo.yaml").write_text("base: {model: llama2-13b-typo}\n")
    asked = ("eval", "gsm", "--system", "typo.yaml", "--as", "base", "--data", gsm_file())
    refused(proxytune(*asked), "cannot load 'llama2-13b-typo'", "A folder's name begins with ./")
    asked = ("eval", "gsm", "--system", "demo", "--data", "hub", "--limit", 1)
    refused(proxytune(*asked), "cannot load 'openai/gsm8k' from the hub", "--data FILE")


def test_shots_from_without_shots(yaml: Path) -> None:
    asked = ("eval", "gsm", "--system", yaml, "--shots-from", gsm_file())
    refused(proxytune(*asked), "say how many with --shots N")
    mc = ("eval", "truthfulqa_mc", "--system", yaml, "--mode", "likelihood", "--shots", 2)
    refused(proxytune(*mc, "--shots-from", gsm_file()), "leave --shots-from out")


def test_generate_reads_stdin(yaml: Path) -> None:
    arguments = ["generate", "-", "--system", str(yaml), "--max-new-tokens", "3"]
    assert CliRunner().invoke(cli.app, arguments, input="Ann has").exit_code == 0
    refused(CliRunner().invoke(cli.app, arguments, input=" \n"), "prompt is empty")
    refused(CliRunner().invoke(cli.app, arguments, input=b"\xff\n"), "the prompt on stdin is no utf-8 text")


# Bad input: one clear line, exit code 2


def write(path: str, lines: Sequence[str]) -> str:
    """A file in the working folder."""
    Path(path).write_text("\n".join(lines) + "\n")
    return path


PLAIN = [
    (("eval", "gms"), ("Unknown task 'gms'", "Did you mean: gsm")),
    (("score", "gms", "x.jsonl"), ("Unknown task 'gms'", "Did you mean: gsm")),
    (("eval", "gsm", "--system", "dmo"), ("Unknown system 'dmo'", "Did you mean: demo")),
    (("eval", "gsm", "--system", "nowhere.yaml"), ("no file 'nowhere.yaml'",)),
    (("score", "gsm", "nowhere.jsonl"), ("no file 'nowhere.jsonl'",)),
    (("report", "nowhere"), ("no folder 'nowhere'",)),
    (("report", "."), ("no finished run",)),
]


@pytest.mark.parametrize(("arguments", "parts"), PLAIN)
def test_bad_names_and_files(arguments: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused(proxytune(*arguments), *parts)


OPTIONS = [
    (("--as", "prxy"), ("Unknown role 'prxy'", "Did you mean: proxy")),
    (("--alpha", "nan"), ("alpha = nan is out of range", "from 0 to 10")),
    (("--alpha", "11"), ("alpha = 11 is out of range",)),
    (("--alpha", "-11", "--allow-negative-alpha"), ("alpha = -11 is out of range",)),
    (("--alpha", "much"), ("alpha 'much' is not a number", "first:N")),
    (("--alpha", "-0.5"), ("--allow-negative-alpha",)),
    (("--alpha", "0.5", "--as", "base"), ("proxy only",)),
    (("--data", "nowhere.jsonl"), ("no file 'nowhere.jsonl'",)),
    (("--limit", "0"), ("--limit 0",)),
    (("--shots", "-1"), ("--shots -1",)),
    (("--temperature", "-1"), ("--temperature", "greater than or equal to 0")),
    (("--temperature", "nan"), ("--temperature",)),
    (("--top-p", "0"), ("--top-p", "greater than 0")),
    (("--max-new-tokens", "0"), ("--max-new-tokens",)),
    (("--kv-memory", "lots"), ("--kv-memory 'lots'", "4GB")),
    (("--kv-memory", "1"), ("raise --kv-memory",)),
    (("--batch", "0"), ("--batch 0",)),
    (("--vocab", "loose"), ("--vocab 'loose'",)),
]


@pytest.mark.parametrize(("options", "parts"), OPTIONS)
def test_bad_options(yaml: Path, options: tuple[str, ...], parts: tuple[str, ...]) -> None:
    refused(proxytune("eval", "gsm", "--system", yaml, *options), *parts)
    assert not list(Path().rglob("predictions.jsonl")) or options == ("--kv-memory", "1")


SPEC = "{model: ./nowhere}"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("base: {model: x}\nexprt: {model: y}\n", ("Unknown key 'exprt'", "Did you mean: expert")),
        ("base: {model: x, dtpe: float32}\n", ("Unknown key 'dtpe'", "Did you mean: dtype")),
        ("base: [\n", ("cannot read 'bad.yaml'", "line")),
        ("- base\n", ("'bad.yaml' must hold a mapping",)),
        ("alpha: 1\n", ("base", "required")),
        (
            f"base: {SPEC}\nexpert: {SPEC}\nantiexpert: {SPEC}\nalpha: .nan\n",
            ("alpha = nan is out of range",),
        ),
        ("base: {model: ./nowhere}\n", ("no model folder", "nowhere")),
    ],
)
def test_bad_system_files(text: str, parts: tuple[str, ...]) -> None:
    Path("bad.yaml").write_text(text)
    role = "proxy" if "antiexpert" in text else "base"
    refused(proxytune("eval", "gsm", "--system", "bad.yaml", "--as", role, "--data", gsm_file()), *parts)


def gsm_file() -> str:
    """One word problem."""
    return write("one.jsonl", [json.dumps(GSM)])


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"question": "torn', ("line 2", "not JSON")),
        ("[1]", ("line 2", "object")),
        ('{"question": "no answer"}', ("line 2", "answer")),
        ('{"question": 1, "answer": "#### 1"}', ("line 2", "question", "text")),
    ],
)
def test_bad_data_lines_are_named(yaml: Path, line: str, parts: tuple[str, ...]) -> None:
    bad = write("bad.jsonl", [json.dumps(GSM), line])
    refused(proxytune("eval", "gsm", "--system", yaml, "--data", bad), "bad.jsonl", *parts)


def test_mismatched_vocabularies(yaml: Path) -> None:
    folder = yaml.parent / "swapped"
    tiny.save(folder, tiny.build("llama", seed=9, hidden_size=32), tiny.tokenizer(swapped=("a", "b")))
    other = yaml.with_name("mismatch.yaml")
    other.write_text(yaml.read_text().replace("./expert", "./swapped"))
    line = refused(short_eval(other), "expert")
    assert "vocab" in line and "'a'" in line and "'b'" in line


def test_a_prompt_longer_than_the_window(yaml: Path) -> None:
    long = write("long.jsonl", [json.dumps({**GSM, "question": "nuts " * tiny_system.WINDOW})])
    refused(short_eval(yaml, "--data", long), str(tiny_system.WINDOW))
    refused(proxytune("generate", "nuts " * tiny_system.WINDOW, "--system", yaml), str(tiny_system.WINDOW))


def test_a_folder_with_other_settings(yaml: Path) -> None:
    assert short_eval(yaml, "--out", "run").exit_code == 0
    refused(short_eval(yaml, "--out", "run", "--alpha", "0.5"), "alpha is 1 there and 0.5 now", "--out")
    refused(proxytune("eval", "gsm", "--system", yaml, "--out", "run"), "limit is 3 there and unset now")


@pytest.mark.slow
def test_a_full_disk_loses_nothing(yaml: Path, tmp_path: Path) -> None:
    """The operating system refuses a file beyond a size: what was stored stays, and the same command goes
    on."""
    arguments = [
        "eval",
        "gsm",
        "--system",
        str(yaml),
        "--limit",
        "40",
        "--max-new-tokens",
        "6",
        "--batch",
        "2",
    ]
    limited = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
from proxytune.cli.app import app
app(sys.argv[1:])
"""
    done = python(limited, *arguments, "--out", "full")
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: cannot write") and "File too large" in last and "continue" in last
    kept = results.read_rows(tmp_path / "full")
    assert 0 < len(kept) < 40 and (tmp_path / "full" / "predictions.jsonl").read_bytes().endswith(b"\n")
    assert results.read_run(tmp_path / "full").status == "running"
    freed = json.loads(proxytune(*arguments, "--out", "full", "--json", "--verbose").stdout)
    whole = json.loads(proxytune(*arguments, "--out", "whole", "--json", "--verbose").stdout)
    assert freed["metrics"] == whole["metrics"] and freed["cost"]["sessions"] == 2
    assert results.read_rows(tmp_path / "full") == results.read_rows(tmp_path / "whole")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("proxytune.cli.console.print_table", fail)
    found = proxytune("tasks")
    assert found.exit_code == 1 and isinstance(found.exception, RuntimeError)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512 MiB", 512 * 2**20),
        ("1.5g", 1_500_000_000),
        ("1024", 1024),
        ("2KiB", 2048),
        ("3KB", 3000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert DecodeOptions(kv_memory=text).kv_memory == size


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "4XB", "nan"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="no amount of memory"):
        DecodeOptions(kv_memory=text)

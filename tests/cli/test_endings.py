"""How commands end, and what a conversation says of its settings: without a model."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import typer

from proxytune import __version__
from proxytune.cli import app as cli
from proxytune.cli import console
from proxytune.cli.chat import lines as chat_lines
from proxytune.cli.chat.session import ChatSession
from proxytune.cli.commands import evaluate, systems
from proxytune.cli.options import OptionGroup, build, option_name
from proxytune.config import ModelSpec, load_system, parse_alpha
from proxytune.errors import UserError
from proxytune.options import (
    ApiOptions,
    DecodeOptions,
    EngineOptions,
    JudgeOptions,
    RayOptions,
    RunOptions,
)
from proxytune.runs import evaluation
from proxytune.tasks import TASKS
from tests.support.command_line import proxytune

# How a command ends


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Any:
    """A command in which something goes wrong."""

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(systems, "system_names", fail)
    return proxytune("systems")


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("wrong\n  in two lines"), 2, "error: wrong in two lines"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyboardInterrupt("stopped: the same command goes on"), 130, "stopped: the same command goes on"),
        (OSError(errno.ENOSPC, "No space left", "f.json"), 2, "error: 'f.json': No space left"),
    ],
)
def test_errors_are_one_line_and_a_code(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = failing(monkeypatch, error)
    assert (found.exit_code, found.stderr, found.stdout) == (code, f"{line}\n", "")


REFUSED = "ENAMETOOLONG EACCES EPERM EROFS ENOSPC EDQUOT ENOTDIR EISDIR ELOOP"


@pytest.mark.parametrize("name", REFUSED.split())
def test_what_the_system_refuses_is_no_bug(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    number = getattr(errno, name)
    found = failing(monkeypatch, OSError(number, os.strerror(number), "f"))
    assert found.exit_code == 2 and found.stderr == f"error: 'f': {os.strerror(number)}\n"


@pytest.mark.parametrize(
    "error",
    [OSError(errno.ENOSPC, "No space left"), OSError(errno.ENOENT, "None such", "f"), ValueError("a bug")],
)
def test_a_bug_has_code_1(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    found = failing(monkeypatch, error)
    assert found.exit_code == 1 and found.exception is error


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("evla",), "error: No such command 'evla'. Did you mean 'eval'?. See: proxytune --help"),
        (("eval", "gsm", "--nope"), "error: No such option: --nope. See: proxytune eval --help"),
        (("analyze", "positions"), "error: Missing argument 'RUN'. See: proxytune analyze positions --help"),
        (("--nope",), "error: No such option: --nope. See: proxytune --help"),
    ],
)
def test_words_that_are_none_name_the_help(words: tuple[str, ...], line: str) -> None:
    found = proxytune(*words)
    assert found.exit_code == 2 and found.stdout == ""
    start, _, end = line.partition(". ")
    assert found.stderr.startswith(start) and found.stderr.endswith(f"{end.rpartition('. ')[2]}\n")


def test_the_version_and_the_help_of_groups() -> None:
    assert proxytune("--version").stdout == f"proxytune {__version__}\n"
    assert "Begin with: proxytune demo" in proxytune().output
    assert cli.paragraphs("a\n  b\n\n  c") == "a b\n\nc"


# Options


def test_what_an_option_is_called_and_what_is_wrong_with_it() -> None:
    assert option_name("max_new_tokens") == "--max-new-tokens"
    with pytest.raises(UserError, match=r"^--batch 0: Input should be greater than or equal to 1"):
        build(DecodeOptions, {"batch": 0})
    assert build(DecodeOptions, {"batch": 3}).batch == 3


def test_a_group_is_its_record_or_what_was_given() -> None:
    left = OptionGroup(RunOptions, "t", leave_out=frozenset({"sampling"}), defaults={"limit": 5})
    assert "sampling" not in left.fields and "limit" in left.fields
    given = {"limit": 3, "shots": None, "data": "x"}
    assert left.made(given) == RunOptions(limit=3, data="x")
    changes = OptionGroup(RunOptions, "t", changes=True)
    assert changes.made({**given, "shots": 0, "trace": []}) == {"limit": 3, "data": "x", "shots": 0}
    by_name = {one.name: one for one in left.parameters()}
    assert by_name["limit"].default == 5 and by_name["shots"].default == RunOptions().shots
    assert all(one.default is None for one in changes.parameters())


@pytest.mark.parametrize(
    ("words", "read"),
    [
        ([], []), (["--trace"], ["--trace", "tokens"]), (["--trace", "off"], ["--trace", "off"]),
        (["--trace", "agreement"], ["--trace", "agreement"]),
        (["--trace", "--limit", "3"], ["--trace", "tokens", "--limit", "3"]),
        (["--ray"], ["--ray", "local"]), (["--ray", "auto"], ["--ray", "auto"]),
        (["--ray", "local"], ["--ray", "local"]), (["--ray", "host:123"], ["--ray", "host:123"]),
        (["--ray", "--workers", "2"], ["--ray", "local", "--workers", "2"]), (["tokens"], ["tokens"]),
    ],
)  # fmt: skip
def test_options_that_may_come_without_a_value(
    words: list[str], read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate.TyperCommand, "parse_args", lambda self, ctx, args: args)
    assert evaluate.EvalCommand("eval").parse_args(None, words) == read


def test_sampling_that_was_given_stands_in_place_of_the_task_s() -> None:
    usual = RunOptions(limit=3)
    assert evaluate.with_sampling("gsm", usual, {}) is usual
    changed = evaluate.with_sampling("gsm", usual, {"temperature": 0.5})
    own = TASKS["gsm"].sampling
    assert changed.limit == 3 and changed.sampling == own.model_copy(update={"temperature": 0.5})
    with pytest.raises(UserError, match="--temperature -1"):
        evaluate.with_sampling("gsm", usual, {"temperature": -1.0})


@pytest.mark.parametrize(("task", "sandbox", "said"), [
    ("gsm", None, ""), ("humaneval", None, f"note: {console.NOT_ALLOWED}\n"),
    ("humaneval", SimpleNamespace(backend="bwrap", warning="weak"),
     "code runs in the sandbox 'bwrap'\nwarning: weak\n"),
    ("humaneval", SimpleNamespace(backend="bwrap", warning=""), "code runs in the sandbox 'bwrap'\n"),
])  # fmt: skip
def test_a_base_behind_an_api_has_the_judge_s_price_and_limit(
    task: str, sandbox: Any, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = list[Any]()

    def prepare(*given: Any) -> Any:
        made.append(given)
        return SimpleNamespace(check=lambda: made.append("checked"), sandbox=sandbox)

    monkeypatch.setattr(evaluation, "Evaluation", prepare)
    judge = JudgeOptions(yes=True, max_cost=2.5, price="1,2")
    models: Any = SimpleNamespace(system="s")
    evaluate.prepared(models, task, RunOptions(limit=3), DecodeOptions(batch=5), judge, ApiOptions())
    (system, named, run, decode, judged, _, given), checked = made
    assert (system, named, run.limit, decode.batch, judged, given) == ("s", task, 3, 5, judge, models)
    assert (decode.api.yes, decode.api.max_cost, decode.api.price) == (True, 2.5, judge.price)
    assert checked == "checked" and capsys.readouterr().err == said


def test_workers_are_asked_for_with_ray() -> None:
    asked: Any = SimpleNamespace(
        system=SimpleNamespace(endpoint=None), options=SimpleNamespace(trace="off", defer=None)
    )
    assert evaluate.decoded_by(asked, EngineOptions(), RayOptions()) is asked
    with pytest.raises(UserError, match="--workers and --gpus-per-worker are of --ray"):
        evaluate.on_workers(asked, RayOptions(workers=3))
    asked.system.endpoint = object()
    with pytest.raises(UserError, match="a base behind an API is asked by one process"):
        evaluate.on_workers(asked, RayOptions(ray="local"))
    asked.system = load_system("demo").model_copy(
        update={"base": ModelSpec(model="demo://base", device_map="tensor")}
    )
    with pytest.raises(UserError, match="which --ray cannot use"):
        evaluate.on_workers(asked, RayOptions(ray="local"))


# Conversations


class Typed:
    """Lines that a person types, or that come from a pipe."""

    def __init__(self, *lines: str | BaseException, interactive: bool = True) -> None:
        self.interactive, self.left = interactive, list(lines)

    def next(self) -> str | None:
        """The next line."""
        if not self.left:
            return None
        found = self.left.pop(0)
        if isinstance(found, BaseException):
            raise found
        return found


class Answer:
    """An answer in two pieces; `stop` ends it after the first."""

    def __init__(self, text: str) -> None:
        self.text, self.stopped, self.completion = text, False, None

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *_: object) -> None:
        self.completion = None if self.stopped else self.text  # type: ignore[assignment]

    def __iter__(self) -> Iterator[str]:
        yield f"so {self.text}"
        if not self.stopped:
            yield "."

    def stop(self) -> None:
        """No more pieces."""
        self.stopped = True


class Talk:
    """A conversation without a model."""

    def __init__(self) -> None:
        self.as_, self.asked, self.resets = "proxy", list[str](), 0
        self.system: str | None = None
        self._alpha = parse_alpha(1)
        self.prepared = list[str]()
        roles = ("base", "expert", "proxy")
        self.model = SimpleNamespace(system=SimpleNamespace(roles=roles), prepare=self.prepared.append)

    @property
    def alpha(self) -> Any:
        """As it was set."""
        return self._alpha

    @alpha.setter
    def alpha(self, text: Any) -> None:
        self._alpha = parse_alpha(text)

    def ask(self, text: str) -> Answer:
        """Remember what was asked."""
        self.asked.append(text)
        return Answer(text)

    def reset(self) -> None:
        """Count it."""
        self.resets += 1


def talked(*lines: str | BaseException, interactive: bool = True) -> tuple[Talk, ChatSession]:
    """A session to its end."""
    talk: Any = Talk()
    session = ChatSession(talk, Typed(*lines, interactive=interactive))
    session.run()
    return talk, session


def test_what_is_asked_and_what_is_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    talk, session = talked("  ", "why", "//why", "/reset", "/quit", "never", interactive=False)
    assert talk.asked == ["why", "/why"] and talk.resets == 1 and session.ended
    assert capsys.readouterr() == ("so why.\nso /why.\n", ""), "a pipe gets the answers alone"


def test_settings_are_said_to_a_person(capsys: pytest.CaptureFixture[str]) -> None:
    talk, _ = talked(
        "/alpha", "/alpha 0.5", "/as base", "/alpha", "/as", "/system", "/system  Be brief. ", "/system",
        "/system -", "/reset", "/as all", "/alpha x", "/nope",
    )  # fmt: skip
    *said, alpha, unknown = capsys.readouterr().err.splitlines()
    assert said == [
        "alpha 1", "alpha 0.5", "as base; the others: expert, proxy", "alpha 0.5, of the proxy",
        "as base; the others: expert, proxy", "no system message", "system message: Be brief.",
        "system message: Be brief.", "no system message", "a new conversation",
        "error: one role answers at a time: /compare shows all of them side by side",
    ]  # fmt: skip
    assert alpha.startswith("error: alpha 'x'") and unknown.startswith("error: Unknown command '/nope'")
    assert (talk.as_, talk.system, talk.alpha.text) == ("base", None, "0.5") and talk.prepared == ["base"]


def test_ctrl_c_goes_on_for_a_person_and_ends_a_pipe(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(self: Talk, question: str | None) -> None:
        self.asked.append(str(question))
        raise KeyboardInterrupt

    monkeypatch.setattr(Talk, "compare", interrupted, raising=False)
    talk, _ = talked("/compare", "/compare  why ", "/reset")
    assert talk.asked == ["None", "why"] and talk.resets == 1
    assert capsys.readouterr() == ("\n\n", "stopped\nstopped\na new conversation\n")
    with pytest.raises(KeyboardInterrupt):
        talked("/compare", interactive=False)
    with pytest.raises(UserError, match="Unknown command"):
        talked("/nope", interactive=False)
    handler = signal.getsignal(signal.SIGINT)
    talked("why")
    assert signal.getsignal(signal.SIGINT) is handler, "put back after each answer"


def test_an_answer_that_is_stopped_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(self: Answer) -> Iterator[str]:
        yield "so"
        signal.raise_signal(signal.SIGINT)
        if not self.stopped:
            yield " on"

    monkeypatch.setattr(Answer, "__iter__", stopped)
    talked("why")
    out, err = capsys.readouterr()
    assert out == "proxy> so\n" and err == (
        "stopped: what there is of the answer stays in the conversation\n"
    )


def test_lines_come_from_a_terminal_where_both_ends_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for typed, shown, kind in (
        (True, True, "TerminalLines"),
        (True, False, "PipedLines"),
        (False, True, "PipedLines"),
    ):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda typed=typed: typed))
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda shown=shown: shown))
        monkeypatch.setattr(chat_lines, "_edit_lines", lambda words: None)
        made = chat_lines.lines([])
        assert type(made).__name__ == kind and made.interactive is (kind == "TerminalLines")


def test_typed_lines_go_on_after_a_backslash_and_begin_anew_after_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chat_lines, "_edit_lines", lambda words: None)
    given: list[Any] = ["one\\", "two", "half\\", KeyboardInterrupt(), "whole"]
    given += [UnicodeDecodeError("utf-8", b"x", 0, 1, "bad"), "again", EOFError()]
    prompts = list[str]()

    def typed(prompt: str) -> str:
        prompts.append(prompt)
        found = given.pop(0)
        if isinstance(found, BaseException):
            raise found
        return str(found)

    monkeypatch.setattr("builtins.input", typed)
    lines = chat_lines.TerminalLines([])
    assert [lines.next() for _ in range(4)] == ["one\ntwo", "whole", "again", None]
    assert prompts == ["you> ", "...> ", "you> ", "...> ", *["you> "] * 4]
    assert capsys.readouterr() == (
        "\n\n", "Ctrl-D or /quit ends\nerror: the message is no utf-8 text: bad\n",
    )  # fmt: skip


def test_a_pipe_that_ends_in_a_backslash_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\\\n"))
    lines = chat_lines.PipedLines()
    assert [lines.next(), lines.next()] == ["a", None]


def test_typer_s_exit_is_what_commands_raise() -> None:
    assert isinstance(cli._usage(SimpleNamespace(ctx=None, format_message=lambda: "m.")), typer.Exit)

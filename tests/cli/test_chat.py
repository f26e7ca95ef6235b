"""`proxytune chat`, from a pipe and at a terminal."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pexpect
import pytest
from typer.testing import CliRunner, Result

from proxytune import Chat
from proxytune.cli import app as cli
from proxytune.cli.chat.lines import PipedLines
from proxytune.cli.chat.session import ChatSession
from proxytune.config import ModelSpec, load_system
from proxytune.errors import UserError
from proxytune.models import Models
from proxytune.runs.steered import SteeredModel
from tests.support.checkout import ROOT, environment
from tests.support.command_line import refused
from tests.support.real import checkpoint

pytestmark = pytest.mark.xdist_group("chat")  # its tests share a terminal, in their order

QUESTION = (
    "Answer the following question.\\\n\\\nQuestion: Jinin has 52 beads. Jinin sells 12. Then the pile grows "
    "2 times. How many beads does Jinin have now?"
)
PROMPT = "you> "


def piped(text: str | bytes, *arguments: str) -> Result:
    """A conversation whose messages come from a pipe."""
    return CliRunner().invoke(cli.app, ["chat", *arguments], input=text)


def test_answers_of_a_pipe_are_all_that_goes_to_stdout() -> None:
    found = piped(f"{QUESTION}\n/reset\n\n/alpha 0\n{QUESTION}\n/quit\nnever asked\n")
    assert found.exit_code == 0, found.output
    assert found.stdout == (
        "Answer: Exactly 52-12=40. Exactly 40*2=80. The answer is 80.\n"
        "Answer: Roughly 52-12=50. Roughly 50*2=110. The answer is 110.\n"
    )
    assert found.stderr == ""


def test_settings_of_the_command_line_are_those_of_the_session() -> None:
    as_base = piped(QUESTION, "--as", "base", "--max-new-tokens", "6")
    assert as_base.stdout == "Answer: Roughly 5\n", "the last line may lack its end"
    told = piped("//help me", "--system-message", "Be careful.", "--max-new-tokens", "4")
    assert told.exit_code == 0 and told.stdout.strip()
    compared = piped(f"/compare {QUESTION}\n/compare\n", "--alpha", "first:8")
    assert compared.stdout.count("antiexpert") == 2 and "tokens of the proxy are not" in compared.stdout


@pytest.mark.parametrize(
    ("text", "arguments", "parts"),
    [
        ("/alhpa 1", (), ("Unknown command '/alhpa'. Did you mean: /alpha?",)),
        ("/alpha 11", (), ("alpha = 11 is out of range",)),
        ("/alpha -1", (), ("--allow-negative-alpha",)),
        ("/as all", (), ("/compare shows all of them side by side",)),
        ("/as bass", (), ("Unknown role 'bass'. Did you mean: base",)),
        ("/compare", (), ("nothing was asked yet",)),
        ("word " * 3000, (), ("context window is 2048: begin a new one (/reset)",)),
        (b"\xff\xfe\n", (), ("a message on stdin is no utf-8 text",)),
        ("", ("--alpha", "much"), ("alpha 'much' is not a number",)),
        ("", ("--system", "demoo"), ("Unknown system 'demoo'",)),
        ("", ("--temperature", "-1"), ("--temperature",)),
    ],
)
def test_what_is_wrong_in_a_pipe_is_one_line(
    text: str | bytes, arguments: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    refused(piped(text, *arguments), *parts)


class Terminal:
    """A conversation at a pseudo-terminal of 100 columns."""

    def __init__(self, *arguments: str) -> None:
        self.child = pexpect.spawn(
            sys.executable,
            ["-m", "proxytune", "chat", *arguments],
            env={**environment(), "TERM": "xterm", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
            cwd=str(ROOT),
            encoding="utf-8",
            codec_errors="backslashreplace",
            timeout=120,
            dimensions=(40, 100),
        )
        self.child.expect_exact(PROMPT)
        self.welcome = self.shown()

    def shown(self) -> str:
        """What came before the prompt that was waited for, without the styles of our own."""
        return re.sub(r"\x1b\[(\?2004[hl]|0m|1m|K)\r?", "", self.child.before or "").replace("\r\n", "\n")

    def ask(self, line: str) -> str:
        """What a line is answered with."""
        self.child.sendline(line)
        return self.after_prompt().partition("\n")[2].strip("\n")

    def after_prompt(self) -> str:
        """What is shown until the next prompt."""
        self.child.expect_exact(PROMPT)
        return self.shown()

    def end(self) -> int:
        """Ctrl-D; the exit code."""
        self.child.sendeof()
        self.child.expect(pexpect.EOF)
        self.child.close()
        return int(self.child.exitstatus if self.child.exitstatus is not None else -1)


def test_a_message_of_a_pipe_is_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """White space counts in prompts (code, say); only the end of the line is none of it."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("  if a: \\\n\tb\t\n\n // c  \nlast\\"))
    lines = PipedLines()
    assert [lines.next() for _ in range(5)] == ["  if a: \n\tb\t", "", " // c  ", "last\\", None]


def test_a_role_that_cannot_be_loaded_is_not_taken(tmp_path: Path) -> None:
    demo = load_system("demo")
    lost = demo.model_copy(update={"tuned": ModelSpec(model=str(tmp_path / "nowhere"))})
    chat = Chat(SteeredModel(Models(lost)), as_="base")
    with pytest.raises(UserError, match="nowhere"):
        ChatSession(chat, PipedLines()).set_role("tuned")
    assert chat.as_ == "base"


@pytest.fixture(scope="module")
def terminal() -> Iterator[Terminal]:
    terminal = Terminal("--system", "demo", "--max-new-tokens", "40")
    yield terminal
    assert terminal.end() == 0


def ask_sum(terminal: Terminal) -> str:
    """The word problem, which takes three lines."""
    *begun, last = QUESTION.splitlines()
    for line in begun:
        terminal.child.sendline(line)
        terminal.child.expect_exact("...> ")
    return terminal.ask(last)


@pytest.mark.every(2)
def test_a_person_talks_with_every_role(terminal: Terminal) -> None:
    assert "demo as proxy, alpha 1. /help shows the commands, Ctrl-D ends" in terminal.welcome
    assert ask_sum(terminal).endswith("proxy> Answer: Exactly 52-12=40. Exactly 40*2=80. The answer is 80.")
    assert "1 of" not in terminal.ask("/reset")
    assert terminal.ask("/as base").startswith("as base; the others: antiexpert, expert, proxy, tuned")
    assert ask_sum(terminal).endswith("base> Answer: Roughly 52-12=50. Roughly 50*2=110. The answer is 110.")
    assert terminal.ask("/alpha 0.5") == "alpha 0.5, of the proxy"
    assert "┃" in (table := terminal.ask("/compare")) and "tokens of the proxy" in table
    assert terminal.ask("/system Be brief.") == "system message: Be brief."
    assert terminal.ask("/system -") == "no system message"
    shown = terminal.ask("/help")
    assert all(
        name in shown for name in ("/alpha [A]", "/as [ROLE]", "/compare", "/system", "/reset", "/quit")
    )


def test_what_is_wrong_at_a_terminal_is_one_line_and_it_goes_on(terminal: Terminal) -> None:
    before = terminal.ask("/alpha")
    for line, want in (
        ("/alpha 11", "error: alpha = 11 is out of range"),
        ("/nope", "error: Unknown command '/nope'"),
        ("/as bass", "error: Unknown role 'bass'"),
    ):
        answer = terminal.ask(line)
        assert answer.startswith(want) and "Traceback" not in answer
    assert terminal.ask("/alpha") == before


@pytest.mark.slow
def test_the_arrow_keys_bring_earlier_lines_back_and_tab_completes(terminal: Terminal) -> None:
    terminal.ask("/as proxy")
    terminal.ask("/alpha 0.25")
    terminal.ask("/alpha 0.75")
    assert terminal.ask("\x1b[A\x1b[A") == "alpha 0.25", "two lines up"
    assert terminal.ask("/alp\t\x1b[D\x1b[C0.5") == "alpha 0.5"


def test_what_is_typed_and_answered_is_shown_and_not_obeyed(terminal: Terminal) -> None:
    """readline shows what is typed; what the command says of it is written out."""
    shown = terminal.ask("/system a\x16\x1b[31mb\x16\x07")
    assert shown == "system message: a\u2039U+001B\u203a[31mb\u2039U+0007\u203a"
    terminal.ask("/system -")


@pytest.mark.slow
def test_ctrl_c_stops_the_answer_and_not_the_program() -> None:
    """An answer that would be 2,000 tokens long."""
    terminal = Terminal("--max-new-tokens", "1900", "--min-new-tokens", "1900", "--speculate", "off")
    terminal.child.sendline("Where is it?")
    terminal.child.expect("proxy> .{20}")
    terminal.child.sendintr()
    assert "stopped: what there is of the answer stays in the conversation" in terminal.after_prompt()
    terminal.child.send("half a line")
    terminal.child.expect_exact("half a line")
    terminal.child.sendintr()
    assert "Ctrl-D or /quit ends" in terminal.after_prompt()
    terminal.child.sendline("/compare")
    terminal.child.expect_exact("/compare")
    terminal.child.expect(pexpect.TIMEOUT, timeout=1)
    terminal.child.sendintr()
    assert "stopped" in terminal.after_prompt()
    assert terminal.ask("/alpha") == "alpha 1"
    assert terminal.end() == 0


@pytest.mark.slow
@pytest.mark.real
def test_a_real_model_remembers_what_was_said(tmp_path: Path) -> None:
    """SmolLM2, whose chat template the expert has, beside itself without it."""
    folder = checkpoint("smollm2", "float32")
    yaml = tmp_path / "smol.yaml"
    yaml.write_text(
        f"base: {{model: {folder}}}\nantiexpert: {{model: {folder}}}\n"
        f"expert: {{model: {folder}, chat: tokenizer}}\n"
    )
    terminal = Terminal("--system", str(yaml), "--max-new-tokens", "40", "--stop", "\n\n")
    assert "proxy> The capital of France is Paris." in terminal.ask("What is the capital of France?")
    assert "Rome" in terminal.ask("And of Italy?"), "the second question is none without the first"
    terminal.ask("/as expert")
    assert "expert> The capital of Spain" in terminal.ask("And of Spain?")
    assert terminal.end() == 0

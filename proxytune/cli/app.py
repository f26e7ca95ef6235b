"""The `proxytune` program: its commands, and what becomes of errors.

Commands import what they need when they run, so that `--help` is instant. A UserError, a word that is no
command or option, and a file that the system refuses are one line on stderr and exit code 2, an interruption
one line and 130; every other exception is a bug and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import errno
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

from proxytune import __version__
from proxytune.cli.chat import chat
from proxytune.cli.commands.analyze import analyze
from proxytune.cli.commands.check import check
from proxytune.cli.commands.demo import demo
from proxytune.cli.commands.evaluate import EvalCommand, evaluate
from proxytune.cli.commands.generate import generate
from proxytune.cli.commands.judge import judge
from proxytune.cli.commands.lm_eval import lm_eval
from proxytune.cli.commands.report import report
from proxytune.cli.commands.reproduce import reproduce
from proxytune.cli.commands.score import score
from proxytune.cli.commands.stored import export, runs
from proxytune.cli.commands.sweep_alpha import sweep_alpha
from proxytune.cli.commands.systems import systems
from proxytune.cli.commands.tasks import tasks
from proxytune.cli.init import init
from proxytune.cli.serving import serve
from proxytune.cli.tune import tune
from proxytune.errors import UserError
from proxytune.terminal import say, show

USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[1]
"""Words that are no command or option. It has no public name: typer has a click of its own, or the installed
one."""


REFUSALS = frozenset(
    {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR}
    | {errno.EISDIR, errno.ELOOP}
)
"""What the system says to a file that the user can name otherwise, or make room for."""


class Commands(TyperGroup):
    """The group of all commands, which turns errors into exit codes."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read what stands before the command."""
        try:
            return super().parse_args(ctx, args)
        except USAGE_ERROR as error:
            raise _usage(error) from None

    def invoke(self, ctx: Any) -> Any:
        """Run the command; see the module's docstring for what becomes of errors."""
        try:
            return super().invoke(ctx)
        except USAGE_ERROR as error:
            raise _usage(error) from None
        except UserError as error:
            say(" ".join(f"error: {error}".split()))
            raise typer.Exit(2) from None
        except OSError as error:
            if error.filename is None or error.errno not in REFUSALS:
                raise
            say(f"error: '{error.filename}': {error.strerror}")
            raise typer.Exit(2) from None
        except KeyboardInterrupt as error:
            say(str(error) or "interrupted")
            raise typer.Exit(130) from None


def _usage(error: Any) -> Exception:
    """Say what is wrong with the words of the command; a group alone prints its help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return cast(Exception, error)
    where = "proxytune" if error.ctx is None else " ".join(["proxytune", *error.ctx.command_path.split()[1:]])
    say(" ".join(f"error: {error.format_message().rstrip('.')}. See: {where} --help".split()))
    return typer.Exit(2)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Proxy-tuning: logits = base + alpha * (expert - antiexpert), decoded, evaluated and explained.\n\n"
    "Begin with: proxytune demo",
)


def paragraphs(text: str) -> str:
    """A docstring whose paragraphs are one line each: the terminal breaks them where it is full."""
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n"))


def _version(asked: bool) -> None:
    if asked:
        show(f"proxytune {__version__}")
        raise typer.Exit


@app.callback()
def _proxytune(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


app.command()(demo)
app.command()(check)
app.command()(generate)
app.command()(chat)
app.command("eval", cls=EvalCommand)(evaluate)
app.command("sweep-alpha", cls=EvalCommand)(sweep_alpha)
app.command()(score)
app.command()(judge)
app.command()(export)
app.command("lm-eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(lm_eval)
app.command()(serve)
app.command()(runs)
app.command()(report)
app.command()(reproduce)
app.command()(tasks)
app.command()(systems)
app.add_typer(analyze, name="analyze")
app.add_typer(init, name="init")
app.add_typer(tune, name="tune")

for group in (app, analyze, init, tune):
    for command in group.registered_commands:
        assert command.callback is not None
        command.help = paragraphs(command.callback.__doc__ or "")


def main() -> None:
    """Run the command line of this process."""
    app(prog_name="proxytune")

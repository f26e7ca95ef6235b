"""lm-eval's own command line with a system as its model. Nothing of lm-eval or torch is imported before the
system, the role and alpha are known to be right."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from proxytune import hub
from proxytune.config import load_system, parse_alpha
from proxytune.errors import UserError, needs_extra

NAME = "proxytune"
TARGET = "proxytune.integrations.lm_eval:ProxyTunedLM"
MODELS = {
    "own": (NAME, TARGET),
    "vllm": ("proxytune-vllm", "proxytune.integrations.lm_eval_vllm:ProxyTunedVllm"),
}
"""Engine -> lm-eval's model that asks it, and where that is."""
OURS = {"model": "--system", "device": "`device_map` in the system's file"}
"""Options of lm-eval that a system leaves no use for -> what says the same."""
READS_INPUT = ("lm_eval.config", "lm_eval.tasks")
"""Where lm-eval reads options and tasks: what goes wrong there is the input's fault."""


@dataclass(frozen=True)
class LmEvalCall:
    """What is asked of lm-eval, and where the results go."""

    system: str
    tasks: str
    settings: Mapping[str, Any]
    """As `ModelArguments` has them: role, alpha, how to decode."""
    arguments: Sequence[str] = ()
    """lm-eval's own options."""
    out: Path = Path("results")
    """lm-eval's files go to <out>/<system>/lm-eval unless --output_path says otherwise."""


def run_lm_eval(call: LmEvalCall) -> tuple[Path, list[Path]]:
    """Run lm-eval. -> its file with the results, and the folders of our runs of them.

    UserError for what is wrong with the input, tasks included. What fails while the model answers or scores
    are computed keeps its traceback."""
    system = load_system(call.system)
    system.require(call.settings.get("role", "proxy"))
    if (alpha := call.settings.get("alpha")) is not None:
        parse_alpha(alpha).check(allow_negative=bool(call.settings.get("allow_negative_alpha")))
    needs_extra("proxytune lm-eval", "lm_eval", "lmeval")
    model = register(str(call.settings.get("engine", "own")))
    given = {**call.settings, "pretrained": call.system}
    folder = call.out / system.name / "lm-eval"
    before = [
        *("--model", model, "--model_args", json.dumps(given), "--tasks", call.tasks),
        *("--output_path", str(folder), "--log_samples", "--batch_size", "auto"),
    ]
    from lm_eval._cli import HarnessCLI
    from lm_eval.utils import setup_logging

    setup_logging(logging.WARNING)
    parser = HarnessCLI()
    with _arguments(["lm-eval", "run", *before, *call.arguments]):
        asked = _parsed(parser)
        for option, instead in OURS.items():
            if getattr(asked, option) not in (None, model):
                raise UserError(f"--{option} '{getattr(asked, option)}' is not for a system: use {instead}")
        path = Path(asked.output_path)
        there = set(_results_in(path))
        with _no_waiting_for_the_hub(), _notes_on_stderr(), _input_errors_in_one_line():
            parser.execute(asked)
    [made] = set(_results_in(path)) - there
    from proxytune.integrations.lm_eval_runs import write_runs

    return made, write_runs(made, call.out)


def register(engine: str = "own") -> str:
    """Make the model that asks this engine known to an lm-eval that does not look for entry points. -> its
    name."""
    from lm_eval.api.registry import model_registry

    name, target = MODELS[engine]
    if name not in model_registry:
        model_registry.register(name, target=target)
    return name


@contextlib.contextmanager
def _arguments(arguments: Sequence[str]) -> Iterator[None]:
    """lm-eval reads its options from sys.argv, and nowhere else."""
    with _set(sys, "argv", list(arguments)):
        yield


@contextlib.contextmanager
def _set(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """A variable of a module, for a while."""
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def _parsed(parser: Any) -> Any:
    """The options, read; UserError with the last line of what the parser says."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return parser.parse_args()
    except SystemExit as end:
        if not end.code:  # --help
            raise
        reason = said.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        raise UserError(f"lm-eval: {reason}. Its options: lm-eval run --help") from None


def _results_in(path: Path) -> list[Path]:
    """lm-eval's files of results under the path that it was given."""
    if path.suffix == ".json":
        return list(path.parent.glob(f"{path.stem}_*.json"))
    return list(path.glob("*/results_*.json"))


@contextlib.contextmanager
def _no_waiting_for_the_hub() -> Iterator[None]:
    """Where the hub does not answer, its libraries are told so: they would try for half a minute."""
    if hub.reachable():
        yield
        return
    import datasets
    from huggingface_hub import constants

    with _set(constants, "HF_HUB_OFFLINE", True), _set(datasets.config, "HF_HUB_OFFLINE", True):
        yield


@contextlib.contextmanager
def _notes_on_stderr() -> Iterator[None]:
    """Show what the model says: what is loaded, and what a reader of the figures should know."""
    log, handler = logging.getLogger(TARGET.partition(":")[0]), logging.StreamHandler()
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)


@contextlib.contextmanager
def _input_errors_in_one_line() -> Iterator[None]:
    """Turn what lm-eval raises about its options, a task, or a task's data into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        if not _of_the_input(frames):
            raise
        reason = " ".join(str(error).split()) or "no reason given"
        if isinstance(error, ConnectionError):
            raise UserError(
                f"a task needs data from the hub, which cannot be reached: {reason}. Use a task of your "
                "own with local files: --tasks ./my_task.yaml (docs/lm-eval.md)"
            ) from None
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"lm-eval: {kind}{reason}. Its tasks: lm-eval ls tasks") from None


def _of_the_input(frames: Sequence[FrameType]) -> bool:
    """Whether an error comes from reading options and tasks: neither from us nor after a request was made."""
    modules = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    inside = modules[1:]  # the first is this one
    if any(module.startswith("proxytune") for module in inside[1:]):
        return False
    return any(module.startswith(READS_INPUT) for module in inside) or inside[-1:] == ["lm_eval.evaluator"]

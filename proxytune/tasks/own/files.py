"""A task in a Python file of one's own: `TASK = Task(...)`.

The file is run once, when a command or a function names it. Its task is called after the file and the hash
of its content, so that runs of two versions of it are never mixed. Whatever goes wrong in it, then or later,
is a UserError with the line."""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from proxytune.config import Mode
from proxytune.errors import UserError
from proxytune.records import Completion, Example, JsonRow, Prompt
from proxytune.tasks import OWN, TASKS, Task, get_task
from proxytune.tasks.data import DataTable

ENDING = ".py"
NAME = "TASK"

_read: dict[tuple[Path, str], Task] = {}
"""The files that this process has run, by their place and the task's name."""


def read_task(named: str, mode: Mode = "generate") -> Task:
    """What a user names as a task: one of TASKS, or a Python file (what ends in .py), whose code is run."""
    if not named.endswith(ENDING):
        if named not in TASKS and Path(f"{named}{ENDING}").is_file():
            raise UserError(f"Unknown task '{named}'. There is a file of that name: '{named}{ENDING}'")
        return get_task(named, mode)
    file = TaskFile.read(Path(named))
    place = (file.path.resolve(), file.task_name)
    if place not in _read:
        _read[place] = file.task()
    OWN[file.task_name] = _read[place]
    return get_task(file.task_name, mode)


@dataclass(frozen=True)
class TaskFile:
    """A Python file with a task."""

    path: Path
    content: bytes

    @classmethod
    def read(cls, path: Path) -> TaskFile:
        """UserError where there is no such file."""
        try:
            return cls(path, path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"no task file '{path}': `proxytune init task {path}` writes one") from None
        except IsADirectoryError:
            raise UserError(f"'{path}' is a folder, not a task file") from None
        except OSError as error:
            raise UserError(f"cannot read the task file '{path}': {error.strerror}") from None

    @property
    def task_name(self) -> str:
        """The file's name and the beginning of its hash."""
        stem = re.sub(r"[^A-Za-z0-9_+-]+", "-", self.path.stem).strip("-") or "task"
        return f"{stem}-{hashlib.sha256(self.content).hexdigest()[:8]}"

    def task(self) -> Task:
        """Run the file, and take its checked task."""
        module = ModuleType(f"proxytune_task_{re.sub(r'[^A-Za-z0-9_]', '_', self.task_name)}")
        module.__file__ = str(self.path)
        sys.modules[module.__name__] = module  # where dataclasses look types up
        try:
            code = compile(self.content, str(self.path), "exec", dont_inherit=True)
            exec(code, module.__dict__)
        except (Exception, SystemExit) as error:
            del sys.modules[module.__name__]
            raise UserError(self.told(error)) from error
        found = module.__dict__.get(NAME)
        if found is None:
            raise UserError(f"'{self.path}' has no {NAME}: it must define {NAME} = Task(...)")
        if not isinstance(found, Task):
            raise UserError(f"{self._where()}: {NAME} is no Task, but {type(found).__name__}")
        return self._own(found)

    def _own(self, task: Task) -> Task:
        """The task under its name, checked, with functions that say where they fail."""
        self._check_fields(task)
        functions: dict[str, Any] = {
            field.name: self._guarded(getattr(task, field.name))
            for field in fields(task)
            if callable(getattr(task, field.name))
        }
        likelihood = None if task.likelihood is None else self._own(task.likelihood)
        choices = None if task.choices is None else self._own(task.choices)
        modes: dict[str, Any] = {"likelihood": likelihood, "choices": choices}
        own = replace(task, name=self.task_name, file=str(self.path), **modes, **functions)
        return replace(own, examples=functools.partial(self._examples, own))

    def _check_fields(self, task: Task) -> None:
        """UserError for a field that is not of its type: a dataclass takes everything."""
        for name, kind in get_type_hints(Task).items():
            if name in ("likelihood", "choices"):
                kind = Any if isinstance(getattr(task, name), Task) else None
            try:
                TypeAdapter[Any](kind).validate_python(getattr(task, name), strict=True)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise UserError(f"{self._where()}: field '{name}' of the Task: {reason}") from None

    def _guarded(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, whose errors name the line of the file that they come from."""

        @functools.wraps(function)
        def call(*arguments: Any) -> Any:
            try:
                return function(*arguments)
            except UserError:
                raise
            except Exception as error:
                raise UserError(self.told(error)) from error

        return call

    def _examples(self, task: Task, table: DataTable, shots: str) -> list[Example]:
        """The examples, of which the first is stored and scored with an empty response: what fails there
        fails now, and not after hours of decoding."""
        made = task.examples(table, shots)
        if not isinstance(made, list) or not all(map(_is_example, made)):
            raise UserError(
                f"{self._at(task.examples)}: a list of Example is needed, each with a text as its id, a "
                "Prompt of texts and a dict as its target"
            )
        seen = set[str]()
        for example in made:
            if example.id in seen:
                raise UserError(f"{self._at(task.examples)}: two examples have the id '{example.id}'")
            seen.add(example.id)
            self._stored(task.examples, example.target)
        if made:
            self._try_out(task, made[0])
        return made

    def _try_out(self, task: Task, example: Example) -> None:
        """UserError where an example cannot be stored or scored."""
        texts = [""] * task.sampling.n if task.continuations is None else task.continuations(example)
        completions = [
            Completion(example.id, place, text, (), "eos", -1.0) for place, text in enumerate(texts)
        ]
        row = task.row(example, completions)
        if not isinstance(row, dict) or row.get("id", example.id) != example.id:
            raise UserError(
                f"{self._at(task.row)}: a dict is needed, whose id, if it has one, is the example's"
            )
        stored = self._stored(task.row, row)
        missing = [name for name in task.scored if not isinstance(stored.get(name), str)]
        if missing:
            raise UserError(f"{self._at(task.row)}: the row has no text '{missing[0]}', which `scored` names")
        scores = task.score_row(stored)
        if not isinstance(scores, Mapping) or not all(map(_is_score, scores.values())):
            raise UserError(f"{self._at(task.score_row)}: numbers by name are needed (None: no score)")

    def _stored(self, function: Callable[..., Any], row: JsonRow) -> JsonRow:
        """A row that a function made, as it is read back."""
        try:
            content: JsonRow = json.loads(json.dumps(row, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"{self._at(function)}: what it gives cannot be stored as JSON: {error}"
            ) from None
        return content

    # Places

    def told(self, error: BaseException) -> str:
        """An error with the last line of the file that it went through."""
        lines = [] if error.__traceback__ is None else _lines(error, str(self.path))
        if isinstance(error, SyntaxError) and error.filename == str(self.path) and error.lineno:
            lines = [error.lineno]
        where = f"'{self.path}'" + (f" line {lines[-1]}" if lines else "")
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        return f"{where}: {kind}{text}".removesuffix(": ")

    def _where(self) -> str:
        """The place of the TASK."""
        lines = [
            node.lineno
            for node in ast.parse(self.content).body
            if isinstance(node, ast.Assign | ast.AnnAssign) and NAME in _targets(node)
        ]
        return f"'{self.path}'" + (f" line {lines[-1]}" if lines else "")

    def _at(self, function: Callable[..., Any]) -> str:
        """The place of a function of the file."""
        inner = getattr(function, "__wrapped__", function)
        code = getattr(inner, "__code__", None)
        here = isinstance(code, CodeType) and code.co_filename == str(self.path)
        name = getattr(inner, "__name__", type(inner).__name__)
        return f"'{self.path}'" + (f" line {code.co_firstlineno}" if here and code else "") + f", {name}"


def _targets(node: ast.Assign | ast.AnnAssign) -> list[str]:
    """The names that a statement assigns to."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


def _lines(error: BaseException, filename: str) -> list[int]:
    """The lines of a file that an error went through."""
    found, step = [], error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == filename:
            found.append(step.tb_lineno)
        step = step.tb_next
    return found


def _is_example(value: object) -> bool:
    """Whether it is an example whose parts have their types: a dataclass takes everything."""
    if not isinstance(value, Example) or not isinstance(value.prompt, Prompt):
        return False
    texts = (value.id, value.prompt.plain, value.prompt.user)
    return all(isinstance(text, str) for text in texts) and isinstance(value.target, dict)


def _is_score(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and math.isfinite(value))

"""What decides inside the sandbox whether a DS-1000 sample passed: `check(...)` returns or raises.

ds1000.py sends this file's text with a call below it. So it is complete by itself: standard library only,
Python 3.7 or newer. The results that it unpickles were written by model-written code. A hostile one runs
here, in the sandbox, where it can decide its own verdict and nothing else.
"""

from __future__ import annotations

import ast
import base64
import io
import pickle
import sys
import tokenize
import types
from typing import Any


def check(test_code: str, solution: str, string_test: bool, answers: list[str]) -> None:
    """Compare the results of all cases with the answers (pickles in base64, "" for none), by the problem's
    own test."""
    sys.modules.setdefault("parser", old_parser())
    module = types.ModuleType("test_code")
    sys.modules["test_code"] = module
    exec(compile(test_code, "test_code.py", "exec"), module.__dict__)
    if string_test and not module.__dict__["stringTest"](without_prints(solution)):
        raise AssertionError("the words of the code are not what the problem asks for")
    for case, answer in enumerate(answers, start=1):
        with open(f"result/result_{case}.pkl", "rb") as file:
            result = pickle.load(file)
        expected = pickle.loads(base64.b64decode(answer)) if answer else None
        if module.__dict__["test"](result, expected) != 1:
            raise AssertionError(f"case {case}: the result is not the expected one")


def without_prints(solution: str) -> str:
    """The code as string tests see it: lines with a print are left out."""
    return "\n".join(line for line in solution.split("\n") if "print" not in line)


def old_parser() -> types.ModuleType:
    """A stand-in for the module `parser`, gone since Python 3.10: `st2list(suite(code))` gives the tokens,
    which is all that the tests look for in the tree."""

    def suite(code: str) -> str:
        ast.parse(code)
        return code

    def st2list(code: str) -> list[Any]:
        tokens = tokenize.generate_tokens(io.StringIO(code).readline)
        return [[token.type, token.string] for token in tokens]

    module = types.ModuleType("parser")
    module.__dict__.update(suite=suite, st2list=st2list)
    return module

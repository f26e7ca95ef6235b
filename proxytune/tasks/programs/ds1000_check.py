"""What decides inside the sandbox whether a DS-1000 sample passed: `check(...)` and `check_new(...)` return
or raise.

ds1000.py sends this file's text with a call below it, as the check of a program: it runs in a process of its
own, which no sample has been in. So it is complete by itself: standard library only, Python 3.7 or newer.
The results that it reads are pickles that model-written code made. They may name the plain types of Python,
numpy, pandas, scipy.sparse and torch, and what the problem's own answer names; nothing else is called.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import pickle
import sys
import tokenize
import types
from collections.abc import Callable
from typing import Any, ClassVar

PLAIN = {
    "builtins": "bool bytearray bytes complex dict float frozenset int list object range set slice str tuple",
    "collections": "Counter OrderedDict defaultdict deque",
    "copyreg": "_reconstructor",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "_codecs": "encode",
    "numpy": "dtype matrix ndarray poly1d",
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "numpy.core.numeric": "_frombuffer",
    "numpy._core.numeric": "_frombuffer",
    "numpy.ma.core": "MaskedArray _mareconstruct",
    "numpy.ma": "MaskedArray",
    "numpy.rec": "recarray record",
    "pandas": "BooleanDtype Categorical CategoricalDtype CategoricalIndex DataFrame DatetimeIndex "
    "DatetimeTZDtype Float32Dtype Float64Dtype Index Int16Dtype Int32Dtype Int64Dtype Int8Dtype Interval "
    "IntervalDtype IntervalIndex MultiIndex NA NaT Period PeriodDtype PeriodIndex RangeIndex Series "
    "SparseDtype StringDtype Timedelta TimedeltaIndex Timestamp UInt16Dtype UInt32Dtype UInt64Dtype "
    "UInt8Dtype",
    "pandas._libs.internals": "_unpickle_block",
    "pandas._libs.missing": "NA",
    "pandas._libs.tslibs.nattype": "_nat_unpickle",
    "pandas._libs.tslibs.timedeltas": "_timedelta_unpickle",
    "pandas._libs.tslibs.timestamps": "_unpickle_timestamp",
    "pandas.core.frame": "DataFrame",
    "pandas.core.series": "Series",
    "pyarrow.lib": "_restore_array bool_ chunked_array large_string py_buffer string type_for_alias",
    "pytz": "_UTC _p",
    "zoneinfo": "ZoneInfo",
    "torch": "Size device",
    "torch._utils": "_rebuild_parameter _rebuild_tensor _rebuild_tensor_v2",
    "torch.storage": "_load_from_bytes",
}
"""Module -> what a result may name of it."""
FAMILIES = ("pandas._libs.", "pandas.arrays", "pandas.core.arrays.", "pandas.core.dtypes.dtypes",
            "pandas.core.indexes.", "pandas.core.internals.", "scipy.sparse.")  # fmt: skip
"""Modules of which a result may name any class."""
THINGS = (type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.MethodType)


NOT_PICKLED = (pickle.PicklingError, AttributeError, TypeError)
"""What Python raises where something cannot be pickled."""


class NoData(Exception):
    """A result names what is no data."""


class Recorder(pickle._Unpickler):
    """Reads a pickle of ours, and notes what it names."""

    def __init__(self, file: Any) -> None:
        super().__init__(file)
        self.named: set[tuple[str, str]] = set()

    def find_class(self, module: str, name: str) -> Any:
        """The thing of that name."""
        self.named.add((module, name))
        return super().find_class(module, name)


class Reader(pickle._Unpickler):
    """Reads a result. What it may name is listed, nothing is changed in a class or a function, and no
    instance gets an attribute in the place of a method."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, named: set[tuple[str, str]]) -> None:
        super().__init__(file)
        self.named = named

    def find_class(self, module: str, name: str) -> Any:
        """The thing of that name, if a result may name it."""
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return self._load_storage
        if (module, name) in (("builtins", "getattr"), ("__builtin__", "getattr")):
            return get_time_zone
        found = super().find_class(module, name)
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        if module in ("builtins", "operator") and not isinstance(found, type):
            raise NoData(f"the result holds '{module}.{name}', which is no data that can be compared")
        listed = (module, name) in self.named or name in PLAIN.get(module, "").split()
        if not listed and ("." in name or not is_data(module, name, found)):
            raise NoData(f"the result holds '{module}.{name}', which is no data that can be compared")
        return found

    def _load_storage(self, data: bytes) -> Any:
        """The numbers of a torch tensor, which are a pickle within the pickle."""
        import torch

        module = types.ModuleType("pickle")
        module.__dict__.update(Unpickler=Storages, load=lambda file, **_: Storages(file).load())
        return torch.load(io.BytesIO(data), map_location="cpu", pickle_module=module)

    def load_build(self: Any) -> None:
        """Give an instance its state."""
        state, instance = self.stack[-1], self.stack[-2]
        if isinstance(instance, THINGS):
            raise NoData("the result changes a class or a function")
        for part in state if isinstance(state, tuple) else (state,):
            for name in part if isinstance(part, dict) else ():
                if isinstance(name, str) and callable(getattr(type(instance), name, None)):
                    raise NoData(f"the result replaces the method '{name}' of a {type(instance).__name__}")
        pickle._Unpickler.load_build(self)  # type: ignore[attr-defined]

    dispatch[pickle.BUILD[0]] = load_build


class Storages(Reader):
    """Reads what torch writes about a storage."""

    def __init__(self, file: Any, **_: Any) -> None:
        super().__init__(file, set())


def is_data(module: str, name: str, found: Any) -> bool:
    """Whether what a result names is data by its family."""
    top = module.partition(".")[0]
    if module == "numpy":
        return isinstance(found, type) and issubclass(found, sys.modules["numpy"].generic)
    if module == "torch":
        return type(found).__name__ == "dtype" or name.endswith("Storage")
    if not module.startswith(FAMILIES):
        return False
    if isinstance(found, type):
        return found.__module__.partition(".")[0] == top
    return top == "pandas" and name.startswith(("__pyx_unpickle_", "_new_"))


def get_time_zone(thing: Any, name: str) -> Any:
    """What Python's own time zones ask `getattr` for."""
    if name != "_unpickle" or (thing.__module__, thing.__name__) != ("zoneinfo", "ZoneInfo"):
        raise NoData("the result looks into what is no data")
    return getattr(thing, name)


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
        expected, named = answer_of(base64.b64decode(answer)) if answer else (None, set())
        with open(f"result/result_{case}.pkl", "rb") as file:
            result = Reader(file, named).load()
        if module.__dict__["test"](result, expected) != 1:
            raise AssertionError(f"case {case}: the result is not the expected one")


def answer_of(data: bytes) -> tuple[Any, set[tuple[str, str]]]:
    """An answer, and what its pickle names."""
    recorder = Recorder(io.BytesIO(data))
    return recorder.load(), recorder.named


def check_new(code_context: str, solution: str, run: Callable[..., dict[str, bytes]]) -> None:
    """The newer release: its `test_execution` runs the sample by `exec`. Here that is a call to the sample's
    process (`run`), which sends back what the sample gave a value."""
    named: set[tuple[str, str]] = set()
    refused: dict[str, NoData] = {}

    def execute(code: str, names: dict[str, Any]) -> None:
        try:
            given = pickle.dumps(names)
        except NOT_PICKLED:
            run(code, lambda: None)  # no plain data: so it is known that this problem needs one process
            raise
        for name, data in run(code, given).items():
            try:
                names[name] = Reader(io.BytesIO(data), named).load()
            except NoData as error:
                refused[name] = error

    module = types.ModuleType("code_context")
    sys.modules["code_context"] = module
    exec(compile(code_context, "code_context.py", "exec"), module.__dict__)
    module.__dict__["exec"] = execute
    generate: Any = module.__dict__.get("generate_test_case")

    def generate_test_case(*given: Any) -> Any:
        made = generate(*given)
        with contextlib.suppress(*NOT_PICKLED):
            named.update(answer_of(pickle.dumps(made))[1])
        return made

    if generate is not None:
        module.__dict__["generate_test_case"] = generate_test_case
    try:
        module.__dict__["test_execution"](solution)
    except KeyError as error:
        raise refused.get(error.args[0], error) from None
    if "test_string" in module.__dict__:
        module.__dict__["test_string"](solution)


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

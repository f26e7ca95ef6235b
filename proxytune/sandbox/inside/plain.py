"""Plain data between two processes that do not trust each other: values as JSON, their types kept.

Numbers, text, bytes, the built-in containers, ranges, iterators, decimals and fractions come through. Of a
subclass, the value of its built-in base does: what a class of the sender's overrides stays with the sender.
Anything else arrives as a `Foreign`, which equals nothing. To read a message runs no code of the sender's.
"""

from __future__ import annotations

import base64
import itertools
import json
import types
from typing import Any

MOST_ITEMS = 100_000
"""Items that are taken from an iterator: it may have no end."""
LONG = 1 << 4096
"""Larger integers go as hexadecimal digits: Python limits decimal ones."""
_ITERATORS: tuple[Any, ...] = (
    type(iter([])), type(iter(())), type(iter("")), type(iter({})), type(iter(set())), type(iter(range(0))),
    type(reversed([])), map, filter, zip, enumerate, types.GeneratorType, itertools.chain, itertools.count,
)  # fmt: skip
_VIEWS = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}


NOT_APART = "failed: the check needs the program in its own process"
"""The result where a check hands over what is no plain data: a function, say."""


class NotPlain(BaseException):
    """A value that the trusted side cannot send. No test that expects an error catches it."""


class Foreign:
    """What came in the place of a value that is no plain data: it has its truth, and equals only itself."""

    def __init__(self, kind: str, truth: bool) -> None:
        self.kind, self.truth = kind, truth

    def __bool__(self) -> bool:
        return self.truth

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def dumps(value: Any, strict: bool = False) -> bytes:
    """A value as bytes. `strict` is for the trusted side: what would not arrive as it is, is an error."""
    return json.dumps(_pack(value, strict)).encode()


def loads(data: bytes) -> Any:
    """The value; ValueError, TypeError or the like where the bytes are none."""
    return _unpack(json.loads(data))


def _pack(value: Any, strict: bool) -> Any:
    """The JSON form: a container is a list that begins with its kind."""
    kind = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int:
        return value if -LONG < value < LONG else ["int", hex(value)]
    if kind in (list, tuple, set, frozenset):
        return [kind.__name__, *(_pack(item, strict) for item in value)]
    if kind is dict:
        return ["dict", *([_pack(key, strict), _pack(item, strict)] for key, item in value.items())]
    if kind in (bytes, bytearray):
        return [kind.__name__, base64.b64encode(value).decode()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is range:
        return ["range", value.start, value.stop, value.step]
    if kind in _VIEWS:
        return [_VIEWS[kind], *(_pack(item, strict) for item in value)]
    if isinstance(value, _ITERATORS):
        return ["iterator", *(_pack(item, strict) for item in itertools.islice(value, MOST_ITEMS))]
    if kind.__module__ in ("decimal", "fractions") and kind.__name__ in ("Decimal", "Fraction"):
        return [kind.__name__, str(value)]
    if strict:
        raise TypeError(f"{value!r} is no plain data") if kind is Foreign else NotPlain(kind.__name__)
    return _pack_base(value)


def _pack_base(value: Any) -> Any:
    """The value of the built-in base of a subclass, of a number of numpy's, or a mark of what it is."""
    kind = type(value)
    for base, whole in ((int, int.__pos__), (float, float.__pos__), (str, str.__str__), *_COPIED):
        if isinstance(value, base):
            return _pack(whole(value), False)
    if kind.__module__ == "numpy" and getattr(value, "shape", None) == () and hasattr(value, "item"):
        plain = value.item()
        if type(plain) is not kind:
            return _pack(plain, False)
    try:
        truth = bool(value)
    except Exception:
        truth = True
    return ["foreign", str(kind.__name__), truth]


def _unpack(form: Any) -> Any:
    """The value of a JSON form."""
    if not isinstance(form, list):
        if isinstance(form, dict):
            raise ValueError("an object where there is none")
        return form
    kind, rest = form[0], form[1:]
    if kind in _CONTAINERS:
        return _CONTAINERS[kind]([_unpack(item) for item in rest])
    if kind == "dict":
        return {_unpack(key): _unpack(item) for key, item in rest}
    return _SINGLE[kind](*rest)


def _decimal(text: str) -> Any:
    import decimal

    return decimal.Decimal(text)


def _fraction(text: str) -> Any:
    import fractions

    return fractions.Fraction(text)


_COPIED: tuple[Any, ...] = tuple(
    (base, base) for base in (complex, bytes, bytearray, list, tuple, set, frozenset, dict)
)
_CONTAINERS: dict[str, Any] = {
    "list": list,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "iterator": iter,
    "keys": lambda items: dict.fromkeys(items).keys(),
    "values": lambda items: dict(enumerate(items)).values(),
    "items": lambda items: dict(items).items(),
}
_SINGLE: dict[str, Any] = {
    "int": lambda text: int(text, 16),
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "complex": complex,
    "range": range,
    "Decimal": _decimal,
    "Fraction": _fraction,
    "foreign": Foreign,
}

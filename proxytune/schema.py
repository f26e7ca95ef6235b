"""Records whose fields users set: unknown fields are errors, and what is wrong is said in one line."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from proxytune.errors import UserError, did_you_mean


class Record(BaseModel):
    """A frozen record that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    if not TYPE_CHECKING:  # a type checker reads the fields

        def __init__(self, /, **fields: Any) -> None:
            """UserError, in one line, for a field that is unknown or has no such value."""
            try:
                super().__init__(**fields)
            except ValidationError as error:
                raise UserError(f"{type(self).__name__}: {explain(error, type(self))}") from None

        # pydantic's mark: a record that is read as a part of another goes past it, and so keeps its place
        __init__.__pydantic_base_init__ = True

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        """What is not as it is by default: a repr that fits on a line."""
        fields = type(self).model_fields
        for name, value in super().__repr_args__():
            if (
                name is None
                or name not in fields
                or value != fields[name].get_default(call_default_factory=True)
            ):
                yield name, value


def explain(error: ValidationError, record: type[BaseModel] | None = None) -> str:
    """The first problem of a pydantic error in one line; for an unknown key of `record`, or of a record in
    it, with the keys that are known."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if not _is_choice(part)) or "value"
    if first["type"] == "extra_forbidden":
        *parents, key = first["loc"]
        holder = None if record is None else _record_at(record, parents)
        return (
            f"unknown key '{where}'"
            if holder is None
            else str(did_you_mean("key", str(key), holder.model_fields))
        )
    message = first["msg"].removeprefix("Value error, ")
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{where}: {message}{more}"


def _record_at(record: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel] | None:
    """The record that is at a place in another, by the types of the fields on the way."""
    found: type[BaseModel] | None = record
    for part in place:
        if _is_choice(part):
            found = _chosen[str(part)]
        elif found is not None and isinstance(part, str):
            found = _record_in(found.model_fields[part].annotation) if part in found.model_fields else None
    return found


_chosen: dict[str, type[BaseModel]] = {}
"""The records that a field chooses between, by their marks."""


def mark(record: type[BaseModel]) -> str:
    """The tag of a record where a field may hold one of several: no place in a message."""
    name = f"~{record.__name__}"
    _chosen[name] = record
    return name


def _is_choice(part: int | str) -> bool:
    """Whether a part of a place only says which of several records was read."""
    return isinstance(part, str) and part in _chosen


def _record_in(annotation: Any) -> type[BaseModel] | None:
    """The record that a type is of, however it is wrapped."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_record_in, get_args(annotation))), None)

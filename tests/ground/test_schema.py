"""What is wrong with a record, in one line, and how one shows itself."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field, ValidationError, field_validator

from proxytune.config import System
from proxytune.errors import UserError
from proxytune.schema import Record, explain


class Inside(Record):
    """A record in another."""

    size: int = 1


class Outside(Record):
    """A record with others in it."""

    one: Inside = Inside()
    several: tuple[Inside, ...] = ()
    perhaps: Inside | None = None
    named: dict[str, Inside] = Field(default_factory=dict)
    number: int = 0
    other: int = 5

    @field_validator("other")
    @classmethod
    def _not_seven(cls, value: int) -> int:
        if value == 7:
            raise ValueError("no seven")
        return value


KNOWN = "Known: named, number, one, other, perhaps, several"
INTEGER = "Input should be a valid integer, unable to parse string as an integer"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"numberz": 1}, f"Outside: Unknown key 'numberz'. Did you mean: number? {KNOWN}"),
        ({"xyz": 1}, f"Outside: Unknown key 'xyz'. {KNOWN}"),
        ({"one": {"sizes": 1}}, "Outside: Unknown key 'sizes'. Did you mean: size? Known: size"),
        ({"perhaps": {"sizes": 1}}, "Outside: Unknown key 'sizes'. Did you mean: size? Known: size"),
        ({"several": [{}, {"sizes": 1}]}, "Outside: Unknown key 'sizes'. Did you mean: size? Known: size"),
        ({"named": {"a": {"sizes": 1}}}, "Outside: unknown key 'named.a.sizes'"),
        ({"number": "x"}, f"Outside: number: {INTEGER}"),
        ({"one": {"size": "x"}}, f"Outside: one.size: {INTEGER}"),
        ({"several": [{}, {"size": "x"}]}, f"Outside: several.1.size: {INTEGER}"),
        ({"number": "x", "other": "y"}, f"Outside: number: {INTEGER} (and 1 more)"),
        ({"number": "x", "other": "y", "one": {"size": "z"}}, f"Outside: one.size: {INTEGER} (and 2 more)"),
        ({"other": 7}, "Outside: other: no seven"),
    ],
)
def test_the_first_problem_in_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError) as raised:
        Outside(**fields)
    assert str(raised.value) == says


def test_an_unknown_key_of_an_unknown_record_is_told_with_its_place() -> None:
    with pytest.raises(ValidationError) as raised:
        Outside.model_validate({"one": {"sizes": 1}})
    assert explain(raised.value) == "unknown key 'one.sizes'"
    with pytest.raises(ValidationError) as raised:
        Outside.model_validate(3)
    assert explain(raised.value).startswith("value: Input should be a valid dictionary")


def test_which_of_several_records_is_no_place() -> None:
    for base, says in [
        ({"model": "m", "dtype": "x"}, "System: base.dtype: Input should be 'float64'"),
        (
            {"api": "http://h", "model": "m", "route": "x"},
            "System: base.route: Input should be 'completions'",
        ),
        ({"api": "http://h", "model": "m", "rout": "x"}, "System: Unknown key 'rout'. Did you mean: route?"),
        ({"modl": "m"}, "System: Unknown key 'modl'. Did you mean: model?"),
    ]:
        with pytest.raises(UserError) as raised:
            System(base=base)  # type: ignore[arg-type]
        assert str(raised.value).startswith(says)


def test_a_record_shows_what_is_not_usual() -> None:
    assert repr(Outside()) == "Outside()" and repr(Inside(size=1)) == "Inside()"
    assert repr(Outside(other=6, one=Inside(size=2))) == "Outside(one=Inside(size=2), other=6)"
    with pytest.raises(ValidationError):
        Outside().number = 3

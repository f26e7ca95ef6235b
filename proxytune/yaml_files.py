"""YAML files that users write, read with care: none is large, deep, or refers to itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from proxytune.errors import UserError

MOST_BYTES, MOST_VALUES, DEEPEST = 100_000, 10_000, 32
"""Of a YAML file, with aliases written out. A system has about 4 kB, 100 values and 4 levels."""


def read_yaml(path: Path) -> Mapping[str, Any]:
    """The mapping in a YAML file; UserError names the file and the line."""
    try:
        with path.open("rb") as file:
            text = file.read(MOST_BYTES + 1).decode("utf-8")
        _require_small(text)
        content = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(f"no file '{path}'") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"cannot read '{path}': {' '.join(str(error).split())}") from None
    except (ValueError, LookupError, AttributeError, TypeError) as error:  # 2020-99-99, or `!!int ""`
        raise UserError(f"cannot read '{path}': a value is none of its kind ({error})") from None
    if not isinstance(content, Mapping):
        raise UserError(f"'{path}' must hold a mapping of keys to values, not {type(content).__name__}")
    return content


def _require_small(text: str) -> None:
    """YAMLError for a file that is too large, too deep, or refers to itself. Aliases count as what they
    stand for, since whatever reads the values reads all of that."""
    if len(text) > MOST_BYTES:
        raise yaml.YAMLError(f"it has more than {MOST_BYTES:,} bytes")
    known: dict[str | None, tuple[int, int]] = {}  # anchor -> values, levels
    within: list[tuple[str | None, int, int]] = [(None, 0, 0)]  # the same, of collections that are not closed
    for event in yaml.parse(text, yaml.SafeLoader):
        anchor = getattr(event, "anchor", None)
        values, levels = 1, 0
        if isinstance(event, yaml.CollectionStartEvent):
            within.append((anchor, 1, 1))
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, values, levels = within.pop()
        elif isinstance(event, yaml.AliasEvent):
            if anchor not in known:
                raise yaml.YAMLError(
                    f"the alias *{anchor} stands within what it refers to, or refers to nothing"
                )
            values, levels = known[anchor]
        elif not isinstance(event, yaml.ScalarEvent):
            continue
        if not isinstance(event, yaml.CollectionStartEvent):
            known[anchor] = values, levels
            outer, before, deepest = within[-1]
            within[-1] = outer, before + values, max(deepest, levels + 1)
        if len(within) + levels > DEEPEST or within[-1][1] > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {DEEPEST} levels or {MOST_VALUES:,} values")

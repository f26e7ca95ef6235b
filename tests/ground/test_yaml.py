"""Systems' files that are too large, too deep, or hold what is none of its kind: one line, and at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxytune.errors import UserError
from proxytune.yaml_files import DEEPEST, MOST_BYTES, MOST_VALUES, read_yaml


def chained(links: int) -> str:
    """Each key's list holds the list before."""
    return "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, links))


def multiplied(links: int) -> str:
    """Each key's list holds the list before ten times."""
    more = "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, links))
    return f"a0: &a0 [{', '.join(['x'] * 10)}]\n{more}"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 90_000, f"more than {DEEPEST} levels"),
        ("{a: " * 20_000, f"more than {DEEPEST} levels"),
        ("".join(f"{'  ' * level}k:\n" for level in range(200)), f"more than {DEEPEST} levels"),
        (chained(100), f"more than {DEEPEST} levels"),
        (multiplied(9), f"{MOST_VALUES:,} values"),
        (f"a: [{'1,' * 20_000}]", f"{MOST_VALUES:,} values"),
        (f"a: {'x' * MOST_BYTES}", f"more than {MOST_BYTES:,} bytes"),
        ("a: &a [*a]", "within what it refers to"),
        ("a: &a {b: {c: *a}}", "within what it refers to"),
        ("a: *b", "refers to nothing"),
        ("a: 2020-99-99", "a value is none of its kind"),
        ('a: !!int ""', "a value is none of its kind"),
        ("a: !!bool x", "a value is none of its kind"),
        ("a: !!timestamp x", "a value is none of its kind"),
        (f"a: {'9' * 5000}", "a value is none of its kind"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("a: \0", "special characters are not allowed"),
        ("", "must hold a mapping"),
    ],
)
def test_files_that_cannot_be_meant(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "system.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as raised:
        read_yaml(path)
    assert "\n" not in str(raised.value) and path.name in str(raised.value) and len(str(raised.value)) < 500


def test_a_file_that_does_not_end() -> None:
    with pytest.raises(UserError, match="more than 100,000 bytes"):
        read_yaml(Path("/dev/zero"))


def test_aliases_that_can_be_meant(tmp_path: Path) -> None:
    path = tmp_path / "system.yaml"
    path.write_text("base: &b {model: x}\nexpert: *b\nantiexpert: {<<: *b, chat: none}\n")
    b = {"model": "x"}
    assert read_yaml(path) == {"base": b, "expert": b, "antiexpert": {"model": "x", "chat": "none"}}
    path.write_text(chained(DEEPEST - 5) + f"b: {'[' * 20}{']' * 20}")
    assert len(read_yaml(path)) == DEEPEST - 4

"""Systems' files that are too large, too deep, or hold what is none of its kind: one line, and at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxytune import yaml_files
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


def test_a_file_that_is_not_there_or_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^no file '.*none\.yaml'$"):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match=r"^cannot read '.*': .*[Dd]irectory"):
        read_yaml(tmp_path)
    path = tmp_path / "system.yaml"
    path.write_text("- a\n")
    with pytest.raises(UserError, match=r"must hold a mapping of keys to values, not list$"):
        read_yaml(path)


def test_the_most_that_a_file_may_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mapping, its key and the list count too. The bounds are small here, for speed."""
    path = tmp_path / "system.yaml"
    assert (MOST_BYTES, MOST_VALUES, DEEPEST) == (100_000, 10_000, 32)
    monkeypatch.setattr(yaml_files, "MOST_VALUES", 50)
    monkeypatch.setattr(yaml_files, "MOST_BYTES", 200)
    for text, says in [
        (f"a: [{'1,' * 47}]", None),
        (f"a: [{'1,' * 48}]", "more than 32 levels or 50 values"),
        (f"a: {'x' * 197}", None),
        (f"a: {'x' * 198}", "more than 200 bytes"),
        ("a: " + "[" * 30 + "]" * 30, None),
        ("a: " + "[" * 31 + "]" * 31, "more than 32 levels"),
        ("a: &b [1, 2, 3]\nc: [" + "*b," * 10 + "]", None),
        ("a: &b [1, 2, 3]\nc: [" + "*b," * 11 + "]", "50 values"),
    ]:
        path.write_text(text)
        if says is None:
            assert "a" in read_yaml(path)
        else:
            with pytest.raises(UserError, match=says):
                read_yaml(path)

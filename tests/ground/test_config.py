"""What settings mean, by their definition: alpha by position, and the gap that is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from proxytune.config import (
    ExpertSpec,
    ModelSpec,
    RunSpec,
    Sampling,
    System,
    as_system,
    cache_folder,
    load_system,
    parse_alpha,
    parse_system,
    system_names,
)
from proxytune.errors import UserError
from proxytune.intervals import gap_closed
from proxytune.records import Metric


@pytest.mark.parametrize(
    ("text", "alphas"),
    [
        ("0.5", [0.5] * 6),
        ("first:2", [1, 1, 0, 0, 0, 0]),
        ("first:2:0.5", [0.5, 0.5, 0, 0, 0, 0]),
        ("first:0", [0] * 6),
        ("warmup:3", [0, 0, 0, 1, 1, 1]),
        ("warmup:1:2", [0, 2, 2, 2, 2, 2]),
        ("linear:0:1:4", [0, 0.25, 0.5, 0.75, 1, 1]),
        ("linear:2:1:2", [2, 1.5, 1, 1, 1, 1]),
    ],
)
def test_alpha_at_every_position(text: str, alphas: list[float]) -> None:
    schedule = parse_alpha(text)
    assert [schedule.at(position) for position in range(6)] == alphas
    assert parse_alpha(schedule.text) == schedule


def test_a_gap_whose_interval_touches_zero_is_none() -> None:
    """(tuned - base) has the half width of both intervals together: 0.3 and 0.4 give 0.5."""
    base = Metric(value=0.0, low=-0.3, high=0.3)

    def closed(value: float, tuned: float) -> float | None:
        return gap_closed(base, Metric(value=value), Metric(value=tuned, low=tuned - 0.4, high=tuned + 0.4))

    assert closed(0.25, 0.5) is None and closed(-0.25, -0.5) is None
    assert closed(0.25, 0.75) == pytest.approx(1 / 3) == closed(-0.25, -0.75)
    assert gap_closed(base, Metric(value=0.25), Metric(value=0.75)) is None


def test_a_temperature_just_above_zero_is_refused_in_one_line() -> None:
    """As any other value that is out of bounds, in Python and in a file."""
    with pytest.raises(UserError, match=r"^Sampling: temperature: 0\.0009 is below 0\.001: use 0 for greedy"):
        Sampling(temperature=0.0009)
    assert Sampling(temperature=0.001).temperature == 0.001


# Alpha


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (0.5, "0.5"),
        (1, "1"),
        (2.0, "2"),
        ("0", "0"),
        ("1e1", "10"),
        ("first:2", "first:2"),
        ("first:2:1", "first:2"),
        ("first:2:0.5", "first:2:0.5"),
        ("warmup:3:1.0", "warmup:3"),
        ("warmup:1:2", "warmup:1:2"),
        ("linear:0:1:4", "linear:0:1:4"),
        ("linear:1:0.25:7", "linear:1:0.25:7"),
    ],
)
def test_alpha_as_it_is_written(given: object, text: str) -> None:
    assert parse_alpha(given).text == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1:2",
        "first",
        "first:",
        "first:x",
        "first:1.5",
        "first:-1",
        "first:1:2:3",
        "warmup",
        "warmup:1:2:3",
        "linear:0:1",
        "linear:0:1:x",
        "linear:0:1:2:3",
        "cosine:3",
    ],
)
def test_what_is_no_alpha(text: str) -> None:
    with pytest.raises(UserError) as raised:
        parse_alpha(text)
    assert str(raised.value) == (
        f"alpha '{text}' is not a number from 0 to 10, first:N, warmup:N or linear:FROM:TO:N"
    )


def test_a_schedule_has_all_of_its_parts() -> None:
    for text, kind, start, end, length in [
        ("0.5", "constant", 0.5, 0.5, 0),
        ("first:3:2", "first", 2.0, 0.0, 3),
        ("warmup:3:2", "warmup", 0.0, 2.0, 3),
        ("linear:2:3:4", "linear", 2.0, 3.0, 4),
    ]:
        made = parse_alpha(text)
        assert (made.kind, made.start, made.end, made.length) == (kind, start, end, length)


def test_the_bounds_of_alpha() -> None:
    for text in ("0", "10", "linear:10:0:3"):
        assert parse_alpha(text).check() == parse_alpha(text)
    for text, shown in (("10.1", "10.1"), ("linear:0:11:3", "11"), ("linear:11:0:3", "11"), ("nan", "nan")):
        with pytest.raises(UserError, match=f"^alpha = {shown} is out of range: .* from 0 to 10$"):
            parse_alpha(text).check()
    for text in ("-0.5", "linear:-0.5:1:3", "linear:1:-0.5:3"):
        with pytest.raises(UserError, match=r"^alpha = -0\.5 is negative: .*--allow-negative-alpha$"):
            parse_alpha(text).check()
        assert parse_alpha(text).check(allow_negative=True) == parse_alpha(text)
    assert parse_alpha("-10").check(allow_negative=True).end == -10
    for text in ("-10.5", "inf", "-inf"):
        with pytest.raises(UserError, match="is out of range"):
            parse_alpha(text).check(allow_negative=True)


def test_what_cuts_a_distribution() -> None:
    given: list[dict[str, Any]] = [{}, {"temperature": 0.5}, {"top_k": 1}, {"top_p": 0.9}, {"min_p": 0.1}]
    assert [Sampling(**one).cuts for one in given] == [False, False, True, True, True]


# Systems

A, B = {"model": "a"}, {"model": "b"}
OWN = {"model": "e", "antiexpert": A}
API = {"api": "http://here/v1", "model": "gpt"}


def system(**roles: Any) -> System:
    """A system with a base and these models."""
    return System.model_validate({"name": "s", "base": B, **roles})


@pytest.mark.parametrize(
    ("models", "roles"),
    [
        ({}, ("base",)),
        ({"expert": A}, ("base", "expert")),
        ({"antiexpert": A}, ("base", "antiexpert")),
        ({"tuned": A}, ("base", "tuned")),
        ({"expert": A, "antiexpert": A}, ("base", "antiexpert", "expert", "proxy")),
        ({"experts": [OWN, OWN]}, ("base", "expert", "proxy")),
        ({"experts": [OWN, A]}, ("base", "expert")),
        ({"experts": [OWN, A], "antiexpert": A}, ("base", "antiexpert", "expert", "proxy")),
        (
            {"expert": A, "antiexpert": A, "tuned": A, "base": API},
            ("base", "antiexpert", "expert", "proxy", "tuned"),
        ),
    ],
)
def test_the_roles_of_a_system(models: dict[str, Any], roles: tuple[str, ...]) -> None:
    made = system(**models)
    assert made.roles == roles and repr(made) == f"System(s: {', '.join(roles)})"
    for role in roles:
        assert made.require(role) == role
    for role in {"base", "antiexpert", "expert", "proxy", "tuned"} - {*roles}:
        with pytest.raises(UserError) as raised:
            made.require(role)
        assert str(raised.value) == f"system 's' cannot run as '{role}': it has {', '.join(roles)}"
    with pytest.raises(UserError, match=r"^Unknown role 'bas'\. Did you mean: base\?"):
        made.require("bas")


def test_experts_by_either_name() -> None:
    assert system().expert_specs == ()
    assert system(expert=A).expert_specs == (ExpertSpec(model="a", weight=1.0),)
    two = system(experts=[{"model": "x", "weight": 0.25}, OWN]).expert_specs
    assert two == (ExpertSpec(model="x", weight=0.25), ExpertSpec(model="e", antiexpert=ModelSpec(model="a")))
    with pytest.raises(UserError, match="give either `expert` or `experts`, not both"):
        System(base=ModelSpec(model="b"), expert=ModelSpec(model="a"), experts=(ExpertSpec(model="a"),))
    with pytest.raises(UserError, match="a model needs `model: DIR or hub id`, or `adapter: DIR`"):
        ModelSpec(dtype="float32")
    assert ModelSpec(adapter="x").model is None


def test_a_base_behind_an_api_has_no_weights() -> None:
    assert system().endpoint is None and system().local_base() == ModelSpec(model="b")
    behind = system(base=API)
    assert behind.endpoint is not None and behind.endpoint.model == "gpt"
    line = r"^the base of system 's' is behind an API \(gpt at http://here/v1\), and --x needs its weights: "
    with pytest.raises(UserError, match=line):
        behind.local_base("--x")


@pytest.mark.parametrize("place", ["base", "expert", "experts", "own", "antiexpert", "tuned"])
def test_a_model_that_is_split_needs_torchrun(place: str) -> None:
    split = {"model": "x", "device_map": "tensor"}
    own = {"experts": [{"model": "e", "device_map": "tensor", "antiexpert": A}]}
    made = system(**(own if place in ("experts", "own") else {place: split}))
    with pytest.raises(UserError, match=r"^system 's' has `device_map: tensor`, which the server cannot use"):
        made.require_one_process("the server")
    whole = {"model": "x", "device_map": "cpu"}
    system(base=API, expert=whole, antiexpert=whole, tuned=whole).require_one_process("the server")


def test_agreement_is_of_the_proxy_and_the_tuned_model() -> None:
    whole = {"expert": A, "antiexpert": A, "tuned": A}
    for role in ("proxy", "tuned"):
        system(**whole).require_agreement(role)
    for role in ("base", "expert", "antiexpert"):
        with pytest.raises(UserError, match=f"is of --as proxy or --as tuned, not of '{role}'"):
            system(**whole).require_agreement(role)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot run as 'tuned'"):
        system(expert=A, antiexpert=A).require_agreement("proxy")
    with pytest.raises(UserError, match="cannot run as 'proxy'"):
        system(expert=A, tuned=A).require_agreement("tuned")
    with pytest.raises(UserError, match="--trace agreement needs its weights"):
        system(**whole, base=API).require_agreement("tuned")


def test_what_is_shown_beside_the_figures_of_a_run() -> None:
    def remark(**more: Any) -> str | None:
        usual: dict[str, Any] = {"task": "t", "data": "generated", "data_sha256": "", "sampling": Sampling()}
        return RunSpec(**{**usual, "system": system(), "alpha": parse_alpha(1), **more}).remark

    assert remark() is None and remark(data="hub", limit=3) is None
    assert remark(data="plumbing") == "smoke data"
    assert remark(defer=0.3) == "deferral below 0.3, not proxy-tuning"
    assert remark(data="plumbing", defer=0.25) == "smoke data, deferral below 0.25, not proxy-tuning"


# Where files are


def test_where_what_can_be_made_again_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("PROXYTUNE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "proxytune"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_folder() == tmp_path / "x" / "proxytune"
    monkeypatch.setenv("PROXYTUNE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_folders_in_a_file_are_beside_it(tmp_path: Path) -> None:
    spec = {"model": "./m", "adapter": "../a"}
    other = {"model": "org/m", "adapter": "/a"}
    content = {
        "base": spec, "expert": other, "antiexpert": {"model": "~/m"}, "tuned": {"model": ".hidden"},
    }  # fmt: skip
    made = parse_system(content, tmp_path / "x.yaml", tmp_path)
    assert made.name == "x"
    assert made.base == ModelSpec(model=str(tmp_path / "m"), adapter=str(tmp_path.parent / "a"))
    assert made.expert == ModelSpec(model="org/m", adapter="/a")
    assert made.antiexpert == ModelSpec(model="~/m") and made.tuned == ModelSpec(model=".hidden")
    local = {**API, "model": "./gpt"}
    assert parse_system({"base": local}, tmp_path / "x.yaml", tmp_path).base.model == "./gpt", "no folder"
    experts = {"base": API, "experts": [{"model": "./e", "antiexpert": {"model": "../n"}}], "name": "own"}
    made = parse_system(experts, tmp_path / "x.yaml", tmp_path)
    [one] = made.experts
    assert made.name == "own" and made.endpoint is not None
    assert (one.model, one.antiexpert) == (
        str(tmp_path / "e"),
        ModelSpec(model=str(tmp_path.parent / "n")),
    )
    for role in ("expert", "antiexpert", "tuned"):
        made = parse_system({"base": B, role: {"model": "./m"}}, tmp_path / "x.yaml", tmp_path)
        assert getattr(made, role) == ModelSpec(model=str(tmp_path / "m"))
    with pytest.raises(UserError, match=r"^'.*/x\.yaml': base.dtype: "):
        parse_system({"base": {"model": "m", "dtype": "x"}}, tmp_path / "x.yaml", tmp_path)


def test_a_system_by_name_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for ending in ("yaml", "yml"):
        path = tmp_path / f"mine.{ending}"
        path.write_text("base: {model: ./m}\n")
        made = load_system(path)
        assert (made.name, made.base.model) == ("mine", str(tmp_path / "m"))
        assert as_system(str(path)) == as_system(made) == made
    monkeypatch.chdir(tmp_path)
    names = system_names()
    assert names == sorted(names) and "demo" in names and not any(name.endswith(".yaml") for name in names)
    assert load_system("demo").name == "demo"
    with pytest.raises(UserError, match=r"^Unknown system 'demmo'.*Or give the path of a \.yaml file$"):
        load_system("demmo")

"""Every setting: what it is when nobody says anything, and the smallest and largest value that is taken."""

from __future__ import annotations

from typing import Any

import pytest

from proxytune.api_spec import MOST_VISIBLE, ApiSpec
from proxytune.config import AlphaSchedule, ExpertSpec, ModelSpec, RunSpec, Sampling, System, parse_alpha
from proxytune.errors import UserError
from proxytune.options import (
    ApiOptions,
    CodeOptions,
    DecodeOptions,
    EngineOptions,
    JudgeOptions,
    RayOptions,
    RunOptions,
    ServeOptions,
    parse_draft_length,
    parse_price,
    parse_size,
)
from proxytune.schema import Record

BASE = ModelSpec(model="m")
API = {"api": "http://here/v1", "model": "m"}
SAMPLING: dict[str, Any] = {
    "max_new_tokens": 512, "min_new_tokens": 0, "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0,
    "n": 1, "seed": 0, "stop": (), "ban": (), "ban_first": (),
}  # fmt: skip
MODEL: dict[str, Any] = {
    "model": "m", "adapter": None, "dtype": "auto", "device_map": None, "quantization": "none",
    "chat": "none", "revision": None, "trust_remote_code": False,
}  # fmt: skip
SYSTEM: dict[str, Any] = {
    "name": "custom", "description": "", "base": MODEL, "expert": None, "experts": (), "antiexpert": None,
    "tuned": None, "alpha": "1", "vocab": "strict", "data": {}, "judges": {},
}  # fmt: skip
CODE: dict[str, Any] = {"allow_code_execution": False, "sandbox": "auto", "code_python": None}
CALLS: dict[str, Any] = {
    "parallel": 16, "api_deadline": 120.0, "api_retries": 6, "yes": False, "max_cost": None, "price": None,
}  # fmt: skip
USUAL: list[tuple[Record, dict[str, Any]]] = [
    (Sampling(), SAMPLING),
    (BASE, MODEL),
    (ExpertSpec(model="m"), {**MODEL, "weight": 1.0, "antiexpert": None}),
    (System(base=BASE), SYSTEM),
    (
        ApiSpec.model_validate(API),
        {
            **API,
            "top_logprobs": 5,
            "route": "completions",
            "prompt_as": "text",
            "key_variable": "OPENAI_API_KEY",
        },
    ),
    (AlphaSchedule(), {"kind": "constant", "start": 1.0, "end": 1.0, "length": 0}),
    (
        RunSpec(
            task="t",
            system=System(base=BASE),
            alpha=parse_alpha(0.5),
            sampling=Sampling(),
            data="d",
            data_sha256="",
        ),
        {
            "task": "t", "system": SYSTEM, "role": "proxy", "alpha": "0.5", "sampling": SAMPLING, "data": "d",
            "data_sha256": "", "limit": None, "shots": 0, "trace": "off", "mode": "generate", "defer": None,
            "forced": None,
        },
    ),
    (
        RunOptions(),
        {
            "alpha": None, "sampling": None, "data": None, "limit": None, "shots": 0, "shots_from": None,
            "mode": "generate", "defer": None, "trace": "off", "seed": 0, "forced": None,
            "allow_negative_alpha": False,
        },
    ),
    (ApiOptions(), CALLS),
    (
        DecodeOptions(),
        {
            "batch": None, "kv_memory": None, "speculate": "auto", "drafter": None, "threads": None,
            "progress": True, "api": CALLS,
        },
    ),
    (RayOptions(), {"ray": None, "workers": 2, "gpus_per_worker": 0}),
    (EngineOptions(), {"engine": "own", "tensor_parallel": 1, "eager": False}),
    (CodeOptions(), CODE),
    (
        JudgeOptions(),
        {
            "judge": None, "yes": False, "max_cost": None, "price": None, "seed": 0, "batch": None,
            "code": CODE,
        },
    ),
    (
        ServeOptions(),
        {
            "host": "127.0.0.1", "port": 8000, "roles": None, "api_key_file": None, "max_waiting": 256,
            "max_choices": 128, "max_body": 4_000_000, "max_stops": 16, "stalled_seconds": 60.0,
            "shutdown_seconds": 30.0,
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize(("record", "usual"), USUAL, ids=lambda one: type(one).__name__)
def test_what_is_usual(record: Record, usual: dict[str, Any]) -> None:
    assert record.model_dump() == usual


BOUNDS: list[tuple[type[Record], str, list[Any], list[Any]]] = [
    (Sampling, "max_new_tokens", [1], [0]),
    (Sampling, "min_new_tokens", [0], [-1]),
    (Sampling, "temperature", [0, 0.001, 100], [-0.1, 0.0009, 100.1, float("inf"), float("nan")]),
    (Sampling, "top_k", [0], [-1]),
    (Sampling, "top_p", [0.001, 1], [0, 1.001]),
    (Sampling, "min_p", [0, 1], [-0.001, 1.001]),
    (Sampling, "n", [1], [0]),
    (Sampling, "stop", [("a", " ")], [("a", "")]),
    (Sampling, "ban", [("a", " ")], [("a", "")]),
    (Sampling, "ban_first", [("a", " ")], [("a", "")]),
    (AlphaSchedule, "length", [0], [-1]),
    (RunOptions, "defer", [0.001, 1], [0, 1.001]),
    (ApiOptions, "parallel", [1, 256], [0, 257]),
    (ApiOptions, "api_deadline", [0.001, 3600], [0, 3600.5, float("inf")]),
    (ApiOptions, "api_retries", [0, 100], [-1, 101]),
    (ApiOptions, "max_cost", [0, 0.5], [-0.001, float("inf")]),
    (DecodeOptions, "batch", [1], [0]),
    (DecodeOptions, "kv_memory", [1, "1"], [0, "0"]),
    (DecodeOptions, "speculate", [0, 15, "auto", "off", "15"], [-1, 16, "on", "16", 1.5]),
    (DecodeOptions, "threads", [1, 1024], [0, 1025]),
    (RayOptions, "workers", [1, 4096], [0, 4097]),
    (RayOptions, "gpus_per_worker", [0, 64], [-0.1, 64.1]),
    (EngineOptions, "tensor_parallel", [1, 64], [0, 65]),
    (JudgeOptions, "max_cost", [0, 0.5], [-0.001, float("inf")]),
    (JudgeOptions, "batch", [1], [0]),
    (JudgeOptions, "judge", ["m", None], ["", " "]),
    (ServeOptions, "port", [0, 65535], [-1, 65536]),
    (ServeOptions, "max_waiting", [0], [-1]),
    (ServeOptions, "max_choices", [1], [0]),
    (ServeOptions, "max_body", [1, "2kB"], [0]),
    (ServeOptions, "max_stops", [1], [0]),
    (ServeOptions, "stalled_seconds", [0.001], [0, float("inf")]),
    (ServeOptions, "shutdown_seconds", [0], [-0.001, float("inf")]),
]


@pytest.mark.parametrize(("record", "name", "taken", "refused"), BOUNDS)
def test_the_bounds_of_a_setting(
    record: type[Record], name: str, taken: list[Any], refused: list[Any]
) -> None:
    for value in taken:
        assert name in record(**{name: value}).model_dump()
    for value in refused:
        with pytest.raises(UserError, match=f"^{record.__name__}: {name}: "):
            record(**{name: value})


def test_bounds_of_records_that_need_more() -> None:
    for number in (1, MOST_VISIBLE):
        assert ApiSpec.model_validate({**API, "top_logprobs": number}).top_logprobs == number
    assert MOST_VISIBLE == 1_000_000
    for number in (0, MOST_VISIBLE + 1):
        with pytest.raises(UserError, match="top_logprobs"):
            ApiSpec(api="http://here", model="m", top_logprobs=number)
    assert ExpertSpec(model="m", weight=-1.5).weight == -1.5
    for weight in (float("inf"), float("nan")):
        with pytest.raises(UserError, match="weight"):
            ExpertSpec(model="m", weight=weight)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("7", 7),
        ("7B", 7),
        ("3K", 3000),
        ("3kB", 3000),
        ("3KiB", 3072),
        ("2M", 2_000_000),
        ("1.5MB", 1_500_000),
        ("2MiB", 2 * 1024**2),
        ("4GB", 4 * 10**9),
        (" 512 gib ", 512 * 1024**3),
        ("1T", 10**12),
        ("1TiB", 1024**4),
        ("0.5K", 500),
        (12, 12),
        (None, None),
        *((bad, None) for bad in ("", "GB", "-1", "1X", "1I", "1IB", "1 2", "0.0001K", "1,5K", "1e3")),
    ],
)
def test_amounts_of_memory(text: object, size: int | None) -> None:
    if size is None and text is not None:
        with pytest.raises(ValueError, match="no amount of memory: write 4GB, 512MB or a number of bytes"):
            parse_size(text)
    else:
        assert parse_size(text) == size


def test_how_many_tokens_are_drafted() -> None:
    assert [parse_draft_length(given) for given in ("auto", "off", 0, "7", 15)] == ["auto", "off", 0, 7, 15]
    for bad in (-1, 16, "x", None, "1.5"):
        with pytest.raises(ValueError, match="give 'auto', 'off' or a length from 0 to 15"):
            parse_draft_length(bad)
    lengths = [DecodeOptions(speculate=given).draft_length for given in ("auto", "off", 4, 0)]
    assert lengths == [None, 0, 4, 0]


def test_prices() -> None:
    assert parse_price("2,8") == (2, 8) and parse_price("0, 999999.5") == (0, 999999.5)
    assert parse_price((3.0, 4.0)) == (3.0, 4.0) and parse_price(None) is None
    for bad in ("2", "2,8,1", "-1,2", "2,-1", "1e6,2", "2,1e6", "a,b", "", "nan,1"):
        with pytest.raises(ValueError, match="must be two numbers: USD per million tokens, IN,OUT"):
            parse_price(bad)


def test_options_of_vllm_are_refused_without_it() -> None:
    EngineOptions().check()
    EngineOptions(engine="vllm", tensor_parallel=2, eager=True).check()
    for options in (EngineOptions(tensor_parallel=2), EngineOptions(eager=True)):
        with pytest.raises(UserError, match="are of --engine vllm"):
            options.check()


def test_alpha_may_be_written_in_every_form() -> None:
    given = [RunOptions(alpha=alpha).alpha for alpha in (0, "first:3", parse_alpha("warmup:2"), None)]
    assert given == [parse_alpha("0"), parse_alpha("first:3"), parse_alpha("warmup:2"), None]


# Addresses of endpoints


@pytest.mark.parametrize("address", ["http://here", "https://a.b/v1", "http://127.0.0.1:8000/v1"])
def test_addresses(address: str) -> None:
    assert ApiSpec(api=address, model="m").api == address
    assert ApiSpec(api=f"{address}//", model="m").api == address


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("here", "give http"),
        ("ftp://here", "give http"),
        ("http://", "give http"),
        ("http://here:0", "give http"),
        ("http://here:99999", "give http"),
        ("http://h e", "give http"),
        ("http://h\u00e9re", "give http"),
        ("http://[::1", "give http"),
        ("http://me@here", "give an address without a user"),
        ("http://here?a=b", "give an address without a user"),
        ("http://here#a", "give an address without a user"),
        ("http://here/\x07", "give an address without a user"),
    ],
)
def test_what_is_no_address(address: str, says: str) -> None:
    with pytest.raises(UserError, match=f"^ApiSpec: api: {says}"):
        ApiSpec(api=address, model="m")


def test_the_other_fields_of_an_endpoint() -> None:
    assert str(ApiSpec(api="http://here/v1/", model="gpt")) == "gpt at http://here/v1"
    for name in ("A", "MY_KEY2"):
        assert ApiSpec.model_validate({**API, "key_variable": name}).key_variable == name
    for name in ("sk-abc", "key", "2KEY", "_KEY", "KEY ", ""):
        with pytest.raises(UserError, match="and not the key itself"):
            ApiSpec(api="http://here", model="m", key_variable=name)
    with pytest.raises(UserError, match="name the model"):
        ApiSpec(api="http://here", model=" ")
    with pytest.raises(UserError, match="a chat endpoint takes no token ids"):
        ApiSpec(api="http://here", model="m", route="chat", prompt_as="ids")
    assert ApiSpec(api="http://here", model="m", prompt_as="ids").route == "completions"
    assert ApiSpec(api="http://here", model="m", route="chat").prompt_as == "text"


@pytest.mark.parametrize(
    ("address", "here"),
    [
        ("http://localhost:8000/v1", True),
        ("http://127.0.0.1/v1", True),
        ("http://[::1]:80/v1", True),
        ("http://127.0.0.2/v1", False),
        ("https://localhost.org/v1", False),
        ("http://api.org/localhost", False),
    ],
)
def test_which_endpoints_run_here(address: str, here: bool) -> None:
    assert ApiSpec(api=address, model="m").is_here is here

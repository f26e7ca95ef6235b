"""vLLM as the engine, beside ours: the same tokens, log-probabilities and scores. `make test-vllm` runs this
in an environment of its own, with vLLM's CPU build and its V1 model runner."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from proxytune.config import AlphaSchedule, Sampling, System, load_system, parse_alpha
from proxytune.decoding import Decoder
from proxytune.errors import UserError
from proxytune.models.roles import Models
from proxytune.options import DecodeOptions, EngineOptions
from proxytune.records import Completion, Example, Prompt
from proxytune.results import read_rows
from proxytune.tasks import get_task, read_source
from tests.support import lm_eval_tasks, vllm_systems
from tests.support.checkout import ROOT, environment
from tests.support.require import require_demo, require_or_skip

if importlib.util.find_spec("vllm") is None:
    require_or_skip("vllm", "vLLM is not installed (make test-vllm)")

from proxytune.integrations.vllm_plugin import VllmDecoder, VllmLaunch

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}
EAGER = EngineOptions(engine="vllm", eager=True)
SAMPLING = Sampling(max_new_tokens=40)
ALPHAS = [parse_alpha(text) for text in ("0", "0.5", "1", "2", "first:4", "linear:0:2:10")]
Found = dict[tuple[str, str, int], Completion]


@pytest.fixture(scope="module", autouse=True)
def _settings() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in VLLM.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo, which vLLM can run."""
    require_demo()
    return vllm_systems.write_demo(tmp_path_factory.mktemp("systems") / "demo64")


@pytest.fixture(scope="module")
def system(yaml: Path) -> System:
    return load_system(yaml)


@pytest.fixture(scope="module")
def decoder(system: System) -> Iterator[VllmDecoder]:
    made = started(system)
    yield made
    made.close()


def started(system: System, decode: DecodeOptions | None = None, **arguments: Any) -> VllmDecoder:
    """vLLM with a system; `arguments` are those of its engine that we have no option for."""
    launch = VllmLaunch(
        Models(system), "proxy", system.alpha, decode or DecodeOptions(speculate="off"), EAGER
    )
    with pytest.MonkeyPatch.context() as patch:
        own = VllmLaunch.arguments
        patch.setattr(VllmLaunch, "arguments", lambda launch: {**own(launch), **arguments})
        return VllmDecoder(launch)


def questions(count: int) -> tuple[Example, ...]:
    return tuple(read_source(get_task("gsm", "generate"), "generated", count).examples)


def swept(decoder: Any, examples: Sequence[Example], alphas: Sequence[AlphaSchedule], **how: Any) -> Found:
    asked = [(example, alphas) for example in examples]
    found = decoder.sweep(asked, how.pop("sampling", SAMPLING), task="gsm", **how)
    return {(alpha.text, one.example_id, one.sample): one for alpha, one in found}


def ours(system: System) -> Decoder:
    return Decoder(Models(system), "proxy", DecodeOptions(speculate="off"))


def same(found: Found, expected: Found) -> None:
    """The same tokens, texts and endings; log-probabilities to the rounding of float32."""
    assert found.keys() == expected.keys() and found
    for key, one in found.items():
        other = expected[key]
        assert (one.token_ids, one.text, one.finish_reason) == (
            other.token_ids,
            other.text,
            other.finish_reason,
        ), key
        assert one.logprob == pytest.approx(other.logprob, abs=1e-3)


def test_the_same_tokens_with_mixed_alphas_and_again_from_the_prefix_cache(
    decoder: VllmDecoder, system: System
) -> None:
    examples = questions(10)
    expected = swept(ours(system), examples, ALPHAS)
    assert len({one.token_ids for one in expected.values()}) > 20  # alpha matters
    same(swept(decoder, examples, ALPHAS), expected)
    same(swept(decoder, examples, ALPHAS), expected)


def test_stops_bans_and_least_lengths(decoder: VllmDecoder, system: System) -> None:
    examples, own = questions(6), ours(system)
    for sampling in (
        Sampling(max_new_tokens=40, stop=(".", " 2")),
        Sampling(max_new_tokens=12, min_new_tokens=12),
        Sampling(max_new_tokens=40, ban=("the",)),
    ):
        found = swept(decoder, examples, ALPHAS[2:3], sampling=sampling)
        same(found, swept(own, examples, ALPHAS[2:3], sampling=sampling))


def test_samples_differ_from_each_other_and_not_from_run_to_run(decoder: VllmDecoder) -> None:
    sampling = Sampling(max_new_tokens=24, temperature=1.0, top_p=0.9, n=3)
    first = swept(decoder, questions(3), ALPHAS[2:3], sampling=sampling)
    assert len(first) == 9 and len({one.token_ids for one in first.values()}) > 4
    again = swept(decoder, questions(3), ALPHAS[2:3], sampling=sampling)
    assert [one.token_ids for one in again.values()] and {k: v.token_ids for k, v in again.items()} == {
        k: v.token_ids for k, v in first.items()
    }


def test_log_probabilities_of_texts(decoder: VllmDecoder, system: System) -> None:
    task = get_task("truthfulqa_mc", "likelihood")
    examples = read_source(task, "generated", 5).examples
    assert task.continuations is not None
    alphas = [parse_alpha(text) for text in ("0", "1", "first:2")]
    expected = {
        (alpha, one.example_id, one.sample): one.logprob
        for alpha, one in ours(system).likelihood_sweep(examples, task.continuations, alphas)
    }
    found = {
        (alpha, one.example_id, one.sample): one.logprob
        for alpha, one in decoder.likelihood_sweep(examples, task.continuations, alphas)
    }
    assert found == pytest.approx(expected, abs=1e-3) and len(found) > 30


def test_a_prompt_that_is_too_long_names_the_window(decoder: VllmDecoder) -> None:
    long = Example("long", Prompt("a b c " * 2000, ""))
    with pytest.raises(UserError, match=r"the prompt of request long has \d+ tokens"):
        list(decoder.stream([long], SAMPLING))


def test_preemption(system: System) -> None:
    """KV memory for a few of the rows: vLLM drops some and computes them again."""
    examples = questions(10)
    made = started(system, num_gpu_blocks_override=24, block_size=32, max_model_len=512)
    try:
        same(swept(made, examples, ALPHAS[1:3]), swept(ours(system), examples, ALPHAS[1:3]))
    finally:
        made.close()


@pytest.mark.parametrize(
    "families",
    [
        {"base": "gemma2", "expert": "mistral", "antiexpert": "mistral"},
        {"base": "mistral", "expert": "qwen3", "antiexpert": "qwen2"},
    ],
)
def test_families_with_windows_of_their_own(families: dict[str, str], tmp_path: Path) -> None:
    """The base's window must not reach the others; expert and antiexpert differ, or nobody would see it."""
    system = load_system(vllm_systems.write_random(tmp_path, families))
    examples = [Example(str(n), Prompt(f"{n} apples and a pear " * (n + 2), "")) for n in range(6)]
    made = started(system)
    try:
        same(swept(made, examples, ALPHAS[:3]), swept(ours(system), examples, ALPHAS[:3]))
    finally:
        made.close()


def test_a_quantised_base_with_plain_experts(yaml: Path, tmp_path: Path, system: System) -> None:
    """Beside our engine with the same weights unpacked. Activations of 8 bits make the difference: it is a
    small part of what alpha makes."""
    plain = vllm_systems.quantise(yaml.parent / "base", tmp_path / "base")
    packed = {"base": system.base.model_copy(update={"model": str(tmp_path / "base")})}
    unpacked = {"base": system.base.model_copy(update={"model": str(plain)})}
    examples = questions(10)
    expected = swept(ours(system.model_copy(update=unpacked)), examples, ALPHAS[:3])
    made = started(system.model_copy(update=packed))
    try:
        found = swept(made, examples, ALPHAS[:3])
    finally:
        made.close()
    agreed = [found[key].token_ids == expected[key].token_ids for key in expected]
    assert sum(agreed) >= 0.8 * len(agreed)


@pytest.mark.parametrize("fault", ["window", "quantisation"])
def test_what_a_model_did_not_ask_for_is_found_at_loading(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A window of another model, and the quantisation of another model."""
    from vllm.model_executor.layers import linear

    from proxytune.integrations.vllm_plugin import role_configs

    families = {"base": "mistral", "expert": "llama", "antiexpert": "llama"}
    system = load_system(vllm_systems.write_random(tmp_path, families))
    if fault == "window":
        monkeypatch.setattr(role_configs, "window_of", lambda own: 7)
        reason = "the base: vLLM gave layer .* the window 7|the expert: vLLM gave layer .* the window 7"
    else:
        other = type("Other", (linear.UnquantizedLinearMethod,), {})
        monkeypatch.setattr(role_configs, "UnquantizedLinearMethod", other)
        reason = "the base is not quantised, and vLLM gave"
    with pytest.raises(RuntimeError, match=reason):
        started(system)


@pytest.mark.parametrize("drafter", ["expert", "lookup"])
def test_drafts_change_no_token(drafter: str, system: System) -> None:
    examples = questions(8)
    made = started(system, DecodeOptions(speculate=3, drafter=drafter))
    try:
        same(swept(made, examples, ALPHAS[2:3]), swept(ours(system), examples, ALPHAS[2:3]))
        with pytest.raises(UserError, match=r"drafts with the one alpha"):
            swept(made, examples, ALPHAS[1:2])
    finally:
        made.close()


# The commands


def command(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    call = [sys.executable, "-m", "proxytune", *map(str, words)]
    return subprocess.run(call, cwd=folder, env=environment() | VLLM, capture_output=True, text=True)


def test_eval_gives_the_same_score(yaml: Path, tmp_path: Path) -> None:
    words = ["eval", "gsm", "--system", yaml, "--limit", 40, "--json"]
    own = command(*words, "--out", "own", folder=tmp_path)
    found = command(*words, "--engine", "vllm", "--eager", "--out", "vllm", folder=tmp_path)
    assert own.returncode == found.returncode == 0, found.stderr

    mine, theirs = json.loads(own.stdout), json.loads(found.stdout)
    assert theirs["metrics"] == mine["metrics"] and theirs["n"] == 40
    assert any("decoded by vLLM 0." in note for note in theirs["notes"])


def test_two_devices_give_the_same_score(yaml: Path, tmp_path: Path) -> None:
    """Every layer split over two processes."""
    words = ["eval", "gsm", "--system", yaml, "--limit", 12, "--json"]
    own = command(*words, "--out", "own", folder=tmp_path)
    split = ["--engine", "vllm", "--eager", "--tensor-parallel", 2, "--out", "vllm"]
    found = command(*words, *split, folder=tmp_path)
    assert own.returncode == found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["metrics"] == json.loads(own.stdout)["metrics"]
    texts = [
        [row["responses"][0]["text"] for row in sorted(read_rows(tmp_path / one), key=lambda row: row["id"])]
        for one in ("own", "vllm")
    ]
    assert texts[0] == texts[1]


def test_lm_eval_gives_the_same_figures(yaml: Path, tmp_path: Path) -> None:

    made = [
        lm_eval_tasks.write(tmp_path, "sums", lm_eval_tasks.GENERATE, lm_eval_tasks.sums(4)),
        lm_eval_tasks.write(tmp_path, "choose", lm_eval_tasks.CHOOSE, lm_eval_tasks.choices(4)),
        lm_eval_tasks.write(tmp_path, "read", lm_eval_tasks.READ, lm_eval_tasks.texts(2)),
    ]
    words = ["lm-eval", "--system", yaml, "--tasks", ",".join(map(str, made))]
    figures = []
    for folder, more in (("own", []), ("vllm", ["--engine", "vllm", "--eager"])):
        done = command(*words, *more, "--out", folder, folder=tmp_path)
        assert done.returncode == 0, done.stderr
        [path] = (tmp_path / folder / "demo64" / "lm-eval").glob("*/results_*.json")
        results = json.loads(path.read_text())["results"]
        figures.append(
            {
                (task, name): value
                for task, one in results.items()
                for name, value in one.items()
                if isinstance(value, float) and "stderr" not in name
            }
        )
    assert figures[1] == pytest.approx(figures[0], rel=1e-4) and len(figures[0]) >= 4


def test_the_server(yaml: Path, system: System, tmp_path: Path) -> None:
    """OpenAI's client: alpha per request, log-probabilities, streaming, and 400 for an alpha that is none."""
    from openai import BadRequestError, OpenAI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "proxytune", "serve", "--system", str(yaml), "--port", str(port)]
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen(
        [*call, "--engine", "vllm", "--eager"],
        env=environment() | VLLM | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", server, tmp_path / "log")
        client = OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        example = questions(1)[0]
        expected = swept(ours(system), [example], ALPHAS[:3])
        settings: dict[str, Any] = {"model": "demo64", "prompt": example.prompt.plain, "max_tokens": 40}
        settings["temperature"] = 0
        for alpha in ALPHAS[:3]:
            asked = {"alpha": alpha.text}
            done = client.completions.create(**settings, logprobs=1, extra_body=asked)
            one = expected[alpha.text, example.id, 0]
            assert done.choices[0].text == one.text
            told = done.choices[0].logprobs
            assert told is not None and sum(told.token_logprobs or []) == pytest.approx(one.logprob, abs=1e-3)
            pieces = client.completions.create(**settings, stream=True, extra_body={"vllm_xargs": asked})
            assert "".join(piece.choices[0].text for piece in pieces) == one.text
        for bad in ({"alpha": 11}, {"alpha": -1}, {"vllm_xargs": {"alpha": "much"}}):
            with pytest.raises(BadRequestError, match="alpha"):
                client.completions.create(**settings, extra_body=bad)
        assert client.completions.create(**settings).choices[0].text == expected["1", example.id, 0].text
    finally:
        server.terminate()
        server.wait(timeout=120)
        log.close()


def _wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 400
    while True:
        assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (OSError, urllib.error.URLError):
            time.sleep(1)


def test_the_environment_is_the_checkouts() -> None:
    """The workers that vLLM starts import this checkout, and find the model."""
    import proxytune

    assert Path(proxytune.__file__).is_relative_to(ROOT)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"

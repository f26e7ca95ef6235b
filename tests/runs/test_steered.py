"""A loaded system: models are loaded once, and every call says what the one-call forms and commands say."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import proxytune
from proxytune import DecodeOptions, RunOptions, Sampling, System, UserError, load_system
from proxytune.decoding import Decoder
from proxytune.records import Example, Prompt
from proxytune.runs import evaluation
from proxytune.runs.steered import SteeredModel, generate, named_by_content
from tests.support import tiny_system

SHORT = Sampling(max_new_tokens=8)
HOT = Sampling(max_new_tokens=8, temperature=1.0, seed=5)
PLAIN = DecodeOptions(speculate="off", progress=False)


@pytest.fixture(scope="module")
def yaml(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_system.write(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def system(yaml: Path) -> System:
    return load_system(yaml)


@pytest.fixture
def model(system: System) -> Iterator[SteeredModel]:
    with proxytune.load(system, decode=PLAIN) as model:
        yield model


def test_it_says_what_the_one_call_form_says(model: SteeredModel, system: System) -> None:
    prompts = ["ab", "c d", "ab"]
    for as_, alpha in (("proxy", None), ("proxy", "first:2"), ("base", None), ("tuned", None)):
        found = model.generate(prompts, as_=as_, sampling=HOT, alpha=alpha)
        assert found == generate(system, prompts, as_=as_, sampling=HOT, alpha=alpha, decode=PLAIN)
    assert found[0].token_ids != found[2].token_ids, "the same prompt twice is sampled twice"


def test_every_model_is_loaded_once(model: SteeredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    model.models.on_load = lambda name, spec: loaded.append(name)
    for _ in range(2):
        model.compare("ab", sampling=SHORT)
        model.logprobs("ab", ["c"], as_="expert")
    assert sorted(loaded) == ["antiexpert", "base", "expert", "tuned"]


def test_a_decoder_serves_one_role_after_another(model: SteeredModel) -> None:
    first = model.generate(["ab"], sampling=SHORT)
    assert model.generate(["ab"], as_="base", sampling=SHORT) != first
    assert model.generate(["ab"], sampling=SHORT) == first


def test_a_remark_is_of_one_call(model: SteeredModel) -> None:
    """The decoder stays, what it had to remark on other prompts does not (a warning fails a test)."""
    first = model.generate(["ab"], sampling=SHORT)
    assert model._decoder is not None
    model._decoder.remarks.append("the template takes no system message")
    assert model.generate(["ab"], sampling=SHORT) == first and model._decoder.remarks == []


@pytest.mark.parametrize("sampling", [SHORT, Sampling(max_new_tokens=30, stop=("e",)), HOT])
def test_a_stream_is_the_response_in_pieces(model: SteeredModel, sampling: Sampling) -> None:
    [whole] = model.generate(["ab"], sampling=sampling, trace=True)
    stream = model.stream("ab", sampling=sampling, trace=True)
    pieces = list(stream)
    assert "".join(pieces) == whole.text and all(pieces)
    assert stream.completion == whole and whole.trace
    assert model.generate(["ab"], sampling=sampling)[0].text == whole.text, "the model is free again"


def test_pieces_come_while_the_response_is_written(model: SteeredModel) -> None:
    stream = model.stream("ab", sampling=Sampling(max_new_tokens=40, min_new_tokens=40))
    next(stream)
    assert stream.completion is None
    assert len(list(stream)) > 5


def test_what_is_open_is_refused_until_it_is_closed(model: SteeredModel, tmp_path: Path) -> None:
    stream = model.stream("ab", sampling=SHORT)
    next(stream)
    for ask in (
        lambda: model.generate(["ab"]),
        lambda: model.stream("ab"),
        lambda: model.logprobs("ab", ["c"]),
        lambda: model.evaluate("gsm", limit=1, out=tmp_path / "run"),
        lambda: model.sweep("gsm", "0,1", limit=1, out=tmp_path / "sweep"),
    ):
        with pytest.raises(UserError, match="a stream of this model is still open: read it to its end"):
            ask()
    assert not list(tmp_path.iterdir())
    stream.close()
    stream.close()
    assert list(stream) == [] and stream.completion is None
    with model.stream("ab", sampling=SHORT) as another:
        next(another)
    assert model.generate(["ab"], sampling=SHORT)


def test_an_error_in_the_middle_of_a_stream_frees_the_model(
    model: SteeredModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    want = model.generate(["ab"], sampling=SHORT)
    with monkeypatch.context() as patch:
        stream = model.stream("ab", sampling=SHORT)
        next(stream)

        def fails() -> None:
            raise MemoryError("no more")

        patch.setattr("proxytune.engine.engine.Engine.step", lambda engine: fails())
        with pytest.raises(MemoryError):
            list(stream)
    assert model.generate(["ab"], sampling=SHORT) == want


def test_threads_take_turns(model: SteeredModel) -> None:
    want = {role: model.generate(["ab"], as_=role, sampling=HOT)[0].text for role in ("proxy", "base")}
    found: list[bool] = []

    def ask(role: str) -> None:
        found.extend(model.generate(["ab"], as_=role, sampling=HOT)[0].text == want[role] for _ in range(4))

    threads = [threading.Thread(target=ask, args=(role,)) for role in (*want, *want)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [True] * 16


def test_logprobs_are_those_of_the_decoder(model: SteeredModel, system: System) -> None:
    texts = [" A", "b c", " A"]
    decoder = Decoder(model.models, "proxy", PLAIN)
    example = Example("0", Prompt(plain="ab", user="ab"))
    want = sorted(decoder.likelihoods([example], lambda _: texts), key=lambda c: c.sample)
    assert model.logprobs("ab", texts) == pytest.approx([c.logprob for c in want], abs=1e-9)
    assert model.logprobs("ab", texts, alpha=0) == pytest.approx(model.logprobs("ab", texts, as_="base"))
    assert model.logprobs("ab", []) == []
    for bad in ("A", ["A", ""], ["A", 3]):
        with pytest.raises(UserError, match="texts must be a list of texts"):
            model.logprobs("ab", bad)  # type: ignore[arg-type]


def test_a_comparison_has_every_role_and_the_proxys_trace(model: SteeredModel) -> None:
    found = model.compare("ab", sampling=SHORT, alpha=0.5)
    assert list(found) == ["base", "antiexpert", "expert", "proxy", "tuned"] and len(found) == 5
    assert found["proxy"].trace and not found["base"].trace
    assert found["proxy"] == model.generate(["ab"], sampling=SHORT, alpha=0.5, trace=True)[0]
    assert str(found).startswith(f"[base]\n{found['base'].text}")


def test_runs_are_those_of_the_commands(model: SteeredModel, system: System, tmp_path: Path) -> None:
    options = RunOptions(sampling=SHORT)
    made = model.evaluate("gsm", limit=3, out=tmp_path / "one", options=options)
    want = evaluation.evaluate(system, "gsm", limit=3, out=tmp_path / "other", options=options, decode=PLAIN)
    assert made.metrics == want.metrics and made.spec == want.spec
    swept = model.sweep("gsm", [0, "first:2", 1.0], limit=3, out=tmp_path / "sweep", options=options)
    assert [run.spec.alpha.text for run in swept] == ["0", "first:2", "1"]
    assert swept[2].metrics == made.metrics
    assert model.generate(["ab"], sampling=SHORT), "the models are still there"


def test_a_name_a_path_or_a_system(yaml: Path, system: System) -> None:
    assert proxytune.load(str(yaml)).system == proxytune.load(yaml).system == system
    assert proxytune.load("demo").system.name == "demo"
    assert generate(yaml, ["ab"], sampling=SHORT, decode=PLAIN) == generate(
        system, ["ab"], sampling=SHORT, decode=PLAIN
    )
    with pytest.raises(UserError, match="Did you mean: demo"):
        proxytune.load("demoo")
    with pytest.raises(UserError, match="3 is no system: give a System, a name or the path"):
        proxytune.load(3)  # type: ignore[arg-type]


def test_what_is_asked_of_a_closed_model_is_refused(system: System) -> None:
    model = proxytune.load(system, decode=PLAIN)
    stream = model.stream("ab", sampling=SHORT)
    model.close()
    model.close()
    assert list(stream) == []
    with pytest.raises(UserError, match=r"closed.*load the system again"):
        model.generate(["ab"])


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda model: model.generate("ab"), "list of texts"),
        (lambda model: model.generate(["ab"], as_="bas"), "Unknown role 'bas'. Did you mean: base"),
        (lambda model: model.generate(["ab"], as_="base", alpha=1), "alpha acts on the proxy only"),
        (lambda model: model.generate(["ab"], alpha=-1), "negative"),
        (lambda model: model.stream("ab", sampling=Sampling(n=2)), "a stream is of one response"),
        (lambda model: model.sweep("gsm", []), "names 0 alphas"),
        (lambda model: model.evaluate("gms"), "Unknown task 'gms'. Did you mean: gsm"),
        (lambda model: Sampling(max_token=3), "Unknown key 'max_token'. Did you mean: max_new_tokens"),
        (lambda model: System(name="x", base={"modl": "y"}), "Unknown key 'modl'. Did you mean: model"),
    ],
)
def test_bad_input_is_one_line(model: SteeredModel, ask: object, message: str) -> None:
    assert callable(ask)
    with pytest.raises(UserError) as error:
        ask(model)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert model.generate(["ab"], sampling=SHORT), "nothing is lost"


def test_reprs_fit_on_a_line(model: SteeredModel, tmp_path: Path) -> None:
    [completion] = model.generate(["ab"], sampling=Sampling(max_new_tokens=200), trace=True)
    made = model.evaluate("gsm", limit=2, out=tmp_path / "run", options=RunOptions(sampling=SHORT))
    shown = [repr(one) for one in (model, model.system, completion, made, SHORT, model.models.spec("base"))]
    assert all(len(line) < 200 and "\n" not in line for line in shown), shown
    assert "traced" in shown[2] and "exact_match" in shown[3] and shown[4] == "Sampling(max_new_tokens=8)"


def test_names_follow_from_the_content() -> None:
    one, two, three = named_by_content(["a", "b", "a"])
    assert one.id != three.id and [one, two] == named_by_content(["a", "b"])

"""The texts of engines that give all models the same ids: what vLLM is handed and what becomes of its
answers, without vLLM."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from proxytune.config import ModelSpec, Sampling, System
from proxytune.decoding.completions import NOT_NUMBERS
from proxytune.decoding.one_context.texts import OneContext
from proxytune.decoding.open_batch import OpenBatch
from proxytune.decoding.open_batch.responses import GrowingResponse
from proxytune.decoding.prompts import ids_of, noise_key
from proxytune.decoding.response_text import ResponseText
from proxytune.decoding.sample import SAMPLE, sample_context
from proxytune.decoding.stop_strings import StopStrings
from proxytune.decoding.streaming import TextStream
from proxytune.decoding.templates import TemplateFault
from proxytune.engine import Chosen
from proxytune.engine.request import TokenTrace
from proxytune.errors import PromptTooLong, UserError
from proxytune.models.roles import Models
from proxytune.records import Example, Prompt, Took
from tests.support import tiny
from tests.support.chat_templates import CHOOSY, GEMMA, TURNS
from tests.support.decoders import decoder
from tests.support.tiny import spec

WORDS = tiny.tokenizer()
A, B = (WORDS.get_vocab()[letter] for letter in "ab")


@pytest.fixture(autouse=True)
def _rendered_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates that are known are rendered in this process: another one takes seconds to begin."""

    def render(tokenizer: Any, messages: Any) -> str:
        try:
            text: str = tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:
            raise TemplateFault(str(error), refused=isinstance(error, TemplateError)) from None
        return text

    monkeypatch.setattr("proxytune.decoding.prompts.render", render)


def texts(system: System, role: Any = "proxy") -> OneContext:
    return OneContext(Models(system), role)


def example(text: str, **parts: Any) -> Example:
    return Example("e", Prompt(text, text, **parts))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> System:
    """Models whose windows, ends and templates differ."""
    folder = tmp_path_factory.mktemp("one")
    made = {}
    for name, (window, end, template) in {
        "base": (164, 2, GEMMA),
        "expert": (148, [40, 7], GEMMA),
        "antiexpert": (156, 50, GEMMA),
        "tuned": (164, 300, CHOOSY + TURNS),
    }.items():
        model = tiny.build("llama", 1, max_position_embeddings=window)
        model.generation_config.eos_token_id = end  # type: ignore[union-attr]
        made[name] = spec(tiny.save(folder / name, model, tiny.tokenizer(template)), "tokenizer")
    return System(name="s", **made)


def test_windows_and_ends_of_a_role(chatty: System) -> None:
    """The narrowest window; the ends of all but the antiexpert, as far as they can be generated."""
    proxy = texts(chatty)
    assert proxy.names == ["base", "expert", "antiexpert"] and proxy.window == (148, "expert")
    assert proxy.eos == {2, 7, 40} and proxy.size == 259
    assert texts(chatty, "antiexpert").eos == {2, 50} and texts(chatty, "antiexpert").window[0] == 156
    assert texts(chatty, "tuned").eos == {2}, "300 is no token"


def test_what_is_seen_of_a_prompt(chatty: System, trio: System) -> None:
    proxy = texts(chatty)
    asked = example("Hi", system="Be kind.")
    ids = proxy.ids(asked, "gsm")
    template = "<start_of_turn>user\nBe kind.\n\nHi<end_of_turn>\n<start_of_turn>model\n"
    assert list(ids) == WORDS.encode("<s>" + template, add_special_tokens=False)
    own = {name: (5, 6, 7) for name in proxy.names}
    assert proxy.ids(example("x", ids=own), "gsm") == (5, 6, 7)
    with pytest.raises(UserError, match=r"the prompt of gsm e differs between the base and the antiexpert"):
        proxy.ids(example("x", ids={**own, "antiexpert": (5, 6)}), "gsm")
    with pytest.raises(UserError, match="the prompt of request e differs between the base and the expert"):
        proxy.ids(example("x", ids={**own, "expert": (5,)}), "")
    with pytest.raises(UserError, match="the prompt of request e is empty"):
        proxy.ids(example("x", ids=dict.fromkeys(own, ())), "gsm")
    full = {name: (5,) * 147 for name in own}
    assert len(proxy.ids(example("x", ids=full), "gsm")) == 147
    with pytest.raises(PromptTooLong, match="148 tokens for the expert, whose context window is 148"):
        proxy.ids(example("x", ids={name: (5,) * 148 for name in own}), "gsm")
    assert texts(trio).ids(example("Hi"), "gsm") == tuple(WORDS.encode("Hi"))
    texts(trio).require_one()
    mixed = trio.model_copy(
        update={"expert": trio.expert and trio.expert.model_copy(update={"chat": "llama2"})}
    )
    with pytest.raises(
        UserError, match=r"a sample prompt differs .*\(base: chat none, expert: chat llama2, "
    ):
        texts(mixed).require_one()


def test_prompts_that_a_template_has_no_text_for(chatty: System) -> None:
    tuned = texts(chatty, "tuned")
    why = tuned.ids(example("a zebra?"), "gsm")
    assert why == "the chat template of the tuned fails: no animals" and tuned.remarks == []
    refusing = texts(chatty, "base")
    for _ in range(2):
        refusing.ids(example("Hi", system="Be kind."), "gsm")
    [remark] = refusing.remarks
    assert remark.startswith("the chat template of the base takes no system message")


def made(reason: Any, tokens: tuple[int, ...], prompt: int, most: int = 5, stop: tuple[str, ...] = ()) -> Any:
    class Known(OneContext):
        window = (20, "expert")  # type: ignore[assignment]
        text_of = ResponseText(WORDS)

    return Known(None, "proxy").completion(  # type: ignore[arg-type]
        example("x"),
        3,
        Sampling(max_new_tokens=most, stop=stop),
        tokens=tokens,
        reason=reason,
        logprob=-2.0,
        prompt=prompt,
        took=Took(seconds=1.0),
    )


@pytest.mark.parametrize(
    ("reason", "count", "prompt", "cut"),
    [
        ("length", 4, 16, True),
        ("length", 4, 15, False),  # there was room
        ("length", 5, 15, False),  # as many as were asked for
        ("stop", 4, 16, False),
    ],
)
def test_a_response_that_a_window_cut(reason: str, count: int, prompt: int, cut: bool) -> None:
    found = made(reason, (A,) * count, prompt)
    want = "the context window of the expert (20 tokens) was full before 5 new tokens"
    assert found.remark == (want if cut else None)
    assert (found.text, found.finish_reason, found.logprob) == ("a" * count, reason, -2.0)
    assert (found.example_id, found.sample, found.took) == ("e", 3, Took(seconds=1.0))


def test_the_text_of_a_response() -> None:
    assert made("eos", (A, B), 3).text == "a" and made("eos", (A, B), 3).token_ids == (A, B)
    assert made("stop", (A, B), 3, stop=("b",)).text == "a"
    assert made("nan", (A,), 3).remark == NOT_NUMBERS


def test_bans_seeds_and_continuations(trio: System) -> None:
    one = texts(trio)
    assert one.banned(["a"]) == {A} and one.continued("ab") == (A, B)
    sampling = Sampling(seed=7)
    assert one.seed(sampling, "gsm", example("x"), 2) == noise_key(7, "gsm", "e", 2)


def test_a_prompt_that_is_no_unicode() -> None:
    with pytest.raises(
        UserError, match="a prompt is not valid Unicode: surrogates not allowed at character 2"
    ):
        ids_of(ModelSpec(model="m"), WORDS, "ab\ud800")


def test_what_a_role_sees_of_a_sample(tmp_path: Path) -> None:
    text, ids = sample_context(ModelSpec(model="m"), WORDS, "base", "direct")
    assert text == "Question: What is 2 + 3?\nAnswer:" == SAMPLE.plain
    assert ids == tuple(WORDS.encode(text)) and SAMPLE.user == "What is 2 + 3?"
    chat = ModelSpec(model="there", chat="tokenizer")
    with pytest.raises(UserError, match=r"^the expert: chat: tokenizer needs a chat template"):
        sample_context(chat, WORDS, "expert", "direct")
    broken = tiny.tokenizer("{{ 1 // 0 }}")
    with pytest.raises(
        UserError, match=r"^the expert: the chat template of 'there' fails on a sample prompt \("
    ):
        sample_context(chat, broken, "expert", "direct")


# A batch that is open


def test_prompts_of_an_open_batch(trio: System, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ids: none beyond the vocabulary; how much room there is behind them."""
    batch = OpenBatch(decoder(trio))
    names = ["base", "expert", "antiexpert"]
    assert batch.of_ids([0, 258]) == dict.fromkeys(names, (0, 258))
    for wrong in (-1, 259):
        with pytest.raises(UserError, match=f"the prompt has token {wrong}: the base has 0 to 258"):
            batch.of_ids([5, wrong])
    with pytest.raises(UserError, match="the prompt has no tokens"):
        batch.of_ids([])
    assert batch.of_text("") == dict.fromkeys(names, (1,)) and batch.of_text("a")["expert"] == (1, A)
    with pytest.raises(UserError, match=r"the prompt is not valid Unicode: surrogates .* at character 1"):
        batch.of_text("a\ud800")
    assert batch.text_of([A, 2, B]) == "ab" and batch.token_text(2) == "</s>" and batch.token_text(A) == "a"
    room = {"base": (5,) * 6, "expert": (5,) * 56, "antiexpert": (5,) * 16}
    assert batch.room(room) == 200 and batch.room({**room, "base": (5,) * 256}) == 0
    monkeypatch.setattr("proxytune.decoding.open_batch.batch.opened", lambda *_: [])
    assert batch.of_text("") == dict.fromkeys(names, (1,)), "a tokenizer that puts nothing before a text"
    assert [name for name, *_ in batch.kv()] == names
    assert all(used == 0 and most >= 256 for _, used, most in batch.kv())


def chosen(token: int, logprob: float = -1.0) -> Chosen:
    trace = TokenTrace(token, 0.5, {"base": 0.25}, {}, {}, {"base": [(3, -0.5)]})
    return Chosen(token, logprob, trace)


def growing(*stops: str, traced: bool = True, whole: bool = False) -> GrowingResponse:
    return GrowingResponse(
        StopStrings(ResponseText(WORDS), stops), frozenset([2]), traced=traced, whole=whole
    )


def test_tokens_come_with_their_text() -> None:
    """A token whose text may become a stop string waits for it; that of a stop string never comes."""
    response = growing("ab")
    response.hear(chosen(B, -0.25))
    text, [token] = response.taken()
    assert (text, token.id, token.text, token.offset, token.logprob) == ("b", B, "b", 0, -0.25)
    assert (token.alpha, token.probability, token.ranked) == (0.5, {"base": 0.25}, {"base": [(3, -0.5)]})
    response.hear(chosen(A))
    assert response.taken() == ("", ()), "an a may begin the stop string"
    response.hear(chosen(A))
    text, [token] = response.taken()
    assert (text, token.offset) == ("a", 1), "the first a was none"
    response.hear(chosen(B))
    response.finish((B, A, A, B))
    assert response.taken() == ("", ()) and response.generated == 4


def test_what_a_stream_holds_back() -> None:
    """Of a stop string that may begin; nothing after its end."""
    stream = TextStream(StopStrings(ResponseText(WORDS), ("aab",)))
    held = []
    for token in (B, A, A, A, B, A):
        stream.push(token)
        held.append(stream.held)
    assert held == [0, 1, 2, 2, 0, 0] and stream.ended


def test_the_end_of_sequence_is_a_token_without_a_text() -> None:
    response = growing()
    response.hear(chosen(A)), response.hear(chosen(2))
    response.finish((A, 2))
    text, tokens = response.taken()
    assert text == "a" and [(t.id, t.text, t.offset, t.end) for t in tokens] == [
        (A, "a", 0, False),
        (2, "</s>", 1, True),
    ]
    untraced = growing("x", traced=False, whole=True)
    for token in (A, B, 2):
        untraced.hear(chosen(token))
    assert untraced.taken() == ("", ()) and untraced.generated == 3
    untraced.finish((A, B, 2))
    assert untraced.taken() == ("ab", ())
    both = growing(whole=True)
    both.hear(chosen(A)), both.hear(chosen(B))
    both.finish((A, B))
    text, tokens = both.taken()
    assert text == "ab" and [token.text for token in tokens] == ["a", "b"], "traced, and in one piece"
    ordinary = GrowingResponse(StopStrings(ResponseText(WORDS), ()), frozenset([B]), traced=False, whole=True)
    ordinary.finish((B, A, B))
    assert ordinary.taken() == ("ba", ()), "an end that is an ordinary token is no text"
    stopped = growing("b")
    stopped.hear(chosen(A)), stopped.hear(chosen(B))
    stopped.finish((A, B))
    text, tokens = stopped.taken()
    assert text == "a" and [token.id for token in tokens] == [A], "without the stop string's"
    empty = growing(traced=False, whole=True)
    empty.finish(())
    assert empty.taken() == ("", ())
    assert math.isclose(chosen(A).logprob, -1.0)

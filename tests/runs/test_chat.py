"""A conversation with a loaded system: what every role sees of it, and what becomes of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import proxytune
from proxytune import Chat, DecodeOptions, Sampling, System, UserError
from proxytune.decoding import Conversation
from proxytune.decoding.decoder import Decoder
from proxytune.models.roles import Models
from proxytune.records import Prompt, named_by_content
from proxytune.runs.steered import SteeredModel
from tests.support import tiny

SHORT = Sampling(max_new_tokens=6)
HOT = Sampling(max_new_tokens=6, temperature=1.0, seed=3)
PLAIN = DecodeOptions(speculate="off", progress=False)
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.content == 'BAD' %}"
    "{{ raise_exception('no BAD here') }}{% endif %}{% endfor %}<assistant>"
)


@pytest.fixture(scope="module")
def trio(tmp_path_factory: pytest.TempPathFactory) -> System:
    """Three models, of which the expert has the Llama 2 format and the tuned one a template of its own."""
    folder = tmp_path_factory.mktemp("chat")
    for seed, role in enumerate(("base", "antiexpert", "expert", "tuned")):
        model = tiny.build("llama", seed=seed, max_position_embeddings=256)
        tiny.save(folder / role, model, tiny.tokenizer(TEMPLATE if role == "tuned" else None))
    spec = {role: {"model": str(folder / role), "dtype": "float64"} for role in ("base", "antiexpert")}
    chats = {"expert": "llama2", "tuned": "tokenizer"}
    for role, chat in chats.items():
        spec[role] = {"model": str(folder / role), "dtype": "float64", "chat": chat}
    return System.model_validate({"name": "trio", **spec})


@pytest.fixture(scope="module")
def model(trio: System) -> Iterator[SteeredModel]:
    with proxytune.load(trio, decode=PLAIN) as model:
        yield model


def texts(model: SteeredModel, chat: Chat, role: str, question: str) -> dict[str, str]:
    """What every model sees of the next message, as text."""
    decoder = Decoder(model.models, model.system.require(role), PLAIN)
    prompt = chat._prompt((*chat.messages, ("user", question)))
    contexts = decoder.contexts(prompt).items()
    return {name: decoder.tokenizer.decode(ids).replace("<s>", "|") for name, ids in contexts}


def test_every_role_gets_the_conversation_in_its_own_format(model: SteeredModel) -> None:
    chat = Chat(model, system="be kind", sampling=SHORT)
    chat.turns = [("user", "ab"), ("assistant", "cd")]
    seen = texts(model, chat, "proxy", "ef")
    assert seen["base"] == seen["antiexpert"] == "|be kind\n\nab cd\n\nef"
    assert seen["expert"] == "|[INST]<<SYS>>\nbe kind\n<</SYS>>\n\n ab [/INST] cd </s>|[INST] ef [/INST]"
    direct = "|[INST] <<SYS>>\nbe kind\n<</SYS>>\n\nab [/INST] cd </s>|[INST] ef [/INST]"
    assert texts(model, chat, "expert", "ef") == {"expert": direct}
    assert texts(model, chat, "tuned", "ef") == {
        "tuned": "<system>be kind<user>ab<assistant>cd<user>ef<assistant>"
    }


def test_the_first_answer_without_a_system_message_is_that_of_generate(model: SteeredModel) -> None:
    for role in model.system.roles:
        chat = Chat(model, as_=role, sampling=SHORT)
        [want] = model.generate(["ab cd"], as_=role, sampling=SHORT)
        with chat.ask("ab cd") as answer:
            pieces = list(answer)
        assert "".join(pieces) == answer.text == want.text.lstrip()
        assert answer.completion is not None and answer.completion.token_ids == want.token_ids
        assert chat.turns == [("user", "ab cd"), ("assistant", want.text.strip())]


def test_an_answer_without_text_is_an_answer(model: SteeredModel) -> None:
    """Nothing was said, and nothing that was stopped before its first word."""
    [want] = model.generate(["ab cd"], sampling=SHORT)
    chat = Chat(model, sampling=Sampling(max_new_tokens=6, stop=(want.text.lstrip()[0],)))
    with pytest.warns(UserWarning, match="1 of 1 responses are empty"):
        assert list(chat.ask("ab cd")) == []
    assert chat.turns == [("user", "ab cd"), ("assistant", "")]
    with chat.ask("ef"):
        pass
    assert len(chat.turns) == 2


def test_what_was_said_is_part_of_the_next_question_until_reset(model: SteeredModel) -> None:
    chat = Chat(model, sampling=HOT)
    first, second = (list(chat.ask("ab")) for _ in range(2))
    assert len(chat.turns) == 4
    assert first != second, "the second question follows the first one, and has noise of its own"
    chat.reset()
    assert chat.messages == () and list(chat.ask("ab")) == first


def test_role_and_alpha_change_from_answer_to_answer(model: SteeredModel) -> None:
    chat = Chat(model, sampling=SHORT, alpha="first:2")
    chat.alpha = 0
    base = list(chat.ask("ab"))
    chat.reset()
    chat.as_ = "base"
    assert list(chat.ask("ab")) == base, "alpha 0 is the base"
    chat.alpha = None
    assert chat.alpha == model.system.alpha
    for setting, value, words in (
        ("alpha", 11, "alpha = 11 is out of range"),
        ("alpha", -1, "allow-negative-alpha"),
        ("alpha", "much", "alpha 'much' is not a number"),
        ("as_", "bass", "Did you mean: base"),
    ):
        with pytest.raises(UserError, match=words):
            setattr(chat, setting, value)
    assert (chat.as_, chat.alpha) == ("base", model.system.alpha)
    chat.allow_negative_alpha = True
    chat.alpha = -1


def test_an_answer_that_is_stopped_stays_as_far_as_it_is_there(model: SteeredModel) -> None:
    long = Sampling(max_new_tokens=60, min_new_tokens=60)
    chat = Chat(model, sampling=long)
    answer = chat.ask("ab")
    pieces = [next(answer), next(answer)]
    answer.stop()
    pieces += list(answer)
    assert answer.completion is None and len(pieces) < 30
    assert chat.turns == [("user", "ab"), ("assistant", "".join(pieces).strip())]
    with chat.ask("cd"):
        pass  # closed before anything came
    assert len(chat.turns) == 2
    with chat.ask("cd") as another:
        next(another)
        with pytest.raises(UserError, match="a stream of this model is still open"):
            chat.ask("ef")
    assert [text for _, text in chat.turns[2:]] == ["cd", another.text.strip()]


def test_all_roles_answer_the_last_question_or_a_new_one(model: SteeredModel) -> None:
    chat = Chat(model, system="Be kind.", sampling=SHORT, alpha=0.5, as_="base")
    with pytest.raises(UserError, match="nothing was asked yet"):
        chat.compare()
    found = chat.compare("ab")
    assert list(found) == list(model.system.roles) and found["proxy"].trace
    assert chat.turns == [("user", "ab"), ("assistant", found["base"].text.strip())]
    again = chat.compare()
    assert len(chat.turns) == 2
    for role in found:
        assert again[role].token_ids == found[role].token_ids, "to the same question, before its answer"
    assert len({completion.example_id for completion in found.values()}) == 1, "roles share their noise"
    chat.alpha = 0
    assert chat.compare()["proxy"].token_ids == found["base"].token_ids, "under the alpha that is set"


def test_a_conversation_that_does_not_fit_is_one_line_and_stays(model: SteeredModel) -> None:
    chat = Chat(model, sampling=SHORT)
    list(chat.ask("ab"))
    before = list(chat.turns)
    line = (
        r"the conversation has \d+ tokens for the base, whose context window is 256: "
        r"begin a new one \(/reset\)"
    )
    for ask in (lambda: list(chat.ask("ab " * 300)), lambda: chat.compare("ab " * 300)):
        with pytest.raises(UserError, match=line):
            ask()
    assert chat.turns == before
    assert list(chat.ask("ab")), "it goes on"


def test_messages_that_a_template_has_no_text_for_are_not_asked(model: SteeredModel) -> None:
    chat = Chat(model, sampling=SHORT, as_="tuned")
    line = "^the chat template of the tuned fails: no BAD here$"
    with pytest.raises(UserError, match=line):
        list(chat.ask("BAD"))
    with pytest.raises(UserError, match=line), pytest.warns(UserWarning, match="1 of 1 responses were not"):
        chat.compare("BAD")
    assert chat.turns == []
    for empty in ("", " \n"):
        with pytest.raises(UserError, match="the message is empty"):
            chat.ask(empty)


def test_prompts_without_messages_keep_the_names_of_their_noise() -> None:
    """Their samples are those of versions before conversations were known."""
    [example] = named_by_content(["ab"])
    assert example.id == "ecc6e83cb898bd80-1"
    prompts = [Prompt("ab", "ab"), Conversation((("user", "ab"),)).prompt]
    assert [one.id for one in named_by_content(prompts)] == ["ecc6e83cb898bd80-1"] * 2, (
        "as text, and as a message"
    )


def test_a_model_can_be_loaded_before_it_is_asked(trio: System) -> None:
    loaded: list[str] = []
    with SteeredModel(Models(trio, on_load=lambda name, spec: loaded.append(name)), PLAIN) as model:
        model.prepare()
        assert sorted(loaded) == ["antiexpert", "base", "expert"]
        with pytest.raises(UserError, match="Unknown role"):
            model.prepare("bass")

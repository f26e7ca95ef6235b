"""Vocabularies: equal, padded, extended, swapped, and really different ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from proxytune.config import Sampling, System
from proxytune.decoding.decoder import Decoder
from proxytune.engine.request import Row
from proxytune.engine.sampling import RowPosition
from proxytune.engine.speculative.drafter import LOOKUP, Drafter, Speculation
from proxytune.errors import UserError
from proxytune.models.vocabulary import align, counterparts, size_of
from proxytune.records import Example
from tests.support import oracle, tiny
from tests.support.decoders import by_id, check, decoder, example, plain, ragged, settings_of
from tests.support.tiny import trio_of


def test_equal_vocabularies_need_no_map() -> None:
    one, other = tiny.tokenizer(), tiny.tokenizer()
    found = align(one, 259, other, 259, "expert", "strict")
    assert (found.size, found.columns, found.shared, found.spelled) == (259, None, None, None)
    assert align(one, 259, other, 259, "expert", "intersect").columns is None
    assert found.spell(17) == (17,)
    logits = torch.randn(2, 300)
    assert torch.equal(found.align(logits), logits[:, :259])


@pytest.mark.parametrize("sizes", [(272, 259, 259), (259, 272, 264), (272, 264, 288), (288, 259, 272)])
@pytest.mark.every(2)
def test_padded_heads_decode_exactly(sizes: tuple[int, int, int], tmp_path: Path) -> None:
    """Heads are padded to different sizes (Qwen): the padding is cut, and the tokens are the cut oracle's."""
    d = decoder(trio_of(tmp_path, sizes))
    for name, size in zip(("base", "expert", "antiexpert"), sizes, strict=True):
        head = plain(d, name).lm_head.weight
        assert head.shape[0] == size
        with torch.no_grad():  # padding rows that would win everywhere
            for module in (plain(d, name), d.loaded[name].module):
                module.lm_head.weight[259:] = 50 * module.lm_head.weight[:1]
    for s in (Sampling(max_new_tokens=12), Sampling(max_new_tokens=12, temperature=1.5, top_p=0.9)):
        found = by_id(list(d.stream(ragged(6, 1), s)))
        for e in ragged(6, 1):
            tokens = list(found[e.id, 0].token_ids)
            assert max(tokens) < 259
            assert tokens == cut_oracle(d, e, s)


def cut_oracle(d: Decoder, e: Example, s: Sampling) -> list[int]:
    """The oracle with every model's logits cut to the tokenizer."""

    def cut(name: str) -> Any:
        model = plain(d, name)

        class Cut:
            def __call__(self, **inputs: Any) -> Any:
                out = model(**inputs)
                out.logits = out.logits[..., :259]
                return out

        return Cut()

    ids = d.contexts(e.prompt)
    pairs = [(1.0, cut("expert"), cut("antiexpert"))]
    tokens, _, _ = oracle.generate(
        cut("base"), pairs, ids["base"], [(ids["expert"], ids["antiexpert"])], settings_of(d, s, e)
    )
    return tokens


def test_size_is_the_tokenizers_but_never_more_than_the_head() -> None:
    assert size_of(tiny.tokenizer(), 272) == 259
    assert size_of(tiny.tokenizer(), 259) == 259
    assert size_of(tiny.tokenizer(), 200) == 200
    words = tiny.tokenizer()
    words.add_tokens(["<extra>"])
    assert size_of(words, 272) == 260
    gaps = SimpleNamespace(get_vocab=lambda: {"a": 0, "b": 263})  # some ids may be no token's
    assert (size_of(gaps, 272), size_of(gaps, 261)) == (264, 261)


def test_swapped_ids_are_named(tmp_path: Path) -> None:
    swapped = tiny.tokenizer(swapped=("A", "B"))
    ids = tiny.tokenizer().get_vocab()
    with pytest.raises(UserError) as caught:
        decoder(trio_of(tmp_path, antiexpert=swapped))
    message = str(caught.value)
    assert "base and the antiexpert differ at 2 of 259 ids" in message and "\n" not in message
    assert f"{ids['A']}: 'A' is 'B' there" in message and f"{ids['B']}: 'B' is 'A' there" in message
    assert "--vocab intersect" in message


def test_a_token_more_at_the_end_of_the_expert_is_cut(tmp_path: Path) -> None:
    """An expert with added tokens (a chat model's) agrees with the base on all of the base's."""
    words = tiny.tokenizer()
    words.add_tokens(["<|user|>", "<|end|>"])
    d = decoder(trio_of(tmp_path, (259, 261, 259), expert=words))
    for e in ragged(4, 2):
        assert list(next(iter(d.stream([e], Sampling(max_new_tokens=8)))).token_ids) == cut_oracle(
            d, e, Sampling(max_new_tokens=8)
        )


def test_a_token_more_at_the_end_of_the_base_is_refused(tmp_path: Path) -> None:
    words = tiny.tokenizer()
    words.add_tokens(["<|user|>"])
    with pytest.raises(UserError, match=r"differ at 1 of 260 ids \(259: '<\|user\|>' is 'nothing' there\)"):
        decoder(trio_of(tmp_path, (260, 259, 259), base=words))


def test_an_expert_whose_head_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="differ at 9 of 259 ids"):
        decoder(trio_of(tmp_path, (259, 250, 259)))


def pieces(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Another byte-level tokenizer: other ids, some bytes merged into longer tokens, some letters missing."""
    alphabet = [c for c in sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True) if c not in "QZ"]
    merges, tokens = [], ["<s>", "</s>", "<pad>", *alphabet]
    for word in words:
        for end in range(2, len(word) + 1):
            if word[:end] not in tokens:
                merges.append((word[: end - 1], word[end - 1]))
                tokens.append(word[:end])
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def test_intersect_maps_tokens_and_spells_the_others() -> None:
    base, other = pieces(["the", "hat"]), tiny.tokenizer()
    mine, theirs = base.get_vocab(), other.get_vocab()
    found = align(base, len(mine), other, 259, "expert", "intersect")
    assert found.columns is not None and found.shared is not None and found.spelled is not None
    logits = torch.arange(259.0)[None]
    aligned = found.align(logits)
    for token, index in mine.items():
        if token in theirs:
            assert found.shared[index] and aligned[0, index] == theirs[token]
            assert found.spell(index) == (theirs[token],)
    assert not found.shared[mine["the"]]
    assert found.spell(mine["the"]) == tuple(theirs[c] for c in "the")
    assert int(found.shared.sum()) == len(mine.keys() & theirs.keys()) == len(mine) - 4  # th, the, ha, hat


def spelled_in(vocabulary: dict[str, int], decoder: Any, special: Sequence[str] = ()) -> Any:
    raw = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    raw.decoder = decoder
    raw.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def test_intersect_finds_a_token_by_its_text_however_it_is_spelled() -> None:
    """SentencePiece's spellings beside GPT-2's: a space, a line break, half a letter; special tokens by name;
    one token of each text; and a letter that is a space in the other spelling is none."""
    of_bytes = ["Ġthe", "the", "Ċ", "Ã", "ĠĠ", "<s>", "x", "Ġ"]
    pieces_ = ["<s>", "the", "▁the", "\n", "<0x0A>", "<0xC3>", "▁▁", "<0x78>", "Ġ", "Ċ", "y"]
    byte_level = spelled_in({token: i for i, token in enumerate(of_bytes)}, decoders.ByteLevel(), ["<s>"])
    fallback = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    sentence = spelled_in({token: i for i, token in enumerate(pieces_)}, fallback, ["<s>"])
    names = (sentence, sentence.get_vocab(), byte_level, byte_level.get_vocab())
    found = {token: of_bytes[index] for token, index in counterparts(*names).items()}
    assert found == {
        "<s>": "<s>", "the": "the", "▁the": "Ġthe", "\n": "Ċ", "<0xC3>": "Ã", "▁▁": "ĠĠ", "<0x78>": "x"
    }  # fmt: skip
    back = {token: pieces_[index] for token, index in counterparts(*names[2:], *names[:2]).items()}
    assert back == {theirs: mine for mine, theirs in found.items()}
    logits = torch.arange(8.0)[None]
    mapped = align(sentence, len(pieces_), byte_level, 8, "expert", "intersect")
    assert mapped.shared is not None and mapped.shared.tolist() == [token in found for token in pieces_]
    aligned = mapped.align(logits)[0].tolist()
    assert [aligned[i] for i, token in enumerate(pieces_) if token in found] == [5, 1, 0, 2, 3, 4, 6]


def test_intersect_prefers_a_token_of_its_own_to_one_of_a_single_byte() -> None:
    """Llama 2 has two tokens that write one space: `<0x20>` (by its id the first) and `▁`."""
    byte_level = spelled_in({"Ġ": 0, "a": 1}, decoders.ByteLevel())
    fallback = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    sentence = spelled_in({"<0x20>": 0, "<0x61>": 1, "▁": 2, "a": 3}, fallback)
    assert counterparts(byte_level, byte_level.get_vocab(), sentence, sentence.get_vocab()) == {
        "Ġ": 2,
        "a": 3,
    }
    back = counterparts(sentence, sentence.get_vocab(), byte_level, byte_level.get_vocab())
    assert back == {"▁": 0, "a": 1}


def ends(own: str | None, other: str | None) -> dict[str, int]:
    """The counterparts of tokens that are special, of two tokenizers that end texts with these tokens. Both
    have `<a>`, one `<b>`, the other `<c>` (ids 0 and 1, and 5 in front of all)."""
    found = []
    for names, eos in ((["<a>", "<b>"], own), (["x", "<a>", "<c>"], other)):
        words = spelled_in({token: i for i, token in enumerate(names)}, decoders.ByteLevel(), names[-2:])
        words.eos_token = eos
        found += [words, words.get_vocab()]
    return counterparts(*found)


def test_the_end_of_a_text_is_the_same_by_whatever_name() -> None:
    """Where the base has the other's token, names decide: it may end a turn there, and not here."""
    assert ends("<b>", "<c>") == {"<a>": 1, "<b>": 2}
    assert ends("<a>", "<c>") == {"<a>": 2}, "what the other never ends with gives way"
    assert ends("<b>", "<a>") == ends(None, "<c>") == ends("<b>", None) == ends("<a>", "<a>") == {"<a>": 1}
    assert ends("<gone>", "<c>") == ends("<b>", "<gone>") == {"<a>": 1}, "a name that is no token"


@pytest.mark.parametrize("names", [("<end>", "<end>"), ("<end>", "<stop>"), ("</s>", "<end>")])
def test_intersect_lets_an_expert_end_by_whatever_name(names: tuple[str, str], tmp_path: Path) -> None:
    """The tokens of one vocabulary but for the name of its end: those of the trio that shares all of it."""
    sampling, examples = Sampling(max_new_tokens=30, temperature=1.0, seed=3), ragged(12, 5)
    plainly = decoder(trio_of(tmp_path / "same"))
    with torch.no_grad():  # the expert's wish to end, which the antiexpert does not have
        plainly.loaded["expert"].module.lm_head.weight[2] *= 6
    truth = by_id(list(plainly.stream(examples, sampling)))
    assert {"eos", "length"} <= {found.finish_reason for found in truth.values()}
    words = dict(zip(("expert", "antiexpert"), (tiny.tokenizer(eos=name) for name in names), strict=True))
    system = trio_of(tmp_path / "names", **words).model_copy(update={"vocab": "intersect"})
    other = decoder(system)
    assert other.eos == {2}
    with torch.no_grad():
        other.loaded["expert"].module.lm_head.weight[2] *= 6
    assert by_id(list(other.stream(examples, sampling))) == truth


def intersect_oracle(d: Decoder, e: Example, s: Sampling) -> tuple[list[int], int]:
    """Written out: every role sees its own ids of prompt and response; only shared tokens are shifted.

    -> the tokens, and how many of them the expert has no token for."""
    names = ("base", "expert", "antiexpert")
    words = {name: d.loaded[name].tokenizer for name in names}
    vocab = {name: words[name].get_vocab() for name in names}
    token_at = {index: token for token, index in vocab["base"].items()}
    ids = {name: list(words[name].encode(e.prompt.plain)) for name in names}
    out: list[int] = []
    settings = settings_of(d, s, e)
    while len(out) < s.max_new_tokens:
        logits = {name: oracle.last_logits(plain(d, name), ids[name]) for name in names}
        z = logits["base"][: len(token_at)].clone()
        for index, token in token_at.items():
            if all(token in vocab[name] for name in names):
                z[index] += (
                    logits["expert"][vocab["expert"][token]]
                    - logits["antiexpert"][vocab["antiexpert"][token]]
                )
        out.append(oracle.pick(z, settings, len(out)))
        token = token_at[out[-1]]
        ids["base"].append(out[-1])
        for name in names[1:]:
            if token in vocab[name]:
                ids[name].append(vocab[name][token])
            else:
                text_of = words["base"].convert_tokens_to_string([token])
                ids[name] += words[name].encode(text_of, add_special_tokens=False)
        if out[-1] == words["base"].eos_token_id:
            break
    return out, sum(token_at[t] not in vocab["expert"] for t in out)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_intersect_generates_what_it_says(temperature: float, tmp_path: Path) -> None:
    """A base that merges letters, experts that do not: longer tokens are spelled to them."""
    base, own = pieces(["the", "hat", "aei", "xyz"]), tiny.tokenizer(swapped=("A", "B"))
    sizes = (len(base.get_vocab()), 259, 259)
    system = trio_of(tmp_path, sizes, base=base, expert=own).model_copy(update={"vocab": "intersect"})
    d = decoder(system, batch=3)
    merged = [
        i for t, i in base.get_vocab().items() if t in {"th", "the", "ha", "hat", "ae", "aei", "xy", "xyz"}
    ]
    with torch.no_grad():  # make the merged tokens likely, so that they do come up
        for module in (plain(d, "base"), d.loaded["base"].module):
            module.lm_head.weight[merged] *= 3
    s = Sampling(max_new_tokens=12, temperature=temperature)
    examples = ragged(6, 4)
    found = by_id(list(d.stream(examples, s)))
    spelled = 0
    for e in examples:
        want, longer = intersect_oracle(d, e, s)
        assert list(found[e.id, 0].token_ids) == want, e
        spelled += longer
    assert spelled > 3


class Told:
    """Drafts the tokens of known responses, every third of them wrong, or none."""

    def __init__(self, truth: dict[str, Sequence[int]], *, errs: bool = False) -> None:
        self.truth, self.errs, self.size = truth, errs, max(map(max, truth.values()))

    def __call__(self, logits: torch.Tensor, positions: Sequence[RowPosition]) -> torch.Tensor:
        tokens = []
        for row, position in positions:
            known = [*self.truth[str(row.request.tag)], 0]
            token = known[min(position, len(known) - 1)]
            tokens.append(self.size - token if self.errs and position % 3 == 2 else token)
        return torch.tensor(tokens)


DRAFTED = {
    "all right": lambda truth: Speculation(k=5, pick=Told(truth), lookup=False),
    "some wrong": lambda truth: Speculation(k=5, pick=Told(truth, errs=True), lookup=False),
    "by lookup": lambda truth: Speculation(k=5, drafter=LOOKUP),
}


SPELT = ["the", "hat", "aei", "xyz"]
DRAWN = Sampling(max_new_tokens=14, temperature=1.0)


@pytest.fixture(scope="module")
def spelt(tmp_path_factory: pytest.TempPathFactory) -> tuple[System, dict[str, list[int]]]:
    """A base that likes tokens which its experts have to spell, and its responses by the oracle."""
    base, own = pieces(SPELT), tiny.tokenizer(swapped=("A", "B"))
    sizes = (len(base.get_vocab()), 259, 259)
    system = trio_of(tmp_path_factory.mktemp("spelt"), sizes, base=base, expert=own)
    d = decoder(system.model_copy(update={"vocab": "intersect"}))
    likely = [index for token, index in base.get_vocab().items() if len(token) > 1 and token.isalpha()]
    with torch.no_grad():
        for module in (plain(d, "base"), d.loaded["base"].module):
            module.lm_head.weight[likely] *= 6
    want = {e.id: intersect_oracle(d, e, DRAWN) for e in ragged(4, 4)}
    assert sum(longer for _, longer in want.values()) > 10
    return d.models.system, {name: ids for name, (ids, _) in want.items()}


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("drafts", DRAFTED)
@pytest.mark.every(3)
def test_spelt_tokens_are_drafted_accepted_and_taken_back(
    drafts: str, spelt: tuple[System, dict[str, list[int]]]
) -> None:
    """Drafts of which a token is several ids to the experts: they take one place of the base's cache, and
    several of the experts'."""
    system, want = spelt
    d = decoder(system, batch=3, speculation=DRAFTED[drafts](want))
    found = by_id(list(d.stream(ragged(4, 4), DRAWN)))
    assert {name: list(found[name, 0].token_ids) for name in want} == want
    assert d.stats.drafted > 0
    if drafts != "by lookup":
        assert (d.stats.accepted < d.stats.examined) == (drafts == "some wrong") and d.stats.accepted > 15


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("wrong", ["the", "a"])
@pytest.mark.every(2)
def test_guesses_of_spelt_tokens_are_taken_back(
    wrong: str, spelt: tuple[System, dict[str, list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What prompt lookup lets the drafter read, and the drafter does not say, leaves its cache again: all of
    the ids that it is spelt in."""
    system, want = spelt

    def guess(drafter: Drafter, row: Row, most: int, rows: int) -> list[int]:
        """The next token of the response, a wrong one, and so on."""
        known = want[str(row.request.tag)][len(row.tokens) :][:most]
        return [mistake if at % 2 else token for at, token in enumerate(known)]

    monkeypatch.setattr(Drafter, "_guess", guess)
    d = decoder(system, batch=3, speculation=Speculation(k=5, pick=Told(want)))
    mistake = d.tokenizer.get_vocab()[wrong]
    found = by_id(list(d.stream(ragged(4, 4), DRAWN)))
    assert {name: list(found[name, 0].token_ids) for name in want} == want
    assert d.stats.accepted > 15


def test_intersect_with_different_experts_never_shifts_what_one_lacks(tmp_path: Path) -> None:
    """A token must be known to expert and antiexpert: Q and Z are not, for one of them."""
    system = trio_of(tmp_path, (259, len(pieces([]).get_vocab()), 259), expert=pieces([]))
    d = decoder(system.model_copy(update={"vocab": "intersect"}), batch=2)
    (term,) = d.ensemble.terms
    shared = d.ensemble.shared_by(term, torch.device("cpu"))
    assert shared is not None
    vocab = d.tokenizer.get_vocab()
    assert sorted(t for t, i in vocab.items() if not shared[i]) == ["Q", "Z"]
    logits = {name: torch.randn(1, 259, dtype=torch.float64) for name in d.loaded}
    combined = d.ensemble.combine(logits, torch.ones(1))
    unchanged = (combined == logits["base"])[0].tolist()
    assert [t for t, i in vocab.items() if unchanged[i]] == [t for t in vocab if t in "QZ"]


def test_intersect_stops_at_the_window_of_whoever_fills_first(tmp_path: Path) -> None:
    """Spelling a token takes an expert several ids, so its window can end before the base's."""
    base = pieces(["abcdefgh"])
    system = trio_of(tmp_path, (len(base.get_vocab()), 259, 259), base=base)
    d = decoder(system.model_copy(update={"vocab": "intersect"}))
    long = base.get_vocab()["abcdefgh"]
    d.ensemble.runners["base"].model = biased(d.loaded["base"].module, long)  # type: ignore[attr-defined]
    found = next(iter(d.stream([example("a" * 100)], Sampling(max_new_tokens=100))))
    assert set(found.token_ids) == {long}
    assert found.finish_reason == "length"
    room = d.loaded["expert"].family.window - 101
    assert room // 8 <= len(found.token_ids) <= room // 8 + 1


def test_a_pool_of_one_window_holds_every_response(spelt: tuple[System, dict[str, list[int]]]) -> None:
    """Spelled out, a response of that many tokens could take more ids than the window lets it have."""
    d = decoder(spelt[0], batch=1)
    [found] = d.stream([example("a" * 100)], Sampling(max_new_tokens=150, temperature=1.0))
    assert found.token_ids and d.ensemble.runners["expert"].rows.capacity == 256


@pytest.mark.usefixtures("layout")
@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.every(3)
def test_drafts_of_spelt_tokens_stay_within_the_window(k: int, tmp_path: Path) -> None:
    """GPT-2 has a table of positions: a draft beyond its end would be an index error."""
    base = pieces(["abcdefgh"])
    system = trio_of(tmp_path, (len(base.get_vocab()), 259, 259), base=base)
    for role in ("expert", "antiexpert"):
        tiny.save(tmp_path / role, tiny.build("gpt2", 5, n_positions=120, max_position_embeddings=120))
    long = base.get_vocab()["abcdefgh"]
    speculation = Speculation(k=k, pick=Told({"0": [long] * 20}), lookup=False)
    d = decoder(system.model_copy(update={"vocab": "intersect"}), speculation=speculation)
    d.ensemble.runners["base"].model = biased(d.loaded["base"].module, long)  # type: ignore[attr-defined]
    for prompt in range(30, 38):  # every rest of the window by the length of a token
        (found,) = d.stream([example("a" * prompt)], Sampling(max_new_tokens=100))
        room = 120 - (prompt + 1)
        assert found.token_ids == (long,) * (room // 8 + 1) and found.finish_reason == "length"
    assert (d.stats.accepted > 50) == (k > 0)


def biased(module: Any, token: int) -> Any:
    """The module's forward, in love with one token."""

    def forward(**inputs: Any) -> Any:
        out = module(**inputs)
        out.logits[..., token] += 1000
        return out

    return forward


def test_intersect_with_a_pool_too_small_ends_in_an_error_or_an_answer(tmp_path: Path) -> None:
    """It must not go round in circles when the spelled response outgrows the expert's pool."""
    base = pieces(["abcdefgh"])
    system = trio_of(tmp_path, (len(base.get_vocab()), 259, 259), base=base)
    d = decoder(system.model_copy(update={"vocab": "intersect"}))
    long = base.get_vocab()["abcdefgh"]
    caches = [runner.rows.spec for runner in d.ensemble.runners.values()]  # type: ignore[attr-defined]
    tight = decoder(
        system.model_copy(update={"vocab": "intersect"}),
        kv_memory=60 * sum(c.bytes_per_token for c in caches),
    )
    tight.ensemble.runners["base"].model = biased(d.loaded["base"].module, long)  # type: ignore[attr-defined]
    stream = tight.stream([example("a" * 10)], Sampling(max_new_tokens=30))
    with pytest.raises(UserError, match="--kv-memory"):
        next(stream)
    (short,) = tight.stream([example("a" * 10)], Sampling(max_new_tokens=6))
    assert short.token_ids == (long,) * 6


def test_nothing_in_common_is_an_error() -> None:
    raw = Tokenizer(models.WordLevel({"[zero]": 0, "[one]": 1}, unk_token="[zero]"))
    other = PreTrainedTokenizerFast(tokenizer_object=raw)
    with pytest.raises(UserError, match="base and the expert have no token in common"):
        align(tiny.tokenizer(), 259, other, 2, "expert", "intersect")


def test_eos_ids_beyond_the_tokenizer_do_no_harm(tmp_path: Path) -> None:
    """generation_config may list ids among the padding; banning them (a minimum length) must not fail."""
    d = decoder(trio_of(tmp_path, (272, 259, 259)))
    d.loaded["base"].module.generation_config.eos_token_id = [2, 265]
    (found,) = d.stream([example("a")], Sampling(max_new_tokens=5, min_new_tokens=5))
    assert len(found.token_ids) == 5


def test_noise_is_the_same_whatever_the_padding(tmp_path: Path) -> None:
    """The noise of a token goes by its id: a padded head must not shift it."""
    s = Sampling(max_new_tokens=10, temperature=1.0)
    narrow = decoder(trio_of(tmp_path / "narrow"), "base")
    wide = decoder(trio_of(tmp_path / "wide", (272, 259, 259)), "base")
    with torch.no_grad():
        for key, value in narrow.loaded["base"].module.state_dict().items():
            target = wide.loaded["base"].module.state_dict()[key]
            target[: value.shape[0]] = value
    greedy = s.model_copy(update={"temperature": 0.0})
    for e in ragged(4, 5):
        found = next(iter(narrow.stream([e], s))).token_ids
        assert found == next(iter(wide.stream([e], s))).token_ids
        assert found != next(iter(narrow.stream([e], greedy))).token_ids, "the noise decides"


def test_check_still_holds_with_equal_vocabularies(tmp_path: Path) -> None:
    """intersect of equal vocabularies is the strict answer, token for token."""
    system = trio_of(tmp_path)
    check(decoder(system.model_copy(update={"vocab": "intersect"})), ragged(5, 6), Sampling(max_new_tokens=8))

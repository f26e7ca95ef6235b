"""From ids to text: letters in pieces, stop strings across token borders, streams."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proxytune.decoding.response_text import BROKEN, ResponseText, decode
from proxytune.decoding.stop_strings import StopStrings, cut, own_eos, single_tokens
from proxytune.decoding.streaming import TextStream, final_text, stop_predicate
from proxytune.errors import UserError
from tests.support import tiny
from tests.support.tiers import examples

BYTES = tiny.tokenizer()
TEXT = ResponseText(BYTES)


def merging(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the bytes and these words as tokens of their own."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    spelled = [
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(w)[0][0]
        for w in words
    ]
    raw = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate([*alphabet, *spelled])}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def metaspace() -> PreTrainedTokenizerFast:
    """A SentencePiece-like tokenizer (Llama 2): its decoder drops a leading space; bytes are a fallback."""
    words = [
        "▁a",
        "▁hello",
        "▁world",
        "hello",
        "world",
        "a",
        "▁",
        "\n",
        ".",
        *(f"<0x{b:02X}>" for b in range(256)),
    ]
    raw = Tokenizer(
        models.BPE({w: i for i, w in enumerate(["<unk>", *words])}, [], unk_token="<unk>", byte_fallback=True)
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def gemma_like() -> PreTrainedTokenizerFast:
    """Bytes are a fallback, and a leading space is kept."""
    words = ["a", "▁", "▁▁", "\n", "é", *(f"<0x{b:02X}>" for b in range(256))]
    raw = Tokenizer(
        models.BPE({w: i for i, w in enumerate(["<unk>", *words])}, [], unk_token="<unk>", byte_fallback=True)
    )
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>")


def word_pieces() -> PreTrainedTokenizerFast:
    """BERT-like: spaces between tokens come from the decoder, which also takes some away."""
    words = ["[UNK]", "a", "##b", "##é", ".", ",", "n't", "do", "中"]
    raw = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]")


def word_ends() -> PreTrainedTokenizerFast:
    """GPT-1-like: a token that ends a word shows its space once another follows."""
    words = ["a", "b", "a</w>", "b</w>", "é", "é</w>"]
    raw = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], end_of_word_suffix="</w>"))
    raw.decoder = decoders.BPEDecoder("</w>")
    return PreTrainedTokenizerFast(tokenizer_object=raw)


def unigrams() -> PreTrainedTokenizerFast:
    """T5-like."""
    words = [("<unk>", 0.0), ("▁", -1.0), ("a", -1.0), ("▁a", -1.0), ("▁é", -2.0), ("中", -2.0)]
    raw = Tokenizer(models.Unigram(words, unk_id=0))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


FAMILIES = {
    "bytes": tiny.tokenizer,
    "merged bytes": lambda: merging(["\n\n", "Que", "é中", "中文"]),
    "metaspace": metaspace,
    "gemma": gemma_like,
    "word pieces": word_pieces,
    "word ends": word_ends,
    "unigrams": unigrams,
}
END, OTHER = "<|im_end|>", "<|x|>"


@cache
def text_of(family: str) -> ResponseText:
    """A family's text, with two special tokens more."""
    words = FAMILIES[family]()
    words.add_special_tokens({"additional_special_tokens": [END, OTHER]})
    return ResponseText(words)


@cache
def pieces_of_letters(family: str) -> list[int]:
    """Tokens that are a part of a letter."""
    text = text_of(family)
    return [i for i in range(len(text.tokenizer)) if BROKEN in text([i])]


STOPS: list[tuple[str, ...]] = [
    (),
    ("a",),
    ("\n", "é"),
    (END,),
    (f"{END}\n", "ab"),
    (f"a{END}",),
    (f"{OTHER} a", "中"),
]


@pytest.mark.thorough
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=examples(60, 600), deadline=None)
@given(seed=st.integers(0, 2**32), length=st.sampled_from([1, 5, 17, 40, 90]), stops=st.sampled_from(STOPS))
def test_any_tokens_are_streamed_as_their_text(
    family: str, seed: int, length: int, stops: tuple[str, ...]
) -> None:
    """In every family of tokenizers: no piece is taken back, and stops are seen at the right token."""
    text, draw = text_of(family), random.Random(seed)
    broken, share = pieces_of_letters(family), draw.choice([0.0, 0.9])
    ids = [
        draw.choice(broken) if broken and draw.random() < share else draw.randrange(len(text.tokenizer))
        for _ in range(length)
    ]
    watched = StopStrings(text, stops)
    stream, ended, shown, fed = TextStream(watched), stop_predicate(watched), "", list[int]()
    for token in ids:
        fed.append(token)
        shown += stream.push(token)
        if ended is not None and ended(fed):
            break
    assert shown + stream.finish() == final_text(watched, fed)
    if not watched.marks:
        assert final_text(watched, fed) == cut(text(fed), stops)
        want = next((n for n in range(1, length + 1) if any(s in text(ids[:n]) for s in stops)), length)
        assert len(fed) == want


@pytest.mark.parametrize("family", FAMILIES)
def test_the_text_is_the_decoders(family: str) -> None:
    """Of all that is whole letters."""
    text, draw = text_of(family), random.Random(1)
    words, anchor = text.tokenizer, text.tokenizer.encode("a", add_special_tokens=False)
    whole = [i for i in range(len(words)) if i not in pieces_of_letters(family)]
    letters = [words.encode(letter, add_special_tokens=False) for letter in "aé中"]
    for _ in range(200):
        parts = [draw.choice(letters) if draw.random() < 0.5 else [draw.choice(whole)] for _ in range(12)]
        ids = [index for part in parts for index in part]
        assert text(ids) == decode(words, [*anchor, *ids]).removeprefix(decode(words, anchor))


def test_bytes_that_are_no_letter_cost_no_other() -> None:
    """A decoder with byte fallback alone gives U+FFFD for every byte beside them."""
    for family in ("metaspace", "gemma"):
        text = text_of(family)
        ids = text.tokenizer.convert_tokens_to_ids([f"<0x{b:02X}>" for b in "กขc".encode()])
        assert text(ids) == "กขc" and text(ids[:5]) == "ก\ufffd" and text(ids[1:]) == "\ufffd\ufffdขc"
        stream = TextStream(StopStrings(text, ()))
        assert [stream.push(index) for index in ids] == ["", "", "ก", "", "", "ข", "c"]


MIXED = [
    (["yes", END, "\n", "no"], [f"{END}\n"], 3, "yes"),
    (["yes", "\n", END, "no"], [f"\n{END}"], 3, "yes"),
    (["yes", END, "x", "\n", END, "\n", "no"], [f"{END}\n"], 6, "yesx\n"),
    (["yes", OTHER, END, OTHER, "\n", "no"], [f"{END}\n"], 5, "yes"),  # one that no stop string names
    (["yes", END, OTHER, "no"], [f"{END}{OTHER}", OTHER], 3, "yes"),
    (["a", END, "b", "no"], ["ab", f"{END}x"], 3, ""),
    (["yes", END, " Question", ":", "no"], [f"{END} Question:"], 4, "yes"),
    (["yes", *"<|im_end|>", "no"], [END], 11, "yes"),  # spelt out
    (["yes", END, "\n"], [f"\n{END}", f"{OTHER}\n"], None, "yes\n"),
]


@pytest.mark.parametrize("parts, stops, count, said", MIXED)
@pytest.mark.parametrize("spelt", ["words", "letters"])
def test_stops_of_special_tokens_and_text(
    spelt: str, parts: list[str], stops: list[str], count: int | None, said: str
) -> None:
    words = merging(["yes", "no", " Question"]) if spelt == "words" else tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": [END, OTHER]})
    spellings = [words.encode(part, add_special_tokens=False) for part in parts]
    if spelt == "words":
        named = {decode(words, [i]): i for i in range(len(words) - 2)}
        spellings = [
            [named[part]] if part in named else ids for part, ids in zip(parts, spellings, strict=True)
        ]
        assert all(len(ids) == 1 for ids in spellings)
    ids = [index for part in spellings for index in part]
    want = None if count is None else sum(map(len, spellings[:count]))
    assert first_end(words, ids, stops) == want
    assert final_text(StopStrings(ResponseText(words), stops), ids[:want]) == said


def test_the_cost_of_a_token_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens are decoded with each, also where no letter ever ends."""
    longest = 0

    def counted(words: Any, ids: Sequence[int]) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(words, ids)

    text = ResponseText(BYTES)
    monkeypatch.setattr("proxytune.decoding.response_text.decode", counted)
    for token in (BYTES.get_vocab()["a"], pieces_of_letters("bytes")[-1]):
        ended = stop_predicate(StopStrings(text, ["x" * 30]))
        assert ended is not None
        for n in range(1, 400):
            assert not ended([token] * n)
    assert 8 <= longest <= 20


def test_a_response_keeps_its_leading_space() -> None:
    words = metaspace()
    ids = words.convert_tokens_to_ids(["▁hello", "▁world", "."])
    assert decode(words, ids) == "hello world."
    assert ResponseText(words)(ids) == " hello world."
    assert ResponseText(words)(words.convert_tokens_to_ids(["hello"])) == "hello"
    assert ResponseText(words)([]) == ""
    letter = words.convert_tokens_to_ids([f"<0x{b:02X}>" for b in "é".encode()])
    assert ResponseText(words)(letter) == "é"


def first_end(words: PreTrainedTokenizerFast, ids: Sequence[int], stops: Sequence[str]) -> int | None:
    """After how many tokens the predicate ends the response."""
    ended = stop_predicate(StopStrings(ResponseText(words), stops))
    assert ended is not None
    return next((n for n in range(1, len(ids) + 1) if ended(ids[:n])), None)


def test_a_special_token_is_a_stop_string() -> None:
    """The end of turn of a chat model, which the text of a response does not show."""
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    end = words.convert_tokens_to_ids("<|im_end|>")
    ids = [*words.encode("yes", add_special_tokens=False), end, *words.encode("no", add_special_tokens=False)]
    assert first_end(words, ids, ["<|im_end|>"]) == 4 and ResponseText(words)(ids[:4]) == "yes"
    assert (
        first_end(words, ids, ["<|im_end|>", "ye"]) == 2 and first_end(words, ids, ["<|im_start|>"]) is None
    )


def test_a_special_token_that_begins_as_another_does_is_found() -> None:
    words = tiny.tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|end|>", "<|end|>!"]})
    shorter, longer = words.convert_tokens_to_ids(["<|end|>", "<|end|>!"])
    assert first_end(words, [longer], ["<|end|>!"]) == 1
    assert first_end(words, [longer, shorter], ["<|end|>"]) == 2


@pytest.mark.parametrize("letters", ["中" * 9, "é" * 30, "🍎" * 5, "ab" + "한" * 7, "x"])
@pytest.mark.parametrize("stop", ["\n", "\n\n", "中\n"])
def test_stops_are_seen_amid_letters_that_are_spelt_in_bytes(letters: str, stop: str) -> None:
    """A run of bytes is one text to such a decoder: it must not be cut within a letter."""
    words = metaspace()
    ids = words.convert_tokens_to_ids([f"<0x{b:02X}>" for b in (letters + stop + letters).encode()])
    assert first_end(words, ids, [stop]) == len((letters + stop).encode())


def test_no_stops_no_predicate() -> None:
    assert stop_predicate(StopStrings(TEXT, ())) is None


def test_a_stop_is_found_however_it_is_tokenised() -> None:
    words = merging(["\n\n", "Que", "stion", "\n\nQuestion", "n:", " Q", "s\n", "\nQ"])
    stop = "\n\nQuestion:"
    vocab = {decode(words, [i]): i for i in words.get_vocab().values()}
    ways = [
        ["\n\n", "Que", "stion", ":"],
        ["\n\nQuestion", ":"],
        ["s\n", "\nQ", "u", "e", "s", "t", "i", "o", "n:"],
        ["\n", "\n", "Q", "u", "e", "s", "t", "i", "o", "n", ":"],
    ]
    for way in ways:
        ids = [*(vocab[c] for c in "yes 42"), *(vocab[piece] for piece in way), vocab["x"]]
        assert first_end(words, ids, [stop]) == len(ids) - 1
        assert cut(ResponseText(words)(ids), [stop]) in ("yes 42", "yes 42s")
        assert first_end(words, ids[:-2], [stop]) is None


def test_a_stop_of_multi_byte_letters_in_pieces() -> None:
    stop = "é\U0001f600"
    ids = BYTES.encode("ok é\U0001f600!", add_special_tokens=False)
    at = len(b"ok ") + len(stop.encode())
    assert first_end(BYTES, ids, [stop]) == at
    assert first_end(BYTES, ids[: at - 1], [stop]) is None
    # behind a letter cut in half
    assert (
        first_end(BYTES, BYTES.encode("\U0001f600" * 30, add_special_tokens=False)[1:], ["\U0001f600" * 3])
        == 15
    )


@settings(max_examples=150, deadline=None)
@given(
    text=st.text(st.sampled_from("ab\né\U0001f600"), max_size=25),
    stops=st.lists(
        st.text(st.sampled_from("ab\né\U0001f600"), min_size=1, max_size=4), min_size=1, max_size=3
    ),
)
def test_the_predicate_ends_with_the_first_complete_stop(text: str, stops: list[str]) -> None:
    """Looking at the tail only finds what looking at everything finds, at the same token."""
    ids = BYTES.encode(text, add_special_tokens=False)
    want = next((n for n in range(1, len(ids) + 1) if any(s in TEXT(ids[:n]) for s in stops)), None)
    assert first_end(BYTES, ids, stops) == want


def test_cut_at_the_first_of_several() -> None:
    assert cut("one two three", ["three", "two"]) == "one "
    assert cut("one two", ["x"]) == "one two" == cut("one two", [])
    assert cut("abc", ["bc", "abc"]) == ""


@settings(max_examples=300, deadline=None)
@given(
    data=st.lists(st.sampled_from([*b"abn\n", *"é".encode(), *"\U0001f600".encode(), 0xFF]), max_size=24),
    stops=st.lists(st.sampled_from(["a", "ab", "aba", "\n\n", "é", "b\U0001f600", "ba", "nan"]), max_size=3),
)
def test_streams_tell_the_final_text_and_nothing_else(data: list[int], stops: list[str]) -> None:
    """Any bytes: pieces add up to the final text; none is taken back, half a letter or part of a stop."""
    alphabet = {decode_byte(i): i for i in range(3, tiny.VOCABULARY)}
    ids = [alphabet[byte] for byte in data]
    ended = stop_predicate(StopStrings(TEXT, stops))
    stream, fed, shown = TextStream(StopStrings(TEXT, stops)), list[int](), ""
    final = TEXT(ids)
    for token in ids:
        fed.append(token)
        shown += stream.push(token)
        assert cut(final, stops).startswith(shown), "nothing shown may be taken back, whatever follows"
        if ended is not None and ended(fed):
            break
    shown += stream.finish()
    assert shown == cut(TEXT(fed), stops)
    assert not any(stop in shown for stop in stops)


def decode_byte(index: int) -> int:
    """The byte that a token of the tiny tokenizer stands for."""
    symbol = BYTES.convert_ids_to_tokens(index)
    return BYTE_OF[symbol]


def byte_symbols() -> dict[str, int]:
    """GPT-2's table: printable bytes are themselves, the others follow from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(0x100 + n): b for n, b in enumerate(others)}


BYTE_OF = byte_symbols()


def test_a_stream_shows_text_as_soon_as_it_is_sure() -> None:
    stream, pieces = TextStream(StopStrings(TEXT, ["\n\nQ"])), []
    for token in BYTES.encode("é\n\nNo\n\nQ", add_special_tokens=False):
        pieces.append(stream.push(token))
    assert pieces == ["", "é", "", "", "\n\nN", "o", "", "", ""]
    assert stream.finish() == ""
    stream = TextStream(StopStrings(TEXT, ["\n\nQ"]))
    streamed = "".join(stream.push(token) for token in BYTES.encode("a\n\n", add_special_tokens=False))
    assert streamed == "a" and stream.finish() == "\n\n"


def test_special_tokens_are_not_text() -> None:
    ids = [BYTES.get_vocab()["a"], 0, 1, BYTES.get_vocab()["b"], 2]
    assert TEXT(ids) == "ab"
    assert first_end(BYTES, ids, ["ab"]) == 4
    many = [ids[0], *[0] * 40, ids[3]]
    assert first_end(BYTES, many, ["ab"]) == 42, "however many stand in between"


def test_single_tokens() -> None:
    words = merging(["Sure", " Sure", "\tSure", "Sure\n", "Sure!"])
    size = len(words.get_vocab())
    found = single_tokens(words, ["Sure", "a"], size)
    assert {decode(words, [i]) for i in found} == {"Sure", " Sure", "a"}
    assert single_tokens(words, [], size) == frozenset()
    with pytest.raises(UserError, match="cannot ban 'Nope'"):
        single_tokens(words, ["Sure", "Nope"], size)
    last = words.get_vocab()[words.convert_ids_to_tokens(size - 1)]
    with pytest.raises(UserError, match="cannot ban 'Sure!'"):
        single_tokens(words, ["Sure!"], last)  # a token among the padding cannot be banned


@pytest.mark.parametrize(
    ("own", "generation", "ends"),
    [(2, None, {2}), (2, 40, {2, 40}), (2, [40, 41], {2, 40, 41}), (None, [40], {40}), (None, None, set())],
)
def test_what_ends_a_response(own: int | None, generation: int | list[int] | None, ends: set[int]) -> None:
    """The tokenizer's own end counts beside those of the generation settings, which often name others."""
    module = SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=generation))
    model: Any = SimpleNamespace(module=module, tokenizer=SimpleNamespace(eos_token_id=own))
    assert own_eos(model) == ends

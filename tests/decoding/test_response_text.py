"""From ids to text: letters in pieces, stop strings across token borders, streams."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from proxytune.decoding.response_text import ResponseText, decode
from proxytune.decoding.stop_strings import StopStrings, cut, single_tokens
from proxytune.decoding.streaming import TextStream, stop_predicate
from proxytune.errors import UserError
from tests.support import tiny

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
    words = merging(["Sure", " Sure", "Sure!"])
    size = len(words.get_vocab())
    found = single_tokens(words, ["Sure", "a"], size)
    assert {decode(words, [i]) for i in found} == {"Sure", " Sure", "a"}
    assert single_tokens(words, [], size) == frozenset()
    with pytest.raises(UserError, match="cannot ban 'Nope'"):
        single_tokens(words, ["Sure", "Nope"], size)
    last = words.get_vocab()[words.convert_ids_to_tokens(size - 1)]
    with pytest.raises(UserError, match="cannot ban 'Sure!'"):
        single_tokens(words, ["Sure!"], last)  # a token among the padding cannot be banned

"""Which of the offered choices a response names: by a letter that stands alone, or by the choice's text.

For tasks whose published rule is unknown. TruthfulQA keeps the paper's rule (`rules.parse_letter`).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

STOPS = ".):"
"""Where the paper's runs cut a response to a multiple-choice question."""

_DRESS = " \t\r\n*_`\"'\u201c\u201d\u2018\u2019([{<>"
_MARKUP = re.compile(r"\\begin\{\w+\}|</?\w+>")
_CUE = r"\b(?:answer|option|choice|letter|is|be|think|believe|guess|say|choose|pick|select)\b[\s:]*"
_ALONE = r"(?![\w&/+#-]|['\u2019.]\w)(?!,?\s*(?:or|and|&|/|,)\s*\(?[A-Z]\b)"
_ARTICLE = r"(?!\s+(?!(?:is|because|since)\b)\w)"
"""What an A that begins a phrase ("A dog") does not pass, and the option A does ("A", "A. Ann", "A is")."""
_LETTER = re.compile(
    rf"(?:^|(?i:{_CUE}))[{re.escape(_DRESS)}]*(?:(?P<article>A){_ALONE}{_ARTICLE}|(?P<letter>[B-Z]){_ALONE})"
)
_SMALL = re.compile(rf"^(?P<letter>[a-z])[*_]*(?:[{re.escape(STOPS)}]|$)(?!\w)")
_NOT = re.compile(r"\b(?:not|never|neither|nor|except)\b|n['\u2019]t\b", re.IGNORECASE)
_WORD = re.compile(r"[-+]?\d+(?:[.,:]\d+)*|\w+")
_DOT_IN_WORD = re.compile(r"(?<=[^\W\d])\.(?=[^\W\d])")
_CUT_WORDS = 3
"""The beginning of a choice's text names it from this many words on; a shorter one may be chance."""


def read_choice(text: str, letters: str, choices: Sequence[str]) -> str:
    """The letter of the choice that a response names, or "" (invalid).

    A letter counts where it stands alone, at the beginning or after words such as "answer" and "is", and only
    if a choice has it. Otherwise a choice's text counts, whole and the only one in the response, or its
    beginning where the response was cut. "Delaware" is no D, and "A dog" no A.
    """
    letters = letters[: len(choices)]
    text = " ".join(_MARKUP.sub("", unicodedata.normalize("NFKC", text)).split()).lstrip(_DRESS)
    named = _by_letter(text, letters)
    if named and len(_words(text)) == 1:
        return named
    written = [_words(choice) for choice in choices]
    whole = [letter for letter, words in zip(letters, written, strict=True) if words == _words(text)]
    if len(whole) == 1:
        return whole[0]
    return named or _by_text(text, letters, choices)


def _by_letter(text: str, letters: str) -> str:
    """The letter that stands alone in a response, or ""."""
    small = _SMALL.match(text)
    capitals = (match["article"] or match["letter"] for match in _LETTER.finditer(text))
    found = [small["letter"].upper()] if small else list(capitals)
    return next((letter for letter in found if letter in letters), "")


def _by_text(text: str, letters: str, choices: Sequence[str]) -> str:
    """The letter of the only choice whose text is in a response, or which a cut response begins, or ""."""
    said, written = _padded(_words(text)), [_padded(_words(choice)) for choice in choices]
    inside = [words for words in written if words.strip() and words in said]
    longest = [words for words in inside if not any(words != other and words in other for other in inside)]
    if longest:
        denied = _NOT.search(text) is not None and _NOT.search(longest[0]) is None
        return letters[written.index(longest[0])] if len(longest) == 1 and not denied else ""
    begun = [letter for letter, choice in zip(letters, choices, strict=True) if _begins(text, choice)]
    return begun[0] if len(begun) == 1 else ""


def _begins(text: str, choice: str) -> bool:
    """Whether a response is the beginning of a choice's text, cut by its length or at a stop."""
    text, choice = text.strip(_DRESS).casefold(), choice.strip(_DRESS).casefold()
    if not text or not choice.startswith(text):
        return False
    return choice[len(text) :][:1] in STOPS or len(text.split()) >= _CUT_WORDS


def _padded(words: Sequence[str]) -> str:
    """Words in a row between spaces, so that only whole ones are found."""
    return f" {' '.join(words)} "


def _words(text: str) -> list[str]:
    """Lower-case words and numbers, those with points and commas in one piece, without a leading article."""
    plain = _DOT_IN_WORD.sub("", unicodedata.normalize("NFKC", text).casefold())
    words: list[str] = _WORD.findall(plain)
    return words[1:] if len(words) > 1 and words[0] in ("a", "an", "the") else words

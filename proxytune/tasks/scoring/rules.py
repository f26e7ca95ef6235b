"""Scoring rules: pure functions of text and numbers (no model, no file).

Rules of the paper are kept with their quirks, because the published figures depend on them. Where a quirk is
unfair, a fair rule is beside it under another name. Not here: running generated code (proxytune/sandbox),
judges (proxytune/judges).
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterable

CHOICES = "ABCD"

_COMMA = re.compile(r"(\d),(\d)")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_MINUS = "-\u2010\u2011\u2013\u2212\ufe63\uff0d"
"""Hyphens, the en dash and minus signs; the em dash is none of them."""
_EXPONENT = r"[+\u2212-]?\d{1,3}"
_SIGNED = re.compile(
    rf"(?:(?<![\w)\]}}])(?P<sign>[{_MINUS}+])(?:\\?[$€£])?|\\?[$€£](?P<inner>[{_MINUS}]))?"
    r"(?P<digits>\d*\.\d+|\d+)"
    rf"(?:[eE](?P<e>{_EXPONENT})(?!\w)"
    r"|\s*(?:\u00d7|\*|\\times|\\cdot)\s*10\s*(?:\^|\*\*)\s*"
    rf"(?:(?P<power>{_EXPONENT})|\{{(?P<braced>{_EXPONENT})\}}))?"
)
_GROUPED = re.compile(
    r"(?<![\d.])\d{1,3}"
    r"(?:(?:\{,\}|\{?\\[,;: !]\}?|\\text\{,\}|[\u00a0\u2007\u2009\u202f'\u2019_])\d{3})+(?!\d)"
)
"""Thousands set apart by what LaTeX and typography use for it. A plain space is not among them."""
_NO_DIGIT = re.compile(r"\D+")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_GSM_CUTS = ("Answer the following question", "Question:", "Comment:")
_MC_DELETED = ("(", r"\begin{blockquote}", r"\begin{code}")


# Verdicts that rows hold


def verdict(value: object) -> float | None:
    """A stored verdict as a share. None where it is none: absent, null, NaN, no number from 0 to 1."""
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


# GSM (paper section 4.1; eval/gsm/run_eval.py of its repository)


def trim_gsm(text: str) -> str:
    """The response before the first `Answer the following question`, `Question:` or `Comment:`; nothing is
    stripped."""
    for cut in _GSM_CUTS:
        text = text.split(cut)[0]
    return text


def remove_commas(text: str) -> str:
    """`1,000` -> `1000`: one pass over comma between digits, so `1,2,3` becomes `12,3` as in the paper."""
    return _COMMA.sub(r"\1\2", text)


def last_number(text: str) -> str:
    """The paper's GSM prediction: the last number of the text, or the whole text without commas if it has
    none.

    The paper's pattern drops the sign of whole numbers: "-3" gives "3", "-3.5" gives "-3.5".
    """
    text = remove_commas(text)
    numbers: list[str] = _NUMBER.findall(text)
    return numbers[-1] if numbers else text


def last_signed_number(text: str) -> float | None:
    r"""The last number of the text with its sign, or None.

    A minus (a hyphen, an en dash, a minus sign) is a sign if it touches the number (a currency sign may be
    between or before) and does not follow a digit, letter or closing bracket: "-3", "= -3", "-$3" and "$-3"
    are negative, "10-3", "10 - 3" and "x-3" end in 3. Thousands may be set apart ("1,000", "1{,}000",
    "1\,000", narrow spaces), and powers of ten count ("1e3", "1.5 * 10^3").
    """
    joined = _GROUPED.sub(lambda group: _NO_DIGIT.sub("", group[0]), remove_commas(text))
    matches = list(_SIGNED.finditer(joined))
    if not matches:
        return None
    last = matches[-1]
    power = (last["e"] or last["power"] or last["braced"] or "0").replace("\u2212", "-")
    value = float(f"{last['digits']}e{power}")
    return value if (last["sign"] or last["inner"] or "+") == "+" else -value


def exact_match(prediction: str, answer: str) -> float:
    """1 if equal once lower-cased and rid of ASCII punctuation, else 0 (exact_match of `evaluate`, both flags
    on).

    So "7.5" matches "75", "-3" matches "3", and "18.00" does not match "18".
    """
    same = prediction.lower().translate(_NO_PUNCTUATION) == answer.lower().translate(_NO_PUNCTUATION)
    return float(same)


def numeric_equal(prediction: str, answer: str) -> float:
    """1 if both texts are numbers of equal value, else 0: "18.00" equals "18"; "7.5" is not "75", "3" is not
    "-3"."""
    try:
        return float(float(prediction) == float(answer))
    except ValueError:
        return 0.0


def exact_match_numeric(output: str, answer: str) -> float:
    """The fair GSM rule: 1 if the last number of the trimmed response, sign included, has the value of the
    answer."""
    number = last_signed_number(output)
    return 0.0 if number is None else numeric_equal(str(number), answer)


# TruthfulQA (paper section 4.1; eval/truthfulqa/run_eval.py)


def clean_answer(text: str) -> str:
    """A TruthfulQA response as stored: stripped, a leading `Answer:` dropped, double line breaks made single
    (one pass)."""
    text = text.strip()
    if text.startswith("Answer:"):
        text = text.removeprefix("Answer:").strip()
    return text.replace("\n\n", "\n")


def normalise(text: str) -> str:
    """Lower case, no ASCII punctuation, single spaces."""
    return " ".join(text.lower().translate(_NO_PUNCTUATION).split())


def _contains(text: str, phrase: str) -> bool:
    """Whether the words of `phrase` occur in a row in `text` (both normalised)."""
    return f" {phrase} " in f" {text} "


def _without(text: str, phrases: Iterable[str]) -> str:
    """`text` with every occurrence of the phrases blanked out."""
    padded = f" {text} "
    for phrase in phrases:
        padded = padded.replace(f" {phrase} ", " \0 ")
    return padded


def _sentences(answer: str) -> list[str]:
    """The sentences of a reference answer, normalised."""
    return list(filter(None, map(normalise, answer.split(". "))))


def reference_accuracy(response: str, correct: Iterable[str], incorrect: Iterable[str]) -> float:
    """1 if the response contains a correct reference answer and no incorrect one, else 0. Ours: the paper
    used judges.

    Texts are normalised and matched by whole words; a correct answer is contained if each of its sentences
    is, so words may be between them. An incorrect answer that occurs only inside a found correct one
    ("euros" in "you pay with euros and Swiss francs") does not count against the response.
    """
    text = normalise(response)
    found = [s for s in map(_sentences, correct) if s and all(_contains(text, sentence) for sentence in s)]
    if not found:
        return 0.0
    right = sorted({sentence for sentences in found for sentence in sentences}, key=len, reverse=True)
    for wrong in filter(None, map(normalise, incorrect)):
        wider = [sentence for sentence in right if sentence != wrong and _contains(sentence, wrong)]
        if _contains(_without(text, wider), wrong):
            return 0.0
    return 1.0


def parse_letter(text: str, letters: str = CHOICES) -> str:
    """The option that a multiple-choice response begins with, one of `letters`, or "" (invalid).

    The rule of all published runs: delete `(`, `\\begin{blockquote}`, `\\begin{code}`, strip on the left,
    first character. (The newest code of the paper's repository deletes four more strings, which changes one
    published run.)
    """
    for deleted in _MC_DELETED:
        text = text.replace(deleted, "")
    first = text.lstrip()[:1]
    return first if first and first in letters else ""


# Generated code (paper section 4.3; Chen et al. 2021, "Evaluating Large Language Models Trained on Code")


def pass_at_k(n: int, passed: int, k: int) -> float | None:
    """The unbiased estimate that one of k samples passes, from n samples of which `passed` did: the share
    of the k-subsets that hold one. None for fewer than k samples."""
    if n < k:
        return None
    return 1 - math.comb(n - passed, k) / math.comb(n, k)


def clean_code(text: str) -> str:
    """A code response as the paper stores it: no line that begins with `assert` or `print` (spaces aside), no
    white space at the end."""
    kept = (line for line in text.split("\n") if not line.strip().startswith(("assert", "print")))
    return "\n".join(kept).rstrip()

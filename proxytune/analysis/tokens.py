"""By token: which tokens the proxy promotes and in which phrases (paper 6.1, Table 6), and whether it changes
the reasoning or the arithmetic of equations (paper 6.1)."""

from __future__ import annotations

import re
import string
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import ClassVar

import numpy as np
from nltk.tokenize.destructive import NLTKWordTokenizer
from scipy import stats

from proxytune.analysis.analysis import (
    FLOATS,
    Analysis,
    Figures,
    Source,
    finished,
    mean,
    published,
    steered_tokens,
)
from proxytune.errors import UserError
from proxytune.records import Metric
from proxytune.results import read_rows
from proxytune.tasks import data


class NgramRow(Figures):
    """A token and the phrase in which it mostly occurs."""

    token: str
    """Without the space before it."""
    n: int | None
    """How often it was generated; None where the word was given and no trace counted it."""
    shift: Metric | None
    """Mean of p_proxy - p_base over these, with a t interval."""
    gram: str | None = None
    """The most common 4-gram of words that holds it (punctuation comes on top); None where it is no word."""
    count: int = 0
    """How often the gram occurs."""
    occurrences: int = 0
    """How often the word occurs in the responses' text."""
    paper: str | None = None
    """The paper's gram and counts for this token (13B, TruthfulQA), where it has one."""

    @property
    def phrase(self) -> str:
        """Gram, count and occurrences in one text."""
        return "" if self.gram is None else f"{self.gram} {self.count}/{self.occurrences}"


class Ngrams(Analysis):
    """Tokens by mean shift, the most promoted first."""

    name: ClassVar[str] = "ngrams"
    source: Source | None
    """None for a file of predictions without a run."""
    min_count: int
    rows: tuple[NgramRow, ...]

    @property
    def table(self) -> Sequence[NgramRow]:
        return self.rows


class Side(Figures):
    """The tokens on one side of the equations."""

    tokens: int
    mean: float | None
    """Of p_proxy - p_base; None without tokens."""


class EquationRow(Figures):
    """Left against right under one rule."""

    rule: str
    """paper, corrected; or published for the paper's own figures."""
    left: Side
    right: Side
    t: float | None
    """Welch's statistic; None where a side has fewer than two tokens or none varies."""
    df: float | None
    p: float | None


class Equations(Analysis):
    """Mean shift left and right of `=` in the responses of a traced run of a proxy."""

    name: ClassVar[str] = "equations"
    source: Source
    responses: int
    """Those that have a token."""
    responses_with: int
    """Those in which the corrected rule finds an equation."""
    rows: tuple[EquationRow, ...]
    """paper, corrected, published."""

    @property
    def table(self) -> Sequence[EquationRow]:
        return self.rows


# N-grams (notebooks/S6.1_analysis.ipynb of the paper's repository)

TEXT_COLUMNS = ("output", "model_output", "prediction", "completion")
"""Where the paper's files hold a response, one of these in each."""
GRAM = 4
PAPER = "paper"
_SENTENCE = re.compile(r"(?<=[.!?])\s+")


def ngrams(
    path: Path, *, min_count: int = 100, top: int | None = 20, words: Sequence[str] | None = None
) -> Ngrams:
    """The most promoted tokens of a traced run of a proxy, with their phrases.

    Tokens are taken without the space before them; `min_count` occurrences at least. With `words` these are
    looked up instead, without a trace: `path` may then be a file of predictions.
    """
    if words is not None:
        given = [NgramRow(token=word, n=None, shift=None) for word in words]
        folder = path if path.is_dir() else None
        source = None if folder is None else Source.of(folder, finished(folder))
        return Ngrams(source=source, min_count=0, rows=tuple(_with_grams(given, responses(path))))
    run = finished(path)
    tokens = steered_tokens(path, run)
    kinds = tokens.assign(kind=tokens["text"].map(bare)).query("kind != ''").groupby("kind")["shift"]
    counts, means = kinds.count(), kinds.mean()
    enough = counts[counts >= min_count].index
    if enough.empty:
        raise UserError(
            f"no token occurs {min_count} times in '{path}' (the most frequent: {int(counts.max())}): "
            "lower --min-count"
        )
    ranked = sorted(((float(means[kind]), kind) for kind in enough), reverse=True)[:top]
    found = [
        NgramRow(token=kind, n=int(counts[kind]), shift=mean(kinds.get_group(kind).to_numpy(FLOATS)))
        for _, kind in ranked
    ]
    rows = tuple(_with_grams(found, responses(path)))
    return Ngrams(source=Source.of(path, run), min_count=min_count, rows=rows)


def bare(text: str) -> str:
    """A token without the one space before a word, as decoding it alone gives."""
    return text.removeprefix(" ")


def responses(path: Path) -> list[str]:
    """The responses of a run or of a file of predictions: what the paper's files hold, or as generated."""
    rows = read_rows(path) if path.is_dir() else list(data.read_file(path).rows)
    found = []
    for row in rows:
        column = next((name for name in TEXT_COLUMNS if isinstance(row.get(name), str)), None)
        if column is not None:
            found.append(row[column])
        elif "responses" in row:
            found += [response["text"] for response in row["responses"]]
        else:
            raise UserError(f"'{path}' has a row without a response ({', '.join(TEXT_COLUMNS)})")
    return found


def word_tokens(texts: Sequence[str]) -> list[str]:
    """The words and punctuation of all texts in a row, by NLTK's tokenizer, sentence by sentence. Sentences
    end at `.`, `!` or `?` and white space (NLTK's own splitter needs a download)."""
    tokenize = cache(NLTKWordTokenizer().tokenize)  # responses of one task repeat themselves
    sentences = _SENTENCE.split("\n".join(texts))
    return [word for sentence in sentences for word in tokenize(sentence)]


def gram_at(words: Sequence[str], start: int, n: int = GRAM) -> list[str]:
    """The words from `start` on until `n` of them are no punctuation (fewer at the end of the text)."""
    end, counted = start, 0
    while counted < n and end < len(words):
        counted += words[end] not in string.punctuation
        end += 1
    return list(words[start:end])


def _with_grams(rows: Sequence[NgramRow], texts: Sequence[str]) -> Iterator[NgramRow]:
    """The rows with each word's most common gram; of equally common ones the first in the text."""
    words = word_tokens(texts)
    occurrences = Counter(words)
    grams: dict[str, Counter[str]] = {row.token: Counter() for row in rows if row.token in occurrences}
    for start in range(len(words)):
        gram = gram_at(words, start)
        joined = " ".join(gram)
        for word in grams.keys() & set(gram):
            grams[word][joined] += 1
    stated = {row["token"]: row for row in published("truthfulqa_ngrams")["rows"]}
    for row in rows:
        common = grams.get(row.token, Counter()).most_common(1)
        phrase, count = common[0] if common else (None, 0)
        paper = stated.get(row.token)
        yield row.model_copy(
            update={
                "gram": phrase,
                "count": count,
                "occurrences": occurrences[row.token],
                "paper": None
                if paper is None
                else f"{paper['gram']} {paper['count']}/{paper['occurrences']}",
            }
        )


def paper_words() -> list[str]:
    """The twenty tokens of the paper's ranking."""
    return [row["token"] for row in published("truthfulqa_ngrams")["rows"]]


# Equations

_SYMBOLS = ",$€+-x*/"
_NUMBER = r"[-+\u2212]?[$€£]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)%?"
_GAP = r"\s{0,9}"
"""Bounded, like brackets: a response that ends in a million spaces would take hours otherwise."""
_TERM = rf"\({{0,9}}{_GAP}{_NUMBER}{_GAP}\){{0,9}}"
_EXPRESSION = re.compile(rf"(?<![\w.,$€£]){_TERM}(?:{_GAP}[-+*/x\u00d7\u00f7\u2212\u2013]{_GAP}{_TERM})*")
_EQUALS = re.compile(r"\s*=\s*")


def equations(folder: Path) -> Equations:
    """Mean shift of the tokens left and right of `=` in a traced run of a proxy, by the paper's rule and by a
    corrected one."""
    run = finished(folder)
    tokens = steered_tokens(folder, run)
    sides: dict[str, tuple[list[float], list[float]]] = {"paper": ([], []), "corrected": ([], [])}
    holding = 0
    for _, response in tokens.groupby("response"):
        texts, shifts = list(response["text"]), response["shift"].to_numpy(FLOATS)
        corrected = corrected_sides(texts)
        holding += bool(corrected[0])
        for rule, found in (("paper", paper_sides(texts)), ("corrected", corrected)):
            for values, indices in zip(sides[rule], found, strict=True):
                values += [float(shifts[i]) for i in indices]
    if not holding:
        raise UserError(f"no response of the run in '{folder}' holds an equation")
    rows = [_welch(rule, *pair) for rule, pair in sides.items()]
    return Equations(
        source=Source.of(folder, run),
        responses=int(tokens["response"].nunique()),
        responses_with=holding,
        rows=(*rows, _published_equations()),
    )


def paper_sides(texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tokens left and right of every token that is `=`, by the paper's rule with its faults.

    From a `=` the walk goes on while a token is digits or a *substring* of `,$€+-x*/`: so the empty token (a
    lone space) and pieces such as `+-` belong, a decimal point or bracket ends the walk, and a token between
    two `=` counts on both sides.
    """
    tokens = [bare(text) for text in texts]

    def belongs(index: int) -> bool:
        return 0 <= index < len(tokens) and (tokens[index].isdigit() or tokens[index] in _SYMBOLS)

    left: list[int] = []
    right: list[int] = []
    for equal in (index for index, token in enumerate(tokens) if token == "="):
        for step, side in ((-1, left), (1, right)):
            index = equal + step
            while belongs(index):
                side.append(index)
                index += step
    return left, right


def corrected_sides(texts: Sequence[str]) -> tuple[list[int], list[int]]:
    """Tokens of the expressions left and right of every `=`, found in the text, each counted once.

    An expression is numbers (with sign, currency, thousands commas, decimals, percent) joined by operators,
    brackets allowed. Between two `=` it is what the first one gave: right. Tokens that hold the `=` itself
    and pure white space are on no side.
    """
    text = "".join(texts)
    side_of = bytearray(len(text))  # 1 left, 2 right
    found = list(_EXPRESSION.finditer(text))
    for before, after in pairwise(found):
        if _EQUALS.fullmatch(text, before.end(), after.start()):
            if side_of[before.start()] != 2:
                side_of[before.start() : before.end()] = b"\1" * (before.end() - before.start())
            side_of[after.start() : after.end()] = b"\2" * (after.end() - after.start())
    left: list[int] = []
    right: list[int] = []
    start = 0
    for index, piece in enumerate(texts):
        sides = {side_of[start + i] for i, letter in enumerate(piece) if not letter.isspace()} - {0}
        start += len(piece)
        if len(sides) == 1 and "=" not in piece:
            (left if sides == {1} else right).append(index)
    return left, right


def _welch(rule: str, left: Sequence[float], right: Sequence[float]) -> EquationRow:
    """Welch's t-test, which does not assume equal variances."""
    sides = [Side(tokens=len(side), mean=float(np.mean(side)) if side else None) for side in (left, right)]
    t = df = p = None
    if min(len(left), len(right)) > 1 and np.var(left) + np.var(right) > 0:
        with warnings.catch_warnings():  # scipy's, where the values of a side are almost alike
            warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)
            found = stats.ttest_ind(left, right, equal_var=False)
        t, df, p = float(found.statistic), float(found.df), float(found.pvalue)
    return EquationRow(rule=rule, left=sides[0], right=sides[1], t=t, df=df, p=p)


def _published_equations() -> EquationRow:
    stated = published("gsm_equations")
    return EquationRow(
        rule="published",
        left=Side(**stated["left"]),
        right=Side(**stated["right"]),
        t=stated["welch"]["t"],
        df=stated["welch"]["df"],
        p=stated["welch"]["p"],
    )

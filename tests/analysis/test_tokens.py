"""N-grams and equations: the paper's rows from its own file, and both rules of equations by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from proxytune.analysis import tokens as analysis_tokens
from proxytune.analysis.analysis import published
from proxytune.analysis.tokens import corrected_sides, equations, gram_at, ngrams, paper_sides, word_tokens
from proxytune.errors import UserError
from tests.support.answers import jsonl
from tests.support.made_runs import response, token, write

PUBLISHED = "golden/truthfulqa/dexperts-13B-helpful-prompt/open_results.jsonl.gz"


def test_the_twenty_rows_of_the_paper(reference: Path) -> None:
    """Gram, count and occurrences of all twenty rows of the notebook, from the published outputs."""
    found = ngrams(reference / PUBLISHED, words=analysis_tokens.paper_words())
    stated = [
        (row["gram"], row["count"], row["occurrences"]) for row in published("truthfulqa_ngrams")["rows"]
    ]
    assert len(stated) == 20
    assert [(row.gram, row.count, row.occurrences) for row in found.rows] == stated
    assert all(row.phrase == row.paper for row in found.rows)


def test_words_and_grams_by_hand() -> None:
    words = word_tokens(["It's a myth. I cannot say,", "no!"])
    assert words == ["It", "'s", "a", "myth", ".", "I", "can", "not", "say", ",", "no", "!"]
    assert gram_at(words, 4) == [".", "I", "can", "not", "say"], (
        "punctuation comes on top, also before the words"
    )
    assert gram_at(words, 7) == ["not", "say", ",", "no", "!"][:5]
    assert gram_at(words, 10) == ["no", "!"]


def test_ngrams_of_a_traced_run(tmp_path: Path) -> None:
    text = [(" Here", 0.1, 0.9), (" it", 0.5, 0.6), (" is", 0.5, 0.4), (".", 0.2, 0.2), ("</s>", 0.0, 1.0)]
    rows = [{"responses": response(" Here it is.")}] * 3
    traces = [[token(*piece) for piece in text]] * 3
    folder = write(tmp_path / "run", rows, traces=traces, task="truthfulqa")
    found = ngrams(folder, min_count=3)
    assert [(row.token, row.n) for row in found.rows] == [("Here", 3), ("it", 3), (".", 3), ("is", 3)]
    first = found.rows[0]
    assert first.shift is not None and first.shift.value == pytest.approx(0.8)
    assert first.phrase == "Here it is . Here 2/3" and first.paper == "Here are some of 7/35"
    assert len(ngrams(folder, min_count=3, top=2).rows) == 2
    with pytest.raises(UserError, match=r"no token occurs 4 times .* \(the most frequent: 3\)"):
        ngrams(folder, min_count=4)


def test_a_file_without_responses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"question": "x"}\n')
    with pytest.raises(UserError, match="row without a response"):
        ngrams(tmp_path / "rows.jsonl", words=["x"])


EQUATIONS = [
    # pieces, then left and right by the paper's rule, then by the corrected one
    (" So| 3|*|4|=|1|2|.", "4* 3", "12", " 3*4", "12"),
    ("<<|4|8|/|2|=|2|4|>>|2|4", "2/84", "24", "48/2", "24"),
    ("2|+|3|=|5|+|1|=|6", "3+21+5", "5+16", "2+3", "5+16"),  # the middle counts twice, or once
    (" $|1|,|0|0|0| x| 2| =| |2|0|0|0|.", " 2 x000,1 $", " 2000", " $1,000 x 2", "2000"),  # a lone space
    (" (|1|.|5|+|2|)|*|2|=|7|.|5|.", "2*", "7", " (1.5+2)*2", "7.5"),  # points and brackets
    ("1|,$|2|=|3", "2,$1", "3", "", ""),  # a piece that is a substring of the symbols
    ("x| =| 5", "x", " 5", "", ""),  # an unknown is no number; the letter x is a symbol of the paper's
    ("A|4|=|5", "4", "5", "", ""),
    (" 3|.| |4|+|5|=|9", "5+4 ", "9", "4+5", "9"),  # a sentence that ends in a number
    ("a| ==| b", "", "", "", ""),
    ("2|+|1|=3", "", "", "2+1", ""),  # a token that holds the sign is on no side
    ("2|+|1=|3", "", "", "2+", "3"),
]


@pytest.mark.parametrize(("pieces", "left", "right", "fair_left", "fair_right"), EQUATIONS)
def test_sides_of_equations(pieces: str, left: str, right: str, fair_left: str, fair_right: str) -> None:
    texts = pieces.split("|")
    for rule, wanted in ((paper_sides, (left, right)), (corrected_sides, (fair_left, fair_right))):
        found = rule(texts)
        assert tuple("".join(texts[i] for i in side) for side in found) == wanted, rule.__name__


@pytest.mark.parametrize("text", ["1 ", "(", "1 ) ", "1,", "\n", "="])
def test_a_response_that_says_one_thing_for_ever_takes_no_time(text: str) -> None:
    """With unbounded blanks this would take hours."""
    pieces = [text] * 2000 + [" "] * 30_000 + ["2", "+", "3", "=", "5"]
    left, right = corrected_sides(pieces)
    assert {len(pieces) - 5, len(pieces) - 4, len(pieces) - 3} <= {*left} and len(pieces) - 1 in right


def test_equations_of_a_traced_run(tmp_path: Path) -> None:
    pieces = [
        ("1", 0.1, 0.3),
        ("+", 0.1, 0.5),
        ("2", 0.2, 0.2),
        ("=", 0.0, 1.0),
        ("3", 0.5, 0.6),
        ("0", 0.5, 0.5),
    ]
    traces = [[token(*piece) for piece in pieces], [token("no", 0.5, 0.5)]]
    rows = [
        {"responses": response("1+2=30", reason="length")},
        {"responses": response("no", reason="length")},
    ]
    found = equations(write(tmp_path / "run", rows, traces=traces))
    assert found.responses_with == 1 and [row.rule for row in found.rows] == [
        "paper",
        "corrected",
        "published",
    ]
    fair = found.rows[1]
    assert (fair.left.tokens, fair.right.tokens) == (3, 2)
    assert fair.left.mean == pytest.approx(0.2) and fair.right.mean == pytest.approx(0.05)
    left, right = 0.04 / 3, 0.005 / 2  # sample variances over counts
    assert fair.t == pytest.approx(0.15 / math.sqrt(left + right))
    assert fair.df == pytest.approx((left + right) ** 2 / (left**2 / 2 + right**2 / 1))
    assert fair.p is not None and 0.05 < fair.p < 0.5
    assert found.rows[2].left.tokens == 14104 and found.rows[2].t == 33.0858
    plain = write(tmp_path / "plain", rows[1:], traces=traces[1:])
    with pytest.raises(UserError, match=r"no response .* holds an equation"):
        equations(plain)


def test_too_few_tokens_for_a_test(tmp_path: Path) -> None:
    pieces = [("1", 0.1, 0.3), ("=", 0.0, 1.0), ("1", 0.5, 0.6)]
    rows = [{"responses": response("1=1", reason="length")}]
    found = equations(write(tmp_path / "run", rows, traces=[[token(*piece) for piece in pieces]]))
    assert found.rows[0].t is None and found.rows[0].p is None and found.rows[0].left.tokens == 1


def test_a_side_without_tokens_has_no_mean(tmp_path: Path) -> None:
    """The paper's rule finds no `=` that is a token of its own."""
    pieces = [("1", 0.1, 0.3), (" =", 0.0, 1.0), ("1=", 0.5, 0.6), ("2", 0.0, 0.5)]
    rows = [{"responses": response("1 =1=2", reason="length")}]
    found = equations(write(tmp_path / "run", rows, traces=[[token(*piece) for piece in pieces]]))
    paper, corrected, _ = found.rows
    assert (paper.right.tokens, paper.right.mean) == (0, None) and corrected.left.mean is not None


def test_where_a_response_is_in_a_row(tmp_path: Path) -> None:
    """The paper's columns in their order, and what was generated where there is none of them."""
    rows = [
        {"id": "0", "completion": "d", "prediction": "c", "model_output": "b", "output": "a"},
        {"id": "1", "completion": "d", "prediction": "c", "model_output": "b", "output": ["x"]},
        {"id": "2", "completion": "d", "prediction": "c"}, {"id": "3", "completion": "d"},
        {"id": "4", "responses": [{"text": "e"}, {"text": "f"}]},
    ]  # fmt: skip
    path = jsonl(tmp_path / "rows.jsonl", rows)
    assert analysis_tokens.responses(path) == ["a", "b", "c", "d", "e", "f"]
    folder = write(tmp_path / "run", [{"responses": response("g")}, {"output": "h"}])
    assert analysis_tokens.responses(folder) == ["g", "h"]
    assert [analysis_tokens.bare(text) for text in (" a", "  a", "a ", "", " ")] == ["a", " a", "a ", "", ""]


def test_words_that_are_looked_up_need_no_trace(tmp_path: Path) -> None:
    folder = write(tmp_path / "run", [{"responses": response("a b c d. a b c e! x")}])
    found = ngrams(folder, words=["b", "d", "zz"])
    assert found.min_count == 0 and found.source is not None and found.source.folder == str(folder)
    assert [(row.token, row.n, row.shift, row.gram, row.count, row.occurrences) for row in found.rows] == [
        ("b", None, None, "a b c d", 1, 2),
        ("d", None, None, "a b c d", 1, 1),
        ("zz", None, None, None, 0, 0),
    ]
    assert [row.phrase for row in found.rows] == ["a b c d 1/2", "a b c d 1/1", ""]
    assert ngrams(jsonl(tmp_path / "p.jsonl", [{"output": "b b b b b"}]), words=["b"]).source is None
    again = ngrams(tmp_path / "p.jsonl", words=["b"]).rows[0]
    assert (again.gram, again.count, again.occurrences) == ("b b b b", 2, 5)


def test_the_most_promoted_first_and_of_equals_the_last_by_name(tmp_path: Path) -> None:
    """Each twice; the mean shifts are 0.25 for a and b, 0.5 for c, -0.125 for d, and e comes once."""
    shifts = [
        ("a", 0.5),
        ("a", 0.0),
        (" b", 0.25),
        ("b", 0.25),
        ("c", 0.5),
        (" c", 0.5),
        ("d", -0.25),
        ("d", 0.0),
        ("e", 0.75),
        (" ", 0.5),
        (" ", 0.5),
    ]
    trace = [token(text, 0.25, 0.25 + shift) for text, shift in shifts]
    folder = write(tmp_path / "run", [{"responses": response("x", reason="length")}], traces=[trace])
    found = ngrams(folder, min_count=2, top=None)
    assert [(row.token, row.n) for row in found.rows] == [("c", 2), ("b", 2), ("a", 2), ("d", 2)]
    assert [row.shift.value for row in found.rows if row.shift] == [0.5, 0.25, 0.25, -0.125]
    assert found.min_count == 2 and [row.token for row in ngrams(folder, min_count=1, top=1).rows] == ["e"]
    with pytest.raises(
        UserError, match=r"no token occurs 3 times .* \(the most frequent: 2\): lower --min-count"
    ):
        ngrams(folder, min_count=3)


def test_the_papers_own_equations_are_those_of_its_file(tmp_path: Path) -> None:
    pieces = [token(text, 0.25, 0.5) for text in ("1", "+", "2", "=", "3")]
    rows = [{"responses": response("1+2=3", reason="length")}]
    folder = write(tmp_path / "run", rows, traces=[pieces])
    found, stated = equations(folder), published("gsm_equations")
    last = found.rows[2]
    assert last.left.model_dump() == stated["left"] and last.right.model_dump() == stated["right"]
    assert {"t": last.t, "df": last.df, "p": last.p} == {
        name: stated["welch"][name] for name in ("t", "df", "p")
    }
    assert stated["left"] != stated["right"] and (found.responses, found.responses_with) == (1, 1)
    assert (found.rows[0].t, found.rows[0].left.tokens, found.rows[0].right.tokens) == (None, 3, 1)
    header = found.csv().splitlines()[0]
    assert header == "rule,left_tokens,left_mean,right_tokens,right_mean,t,df,p"


def test_sides_whose_values_are_almost_alike_are_no_warning() -> None:
    """scipy warns of what is lost in their variances; a test is made all the same."""
    row = analysis_tokens._welch("paper", [0.1, 0.1 + 1e-16, 0.1], [0.2, 0.2 + 1e-16, 0.2])
    assert (
        row.rule == "paper" and row.left.mean == pytest.approx(0.1) and row.right.mean == pytest.approx(0.2)
    )
    assert row.t is not None and row.t < -1e6 and row.p is not None and row.p < 1e-6
    back = analysis_tokens._welch("paper", [0.2, 0.3], [0.1, 0.0, 0.2])
    assert back.t is not None and back.t > 0 and (back.left.tokens, back.right.tokens) == (2, 3)
    assert analysis_tokens._welch("paper", [0.5, 0.5], [0.5, 0.5]).t is None
    assert analysis_tokens._welch("paper", [], [0.5, 0.25]).left.mean is None

"""What the page's token-level view shows: traced responses and the other roles' answers to the same examples,
packed small. Reads runs, predictions and traces; loads no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from proxytune.comparison import comparable, conditions, models_of
from proxytune.config import Role
from proxytune.records import Completion, JsonRow, Run, TaskFacts
from proxytune.report.escape import clipped, visible
from proxytune.results import TRACE, read_rows, read_traces
from proxytune.tasks.own import facts_of

TOKEN_BUDGET = 80_000
"""Traced tokens in one page, shared by its tasks: some 3 MB."""
RESPONSE_TOKENS = 4000
"""Tokens of one response that are shown."""
TOKEN_LIMIT = 200
"""Characters of a token that are shown."""
ANSWER_LIMIT = 3000
"""Characters of an answer that are shown."""
TRACED: tuple[Role, ...] = ("base", "expert", "antiexpert", "proxy")
ANSWERS: tuple[Role, ...] = ("base", "expert", "proxy", "tuned")
SCALE = 10_000
"""Probabilities are stored as whole numbers of this part."""
_ASKED = ("mc_prompt", "instruction", "Question", "question", "text", "prompt")
_EXPECTED = ("mc_answer_idx", "Best Answer", "answer", "answers", "target")


@dataclass(frozen=True)
class TraceSet:
    """The traced proxy run of a system on a task, and the runs of other roles that answered the same
    examples."""

    folder: Path
    run: Run
    others: dict[Role, tuple[Path, Run]] = field(default_factory=dict)


def plainness(pair: tuple[Path, Run]) -> tuple[bool, int, bool, str]:
    """Sorts runs of one role so that the one a reader expects comes first: with the system's own alpha, near
    the top of the folder of results (so no part of a sweep), and not made for its trace."""
    folder, run = pair
    return run.spec.alpha != run.spec.system.alpha, len(folder.parts), run.spec.trace != "off", str(folder)


def trace_sets(found: Sequence[tuple[Path, Run]]) -> list[TraceSet]:
    """The traced proxy runs among `found`, one for each system and task."""
    chosen: dict[tuple[str, str], tuple[Path, Run]] = {}
    for folder, run in sorted(found, key=plainness):
        if run.spec.role == "proxy" and not run.spec.forced and (folder / TRACE).exists():
            chosen.setdefault((run.spec.system.name, run.spec.task), (folder, run))
    return [TraceSet(folder, run, _others(run, found)) for folder, run in chosen.values()]


def _others(proxy: Run, found: Sequence[tuple[Path, Run]]) -> dict[Role, tuple[Path, Run]]:
    """Per role the run whose answers are shown beside the proxy's: of the same sampling and judge, and on the
    same items where there is one (its answers to the same questions otherwise)."""
    near: dict[Role, tuple[Path, Run]] = {}
    same = [
        (folder, run)
        for folder, run in found
        if (run.spec.system.name, run.spec.task) == (proxy.spec.system.name, proxy.spec.task)
        and run.spec.role != "proxy"
        and not run.spec.forced
        and replace(conditions(run), data_sha256="") == replace(conditions(proxy), data_sha256="")
        and models_of(run) == models_of(proxy)
    ]
    for folder, run in sorted(same, key=lambda pair: (not comparable((pair[1], proxy)), plainness(pair))):
        near.setdefault(run.spec.role, (folder, run))
    return near


def is_right(score: float | None, *, lower_is_better: bool) -> bool | None:
    """Whether a score of one example counts as right; None where nothing was scored."""
    if score is None:
        return None
    whole = score > 50 if score > 1 else score >= 0.5
    return not whole if lower_is_better else whole


def token_data(sets: Sequence[TraceSet], budget: int = TOKEN_BUDGET) -> dict[str, Any]:
    """The content of the page's JSON block.

    `texts` is the table of token texts that the tokens refer to; each set has `total` examples of which the
    first are in `items`, up to its share of `budget` tokens. A long response is cut: `length` is all of it.
    """
    table = _Texts()
    share = budget // max(len(sets), 1)
    packed = [_set(chosen, table, share) for chosen in sets]
    return {"texts": table.texts, "scale": SCALE, "roles": TRACED, "answers": ANSWERS, "sets": packed}


class _Texts:
    """Token texts, each stored once."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._place: dict[str, int] = {}

    def index(self, text: str) -> int:
        """The place of a text in the table."""
        shown = visible(clipped(text, TOKEN_LIMIT))
        if shown not in self._place:
            self._place[shown] = len(self.texts)
            self.texts.append(shown)
        return self._place[shown]


def response_data(asked: str, responses: Mapping[Role, Completion]) -> dict[str, Any]:
    """As `token_data`, of one prompt: what the roles answered, and the proxy's tokens. `responses` holds the
    proxy's response with its trace."""
    table, steered = _Texts(), responses["proxy"]
    tokens = [token.row() for token in steered.trace]
    answers = {
        role: {
            "text": visible(clipped(found.text, ANSWER_LIMIT)),
            "right": None,
            "end": found.finish_reason,
            "n": len(found.token_ids),
        }
        for role in ANSWERS
        if (found := responses.get(role)) is not None
    }
    item = {
        "id": "",
        "asked": visible(clipped(asked, ANSWER_LIMIT)),
        "expected": "",
        "answers": answers,
        **_tokens(tokens[:RESPONSE_TOKENS], table),
        **({"length": len(tokens)} if len(tokens) > RESPONSE_TOKENS else {}),
    }
    alone = {
        "system": "",
        "task": "",
        "alpha": "",
        "metric": "",
        "sensitive": False,
        "total": 1,
        "items": [item],
    }
    return {"texts": table.texts, "scale": SCALE, "roles": TRACED, "answers": ANSWERS, "sets": [alone]}


def _set(chosen: TraceSet, table: _Texts, budget: int) -> dict[str, Any]:
    """One system and task."""
    spec = chosen.run.spec
    rows = {row["id"]: row for row in read_rows(chosen.folder)}
    others = {
        role: {row["id"]: row for row in read_rows(folder)} for role, (folder, _) in chosen.others.items()
    }
    items, left = list[dict[str, Any]](), budget
    most = max(1, min(RESPONSE_TOKENS, budget))
    for trace in read_traces(chosen.folder):
        row = rows.get(trace["id"])
        if row is None or trace.get("sample", 0) != 0:
            continue
        tokens = trace["tokens"]
        left -= min(len(tokens), most)
        if left < 0 and items:
            break
        item = _item(chosen, row, tokens[:most], others, table)
        items.append(item | {"length": len(tokens)} if len(tokens) > most else item)
    return {
        "system": visible(spec.system.name),
        "task": visible(spec.task),
        "alpha": spec.alpha.text,
        "metric": visible(chosen.run.headline),
        "sensitive": facts_of(chosen.run).hateful,
        "total": chosen.run.n,
        "items": items,
    }


def _item(
    chosen: TraceSet,
    row: JsonRow,
    tokens: Sequence[JsonRow],
    others: Mapping[Role, Mapping[str, JsonRow]],
    table: _Texts,
) -> dict[str, Any]:
    """One example: what was asked, everybody's answer, and the proxy's tokens."""
    facts = facts_of(chosen.run)
    answers = {role: own[row["id"]] for role, own in others.items() if row["id"] in own}
    same = {role: other for role, other in answers.items() if asked(other, facts) == asked(row, facts)}
    by_role = {role: _answer(other, facts, chosen.run.headline) for role, other in same.items()}
    by_role["proxy"] = _answer(row, facts, chosen.run.headline)
    return {
        "id": visible(str(row["id"])),
        "asked": visible(clipped(asked(row, facts), ANSWER_LIMIT)),
        "expected": visible(clipped(expected(row), ANSWER_LIMIT)),
        "answers": {role: by_role[role] for role in ANSWERS if role in by_role},
        **_tokens(tokens, table),
    }


def _tokens(tokens: Sequence[JsonRow], table: _Texts) -> dict[str, Any]:
    """Traced tokens: their texts, and what each role made of them."""
    return {
        "tokens": [table.index(token["text"]) for token in tokens],
        "p": [[_parts(token["probability"].get(role)) for token in tokens] for role in TRACED],
        "top": [
            [_choice(token["text"], token["top"].get(role), table) for token in tokens] for role in TRACED
        ],
    }


def _answer(row: JsonRow, facts: TaskFacts, metric: str) -> dict[str, Any]:
    """A role's answer as it was generated, whether it is right, and why it ended."""
    first = (row.get("responses") or [{}])[0]
    return {
        "text": visible(clipped(str(first.get("text", "")), ANSWER_LIMIT)),
        "right": is_right(row.get("scores", {}).get(metric), lower_is_better=facts.lower_is_better),
        "end": first.get("finish_reason"),
        "n": first.get("tokens"),
    }


def _parts(probability: float | None) -> int | None:
    """A probability in parts of SCALE."""
    return None if probability is None else round(SCALE * probability)


def _choice(chosen: str, top: str | None, table: _Texts) -> int | None:
    """A role's first choice: -1 where it is the chosen token."""
    if top is None:
        return None
    return -1 if top == chosen else table.index(top)


def asked(row: Mapping[str, Any], facts: TaskFacts) -> str:
    """What an example asks, whichever column its task keeps it in."""
    names = (*_ASKED, facts.asked) if facts.file is None else (facts.asked,)
    return str(next((row[name] for name in names if row.get(name)), ""))


def expected(row: Mapping[str, Any]) -> str:
    """The reference answer of an example, "" where its task has none."""
    found = next((row[name] for name in _EXPECTED if row.get(name)), "")
    return "; ".join(map(str, found)) if isinstance(found, list) else str(found)

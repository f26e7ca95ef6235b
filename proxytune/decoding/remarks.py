"""What is said about responses beside their figures: which were not asked, were cut, or are empty."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from proxytune.records import FAULTS, Completion, JsonRow

MANY = 0.5
"""Share of empty responses above which something is likely to be wrong."""

REMARKED = {
    "template": "were not asked",
    "nan": "were broken off",
    "unseen": "were left out",
    "length": "were cut short",
}
"""Why a response is not what was asked for -> what is said of such responses."""


def stored_response(completion: Completion) -> JsonRow:
    """A response as it is stored."""
    row: JsonRow = {
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": len(completion.token_ids),
    }
    return row if completion.remark is None else {**row, "remark": completion.remark}


def notes_on(responses: Sequence[JsonRow]) -> list[str]:
    """What a reader should know of stored responses."""
    n, notes = len(responses), []
    for reason, what in REMARKED.items():
        remarks = [row["remark"] for row in responses if row["finish_reason"] == reason and row.get("remark")]
        if remarks:
            [(most, _)] = Counter(remarks).most_common(1)
            notes.append(f"{len(remarks)} of {n} responses {what}: {most}")
    sound = [row for row in responses if row["finish_reason"] not in FAULTS]
    empty = sum(not row["text"].strip() for row in sound)
    if empty > MANY * len(sound):
        notes.append(
            f"{empty} of {n} responses are empty: a model that was tuned on a chat template may end at once "
            "without it (`chat: tokenizer` in the system's YAML), and a stop string may come first"
        )
    return notes

"""From completions to stored rows: examples whose responses are all there, and what is kept of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from proxytune.records import Completion, Example
from proxytune.results import Row
from proxytune.sandbox import Sandbox
from proxytune.tasks import Task
from proxytune.tasks.execution import Execution


def prediction(
    task: Task, example: Example, completions: Sequence[Completion], sandbox: Sandbox | None = None
) -> Row:
    """The stored row of one example: the task's own columns, its scores, and every response as it was
    generated. Code is run where there is a sandbox for it."""
    row = task.row(example, completions)
    if sandbox is not None and task.execute is not None:
        (row,) = task.execute([row], Execution(sandbox, {example.id: example.target}))
    responses = [
        {"text": c.text, "finish_reason": c.finish_reason, "tokens": len(c.token_ids)} for c in completions
    ]
    return {"id": example.id, **row, "scores": task.score_row(row), "responses": responses}


def whole_examples(
    stream: Iterator[Completion], examples: Sequence[Example], counts: Mapping[str, int]
) -> Iterator[tuple[Example, list[Completion]]]:
    """Each example with its completions in order, as soon as the last of its `counts` is there."""
    by_id = {example.id: example for example in examples}
    waiting: dict[str, list[Completion]] = {}
    for completion in stream:
        group = waiting.setdefault(completion.example_id, [])
        group.append(completion)
        if len(group) == counts[completion.example_id]:
            del waiting[completion.example_id]
            yield by_id[completion.example_id], sorted(group, key=lambda c: c.sample)

"""JUDGES: the kinds of judge, by the name that a task gives. To add one: a file, its line here, a test."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

from proxytune import hub
from proxytune.judges.judge import Judge
from proxytune.judges.pairwise import pairwise_judge
from proxytune.judges.toxicity import toxicity_judge
from proxytune.judges.truth import truth_judges
from proxytune.options import JudgeOptions


@dataclass(frozen=True)
class JudgeKind:
    """One way to judge."""

    make: Callable[[str, JudgeOptions], Judge]
    """The judge that `--judge MODEL` names; UserError if the text names none of this kind."""
    paid: bool
    """Whether it is behind an API and costs money."""
    models: Callable[[str], tuple[str, ...]]
    """The models that run here, of what `--judge` names: to be downloaded and loaded into memory."""

    def missing(self, model: str) -> str | None:
        """What such a judge lacks here now: a package, a key, its files; None if nothing."""
        if self.paid:
            if importlib.util.find_spec("httpx2") is None:
                return "the judge needs: pip install 'proxytune[judges]'"
            named = os.environ.get("OPENAI_API_KEY") or os.environ.get("OPENAI_BASE_URL")
            return None if named else "the judge needs OPENAI_API_KEY"
        if all(hub.stored(name) for name in self.models(model)) or hub.reachable():
            return None
        return "the judge is not on disk and the hub does not answer"


JUDGES: dict[str, JudgeKind] = {
    "toxicity": JudgeKind(toxicity_judge, paid=False, models=lambda model: (model.partition("#")[0],)),
    "truth": JudgeKind(truth_judges, paid=False, models=lambda model: tuple(model.split(","))),
    "pairwise": JudgeKind(pairwise_judge, paid=True, models=lambda model: ()),
}

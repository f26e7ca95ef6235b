"""The consent to what a base behind an API costs."""

from __future__ import annotations

from proxytune.black_box import ApiClient, Forecast, forecast
from proxytune.errors import UserError
from proxytune.runs.decoders import consent
from proxytune.runs.judging import Dialogue
from proxytune.runs.session import RunPlan


def forecast_of(client: ApiClient, job: RunPlan, responses: int = 1) -> Forecast:
    """What a run as the base or the proxy would take; `responses`: alphas of a sweep."""
    alone = job.spec.role == "base"
    return forecast(
        client,
        job.data.examples,
        job.spec.sampling,
        one_position=job.task.continuations is not None,
        alone=alone,
        responses=1 if alone else responses * job.spec.sampling.n,
    )


def agree(client: ApiClient, dialogue: Dialogue, found: Forecast) -> None:
    """Go on only where what calls cost is agreed to and within the limit: once for all that a client asks."""
    most = client.options.max_cost
    if not found.calls:
        return
    dialogue.note(f"base {client.spec}: {found}")
    if most is not None and found.usd is not None and not found.at_most and found.spent + found.usd > most:
        before = f" and {found.spent:.4f} USD of earlier sessions are" if found.spent else " is"
        raise UserError(f"the estimate of {found.usd:.2f} USD{before} over --max-cost {most:g}")
    consent(client, dialogue.ask)

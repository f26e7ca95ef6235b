"""The playground as one HTML page, which loads nothing but answers of its own server.

It shares its design and the token view with the report. Text of models and prompts enters it as JSON and
through `textContent` only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from fastapi import APIRouter
from jinja2 import Environment, StrictUndefined
from starlette.responses import HTMLResponse, Response

from proxytune import __version__
from proxytune.config import Role, System
from proxytune.demo import TELLING
from proxytune.report import design, escape
from proxytune.tasks import get_task, read_source

SHOWN: tuple[Role, ...] = ("base", "proxy", "expert", "antiexpert", "tuned")
"""The order of the roles on the page: what the proxy is made from stands around it."""
ANYWHERE = "Name three things that make a good explanation, and say why."
"""A prompt to begin with where a system has no data of its own."""


@dataclass(frozen=True)
class ExamplePrompt:
    """A prompt that can be tried, and the answer that is expected."""

    prompt: str
    expected: str = ""


def playground(system: System, models: Mapping[str, Role]) -> APIRouter:
    """The routes of the page for the served models (name -> role)."""
    page, policy = playground_html(system, models)
    headers = {
        "content-security-policy": f"{policy}; frame-ancestors 'none'",
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def home() -> Response:
        """The playground."""
        return HTMLResponse(page, headers=headers)

    return router


def playground_html(system: System, models: Mapping[str, Role]) -> tuple[str, str]:
    """The page, and its Content-Security-Policy: our styles and scripts, and requests to its own server."""
    early, js = design.asset(design.THEME), design.asset(design.TOKENS) + _asset("playground.js")
    css = design.styles(_asset("playground.css"))
    scripts = f"{design.source_hash(early)} {design.source_hash(js)}"
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {design.source_hash(css)}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    by_role = {role: name for name, role in models.items()}
    data = {
        "models": [{"role": role, "model": by_role[role]} for role in SHOWN if role in by_role],
        "alpha": system.alpha.text,
        "examples": [asdict(example) for example in example_prompts(system)],
    }
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    page = environment.from_string(_asset("playground.html.j2")).render(
        system=escape.visible(system.name),
        description=escape.visible(system.description),
        version=__version__,
        policy=policy,
        css=css,
        early=early,
        js=js,
        data=escape.embedded(data),
    )
    return page, policy


def example_prompts(system: System) -> list[ExamplePrompt]:
    """Telling prompts of the demo world for a system that is of it, or one that fits any model."""
    found: list[ExamplePrompt] = []
    for name, places in TELLING.items():
        if system.data.get(name) == "generated":
            examples = read_source(get_task(name), "generated", max(places) + 1).examples
            chosen = [examples[place] for place in places]
            found += [ExamplePrompt(one.prompt.user, _expected(one.target)) for one in chosen]
    return found or [ExamplePrompt(ANYWHERE)]


def _expected(target: Mapping[str, object]) -> str:
    """The answer that a task expects, where it is a text."""
    found = target.get("answer") or target.get("Best Answer") or ""
    return found if isinstance(found, str) else ""


def _asset(name: str) -> str:
    return (Path(__file__).parent / "assets" / name).read_text(encoding="utf-8")

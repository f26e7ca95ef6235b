"""The routes: OpenAI's, those that vLLM added for tokenizers, and those for who runs the server."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, RedirectResponse
from openai.types import Completion
from openai.types.chat import ChatCompletion
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, JSONResponse, Response

from proxytune import __version__
from proxytune.server.answers.answering import respond
from proxytune.server.answers.calls import CallReader
from proxytune.server.answers.protocol import ChatBody, CompletionBody
from proxytune.server.answers.streams import ClientGone
from proxytune.server.faults import FaultResponse, Kind, RequestFault, broken
from proxytune.server.guards import ApiKey, Guard
from proxytune.server.pages import docs_page
from proxytune.server.tokens import tokens_router
from proxytune.server.work.service import Service

FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": FaultResponse, "description": what}
    for status, what in {
        400: "The request is wrong",
        401: "The API key is missing or wrong",
        403: "The server does not answer to this name",
        404: "There is no such model",
        408: "The body did not come in time",
        413: "The body is too large",
        429: "Too many responses wait: come again after Retry-After seconds",
        500: "This request failed",
        503: "The server shuts down",
    }.items()
}
CLOSED = 499
"""What is counted where the client went away."""


def build_app(
    service: Service,
    *,
    allow_negative_alpha: bool = False,
    key: str | None = None,
    home: APIRouter | None = None,
    open_paths: frozenset[str] = frozenset(),
) -> FastAPI:
    """The application of a service, which it starts and closes.

    `home` serves `/` and whatever its page loads; without it `/` leads to the docs. `open_paths` of it need
    no key."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.close()

    app = FastAPI(
        title="proxytune",
        version=__version__,
        description=f"System {service.system.name}: {', '.join(service.models)}",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=FAULTS,
    )
    app.include_router(_completions(service, allow_negative_alpha))
    app.include_router(tokens_router(service))
    app.include_router(_operations(service))
    app.include_router(home if home is not None else _no_home())
    _answer_faults(app)
    secret = None if key is None else ApiKey.of(key)
    app.add_middleware(
        Guard, options=service.options, meters=service.meters, key=secret, open_paths=open_paths
    )
    return app


def _completions(service: Service, allow_negative_alpha: bool) -> APIRouter:
    router = APIRouter(tags=["completions"])
    readers = {
        role: CallReader(batch, role, service.options, allow_negative_alpha, service.system.alpha)
        for role, batch in service.batches.items()
    }

    async def answer(body: CompletionBody | ChatBody, request: Request) -> Response:
        reader = readers[service.role_of(body.model)]
        try:
            return await respond(service, reader, body, request.receive)
        except ClientGone:
            return PlainTextResponse("", CLOSED)

    @router.post("/v1/completions", responses={200: {"model": Completion}})
    async def completions(body: Annotated[CompletionBody, Body()], request: Request) -> Response:
        """The text that follows a prompt. With `stream`, server-sent events."""
        return await answer(body, request)

    @router.post("/v1/chat/completions", responses={200: {"model": ChatCompletion}})
    async def chat_completions(body: Annotated[ChatBody, Body()], request: Request) -> Response:
        """The assistant's next message. With `stream`, server-sent events."""
        return await answer(body, request)

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        """The served models: the proxy by the system's name, and each role alone."""
        return {"object": "list", "data": [_model(service, name) for name in service.models]}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        """One of them."""
        service.role_of(model)
        return _model(service, model)

    return router


def _model(service: Service, name: str) -> dict[str, Any]:
    role = service.models[name]
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "proxytune",
        "role": role,
        "system": service.system.name,
        "max_model_len": service.batches[role].decoder.ensemble.window,
        "alpha": service.system.alpha.text if role == "proxy" else None,
    }


def _operations(service: Service) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/health")
    async def health() -> Response:
        """200 while it answers, 503 once it shuts down."""
        state = {"status": "ok" if service.alive else "shutting down"}
        return JSONResponse(state, 200 if service.alive else 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.meters.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @router.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs(request: Request) -> Response:
        """What can be asked, as a page that loads nothing from elsewhere."""
        return HTMLResponse(docs_page(request.app.openapi()))

    return router


def _no_home() -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def home() -> Response:
        """There is no page of its own: the docs say what can be asked."""
        return RedirectResponse("/docs")

    return router


def _answer_faults(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    def answered(fault: RequestFault) -> Response:
        return JSONResponse(fault.body, fault.status, dict(fault.headers))

    @app.exception_handler(RequestFault)
    async def _(request: Request, error: RequestFault) -> Response:
        return answered(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> Response:
        return answered(_wrong_body(error))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> Response:
        kind: Kind = "not_found_error" if error.status_code == 404 else "invalid_request_error"
        fault = RequestFault(
            error.status_code, f"{request.method} {request.url.path}: {error.detail}", kind=kind
        )
        return JSONResponse(fault.body, fault.status, dict(error.headers or {}))

    @app.exception_handler(Exception)
    async def _(request: Request, error: Exception) -> Response:
        return answered(broken(f"this request failed: {type(error).__name__}"))


def _wrong_body(error: RequestValidationError) -> RequestFault:
    """The first thing that is wrong with a body, in one line."""
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"] if part != "body"]
    where = ".".join(parts)
    if first["type"] == "json_invalid":
        return RequestFault(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if first["type"] == "extra_forbidden":
        return RequestFault(400, f"'{where}' is not supported: leave it out", param=where)
    message = str(first["msg"]).removeprefix("Value error, ")
    return RequestFault(400, f"{where}: {message}" if where else message, param=where or None)

"""The explorer over HTTP, on this machine alone: it parses what is asked and calls `Explorer`.

    GET  /  /app.css  /app.js ...             the page, from the package
    GET  /api/about  /api/features  /api/search  /api/feature  /api/other  /api/compare  /api/labels
    POST /api/text  /api/steer  /api/effect  /api/label    JSON objects of at most 64 KiB

Every answer of /api is JSON; {"error": "..."} with a status of 400 and above. What is asked for is numbers and words,
never a path: the files of the page are the only ones that are sent.
"""

import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from jaxinterp.core.errors import UserError
from jaxinterp.core.json_value import Json
from jaxinterp.explore import answers
from jaxinterp.explore.guard import MOST_BYTES, Field, Guard, parsed
from jaxinterp.explore.labels import MOST as MOST_LABEL
from jaxinterp.explore.page import PAGE, asset
from jaxinterp.explore.state import Explorer

HOST = "127.0.0.1"
MOST_TEXT = 8_000
"""Characters of a text or a prompt."""

Answer = Callable[[Explorer, Field], Json]


def _number(field: Field, explorer: Explorer) -> int:
    return field.whole("i", 0, explorer.index.features - 1)


def _features(explorer: Explorer, field: Field) -> Json:
    order = field.text("order", 20) or "density"
    first = field.whole("first", 0, explorer.index.features, 0)
    count = field.whole("count", 1, answers.MOST_ROWS, 100)
    return answers.rows(explorer.index, explorer.labels.all(), order=order, first=first, count=count)


def _search(explorer: Explorer, field: Field) -> Json:
    kind, query = field.text("kind", 20), field.text("q", 200)
    return answers.search(explorer.index, explorer.labels.all(), kind, query)


def _other(explorer: Explorer, field: Field) -> Json:
    if explorer.other is None:
        raise UserError("there is no other dictionary: start with --compare RUN.")
    other = explorer.other.theirs
    return answers.feature(other, field.whole("i", 0, other.features - 1), {})


def _compare(explorer: Explorer, field: Field) -> Json:
    first = field.whole("first", 0, explorer.index.features, 0)
    return explorer.compared(first, 50, field.text("order", 20) or "most alike")


def _steer(explorer: Explorer, field: Field) -> Json:
    return explorer.steered(
        field.text("prompt", MOST_TEXT),
        _number(field, explorer),
        field.number("strength", -100, 100),
        field.whole("new", 1, 128, 40),
        field.number("temperature", 0, 5, 0.0),
        field.whole("seed", 0, 2**31 - 1, 0),
    )


def _label(explorer: Explorer, field: Field) -> Json:
    number = _number(field, explorer)
    labels = explorer.labels.write(number, field.text("label", MOST_LABEL))
    return {"i": number, "label": labels.get(number, "")}


READ: dict[str, Answer] = {
    "about": lambda explorer, field: explorer.about(),
    "features": _features,
    "search": _search,
    "feature": lambda explorer, field: explorer.feature(_number(field, explorer)),
    "other": _other,
    "compare": _compare,
    "labels": lambda explorer, field: {str(j): text for j, text in explorer.labels.all().items()},
}
"""By GET: their words come from the query."""

ASKED: dict[str, Answer] = {
    "text": lambda explorer, field: explorer.fires_on(field.text("text", MOST_TEXT)),
    "steer": _steer,
    "effect": lambda explorer, field: explorer.effect(_number(field, explorer)),
    "label": _label,
}
"""By POST: what computes or writes."""


def application(explorer: Explorer, port: int) -> Guard:
    """The ASGI application of a server that listens on this port."""

    def page(path: str) -> Route:
        name, kind = PAGE[path]
        body = asset(name)

        async def send(request: Request) -> Response:
            return Response(body, media_type=kind)

        return Route(path, send, methods=["GET"])

    def api(name: str, answer: Answer, method: str) -> Route:
        async def send(request: Request) -> Response:
            given = _query(request) if method == "GET" else parsed(await _body(request))
            return JSONResponse(await run_in_threadpool(answer, explorer, given))

        return Route(f"/api/{name}", send, methods=[method])

    routes = [page(path) for path in PAGE]
    routes += [api(name, answer, "GET") for name, answer in READ.items()]
    routes += [api(name, answer, "POST") for name, answer in ASKED.items()]
    refused = {UserError: _refused, HTTPException: _not_there, Exception: _broken}
    app: Any = Starlette(routes=routes, exception_handlers=refused)  # type: ignore[arg-type]
    app.router.redirect_slashes = False
    return Guard(app, port)


def _query(request: Request) -> Field:
    """The words of a query; whole numbers as numbers, but for the text that is searched."""
    return Field(
        {
            name: int(value) if _is_whole(value) and name != "q" else value
            for name, value in request.query_params.items()
        }
    )


def _is_whole(value: str) -> bool:
    return value.isascii() and value.isdigit() and len(value) <= 12


async def _body(request: Request) -> bytes:
    """The body, up to its limit: one without a length is not read to its end either."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > MOST_BYTES:
            raise HTTPException(413, f"the request is larger than {MOST_BYTES:,} bytes.")
    return body


async def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _not_there(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    said = {404: "there is nothing at this address.", 405: "this address takes another method."}
    return JSONResponse({"error": said.get(status, str(getattr(error, "detail", error)))}, status)


async def _broken(request: Request, error: Exception) -> Response:
    """What we did not foresee: Starlette raises it again, so that the terminal shows it; it is not sent."""
    return JSONResponse({"error": "the explorer failed: its terminal says how."}, 500)


def listener(port: int) -> socket.socket:
    """A socket on the loopback address; port 0 takes a free one.

    Raises:
      UserError: the port is taken.
    """
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((HOST, port))
    except (OSError, OverflowError) as error:
        found.close()
        raise UserError(f"port={port} cannot be opened ({error}): choose another, such as --port 0.") from error
    found.listen(64)
    return found


def server_of(explorer: Explorer, sock: socket.socket) -> uvicorn.Server:
    """The server of a socket from `listener`; `run(sockets=[sock])` answers until it is asked to stop."""
    port = sock.getsockname()[1]
    config = uvicorn.Config(
        application(explorer, port), log_level="warning", access_log=False, server_header=False, ws="none",
        lifespan="off", h11_max_incomplete_event_size=32 * 1024, timeout_keep_alive=30, proxy_headers=False,
        http="h11",
    )  # fmt: skip
    return uvicorn.Server(config)

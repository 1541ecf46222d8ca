"""Who may ask the explorer's server: pages that it served itself, on this machine.

A page of another site can send requests to 127.0.0.1 from the reader's browser. What it can not do is choose the
headers `Host` (DNS rebinding: its own name resolves to 127.0.0.1), `Origin` and `Sec-Fetch-Site`. So every request must
name the loopback address and port it came to, and a request for data must come from our own page. There are no CORS
headers, cookies or redirects.
"""

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from jaxinterp.core.errors import UserError

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

MOST_BYTES = 64 * 1024
"""Of a request's body."""
MOST_PATH = 2048

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
"""Of every answer: nothing runs in the page but our own files, and no other page may hold it in a frame."""


def names_of(port: int) -> tuple[str, ...]:
    """The values of `Host` that are this server."""
    names = ("127.0.0.1", "localhost", "[::1]")
    return tuple(f"{name}:{port}" for name in names) + (names if port == 80 else ())


def refusal(method: str, path: str, headers: Iterable[tuple[bytes, bytes]], port: int) -> tuple[int, str] | None:
    """(status, reason) where a request must not be answered, else None.

    Args:
      path: as it was sent, with its query, before "%2e" is decoded.
      headers: (name in lower case, value).
    """
    given: dict[str, list[str]] = {}
    for name, value in headers:
        given.setdefault(name.decode("latin-1"), []).append(value.decode("latin-1"))
    hosts = given.get("host", [])
    if len(hosts) != 1 or hosts[0].lower() not in names_of(port):
        return 403, f"this server answers to {names_of(port)[0]} alone: open that address."
    if method not in ("GET", "HEAD", "POST"):
        return 405, f"method {method[:20]} is not taken: GET or POST."
    if len(path) > MOST_PATH:
        return 414, f"the address has {len(path)} characters: at most {MOST_PATH}."
    origins = {f"http://{name}" for name in names_of(port)}
    for origin in given.get("origin", []):
        if origin.lower() not in origins:
            return 403, "a page of another site asks: only the explorer's own may."
    if path.startswith("/api/") and any(
        site not in ("same-origin", "none") for site in given.get("sec-fetch-site", [])
    ):
        return 403, "a page of another site asks: only the explorer's own may."
    if method == "POST":
        kinds = [kind.partition(";")[0].strip().lower() for kind in given.get("content-type", [])]
        if kinds != ["application/json"]:
            return 415, "a POST takes application/json."
        lengths = given.get("content-length", [])
        if any(not length.isdigit() or int(length) > MOST_BYTES for length in lengths):
            return 413, f"the request is larger than {MOST_BYTES:,} bytes."
    return None


class Guard:
    """An ASGI application that asks `refusal` first, and puts `HEADERS` on every answer."""

    def __init__(self, app: App, port: int):
        self._app, self._port = app, port

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a WebSocket is not bound to its origin
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        path += "?" + scope["query_string"].decode("latin-1")
        refused = refusal(scope["method"], path, scope["headers"], self._port)
        if refused is None:
            await self._app(scope, receive, guarded)
            return
        status, reason = refused
        body = json.dumps({"error": reason}).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await guarded({"type": "http.response.start", "status": status, "headers": headers})
        await guarded({"type": "http.response.body", "body": body})


class Field:
    """Typed values of a JSON object: each check names the field and what it should be."""

    def __init__(self, values: object):
        if not isinstance(values, dict):
            raise UserError("the request must be a JSON object.")
        self._values = values

    def text(self, name: str, most: int) -> str:
        """A text of at most so many characters, "" where it is not there."""
        value = self._values.get(name, "")
        if not isinstance(value, str) or len(value) > most:
            raise UserError(f"{name} must be a text of at most {most} characters.")
        return value

    def number(self, name: str, low: float | int, high: float | int, default: float | int | None = None) -> float:
        """A finite number in a range."""
        value = self._values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise UserError(f"{name}={str(value)[:40]} must be a number from {low:g} to {high:g}.")
        return float(value)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number in a range."""
        value = self.number(name, low, high, default)
        if value != int(value):
            raise UserError(f"{name}={value:g} must be a whole number.")
        return int(value)


def parsed(body: bytes) -> Field:
    """The JSON object of a request.

    Raises:
      UserError: it is not one.
    """
    if len(body) > MOST_BYTES:
        raise UserError(f"the request is larger than {MOST_BYTES:,} bytes.")
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise UserError("the request is not JSON.") from error
    return Field(values)

"""What stands between the network and the pages: who may ask, from where, how much, and what browsers may do."""

import hmac
import ipaddress
import json
from typing import Any
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request, cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 1024  # bytes; an answer has some hundred
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}
A_YEAR = 365 * 24 * 3600  # seconds
LANDINGS = ("/", "/results")
"""Where a link with a token may lead."""


class Guard:
    """Lets through who shows the token, in a link once and in a cookie from then on.

    Without a token only a browser on the same machine is served, by a name of that machine: a page of some other site,
    whose name was made to point here, is turned away. What changes anything must come from a page of ours: it is JSON,
    which no form of another site can send.

    Args:
        token: None where none is asked for.
        cookie: the token cookie's name.
    """

    def __init__(self, app: ASGIApp, token: str | None, cookie: str):
        self._app, self._token, self._cookie = app, token, cookie

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._turned_away(scope) or self._app
        await answer(scope, receive, send_guarded)

    def _turned_away(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._token is None:
            if not is_local(_host_name(headers.get("host", ""))):
                return PlainTextResponse("This page is served to its own machine, as localhost.", 403)
        else:
            shown = parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
            if any(self._is_token(token) for token in shown):
                response = RedirectResponse(scope["path"] if scope["path"] in LANDINGS else "/", 303)
                response.set_cookie(self._cookie, self._token, max_age=A_YEAR, httponly=True, samesite="lax")
                return response
            if not self._is_token(cookie_parser(headers.get("cookie", "")).get(self._cookie, "")):
                return PlainTextResponse("Open the link that you were given: it has a token in it.", 403)
        if scope["method"] not in ("GET", "HEAD"):
            return _unlike_ours(headers)
        return None

    def _is_token(self, shown: str) -> bool:
        assert self._token is not None
        return hmac.compare_digest(shown.encode("utf-8", "replace"), self._token.encode())


def _unlike_ours(headers: Headers) -> Response | None:
    origin, length = headers.get("origin"), headers.get("content-length", "0")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return PlainTextResponse("The request comes from a page of another site.", 403)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return PlainTextResponse("The request must be application/json.", 415)
    if not length.isdecimal() or int(length[:20]) > MAX_BODY:
        return PlainTextResponse(f"A request has at most {MAX_BODY} bytes.", 413)
    return None


async def read_json(request: Request) -> dict[str, Any]:
    """The object in a request's body; HTTPException (400 or 413) if there's none or too much."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"A request has at most {MAX_BODY} bytes.")
    except ClientDisconnect:
        raise HTTPException(400, "The request ended before its body.") from None
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise HTTPException(400, "The request is not a JSON object.")
    return fields


def is_local(name: str) -> bool:
    """Whether a host name or address can mean no machine but the one it's used on."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """Without the port: `[::1]:8000` is `::1`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]

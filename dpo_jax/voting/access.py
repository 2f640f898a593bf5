"""Access control of the pages: tokens, hosts, origins, sizes of requests, and security headers."""

import hmac
import ipaddress
import json
from typing import Any
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request, cookie_parser
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_BODY = 16 * 1024  # bytes; an answer has a few hundred
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
"""Pages that a link with a token may open."""
SEES_RESULTS = "dpo_jax.sees_results"


class Access:
    """ASGI middleware that lets only authorised requests through.

    A request is authorised by a token in its link or, from then on, in a cookie. The raters' token opens the vote page;
    the results token opens every page. Without a raters' token, only requests that address this machine by one of its
    own local names are served; this stops pages of other sites whose domain resolves to this machine. Requests that
    change anything must come from our own pages and be JSON, which forms of other sites cannot send.

    Args:
        app: the application behind it.
        raters: the raters' token, or None to ask for none.
        results: the results token; requests that have it get `scope[SEES_RESULTS]`.
        cookie: suffix of the cookies' names.
    """

    def __init__(self, app: ASGIApp, raters: str | None, results: str, cookie: str):
        self._app, self._raters, self._results = app, raters, results
        self._cookies = {results: f"results-{cookie}"}
        if raters is not None:
            self._cookies[raters] = f"token-{cookie}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        answer = self._refusal(scope) or self._app
        await answer(scope, receive, send_guarded)

    def _refusal(self, scope: Scope) -> Response | None:
        headers = Headers(scope=scope)
        if self._raters is None and not is_local(_host_name(headers.get("host", ""))):
            return PlainTextResponse("This page can only be opened on its own machine, as localhost.", 403)
        cookies, query = cookie_parser(headers.get("cookie", "")), parse_qs(scope["query_string"].decode("latin-1"))
        held = []
        for token, cookie in self._cookies.items():
            if any([_equal(shown, token) for shown in query.get("token", [])]):
                return _move_to_cookie(token, cookie, scope["path"], query)
            if _equal(cookies.get(cookie, ""), token):
                held.append(token)
        scope[SEES_RESULTS] = self._results in held
        if self._raters is not None and not held:
            return PlainTextResponse("Open the whole link that you were given, including its token.", 403)
        if scope["method"] not in ("GET", "HEAD"):
            return _foreign_request_refusal(headers)
        return None


def _equal(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode("utf-8", "replace"), token.encode())


def _move_to_cookie(token: str, cookie: str, path: str, query: dict[str, list[str]]) -> Response:
    """Store the token in a cookie and redirect to the address without it, so that nobody reads it off the screen."""
    rest = urlencode([(name, value) for name, values in query.items() if name != "token" for value in values])
    response = RedirectResponse((path if path in LANDINGS else "/") + (f"?{rest}" if rest else ""), 303)
    response.set_cookie(cookie, token, max_age=A_YEAR, httponly=True, samesite="lax")
    return response


def _foreign_request_refusal(headers: Headers) -> Response | None:
    origin, length = headers.get("origin"), headers.get("content-length", "0")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        return PlainTextResponse("The request came from a page of another site.", 403)
    if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return PlainTextResponse("The request must be application/json.", 415)
    if not length.isdecimal() or int(length[:20]) > MAX_BODY:
        return PlainTextResponse(f"The request is larger than {MAX_BODY} bytes.", 413)
    return None


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in the body. Raises HTTPException (400 or 413) if there is none or it is too large."""
    body = b""
    try:
        async for chunk in request.stream():
            body += chunk
            if len(body) > MAX_BODY:
                raise HTTPException(413, f"The request is larger than {MAX_BODY} bytes.")
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
    """Return whether a host name or address always means the machine on which it is used."""
    try:
        return name.lower() == "localhost" or ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _host_name(host: str) -> str:
    """Return the host without its port: `[::1]:8000` becomes `::1`."""
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]

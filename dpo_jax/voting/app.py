"""The pages over HTTP: a start page that asks for a name, the page to vote on, and the results.

Everything they load is served from here. Images are asked for by ids that tell nothing, and are all sent as PNGs
without metadata: neither names, formats nor notes inside a file say which model made an image.

GET /              the start page, or the page to vote on
GET /results       the results
GET /image/ID      an image
GET /static/NAME   scripts and styles
GET /api/state     what to show (`Survey.state`)
POST /api/start    {"name": ...}: who votes, from now on
POST /api/leave    {}: forgets who it is
POST /api/vote     {"task": ..., "question": ..., "answer": [a number for each place]}: `Survey.state` once it's stored
POST /api/undo     {"task": ..., "question": ...}: `Survey.state` that asks again
"""

import functools
import io
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote, unquote

from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.templating import Jinja2Templates

from dpo_jax.data.images import read_image
from dpo_jax.voting.guard import A_YEAR, Guard, read_json
from dpo_jax.voting.survey import Survey, clean_name

PAGES = Path(__file__).parent / "pages"
STATIC_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CACHED_IMAGES = 64

T = TypeVar("T")


def make_app(survey: Survey, token: str | None = None) -> Starlette:
    """The ASGI application.

    Args:
        token: who can't show it sees nothing; None serves the own machine only.
    """
    pages = Pages(survey)
    routes = [
        Route("/", pages.home),
        Route("/results", pages.results),
        Route("/image/{id}", pages.image),
        Route("/static/{name}", pages.static),
        Route("/api/state", pages.state),
        Route("/api/start", pages.start, methods=["POST"]),
        Route("/api/leave", pages.leave, methods=["POST"]),
        Route("/api/vote", pages.vote, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
    ]
    guard = Middleware(Guard, token=token, cookie=f"token-{survey.store.digest[:8]}")
    app = Starlette(routes=routes, middleware=[guard], exception_handlers={sqlite3.Error: _not_stored})
    app.router.redirect_slashes = False
    return app


class Pages:
    """The routes of one survey."""

    def __init__(self, survey: Survey):
        self._survey, self._store = survey, survey.store
        self._images = survey.images()
        self._cookie = f"rater-{self._store.digest[:8]}"
        self._templates = Jinja2Templates(PAGES)
        files = [file for file in (PAGES / "static").iterdir() if file.suffix in STATIC_TYPES]
        self._static = {file.name: (file.read_bytes(), STATIC_TYPES[file.suffix]) for file in files}

    def home(self, request: Request) -> Response:
        page = "vote.html" if self._rater(request) else "start.html"
        return self._templates.TemplateResponse(request, page, {"survey": self._survey, "rater": self._rater(request)})

    def results(self, request: Request) -> Response:
        from dpo_jax.voting.results import summarise  # SciPy takes a second to import

        summary = summarise(self._store, self._survey.questions, self._survey.is_finished)
        return self._templates.TemplateResponse(request, "results.html", {"survey": self._survey, "summary": summary})

    def image(self, request: Request) -> Response:
        image = self._images.get(request.path_params["id"])
        if image is None:
            raise HTTPException(404, "There is no such image.")
        try:
            data = _png(self._store.folders[image.folder] / image.name)
        except ValueError:
            raise HTTPException(404, "The image can't be read any more.") from None
        headers = {"Cache-Control": f"private, max-age={A_YEAR}, immutable"}
        return Response(data, media_type="image/png", headers=headers)

    def static(self, request: Request) -> Response:
        if request.path_params["name"] not in self._static:
            raise HTTPException(404, "There is no such file.")
        data, media_type = self._static[request.path_params["name"]]
        return Response(data, media_type=media_type, headers={"Cache-Control": "no-cache"})

    def state(self, request: Request) -> Response:
        return JSONResponse(self._survey.state(self._known_rater(request)))

    async def start(self, request: Request) -> Response:
        name = clean_name((await read_json(request)).get("name"))
        if not name:
            raise HTTPException(400, "A name has one to 64 visible characters.")
        response = JSONResponse({"name": name})
        response.set_cookie(self._cookie, quote(name), max_age=A_YEAR, httponly=True, samesite="lax")
        return response

    async def leave(self, request: Request) -> Response:
        response = JSONResponse({})
        response.delete_cookie(self._cookie)
        return response

    async def vote(self, request: Request) -> Response:
        rater, fields = self._known_rater(request), await read_json(request)
        task, question, answer = _text(fields, "task"), _text(fields, "question"), _numbers(fields, "answer")
        if not await _asked(self._survey.vote, rater, task, question, answer):
            raise HTTPException(409, "Not stored: this was answered before, in another window.")
        return JSONResponse(await run_in_threadpool(self._survey.state, rater))

    async def undo(self, request: Request) -> Response:
        rater, fields = self._known_rater(request), await read_json(request)
        task, question = _text(fields, "task"), _text(fields, "question")
        return JSONResponse(await _asked(self._survey.undo, rater, task, question))

    def _rater(self, request: Request) -> str:
        return clean_name(unquote(request.cookies.get(self._cookie, "")))

    def _known_rater(self, request: Request) -> str:
        rater = self._rater(request)
        if not rater:
            raise HTTPException(401, "Who are you? Reload the page and give your name.")
        return rater


async def _asked(ask: Callable[..., T], *arguments: object) -> T:
    """What the survey answers, from a thread; what it refuses is the browser's fault."""
    try:
        return await run_in_threadpool(ask, *arguments)
    except ValueError as error:
        raise HTTPException(400, f"Not stored: {error}.") from None


async def _not_stored(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"Not stored: {error}.", 503)


def _text(fields: dict[str, Any], name: str) -> str:
    if not isinstance(fields.get(name), str):
        raise HTTPException(400, f'"{name}" is not text.')
    return fields[name]


def _numbers(fields: dict[str, Any], name: str) -> list[float]:
    values = fields.get(name)
    if not isinstance(values, list) or not all(type(value) in (int, float) for value in values):
        raise HTTPException(400, f'"{name}" is not a list of numbers.')
    return [value if value % 1 else int(value) for value in values]  # 1.0 is 1; NaN and infinity stay as they are


@functools.lru_cache(maxsize=CACHED_IMAGES)
def _png(path: Path) -> bytes:
    file = io.BytesIO()
    Image.fromarray(read_image(path)).save(file, "PNG", compress_level=1)
    return file.getvalue()

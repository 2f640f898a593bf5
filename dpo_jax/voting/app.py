"""The pages over HTTP: a start page that asks for a name, the page to vote on, and the results.

Everything they load is served from here. Nothing that a rater is sent tells which model made an image: ids are random
and others for each rater and task, images are PNGs without metadata, and all images of a task are read before the first
is sent, so that the time an answer takes doesn't depend on how an image was stored. Results have a link of their own.

GET /              the start page, or the page to vote on
GET /?rater=CARD   a rater's own link: the page to vote on, as this rater
GET /results       the results, to who has their token
GET /image/ID      an image of a task, to the rater whom it is shown
GET /static/NAME   scripts and styles
GET /api/state     what to show (`Survey.state`)
POST /api/start    {"name": ..., "key": any secret}: who votes, from now on; refused if the name is taken
POST /api/leave    {}: forgets who it is
POST /api/vote     {"task": ..., "question": ..., "answer": [a number for each place]}: `Survey.state` once it's stored
POST /api/undo     {"task": ..., "question": ...}: `Survey.state` that asks again
"""

import asyncio
import collections
import functools
import hashlib
import io
import sqlite3
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Generic, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.templating import Jinja2Templates

from dpo_jax.data.images import MAX_BYTES, decode_file
from dpo_jax.errors import UserError
from dpo_jax.files import read_bytes
from dpo_jax.voting.access import A_YEAR, SEES_RESULTS, Access, read_json
from dpo_jax.voting.raters import LONGEST_NAME, Raters, clean_name, rater_link
from dpo_jax.voting.store import Store
from dpo_jax.voting.survey import Survey

PAGES = Path(__file__).parent / "pages"
STATIC_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CACHED_IMAGES = 64
TAKEN = (
    "This name is taken. If it is yours, open your own link, or ask whoever runs this page for it; otherwise choose "
    "another name."
)

T = TypeVar("T")


def make_app(survey: Survey, token: str | None = None, *, is_open: bool = True) -> Starlette:
    """The ASGI application.

    Args:
        token: who can't show it sees nothing; None serves the own machine only.
        is_open: whether anybody with the link may vote, or only raters who were invited.
    """
    pages = Pages(survey, Raters(survey.store, is_open), token)
    routes = [
        Route("/", pages.home),
        Route("/results", pages.results),
        Route("/image/{id:path}", pages.image),
        Route("/static/{name}", pages.static),
        Route("/api/state", pages.state),
        Route("/api/start", pages.start, methods=["POST"]),
        Route("/api/leave", pages.leave, methods=["POST"]),
        Route("/api/vote", pages.vote, methods=["POST"]),
        Route("/api/undo", pages.undo, methods=["POST"]),
    ]
    guard = Middleware(Access, raters=token, results=results_token(survey.store), cookie=_cookie(survey.store))
    app = Starlette(routes=routes, middleware=[guard], exception_handlers={sqlite3.Error: _not_stored})
    app.router.redirect_slashes = False
    return app


def results_token(store: Store) -> str:
    """What the link to the results must have: the same each time that the file is opened."""
    return store.opaque("token", "results")


def _cookie(store: Store) -> str:
    return store.opaque("cookie")[:8]


class Pages:
    """The routes of one survey."""

    def __init__(self, survey: Survey, raters: Raters, token: str | None):
        self._survey, self._store, self._raters, self._token = survey, survey.store, raters, token
        self._cookie = f"rater-{_cookie(self._store)}"
        self._templates = Jinja2Templates(PAGES)
        files = [file for file in (PAGES / "static").iterdir() if file.suffix in STATIC_TYPES]
        self._static = {file.name: (file.read_bytes(), STATIC_TYPES[file.suffix]) for file in files}
        self._images = TaskImages(self._store)
        self._results = Shared(self._write_results, lambda: self._store.revision)

    def home(self, request: Request) -> Response:
        if "rater" in request.query_params:
            rater = self._raters.holder(request.query_params["rater"])
            if not rater:
                raise HTTPException(403, "This is not a rater's link. Open the whole link that you were given.")
            return self._as(rater, RedirectResponse("/", 303))
        rater = self._rater(request)
        fields = {"survey": self._survey, "rater": rater, "is_open": self._raters.is_open}
        if rater:
            fields["link"] = rater_link(self._token, self._raters.card(rater))
        return self._templates.TemplateResponse(request, "vote.html" if rater else "start.html", fields)

    async def results(self, request: Request) -> Response:
        if not request.scope[SEES_RESULTS]:
            raise HTTPException(403, "The results have a link of their own, which whoever started this page was given.")
        return HTMLResponse(await asyncio.wrap_future(self._results.get()))

    def _write_results(self) -> str:
        from dpo_jax.voting.results import summarise  # SciPy takes a second to import

        summary = summarise(self._store, self._survey.questions, self._survey.is_finished)
        return self._templates.get_template("results.html").render(survey=self._survey, summary=summary)

    def image(self, request: Request) -> Response:
        found = self._survey.find_image(self._known_rater(request), request.path_params["id"])
        if found is None:
            raise HTTPException(404, "There is no such image.")
        try:
            data = self._images.of(found[0])[found[1]]
        except (ValueError, OSError):
            raise HTTPException(404, "An image here was changed, or can't be read any more.") from None
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
        fields = await read_json(request)
        name, key = clean_name(fields.get("name")), fields.get("key", "")
        if not self._raters.is_open:
            raise HTTPException(403, "Only people who were invited vote here. Open the link that you were given.")
        if not name:
            raise HTTPException(400, f"A name has one to {LONGEST_NAME} visible characters.")
        if not isinstance(key, str):
            raise HTTPException(400, '"key" is not text.')
        if await run_in_threadpool(self._raters.join, name, key) is None:
            raise HTTPException(409, TAKEN)
        return self._as(name, JSONResponse({"name": name}))

    def _as(self, rater: str, response: Response) -> Response:
        card = self._raters.card(rater)
        response.set_cookie(self._cookie, card, max_age=A_YEAR, httponly=True, samesite="lax")
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
        return self._raters.holder(request.cookies.get(self._cookie, ""))

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


class TaskImages:
    """The images of tasks as PNGs, of the tasks asked for last."""

    def __init__(self, store: Store):
        self._store = store
        images = len(next(iter(store.tasks.values())).images)
        self._read = functools.lru_cache(max(1, CACHED_IMAGES // images))(self._pngs)
        self._locks: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    def of(self, task: str) -> tuple[bytes, ...]:
        """All of them, or ValueError: nobody is to learn which of them was slow to read, or can't be read."""
        with self._locks[task]:  # both sides of a pair are asked for at once; the second waits for the first
            return self._read(task)

    def _pngs(self, task: str) -> tuple[bytes, ...]:
        """All as long as the longest: decoders read no further than a PNG's end."""
        pngs = [
            _png(self._store.folders[image.folder] / image.name, self._store.digests.get(image))
            for image in self._store.tasks[task].images
        ]
        return tuple(png.ljust(max(map(len, pngs)), b"\0") for png in pngs)


def _png(path: Path, digest: str | None) -> bytes:
    data = read_bytes(path, MAX_BYTES)
    if digest not in (None, hashlib.sha256(data).hexdigest()):
        raise UserError(f"{path} was changed since the study began")
    file = io.BytesIO()
    decode_file(path, data).save(file, "PNG", compress_level=1, icc_profile=None)  # which Pillow would copy
    return file.getvalue()


class Shared(Generic[T]):
    """Work that takes long, done once at a time in a thread of its own: who asks meanwhile gets the same.

    Args:
        version: work is done again once this has changed.
    """

    def __init__(self, work: Callable[[], T], version: Callable[[], object]):
        self._work, self._version, self._lock = work, version, threading.Lock()
        self._thread = ThreadPoolExecutor(1)
        self._latest: Future[T] | None = None
        self._done: object = None

    def get(self) -> "Future[T]":
        version = self._version()
        with self._lock:
            is_over = self._latest is None or self._latest.done()
            if is_over and (self._latest is None or self._done != version or self._latest.exception()):
                self._latest, self._done = self._thread.submit(self._work), version
            assert self._latest is not None
            return self._latest

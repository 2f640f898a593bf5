"""The HTTP application: a start page that asks for a name, the vote page, and the results.

The pages load nothing from other servers. Nothing that a rater receives tells which model made an image: image ids are
random and differ for every rater and task, images are PNGs without metadata, and all images of a task are read before
the first one is sent, so that the response time does not depend on how an image was stored. The results have their own
token.

GET /              the start page, or the vote page for a rater
GET /?rater=SECRET a rater's own link: the vote page, as this rater
GET /results       the results (with the results token, as the two downloads)
GET /results.json  the results as JSON
GET /votes.csv     every vote
GET /image/ID      an image of a task, for the rater to whom it is shown
GET /static/NAME   scripts and styles
GET /api/state     what to show (`Survey.state`)
POST /api/start    {"name": ..., "key": any secret}: vote under this name; refused if it is taken
POST /api/leave    {}: forget the rater
POST /api/vote     {"task": ..., "question": ..., "answer": [a number per place]}: `Survey.state` after it is stored
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
from dpo_jax.voting.raters import MAX_NAME_LENGTH, Raters, clean_name, rater_link
from dpo_jax.voting.store import Store
from dpo_jax.voting.survey import Survey

PAGES = Path(__file__).parent / "pages"
STATIC_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
CACHED_IMAGES = 64
TAKEN = (
    "This name is taken. If it is yours, open your own link, or ask the person who runs this page for it. Otherwise "
    "choose another name."
)

T = TypeVar("T")


def make_app(survey: Survey, token: str | None = None, *, is_open: bool = True) -> Starlette:
    """Return the ASGI application.

    Args:
        survey: the study to serve.
        token: the raters' token, without which a request gets nothing; None serves this machine only.
        is_open: whether everybody with the link may vote, or only invited raters.
    """
    pages = Pages(survey, Raters(survey.store, is_open), token)
    routes = [
        Route("/", pages.home),
        Route("/results", pages.results),
        Route("/results.json", pages.results_json),
        Route("/votes.csv", pages.votes_csv),
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
    """Return the token of the results link, which is always the same for a file of votes."""
    return store.opaque("token", "results")


def _cookie(store: Store) -> str:
    return store.opaque("cookie")[:8]


class Pages:
    """The handlers of all routes."""

    def __init__(self, survey: Survey, raters: Raters, token: str | None):
        self._survey, self._store, self._raters, self._token = survey, survey.store, raters, token
        self._cookie = f"rater-{_cookie(self._store)}"
        self._templates = Jinja2Templates(PAGES)
        files = [file for file in (PAGES / "static").iterdir() if file.suffix in STATIC_TYPES]
        self._static = {file.name: (file.read_bytes(), STATIC_TYPES[file.suffix]) for file in files}
        self._images = TaskImages(self._store)
        self._results = Shared(self._render_results, lambda: self._store.revision)
        self._csv = Shared(self._write_csv, lambda: self._store.revision)

    def home(self, request: Request) -> Response:
        if "rater" in request.query_params:
            rater = self._raters.holder(request.query_params["rater"])
            if not rater:
                raise HTTPException(403, "This link is not complete. Open the whole link that you were given.")
            return self._as(rater, RedirectResponse("/", 303))
        rater = self._rater(request)
        fields = {
            "survey": self._survey,
            "rater": rater,
            "is_open": self._raters.is_open,
            "sees_results": request.scope[SEES_RESULTS],
        }
        if rater:
            fields["link"] = rater_link(self._token, self._raters.credential(rater))
        return self._templates.TemplateResponse(request, "vote.html" if rater else "start.html", fields)

    async def results(self, request: Request) -> Response:
        return HTMLResponse((await self._for_owner(request, self._results))[0])

    async def results_json(self, request: Request) -> Response:
        return _download((await self._for_owner(request, self._results))[1], "results.json", "application/json")

    async def votes_csv(self, request: Request) -> Response:
        return _download(await self._for_owner(request, self._csv), "votes.csv", "text/csv")

    async def _for_owner(self, request: Request, shared: "Shared[T]") -> T:
        if not request.scope[SEES_RESULTS]:
            raise HTTPException(403, "The results have their own link, which dpo_jax.vote printed when it started.")
        return await asyncio.wrap_future(shared.get())

    def _render_results(self) -> tuple[str, str]:
        """Return the results as HTML and as JSON."""
        from dpo_jax.voting.results import summarise

        summary = summarise(self._store, self._survey.questions, self._survey.is_finished)
        page = self._templates.get_template("results.html").render(survey=self._survey, summary=summary)
        return page, summary.to_json()

    def _write_csv(self) -> str:
        from dpo_jax.voting.export import votes_csv

        return votes_csv(self._store, self._store.votes())

    def image(self, request: Request) -> Response:
        found = self._survey.find_image(self._known_rater(request), request.path_params["id"])
        if found is None:
            raise HTTPException(404, "This image does not exist.")
        try:
            data = self._images.of(found[0])[found[1]]
        except (UserError, OSError):
            raise HTTPException(404, "An image of this task was changed or cannot be read any more.") from None
        headers = {"Cache-Control": f"private, max-age={A_YEAR}, immutable"}
        return Response(data, media_type="image/png", headers=headers)

    def static(self, request: Request) -> Response:
        if request.path_params["name"] not in self._static:
            raise HTTPException(404, "This file does not exist.")
        data, media_type = self._static[request.path_params["name"]]
        return Response(data, media_type=media_type, headers={"Cache-Control": "no-cache"})

    def state(self, request: Request) -> Response:
        return JSONResponse(self._survey.state(self._known_rater(request)))

    async def start(self, request: Request) -> Response:
        fields = await read_json(request)
        name, key = clean_name(fields.get("name")), fields.get("key", "")
        if not self._raters.is_open:
            raise HTTPException(403, "Only invited people can vote here. Open the link that you were given.")
        if not name:
            raise HTTPException(400, f"A name has 1 to {MAX_NAME_LENGTH} visible characters.")
        if not isinstance(key, str):
            raise HTTPException(400, '"key" is not text.')
        if await run_in_threadpool(self._raters.join, name, key) is None:
            raise HTTPException(409, TAKEN)
        return self._as(name, JSONResponse({"name": name}))

    def _as(self, rater: str, response: Response) -> Response:
        credential = self._raters.credential(rater)
        response.set_cookie(self._cookie, credential, max_age=A_YEAR, httponly=True, samesite="lax")
        return response

    async def leave(self, request: Request) -> Response:
        response = JSONResponse({})
        response.delete_cookie(self._cookie)
        return response

    async def vote(self, request: Request) -> Response:
        rater, fields = self._known_rater(request), await read_json(request)
        task, question, answer = _text(fields, "task"), _text(fields, "question"), _numbers(fields, "answer")
        if not await _call(self._survey.vote, rater, task, question, answer):
            raise HTTPException(409, "Not stored: you have already answered this question in another window.")
        return JSONResponse(await run_in_threadpool(self._survey.state, rater))

    async def undo(self, request: Request) -> Response:
        rater, fields = self._known_rater(request), await read_json(request)
        task, question = _text(fields, "task"), _text(fields, "question")
        return JSONResponse(await _call(self._survey.undo, rater, task, question))

    def _rater(self, request: Request) -> str:
        return self._raters.holder(request.cookies.get(self._cookie, ""))

    def _known_rater(self, request: Request) -> str:
        rater = self._rater(request)
        if not rater:
            raise HTTPException(401, "Your name is not known here. Reload the page and enter it.")
        return rater


async def _call(method: Callable[..., T], *arguments: object) -> T:
    """Call the survey in a thread. What it refuses is a bad request."""
    try:
        return await run_in_threadpool(method, *arguments)
    except UserError as error:
        raise HTTPException(400, f"Not stored: {error}.") from None


async def _not_stored(request: Request, error: Exception) -> Response:
    return PlainTextResponse(f"Not stored: {error}.", 503)


def _download(text: str, name: str, media_type: str) -> Response:
    return Response(text, media_type=media_type, headers={"Content-Disposition": f'attachment; filename="{name}"'})


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
    """The images of tasks as PNGs. Those of the latest tasks stay in memory."""

    def __init__(self, store: Store):
        self._store = store
        images = len(next(iter(store.tasks.values())).images)
        self._read = functools.lru_cache(max(1, CACHED_IMAGES // images))(self._pngs)
        self._locks: collections.defaultdict[str, threading.Lock] = collections.defaultdict(threading.Lock)

    def of(self, task: str) -> tuple[bytes, ...]:
        """Return all images of a task. If one cannot be read, none is returned: nobody learns which one it was."""
        with self._locks[task]:  # browsers request both images at once; the second request waits for the first
            return self._read(task)

    def _pngs(self, task: str) -> tuple[bytes, ...]:
        """Pad all files to the same length, so that it tells nothing: decoders stop at the end of the PNG data."""
        pngs = [
            _png(self._store.folders[image.folder] / image.name, self._store.digests.get(image))
            for image in self._store.tasks[task].images
        ]
        return tuple(png.ljust(max(map(len, pngs)), b"\0") for png in pngs)


def _png(path: Path, digest: str | None) -> bytes:
    data = read_bytes(path, MAX_BYTES)
    if digest not in (None, hashlib.sha256(data).hexdigest()):
        raise UserError(f"{path} has changed since the study was opened")
    file = io.BytesIO()
    decode_file(path, data).save(file, "PNG", compress_level=1, icc_profile=None)  # Pillow would copy the profile
    return file.getvalue()


class Shared(Generic[T]):
    """The result of slow work, which all requests share. It runs in its own thread, once at a time.

    Args:
        work: computes the result.
        version: the work is repeated when this value has changed.
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

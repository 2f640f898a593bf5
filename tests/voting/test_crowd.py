"""Slow, incomplete and too many requests to the real server do not keep raters from voting."""

import contextlib
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator

import httpx2
import pytest

from dpo_jax.voting import results, schema, server
from dpo_jax.voting.app import make_app, results_token
from dpo_jax.voting.server import TimeoutProtocol, make_server

HALVES = {
    "nothing": b"",
    "half a line": b"GET /api/st",
    "half a header": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: ",
    "half a body": b"POST /api/start HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    b"Content-Length: 100\r\n\r\n{",
    "a second half": b"GET /static/icon.svg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET / HTT",
    "a second half of a body": b"GET /static/icon.svg HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nPOST /api/start HTTP/1.1\r\n"
    b"Host: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{",
}


@pytest.fixture
def serving() -> Iterator[Callable]:
    """`serving(survey)`: the port of a server in a thread."""
    running = []

    def serve(survey) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        made = make_server(make_app(survey))
        thread = threading.Thread(target=made.run, kwargs={"sockets": [listener]})
        thread.start()
        running.append((made, thread, listener))
        return listener.getsockname()[1]

    yield serve
    for made, thread, listener in running:
        made.should_exit = made.force_exit = True
        thread.join(30)
        listener.close()


@contextlib.contextmanager
def _rater(port: int, name: str) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as browser:
        browser.post("/api/start", json={"name": name}).raise_for_status()
        yield browser


def _vote(browser: httpx2.Client) -> float:
    """Vote, and return the seconds until the vote was stored."""
    now = browser.get("/api/state").raise_for_status().json()["now"]
    start = time.monotonic()
    body = {"task": now["task"], "question": now["question"], "answer": [1, 0]}
    browser.post("/api/vote", json=body).raise_for_status()
    return time.monotonic() - start


def _ends(connection: socket.socket, drip: bytes, seconds: float) -> bool:
    """Whether the server closes the connection although data keeps arriving."""
    deadline = time.monotonic() + seconds
    connection.settimeout(0.1)
    while time.monotonic() < deadline:
        try:
            if drip:
                connection.sendall(drip)
            if not connection.recv(4096):
                return True
            time.sleep(0.1)
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("drip", [b"", b"a"], ids=["silent", "dripping"])
def test_half_a_request_is_not_waited_for(survey, serving, monkeypatch, half, drip):
    monkeypatch.setattr(server, "REQUEST_SECONDS", 0.5)
    port = serving(survey())
    with socket.create_connection(("127.0.0.1", port)) as connection, _rater(port, "ann") as browser:
        connection.sendall(HALVES[half])
        _vote(browser)
        assert _ends(connection, drip if half != "nothing" else b"", seconds=10)
        _vote(browser)


def test_who_does_not_read_the_answer_is_let_go(survey, serving, monkeypatch):
    monkeypatch.setattr(server, "RESPONSE_SECONDS", 0.5)
    port = serving(survey())
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /static/vote.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 2000)  # and reads nothing
        time.sleep(1)
        with contextlib.suppress(ConnectionError):
            while connection.recv(2**20):
                pass
    with _rater(port, "ann") as browser:
        _vote(browser)


def test_a_crowd_of_halves_shuts_nobody_out(survey, serving, monkeypatch):
    port = serving(survey(prompts=20))
    monkeypatch.setattr(TimeoutProtocol, "max_connections", 10)
    with contextlib.ExitStack() as stack:
        for count in range(60):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.sendall(HALVES["half a header"])
            if count % 10 == 0:
                with _rater(port, f"rater {count}") as browser:
                    assert _vote(browser) < 5
        assert len(TimeoutProtocol._connections) <= 11


def _fill(made, votes: int) -> None:
    """Add votes as if they had been given."""
    rows = []
    for number in range(votes):
        task = list(made.store.tasks)[number % len(made.store.tasks)]
        row = f"early {number // len(made.store.tasks)}", task, "preference", "[1, 0]", "[0, 1]", schema.now()
        rows.append(schema.with_checksum(made.store._secret, "votes", row))
    with made.store._changing() as run:
        made.store._connection.executemany("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
        run("COMMIT")
    made.store._read()


@pytest.mark.parametrize("votes", [1_000, pytest.param(20_000, marks=pytest.mark.slow)])
def test_reloading_results_keeps_nobody_from_voting(survey, serving, votes):
    made = survey(prompts=100, raters=10**6)
    _fill(made, votes)
    port, is_over, reloads = serving(made), threading.Event(), []
    url = f"http://127.0.0.1:{port}/results?token={results_token(made.store)}"

    def reload() -> None:
        with httpx2.Client(follow_redirects=True, timeout=120) as browser:
            while not is_over.is_set():
                reloads.append(browser.get(url).raise_for_status().text)

    threads = [threading.Thread(target=reload) for _ in range(60)]  # more than the server has threads
    with _rater(port, "ann") as browser:
        _vote(browser)
        try:
            for thread in threads:
                thread.start()
            while not reloads:
                time.sleep(0.01)
            seconds = [_vote(browser) for _ in range(10)]
        finally:
            is_over.set()
            for thread in threads:
                thread.join()
    assert statistics.median(seconds) < 1
    assert max(seconds) < 5
    assert (
        f"{votes + 11} votes by {votes // 100 + 1} raters on 100 of 100" in httpx2.get(url, follow_redirects=True).text
    )


def test_results_are_made_once_for_all_who_ask(survey, serving, monkeypatch):
    made, calls, lock = survey(), [], threading.Lock()

    def slowly(*arguments):
        with lock:
            calls.append(threading.current_thread().name)
        time.sleep(0.3)
        return original(*arguments)

    original = results.summarise
    monkeypatch.setattr(results, "summarise", slowly)
    port = serving(made)
    url = f"http://127.0.0.1:{port}/results?token={results_token(made.store)}"
    threads = [threading.Thread(target=httpx2.get, args=(url,), kwargs={"follow_redirects": True}) for _ in range(50)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    with _rater(port, "ann") as browser:
        _vote(browser)
    assert "1 vote by 1 rater on 1 of 3" in httpx2.get(url, follow_redirects=True).text
    assert len(calls) == 2

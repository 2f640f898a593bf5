"""Hostile requests to the real server are all refused, and the server keeps running."""

import contextlib
import json
import random
import socket

import httpx2

PATHS = [
    "/image/{}",
    "/static/{}",
    "/{}",
    "/api/{}",
    "/results/{}",
    "/image/0123456789abcdef01234567{}",
    "/image/0123456789abcdef01234567/{}",
    "/?rater={}",
]
CLIMBS = [
    "../../../etc/passwd",
    "..%2f..%2f..%2fetc%2fpasswd",
    "%2e%2e/%2e%2e/etc/passwd",
    "%252e%252e%252fetc%252fpasswd",
    "..%5c..%5cwindows%5cwin.ini",
    "..\\..\\etc\\passwd",
    "....//....//etc/passwd",
    "..;/..;/etc/passwd",
    "%c0%ae%c0%ae%c0%afetc%c0%afpasswd",
    "%ff%fe%fd",
    "%00",
    "vote.js%00.png",
    "/etc/passwd",
    "file:///etc/passwd",
    "~root",
    ".",
    "..",
    "%2e",
    "vote.js/..",
    "../app.py",
    "votes.sqlite",
    "base/0-0.png",
    "'%20OR%20'1'%3d'1",
    "%3cscript%3ealert(1)%3c/script%3e",
    "%f0%9f%98%80" * 50,
    "a" * 3000,
]
POSTS = ["/api/start", "/api/vote", "/api/undo"]
BODIES = [
    b"",
    b"null",
    b"[]",
    b"1",
    b'"text"',
    b"{",
    b'{"name": ',
    b"\xff\xfe\x00",
    b'{"name": "\xff"}',
    b"[" * 10_000,
    b'{"a":' * 3_000,
    b"{}",
    b'{"name": null, "task": null, "question": null, "answer": null}',
    b'{"name": 3, "task": 3, "question": 3, "answer": 3}',
    b'{"name": "", "task": "", "question": "", "answer": []}',
    b'{"name": "\\ud800", "task": "\\ud800", "question": "\\ud800", "answer": [1, 0]}',
    b'{"name": "a\\u0000b", "task": "\\u0000", "question": "\\u0000", "answer": [1, 0]}',
    b'{"name": {"a": 1}, "task": {"a": 1}, "question": ["a"], "answer": {"a": 1}}',
    b'{"name": "' + b"a" * 65 + b'", "task": "' + b"a" * 5000 + b'", "question": "preference", "answer": [1, 0]}',
    b'{"name": "\\u202e\\u200b", "task": "../..", "question": "\'; DROP TABLE votes; --", "answer": [1, 0]}',
    b'{"n": ' + b"9" * 6_000 + b"}",
    b"--x\r\nContent-Disposition: form-data\r\n\r\nx\r\n--x--",
]
ANSWERS = [
    "[NaN, 0]",
    "[Infinity, 0]",
    "[1e999, 0]",
    "[1]",
    "[1, 0, 0]",
    "[true, false]",
    '["1", "0"]',
    "[[1], [0]]",
    "[null, null]",
    "[1, 1]",
    "[0.5, 0.5]",
    "[-1, 2]",
    f"[{'9' * 4000}, 0]",
    f"[{', '.join('1' * 3000)}]",
    '"10"',
    "{}",
]
METHODS = ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "PROPFIND", "BREW", "get", "POST", "CONNECT"]
TOKENS = ["", "x", "right-toke", "right-token-", "RIGHT-TOKEN", "%ff", "%00", "right-token%00", "é", "a" * 5000]
JSON = "Content-Type: application/json\r\n"


def _request(line: str, headers: str = "", body: bytes = b"", length: int | str | None = None) -> bytes:
    size = f"Content-Length: {len(body) if length is None else length}\r\n" if body or length is not None else ""
    return f"{line} HTTP/1.1\r\nHost: 127.0.0.1\r\n{headers}{size}Connection: close\r\n\r\n".encode() + body


def _requests(cookie: str, task: str) -> list[bytes]:
    climbs = [_request(f"GET {path.format(climb)}", cookie) for path in PATHS for climb in CLIMBS]
    posts = [_request(f"POST {path}", cookie + JSON, body) for path in POSTS for body in BODIES]
    answers = [
        _request(
            "POST /api/vote", cookie + JSON, f'{{"task": "{task}", "question": "preference", "answer": {a}}}'.encode()
        )
        for a in ANSWERS
    ]
    paths = "/", "/results", "/api/state", "/api/vote", "/static/vote.js", "/image/0"
    methods = [_request(f"{method} {path}", cookie + JSON) for method in METHODS for path in paths]
    tokens = [_request(f"GET {path}?token={token}") for token in TOKENS for path in ("/", "/results", "/api/state")]
    tokens += [
        _request(f"GET {path}", f"Cookie: {cookie.split('=')[0][8:]}={token}\r\n") for token in TOKENS for path in paths
    ]
    fine = json.dumps({"name": "eve"}).encode()
    origins = [
        _request("POST /api/start", f"{cookie}{JSON}Origin: {origin}\r\n", fine)
        for origin in ("http://evil.example", "null", "http://127.0.0.1:1", "http://127.0.0.1.evil.example", "é", "//")
    ]
    kinds = [
        _request("POST /api/start", f"{cookie}{kind}", fine)
        for kind in (
            "",
            "Content-Type: text/plain\r\n",
            "Content-Type: multipart/form-data; boundary=x\r\n",
            "Content-Type: é\r\n",
        )
    ]
    large = [
        _request("POST /api/start", cookie + JSON, b"{", 10**7),
        _request("POST /api/start", cookie + JSON, b" " * 200_000),
        _request("POST /api/start", cookie + JSON, b"{}", 10**30),
        _request("POST /api/start", cookie + JSON, b"{}", -1),
        _request("POST /api/start", cookie + JSON, b"{}", "many"),
        _request("POST /api/start", f"{cookie}{JSON}Transfer-Encoding: chunked\r\n")
        + b"8000\r\n" + b" " * 0x8000 + b"\r\n0\r\n\r\n",
        _request("POST /api/start", f"{cookie}{JSON}Transfer-Encoding: chunked\r\n") + b"no number\r\n",
        _request("POST /api/start", f"{cookie}{JSON}Transfer-Encoding: nonsense\r\n", b"{}"),
        _request("GET /", f"X-Large: {'a' * 200_000}\r\n"),
        _request("GET /", "".join(f"X-{k}: {k}\r\n" for k in range(20_000))),
        _request(f"GET /{'a' * 200_000}"),
        _request(f"GET /?token={'a' * 60_000}"),
        _request("GET /", f"Cookie: {'a=b; ' * 10_000}\r\n"),
        _request("GET /", f"Cookie: {'=;' * 1000}\r\n"),
    ]  # fmt: skip
    broken = [
        b"\r\n\r\n\r\n\r\nGARBAGE\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: header\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n\r\n",  # TLS
        _request("GET http://evil.example/"),
        _request("GET *"),
        _request("GET /gone", cookie + "Upgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n"),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ]
    made = [*climbs, *posts, *answers, *methods, *tokens, *origins, *kinds, *large, *broken]
    rng = random.Random(0)
    while len(made) < 560:  # changed bytes in the path or header still name nothing that exists
        damaged = bytearray(rng.choice(climbs))
        for _ in range(3):
            damaged[rng.randrange(12, len(damaged) - 40)] = rng.randrange(256)
        made.append(bytes(damaged) + b"\r\n\r\n")
    return made


def _answer(port: int, request: bytes) -> bytes:
    """The status line of the response, or nothing if the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        with contextlib.suppress(ConnectionError):  # the server may refuse it before the end
            connection.sendall(request)
        reply = b""
        with contextlib.suppress(ConnectionError):
            while b"\r\n" not in reply and (data := connection.recv(4096)):
                reply += data
    return reply.partition(b"\r\n")[0]


def test_hostile_requests_are_refused_and_the_server_lives(make_folders, serve, tmp_path):
    images = ",".join(map(str, make_folders("base", "tuned")))
    arguments = (
        f"--images={images}",
        f"--output={tmp_path}/votes.sqlite",
        "--token=right-token",
        "--questions=preference",
    )
    server = serve(*arguments)
    with httpx2.Client(base_url=server.url.partition("?")[0], follow_redirects=True) as browser:
        browser.get(server.url).raise_for_status()
        browser.post("/api/start", json={"name": "ann"}).raise_for_status()
        before = browser.get("/api/state").json()
        jar = "; ".join(f"{name}={value}" for name, value in sorted(browser.cookies.items(), reverse=True))
        cookie = f"Cookie: {jar}\r\n"
        assert cookie.startswith("Cookie: token-")
        card = jar.partition("rater-")[2].partition("=")[2]
        assert card.startswith("ann.")
        requests = _requests(cookie, before["now"]["task"])
        answers = {request: _answer(server.port, request) for request in requests}
        assert len(answers) >= 500
        assert [x for x in answers.items() if not x[1].startswith(b"HTTP/1.1 4")] == []
        assert browser.get("/api/state").json() == before
    assert len(set(answers.values())) >= 6  # 400, 403, 404, 405, 413, 415: different refusals
    assert server.process.poll() is None
    assert server.stop() == ""

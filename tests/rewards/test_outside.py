"""Judges outside of dpo_jax: functions, commands and HTTP endpoints that work, and all the ways in which they fail."""

import base64
import importlib
import io
import json
import os
import re
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_jax.rewards import open_judge

IMAGES = [np.full((3 + n, 5, 3), 10 * n, np.uint8) for n in range(3)]
CAPTIONS = ["one", 'two "quoted"\nlines', "três"]
SCORES = [len(caption) + 10 * n for n, caption in enumerate(CAPTIONS)]

GOOD = """
import json, sys
import numpy as np
from PIL import Image
for line in sys.stdin:
    row = json.loads(line)
    score = len(row["caption"]) + float(np.asarray(Image.open(row["image"])).mean())
    print(json.dumps({"score": score, "why": "so"} if len(row["caption"]) > 4 else score), flush=True)
"""


@pytest.fixture
def function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """`function(code)` is the judge `score` of a module with this code in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def write(code: str) -> str:
        Path("my_judge.py").write_text(f"import numpy as np\n{code}\n")
        importlib.invalidate_caches()
        return "python=my_judge:score"

    yield write
    sys.modules.pop("my_judge", None)


@pytest.mark.parametrize("wrapped", ["{}", "np.array({})", "np.array({}, np.float16)", "jax.numpy.array({})"])
def test_a_function_scores_what_it_is_called_with(function: Callable[[str], str], wrapped: str) -> None:
    scores = "[len(c) + int(p.mean()) for p, c in zip(images, captions, strict=True)]"
    spec = function(f"import jax\ndef score(images, captions):\n  return {wrapped.format(scores)}")
    judge = open_judge(spec)
    assert judge.name == "python"
    assert judge.score(IMAGES, tuple(CAPTIONS)).tolist() == SCORES
    assert judge.score(np.stack([IMAGES[0]] * 2), CAPTIONS[:2]).tolist() == [len(CAPTIONS[0]), len(CAPTIONS[1])]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1, 2]", "gives 2 scores for 3 images"),
        ("3", "gives 1 scores for 3 images"),
        ("[1, np.nan, 3]", "gives NaN for the caption 'two \"quoted\"\\nlines'; it should be a number"),
        ("np.array([1, 2, np.inf])", "gives Infinity for the caption 'três'"),
        ("[1, 2, 1e39]", "gives 1e+39 for the caption 'três'"),
        ("[1, 2, None]", "gives null for the caption 'três'"),
        ("['good', 2, 3]", "gives \"good\" for the caption 'one'"),
        ("[[1], [2], [3]]", "gives [1] for the caption 'one'"),
        ("[1, 2, 3j]", 'gives "(1+0j)" for the caption'),
        ("[1, [2], 3]", "raises ValueError: setting an array element with a sequence"),
        ("open('nowhere')", "raises FileNotFoundError: [Errno 2] No such file or directory: 'nowhere'"),
        ("1 // (len(captions) - 3)", "raises ZeroDivisionError: "),
    ],
)
def test_functions_that_fail(function: Callable[[str], str], returned: str, message: str) -> None:
    judge = open_judge(function(f"def score(images, captions):\n  return {returned}"))
    with pytest.raises(OSError, match=rf"^the judge my_judge:score {re.escape(message)}.*\Z"):
        judge.score(IMAGES, CAPTIONS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("my_judge", "does not name a function; write python=module:function"),
        (":score", "does not name a function"),
        ("no_such:score", "can't be opened: there is no module no_such in the working directory or the environment"),
        ("my_judge.inner:score", "can't be opened: importing my_judge.inner raises ImportError: no GPU here"),
        ("my_judge:score", "can't be opened: importing my_judge raises ImportError: no GPU here"),
        ("json:score", "can't be opened: json has no function score"),
        ("json:__name__", "can't be opened: json has no function __name__"),
        ("json.no_such:score", "can't be opened: there is no module json.no_such in"),
        (".json:score", "can't be opened: importing .json raises TypeError: "),
    ],
)
def test_functions_that_are_none(function: Callable[[str], str], spec: str, message: str) -> None:
    function("raise ImportError('no\\nGPU here')")
    with pytest.raises(ValueError, match=rf"^python={re.escape(spec)} {re.escape(message)}.*\Z"):
        open_judge(f"python={spec}")


def test_a_module_that_misses_another_is_not_called_missing(function: Callable[[str], str]) -> None:
    with pytest.raises(ValueError, match=r"importing my_judge raises ModuleNotFoundError: No module named 'no_such'$"):
        open_judge(function("import no_such"))


def command(code: str) -> str:
    return f"command={shlex.join([sys.executable, '-c', code])}"


def test_a_command_scores_the_files_that_it_is_given() -> None:
    judge = open_judge(command(GOOD))
    assert judge.name == "command"
    assert judge.score(IMAGES, CAPTIONS).tolist() == SCORES


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    open_judge(command(GOOD)).score(IMAGES, CAPTIONS)
    with pytest.raises(OSError, match="ended with 3"):
        open_judge(command("import sys; sys.exit(3)")).score(IMAGES, CAPTIONS)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("print(1); print(2)", "gives 2 scores for 3 images"),
        ("print('1\\n2\\n\\n3\\n4')", "gives 4 scores for 3 images"),
        ("print('1\\nNaN\\n3')", "gives NaN for the caption 'two \"quoted\"\\nlines'; it should be a number"),
        ("print('1\\n2\\n1e39')", "gives 1e39 for the caption 'três'; it should be a number"),
        ("print('1\\n2\\n' + '9' * 400)", "999... for the caption"),
        ("print('1\\n2\\ntrue')", "gives true for"),
        ("print('1\\n2\\n{\"reward\": 3}')", 'gives {"reward": 3} for'),
        ("print('good\\n2\\n3')", "gives good for the caption 'one'"),
        ("import sys; print('a\\nno GPU', file=sys.stderr); sys.exit(7)", "ended with 7: no GPU"),
        ("import sys; sys.exit(7)", "ended with 7: nothing"),
    ],
)
def test_commands_that_fail(code: str, message: str) -> None:
    with pytest.raises(OSError, match=rf"^the judge .*{re.escape(message)}.*\Z"):
        open_judge(command(code)).score(IMAGES, CAPTIONS)


def test_commands_that_are_none() -> None:
    with pytest.raises(OSError, match=r"^the judge nowhere/judge --fast can't be run: No such file or directory$"):
        open_judge("command=nowhere/judge --fast").score(IMAGES, CAPTIONS)
    with pytest.raises(ValueError, match="command='x is not a command line: No closing quotation"):
        open_judge("command='x")
    with pytest.raises(ValueError, match="command= must be followed by a command line"):
        open_judge("command= ")


def test_a_command_that_hangs_ends_with_all_that_it_started(tmp_path: Path) -> None:
    script = tmp_path / "judge.sh"
    script.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/pid\nwait\n")
    script.chmod(0o755)
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"judge\.sh has not answered in 1\.5 s"):
        open_judge(f"command={script}", timeout=1.5).score(IMAGES, CAPTIONS)
    assert time.monotonic() - start < 20
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not os.path.exists(f"/proc/{child}") or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2]:
            return
        time.sleep(0.05)
    pytest.fail("its child still runs")


Answer = Callable[[dict], tuple[int, bytes]]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Answer], str]]:
    """`serve(answer)` returns the URL of an endpoint that gives this answer."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(answer: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.headers["Content-Type"] == "application/json"
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, body = answer(asked)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/score"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def read_and_score(asked: dict) -> tuple[int, bytes]:
    scores = []
    for image in asked["images"]:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(image["png_base64"]))))
        scores.append(len(image["caption"]) + float(pixels.mean()))
    return 200, json.dumps({"scores": scores}).encode()


def test_an_endpoint_scores_what_it_is_sent(serve: Callable[[Answer], str]) -> None:
    judge = open_judge(f"http={serve(read_and_score)}")
    assert judge.name == "http"
    assert judge.score(IMAGES, CAPTIONS).tolist() == SCORES


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (200, b'{"scores": [1, 2]}', "gives 2 scores for 3 images"),
        (200, b'{"scores": [1, NaN, 2]}', "gives NaN for the caption 'two"),
        (200, b'{"scores": [1, null, 2]}', "gives null for the caption 'two"),
        (200, b'{"scores": 1}', 'answers {"scores": 1}; it should be {"scores": [...]}'),
        (200, b"[1, 2, 3]", 'answers [1, 2, 3]; it should be {"scores": [...]}'),
        (200, b"<html>\nhello", "answers <html> hello; it should be"),
        (200, b"\xff", "can't be asked: 'utf-8' codec can't decode"),
        (500, b"out of\nmemory", "answers with status 500: out of memory"),
    ],
)
def test_endpoints_that_fail(serve: Callable[[Answer], str], status: int, body: bytes, message: str) -> None:
    address = serve(lambda asked: (status, body))
    with pytest.raises(OSError, match=rf"^{re.escape(f'the judge at {address} {message}')}.*\Z"):
        open_judge(f"http={address}").score(IMAGES, CAPTIONS)


def test_an_endpoint_that_hangs_or_is_not_there(serve: Callable[[Answer], str]) -> None:
    address = serve(lambda asked: (time.sleep(1.5), (200, b""))[1])
    with pytest.raises(TimeoutError, match=r"has not answered in 0\.2 s"):
        open_judge(f"http={address}", timeout=0.2).score(IMAGES, CAPTIONS)
    with pytest.raises(ConnectionError, match=r"at http://127\.0\.0\.1:1/ can't be asked: .*Connection refused"):
        open_judge("http=http://127.0.0.1:1/").score(IMAGES, CAPTIONS)
    with pytest.raises(ValueError, match=r"http=127\.0\.0\.1:8000 is not a URL"):
        open_judge("http=127.0.0.1:8000")

"""Judges outside of dpo_jax: a Python function, a command or an HTTP endpoint, with a model of any framework.

A function is called with a list of images, uint8 [H, W, 3], and a list of their captions. It returns one number per
image.

A command is started for every batch of images. It reads lines of {"image": path of a PNG file, "caption": ...} and
prints one line for each in the same order: a number, or {"score": number}.

An endpoint suits models that take long to load. It receives {"images": [{"png_base64": ..., "caption": ...}, ...]} by
POST and answers {"scores": [...]}.

When such a judge fails, an EnvironmentFault says why in one sentence. It is not asked again.
"""

import base64
import contextlib
import http.client
import io
import json
import os
import shlex
import signal
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpo_jax.errors import EnvironmentFault, OutsideConnectionError, OutsideProcessError, OutsideTimeoutError, UserError
from dpo_jax.rewards import Images, Reward, Settings
from dpo_jax.user_code import import_object

LARGEST = float(np.finfo(np.float32).max)


def open_function(source: str, settings: Settings) -> Reward:
    """Open a Python function, `module:function`, in the working directory or the environment.

    Raises UserError where there is none, or importing its module fails.
    """
    function = _import(source)

    def score(images: Images, captions: Sequence[str]) -> np.ndarray:
        try:
            values = np.atleast_1d(np.asarray(function(list(images), list(captions)))).tolist()
        except Exception as error:
            raise EnvironmentFault(f"the judge {source} raises {_told(error)}") from error
        return _scores(f"the judge {source}", [json.dumps(value, default=repr) for value in values], captions)

    return score


def open_command(source: str, settings: Settings) -> Reward:
    """Open a command line, which is run without a shell; raises UserError where its quotes do not match."""
    try:
        command = shlex.split(source)
    except ValueError as error:
        raise UserError(f"command={source} is not a command line: {error}") from None
    if not command:
        raise UserError("command= must be followed by a command line")

    def score(images: Images, captions: Sequence[str]) -> np.ndarray:
        with tempfile.TemporaryDirectory(prefix="dpo_jax_") as folder:
            lines = []
            for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
                path = Path(folder) / f"{number:06d}.png"
                path.write_bytes(_png(image))
                lines.append(json.dumps({"image": str(path), "caption": caption}))
            printed = _run(command, "\n".join(lines) + "\n", settings.timeout)
        values = [line for line in printed.splitlines() if line.strip()]
        return _scores(f"the judge {source}", values, captions)

    return score


def open_http(source: str, settings: Settings) -> Reward:
    """Open an HTTP endpoint; raises UserError for a URL that is not one of HTTP."""
    if not source.startswith(("http://", "https://")):
        raise UserError(f"http={source} is not a URL that begins with http:// or https://")

    def score(images: Images, captions: Sequence[str]) -> np.ndarray:
        entries = [
            {"png_base64": base64.b64encode(_png(image)).decode(), "caption": caption}
            for image, caption in zip(images, captions, strict=True)
        ]
        answer = _post(source, json.dumps({"images": entries}).encode(), settings.timeout)
        try:
            values = json.loads(answer)["scores"]
        except (ValueError, KeyError, TypeError):
            values = None
        if not isinstance(values, list):
            raise OutsideConnectionError(
                f'the judge at {source} answers {_short(answer)}; it should be {{"scores": [...]}}'
            )
        return _scores(f"the judge at {source}", list(map(json.dumps, values)), captions)

    return score


def _import(source: str) -> Callable[..., Any]:
    function = import_object(source, "function")
    if not callable(function):
        module, _, name = source.partition(":")
        raise UserError(f"python={source} can't be opened: {module} has no function {name}")
    return function


def _run(command: Sequence[str], lines: str, timeout: float) -> str:
    """Return what the command prints."""
    name, pipe = shlex.join(command), subprocess.PIPE
    try:
        # It gets a session of its own, so that whatever it has started can be ended with it.
        process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace", start_new_session=True
        )
    except OSError as error:
        raise OutsideProcessError(f"the judge {name} can't be run: {error.strerror}") from None
    with process:
        try:
            printed, complaints = process.communicate(lines, timeout)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise OutsideTimeoutError(f"the judge {name} has not answered in {timeout:g} s") from None
            raise
    if process.returncode:
        last_line = complaints.strip().rpartition("\n")[2]
        raise OutsideProcessError(f"the judge {name} ended with {process.returncode}: {_short(last_line)}")
    return printed


def _post(address: str, body: bytes, timeout: float) -> str:
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read().decode()
    except urllib.error.HTTPError as error:
        text = _short(error.read().decode(errors="replace"))
        raise OutsideConnectionError(f"the judge at {address} answers with status {error.code}: {text}") from None
    except (OSError, UnicodeDecodeError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise OutsideTimeoutError(f"the judge at {address} has not answered in {timeout:g} s") from None
        raise OutsideConnectionError(f"the judge at {address} can't be asked: {_short(str(reason))}") from None


def _scores(judge: str, lines: Sequence[str], captions: Sequence[str]) -> np.ndarray:
    """Return the numbers of these lines, one per caption."""
    if len(lines) != len(captions):
        raise EnvironmentFault(f"{judge} gives {len(lines)} scores for {len(captions)} images")
    values: list[float] = []
    for line, caption in zip(lines, captions, strict=True):
        try:
            value = json.loads(line)
            value = value["score"] if isinstance(value, dict) else value
        except (ValueError, KeyError):
            value = None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not abs(value) <= LARGEST:  # this is also true for NaN
            raise EnvironmentFault(f"{judge} gives {_short(line)} for the caption {caption!r}; it should be a number")
        values.append(value)
    return np.asarray(values, np.float32)


def _png(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {_short(str(error))}"


def _short(text: str) -> str:
    """Return the text on one line, cut to 200 characters."""
    text = " ".join(text.split())
    return (text if len(text) <= 200 else f"{text[:200]}...") or "nothing"

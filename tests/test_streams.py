"""Losing standard output or error stops no command."""

import errno
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dpo_jax import streams
from dpo_jax.streams import Lasting, Prefixed

ROOT = Path(__file__).parents[1]
COMMAND = """
import contextlib, os, sys
from dpo_jax import cli
work = sys.argv.pop()
def main():
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            print("x" * 10_000, file=stream, flush=True)
        print("not flushed", file=stream)
    with open(work, "wb") as file:
        with contextlib.suppress(OSError):
            os.write(2, b"from a library")
        file.write(b"mine")
cli.run(main)
"""


class Failing(io.StringIO):
    def __init__(self, error: Exception):
        super().__init__()
        self.error: Exception | None = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)

    def flush(self) -> None:
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "full"), BrokenPipeError(errno.EPIPE, "gone"), OSError(errno.EIO, "no terminal")]
)
def test_what_cannot_be_written_is_lost(error: OSError) -> None:
    failing = Failing(error)
    stream = Lasting(failing)
    assert stream.write("lost") == 4
    stream.writelines(["lost", "lost"])
    print("lost", file=stream, flush=True)
    Console(file=stream).print("lost")
    failing.error = None
    print("kept", file=stream, flush=True)
    assert failing.getvalue() == "kept\n"
    stream.close()
    print("lost", file=stream, flush=True)


@pytest.mark.parametrize("lost", ["pipe", "disk", "closed"])
def test_a_command_whose_output_is_lost_goes_on_to_its_end(tmp_path: Path, lost: str) -> None:
    work = tmp_path / "work"
    command = [sys.executable, "-c", COMMAND, str(work)]
    if lost == "closed":
        code = subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "bash", *command], cwd=ROOT, check=False).returncode
    elif lost == "disk":
        if not os.path.exists("/dev/full"):
            pytest.skip("needs /dev/full")
        with open("/dev/full", "w") as full:
            code = subprocess.run(command, cwd=ROOT, stdout=full, stderr=full, check=False).returncode
    else:
        reader, writer = os.pipe()
        os.close(reader)
        code = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=writer, check=False).returncode
        os.close(writer)
    assert code == 0
    assert work.read_text() == "mine"


def test_what_the_terminal_has_no_letter_for_is_shown_all_the_same() -> None:
    command = "from dpo_jax import streams; streams.protect(); print('caf\\xe9 \\u732b')"
    done = subprocess.run(
        [sys.executable, "-c", command],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        check=True,
    )
    assert done.stdout == b"caf\xe9 \\u732b\n"


def test_lines_begin_with_time_and_process_whatever_pieces_they_come_in() -> None:
    text = io.StringIO()
    stream = Prefixed(text, "process 3")
    print("one", 1, file=stream)
    print("two\n\nthree", end="", file=stream)
    stream.writelines([" and", " more\n"])
    assert [re.sub(r"^\[\d\d:\d\d:\d\d process 3\] ", "> ", line) for line in text.getvalue().splitlines()] == [
        "> one 1",
        "> two",
        "> ",
        "> three and more",
    ]


def test_only_the_streams_of_other_processes_name_them(monkeypatch, capsys) -> None:
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, getattr(sys, name))  # put back at the end
    monkeypatch.setattr(streams._State, "process", 0)
    streams.name_process(0)
    streams.warn("of the first process")
    assert capsys.readouterr().err == "warning: of the first process\n"
    streams.name_process(2)
    streams.name_process(2)
    streams.warn("of another process")
    print("and what it prints")
    said = capsys.readouterr()
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d process 2\] warning: of another process\n", said.err)
    assert re.fullmatch(r"\[\d\d:\d\d:\d\d process 2\] and what it prints\n", said.out)
    assert streams.process() == 2

"""The Dockerfiles, as far as can be told without a builder: known instructions, files and extras that exist."""

import fnmatch
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from dpo_jax.__main__ import COMMANDS

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "launch").glob("*.Dockerfile"))
INSTRUCTIONS = {"FROM", "ARG", "WORKDIR", "COPY", "RUN", "ENV", "ENTRYPOINT", "CMD"}


def instructions(file: Path) -> list[tuple[str, str]]:
    """The instructions and what follows each, without comments."""
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in joined]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_dockerfile_is_sound(file):
    found = instructions(file)
    names = [name for name, _ in found]
    assert names[0] == "FROM"
    assert set(names) <= INSTRUCTIONS
    assert (names.count("ENTRYPOINT"), names.count("CMD")) == (1, 1)
    assert re.fullmatch(r"python:3\.1[123]-slim", found[0][1])  # a version that dpo_jax supports, and never "latest"
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name, rest in found:
        if name == "COPY":
            *sources, _ = rest.split()
            for source in sources:
                assert (ROOT / source).exists(), source
                assert any(fnmatch.fnmatch(source, pattern) for pattern in allowed), source
        if name in ("ENTRYPOINT", "CMD"):
            assert re.fullmatch(r'\[("[^"]+"(, )?)+\]', rest)
    (run,) = [shlex.split(rest) for name, rest in found if name == "RUN"]
    assert run[:5] == ["pip", "install", "--no-cache-dir", "-c", "constraints.txt"]
    arguments = dict(rest.split("=") for name, rest in found if name == "ARG")
    extras = re.sub(r"\$\{(\w+)\}", lambda given: arguments[given[1]], run[5]).strip(".[]").split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_comment_shows_commands_that_exist(file):
    said = file.read_text()
    assert f"docker build -f launch/{file.name} -t dpo_jax:{file.stem}" in said
    (command,) = re.findall(rf"dpo_jax:{file.stem} (\w+) --config", said)
    assert command in COMMANDS

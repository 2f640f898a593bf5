"""The documentation builds without a warning, and what it shows as an example is true of the code."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from dpo_jax.methods import METHODS
from dpo_jax.training.defaults import FIELDS, GROUPS, own_fields

OWN = {path for method in METHODS.values() for path in own_fields(method)}
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def shell_lines(page: Path) -> list[list[str]]:
    """The words of every line in the page's bash blocks, without comments."""
    text = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [words for line in text.splitlines() if (words := shlex.split(line, comments=True))]


def commands(page: Path) -> list[list[str]]:
    """[command, argument, ...] of each line that runs one of dpo_jax."""
    found = []
    for words in shell_lines(page):
        for i, word in enumerate(words):
            if word == "dpo_jax" and i == 0:
                found.append(words[1:])
            elif word.startswith("dpo_jax.") and words[i - 1] == "-m":
                found.append([word.removeprefix("dpo_jax."), *words[i + 1 :]])
    return found


def test_the_documentation_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    fields, flags = ((tmp_path / "reference" / f"{page}.html").read_text() for page in ("fields", "commands"))
    assert all(f">{path}<" in fields for path in [*FIELDS, *OWN])
    assert "--validation_fraction" in flags


def test_every_command_line_parses():
    lines = [(page.name, line) for page in PAGES for line in commands(page)]
    assert len(lines) > 30
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "docs" / "parse_commands.py")],
        input=json.dumps([line for _, line in lines]),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    wrong = [(*where, problem) for where, problem in zip(lines, json.loads(done.stdout), strict=True) if problem]
    assert not wrong


@by_page
def test_python_examples_run(page, tmp_path, monkeypatch):
    (tmp_path / "dpo_jax").symlink_to(ROOT / "dpo_jax")
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for code in blocks(page, "python"):
        exec(compile(code, f"{page.name}", "exec"), namespace)


@by_page
def test_links_scripts_and_fields_exist(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        if not link.startswith("reference/"):  # made when the documentation is built
            assert (page.parent / link).exists(), link
    for script in re.findall(r"\b(?:python|bash) ((?:benchmarks|launch|docs|tools)/[\w/]+\.\w+)", text):
        assert (ROOT / script).is_file(), script
    groups = "|".join(group for group in GROUPS if group)
    for field in re.findall(rf"--config\.([\w.]+)|`((?:{groups})\.[a-z]\w*)(?:`|=)", text):
        name = "".join(field)
        assert name in FIELDS or name in OWN, name


def test_the_example_of_ones_own_images_is_prepared(command, tmp_path):
    (line,) = blocks(ROOT / "docs" / "data.md", "json")
    (tmp_path / "my_pairs.jsonl").write_text(line)
    for which in ("chosen", "rejected"):
        Image.new("RGB", (40, 40), "green" if which == "chosen" else "red").save(tmp_path / json.loads(line)[which])
    name, *arguments = commands(ROOT / "docs" / "data.md")[0]
    done = command(name, *(re.sub("=(my_pairs|data/)", rf"={tmp_path}/\1", argument) for argument in arguments))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "data" / "mine" / "summary.json").read_text())["records"] == 1


@pytest.mark.slow
def test_the_example_of_encoding_runs(command, tmp_path):
    (line,) = [words for words in commands(ROOT / "docs" / "data.md") if "--input=dpo_jax/tiny/pairs.parquet" in words]
    name, *arguments = line
    done = command(name, *(argument.replace("=/tmp/", f"={tmp_path}/") for argument in arguments))
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_leads_to_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 130
    for page in PAGES[1:]:
        if page.stem not in ("index", "changelog"):
            assert f"docs/{page.name}" in text, page.name
    assert (ROOT / "docs" / "images" / "before_after.png").stat().st_size < 200_000

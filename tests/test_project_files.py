"""What stands around the package: how to cite it, forms for issues, and what the wheel holds."""

import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
import yaml

import dpo_jax

ROOT = Path(__file__).parents[1]


def test_the_citation_names_this_version_and_its_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == dpo_jax.__version__
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert citation["license"] == project["license"]
    assert {paper["url"] for paper in citation["references"]} == set(project["urls"].values())


def test_the_forms_for_issues_are_sound():
    forms = [file for file in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if file.name != "config.yml"]
    assert len(forms) == 2
    for file in forms:
        form = yaml.safe_load(file.read_text())
        assert {"name", "description", "body"} <= set(form)
        identifiers = [part["id"] for part in form["body"]]
        assert len(set(identifiers)) == len(identifiers)
        assert {part["type"] for part in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_contributing_names_files_that_exist():
    for name in ("launch/demo.sh", "launch/test.sh", "dpo_jax/training/defaults.py", "dpo_jax/api", "docs"):
        assert (ROOT / name).exists()
        assert name.removeprefix("dpo_jax/") in (ROOT / "CONTRIBUTING.md").read_text()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built without network and without leaving anything in the repository."""
    copy = tmp_path_factory.mktemp("source")
    ignored = shutil.ignore_patterns("__pycache__")
    for folder in ("dpo_jax", "configs", "tests", "tools", "benchmarks"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=ignored)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, f"--wheel-dir={copy}/dist", str(copy)], check=True, capture_output=True, text=True)
    (built,) = (copy / "dist").iterdir()
    return built


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.name == f"dpo_jax-{dpo_jax.__version__}-py3-none-any.whl"
    # 3.1 MB each are the tiny SDXL, its pairs and the tiny flow model, 0.8 MB the pairs of the latter.
    assert 8e6 < wheel.stat().st_size < 10.5e6
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = f"dpo_jax-{dpo_jax.__version__}.dist-info"
    assert {PurePosixPath(name).parts[0] for name in names} == {"dpo_jax", metadata}
    tracked = subprocess.run(
        ["git", "ls-files", "dpo_jax"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    expected = set(tracked.split()) - {"dpo_jax/configs"}
    expected |= {f"dpo_jax/configs/{file.name}" for file in (ROOT / "configs").glob("*.py")}
    assert {name for name in names if name.startswith("dpo_jax/")} == expected
    for name in ("configs/sdxl.py", "py.typed", "tiny/flow_model/transformer/config.json", "voting/pages/vote.html"):
        assert f"dpo_jax/{name}" in names
    with zipfile.ZipFile(wheel) as archive:
        assert "dpo_jax = dpo_jax.__main__:main" in archive.read(f"{metadata}/entry_points.txt").decode()


def test_commands_run_from_the_wheel_outside_the_repository(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = "import dpo_jax, sys; from dpo_jax.__main__ import main; print(dpo_jax.__file__); main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "train", "--config=tiny", "--workdir=x", "--config.lr=1"],
        env={"PYTHONPATH": str(tmp_path / "site"), "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{tmp_path}/site/dpo_jax/__init__.py\n"
    assert "did you mean config.optimizer.learning_rate?" in done.stderr

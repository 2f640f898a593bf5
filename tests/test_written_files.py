"""Everything that the package writes goes through `files.py`: no link is followed, nothing is left half written."""

import ast
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpo_jax import files
from dpo_jax.data.prepare.builder import prepare
from dpo_jax.data.sources import Source
from dpo_jax.data.store.latents import write_captions
from dpo_jax.rounds.folder import Rewards, RoundFolder
from dpo_jax.rounds.rollout import StoredTrajectory
from dpo_jax.sampling.draw import begin_folder
from dpo_jax.sampling.grid import save_png
from dpo_jax.sampling.image_folder import Entry, write_list
from dpo_jax.training.checkpoint import write_config
from dpo_jax.training.metrics import MetricWriter
from dpo_jax.weights import safetensors_file

PACKAGE = Path(files.__file__).parent
ALLOWED = {  # where, and why nobody can have laid a link there
    "files.py": "is what all others use",
    "data/prepare/worker.py": "fills the new folder of a part, inside the unfinished work that builder.py owns",
    "data/prepare/merge.py": "fills folders inside the folder of unfinished work that builder.py owns",
    "data/prepare/builder.py": "owns the folder of unfinished work: no link and no other user's, see _check_own",
    "data/store/image_store.py": "writes what its callers name: parts.py and merge.py",
    "data/store/latents.py": "fills files of random names that then take the place of the old ones",
    "data/store/scores.py": "fills files of random names that then take the place of the old ones",
    "locks.py": "writes in place, to a file that it opened without following links, or to an object store",
    "rewards/outside.py": "fills a new temporary folder that only this user can enter",
}
WRITERS = {"write_text", "write_bytes", "tofile", "new_file", "ParquetWriter", "save_file", "NamedTemporaryFile"}


def is_writer(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in WRITERS:
        return True
    given = [*call.args, *(keyword.value for keyword in call.keywords)]
    modes = [value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str)]
    return name in ("open", "fdopen") and any(len(mode) < 4 and set(mode) & set("wax+") for mode in modes)


def test_only_files_py_writes_files() -> None:
    found = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and is_writer(node)
    }
    assert found == ALLOWED.keys(), "write by dpo_jax.files instead, or say here why not"


def write_trajectory(folder: Path) -> None:
    trajectory = StoredTrajectory(*(np.zeros(1) for _ in StoredTrajectory._fields))
    RoundFolder(folder, 0, ["a"]).write_trajectory(0, trajectory, Rewards(np.zeros((1, 1))))


IMAGE = Image.new("RGB", (4, 4))
WRITTEN = {  # the file that appears, and what writes it into a folder
    "config.json": lambda folder: write_config(folder, {"steps": 3}),
    "metrics.jsonl": lambda folder: MetricWriter(folder, 0).close(),
    "metrics.csv": lambda folder: MetricWriter(folder, 0, ["csv"]).close(),
    "samples/step_000001.png": lambda folder: save_png(folder / "samples" / "step_000001.png", IMAGE),
    "sampling.json": lambda folder: begin_folder(folder / "new", {}),
    "prompts.jsonl": lambda folder: write_list(folder, [Entry("a.png", "a", 0)]),
    "00000_a_0.png": lambda folder: RoundFolder(folder, 0, ["a"]).write_images(0, np.zeros((1, 4, 4, 3), np.uint8)),
    "00000.npz": write_trajectory,
    "scores.json": lambda folder: RoundFolder(folder, 0, ["a"]).write_scores({}, np.zeros((1, 1, 1))),
    "captions.arrow": lambda folder: write_captions(folder, ["a"]),
    "a.safetensors": lambda folder: safetensors_file.write(
        folder / "a.safetensors", [("x", np.zeros(1, np.float32))], {"x": ((1,), np.dtype("float32"))}
    ),
}


@pytest.mark.parametrize("name", WRITTEN)
def test_links_at_every_name_that_can_be_guessed_lead_nowhere(tmp_path: Path, name: str) -> None:
    """Writes twice: the second time links lie beside what the first time has shown to be written."""
    victim, folder = tmp_path / "victim", tmp_path / "out"
    victim.write_text("mine")
    folder.mkdir()
    WRITTEN[name](folder)
    (written,) = [path for path in folder.rglob("*") if path.name == Path(name).name]
    base, parent = written.name, written.parent
    written.unlink()
    if name == "sampling.json":
        parent.rmdir()
        parent.mkdir()
    guesses = {f"{base}.partial", f".{base}.partial", f".{base}.unfinished", f"{base}.tmp", f".{base}.tmp"}
    guesses |= {f".{base}.{files.os.getpid()}", f"{written.stem}.partial", f".{base}"}
    if name != "sampling.json":  # it is written into empty folders only
        for guess in guesses:
            (parent / guess).symlink_to(victim)
        written.symlink_to(victim)
    WRITTEN[name](folder)
    assert victim.read_text() == "mine"
    assert written.is_file()
    assert not written.is_symlink()


def test_prepare_does_not_work_through_a_link(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "mine.json").write_text(json.dumps({}))
    source = Source(lambda files: [], lambda chunk: iter(()), "none")
    for target in (elsewhere, tmp_path / "nothing"):
        link = tmp_path / ".data.partial"
        link.symlink_to(target)
        with pytest.raises(FileExistsError, match=r"\.data\.partial, the folder of unfinished work, is a link"):
            prepare(source, [], tmp_path / "data", workers=0)
        link.unlink()
    assert [path.name for path in elsewhere.iterdir()] == ["mine.json"]

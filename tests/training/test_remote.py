"""A work directory in object storage: Orbax writes checkpoints there, and one path library everything else."""

import json
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from tensorboardX import record_writer

from dpo_jax import locks
from dpo_jax.models.random_model import write_random_model
from dpo_jax.sampling.grid import save_png
from dpo_jax.training import trainer
from dpo_jax.training.checkpoint import latest_step, read_config
from dpo_jax.training.loop import Loop
from dpo_jax.training.metrics import read_metrics
from dpo_jax.training.trainer import train


class ObjectStore(MemoryFileSystem):
    """An object store in memory, as strict as gs://: files are written completely and never appended to."""

    protocol = "gs"
    root_marker = ""

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return MemoryFileSystem._strip_protocol(str(path).removeprefix("gs://"))

    def _open(self, path: str, mode: str = "rb", **options):
        assert mode in ("rb", "wb"), f"object stores can't open with {mode}"
        return super()._open(path, mode, **options)


class Events:
    """A stand-in for tensorboardX's writer to gs://, which needs Google's client library."""

    def __init__(self) -> None:
        self.opened: list[str] = []

    def directory_check(self, path: str) -> None:
        assert path.startswith("gs://")

    def open(self, path: str) -> SimpleNamespace:
        self.opened.append(path)
        return SimpleNamespace(write=lambda data: None, flush=lambda: None, close=lambda: None)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Events:
    events = Events()
    monkeypatch.setitem(record_writer.REGISTERED_FACTORIES, "gs", events)
    return events


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[epath.Path]:
    store = ObjectStore()
    monkeypatch.setattr(epath.backend.fsspec_backend, "_get_filesystem", lambda name: store)
    yield epath.Path("gs://bucket")
    MemoryFileSystem.store.clear()


class NoCheckpoints(trainer.Checkpoints):
    def __init__(self, workdir, *, keep, keep_every, fields):
        self.folder, self.best = None, SimpleNamespace(step=-1)

    def save(self, state, position):
        pass

    def check(self):
        pass

    def close(self):
        pass


def write_what_steps_write(loop: Loop, state, batches):
    for step in (1, 2):
        loop.writer.scalars(step, {"train/loss": 0.5})
    save_png(loop.workdir / "samples" / "step_000002.png", Image.new("RGB", (4, 4)))
    return state


def test_a_run_writes_all_into_the_bucket(bucket, events, tiny_config, tmp_path, monkeypatch) -> None:
    write_random_model("sd15", tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(trainer, "Checkpoints", NoCheckpoints)
    monkeypatch.setattr(Loop, "run", write_what_steps_write)
    config = tiny_config("sd15", steps=2, model=str(tmp_path / "model"), **{"checkpoint.every": 1})
    workdir = bucket / "runs" / "one"
    train(config, "gs://bucket/runs/one")

    assert [path.name for path in tmp_path.iterdir()] == ["model"], "something took the address for a local folder"
    assert read_config(workdir)["steps"] == 2
    assert [row["step"] for row in read_metrics(workdir)] == [1, 2]
    assert (workdir / "samples" / "step_000002.png").read_bytes()[:4] == b"\x89PNG"
    assert "MiB per device" in (workdir / "sharding.txt").read_text()
    assert events.opened[-1].startswith("gs://bucket/runs/one/tensorboard/")
    assert latest_step(workdir) is None


def test_a_lock_in_the_bucket(bucket, monkeypatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.05)
    folder, file = bucket / "run", bucket / "run" / ".lock"
    with locks.locked(folder, "me"):
        mine = json.loads(file.read_text())
        time.sleep(0.3)
        assert json.loads(file.read_text())["renewed"] > mine["renewed"]
    assert not file.exists()
    for ago, lives in ((0, True), (1000, False)):
        file.write_text(json.dumps(mine | {"owner": "abc", "host": "elsewhere", "renewed": time.time() - ago}))
        if lives:
            message = r"^gs://bucket/run is in use by me \(process \d+ on elsewhere, since "
            with pytest.raises(BlockingIOError, match=message), locks.locked(folder, "another"):
                pytest.fail("two have it")
        else:
            with locks.locked(folder, "another"):
                assert json.loads(file.read_text())["command"] == "another"

"""Shared fixtures."""

import gc
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Most of the suite's time is compilation: so it is without LLVM's optimisations and parallel parts, and XLA's older
# code makes the fusions. What must be tested as users run it clears XLA_FLAGS in a subprocess.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    " --xla_cpu_parallel_codegen_split_count=1"
)
# Everything is tested on CPUs; a compiler for GPUs is offered without one only to those who say so.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiled functions are kept beside pytest's own cache, for tests in this and in other processes.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from ml_collections import ConfigDict
from PIL import Image

from dpo_jax.cli import load_config
from dpo_jax.data.prepare import builder
from dpo_jax.data.sources import SOURCES

from . import array_checks

# Functions of these packages check the shapes and dtypes that they are annotated with. Nothing above imports them.
CHECKED = ["dpo_jax.diffusion", "dpo_jax.methods", "dpo_jax.objectives"]
install_import_hook(CHECKED, f"{array_checks.__name__}.checked")
# A shell that starts something in the background has it ignore Ctrl-C, and so would all that is started here.
for ignored in {signal.SIGINT, signal.SIGHUP}:
    if signal.getsignal(ignored) is signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored is signal.SIGINT else signal.SIG_DFL)
gc.freeze()  # what is imported stays; and tracing makes so many objects that looking for cycles takes a tenth of it
gc.set_threshold(100_000, 50, 50)
ROOT = Path(__file__).parents[1]
LONGEST = (
    "training/test_devices",
    "parity/test_trajectory",
    "rounds/test_resume",
    "parity/test_online",
    "test_trainer",
)
"""Files that begin first, so that no process waits for another's last minutes."""
torch.set_num_threads(1)  # the models are tiny, and more threads only wait for each other


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((n for n, name in enumerate(LONGEST) if item.path.with_suffix("").match(name)), len(LONGEST))

    items.sort(key=place)


@pytest.fixture
def x64() -> Iterator[None]:
    """Double precision inside the test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def params(x64: None) -> dict[str, jax.Array]:
    """Weights of `small_denoiser`."""
    keys = jax.random.split(jax.random.key(0), 2)
    return {"in": jax.random.normal(keys[0], (4, 8)) * 0.3, "out": jax.random.normal(keys[1], (8, 4)) * 0.3}


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ConfigDict]:
    """`tiny_config("sd15", steps=2, **{"loss.beta": 1.0})`: a `:tiny` config with batches of 4 and fields replaced."""

    from dpo_jax.training.defaults import with_fields  # not before the hook that checks arrays

    def make(name: str, **fields: object) -> ConfigDict:
        config = load_config(f"{ROOT}/configs/{name}.py:tiny")
        config.data.batch_size, config.validation.every, config.sample.every = 4, 0, 0
        return with_fields(config, fields)

    return make


@pytest.fixture
def mixed_pairs(tmp_path: Path) -> Path:
    """Prepared: 12 pairs of 14 images in several shapes, under 9 captions, two of which are of single images."""
    rng = np.random.default_rng(0)
    for i in range(14):
        height, width = rng.choice([32, 40, 64], 2)
        noise = np.clip(rng.integers(256, size=3) + rng.normal(0, 30, (height, width, 3)), 0, 255)
        Image.fromarray(noise.astype(np.uint8)).save(tmp_path / f"{i}.png")
    rows = [{"prompt": f"prompt {i % 5}", "images": [f"{i}.png", f"{(i + 5) % 14}.png"]} for i in range(11)]
    rows.append({"prompt": "both", "images": ["11.png", "12.png"], "captions": ["mine", "yours"]})
    lines = [json.dumps(row | {"preferred": 0}) for row in rows]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    builder.prepare(SOURCES["jsonl"], [tmp_path / "pairs.jsonl"], tmp_path / "data", workers=0, validation_fraction=0.2)
    return tmp_path / "data"


def step_without_network(state: Any, frozen: Any, batch: Any) -> tuple[Any, dict[str, jax.Array]]:
    """Add to one weight a number that follows from all of the batch."""
    seen = jnp.float32(sum(float(jnp.mean(x.astype(jnp.float32))) for x in jax.tree.leaves(batch) if x.size))
    name = min(state.params)
    metrics = dict.fromkeys(("train/loss", "train/gradient_norm", "train/update_norm"), seen)
    return state._replace(step=state.step + 1, params=state.params | {name: state.params[name] + seen}), metrics


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training steps are those of `step_without_network`, which need no compilation, for tests of what is around."""
    monkeypatch.setattr("dpo_jax.training.experiment.Experiment.train_step", lambda experiment: step_without_network)


@pytest.fixture
def steps_seen(no_network: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """(experiment, batch) of each training step, which is that of `step_without_network`."""
    seen: list[tuple[Any, Any]] = []

    def train_step(experiment: Any) -> Any:
        def step(state: Any, frozen: Any, batch: Any) -> Any:
            seen.append((experiment, batch))
            return step_without_network(state, frozen, batch)

        return step

    monkeypatch.setattr("dpo_jax.training.experiment.Experiment.train_step", train_step)
    return seen


Command = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def command(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """`command("score", "--data=DIR")`: what `python -m dpo_jax.score --data=DIR` does offline, but for its imports."""
    folder = tmp_path_factory.mktemp("commands")
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("command_server.py"))],
        cwd=ROOT,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def run(name: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        files = {stream: folder / stream for stream in ("stdout", "stderr")}
        for file in files.values():
            file.unlink(missing_ok=True)
        request = {"module": f"dpo_jax.{name}", "arguments": [str(a) for a in arguments], "cwd": str(ROOT)}
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request | {stream: str(file) for stream, file in files.items()}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(arguments, code, *(file.read_text() for file in files.values()))

    yield run
    server.stdin.close()
    server.wait(30)


class Server:
    """`dpo_jax.vote`, serving until it's killed; `start` again continues on the same port."""

    def __init__(self, *arguments: str):
        self._arguments = list(arguments)
        self.port = 0

    def start(self) -> "Server":
        command = [sys.executable, "-m", "dpo_jax.vote", f"--port={self.port}", *self._arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.said: list[str] = []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.match(r"vote: +(http://\S+:(\d+)/\S*)", line):
                self.url, self.port = found[1], int(found[2])
                self.results = self.process.stdout.readline().split()[1]
                return self
        raise AssertionError(self.process.communicate()[1])

    def stop(self, with_signal: int = signal.SIGINT) -> str:
        """What it wrote to stderr."""
        self.process.send_signal(with_signal)
        return self.process.communicate(timeout=30)[1]


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """`serve("--images=a,b", ...)`: a page to vote on, killed in the end."""
    servers = []

    def start(*arguments: str) -> Server:
        servers.append(Server(*arguments))
        return servers[-1].start()

    yield start
    for server in servers:
        server.process.kill()
        server.process.communicate()

"""Runs after notices of preemption, with damaged checkpoints, on full disks, and beside processes that hang."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dpo_jax import cluster
from dpo_jax.training import experiment, preemption, trainer
from dpo_jax.training.checkpoint import Checkpoints, checksums, latest_step, restore, restore_params
from dpo_jax.training.step import TrainState
from dpo_jax.training.trainer import train

ROOT = Path(__file__).parents[2]


def state_at(step: int) -> TrainState:
    """Return a state that differs from those of other steps and is large enough for files of its own."""
    values = jax.random.normal(jax.random.key(step), (64, 128))
    moments = ({"a.kernel": values + 1}, jnp.int32(step))
    return TrainState(step=jnp.int32(step), params={"a.kernel": values}, opt_state=moments, ema={})


def save(workdir: Path, *steps: int) -> None:
    checkpoints = Checkpoints(workdir, keep=3)
    for step in steps:
        checkpoints.save(state_at(step), {"position": step})
    checkpoints.close()


def abstract() -> TrainState:
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state_at(0))


def assert_goes_on_from(workdir: Path, step: int) -> None:
    restored = restore(workdir, abstract())
    assert restored is not None
    state, position = restored
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))
    assert position == {"position": step}


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def empty(file: Path) -> None:
    os.truncate(file, 0)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def files_of(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax leaves reads unfinished
@pytest.mark.parametrize("damage", [truncate, empty, zero, flip, Path.unlink, pipe], ids=lambda damage: damage.__name__)
def test_whatever_happens_to_a_file_the_state_is_right(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    """Either the checkpoint is still whole, as the file is not needed, or the one before is used, with a warning."""
    save(tmp_path / "run", 1, 2)
    count, skipped = len(files_of(tmp_path / "run" / "checkpoints" / "2")), []
    for number in range(count):
        workdir = tmp_path / str(number)
        subprocess.run(["cp", "-r", tmp_path / "run", workdir], check=True)
        file = files_of(workdir / "checkpoints" / "2")[number]
        damage(file)
        params, step = restore_params(workdir, abstract().params, "params")
        np.testing.assert_array_equal(params["a.kernel"], state_at(step).params["a.kernel"])
        capfd.readouterr()
        if restore(workdir, abstract())[1] == {"position": 2}:
            assert_goes_on_from(workdir, 2)
            continue
        warning = capfd.readouterr().err
        print(warning)
        assert warning.count("is damaged and not used") == 1
        assert_goes_on_from(workdir, 1)
        assert sorted(path.name for path in (workdir / "damaged_checkpoints").iterdir()) == ["2"]
        skipped.append(file)
        if len(skipped) == 1:  # it is in nobody's way
            save(workdir, 2)
            assert_goes_on_from(workdir, 2)
    assert {file.parent.name for file in skipped} >= {"d", "position", "checksums"}


@pytest.mark.parametrize("item", ["position", "checksums"])
@pytest.mark.parametrize("content", ["[1]", "{}", '{"position": "2"}', '{"position": null}', "2", '{"position": 3}'])
def test_items_that_are_other_json_are_damage(tmp_path: Path, item: str, content: str) -> None:
    save(tmp_path, 1, 2)
    (tmp_path / "checkpoints" / "2" / item / "metadata").write_text(content)
    assert restore_params(tmp_path, abstract().params, "params")[1] == 1
    assert_goes_on_from(tmp_path, 1)


def test_without_a_whole_checkpoint_it_says_so_and_moves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, 2)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "state" / "manifest.ocdbt").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint in .* is whole \(step 2: .*; step 1: .*\); if") as raised:
        restore(tmp_path, abstract())
    assert "\n" not in str(raised.value)
    assert latest_step(tmp_path) == 2
    assert not (tmp_path / "damaged_checkpoints").exists()


@pytest.mark.parametrize("dtype", ["float32", "int32", "bfloat16", "uint8"])
def test_checksum_tells_any_changed_element_and_any_exchange(dtype: str) -> None:
    x = jax.random.randint(jax.random.key(0), (6, 5, 4), 0, 100).astype(dtype)
    seen = {checksums({"x": x})["['x']"]}
    for i in range(x.size):
        changed = x.ravel().at[i].add(1).reshape(x.shape)
        seen.add(checksums({"x": changed})["['x']"])
    assert len(seen) == 1 + x.size
    assert checksums({"x": x[::-1]}) != checksums({"x": x})
    assert checksums({"x": jnp.zeros((), dtype)}) == {"['x']": 0}


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def before(function: Callable, act: Callable, when: Callable[..., bool] = lambda *arguments: True) -> Callable:
    def acting(*arguments, **options):
        if when(*arguments):
            act()
        return function(*arguments, **options)

    return acting


def test_notice_at_the_start_ends_the_run_before_anything_is_compiled(tiny_config, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(trainer, "build", before(trainer.build, terminate))
    monkeypatch.setattr(experiment, "make_train_step", lambda *arguments, **options: pytest.fail)
    with pytest.raises(preemption.Preempted, match="preempted after step 0; run the same command again"):
        train(tiny_config("sd15"), tmp_path)
    assert latest_step(tmp_path) is None
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_notices_in_a_save_end_the_run_after_the_step_that_is_then_saved(
    tiny_config, no_network, tmp_path, monkeypatch
) -> None:
    def twice() -> None:
        terminate()
        terminate()

    save = before(trainer.Checkpoints.save, twice, lambda _, state, **position: int(state.step) == 2)
    monkeypatch.setattr(trainer.Checkpoints, "save", save)
    with pytest.raises(preemption.Preempted, match="preempted after step 3; run the same command again"):
        train(tiny_config("sd15", steps=100), tmp_path)
    assert latest_step(tmp_path) == 3
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_full_disk_is_told_by_its_folder(tiny_config, tmp_path, monkeypatch) -> None:
    def fail(*arguments) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")  # as write() says it

    monkeypatch.setattr(trainer, "announce_experiment", fail)
    with pytest.raises(OSError, match=f"the disk of {tmp_path} is full; make room, then run the same command again"):
        train(tiny_config("sd15"), tmp_path)


@pytest.mark.slow
def test_full_disk_ends_the_run_with_one_sentence_and_the_earlier_checkpoint_whole(tmp_path: Path) -> None:
    flags = ["--config=configs/sd15.py:tiny", f"--workdir={tmp_path}", "--config.steps=1000"]
    flags += ["--config.validation.every=0", "--config.sample.every=0"]
    script = f"""
import resource, runpy, sys
from dpo_jax.training import trainer

class Filling(trainer.Checkpoints):
    def save(self, state, position):
        if int(state.step) == 4:  # from here on no file can be as large as the parameters
            self._manager.wait_until_finished()
            resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
        super().save(state, position)

trainer.Checkpoints = Filling
sys.argv = ["dpo_jax.train", *{flags!r}]
runpy.run_module("dpo_jax.train", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    errors = [
        line
        for line in done.stderr.splitlines()
        if not line.startswith(("step ", "startup", "compiling", "loss before", "warning: 1,000 steps x 8 pairs"))
    ]
    (error,) = errors
    assert error.startswith(f"error: a checkpoint could not be written to {tmp_path}/checkpoints (")
    assert "File too large" in error
    assert "; that of step 2 is whole. Make room" in error
    assert latest_step(tmp_path) == 2
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) < 100


@pytest.mark.slow
@pytest.mark.parametrize("silent", [0, 1])
def test_a_process_that_stops_is_named_by_the_other(tmp_path: Path, silent: int) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", cluster.TIMEOUT: "4"}
    command = [sys.executable, "-m", "dpo_jax.train", "--config=configs/sd15.py:tiny", f"--workdir={tmp_path / 'run'}"]
    command += ["--config.steps=100000", "--config.validation.every=0", "--config.sample.every=0"]
    command += ["--config.checkpoint.every=100000"]
    logs, processes = [tmp_path / f"{i}.log" for i in range(2)], []
    for i, log in enumerate(logs):
        with log.open("w") as output:
            variables = environment | {"JAX_PROCESS_ID": str(i)}
            processes.append(subprocess.Popen(command, cwd=ROOT, env=variables, stdout=output, stderr=output))
    try:
        metrics = tmp_path / "run" / "metrics.jsonl"
        while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
            assert processes[0].poll() is None
            time.sleep(0.05)
        processes[silent].send_signal(signal.SIGSTOP)
        code = processes[1 - silent].wait(2 * 4 + 15)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert code == 1
    assert f"error: process {silent} does not respond; this process waited for it to " in logs[1 - silent].read_text()

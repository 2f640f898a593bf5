"""Ctrl-C at any moment: "error: interrupted", code 130, and what must be whole is whole."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import flags

from dpo_jax import cli, interrupts
from dpo_jax.errors import EnvironmentFault
from dpo_jax.training.checkpoint import Checkpoints, latest_step
from dpo_jax.training.step import TrainState

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def awaited(monkeypatch):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    interrupts.await_first()
    yield
    signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupts._State.received = False


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_what_is_held_is_interrupted_at_its_end() -> None:
    done = []

    def work() -> None:
        with interrupts.held():
            interrupt()
            done.append("all")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == ["all"]
    with interrupts.held():  # what is cleaned up after it is not interrupted once more
        done.append("cleaned up")
    assert done == ["all", "cleaned up"]


def test_the_second_interrupt_does_not_wait() -> None:
    def work() -> None:
        with interrupts.held():
            interrupt()
            interrupt()
            raise AssertionError

    with pytest.raises(KeyboardInterrupt):
        work()


class Lossy:
    """Python drops what destructors raise."""

    def __del__(self) -> None:
        interrupt()
        time.sleep(0)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("seconds", [0, 0.1], ids=["at once", "slowly"])
def test_an_interrupt_that_python_drops_comes_again(seconds: float, monkeypatch) -> None:
    class Thread(threading.Thread):
        def start(self) -> None:
            super().start()
            time.sleep(seconds)  # while this thread is where Python drops exceptions

    def work() -> None:
        Lossy()
        time.sleep(60)

    monkeypatch.setattr(interrupts.threading, "Thread", Thread)
    with pytest.raises(KeyboardInterrupt):
        work()


def test_an_interrupt_that_a_library_swallows_is_remembered() -> None:
    try:
        interrupt()
        time.sleep(1)
    except BaseException:
        pass
    assert interrupts.received()
    with pytest.raises(KeyboardInterrupt):
        interrupts.check()


def exit_code_of(main, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["command"])
    monkeypatch.setattr(flags.FlagValues, "validate_all_flags", lambda flags: None)  # other tests may require some
    with pytest.raises(SystemExit) as exited:
        cli.run(main)
    return exited.value.code


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("from a library"), None])
def test_whatever_becomes_of_an_interrupt_the_command_is_interrupted(error, monkeypatch, capsys) -> None:
    def main() -> None:
        try:
            interrupt()
            time.sleep(1)
        except KeyboardInterrupt:
            if error is None:
                raise EnvironmentFault("no room is left") from None
            raise error from None

    assert exit_code_of(main, monkeypatch) == 130
    reason = "; no room is left" if error is None else ""
    assert capsys.readouterr().err == f"error: interrupted{reason}\n"


def test_a_checkpoint_that_is_being_saved_is_whole_before_the_interrupt(tmp_path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    save = checkpoints._manager.save

    def interrupted(*arguments, **options) -> None:
        interrupt()
        save(*arguments, **options)

    monkeypatch.setattr(checkpoints._manager, "save", interrupted)
    state = TrainState(step=jnp.int32(1), params={"a.kernel": jnp.ones(3)}, opt_state=(), ema={})
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(state, {"position": 1})
    checkpoints.close()
    assert latest_step(tmp_path) == 1


@pytest.mark.parametrize("where", ["at the top", "in main"])
def test_imports_are_interrupted_without_a_traceback(tmp_path: Path, where: str) -> None:
    """Wherever a library is half imported: some would crash, others would make another error of it."""
    (tmp_path / "slow.py").write_text("import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)")
    (tmp_path / "command.py").write_text(
        f"""
import sys
sys.argv = ["-m"]  # as it is while Python looks for the module of python -m
import dpo_jax
sys.argv = ["command"]
if {where == "at the top"}:
    import slow
from dpo_jax import cli
def main():
    try:
        import slow
    except BaseException:
        print("caught")
cli.run(main)
"""
    )
    command = [sys.executable, str(tmp_path / "command.py")]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "error: interrupted\n")

"""Runs `python -m dpo_jax.train` in a process forked for it, and marks in a file what it is doing.

The soak test needs to know when to kill a run, and where it hit. Marks are lines "TIME PHASE"; the last one holds.
"""

import os
import runpy
import sys
import time
from pathlib import Path

from dpo_jax.training import trainer
from dpo_jax.training.loop import Loop


def run(arguments: list[str], environment: dict[str, str], marks: str, log: str) -> None:
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    file = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    phases = [""]

    def mark(phase: str) -> None:
        if phase != phases[-1]:
            phases.append(phase)
            os.write(file, f"{time.monotonic()} {phase}\n".encode())

    class Marked(trainer.Checkpoints):
        def save(self, *arguments, **options):
            mark("save")
            super().save(*arguments, **options)

        def check(self):  # after every step
            mark("save" if self._manager.is_saving_in_progress() else "steps")
            time.sleep(0.2)  # or steps of so small a model would be over before a checkpoint is written
            super().check()

        def close(self):
            if self._manager.is_saving_in_progress():
                mark("save")
            super().close()
            mark("end")

    restore = trainer.restore

    def marked_restore(workdir, abstract):
        if (Path(workdir) / "checkpoints").exists():
            mark("restore")
        restored = restore(workdir, abstract)
        mark("start")  # the first step, with all that JAX traces and compiles, belongs to it
        return restored

    def marked(phase: str, method):
        def act(*arguments):
            mark(phase)
            method(*arguments)
            mark("steps")

        return act

    trainer.Checkpoints, trainer.restore = Marked, marked_restore
    Loop._validate = marked("validate", Loop._validate)
    Loop._sample = marked("sample", Loop._sample)
    mark("start")
    sys.argv = ["dpo_jax.train", *arguments]
    runpy.run_module("dpo_jax.train", run_name="__main__")

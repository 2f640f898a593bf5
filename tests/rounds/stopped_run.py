"""Runs `python -m dpo_jax.online` and stops itself at an exact point: stopped_run.py WHERE COUNT SIGNAL ARGUMENTS.

WHERE is `sampled`, when this process has written its COUNT-th trajectory, or `trained`, when it has done its COUNT-th
step.
"""

import os
import runpy
import signal
import sys

from dpo_jax.rounds.folder import RoundFolder
from dpo_jax.training.checkpoint import Checkpoints

where, count, name = sys.argv[1], int(sys.argv[2]), sys.argv[3]
patched, method = {"sampled": (RoundFolder, "write_trajectory"), "trained": (Checkpoints, "check")}[where]
original, calls = getattr(patched, method), 0


def counted(*arguments, **options):
    global calls
    original(*arguments, **options)
    calls += 1
    if calls == count:
        os.kill(os.getpid(), getattr(signal, name))


setattr(patched, method, counted)
sys.argv = ["dpo_jax.online", *sys.argv[4:]]
runpy.run_module("dpo_jax.online", run_name="__main__")

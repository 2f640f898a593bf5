"""Runs a command that trains: joins its processes, and exits as schedulers expect."""

import sys
from collections.abc import Callable

from dpo_jax import cluster
from dpo_jax.training.preemption import EXIT_CODE, Preempted


def run(job: Callable[[], None]) -> None:
    """Join the processes of the run and do the job; exit with `EXIT_CODE` if it is preempted."""
    cluster.join()
    with cluster.leaving_at_once():
        try:
            job()
        except Preempted as notice:
            print(notice, file=sys.stderr, flush=True)
            sys.exit(EXIT_CODE)

"""Runs commands of dpo_jax in processes forked from one that has imported what they need, which spares each seconds.

Reads a line of JSON for each, `module`, `arguments`, `cwd` and files for `stdout` and `stderr`, and perhaps the
`seconds` after which the process is killed; writes its exit status.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import threading
import traceback

PRELOADED = (
    "dpo_jax.evaluation.compare",
    "dpo_jax.sampling.loaded_model",
    "dpo_jax.sampling.grid",
    "dpo_jax.rewards.clip_judges",
    "dpo_jax.rounds.loop",
    "dpo_jax.training.export",
    "dpo_jax.training.trainer",
    "pandas",  # which pyarrow imports
)


def forked() -> dict | None:
    """In each forked process what it has to run; None in the first, at the end."""
    for line in sys.stdin:
        request = json.loads(line)
        process = os.fork()
        if not process:
            return request
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    return None


def run(request: dict) -> int:
    """Runs the command in this process; its exit status, as Python would give it."""
    for number, file in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(file, os.O_RDWR | os.O_CREAT), number)
    signal.alarm(request.get("seconds", 0))  # ends the process, whatever it does
    os.chdir(request["cwd"])
    sys.path[0] = request["cwd"]
    sys.argv = [request["module"], *request["arguments"]]
    try:
        runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


for name in PRELOADED:
    importlib.import_module(name)
gc.freeze()  # or the first collection of each process would copy all of this
request = forked()
if request is not None:
    code = run(request)
    # As Python ends, but for taking all modules apart, which takes a second.
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)

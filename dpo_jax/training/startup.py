"""Measures the startup of a run, and keeps compiled programs to make the next one faster."""

import os
import time

import jax
from etils import epath


class StartupClock:
    """The seconds of each part of a startup: "load 3.1 s, restore 0.5 s, first step 20.4 s, in all 24.0 s"."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """Count the time since the last call for this part."""
        now = time.monotonic()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = [f"{part} {seconds:.1f} s" for part, seconds in self._seconds.items()]
        return f"{', '.join(parts)}, in all {sum(self._seconds.values()):.1f} s"


def keep_compiled_programs(workdir: epath.PathLike) -> None:
    """Make JAX keep programs that take longer than a second to compile, unless JAX_COMPILATION_CACHE_DIR is set.

    A run of one process keeps them in the user's cache folder. A run of several keeps them in the work directory,
    because only the first process writes them and all others must find them.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if jax.process_count() > 1:
        folder = epath.Path(workdir).absolute() / "compiled"
    else:
        folder = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))

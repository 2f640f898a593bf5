"""How long a run takes to start, and compiled programs kept so that the next start is faster."""

import os
import time

import jax
from etils import epath


class StartClock:
    """Seconds of each part of a start, printed as "load 3.1 s, restore 0.5 s, first step 20.4 s, in all 24.0 s"."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._seconds: dict[str, float] = {}

    def lap(self, part: str) -> None:
        """What has passed since the last call was this part."""
        now = time.monotonic()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def __str__(self) -> str:
        parts = [f"{part} {seconds:.1f} s" for part, seconds in self._seconds.items()]
        return f"{', '.join(parts)}, in all {sum(self._seconds.values()):.1f} s"


def keep_compiled_programs(workdir: epath.PathLike) -> None:
    """Has JAX keep what it compiles in more than its default of a second, unless JAX_COMPILATION_CACHE_DIR is set.

    Of a run of one process in the user's cache folder; of several in the work directory, which all of them see: only
    the first one writes, and the others are to find it.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    if jax.process_count() > 1:
        folder = epath.Path(workdir).absolute() / "compiled"
    else:
        folder = epath.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "dpo_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))

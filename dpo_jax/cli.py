"""What every command shares: flags, `--help`, and errors told in one sentence."""

import contextlib
import datetime
import difflib
import errno
import importlib.util
import inspect
import itertools
import logging
import math
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from dpo_jax import files, interrupts, streams
from dpo_jax.errors import MissingFileError, UserError

TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error instead of one sentence.")


MESSAGE = 1000
"""Characters of either end of a message that are always shown."""


def run(main: Callable[[], None]) -> NoReturn:
    """Parses the flags, runs `main` and exits.

    The exit code is 0 when `main` returned, 1 after an error, 2 for wrong flags, 130 after Ctrl-C.
    """
    streams.protect()
    interrupts.await_first()
    sys.argv[1:] = map(expand_home, sys.argv[1:])
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        print(f"{inspect.getdoc(inspect.getmodule(main))}\n\nFlags:\n{flags.FLAGS.main_module_help()}")
        sys.exit(0)
    try:
        _check_overrides(sys.argv[1:])
        _check_addresses(sys.argv[1:])
        rest = flags.FLAGS(sys.argv)
        _check_finite()
    except (flags.Error, ValueError, OSError) as error:
        _fail(f"{str(error).rstrip('.')}. Run with --help to see the flags.", code=2)
    if len(rest) > 1:
        _fail(f"unexpected argument {rest[1]!r}; every option is a flag. Run with --help to see them.", code=2)
    _silence_libraries(logging.ERROR if TRACEBACK.value else logging.CRITICAL)
    try:
        main()
    except KeyboardInterrupt:
        _fail("interrupted", code=interrupts.EXIT_CODE)
    except Exception as error:
        if TRACEBACK.value:
            raise
        told = isinstance(error, UserError) or _is_of_the_machine(error)
        if interrupts.received():  # libraries make all kinds of errors of it
            _fail(f"interrupted; {_sentence(error)}" if told else "interrupted", code=interrupts.EXIT_CODE)
        if told:
            _fail(_sentence(error), code=1)
        _keep_traceback(error)
        raise
    interrupts.leave_at_once()
    sys.exit(0)


def _silence_libraries(level: int) -> None:
    """What goes wrong is told once, by the error; the threads of Orbax would tell it hundreds of times, and worse."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(level)
    if level > logging.ERROR:
        sys.unraisablehook = interrupts.raise_again(lambda unraisable: None)


def expand_home(argument: str) -> str:
    """The argument with `~` where a path may begin, as in --output=~/x, as the home folder; shells leave it."""
    return re.sub(r"(^|[=,])~(?=/|,|$)", lambda found: found[1] + os.path.expanduser("~"), argument)


def load_config(spec: str) -> ConfigDict:
    """The config that `FILE` or `FILE:variant` describes."""
    path, _, argument = spec.partition(":")
    if not Path(path).is_file():
        raise MissingFileError(f"no config file {path}; the ones that come with the project are in configs/")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no function get_config(arg), so it is not a config file")
    return module.get_config(argument or None)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Every leaf of a config by its dotted path."""

    def walk(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(config, ""))


def unflatten(fields: dict[str, Any]) -> ConfigDict:
    """The config that `flatten` made these fields of."""
    config = ConfigDict()
    for path, value in fields.items():
        *parents, leaf = path.split(".")
        node = config
        for parent in parents:
            if parent not in node:
                node[parent] = ConfigDict()
            node = node[parent]
        node[leaf] = value
    return config


def replaced(config: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """A copy of the config with other values of some fields, by their dotted paths."""
    return unflatten(flatten(config) | fields)


def replaced_field(field: str, fields: Mapping[str, Any]) -> str | None:
    """A sentence, from the field's name on, about what replaces a field of earlier versions; None for other names."""
    if field != "data.accumulation":
        return None
    batch, given, steps = (_whole(fields.get(name, 1)) for name in ("data.batch_size", field, "online.sampling_steps"))
    at_a_time = max(1, round(batch * steps * float(fields.get("online.timesteps", 1))) // given)
    one = "on one device; divide it by their number on more" if at_a_time > 1 else "on any number of devices"
    return (
        f"{field}={given} is replaced by data.micro_batch, the number per device at a time; the micro-batches follow "
        f"from it and the devices. Set data.micro_batch={at_a_time} {one}"
    )


def _whole(value: Any) -> int:
    return int(str(value)) if re.fullmatch(r"[1-9]\d{0,8}", str(value)) else 1


def _given(arguments: list[str]) -> dict[str, str]:
    """The fields that `--config.field=value` replace."""
    pairs = (argument.removeprefix("--config.").partition("=") for argument in arguments if "--config." in argument)
    return {field: value for field, _, value in pairs}


def _check_finite() -> None:
    """Refuses flags that are NaN, which lies in any bounds, or infinite. Fields of a config have their own check."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value) and not name.startswith("config."):
            raise UserError(f"--{name}={value} must be a finite number")


def _check_addresses(arguments: list[str]) -> None:
    """Refuses addresses on the web where a path is meant; only judges are asked at one."""
    for argument in arguments:
        found = re.match(r"(--(?!judge)[\w.]+)=(?:.*,)?(?:\w+=)?(?P<address>(?:https?|ftp|hf)://[^,]*)", argument)
        if found:
            raise UserError(
                f"{found[1]}={found['address']} is an address on the web, and a path or a hub id is needed; download it"
            )


def _check_overrides(arguments: list[str]) -> None:
    """Refuses a `--config.field` that the config does not have, and says which field comes nearest."""
    files = [argument.removeprefix("--config=") for argument in arguments if argument.startswith("--config=")]
    files += [value for flag, value in itertools.pairwise(arguments) if flag == "--config"]
    if not files:
        lost = [argument for argument in arguments if argument.startswith("--config.")]
        if lost:
            raise UserError(f"{lost[0]} replaces a field of a config, and --config=FILE is missing")
        return
    fields = flatten(load_config(files[-1]))
    for argument in arguments:
        field = argument.removeprefix("--config.").split("=")[0]
        if not argument.startswith("--config.") or field in fields:
            continue
        inside = [name for name in fields if name.startswith(f"{field}.")]
        if hint := replaced_field(field, fields | _given(arguments)):
            raise UserError(f"--config.{hint}")
        near = difflib.get_close_matches(field, fields, n=1, cutoff=0.5)
        hint = f"did you mean --config.{near[0]}?" if near else f"it has {', '.join(fields)}"
        if inside:
            hint = f"it is a group of {', '.join(inside)}"
        raise UserError(f"the config {files[-1]} has no field {field!r}; {hint}")


OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    errno.EADDRINUSE,
}


def _is_of_the_machine(error: Exception) -> bool:
    """Whether the operating system refused something, such as a write to a full disk, which no code can mend."""
    return isinstance(error, OSError) and error.errno in OF_THE_MACHINE


def _keep_traceback(error: Exception) -> None:
    """Write the traceback to WORKDIR/errors, if the command has a work directory that exists."""
    workdir = flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
    if not workdir or not epath.Path(workdir).is_dir():
        return
    now = datetime.datetime.now(datetime.UTC)
    name = f"{now:%Y-%m-%dT%H-%M-%S}-{socket.gethostname()}-{os.getpid()}.txt"
    path = epath.Path(workdir) / "errors" / name
    about = f"{' '.join(sys.argv)}\n\n"
    with contextlib.suppress(OSError):  # the error itself is what must be seen
        path.parent.mkdir(exist_ok=True)
        files.write_whole(path, about + "".join(traceback.format_exception(error)))
        print(f"kept in {path}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    """The operating system's errors without their number, after the file that they are about."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _fail(message: str, *, code: int) -> NoReturn:
    message = " ".join(message.split("\n"))  # a name may hold a line break
    if len(message) > 2 * MESSAGE:
        message = f"{message[:MESSAGE]} ... {message[-MESSAGE:]}"
    print(f"error: {message}", file=sys.stderr)
    interrupts.leave_at_once()
    sys.exit(code)

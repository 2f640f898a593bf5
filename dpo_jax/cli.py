"""What all commands share: configs, flags, `--help`, and errors in one sentence."""

import contextlib
import datetime
import errno
import importlib.util
import inspect
import logging
import math
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

import dpo_jax
from dpo_jax import command_help, files, interrupts, streams
from dpo_jax.bundled import config_names, find_config, package_path
from dpo_jax.errors import UserError
from dpo_jax.nearest import nearest_field

TRACEBACK = flags.DEFINE_bool("traceback", False, "Show the whole traceback of an error instead of one sentence.")


MESSAGE = 1000
"""Characters at the beginning and at the end of a message that are always shown."""


def run(main: Callable[[], None]) -> NoReturn:
    """Parse the flags, run `main` and exit.

    The exit code is 0 when `main` returned, 1 after an error, 2 for wrong flags, 130 after Ctrl-C.
    """
    streams.protect()
    interrupts.await_first()
    sys.argv[1:] = map(expand_path, sys.argv[1:])
    if {"--help", "-h", "-help", "--helpfull"} & set(sys.argv[1:]):
        _show_help(main)
    if "--version" in sys.argv[1:]:
        print(f"dpo_jax {dpo_jax.__version__}")
        sys.exit(0)
    try:
        given = _config_given(sys.argv[1:])
        sys.argv[1:] = _with_config_files(sys.argv[1:])
        _check_overrides(sys.argv[1:], given)
        _check_addresses(sys.argv[1:])
        rest = flags.FLAGS(sys.argv)
        _check_finite()
    except (flags.Error, ValueError, OSError) as error:
        end = "" if str(error).endswith(("?", ".")) else "."
        _fail(f"{error}{end} Run with --help to see the flags.", code=2)
    if len(rest) > 1:
        _fail(
            f"unexpected argument {rest[1]!r}: every option is a flag, --name=value. Run with --help to see them.",
            code=2,
        )
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
    """Silence the log messages of libraries: threads of Orbax would repeat an error hundreds of times."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(level)
    if level > logging.ERROR:
        sys.unraisablehook = interrupts.raise_again(lambda unraisable: None)


def _show_help(main: Callable[[], None]) -> NoReturn:
    fields = ""
    if _Config.describe is not None:
        try:
            given = _config_given(sys.argv[1:])
            fields = _Config.describe(_choose(load_config(given)) if given else None)
        except UserError as error:
            _fail(str(error), code=2)
    print(command_help.help_text(inspect.getmodule(main), fields))
    sys.exit(0)


def expand_path(argument: str) -> str:
    """Return the argument with the paths that shells leave: `~`, and files of the package outside the repository.

    Both are looked for where a path may begin, as in --output=~/x and --models=base=dpo_jax/tiny/model.
    """
    argument = re.sub(r"(^|[=,])~(?=/|,|$)", lambda found: found[1] + os.path.expanduser("~"), argument)
    return re.sub(r"(^|[=,])(dpo_jax/[^,]+)", lambda found: found[1] + package_path(found[2]), argument)


class _Config:
    describe: Callable[[ConfigDict | None], str] | None = None
    choose: Callable[[ConfigDict, str], None] = lambda config, method: None


class _ConfigParser(config_flags.config_flags.ConfigFileFlagParser):
    """Gives a config the fields of the method that --config.loss.name chooses, before the fields are set."""

    def parse(self, path: str) -> ConfigDict:
        config = super().parse(path)
        _choose(config)
        return config


def _choose(config: ConfigDict) -> ConfigDict:
    """Make the method of --config.loss.name, if there is one, the method of a config."""
    name = _given(sys.argv[1:]).get("loss.name")
    if name is not None and name != config.get("loss", {}).get("name"):
        _Config.choose(config, name)
    return config


def define_config(
    help: str = "Config to use.",
    choose: Callable[[ConfigDict, str], None] = _Config.choose,
    describe: Callable[[ConfigDict | None], str] | None = None,
) -> flags.FlagHolder:
    """Declare --config, which takes the name of a config that comes with dpo_jax, or a file, each with a variant.

    Args:
        help: what the config is for.
        choose: makes another method that of a config.
        describe: returns the text about the fields of the given config, or of the defaults, that ends --help.
    """
    _Config.describe, _Config.choose = describe, choose
    forms = f"NAME, FILE, NAME:variant or FILE:variant. Names: {', '.join(config_names())}."
    holder = config_flags.DEFINE_config_file("config", None, f"{help} {forms}", lock_config=True)
    flags.FLAGS["config"].parser = _ConfigParser("config")
    return holder


def load_config(spec: str) -> ConfigDict:
    """Return the config that `NAME`, `FILE`, `NAME:variant` or `FILE:variant` describes."""
    path, _, argument = find_config(spec).partition(":")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{path} is not a config file, which is Python and ends in .py; name a config or such a file")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"{path} has no function get_config(arg), so it is not a config file")
    return module.get_config(argument or None)


def flatten(config: ConfigDict) -> dict[str, Any]:
    """Return every field of a config by its dotted path."""

    def walk(node: ConfigDict, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, ConfigDict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(walk(config, ""))


def unflatten(fields: dict[str, Any]) -> ConfigDict:
    """Return the config whose `flatten` gives these fields."""
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
    """Return a copy of the config with other values of some fields, given by their dotted paths."""
    return unflatten(flatten(config) | fields)


def replaced_field(field: str, fields: Mapping[str, Any]) -> str | None:
    """Return what to set in place of a field of earlier versions, as a sentence that begins with its name, or None.

    Args:
        field: dotted path of the field.
        fields: all fields of the config with their values.
    """
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
    """Return the fields that the arguments `--config.field=value` set."""
    pairs = (argument.removeprefix("--config.").partition("=") for argument in arguments if "--config." in argument)
    return {field: value for field, _, value in pairs}


def _check_finite() -> None:
    """Refuse flags that are NaN, which passes all bounds, or infinite. Fields of a config have their own check."""
    for name in flags.FLAGS:
        value = flags.FLAGS[name].value
        if isinstance(value, float) and not math.isfinite(value) and not name.startswith("config."):
            raise UserError(f"--{name}={value} must be a finite number")


def _check_addresses(arguments: list[str]) -> None:
    """Refuse web addresses in place of paths; only judges can have an address."""
    for argument in arguments:
        found = re.match(r"(--(?!judge)[\w.]+)=(?:.*,)?(?:\w+=)?(?P<address>(?:https?|ftp|hf)://[^,]*)", argument)
        if found:
            raise UserError(
                f"{found[1]}={found['address']} is an address on the web, but a path or a hub id is "
                "needed. Download the file first"
            )


def _is_config(arguments: list[str], i: int) -> bool:
    """Whether argument `i` is the value of --config, which is the argument before it."""
    return i > 0 and arguments[i - 1] in ("--config", "-config")


def _config_given(arguments: list[str]) -> str | None:
    """Return the last config that the arguments name, as they name it."""
    given = None
    for i, argument in enumerate(arguments):
        if found := re.match(r"--?config=(.*)", argument, re.DOTALL):
            given = found[1]
        elif _is_config(arguments, i):
            given = argument
    return given


def _with_config_files(arguments: list[str]) -> list[str]:
    """Return the arguments with the path of a config file wherever --config has the name of a config."""
    found = []
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if equals and flag in ("--config", "-config"):
            argument = f"{flag}={find_config(value)}"
        elif _is_config(arguments, i):
            argument = find_config(argument)
        found.append(argument)
    return found


def _check_overrides(arguments: list[str], given: str | None) -> None:
    """Refuse a `--config.field` that the config does not have, and say which field comes nearest.

    Args:
        arguments: of the command.
        given: the config, as the arguments name it.
    """
    overrides = [argument for argument in arguments if argument.startswith("--config.")]
    if given is None:
        if overrides:
            raise UserError(f"{overrides[0]} replaces a field of a config, but --config=NAME_OR_FILE is missing")
        return
    fields = flatten(_choose(load_config(given)))
    known = fields | _given(arguments)
    check_fields_exist([argument.removeprefix("--config.").split("=")[0] for argument in overrides], fields, known)


def check_fields_exist(names: Iterable[str], fields: Mapping[str, Any], given: Mapping[str, Any] | None = None) -> None:
    """Raise a UserError for a name that is not a field of a config; it says which field comes nearest.

    Args:
        names: dotted paths.
        fields: of the config, by dotted path.
        given: the fields with the values that replace theirs.
    """
    for name in names:
        if name not in fields:
            raise UserError(unknown_field(name, fields, given or fields))


def unknown_field(name: str, fields: Iterable[str], given: Mapping[str, Any]) -> str:
    """Return a sentence about a name that is not a field of a config; it says which field comes nearest.

    Args:
        name: dotted path.
        fields: paths of the fields that there are.
        given: the fields of the config with their values.
    """
    if instead := replaced_field(name, given):
        return f"config.{instead}"
    if inside := [field for field in fields if field.startswith(f"{name}.")]:
        hint = f"it is a group of {', '.join(inside)}"
    elif near := nearest_field(name, fields):
        hint = f"did you mean config.{near}?"
    else:
        hint = "--help of dpo_jax.train and dpo_jax.online lists the fields"
    return f"the config has no field {name!r}; {hint}"


OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOMEM),
    *(errno.EMFILE, errno.ENFILE, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.EFBIG, errno.EBUSY, errno.ENOLCK, errno.EOPNOTSUPP, errno.ETIMEDOUT, errno.EADDRINUSE),
}


def _is_of_the_machine(error: Exception) -> bool:
    """Whether the operating system refused something, for example a write to a full disk."""
    return isinstance(error, OSError) and error.errno in OF_THE_MACHINE


def _keep_traceback(error: Exception) -> None:
    """Write the traceback to WORKDIR/errors, if the command has a work directory that exists."""
    workdir = flags.FLAGS.workdir if "workdir" in flags.FLAGS else None
    if not workdir or not epath.Path(workdir).is_dir():
        return
    now = datetime.datetime.now(datetime.UTC)
    name = f"{now:%Y-%m-%dT%H-%M-%S}-{socket.gethostname()}-process_{streams.process()}-{os.getpid()}.txt"
    path = epath.Path(workdir) / "errors" / name
    about = f"{' '.join(sys.argv)}\n\n"
    with contextlib.suppress(OSError):  # the error itself is what must be seen
        path.parent.mkdir(exist_ok=True)
        files.write_whole(path, about + "".join(traceback.format_exception(error)))
        print(f"kept in {path}", file=sys.stderr)


def _sentence(error: Exception) -> str:
    """Return the message of an error; for one of the operating system, the file and the reason without its number."""
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

"""Errors that a user can mend, each one sentence: what is wrong, where, and what to do.

`cli.run` prints only these without a traceback. Every other exception is a bug, and its traceback is shown and kept.
The subclasses are also the errors of the operating system that Python programs expect in their place.
"""


class UserError(ValueError):
    """An input, a setting or a file that cannot be used as it is; the message says what to change."""


class MissingFileError(FileNotFoundError, UserError):
    """A file or folder that a command needs does not exist."""


class ExistingFileError(FileExistsError, UserError):
    """Something is already where a command would write."""


class InUseError(BlockingIOError, UserError):
    """Another command is writing to the same folder."""


class EnvironmentFault(OSError, UserError):
    """The machine, a file system, or a program that dpo_jax was told to ask does not do its part."""


class OutsideProcessError(ChildProcessError, EnvironmentFault):
    """A process that was started for the command has failed."""


class OutsideConnectionError(ConnectionError, EnvironmentFault):
    """A server that was to be asked cannot be, or answers nonsense."""


class OutsideTimeoutError(TimeoutError, EnvironmentFault):
    """A program or server has not answered in time."""

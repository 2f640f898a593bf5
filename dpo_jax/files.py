"""Reads files from outside with one clear sentence for any error, and writes dpo_jax's own files completely or not at
all.

Every text file goes through `read_text` or `read_lines`, every JSON through `parse_json`, `read_json` or
`read_json_lines`, so that all commands treat encodings, line ends and damage alike. `conform` checks a schema (any type
that pydantic understands). Errors are UserErrors that begin with the name of the file.
"""

import contextlib
import functools
import json
import os
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import pydantic
from etils import epath

from dpo_jax.errors import MissingFileError, UserError

T = TypeVar("T")

MAX_TEXT_BYTES = 2**30
"""Largest size of a text file. The largest prompt lists have a few MB, so a larger file is a mistake."""

_SIGNS = (  # the beginnings of files that are often mistaken for another kind
    (b"version https://git-lfs.github.com/spec", "a Git LFS pointer, not the file itself: fetch it with git lfs pull"),
    (b"<!doctype", "a web page: the download failed or needs a login; download the file again"),
    (b"<html", "a web page: the download failed or needs a login; download the file again"),
    (b"<?xml", "an XML page, often a server's error: download the file again"),
    (b"\x80\x02", "a Python pickle, which can run code when opened; convert it to .safetensors first"),
    (b"\x80\x03", "a Python pickle, which can run code when opened; convert it to .safetensors first"),
    (b"\x80\x04", "a Python pickle, which can run code when opened; convert it to .safetensors first"),
    (b"\x80\x05", "a Python pickle, which can run code when opened; convert it to .safetensors first"),
    (b"PK\x03\x04", "a zip archive (PyTorch's .pt and .ckpt files are such archives); unpack or convert it first"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive; unpack it first"),
    (b"GGUF", "a GGUF file, whose weights are quantised; use the same model in bfloat16 or fp8 as .safetensors"),
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"SQLite format 3", "an SQLite database"),
)


_NO_TEXT = (b"PK\x03\x04",)
"""Beginnings that are valid UTF-8, but are never the beginning of a text."""


def what_it_is(head: bytes) -> str | None:
    """Return the actual kind of a file that begins with `head` (64 bytes are enough), or None if it is not known."""
    if not head:
        return "empty"
    if not head.strip(b"\0"):
        return "nothing but zero bytes (an interrupted copy or a full disk leaves such files); copy it again"
    lower = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for sign, meaning in _SIGNS:
        if head.startswith(sign) or (sign.startswith((b"<", b"version")) and lower.startswith(sign)):
            return meaning
    return None


def look_at(path: epath.PathLike) -> str | None:
    """Return `what_it_is` for a file."""
    with epath.Path(path).open("rb") as file:
        return what_it_is(file.read(64))


def why(path: epath.PathLike, error: Exception) -> str:
    """Return why a library cannot read a file: its actual kind, if known, or the first line of the error."""
    with contextlib.suppress(OSError):
        known = look_at(path)
        if known and known not in ("a Parquet file", "an Arrow file"):
            return f"it is {known}"
    return next(iter(str(error).splitlines()), type(error).__name__)


def check_inside(path: epath.PathLike, folder: epath.PathLike) -> None:
    """Raise UserError if links lead out of a folder, which may come from somebody else."""
    place, end = Path(folder).resolve(), Path(path).resolve()
    if not end.is_relative_to(place):
        raise UserError(
            f"{path} leads out of {folder}, to {end}; remove the link, or link the whole data set in place of a part"
        )


def is_local(path: epath.PathLike) -> bool:
    """Return whether a path is in a file system, and not in an object store (gs://, s3://)."""
    return "://" not in str(path)


def check_regular(path: epath.PathLike) -> epath.Path:
    """Return the path if it is a file; raise a UserError for a folder, a device, a pipe, or a missing file."""
    path = epath.Path(path)
    if is_local(path):
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            raise MissingFileError(f"{path} does not exist") from None
        except (OSError, ValueError) as error:  # ValueError: the name has a null byte
            raise UserError(f"{str(path)!r} can't be read: {getattr(error, 'strerror', None) or error}") from None
        if stat.S_ISDIR(mode):
            raise UserError(f"{path} is a folder, and a file is needed")
        if not stat.S_ISREG(mode):
            raise UserError(f"{path} is not a regular file")
    elif not path.exists():
        raise MissingFileError(f"{path} does not exist")
    return path


def check_tree(folder: epath.PathLike) -> None:
    """Call `check_regular` for all files below a folder; object stores have only regular files."""
    if is_local(folder):
        for place, _, names in os.walk(folder):
            for name in names:
                check_regular(Path(place) / name)


def read_bytes(path: epath.PathLike, limit: int) -> bytes:
    """Return the contents of a file of at most `limit` bytes; never opens a device or a pipe, which may have no end."""
    path = check_regular(path)
    size = path.stat().length
    if size > limit:
        raise UserError(f"{path} has {size:,} bytes; such a file has at most {limit:,}")
    with path.open("rb") as file:
        return file.read(limit)


def read_text(path: epath.PathLike, limit: int = MAX_TEXT_BYTES) -> str:
    r"""Return the text of a UTF-8 file, with or without byte order mark (UTF-16 needs one), line ends as \n."""
    return decode_text(read_bytes(path, limit), str(path))


def decode_text(data: bytes, where: str) -> str:
    """Return the text of bytes, as `read_text`; errors call them `where`."""
    encoding = "utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        known = what_it_is(data[:64])
        if known:
            raise UserError(f"{where} is {known}") from None
        line = data.count(b"\n", 0, error.start) + 1
        found = data[error.start : error.start + 1].hex()
        raise UserError(f"{where}, line {line} is not valid UTF-8 (byte 0x{found}); save the file as UTF-8") from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    known = (
        what_it_is(data[:64]) if data.startswith(_NO_TEXT) or text[:64].lstrip().startswith(("<", "version")) else None
    )
    if known:
        raise UserError(f"{where} is {known}")
    if "\0" in text:
        place = f"{where}, line {text.count(chr(10), 0, text.index(chr(0))) + 1}"
        known = what_it_is(data[:64])
        reason = "has a null byte: it is damaged, or UTF-16 without a byte order mark; save the file as UTF-8"
        raise UserError(f"{where} is {known}" if known else f"{place} {reason}")
    return text


def is_text(value: str) -> bool:
    """Return False for lone surrogates, which Python makes of the bytes of a name that is not UTF-8."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_lines(path: epath.PathLike) -> list[str]:
    r"""Return the lines of a text file. Unlike splitlines, it does not split at form feeds and U+2028."""
    return split_lines(read_text(path))


def split_lines(text: str) -> list[str]:
    """Return the lines of a text, as `read_lines` does."""
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def parse_json(text: str, where: str) -> Any:
    """Return the value of a JSON text, called `where` in errors. Raises a UserError if it is invalid or nested too
    deeply."""
    try:
        value = json.loads(text, object_pairs_hook=_once)
        if "\\ud" in text or "\\uD" in text:  # a surrogate escape is not text without its other half
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        raise UserError(f"{where} is not valid JSON (half a surrogate pair is no character)") from None
    except json.JSONDecodeError as error:
        known = what_it_is(text[:64].encode(errors="replace"))
        reason = f"{error.msg}, line {error.lineno}, column {error.colno}"
        raise UserError(f"{where} is {known}" if known else f"{where} is not valid JSON ({reason})") from None
    except RecursionError:
        raise UserError(f"{where} is not valid JSON (nested too deeply)") from None
    except ValueError as error:  # an integer with more digits than Python converts
        raise UserError(f"{where} is not valid JSON ({str(error).split(';')[0]})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object's fields; UserError for duplicate names, of which Python silently keeps the last."""
    value = dict(pairs)
    if len(value) < len(pairs):
        ((name, _),) = Counter(name for name, _ in pairs).most_common(1)
        raise UserError(f"it has the field {name!r} twice")
    return value


def read_json(path: epath.PathLike, schema: type[T] | Any = Any, limit: int = MAX_TEXT_BYTES) -> T:
    """Return the value of a JSON file, which must conform to `schema`."""
    return conform(parse_json(read_text(path, limit), str(path)), schema, str(path))


def read_json_lines(path: epath.PathLike, schema: type[T] | Any = Any, strict: bool = True) -> Iterator[tuple[int, T]]:
    """Yield (line number from 1, value) for every line of a JSONL file that is not blank; `strict` as in `conform`."""
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            where = f"{path}, line {number}"
            yield number, conform(parse_json(line, where), schema, where, strict)


def conform(value: Any, schema: type[T] | Any, where: str, strict: bool = True) -> T:
    """Return the value validated by `schema` (a type, TypedDict, dataclass or pydantic model).

    Raises one UserError that lists all wrong fields with their values. Unless `strict` is False nothing is converted:
    "1" is not a number, but 1 is a float.
    """
    if schema is Any:
        return value
    of: Any = schema
    try:
        return _adapter(of).validate_python(value, strict=strict)
    except pydantic.ValidationError as error:
        raise UserError(f"{where}: {_problems(error)}") from None


@functools.lru_cache(maxsize=256)  # building one takes as long as validating hundreds of values
def _adapter(schema: Any) -> "pydantic.TypeAdapter[Any]":
    return pydantic.TypeAdapter(schema)


def _problems(error: pydantic.ValidationError, several: int = 5) -> str:
    problems = []
    for problem in error.errors(include_url=False, include_context=False):
        field = ".".join(str(part) for part in problem["loc"]) or "the whole"
        message = problem["msg"].removeprefix("Value error, ")
        found = repr(problem["input"])
        found = "" if problem["type"] == "missing" else f", not {found if len(found) < 60 else found[:57] + '...'}"
        problems.append(f"{field}: {message[:1].lower()}{message[1:]}{found}")
    more = f"; and {len(problems) - several} more" if len(problems) > several else ""
    return "; ".join(problems[:several]) + more


def write_whole(path: epath.PathLike, data: str | bytes) -> None:
    """Write a file completely or not at all, replacing an older one; creates its folder if it does not exist."""
    with writing(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[IO[bytes]]:
    """Yield a binary file that replaces `path` if the block succeeds and is removed if it fails.

    It has a random name at first, so that it follows no link that somebody else has placed, and is flushed to the disk
    (fsync) before and after it is renamed, so that a power cut leaves the old file or the new one.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(partial_name(path.name))
    if not is_local(path):  # an object store: the object appears when it is closed
        try:
            with partial.open("wb") as remote:
                yield remote
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return
    try:
        with open(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, 0o666), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def append(path: epath.PathLike, text: str) -> None:
    """Append to a file that dpo_jax wrote and flush it to the disk (fsync); follows no link."""
    if not is_local(path):  # object stores cannot append
        path = epath.Path(path)
        write_whole(path, (path.read_bytes() if path.exists() else b"") + text.encode())
        return
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW, 0o666), "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def partial_name(name: str) -> str:
    """Return a random hidden name for a file that will be called `name`: `.config.json.4f1d0c2b.partial`."""
    return f".{name}.{secrets.token_hex(4)}.partial"


def is_partial(name: str) -> bool:
    """Return whether `partial_name` made this name; such files were left by killed processes."""
    return name.startswith(".") and name.endswith(".partial")


def remove_partials(folder: epath.PathLike) -> None:
    """Remove the half-written files that killed processes left in a folder; call it while nobody else writes there."""
    if not is_local(folder) or not os.path.isdir(folder):
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_partial(entry.name) and not entry.is_dir(follow_symlinks=False):
                Path(entry.path).unlink(missing_ok=True)


def sync(path: epath.PathLike) -> None:
    """Make the operating system write a file or the entries of a folder to the disk; does nothing on object stores."""
    if not is_local(path):
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot sync folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: epath.PathLike) -> None:
    """Call `sync` for all files and folders below a folder, and for the folder itself."""
    if not is_local(folder):
        return
    for place, _, names in os.walk(folder):
        for name in names:
            sync(Path(place) / name)
        sync(place)


@contextlib.contextmanager
def new_folder(folder: epath.PathLike) -> Iterator[epath.Path]:
    """Yield a temporary sibling with a random name that becomes `folder` if the block succeeds and is removed if it
    fails.

    Raises a UserError if `folder` exists and is not empty: nothing is ever overwritten.
    """
    folder = epath.Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists and is not an empty folder; choose another output or remove it")
    unfinished = folder.parent / partial_name(folder.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished.mkdir()
    try:
        yield unfinished
        sync_tree(unfinished)
        if folder.exists():
            folder.rmdir()
        unfinished.rename(folder)
    except BaseException:
        unfinished.rmtree(missing_ok=True)
        raise
    sync(folder.parent)


def readable_bytes(size: int) -> str:
    """Return a number of bytes as text, for example "3.4 GiB"."""
    power = min(max(size.bit_length() - 1, 0) // 10, 4)
    return f"{size / 2 ** (10 * power):.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)

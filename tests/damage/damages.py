"""What can be wrong with a file: of any kind, of JSON, of safetensors, of tables, each drawn from a seed.

A damage is a function of the file and a random generator that changes the file in place and returns what it did, for
the table and for messages, or None where it doesn't apply.
"""

import gzip
import io
import json
import os
import random
import sqlite3
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

Damage = Callable[[Path, random.Random], str | None]

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d" * 32 + b"\nsize 12345\n"


def _bytes(name: str, change: Callable[[bytes, random.Random], bytes]) -> tuple[str, Damage]:
    def damage(file: Path, rng: random.Random) -> str | None:
        data = file.read_bytes()
        changed = change(data, rng)
        if changed == data:
            return None
        file.write_bytes(changed)
        return name

    return name, damage


def _flip(data: bytes, rng: random.Random, count: int) -> bytes:
    changed = bytearray(data)
    for _ in range(count if data else 0):
        changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _fill(data: bytes, rng: random.Random, size: int, *, zeros: bool) -> bytes:
    start = rng.randrange(max(len(data), 1))
    size = min(size, len(data) - start)
    return data[:start] + (bytes(size) if zeros else rng.randbytes(size)) + data[start + size :]


def _insert(data: bytes, rng: random.Random, what: bytes) -> bytes:
    at = rng.randrange(len(data) + 1)
    return data[:at] + what + data[at:]


def _utf16(data: bytes, rng: random.Random) -> bytes:
    try:
        return data.decode().encode(rng.choice(["utf-16", "utf-16-le"]))
    except UnicodeDecodeError:
        return data


def _zipped(data: bytes, rng: random.Random) -> bytes:
    return b"PK\x03\x04" + data


def _gone(file: Path, rng: random.Random) -> str:
    file.unlink()
    return "absent"


def _folder(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.mkdir()
    return "a folder"


def _pipe(file: Path, rng: random.Random) -> str:
    file.unlink()
    os.mkfifo(file)
    return "a pipe"


def _endless(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.symlink_to("/dev/zero")
    return "a link to /dev/zero"


def _loop(file: Path, rng: random.Random) -> str:
    file.unlink()
    file.symlink_to(file)
    return "a link to itself"


def _sparse(file: Path, rng: random.Random) -> str:
    os.truncate(file, 300 * 2**30)
    return "300 GB of zeros behind it"


BYTES: dict[str, Damage] = dict(
    [
        _bytes("empty", lambda data, rng: b""),
        _bytes("half", lambda data, rng: data[: len(data) // 2]),
        _bytes("cut", lambda data, rng: data[: rng.randrange(max(len(data), 1))]),
        _bytes("last byte missing", lambda data, rng: data[:-1]),
        _bytes("one bit", lambda data, rng: _flip(data, rng, 1)),
        _bytes("64 bits", lambda data, rng: _flip(data, rng, 64)),
        _bytes("noise", lambda data, rng: _fill(data, rng, rng.choice([8, 100, 4000]), zeros=False)),
        _bytes("zeros", lambda data, rng: _fill(data, rng, rng.choice([8, 100, 4000]), zeros=True)),
        _bytes("all zeros", lambda data, rng: bytes(len(data))),
        _bytes("noise alone", lambda data, rng: rng.randbytes(max(len(data), 100))),
        _bytes("garbage behind", lambda data, rng: data + rng.randbytes(100)),
        _bytes("twice", lambda data, rng: data + data),
        _bytes("Git LFS pointer", lambda data, rng: LFS),
        _bytes("web page", lambda data, rng: b"<!doctype html><html><body>log in first</body></html>"),
        _bytes("pickle", lambda data, rng: b"\x80\x04\x95\x1a\x00\x00\x00\x00\x00\x00\x00\x8c\x02os" + data[:100]),
        _bytes("zip", _zipped),
        _bytes("gzip", lambda data, rng: gzip.compress(data, mtime=0)),
        _bytes("UTF-16", _utf16),
        _bytes("byte order mark", lambda data, rng: b"\xef\xbb\xbf" + data),
        _bytes("a byte of Latin-1", lambda data, rng: _insert(data, rng, b"\xe9")),
        _bytes("a NUL", lambda data, rng: _insert(data, rng, b"\0")),
        _bytes("CR LF", lambda data, rng: data.replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")),
        ("absent", _gone),
        ("a folder", _folder),
        ("a pipe", _pipe),
        ("a link to /dev/zero", _endless),
        ("a link to itself", _loop),
        ("300 GB", _sparse),
    ]
)
"""Of any file."""

ODD: tuple[Any, ...] = (
    None, True, "text", "", "1", -1, 0, 0.5, 10**12, 1e300, float("nan"), float("inf"), [], {}, [[]], ["x"] * 3,
    {"a": 1},
)  # fmt: skip


def nodes(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Paths of all values inside a JSON value, but for itself."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from nodes(inner, (*path, key))


def damage_json(text: str, rng: random.Random) -> tuple[str, str] | None:
    """(text, what was done)."""
    value = json.loads(text)
    kind = rng.choice(
        ["odd"] * 8 + ["without"] * 2 + ["whole", "deep", "number", "twice", "comma", "surrogate", "extra"]
    )
    if kind == "whole":
        other = rng.choice([None, 1, "text", [], {}, [value], {"a": value}, True])
        return json.dumps(other), f"{json.dumps(other)[:20]} alone"
    if kind == "comma":
        return text.rstrip()[:-1] + "," + text.rstrip()[-1], "a comma too many"
    paths = list(nodes(value))
    if not paths:
        return None
    # All fields of a level alike: few long lists would otherwise take nearly all.
    depth = rng.choice(sorted({len(path) for path in paths}))
    path = rng.choice([path for path in paths if len(path) == depth])
    node = value
    for key in path[:-1]:
        node = node[key]
    name = ".".join(map(str, path))
    if kind == "without":
        del node[path[-1]]
        return json.dumps(value), f"without {name}"
    if kind == "extra" and isinstance(node, dict):
        node[f"{path[-1]}_of_old"] = rng.choice(ODD)
        return json.dumps(value), f"an unknown field beside {name}"
    mark = "@@mark@@"
    if kind == "twice" and isinstance(node, dict):
        node[mark] = 0
        twice = f"{json.dumps(path[-1])}: {json.dumps(rng.choice(ODD))}"
        return json.dumps(value).replace(f'"{mark}": 0', twice), f"{name} twice"
    odd = rng.choice(ODD)
    if kind in ("deep", "number", "surrogate"):
        replacement = {"deep": "[" * 5000 + "]" * 5000, "number": "9" * 5000, "surrogate": '"\\ud800"'}[kind]
        node[path[-1]] = mark
        return json.dumps(value).replace(f'"{mark}"', replacement), f"{name}: {kind}"
    if node[path[-1]] == odd and type(node[path[-1]]) is type(odd):
        return None
    node[path[-1]] = odd
    return json.dumps(value), f"{name} = {odd!r}"


def json_value(file: Path, rng: random.Random) -> str | None:
    found = damage_json(file.read_text(), rng)
    if found is None:
        return None
    file.write_text(found[0])
    return f"JSON: {found[1]}"


def json_line(file: Path, rng: random.Random) -> str | None:
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    found = damage_json(lines[number], rng)
    if found is None:
        return None
    lines[number] = found[0]
    file.write_text("\n".join(lines) + "\n")
    return f"JSON, line {number + 1}: {found[1]}"


def text_line(file: Path, rng: random.Random) -> str | None:
    """What is odd in a line of text, and still means the same or is refused."""
    lines = file.read_text().splitlines()
    number = rng.randrange(len(lines))
    kind = rng.choice(["blank lines", "spaces around", "very long", "NUL", "tab"])
    if kind == "blank lines":
        lines[-1:] = [lines[-1], "", "  ", ""]
    elif kind == "spaces around":
        lines[number] = f"  {lines[number]} \t"
    elif kind == "very long":
        lines[number] += " and" * 100_000
    else:
        lines[number] = {"NUL": "\0", "tab": "\t"}[kind] + lines[number]
    file.write_text("\n".join(lines) + "\n")
    return f"text: {kind}"


def safetensors(file: Path, rng: random.Random) -> str | None:
    """What only a safetensors file can have."""
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + size]), bytearray(data[8 + size :])
    name = rng.choice([name for name in header if name != "__metadata__"])
    kind = rng.choice(
        [
            "length",
            "header",
            "nan",
            "nan",
            "inf",
            "missing",
            "extra",
            "dtype",
            "shape",
            "offsets",
            "metadata",
            "overlap",
        ]
    )
    info = header[name]
    start, stop = info["data_offsets"]
    if kind == "length":
        value = rng.choice([0, 1, size - 1, size + 1, 2**31, 2**63 - 1, 2**64 - 1, len(data)])
        file.write_bytes(struct.pack("<Q", value) + data[8:])
        return f"safetensors: a header of {value} bytes"
    if kind == "header":
        found = damage_json(json.dumps({key: header[key] for key in [*list(header)[:3], name]}), rng)
        if found is None:
            return None
        text = found[0]
        if text.startswith("{") and not text.startswith(('{"a"', "{}")):
            rest = {key: value for key, value in header.items() if f'"{key}"' not in text}
            text = text[:-1] + (", " if rest else "") + json.dumps(rest)[1:]
        what = f"header, {found[1]}"
        file.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode() + bytes(body))
        return f"safetensors: {what}"
    if kind in ("nan", "inf"):
        width = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8}.get(info["dtype"])
        if width is None or stop == start:
            return None
        number = struct.pack({4: "<f", 2: "<e", 8: "<d"}[width], float(kind))
        number = b"\x80\x7f" if info["dtype"] == "BF16" else number
        at = start + rng.randrange((stop - start) // width) * width
        body[at : at + width] = number
    elif kind == "missing":
        del header[name]
    elif kind == "extra":
        header["a.tensor.of.another.program"] = {
            "dtype": "F32",
            "shape": [1],
            "data_offsets": [len(body), len(body) + 4],
        }
        body += bytes(4)
    elif kind == "dtype":
        info["dtype"] = rng.choice(["F8_E4M3", "F8_E5M2", "I8", "F33", "", 3, None, "F64", "F16"])
    elif kind == "shape":
        info["shape"] = rng.choice(
            [[], [-1], [0], info["shape"][::-1], [*info["shape"], 1], [2**40, 2**40], "x", [1.5]]
        )
    elif kind == "offsets":
        info["data_offsets"] = rng.choice([[-4, 0], [0, 2**62], [stop, start], [start], "x", [start, stop - 4], None])
    elif kind == "overlap":
        info["data_offsets"] = [0, stop - start]
    else:
        header["__metadata__"] = rng.choice([[], "x", {"a": 1}, {"lora_adapter_metadata": "{"}, {"format": None}])
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + bytes(body))
    return f"safetensors: {kind}"


def parquet(file: Path, rng: random.Random) -> str | None:
    """Other columns, other types, other values."""
    table = pq.read_table(file)
    name = rng.choice(table.column_names)
    kind = rng.choice(["without", "renamed", "nulls", "type", "values", "no rows", "dictionary", "large", "strings"])
    at, count = table.column_names.index(name), table.num_rows
    if kind == "without":
        table = table.remove_column(at)
    elif kind == "renamed":
        table = table.rename_columns([f"{other}_" if other == name else other for other in table.column_names])
    elif kind == "no rows":
        table = table.slice(0, 0)
    elif kind == "nulls":
        table = table.set_column(at, name, pa.nulls(count, table.schema.field(name).type))
    elif kind == "dictionary":
        try:
            table = table.set_column(at, name, table[name].dictionary_encode())
        except pa.ArrowException:
            return None
    elif kind == "large":
        wide = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary(), pa.float64(): pa.decimal128(20, 3)}
        to = wide.get(table.schema.field(name).type)
        if to is None:
            return None
        table = table.set_column(at, name, table[name].cast(to))
    elif kind == "strings":
        try:
            table = table.set_column(at, name, table[name].cast(pa.string()))
        except pa.ArrowException:
            return None
    else:
        columns: list[list] = [
            [float("nan")] * count, [-1.0] * count, [2**63 - 1] * count, ["text"] * count, [b"\xff"] * count,
            [[1, 2]] * count, [{"bytes": b"x"}] * count, [True] * count, [1e300] * count,
        ]  # fmt: skip
        table = table.set_column(at, name, pa.array(rng.choice(columns)))
    pq.write_table(table, file)
    return f"table: {name}, {kind}"


def image(file: Path, rng: random.Random) -> str | None:
    """Other things under an image's name, and odd images."""
    from PIL import Image

    kind = rng.choice(
        ["PostScript", "huge", "strip", "1-bit", "CMYK", "float", "turned", "animation", "SVG", "16 bits"]
    )
    buffer = io.BytesIO()
    if kind == "PostScript":
        buffer.write(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n%%EOF\n")
    elif kind == "SVG":
        buffer.write(b'<svg xmlns="http://www.w3.org/2000/svg" width="32" height="32"/>')
    elif kind == "huge":
        Image.new("1", (40_000, 40_000)).save(buffer, "PNG")
    elif kind == "strip":
        Image.new("RGB", (4000, 2)).save(buffer, "PNG")
    elif kind == "float":
        Image.new("F", (32, 32)).save(buffer, "TIFF")
    else:
        with Image.open(file) as opened:
            opened.load()
        if kind == "1-bit":
            opened.convert("1").save(buffer, "PNG")
        elif kind == "CMYK":
            opened.convert("CMYK").save(buffer, "JPEG")
        elif kind == "16 bits":
            opened.convert("L").convert("I;16").save(buffer, "PNG")
        elif kind == "animation":
            frame = opened.convert("RGB")
            frame.save(buffer, "GIF", save_all=True, append_images=[frame.rotate(90)])
        else:
            exif = Image.Exif()
            exif[0x0112] = 6
            opened.convert("RGB").save(buffer, "JPEG", exif=exif)
    file.write_bytes(buffer.getvalue())
    return f"image: {kind}"


def arrow(file: Path, rng: random.Random) -> str | None:
    """An Arrow table of ours with other columns or values."""
    with pa.OSFile(str(file)) as source:
        table = pa.ipc.open_file(source).read_all()
    temporary = file.with_suffix(".parquet")
    pq.write_table(table, temporary)
    what = parquet(temporary, rng)
    table = pq.read_table(temporary)
    temporary.unlink()
    if what is None:
        return None
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    return what


def sqlite(file: Path, rng: random.Random) -> str | None:
    """A file of SQLite that is whole, and in which somebody changed something."""
    connection = sqlite3.connect(file, isolation_level=None)
    tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    table = rng.choice(tables)
    column = rng.choice([row[1] for row in connection.execute(f"PRAGMA table_info({table})")])
    kind = rng.choice(["value"] * 6 + ["no rows", "a row less", "trigger", "table", "version"])
    done = True
    if kind == "value":
        value = rng.choice(
            [None, 7, -1, 0.5, 2**62, "text", "", "[1, 1]", "[NaN]", "[" * 9000, b"\xff\xfe", b"", "\ud7ff\0"]
        )
        where = f"rowid = (SELECT max(rowid) FROM {table})"
        text = "CAST(? AS TEXT)" if isinstance(value, bytes) and rng.random() < 0.5 else "?"
        try:
            done = connection.execute(f"UPDATE {table} SET {column} = {text} WHERE {where}", (value,)).rowcount > 0
        except sqlite3.IntegrityError:
            done = False
        kind = f"{column} = {value!r}"[:60]
    elif kind == "a row less" and table == "votes":
        return None  # whoever runs a study may leave out what somebody said
    elif kind in ("no rows", "a row less"):
        where = f"WHERE rowid = (SELECT max(rowid) FROM {table})" if kind == "a row less" else ""
        done = connection.execute(f"DELETE FROM {table} {where}").rowcount > 0
    elif kind == "trigger":
        connection.execute(f"CREATE TRIGGER t AFTER INSERT ON {table} BEGIN DELETE FROM {table}; END")
    elif kind == "table":
        connection.execute(f"ALTER TABLE {table} RENAME TO other")
    else:
        connection.execute(f"PRAGMA user_version = {rng.choice([-1, 0, 2, 2**31 - 1])}")
    connection.close()
    return f"SQLite: {table}, {kind}" if done else None


def npz(file: Path, rng: random.Random) -> str:
    """Arrays of a trajectory that are missing, of other shapes or types, or objects."""
    with np.load(file) as found:
        arrays = dict(found)
    name = rng.choice(sorted(arrays))
    kind = rng.choice(["missing", "extra", "nan", "inf", "shape", "row", "empty", "type", "text", "objects", "complex"])
    array = arrays[name]
    if kind in ("nan", "inf"):
        array.flat[rng.randrange(array.size)] = float(kind)
    elif kind == "missing":
        del arrays[name]
    elif kind == "extra":
        arrays["a_thing_of_old"] = array
    else:
        arrays[name] = {
            "shape": array.ravel(),
            "row": array[:1, ..., None],
            "empty": array[:0],
            "type": array.astype(np.float64),
            "text": array.astype(str),
            "objects": array.astype(object),
            "complex": array.astype(complex),
        }[kind]
    np.savez(file, **arrays)
    return f"arrays: {name}, {kind}"


SPECIAL: dict[str, tuple[Damage, ...]] = {
    ".sqlite": (sqlite,),
    ".npz": (npz,),
    ".json": (json_value,),
    ".jsonl": (json_line,),
    ".txt": (text_line,),
    ".tsv": (text_line,),
    ".csv": (text_line,),
    ".safetensors": (safetensors,),
    ".parquet": (parquet,),
    ".arrow": (arrow,),
    ".png": (image,),
    ".jpg": (image,),
}
"""By the ending of a file's name."""

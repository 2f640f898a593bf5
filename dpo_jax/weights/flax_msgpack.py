"""Reads the format of `flax.serialization`, which diffusers and transformers wrote while they had Flax models.

A file is one msgpack map of maps, keyed by the parts of a parameter's path. An array is an extension whose payload is
again msgpack: (shape, dtype's name, bytes). Files are read lazily: only the parts between the arrays' bytes are parsed,
whereas Flax decodes the whole file in memory. Specification: https://github.com/msgpack/msgpack/blob/master/spec.md
"""

from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes  # noqa: F401 -- NumPy knows the name bfloat16 from it
import numpy as np
from etils import epath

from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, what_it_is
from dpo_jax.weights.mapped_file import fetch, open_bytes

CHUNKED = "__msgpack_chunked_array__"
ARRAY, SCALAR = 1, 3  # extension codes that Flax defined
DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "bool"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8"),
)
"""Dtypes that files may name. NumPy knows others, for example that of arrays of Python objects."""


def read(path: epath.Path) -> dict[str, np.ndarray]:
    """Return every array of a file by dotted path, as a read-only view.

    Arrays above 1 GiB, which no Stable Diffusion model has, were stored in separate chunks; only these are read
    completely. Raises a UserError if the file is damaged.
    """
    parser = _Parser(open_bytes(check_regular(path)))
    known = what_it_is(parser.data[:64].tobytes())
    if known:
        raise UserError(f"{path} is {known}")
    try:
        arrays = dict(_arrays(parser.value()))
        if parser.position != len(parser.data):
            raise UserError("something follows the end")
    except (ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise UserError(f"{path} is truncated or not a Flax msgpack file; copy it again") from error
    return arrays


class _Parser:
    """Parses the part of msgpack that Flax used."""

    def __init__(self, data: np.ndarray):
        self.data = data
        self.position = 0

    def value(self) -> Any:
        """Return the value at `position`: a dict, list, str, int, True, view of bytes, or view of an array."""
        first = self._number(1)
        if first < 0x80:
            return first
        if first < 0x90:
            return self._map(first & 0x0F)
        if first < 0xA0:
            return self._list(first & 0x0F)
        if first < 0xC0:
            return self._string(first & 0x1F)
        if first == 0xC3:
            return True
        if first == 0xD8:
            return self._extension(16)
        formats: dict[int, tuple[Callable[[int], Any], int]] = {  # (parser of the content, bytes of its length)
            0xC4: (self._take, 1),
            0xC5: (self._take, 2),
            0xC6: (self._take, 4),
            0xC7: (self._extension, 1),
            0xC8: (self._extension, 2),
            0xC9: (self._extension, 4),
            0xCC: (int, 1),
            0xCD: (int, 2),
            0xCE: (int, 4),
            0xD9: (self._string, 1),
            0xDA: (self._string, 2),
            0xDE: (self._map, 2),
            0xDF: (self._map, 4),
        }
        interpret, size = formats[first]
        return interpret(self._number(size))

    def _take(self, size: int) -> np.ndarray:
        taken = self.data[self.position : self.position + size]
        if len(taken) < size:
            raise UserError("the file ends early")
        self.position += size
        return taken

    def _number(self, size: int) -> int:
        return int.from_bytes(self._take(size).tobytes(), "big")

    def _string(self, size: int) -> str:
        return self._take(size).tobytes().decode()

    def _list(self, length: int) -> list:
        return [self.value() for _ in range(length)]

    def _map(self, length: int) -> dict:
        return {self.value(): self.value() for _ in range(length)}

    def _extension(self, size: int) -> np.ndarray:
        kind = self._number(1)
        end = self.position + size
        shape, dtype, data = self.value()
        if kind not in (ARRAY, SCALAR) or self.position != end or dtype not in DTYPES:
            raise UserError("an extension that is not an array")
        return data.view(np.dtype(dtype)).reshape(shape)


def _arrays(tree: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, child in tree.items():
        if isinstance(child, np.ndarray):
            yield prefix + key, child
        elif CHUNKED in child:
            shape, chunks = ([child[of][str(i)] for i in range(len(child[of]))] for of in ("shape", "chunks"))
            yield prefix + key, np.concatenate([fetch(chunk) for chunk in chunks]).reshape(shape)
        else:
            yield from _arrays(child, f"{prefix}{key}.")

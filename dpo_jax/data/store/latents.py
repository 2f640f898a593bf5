"""Latents and embeddings that `prepare --encode` stores beside a data set, read in place of images and captions.

PREPARED/encoded/NAME/
    encoding.json              what they were made of and how; written last, when the folder is complete
    images-00000.safetensors   "moments" of the VAE's posteriors, in the order of images.arrow
    captions.arrow             the distinct captions and the empty one, sorted
    captions-00000.safetensors their "context" and "pooled", in that order

Images and captions are spread over files of equal length, except the last. Everything is bfloat16, except the XXH3 of
each view's moments and of each caption's embeddings ("moments.xxh3" ..., int64), which is compared at every read.
encoding.json holds the XXH3 of captions.arrow.

Axes: I images, V views of each, S captions, h x w latent cells, C channels (the mean's, then the log variance's),
L tokens, D context width, P pooled width.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
import xxhash
from etils import epath

from dpo_jax import files
from dpo_jax.data.images import View
from dpo_jax.data.store import checksums, table_checks
from dpo_jax.data.store.arrow_file import map_table
from dpo_jax.data.store.prepared import PreparedData, lines_of
from dpo_jax.errors import MissingFileError, UserError
from dpo_jax.streams import warn
from dpo_jax.weights import safetensors_file
from dpo_jax.weights.mapped_file import read_into

INDEX = "encoding.json"
CAPTIONS = "captions.arrow"
CAPTIONS_SCHEMA = pa.schema({"caption": pa.string()})
CHECKSUM = ".xxh3"
ROW_AXES = {"moments": 2, "context": 1, "pooled": 1}
"""The leading axes of a file's tensors: images and views, or captions. One row of them is read at a time."""
FILE_BYTES = 2**28
"""Size of a file: the most that is lost when encoding stops, and the unit that is dealt to processes."""


class DamagedLatents(UserError):
    """The stored latents of an image or embeddings of a caption are damaged."""


class _View(pydantic.BaseModel):
    top: Annotated[float, pydantic.Field(ge=0, lt=1)] | None
    left: Annotated[float, pydantic.Field(ge=0, lt=1)] | None
    flip: bool


class Settings(pydantic.BaseModel, extra="allow"):
    """The models and settings that latents were made with; all other fields are strings that are compared."""

    family: str
    resolution: Annotated[int, pydantic.Field(ge=1, le=2**16)]
    views: Annotated[list[_View], pydantic.Field(min_length=1, max_length=2**16)]


class FileLayout(pydantic.BaseModel):
    """The distribution of the rows of images or captions over files."""

    files: Annotated[int, pydantic.Field(ge=1, le=10**6)]
    rows_a_file: Annotated[int, pydantic.Field(ge=1, le=2**40)]


class Index(pydantic.BaseModel):
    """The contents of `encoding.json`."""

    facts: Settings
    images: FileLayout
    captions: FileLayout
    captions_checksum: checksums.Digest | None = None
    """Checksum of captions.arrow; None for latents of earlier versions."""


@dataclasses.dataclass(frozen=True)
class StoredLatents:
    """A finished folder of latents and embeddings."""

    folder: Path

    @property
    def facts(self) -> dict[str, Any]:
        """The models and settings that the latents were made with."""
        return self._written.facts.model_dump()

    @property
    def resolution(self) -> int:
        return self._written.facts.resolution

    @functools.cached_property
    def views(self) -> list[View]:
        return [View(view.top, view.left, view.flip) for view in self._written.facts.views]

    @property
    def has_checksums(self) -> bool:
        """True if damage can be noticed: latents of earlier versions have no checksums."""
        return self._written.captions_checksum is not None and all(file.has_checksums for file in self.files)

    @property
    def files(self) -> "list[LatentsFile]":
        return [*self._images, *self._texts]

    @property
    def row_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the moments of one view, and of a caption's context and pooled embedding."""
        return self._images[0].row_shapes | self._texts[0].row_shapes

    def read_moments(self, image: int, view: int, moments_hwC: np.ndarray) -> None:
        """Read the moments of one view of an image from disk into `moments_hwC`."""
        file, row = divmod(image, self._written.images.rows_a_file)
        self._images[file].read("moments", row * len(self.views) + view, moments_hwC)

    def read_text(self, caption: str, context_LD: np.ndarray, pooled_P: np.ndarray) -> None:
        """Read the embeddings of a caption. Like `read_moments`, raise DamagedLatents if they are absent or damaged."""
        position = bisect.bisect_left(self._captions, caption)
        if position == len(self._captions) or self._captions[position] != caption:
            raise DamagedLatents(f"{self.folder / CAPTIONS} has no caption {caption!r}")
        file, row = divmod(position, self._written.captions.rows_a_file)
        self._texts[file].read("context", row, context_LD)
        self._texts[file].read("pooled", row, pooled_P)

    def check(self) -> None:
        """Raise ValueError if a file is missing, cut short or has other rows; takes some 0.1 ms per file."""
        try:
            self._check()
        except (ValueError, OSError) as error:
            reason, data = str(error).splitlines()[0], self.folder.parents[1]
            raise UserError(
                f"the stored latents in {self.folder} are damaged ({reason}); repair them with {_command(data)}"
            ) from None

    def _check(self) -> None:
        written = self._written
        _ = self._captions  # files other than tables may be too long to read completely
        digest = written.captions_checksum
        if digest is not None and checksums.checksum(self.folder / CAPTIONS) != digest:
            raise UserError(f"{CAPTIONS} has another checksum")
        if folder_of(self.folder.parents[1], self.facts) != self.folder:
            raise UserError(f"the facts in {INDEX} do not match the name of the folder")
        images = pa.ipc.open_file(pa.memory_map(str(self.folder.parents[1] / "images.arrow")))
        number = sum(images.get_batch(i).num_rows for i in range(images.num_record_batches))
        sides = (
            ("images", written.images, self._images, number),
            ("captions", written.captions, self._texts, len(self._captions)),
        )
        for kind, table, opened, count in sides:
            rows = [file.rows for file in opened]
            if rows[:-1] != [table.rows_a_file] * (len(rows) - 1) or not 0 < rows[-1] <= table.rows_a_file:
                raise UserError(f"a file of {kind} does not have {table.rows_a_file} rows, as {INDEX} says")
            if sum(rows) != count:
                raise UserError(f"the files of {kind} have {sum(rows)} rows in all instead of {count}")
            if any(file.row_shapes != opened[0].row_shapes for file in opened):
                raise UserError(f"the files of {kind} have rows of different shapes")
        missing = {"moments", "context", "pooled"} - self.row_shapes.keys()
        if missing:
            raise UserError(f"no file has {' and '.join(sorted(missing))}")
        if any(file.lead_shape[1:] != (len(self.views),) for file in self._images):
            raise UserError(f"a file of images does not have {len(self.views)} views, as {INDEX} says")

    @functools.cached_property
    def _written(self) -> "Index":
        return files.read_json(self.folder / INDEX, Index, checksums.MAX_JSON)

    @functools.cached_property
    def _images(self) -> list["LatentsFile"]:
        return self._open("images")

    @functools.cached_property
    def _texts(self) -> list["LatentsFile"]:
        return self._open("captions")

    def _open(self, kind: str) -> list["LatentsFile"]:
        return [LatentsFile(self.folder / file_name(kind, i)) for i in range(getattr(self._written, kind).files)]

    @functools.cached_property
    def _captions(self) -> "_Strings":
        table = map_table(self.folder / CAPTIONS, CAPTIONS_SCHEMA, "make it again")
        table_checks.validate(self.folder / CAPTIONS, table)
        return _Strings(table["caption"])


class LatentsFile:
    """Reads rows of one file. It is not kept open, because there may be more files than a process may open.

    Raises ValueError or FileNotFoundError if the file is missing or damaged.
    """

    def __init__(self, path: Path):
        files.check_regular(path)
        self.path, located = path, safetensors_file.locate(epath.Path(path))
        self._offsets = {name: offset for name, (offset, _) in located.items()}
        shapes = {name: shape for name, (_, shape) in located.items()}
        known = {name: ROW_AXES[name] for name in shapes if name in ROW_AXES}
        leads = {shapes[name][:axes] for name, axes in known.items()}
        if len(leads) != 1 or any(len(shapes[name]) <= axes for name, axes in known.items()):
            raise UserError(f"{path} has neither the tensors of images nor those of captions")
        (self.lead_shape,) = leads
        """Leading axes: rows or, for images, rows and views."""
        self.rows = self.lead_shape[0]
        self.row_shapes = {name: shapes[name][axes:] for name, axes in known.items()}
        self.has_checksums = all(shapes.get(name + CHECKSUM) == self.lead_shape for name in known)

    def read(self, name: str, row: int, out: np.ndarray) -> None:
        """Read a row (for images: one view) with the size of `out`; raise DamagedLatents if it has changed."""
        if not 0 <= row < math.prod(self.lead_shape):
            raise DamagedLatents(f"{self.path} has no row {row} of {name}")
        read_into(self.path, self._offsets[name] + row * out.nbytes, out)
        if self.has_checksums and _xxh3(out) != self._checksums[name][row]:
            raise DamagedLatents(f"row {row} of {name} in {self.path} has changed")

    def damage(self) -> str | None:
        """Read the whole file and return a message about the first row that has changed, or None."""
        for name, shape in self.row_shapes.items():
            row_bytes = np.empty(math.prod(shape) * 2, np.uint8)
            for row in range(math.prod(self.lead_shape)):
                try:
                    self.read(name, row, row_bytes)
                except DamagedLatents as error:
                    return str(error)
        return None

    @functools.cached_property
    def _checksums(self) -> dict[str, np.ndarray]:
        found = {name: np.empty(math.prod(self.lead_shape), np.int64) for name in self.row_shapes}
        for name, values in found.items():
            read_into(self.path, self._offsets[name + CHECKSUM], values)
        return found


def with_checksums(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the tensors of a file and, for each, the XXH3 of its rows."""
    both = dict(tensors)
    for name, tensor in tensors.items():
        lead_shape = tensor.shape[: ROW_AXES[name]]
        number = math.prod(lead_shape)
        rows = tensor.view(np.uint8).reshape(number, tensor.nbytes // number)
        both[name + CHECKSUM] = np.array([_xxh3(row) for row in rows], np.int64).reshape(lead_shape)
    return both


def _xxh3(row: np.ndarray) -> int:
    """Return XXH3 as a signed integer, because not all readers of safetensors support unsigned 64-bit integers."""
    return int.from_bytes(xxhash.xxh3_64_digest(row.view(np.uint8).data), "big", signed=True)


class _Strings:
    """A column as a sequence of strings that stays on disk."""

    def __init__(self, column: pa.ChunkedArray):
        (self._array,) = column.chunks

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, index: int) -> str:
        return self._array[index].as_py()


def folder_of(data: Path, facts: dict[str, Any]) -> Path:
    """Return the folder for latents with these facts, of the data set in `data`."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:8]
    return data / "encoded" / f"{facts['family']}-{facts['resolution']}-{digest}"


def open_latents(data: Path, facts: dict[str, Any]) -> StoredLatents:
    """Return the finished latents with these facts.

    Raises:
        FileNotFoundError: there are none; the message says how the stored ones differ.
        ValueError: a file is missing or damaged.
    """
    folder = folder_of(data, facts)
    if is_finished(folder):
        encodings = StoredLatents(folder)
        encodings.check()
        if not encodings.has_checksums:
            warn(f"{folder} has no checksums, so damage may go unnoticed; remove it and encode again to add them")
        return encodings
    if folder.exists():
        raise MissingFileError(f"the stored latents in {folder} are not complete; continue with {_command(data)}")
    others = []
    for other in sorted((data / "encoded").glob(f"*/{INDEX}")):
        try:
            found = StoredLatents(other.parent).facts
        except ValueError as error:
            others.append(str(error))
            continue
        differing = [name for name in facts if found.get(name) != facts[name]]
        shown = [f"{name} was {_shown(found.get(name))}, now {_shown(facts[name])}" for name in differing]
        others.append(f"{other.parent.name}: {'; '.join(shown)}")
    there = f" (there are {', and '.join(others)})" if others else ""
    raise MissingFileError(
        f"{data} has no stored latents for this model and these settings{there}; make them with {_command(data)}"
    )


def _command(data: Path) -> str:
    return f"python -m dpo_jax.prepare --output={data} --encode with this --config and its overrides"


def _shown(fact: Any) -> str:
    """Return a fact as the config states it; views by their number and kinds."""
    if not isinstance(fact, list):
        return repr(fact)
    kinds = {"crops": any(view["top"] is not None for view in fact), "flips": any(view["flip"] for view in fact)}
    return f"{len(fact)} views {' and '.join(kind for kind, used in kinds.items() if used) or 'of the centre'}"


def is_finished(folder: Path) -> bool:
    return (folder / INDEX).is_file()


def choose_views(count: int, *, random_crop: bool, random_flip: bool) -> list[View]:
    """Return the views to store of every image. The first is the one of validation: the centre, not mirrored.

    All images have the same views, so the candidates of a prompt can share one, as they share a random crop.
    """
    views = [View()]
    for number in range(1, count):
        top, left = np.random.default_rng(number).random(2)
        view = View(top=float(top), left=float(left)) if random_crop else View()
        views.append(view._replace(flip=random_flip and number % 2 == 1))
    return views


def distinct_captions(prepared: PreparedData, *, caption_lines: bool = False) -> pa.Array:
    """Return all captions that training may read, sorted: those of records, of candidates, and the empty one.

    With `caption_lines`, return their lines instead.
    """
    columns = [prepared.records["caption"], pc.list_flatten(prepared.records["captions"])]
    captions = pa.chunked_array([*(chunk for column in columns for chunk in column.chunks), pa.array([""])])
    captions = pc.unique(captions.drop_null())
    if caption_lines:
        captions = pa.array({line for caption in captions.to_pylist() for line in lines_of(caption)}, pa.string())
    return captions.take(pc.sort_indices(captions))


def write_captions(folder: Path, captions: pa.Array) -> None:
    table = pa.table([captions], CAPTIONS_SCHEMA)

    def write(path: Path) -> None:
        with pa.ipc.new_file(str(path), table.schema) as writer:
            writer.write_table(table)

    write_whole(folder / CAPTIONS, write)


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Make `write` fill a temporary file that then becomes `path`: all or nothing, even if the machine crashes."""
    unfinished = path.with_name(files.partial_name(path.name))
    try:
        write(unfinished)
        files.sync(unfinished)
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    files.sync(path.parent)


def file_name(kind: str, number: int) -> str:
    return f"{kind}-{number:05}.safetensors"


def rows_a_file(row_bytes: int) -> int:
    return max(1, FILE_BYTES // row_bytes)

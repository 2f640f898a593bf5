"""Latents and embeddings that `prepare --encode` stores beside a data set, read in place of images and captions.

PREPARED/encoded/NAME/
    encoding.json              what they were made of and how; written last, when the folder is complete
    images-00000.safetensors   "moments" of the VAE's posteriors, in the order of images.arrow
    captions.arrow             the distinct captions and the empty one, sorted
    captions-00000.safetensors their "context" and "pooled", in that order

With buckets, images-832x1216-00000.safetensors and so on hold the images that are cropped to 832 x 1216 pixels (width x
height), ascending by their number. An image of records with several shapes is stored in each of these.

Images and captions are spread over files of equal length, except the last. Everything is bfloat16, except the XXH3 of
each view's moments and of each caption's embeddings ("moments.xxh3" ..., int64), which is compared at every read.
encoding.json holds the XXH3 of captions.arrow.

Axes: I images, V views of each, S captions, R rows of a table, M candidates of all records, h x w latent cells,
C channels (the mean's, then the log variance's), L tokens, D context width, P pooled width.
"""

import bisect
import dataclasses
import functools
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pydantic
import xxhash
from etils import epath

from dpo_jax import files
from dpo_jax.data.buckets import PATTERN, nearest, parse, shown
from dpo_jax.data.images import Shape, View
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
    buckets: Annotated[str, pydantic.Field(pattern=PATTERN)] = ""
    """The shapes that images are cropped to, such as "1216x832 832x1216"; empty for the square of `resolution`."""


class FileLayout(pydantic.BaseModel):
    """The distribution of the rows of images or captions over files."""

    files: Annotated[int, pydantic.Field(ge=1, le=10**6)]
    rows_a_file: Annotated[int, pydantic.Field(ge=1, le=2**40)]


class Index(pydantic.BaseModel):
    """The contents of `encoding.json`."""

    facts: Settings
    images: FileLayout | None = None
    """None with buckets."""
    buckets: dict[str, FileLayout] = {}
    """The images of each bucket, by its name in `facts`."""
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
        return self._written.facts.model_dump(exclude_unset=True)  # older latents lack some

    @functools.cached_property
    def shapes(self) -> list[Shape]:
        """The shapes that images were cropped to: one square, or those of the buckets."""
        facts = self._written.facts
        return parse(facts.buckets) if facts.buckets else [(facts.resolution, facts.resolution)]

    @functools.cached_property
    def views(self) -> list[View]:
        return [View(view.top, view.left, view.flip) for view in self._written.facts.views]

    @property
    def has_checksums(self) -> bool:
        """True if damage can be noticed: latents of earlier versions have no checksums."""
        return self._written.captions_checksum is not None and all(file.has_checksums for file in self.files)

    @property
    def files(self) -> "list[LatentsFile]":
        return [file for table in (*self._images.values(), self._texts) for file in table.files]

    @property
    def text_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of a caption's context and pooled embedding."""
        return self._texts.files[0].row_shapes

    def moments_shape(self, shape: Shape | None = None) -> tuple[int, ...]:
        """Return the shape of the moments of a view that was cropped to `shape`, by default to the first."""
        return self._images[shape or self.shapes[0]].files[0].row_shapes["moments"]

    def read_moments(self, image: int, view: int, moments_hwC: np.ndarray, shape: Shape | None = None) -> None:
        """Read the moments of a view of an image, cropped to `shape`, from disk into `moments_hwC`."""
        table = self._images[shape or self.shapes[0]]
        file, row = divmod(table.row_of(image), table.layout.rows_a_file)
        table.files[file].read("moments", row * len(self.views) + view, moments_hwC)

    def read_text(self, caption: str, context_LD: np.ndarray, pooled_P: np.ndarray) -> None:
        """Read the embeddings of a caption. Like `read_moments`, raise DamagedLatents if they are absent or damaged."""
        position = bisect.bisect_left(self._captions, caption)
        if position == len(self._captions) or self._captions[position] != caption:
            raise DamagedLatents(f"{self.folder / CAPTIONS} has no caption {caption!r}")
        file, row = divmod(position, self._texts.layout.rows_a_file)
        self._texts.files[file].read("context", row, context_LD)
        self._texts.files[file].read("pooled", row, pooled_P)

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
        for table in (*self._images.values(), self._texts):
            kind, opened, rows_a_file = table.kind, table.files, table.layout.rows_a_file
            rows = [file.rows for file in opened]
            if rows[:-1] != [rows_a_file] * (len(rows) - 1) or not 0 < rows[-1] <= rows_a_file:
                raise UserError(f"a file of {kind} does not have {rows_a_file} rows, as {INDEX} says")
            if sum(rows) != table.count:
                raise UserError(f"the files of {kind} have {sum(rows)} rows in all instead of {table.count}")
            if any(file.row_shapes != opened[0].row_shapes for file in opened):
                raise UserError(f"the files of {kind} have rows of different shapes")
            missing = ({"context", "pooled"} if table is self._texts else {"moments"}) - opened[0].row_shapes.keys()
            if missing:
                raise UserError(f"no file has {' and '.join(sorted(missing))}")
        if any(file.lead_shape[1:] != (len(self.views),) for table in self._images.values() for file in table.files):
            raise UserError(f"a file of images does not have {len(self.views)} views, as {INDEX} says")

    @functools.cached_property
    def _written(self) -> "Index":
        return files.read_json(self.folder / INDEX, Index, checksums.MAX_JSON)

    @functools.cached_property
    def _images(self) -> dict[Shape, "_Table"]:
        """The images by the shape that they were cropped to."""
        written, data = self._written, self.folder.parents[1]
        if not written.facts.buckets:
            images = pa.ipc.open_file(pa.memory_map(str(data / "images.arrow")))
            count = sum(images.get_batch(i).num_rows for i in range(images.num_record_batches))
            return {self.shapes[0]: self._table("images", written.images, count)}
        found = zip(self.shapes, images_of(PreparedData(data), self.shapes), strict=True)
        return {
            shape: self._table(images_kind(shape), written.buckets.get(shown(shape)), len(images_R), images_R)
            for shape, images_R in found
        }

    @functools.cached_property
    def _texts(self) -> "_Table":
        return self._table("captions", self._written.captions, len(self._captions))

    def _table(self, kind: str, layout: FileLayout | None, count: int, images_R: np.ndarray | None = None) -> "_Table":
        if layout is None:
            raise UserError(f"{self.folder / INDEX} does not say how many files of {kind} there are")
        opened = [LatentsFile(self.folder / file_name(kind, i)) for i in range(layout.files)]
        return _Table(kind, layout, opened, count, images_R)

    @functools.cached_property
    def _captions(self) -> "_Strings":
        table = map_table(self.folder / CAPTIONS, CAPTIONS_SCHEMA, "make it again")
        table_checks.validate(self.folder / CAPTIONS, table)
        return _Strings(table["caption"])


@dataclasses.dataclass(frozen=True)
class _Table:
    """The images, those of a bucket, or the captions, and the files that hold their rows."""

    kind: str
    """Beginning of the files' names."""
    layout: FileLayout
    files: "list[LatentsFile]"
    count: int
    """Rows that all files should have together."""
    images_R: np.ndarray | None = None
    """The image of each row, ascending; None if row and image have the same number."""

    def row_of(self, image: int) -> int:
        """Return the row of an image; raise DamagedLatents if there is none."""
        if self.images_R is None:
            return image
        row = int(np.searchsorted(self.images_R, image))
        if row == len(self.images_R) or self.images_R[row] != image:
            raise DamagedLatents(f"image {image} is not among the stored {self.kind}")
        return row


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


def images_kind(shape: Shape) -> str:
    """Return the beginning of the names of the files with the images of a bucket."""
    return f"images-{shown(shape)}"


def images_of(prepared: PreparedData, shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Return, for each of the shapes, the images of all records that are cropped to it, ascending."""
    image_M, record_M = prepared.candidate_images()
    bucket_M = nearest(shapes, prepared.sizes_I2[image_M], record_M)[record_M]
    return [np.unique(image_M[bucket_M == number]) for number in range(len(shapes))]


def bucket_facts(prepared: PreparedData, shapes: Sequence[Shape]) -> dict[str, str]:
    """Return the facts about buckets that stored latents depend on: the shapes, and a digest of the images of each."""
    digest = hashlib.sha256()
    for images_R in images_of(prepared, shapes):
        digest.update(images_R.astype("<i8").tobytes() + b"|")
    return {"buckets": " ".join(map(shown, shapes)), "bucket_images": digest.hexdigest()[:16]}


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

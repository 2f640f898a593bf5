"""Parquet files whose rows hold the bytes of the image files."""

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from etils import epath

from dpo_jax.data.sources.paths import read_image
from dpo_jax.data.sources.record import Chunk, Damaged, Dropped, Outcome, Source, Unusable, make_record, rows_a_chunk
from dpo_jax.data.sources.values import is_unstated, number, truth
from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, look_at

ROWS_AT_ONCE = 8
BUFFER_BYTES = 1 << 20

# Errors that pyarrow raises for damaged files; MemoryError for the sizes that a damaged page claims.
ERRORS = (pa.ArrowException, OSError, ValueError, MemoryError)

Image = Callable[[str], bytes | None]


class Schema(NamedTuple):
    """The columns of a data set, by kind (text, number, boolean, image), and how their values become a record."""

    needed: Mapping[str, str]
    optional: Mapping[str, str]
    row: Callable[[str, Mapping[str, Any], Image], Outcome]
    """Maps (place of the row, its values except images, function that reads the image of a column) to the outcome."""

    @property
    def kinds(self) -> dict[str, str]:
        return {**self.needed, **self.optional}


def pickapic_row(where: str, values: Mapping[str, Any], image: Image) -> Outcome:
    """Return the outcome of a row of Pick-a-Pic v1 or v2 (https://arxiv.org/abs/2305.01569).

    A missing `label_1` is 1 - `label_0`; with `has_label` false the row has no label.
    """
    stated = {name: values.get(name) for name in ("label_0", "label_1", "has_label")}
    stated = {name: value for name, value in stated.items() if not is_unstated(value)}
    labels = {name: number(value) for name, value in stated.items() if name != "has_label"}
    has_label = truth(stated.get("has_label", True))
    if None in labels.values() or has_label is None:
        return Damaged(where, "a label is not a number", repr(stated)[:200])
    first = labels.get("label_0")
    if first is None or not has_label:
        return Dropped(where, "without a label")
    second = labels.get("label_1")
    shares = first, 1 - first if second is None else second
    models = values.get("model_0"), values.get("model_1")
    weight = values.get("weight")
    return make_record(where, values["caption"], shares, lambda k: image(f"jpg_{k}"), models, weight=weight)


def open_image_preferences_row(where: str, values: Mapping[str, Any], image: Image) -> Outcome:
    """Return the outcome of a row of data-is-better-together/open-image-preferences-v1-binarized on the hub."""
    names = "chosen", "rejected"
    models = [values.get(f"{name}_model") for name in names]
    weight = values.get("weight")
    return make_record(where, values["prompt"], (1, 0), lambda k: image(names[k]), models, weight=weight)


PICKAPIC = Schema(
    needed={"jpg_0": "image", "jpg_1": "image", "caption": "text", "label_0": "number"},
    optional={"label_1": "number", "has_label": "boolean", "model_0": "text", "model_1": "text", "weight": "number"},
    row=pickapic_row,
)
OPEN_IMAGE_PREFERENCES = Schema(
    needed={"chosen": "image", "rejected": "image", "prompt": "text"},
    optional={"chosen_model": "text", "rejected_model": "text", "weight": "number"},
    row=open_image_preferences_row,
)


def table_source(schema: Schema, help: str) -> Source:
    return Source(functools.partial(_chunks, schema), functools.partial(_read, schema), help)


def _chunks(schema: Schema, files: Sequence[Path]) -> list[Chunk]:
    """Return chunks of as many row groups as have `rows_a_chunk` rows together, at least one."""
    groups = []
    for file in itertools.chain.from_iterable(map(_files, files)):
        table, counts = _open(file)
        _check_schema(schema, table.schema_arrow, file)
        groups.append((file, counts))
    limit = rows_a_chunk(sum(sum(counts) for _, counts in groups))
    chunks = []
    for file, counts in groups:
        start = rows = 0
        for group, count in enumerate(counts):
            if rows and rows + count > limit:
                chunks.append(Chunk(file, start, group))
                start, rows = group, 0
            rows += count
        if rows:
            chunks.append(Chunk(file, start, len(counts)))
    return chunks


def _files(path: Path) -> list[Path]:
    """Return the file, or the parts of a table that Spark, Dask or Polars wrote as a folder."""
    if not path.is_dir():
        return [path]
    parts = sorted(file for file in path.rglob("*.parquet") if not file.name.startswith((".", "_")))
    if not parts:
        raise UserError(f"{path} is a folder without .parquet files; name the folder that holds them")
    return parts


def _read(schema: Schema, chunk: Chunk) -> Iterator[Outcome]:
    table, counts = _open(chunk.file)
    columns = [name for name in (*schema.needed, *schema.optional) if name in table.schema_arrow.names]
    for group in range(chunk.start, chunk.stop):
        row = sum(counts[:group])
        end = row + counts[group]
        try:
            for batch in table.iter_batches(ROWS_AT_ONCE, [group], columns, use_threads=False):
                for i in range(len(batch)):
                    yield _row(schema, chunk.file, row, batch, i)
                    row += 1
        except ERRORS:
            pass  # pyarrow cannot read past a damaged page, but the next row group is independent
        for lost in range(row, end):  # a damaged page may also end early
            yield Damaged(f"{chunk.file} row {lost}", "this part of the parquet file is damaged")


def _row(schema: Schema, file: Path, row: int, batch: pa.RecordBatch, i: int) -> Outcome:
    where = f"{file} row {row}"
    values = {}
    for name in batch.schema.names:
        if schema.kinds[name] != "image":
            try:
                value = batch.column(name)[i].as_py()
                values[name] = value.decode() if isinstance(value, bytes) else value
            except ERRORS as error:
                return Damaged(where, "a value is not of its column's type", f"{name}: {error}")
    return schema.row(where, values, lambda name: _bytes(batch.column(name)[i], file.parent))


def _bytes(value: pa.Scalar, folder: Path) -> bytes | None:
    """Return the image file in a cell: bytes, the struct of Hugging Face's datasets, or a list of numbers up to 255.

    A struct without bytes names a file in `folder`.
    """
    if isinstance(value, pa.StructScalar) and value.is_valid:
        path = value["path"].as_py() if "path" in value else None
        if path and not value["bytes"].is_valid:
            return read_image(path, folder)
        value = value["bytes"]
    if not value.is_valid or not isinstance(value, pa.ListScalar | pa.LargeListScalar | pa.FixedSizeListScalar):
        return value.as_py()
    array = value.values
    if array.null_count:
        raise Unusable("an image is a list with nulls")
    if array.type == pa.int8():  # Java's bytes are signed
        array = array.view(pa.uint8())
    try:
        return array.cast(pa.uint8()).to_numpy().tobytes()
    except pa.ArrowException as error:
        raise Unusable("an image is a list of numbers that are not bytes", str(error)) from None


def _open(file: Path) -> tuple[pq.ParquetFile, list[int]]:
    """Return the file and the number of rows of each row group."""
    check_regular(file)
    try:
        # By default pyarrow would hold whole columns of a row group: hundreds of MB of images.
        table = pq.ParquetFile(file, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)
        counts = [table.metadata.row_group(i).num_rows for i in range(table.num_row_groups)]
        table.schema_arrow  # noqa: B018 (raises when damaged)
    except FileNotFoundError:
        raise
    except ERRORS as error:
        raise not_parquet(file, error) from None
    if sum(counts) != table.metadata.num_rows or min(counts, default=0) < 0:
        raise UserError(
            f"{file} is damaged: its row groups do not add up to its number of rows; download or write it again"
        )
    return table, counts


def parquet_columns(file: Path) -> list[str]:
    """Return the names of a parquet file's columns. Raises a UserError if it is not a parquet file."""
    return list(_open(file)[0].schema_arrow.names)


def not_parquet(file: epath.PathLike, error: Exception) -> UserError:
    """Return the error for a file that pyarrow cannot read, in one line."""
    path = epath.Path(file)
    known = look_at(path) if path.is_file() else None
    if known and not known.endswith("Parquet file"):
        return UserError(f"{file} is {known}")
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(f"{file} is not a readable parquet file ({reason})")


def _check_schema(schema: Schema, found: pa.Schema, file: Path) -> None:
    absent = [name for name in schema.needed if name not in found.names]
    if absent:
        raise UserError(
            f"{file} has no column {', '.join(absent)}; it has {', '.join(found.names)}. Rename its columns, or set "
            "the --source that fits them"
        )
    for name, kind in schema.kinds.items():
        if found.names.count(name) > 1:
            raise UserError(f"{file} has more than one column {name}; rename or remove one")
        if name in found.names and not _is_of(found.field(name).type, kind):
            raise UserError(f"{file}: the column {name} holds {found.field(name).type}, but should hold {kind} values")


def _is_of(type: pa.DataType, kind: str) -> bool:
    types = pa.types
    if types.is_dictionary(type):
        type = type.value_type
    if kind == "image":
        if types.is_struct(type):  # as Hugging Face's datasets store them
            return type.get_field_index("bytes") >= 0 and _is_of(type.field("bytes").type, "image")
        if types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type):
            return types.is_integer(type.value_type)
    text = types.is_string, types.is_large_string, types.is_string_view
    data = types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary
    accepted = {
        "text": (*text, *data),  # Spark may not mark bytes as text
        "number": (*text, types.is_integer, types.is_floating, types.is_decimal, types.is_boolean),
        "boolean": (*text, types.is_integer, types.is_floating, types.is_decimal, types.is_boolean),
        "image": data,
    }
    return types.is_null(type) or any(accepts(type) for accepts in accepted[kind])

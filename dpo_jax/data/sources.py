"""Where preferences come from: each source reads files of one schema and yields records, best candidate first.

A new data set is one function here and one entry in `SOURCES`.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_AT_ONCE = 64


class Record(NamedTuple):
    """One prompt with K ranked candidates."""

    where: str
    """File and row, for messages."""
    caption: str
    images: tuple[bytes | None, ...]
    """Encoded as they came, best first; empty when the images were left unread, None where the source has none."""
    preference: tuple[float, ...]
    """Share of the preference that each candidate got, in the order of `images`; sums to 1."""
    models: tuple[str, ...]
    """What generated each candidate; empty strings where the source doesn't say."""


class Dropped(NamedTuple):
    """A row that states no preference."""

    reason: str


_IMAGES = ["jpg_0", "jpg_1"]
_FACTS = ["caption", "label_0", "label_1", "has_label", "model_0", "model_1"]


def pickapic(files: Sequence[Path], with_images: bool = True) -> Iterator[Record | Dropped]:
    """Reads parquet files of the Pick-a-Pic schema (https://arxiv.org/abs/2305.01569).

    Needs the columns `jpg_0`, `jpg_1` (encoded images), `caption`, `label_0`; uses `label_1`, `has_label`, `model_0`
    and `model_1` where they exist. Ties (0.5 / 0.5) and rows that nobody labelled come as `Dropped`.

    Args:
        files: streamed in this order, row group by row group.
        with_images: otherwise the images are left unread, which makes a cheap first pass.

    Raises:
        ValueError: a file isn't parquet, or misses a needed column.
    """
    tables = [_open(file) for file in files]
    for table, file in zip(tables, files, strict=True):
        _check_columns(table.schema_arrow, file)
    for table, file in zip(tables, files, strict=True):
        present = set(table.schema_arrow.names)
        facts = [name for name in _FACTS if name in present]
        row = -1
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=facts + (_IMAGES if with_images else [])):
            for i, values in enumerate(batch.select(facts).to_pylist()):
                row += 1
                labels = _labels(values)
                if isinstance(labels, str):
                    yield Dropped(labels)
                else:
                    best_first = (0, 1) if labels[0] > labels[1] else (1, 0)
                    yield Record(
                        where=f"{file} row {row}",
                        caption=values["caption"],
                        images=tuple(batch.column(_IMAGES[k])[i].as_py() for k in best_first) if with_images else (),
                        preference=tuple(labels[k] / sum(labels) for k in best_first),
                        models=tuple(values.get(f"model_{k}") or "" for k in best_first),
                    )


SOURCES = {"pickapic": pickapic}


def _labels(values: dict[str, Any]) -> tuple[float, float] | str:
    """Both labels, or the reason why the row states no preference."""
    if values["caption"] is None:
        return "without caption"
    first, second = values["label_0"], values.get("label_1")
    if values.get("has_label") is False or first is None or math.isnan(first):
        return "unlabelled"
    if second is None:
        second = 1 - first
    return "tie" if first == second else (float(first), float(second))


def _open(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except pa.ArrowException as error:
        raise ValueError(f"{file} is not a readable parquet file ({error})") from None


def _check_columns(schema: pa.Schema, file: Path) -> None:
    missing = [name for name in (*_IMAGES, "caption", "label_0") if name not in schema.names]
    if missing:
        raise ValueError(f"{file} misses the column {', '.join(missing)}; it has {', '.join(schema.names)}")
    for name in _IMAGES:
        kind = schema.field(name).type
        if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
            raise ValueError(f"{file}: the column {name} holds {kind}, but encoded images are binary")

"""Merge finished parts into one data set: every image once over all parts, records split by prompt.

Everything follows the order of the parts. Memory holds only the positions of images, 4 bytes each, because equal hashes
are looked for in one small group of hashes after another.

    I: images of all parts, one after the other
"""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tensorflow_datasets as tfds

from dpo_jax.data.prepare import worker
from dpo_jax.data.store import checksums, image_store
from dpo_jax.data.store.prepared import IMAGES, OPTIONAL, RECORDS

VERSION = tfds.core.Version("3.1.0")

GROUPS = 64
"""Files of hashes: all are open while they are written, and one at a time is read into memory."""
IMAGE = np.dtype([("sha256", "S32"), ("position", np.int32)])


class Merged(NamedTuple):
    """The counts of a merge."""

    splits: dict[str, int]
    """Records by split."""
    prompts: dict[str, int]
    """Distinct prompts by split."""
    images: int
    duplicates: int
    """Candidates and masks whose image was stored already."""
    resolutions: Counter[str]
    """Images by width x height, the most common first."""
    quarantined: int
    weighted: int
    """Records with a weight of their own."""
    masked: int
    """Records with a mask."""
    checksums: dict[str, str]
    """Checksums of the files of images, by their path in the data set."""


class _Part(NamedTuple):
    folder: Path
    places: np.ndarray
    """Position of each of its images in the data set."""
    owned_from: int
    """Images from this position on are stored by this part, the others by an earlier one."""
    owned: int

    @property
    def owns(self) -> np.ndarray:
        """For each image, whether it is stored by this part."""
        return self.places >= self.owned_from


def merge(
    folders: Sequence[Path], target: Path, validation_fraction: float, on_shard: Callable[[int, int], None]
) -> Merged:
    """Write `target`. After a kill the same call continues: shards were moved there, all else is written again.

    Args:
        folders: parts with at least one record among them; their images are moved away.
        on_shard: called with the shards done and their total.
    """
    (target / "images").mkdir(parents=True, exist_ok=True)
    scratch = target.with_name("hashes")
    scratch.mkdir(exist_ok=True)
    identified = _identify(folders, scratch)
    resolutions: Counter[str] = Counter()
    digests = {}
    with pa.ipc.new_file(str(target / "images.arrow"), IMAGES) as writer:
        for name, digest, table in _move_shards(
            [part for part in identified if part.owned], target / "images", on_shard
        ):
            digests[f"images/{name}"] = digest
            writer.write_table(table)
            sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
            resolutions.update(f"{width}x{height}" for width, height in sizes)

    limit, prompts = _split(folders, scratch, validation_fraction)
    splits: Counter[str] = Counter()
    candidates = 0
    stated = {field.name: sum(_number(folder, field.name) for folder in folders) for field in OPTIONAL}
    schema = pa.schema([*RECORDS, *(field for field in OPTIONAL if stated[field.name])])
    with pa.ipc.new_file(str(target / "records.arrow"), schema) as writer:
        for part in identified:
            table = _read(part.folder / "records.arrow")
            images = table["images"].combine_chunks()
            indices = _positions(part, images.flatten())
            split = np.where(table["prompt"].to_numpy() < limit, "validation", "train")
            columns = {name: table[name] for name in table.column_names} | {
                "images": pa.ListArray.from_arrays(images.offsets, indices),
                "split": pa.array(split, pa.string()),
            }
            if stated["weight"]:
                columns["weight"] = pc.fill_null(_column(table, "weight", pa.float32()), 1.0)
            if stated["masks"]:
                none = pa.ListArray.from_arrays(images.offsets, pa.array(np.full(len(indices), -1, np.int32)))
                masks = pc.coalesce(_column(table, "masks", none.type), pa.chunked_array([none])).combine_chunks()
                columns["masks"] = pa.ListArray.from_arrays(masks.offsets, _positions(part, masks.flatten()))
                candidates += int((masks.flatten().to_numpy() >= 0).sum())
            writer.write_table(pa.table([columns[name] for name in schema.names], schema))
            splits.update(split.tolist())
            candidates += len(indices)

    quarantined = 0
    with open(target / "quarantine.jsonl", "w") as quarantine:
        for folder in folders:
            with open(folder / "damaged.jsonl") as damaged:
                for line in damaged:
                    quarantine.write(line)
                    quarantined += 1

    number = sum(part.owned for part in identified)
    by_split = {name: splits[name] for name in prompts}
    ranked = Counter(dict(resolutions.most_common()))
    return Merged(
        by_split, prompts, number, candidates - number, ranked, quarantined, stated["weight"], stated["masks"], digests
    )


def _positions(part: _Part, indices: pa.Array) -> pa.Array:
    """Return the positions in the data set of images of a part; -1 stays."""
    indices_M = indices.to_numpy()
    return pa.array(np.where(indices_M < 0, -1, part.places[indices_M]), pa.int32())


def _identify(folders: Sequence[Path], scratch: Path) -> list[_Part]:
    """Give every image its position in the data set; the first part that has it stores it."""
    counts = [_read(folder / "images.arrow").num_rows for folder in folders]
    stops = np.cumsum(counts, dtype=np.int32)

    def images() -> Iterator[np.ndarray]:
        for folder, stop, count in zip(folders, stops, counts, strict=True):
            rows = np.empty(count, IMAGE)
            rows["sha256"] = _read(folder / "images.arrow")["sha256"].to_pylist()
            rows["position"] = np.arange(stop - count, stop)
            yield rows

    places_I = np.empty(sum(counts), np.int32)  # at first the position of the first image of the same hash
    for group in _by_hash(images(), IMAGE, scratch):
        _, first, unique = np.unique(group["sha256"], return_index=True, return_inverse=True)
        places_I[group["position"]] = group["position"][first[unique]]

    identified, total = [], 0
    for folder, stop, count in zip(folders, stops, counts, strict=True):
        places = places_I[stop - count : stop]
        owns = places >= stop - count  # its own images are all different
        owned = int(owns.sum())
        places[~owns] = places_I[places[~owns]]
        places[owns] = np.arange(total, total + owned)
        identified.append(_Part(folder, places, total, owned))
        total += owned
    return identified


def _by_hash(tables: Iterable[np.ndarray], dtype: np.dtype, scratch: Path) -> Iterator[np.ndarray]:
    """Yield the rows of all tables, which begin with a hash, in GROUPS: equal hashes together, their order kept."""
    with ExitStack() as stack:
        files = [stack.enter_context(open(scratch / f"{group:02}", "wb")) for group in range(GROUPS)]
        for rows in tables:
            group = rows.view(np.uint8).reshape(len(rows), dtype.itemsize)[:, 0] % GROUPS
            order = np.argsort(group, kind="stable")
            ends = np.cumsum(np.bincount(group, minlength=GROUPS))
            for file, some in zip(files, np.split(rows[order], ends[:-1]), strict=True):
                some.tofile(file)
    for file in files:
        yield np.fromfile(file.name, dtype)


def _move_shards(
    stored: Sequence[_Part], target: Path, on_shard: Callable[[int, int], None]
) -> Iterator[tuple[str, str, pa.Table]]:
    """Make one shard of each part that stores an image, and the description that TFDS needs.

    Yield name, checksum and `IMAGES` of each shard.
    """
    shards = [target / image_store.shard_name(number, len(stored)) for number in range(len(stored))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, (digest, table) in enumerate(pool.map(_move_shard, stored, shards), 1):
            on_shard(done, len(shards))
            yield shards[done - 1].name, digest, table
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=image_store.NAME, version=VERSION, data_dir=str(target), module_name=__name__
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=image_store.features(), description="Images of prepared records."
    )
    info.set_file_format("parquet")
    lengths, size = [part.owned for part in stored], sum(shard.stat().st_size for shard in shards)
    info.set_splits(tfds.core.splits.SplitDict([tfds.core.splits.SplitInfo(image_store.SPLIT, lengths, size)]))
    info.write_to_directory(target)


def _move_shard(part: _Part, shard: Path) -> tuple[str, pa.Table]:
    file, table = part.folder / worker.FILE, _read(part.folder / "images.arrow")
    if part.owned == len(part.places):
        if not shard.exists():
            os.replace(file, shard)
        return worker.read_counts(part.folder).checksum, table
    if not shard.exists():
        rewritten = shard.with_name(f".{shard.name}")
        with image_store.Writer(rewritten) as writer:
            for image, owned in zip(image_store.read_in_order(file), part.owns, strict=True):
                if owned:
                    writer.add(image)
        worker.sync(rewritten)
        os.replace(rewritten, shard)
        file.unlink()
    table = table.filter(pa.array(part.owns))
    column = IMAGES.get_field_index("offset")
    table = table.set_column(column, IMAGES.field(column), pa.array(image_store.locate(shard), pa.int64()))
    return checksums.checksum(shard), table


def _split(folders: Sequence[Path], scratch: Path, validation_fraction: float) -> tuple[np.uint64, dict[str, int]]:
    """Return (the hash below which prompts are held out, distinct prompts by split)."""

    def hashes() -> Iterator[np.ndarray]:
        return (_read(folder / "records.arrow")["prompt"].to_numpy() for folder in folders)

    edges = np.array([], np.uint64)  # the two lowest hashes and the highest
    for hash_R in hashes():
        distinct = np.unique(np.append(edges, hash_R))
        edges = np.append(distinct[:2], distinct[-1:])
    limit = 0
    if validation_fraction > 0:  # so that a small data set has a prompt on both sides
        limit = min(max(int(validation_fraction * 2**64), int(edges[1])), int(edges[-1]))

    sides = {"train": 0, "validation": 0}
    for group in _by_hash(hashes(), np.dtype(np.uint64), scratch):
        distinct = np.unique(group)
        held_out = int((distinct < limit).sum())
        sides["train"] += len(distinct) - held_out
        sides["validation"] += held_out
    return np.uint64(limit), {split: number for split, number in sides.items() if number}


def _column(records: pa.Table, name: str, type: pa.DataType) -> pa.ChunkedArray:
    """Return an optional column of a part, which those of earlier versions lack; null where nothing is stated."""
    return records[name] if name in records.column_names else pa.chunked_array([pa.nulls(len(records), type)])


def _number(folder: Path, name: str) -> int:
    """Return how many records of a part state a value of an optional column."""
    records = _read(folder / "records.arrow")
    return len(records) - _column(records, name, pa.null()).null_count


def _read(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()

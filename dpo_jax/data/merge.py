"""Finished parts become one data set: every image once over all parts, records split by prompt.

Everything follows the order of the parts. Hashes of images and prompts are all that is kept in memory, some 250 bytes a
record (measured).

    I: images of all parts, one after the other    R: records, likewise
"""

import os
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from dpo_jax.data import parts
from dpo_jax.data.prepared import IMAGES, RECORDS

VERSION = tfds.core.Version("2.0.0")
NAME, SPLIT = "preference_images", "images"  # TFDS reserves "all"


class Merged(NamedTuple):
    """What the merge counted."""

    splits: dict[str, int]
    """Records by split."""
    prompts: dict[str, int]
    """Distinct prompts by split."""
    images: int
    duplicates: int
    """Candidates whose image was stored already."""
    resolutions: Counter[str]
    """Images by width x height, the most common first."""
    quarantined: int


def merge(
    folders: Sequence[Path], target: Path, validation_fraction: float, on_shard: Callable[[int, int], None]
) -> Merged:
    """Writes `target`; after a kill the same call goes on: shards were moved there, everything else is written anew.

    Args:
        folders: parts with at least one record among them; their images are moved away.
        on_shard: called with the shards done and their total.
    """
    (target / "images").mkdir(parents=True, exist_ok=True)
    index_I, owned_I, starts = _identify(folders)
    kept = np.split(owned_I, starts[1:])
    _move_shards(folders, kept, target / "images", on_shard)

    resolutions: Counter[str] = Counter()
    with pa.ipc.new_file(str(target / "images.arrow"), IMAGES) as writer:
        for folder, owned in zip(folders, kept, strict=True):
            table = _read(folder / "images.arrow").filter(pa.array(owned))
            writer.write_table(table)
            sizes = zip(table["width"].to_pylist(), table["height"].to_pylist(), strict=True)
            resolutions.update(f"{width}x{height}" for width, height in sizes)

    hash_R = np.concatenate([_read(folder / "records.arrow")["prompt"].to_numpy() for folder in folders])
    limit, prompts = _split(hash_R, validation_fraction)
    splits: Counter[str] = Counter()
    candidates = 0
    with pa.ipc.new_file(str(target / "records.arrow"), RECORDS) as writer:
        for folder, start in zip(folders, starts, strict=True):
            table = _read(folder / "records.arrow")
            images = table["images"].combine_chunks()
            indices = pa.array(index_I[start + images.flatten().to_numpy()], pa.int32())
            split = np.where(table["prompt"].to_numpy() < limit, "validation", "train")
            columns = {name: table[name] for name in table.column_names} | {
                "images": pa.ListArray.from_arrays(images.offsets, indices),
                "split": pa.array(split, pa.string()),
            }
            writer.write_table(pa.table([columns[name] for name in RECORDS.names], RECORDS))
            splits.update(split.tolist())
            candidates += len(indices)

    quarantined = 0
    with open(target / "quarantine.jsonl", "w") as quarantine:
        for folder in folders:
            with open(folder / "damaged.jsonl") as damaged:
                for line in damaged:
                    quarantine.write(line)
                    quarantined += 1

    number = int(owned_I.sum())
    by_split = {name: splits[name] for name in prompts}
    ranked = Counter(dict(resolutions.most_common()))
    return Merged(by_split, prompts, number, candidates - number, ranked, quarantined)


def _identify(folders: Sequence[Path]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(position that each image has in the whole, whether its part stores it, where each part begins).

    The first part that has an image keeps it.
    """
    digests = [np.array(_read(folder / "images.arrow")["sha256"].to_pylist(), "S32") for folder in folders]
    starts = np.cumsum([0, *(len(digest) for digest in digests[:-1])])
    _, first_U, unique_I = np.unique(np.concatenate(digests), return_index=True, return_inverse=True)
    first_I = first_U[unique_I]
    owned_I = first_I == np.arange(len(first_I))
    return (np.cumsum(owned_I) - 1)[first_I], owned_I, starts


def _move_shards(
    folders: Sequence[Path], kept: Sequence[np.ndarray], target: Path, on_shard: Callable[[int, int], None]
) -> None:
    """One shard a part that keeps an image, and what TFDS wants to know about them."""
    sources = [(folder / "images.array_record", owned) for folder, owned in zip(folders, kept, strict=True)]
    sources = [(file, owned) for file, owned in sources if owned.any()]
    shards = [target / f"{NAME}-{SPLIT}.array_record-{i:05}-of-{len(sources):05}" for i in range(len(sources))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done, _ in enumerate(pool.map(_move_shard, sources, shards), 1):
            on_shard(done, len(shards))
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=NAME, version=VERSION, data_dir=str(target), module_name=__name__
    )
    info = tfds.core.DatasetInfo(builder=identity, features=parts.FEATURES, description="Images of prepared records.")
    info.set_file_format("array_record")
    lengths, size = [int(owned.sum()) for _, owned in sources], sum(shard.stat().st_size for shard in shards)
    info.set_splits(tfds.core.splits.SplitDict([tfds.core.splits.SplitInfo(SPLIT, lengths, size)]))
    info.write_to_directory(target)


def _move_shard(source: tuple[Path, np.ndarray], shard: Path) -> None:
    file, owned = source
    if shard.exists():
        return
    if owned.all():
        os.replace(file, shard)
        return
    rewritten = shard.with_name(f".{shard.name}")
    reader, writer = ArrayRecordReader(str(file)), ArrayRecordWriter(str(rewritten), parts.ARRAY_RECORD_OPTIONS)
    for keep in owned:
        example = reader.read()
        if keep:
            writer.write(example)
    writer.close()
    reader.close()
    os.replace(rewritten, shard)
    file.unlink()


def _split(hash_R: np.ndarray, validation_fraction: float) -> tuple[np.uint64, dict[str, int]]:
    """(the hash below which prompts are held out, distinct prompts by split)."""
    hashes = np.unique(hash_R)
    count = int((hashes / 2.0**64 < validation_fraction).sum())
    if validation_fraction > 0:  # a small data set needs a prompt on both sides
        count = min(max(count, 1), len(hashes) - 1)
    sides = {"train": len(hashes) - count, "validation": count}
    return hashes[count], {split: number for split, number in sides.items() if number}


def _read(file: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(file))).read_all()

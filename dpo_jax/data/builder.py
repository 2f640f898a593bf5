"""Turns the records of a source into a TFDS data set of ArrayRecord files that Grain can read at random.

Images are decoded once, only to see that they can be, and stored as they came. TensorFlow is not needed.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from PIL import UnidentifiedImageError

from dpo_jax.data import images
from dpo_jax.data.sources import ROWS_AT_ONCE, Dropped, Record

Read = Callable[[Sequence[Path], bool], Iterator[Record | Dropped]]

VERSION = tfds.core.Version("1.0.0")


@dataclasses.dataclass
class Summary:
    """What became of the rows; written beside the data as `summary.json`."""

    files: list[str]
    rows: int = 0
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Rows without a preference, by reason."""
    damaged: Counter[str] = dataclasses.field(default_factory=Counter)
    """Pairs with an image that can't be decoded, by reason; `quarantine.jsonl` lists each."""
    prompts: dict[str, int] = dataclasses.field(default_factory=dict)
    """Distinct prompts by split, damaged pairs included."""
    pairs: Counter[str] = dataclasses.field(default_factory=Counter)
    """Pairs written, by split."""
    resolutions: Counter[str] = dataclasses.field(default_factory=Counter)
    """Images written, by width x height."""

    def __str__(self) -> str:
        return (
            f"rows read   {self.rows}\n"
            f"dropped     {_listed(self.dropped)}\n"
            f"damaged     {_listed(self.damaged)}\n"
            f"pairs kept  {_listed(self.pairs)}\n"
            f"prompts     {_listed(self.prompts)}\n"
            f"images      {_listed(dict(self.resolutions.most_common(5)))}"
        )


def prepare(
    read: Read,
    files: Sequence[Path],
    output: Path,
    *,
    validation_fraction: float = 0.05,
    max_damaged_fraction: float = 0.01,
    pairs_per_shard: int = 2000,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Summary:
    """Writes the data set `output` with the splits `train` and `validation`; the same input gives the same bytes.

    The captions are read first, to split by prompt; then everything is read once and written in the same order (Grain
    shuffles when it reads). `output` appears only when it is complete. Pairs with a damaged image are set aside in
    `quarantine.jsonl`.

    Args:
        read: an entry of `sources.SOURCES`.
        validation_fraction: share of the prompts held out. A prompt's hash decides, so that all its pairs land in one
            split, and still do when files are added. At least one prompt is held out unless it is 0.
        max_damaged_fraction: share of the pairs that may be set aside.
        pairs_per_shard: of one ArrayRecord file.
        on_progress: called with the pairs done and their total.

    Raises:
        FileExistsError: `output` exists and isn't an empty folder.
        ValueError: no usable pair, too many damaged ones, or files of another schema.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} already exists and is not an empty folder; name another --output or remove it")
    summary = Summary(files=[str(file) for file in files])
    held_out, total = _scan(read(files, False), validation_fraction, summary)
    partial = output.absolute().parent / f".{output.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        # A GeneratorBasedBuilder would import TensorFlow to sort more than 1 GB on disk.
        writer = tfds.core.SequentialWriter(_info(partial), pairs_per_shard, file_format="array_record")
        writer.initialize_splits(list(summary.prompts))
        with open(partial / "quarantine.jsonl", "w") as quarantine:
            for chunk in _verified(read(files, True)):
                examples: dict[str, list[dict[str, Any]]] = {split: [] for split in summary.prompts}
                for record, sizes in chunk:
                    if isinstance(sizes, Damage):
                        summary.damaged[sizes.reason] += 1
                        entry = {"where": record.where, "caption": record.caption, **sizes._asdict()}
                        quarantine.write(json.dumps(entry) + "\n")
                    else:
                        split = "validation" if _normalised(record.caption) in held_out else "train"
                        summary.pairs[split] += 1
                        summary.resolutions.update(f"{width}x{height}" for height, width in sizes)
                        examples[split].append(_example(record, sizes))
                writer.add_examples(examples)
                damaged = summary.damaged.total()
                if damaged > max_damaged_fraction * total:
                    raise ValueError(
                        f"{damaged} of {total} pairs have a damaged image (e.g. {entry['where']}: {entry['reason']}), "
                        f"more than --max_damaged_fraction={max_damaged_fraction} allows; mend them or raise the limit"
                    )
                on_progress(damaged + summary.pairs.total(), total)
        for split in summary.prompts:
            if not summary.pairs[split]:
                raise ValueError(f"no usable pair for the split {split}: every pair of its prompts has a damaged image")
        writer.close_all()
        (partial / "summary.json").write_text(json.dumps(vars(summary), indent=1) + "\n")
        os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return summary


def open_prepared(folder: Path, split: str) -> Any:
    """Random access to what `prepare` wrote: dicts of `caption`, `images` (as encoded), `sizes`, `preference` ...

    Raises:
        FileNotFoundError: nothing was prepared there.
        ValueError: it has no such split.
    """
    if not (folder / "dataset_info.json").is_file():
        raise FileNotFoundError(
            f"no prepared data set at {folder}: "
            f"run python -m dpo_jax.prepare --source=pickapic --input=FILES --output={folder}"
        )
    builder = tfds.builder_from_directory(folder)
    if split not in builder.info.splits:
        raise ValueError(f"the data set {folder} has no split {split!r}; it has {', '.join(builder.info.splits)}")
    return builder.as_data_source(split=split, decoders={"images": _SkipDecodingAll()})


class _SkipDecodingAll(tfds.decode.SkipDecoding):
    """TFDS's own lacks the method that a sequence of images asks for."""

    def decode_batch_example_np(self, encoded: Sequence[bytes]) -> Sequence[bytes]:
        return encoded


def _info(folder: Path) -> tfds.core.DatasetInfo:
    name = "preference_pairs"
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=VERSION, data_dir=str(folder), module_name=__name__
    )
    features = tfds.features.FeaturesDict(
        {
            "caption": tfds.features.Text(),
            "images": tfds.features.Sequence(tfds.features.Image()),
            "sizes": tfds.features.Tensor(shape=(None, 2), dtype=np.int32),
            "preference": tfds.features.Tensor(shape=(None,), dtype=np.float32),
            "models": tfds.features.Sequence(tfds.features.Text()),
        }
    )
    return tfds.core.DatasetInfo(builder=identity, features=features, description="K candidates a prompt, best first.")


def _example(record: Record, sizes: list[tuple[int, int]]) -> dict[str, Any]:
    return {
        "caption": record.caption,
        "images": list(record.images),
        "sizes": np.asarray(sizes, np.int32),
        "preference": np.asarray(record.preference, np.float32),
        "models": list(record.models),
    }


def _scan(rows: Iterator[Record | Dropped], validation_fraction: float, summary: Summary) -> tuple[frozenset[str], int]:
    """Counts rows and prompts without reading images: (prompts held out, pairs to come)."""
    prompts: set[str] = set()
    pairs = 0
    for row in rows:
        summary.rows += 1
        if isinstance(row, Dropped):
            summary.dropped[row.reason] += 1
        else:
            prompts.add(_normalised(row.caption))
            pairs += 1
    if not pairs:
        raise ValueError(
            f"no usable pair among {summary.rows} rows ({_listed(summary.dropped)}) of {summary.files[0]} ..."
        )
    ranked = sorted(prompts, key=_unit_hash)
    count = sum(_unit_hash(prompt) < validation_fraction for prompt in ranked)
    if validation_fraction > 0:  # a small data set needs a prompt on both sides
        count = min(max(count, 1), len(ranked) - 1)
    sides = {"train": len(ranked) - count, "validation": count}
    summary.prompts = {split: number for split, number in sides.items() if number}
    return frozenset(ranked[:count]), pairs


def _normalised(caption: str) -> str:
    """The caption as CLIP's tokenizer sees it: case and white space don't make another prompt."""
    return " ".join(caption.lower().split())


def _unit_hash(prompt: str) -> float:
    return int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) / 2**64


class Damage(NamedTuple):
    """Why a pair is set aside."""

    candidate: int
    """Its rank: 0 is the best."""
    reason: str


def _verified(
    rows: Iterator[Record | Dropped],
) -> Iterator[list[tuple[Record, list[tuple[int, int]] | Damage]]]:
    """Decodes by threads; yields chunks of records with their sizes, or with what is damaged."""
    records = (row for row in rows if isinstance(row, Record))
    with ThreadPoolExecutor() as pool:
        while chunk := list(itertools.islice(records, ROWS_AT_ONCE)):
            yield list(zip(chunk, pool.map(_sizes, chunk), strict=True))


def _sizes(record: Record) -> list[tuple[int, int]] | Damage:
    """(height, width) of each candidate, or what is wrong with the first damaged one."""
    sizes = []
    for candidate, data in enumerate(record.images):
        try:
            width, height = images.decode(data or b"").size
        except UnidentifiedImageError:
            return Damage(candidate, "not an image" if data else "no image")
        except Exception as error:  # Pillow's parsers raise whatever a damaged file leads them to
            return Damage(candidate, str(error).split(" (")[0])
        sizes.append((height, width))
    return sizes


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "none"

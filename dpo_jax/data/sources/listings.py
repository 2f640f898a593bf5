"""JSON that names image files: one prompt with its candidates per line, or HPDv2, HPDv3 and ImageRewardDB."""

import functools
import itertools
import math
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from dpo_jax.data.images import MAX_BYTES
from dpo_jax.data.sources.json_rows import chunk_rows, elements, lines, numbers, read_rows
from dpo_jax.data.sources.paths import find, in_any_form, no_image, read_file, read_image, read_mask, relative
from dpo_jax.data.sources.record import Chunk, Damaged, Dropped, Outcome, Unusable, borda, make_record, rows_a_chunk
from dpo_jax.data.sources.tables import ERRORS, not_parquet
from dpo_jax.data.sources.values import index, is_missing, is_unstated
from dpo_jax.errors import UserError
from dpo_jax.files import check_regular, decode_text, parse_json

PREFERENCES = "preferred", "ranks", "votes", "scores"
IMAGEREWARD = "prompt_id", "prompt", "image_path", "rank"
PAIRS_A_PROMPT = 4  # ImageRewardDB has 4 to 9 images per prompt


def jsonl_chunks(files: Sequence[Path]) -> list[Chunk]:
    schema = '{"prompt": ..., "chosen": ..., "rejected": ...}, or {"prompt": ..., "images": [...]} with one of '
    schema += ", ".join(PREFERENCES)
    return chunk_rows(files, lines, lambda row: "images" in row or {"chosen", "rejected"} <= row.keys(), schema)


def read_jsonl(chunk: Chunk) -> Iterator[Outcome]:
    """One prompt per line: {"prompt": ..., "chosen": path, "rejected": path}, or with any number of candidates
    {"prompt": ..., "images": [paths], and one of PREFERENCES}. Paths are relative to this file.

    `models` and `captions` (a caption of its own for each candidate) may follow, or `chosen_model` and
    `rejected_model`; `masks` (the path of a mask of each image, or null), or `chosen_mask` and `rejected_mask`; and
    `weight`, the weight of the line in the loss. A prompt may be a list of captions, which become the lines of one: see
    `data.caption_lines`.
    """
    return read_rows(chunk, lines, _jsonl_row)


def _jsonl_row(where: str, folder: Path, row: Mapping[str, Any]) -> Outcome:
    if "chosen" in row or "rejected" in row:
        row = _as_images(row)
    paths, models, captions = row.get("images"), row.get("models"), row.get("captions")
    if not isinstance(paths, list) or len(paths) < 2:
        raise Unusable('"images" is not a list of two or more paths', repr(paths)[:200])
    models, captions = (None if is_missing(value) else value for value in (models, captions))
    if not isinstance(models, list | None) or not isinstance(captions, list | None):
        raise Unusable('"models" or "captions" is not a list')
    stated = [name for name in PREFERENCES if not is_unstated(row.get(name))]
    if not stated:
        return Dropped(where, "without a label")
    if len(stated) > 1:
        raise Unusable(f"more than one of {', '.join(PREFERENCES)}")
    shares = shares_of(stated[0], row[stated[0]], len(paths))
    prompt = row.get("prompt")
    if isinstance(prompt, list):
        if not prompt or not all(isinstance(text, str) and text.strip() for text in prompt):
            raise Unusable('"prompt" is a list with an entry that is not a caption', repr(prompt)[:200])
        prompt = "\n".join(" ".join(text.split()) for text in prompt)
    masks = [None] * len(paths) if is_missing(row.get("masks")) else row["masks"]
    if not isinstance(masks, list) or len(masks) != len(paths):
        raise Unusable('"masks" is not a list with a path or null for each image', repr(masks)[:200])
    return make_record(
        where,
        prompt,
        shares,
        lambda k: read_image(paths[k], folder),
        models or (),
        captions,
        row.get("weight"),
        lambda k: read_mask(masks[k], folder),
    )


def _as_images(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of {"chosen", "rejected"} as one of {"images", "preferred"}."""
    stated = [name for name in ("images", *PREFERENCES) if not is_missing(row.get(name))]
    if stated:
        raise Unusable(f'"chosen" and "rejected" stand beside {", ".join(stated)}; give one or the other')
    paths = [row.get("chosen"), row.get("rejected")]
    if any(is_missing(path) for path in paths):
        raise Unusable('"chosen" and "rejected" are not two paths', repr(paths)[:200])
    pairs = {f"{name}s": [row.get(f"chosen_{name}"), row.get(f"rejected_{name}")] for name in ("model", "mask")}
    stated_pairs = {name: pair for name, pair in pairs.items() if not all(is_missing(value) for value in pair)}
    return {**row, "images": paths, "preferred": 0, **stated_pairs}


def shares_of(name: str, value: Any, count: int) -> list[float]:
    """Return the shares of the preference, which need not sum to 1.

    Args:
        name: preferred: the index of the best, which gets everything. votes: counts, used unchanged. ranks (1 is the
            best, ties allowed) and scores: only their order matters (`borda`). Scores may be lists, one per annotator,
            which are averaged.

    Raises:
        Unusable: `value` does not fit `name`.
    """
    if name == "preferred":
        best = index(value, count)
        if best is None:
            raise Unusable('"preferred" is not the index of an image', f"{value!r}"[:200])
        return [float(k == best) for k in range(count)]
    if name == "scores" and isinstance(value, list) and value and isinstance(value[0], list):
        annotators = [numbers(name, scores, count) for scores in value]
        value = [math.fsum(scores) for scores in zip(*annotators, strict=True)]  # in the order of their means
    values = numbers(name, value, count)
    if name == "votes":
        return values
    return borda([-rank for rank in values] if name == "ranks" else values)


def hpdv3_chunks(files: Sequence[Path]) -> list[Chunk]:
    schema = '{"prompt": ..., "path1": ..., "path2": ...} (HPDv3), or with "file_path" or "image_path" (HPDv2)'

    def has_schema(row: dict[str, Any]) -> bool:
        return not row.keys().isdisjoint({"path1", "file_path", "image_path"})

    return chunk_rows(files, elements, has_schema, schema)


def read_hpdv3(chunk: Chunk) -> Iterator[Outcome]:
    """HPDv3 (https://arxiv.org/abs/2508.03789) and HPDv2 (https://arxiv.org/abs/2306.09341): a JSON list or JSONL.

    HPDv3 names the preferred image `path1`, and has the votes of both in `choice_dist`, in no fixed order: as in
    HPSv3's own training, the larger number belongs to the preferred image. HPDv2 has `file_path` with
    `human_preference` (1 for the best), or `image_path` with `rank`. Images are beside the file; those of HPDv2 in a
    folder of its name.
    """
    return read_rows(chunk, elements, functools.partial(_hpd_row, chunk.file.stem))


def _hpd_row(stem: str, where: str, folder: Path, row: Mapping[str, Any]) -> Outcome:
    models: list[Any] = []
    paths: Any
    if "path1" in row:
        paths, models = [row["path1"], row.get("path2")], [row.get("model1"), row.get("model2")]
        votes = row.get("choice_dist")
        stated = votes != [] and not is_unstated(votes)
        shares = sorted(numbers("choice_dist", votes, 2), reverse=True) if stated else [1.0, 0.0]
    else:
        paths = row.get("file_path") or row.get("image_path")
        if not isinstance(paths, list) or len(paths) < 2:
            raise Unusable("fewer than two images")
        if not is_unstated(row.get("human_preference")):
            shares = numbers("human_preference", row["human_preference"], len(paths))
        elif not is_unstated(row.get("rank")):
            shares = borda([-rank for rank in numbers("rank", row["rank"], len(paths))])
        else:
            return Dropped(where, "without a label")

    return make_record(where, row.get("prompt"), shares, lambda k: read_image(paths[k], folder, folder / stem), models)


def imagerewarddb_chunks(files: Sequence[Path]) -> list[Chunk]:
    counts = [(file, len(_prompts(file))) for file in files]
    limit = rows_a_chunk(PAIRS_A_PROMPT * sum(count for _, count in counts)) // PAIRS_A_PROMPT
    return [Chunk(file, start, min(start + limit, count)) for file, count in counts for start in range(0, count, limit)]


def read_imagerewarddb(chunk: Chunk) -> Iterator[Outcome]:
    """ImageRewardDB (https://arxiv.org/abs/2304.05977): metadata-*.parquet, or the same rows as JSON, one per image.

    The images of a prompt make one record, in the order of their `rank`. They are read from `image_path`, or from the
    archive that the hub has in place of their folder (images/train/train_1.zip).
    """
    for prompt_id, rows in itertools.islice(_prompts(chunk.file).items(), chunk.start, chunk.stop):
        where = f"{chunk.file} prompt {prompt_id}"
        try:
            yield _imagereward_row(where, chunk.file.parent, rows)
        except Unusable as error:
            yield Damaged(where, error.reason, error.found)


def _imagereward_row(where: str, folder: Path, rows: list[dict[str, Any]]) -> Outcome:
    if len(rows) < 2:
        raise Unusable("fewer than two images")
    ranks = [row["rank"] for row in rows]
    if any(is_unstated(rank) for rank in ranks):
        return Dropped(where, "without a label")
    shares = borda([-rank for rank in numbers("rank", ranks, len(rows))])
    paths = [row["image_path"] for row in rows]

    def image(k: int) -> bytes:
        found = find(paths[k], folder)
        data = read_file(found) if found else _read_zipped(folder, paths[k])
        if data is None:
            raise no_image(paths[k], folder)
        return data

    return make_record(where, rows[0]["prompt"], shares, image)


def _prompts(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of each prompt, wherever they are in the file; without images they fit into memory."""
    return _prompts_since(file, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)  # kept for the next chunk
def _prompts_since(file: Path, changed: int) -> dict[str, list[dict[str, Any]]]:
    rows: list[Any]
    if check_regular(file).suffix == ".parquet":
        try:
            table = pq.read_table(file)
            rows = table.select([name for name in IMAGEREWARD if name in table.column_names]).to_pylist()
        except ERRORS as error:
            raise not_parquet(file, error) from None
    else:
        where = f"{file}, the object at byte"
        rows = [
            parse_json(decode_text(element, f"{where} {at}"), f"{where} {at}")
            for at, element in elements(file)
            if element.strip()
        ]
    prompts: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if not isinstance(row, dict) or not set(IMAGEREWARD) <= set(row):
            raise UserError(
                f"{file} is not the metadata of ImageRewardDB: its rows should have {', '.join(IMAGEREWARD)}"
            )
        prompts.setdefault(str(row["prompt_id"]), []).append(row)
    return prompts


def _read_zipped(folder: Path, name: object) -> bytes | None:
    """Read an image from the archive that replaces its folder; None if there is none."""
    place, _, file = relative(name, folder).rpartition("/")
    archive = in_any_form(folder, f"{place}.zip")
    if archive is None or not archive.is_file():
        return None
    try:
        stored = _zip(archive).getinfo(file)
        if stored.file_size > MAX_BYTES:
            raise Unusable("an image in a zip archive cannot be read", f"{archive} {name} has {stored.file_size} bytes")
        return _zip(archive).read(stored)
    except KeyError:
        return None
    except Unusable:
        raise
    except Exception as error:  # zipfile and its decompressors raise any class of error for damaged archives
        raise Unusable("an image in a zip archive cannot be read", f"{archive} {name}: {error}") from None


@functools.lru_cache(maxsize=4)
def _zip(archive: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(archive)

"""Scores for the images of a prepared data set, from a judge or from a file of scores.

Axes: N records, M candidates of all records together, U distinct (image, caption) among them, I images.
"""

import functools
import itertools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import grain
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dpo_jax.data import images
from dpo_jax.data.sources.json_rows import lines, numbers
from dpo_jax.data.sources.values import index
from dpo_jax.data.store.prepared import MAX_DAMAGED, PreparedData
from dpo_jax.data.store.scores import Candidates, candidates, complete
from dpo_jax.errors import EnvironmentFault, MissingFileError, UserError
from dpo_jax.files import parse_json
from dpo_jax.streams import warn

Reward = Callable[[Sequence[np.ndarray], Sequence[str]], np.ndarray]
"""Maps (images, captions) to one score per image, like `score` of a judge in `dpo_jax.rewards`."""
OnProgress = Callable[[int, int], None]
"""Called with the number of images or bytes done, and their total."""

LINES_A_STEP = 10_000
LINES = '{"record": 12, "scores": [0.1, 0.7]} or {"caption": ..., "sha256": ..., "score": 0.7}'


def score_images(
    prepared: PreparedData, score: Reward, on_progress: OnProgress = lambda done, total: None, *, batch: int = 64
) -> np.ndarray:
    """Return scores_M, float32, one per candidate; an image with the same caption in several records is judged once.

    Images are read in the order in which they are stored, and decoded on all cores while the judge works on `batch` of
    them at a time. A damaged image is reported on stderr and gets NaN.

    Raises:
        ValueError: the judge cannot judge an image, or more than 1% are damaged; the message names the record.
    """
    of = candidates(prepared.records["images"])
    distinct = _distinct(prepared.records, of)
    total = len(distinct.image_U)

    def read(u: int) -> np.ndarray | images.DamagedImage:
        try:
            return np.asarray(images.decode(prepared.images[int(distinct.image_U[u])]))
        except images.DamagedImage as error:
            return error

    options = grain.ReadOptions(num_threads=os.cpu_count() or 1, prefetch_buffer_size=2 * batch)
    decoded = iter(grain.MapDataset.range(total).map(read).to_iter_dataset(options))
    scores_U = np.full(total, np.nan, np.float32)
    damaged = 0
    for start in range(0, total, batch):
        some = np.arange(start, min(start + batch, total))
        shown, whole = [], []
        for u, image in zip(some, itertools.islice(decoded, len(some)), strict=True):
            if isinstance(image, images.DamagedImage):
                damaged += 1
                _leave_out(prepared, int(of.record_M[distinct.first_U[u]]), image, damaged, total)
            else:
                shown.append(image)
                whole.append(u)
        captions = distinct.captions.take(pa.array(distinct.caption_U[whole])).to_pylist()
        record_of_each = of.record_M[distinct.first_U[whole]]
        wheres = prepared.records["where"].take(pa.array(record_of_each)).to_pylist()
        if shown:
            scores_U[whole] = _score(score, shown, captions, wheres)
        on_progress(start + len(some), total)
    return scores_U[distinct.of_M]


def _leave_out(prepared: PreparedData, record: int, error: images.DamagedImage, damaged: int, total: int) -> None:
    """Report a damaged image; raise ValueError if there are too many."""
    message = f"{prepared.name_of(record)}: {error}"
    if damaged > max(1, MAX_DAMAGED * total) or damaged == total:
        raise UserError(
            f"{damaged} of {total} images are damaged, more than the {MAX_DAMAGED:.0%} that may be left out; the last "
            f"is {message}. List what is damaged with python -m dpo_jax.prepare --verify --output={prepared.folder}"
        )
    warn(f"{message}; it is left out")


def _score(score: Reward, images: Sequence[np.ndarray], captions: Sequence[str], wheres: Sequence[str]) -> np.ndarray:
    try:
        scores = np.asarray(score(images, captions), np.float32)
    except EnvironmentFault:  # the judge itself has failed, and would fail again
        raise
    except UserError as error:
        if len(images) == 1:
            raise UserError(f"{wheres[0]} cannot be judged: {error}") from None
        singles = zip(images, captions, wheres, strict=True)  # judge one by one to find the image that fails
        return np.concatenate([_score(score, [image], [text], [where]) for image, text, where in singles])
    assert scores.shape == (len(images),), f"{len(images)} images got scores of shape {scores.shape}"
    if not np.isfinite(scores).all():
        first = int(np.isfinite(scores).argmin())
        raise UserError(f"{wheres[first]} cannot be judged: an image got the score {scores[first]}")
    return scores


def import_scores(prepared: PreparedData, file: Path, on_progress: OnProgress = lambda done, total: None) -> np.ndarray:
    """Return scores_M, float32, from a file that another program wrote; NaN for images without a score.

    A line is {"record": index in records.arrow, "scores": [one per image, in the record's order]}, or
    {"caption": ..., "sha256": of the image file in hexadecimal digits, "score": ...}, which holds for every record that
    has this image with this caption. Other fields are ignored. Memory does not grow with the file.

    Raises:
        ValueError: a line cannot be read, names a record or image that does not exist, or contradicts an earlier line.
    """
    if not file.is_file():
        raise MissingFileError(f"no file of scores at {file}; it should have lines of {LINES}")
    find = _Finder(prepared)
    scores_M = np.full(len(find.of.record_M), np.nan, np.float32)
    total = file.stat().st_size
    for number, (offset, line) in enumerate(lines(file), 1):
        if line.strip():
            try:
                _enter(scores_M, *find(line))
            except ValueError as error:
                raise UserError(f"{file} line {number}: {error}") from None
        if number % LINES_A_STEP == 0:
            on_progress(offset + len(line), total)
    if not complete(scores_M, find.of).any():
        raise UserError(f"{file} has no record with a score for each of its images; its lines should be {LINES}")
    return scores_M


def _enter(scores_M: np.ndarray, where: np.ndarray, values: Sequence[float]) -> None:
    with np.errstate(over="ignore"):
        scores = np.asarray(values).astype(np.float32)
    if not np.isfinite(scores).all():
        raise UserError(f"the score {max(values, key=abs):g} is too large for float32")
    earlier = scores_M[where]
    differs = ~np.isnan(earlier) & (earlier != scores)
    if differs.any():
        first = int(differs.argmax())
        score = np.broadcast_to(scores, earlier.shape)[first]
        raise UserError(f"the score {score:g} contradicts {earlier[first]:g} in an earlier line for the same image")
    scores_M[where] = scores


class _Finder:
    """Finds the candidates that a line scores."""

    def __init__(self, prepared: PreparedData):
        self._prepared = prepared
        self.of = candidates(prepared.records["images"])

    def __call__(self, line: bytes) -> tuple[np.ndarray, list[float]]:
        """Return (their positions, one score for each or one for all)."""
        try:
            text = line.decode()
        except UnicodeDecodeError:
            raise UserError("it is not UTF-8; save the file as UTF-8") from None
        row = parse_json(text, f"not of the form {LINES}: it")
        if isinstance(row, dict) and {"record", "scores"} <= row.keys():
            return self._of_record(row["record"], row["scores"])
        if isinstance(row, dict) and {"caption", "sha256", "score"} <= row.keys():
            return self._of_image(row["caption"], row["sha256"]), numbers("score", [row["score"]], 1)
        raise UserError(f"not of the form {LINES}")

    def _of_record(self, record: object, scores: object) -> tuple[np.ndarray, list[float]]:
        known = len(self.of.number_N)
        row = index(record, known)
        if row is None or isinstance(record, bool):
            raise UserError(f"there is no record {record!r}; the records are 0 to {known - 1}")
        first, number = self.of.first_N[row], self.of.number_N[row]
        if isinstance(scores, list) and len(scores) != number:
            raise UserError(f"record {row} has {number} images, but the line has {len(scores)} scores")
        return np.arange(first, first + number), numbers("scores", scores, number)

    def _of_image(self, caption: object, sha256: object) -> np.ndarray:
        if not isinstance(sha256, str) or not re.fullmatch("[0-9a-fA-F]{64}", sha256):
            raise UserError(f'"sha256" is {sha256!r}, not 64 hexadecimal digits')
        digest = np.array(bytes.fromhex(sha256), "S32")[()]  # NumPy's byte strings drop zeros at the end
        sorted_I, image_I = self._digests
        place = sorted_I.searchsorted(digest)
        if place == len(sorted_I) or sorted_I[place] != digest:
            raise UserError(f"no image has the sha256 {sha256}")
        distinct, captions, candidate_M, start_U = self._pairs
        number = captions.get(caption) if isinstance(caption, str) else None
        key = -1 if number is None else int(image_I[place]) * len(captions) + number
        u = distinct.key_U.searchsorted(key)
        if u == len(distinct.key_U) or distinct.key_U[u] != key:
            raise UserError(f"no record has the caption {caption!r} with this image")
        return candidate_M[start_U[u] : start_U[u + 1]]

    @functools.cached_property
    def _digests(self) -> tuple[np.ndarray, np.ndarray]:
        """(sha256 of all images, sorted; the image of each)."""
        sha256 = self._prepared.sha256_I.cast(pa.binary(32)).combine_chunks()
        digest_I = np.frombuffer(sha256.buffers()[1], "S32", len(sha256), 32 * sha256.offset)
        image_I = np.argsort(digest_I)
        return digest_I[image_I], image_I

    @functools.cached_property
    def _pairs(self) -> "tuple[_Distinct, dict[str, int], np.ndarray, np.ndarray]":
        """(distinct pairs, number of each caption, candidates by pair, where those of each pair begin)."""
        distinct = _distinct(self._prepared.records, self.of)
        number_of = {text: number for number, text in enumerate(distinct.captions.to_pylist())}
        candidate_M = np.argsort(distinct.of_M, kind="stable")
        start_U = np.searchsorted(distinct.of_M[candidate_M], np.arange(len(distinct.key_U) + 1))
        return distinct, number_of, candidate_M, start_U


class _Distinct(NamedTuple):
    """The distinct (image, caption) of all records, ordered by image."""

    key_U: np.ndarray
    """Ascending: image * number of captions + caption."""
    first_U: np.ndarray
    """Index of the first candidate with this image and caption."""
    of_M: np.ndarray
    """Index of the distinct pair that each candidate has."""
    captions: pa.Array

    @property
    def image_U(self) -> np.ndarray:
        return self.key_U // len(self.captions)

    @property
    def caption_U(self) -> np.ndarray:
        return self.key_U % len(self.captions)


def _distinct(records: pa.Table, of: Candidates) -> _Distinct:
    """Return the distinct pairs; the caption of a candidate is its own where it has one, otherwise the record's."""
    shared, own = records["caption"], pc.list_flatten(records["captions"])
    texts = pa.chunked_array([*shared.chunks, *own.chunks], pa.string()).dictionary_encode().combine_chunks()
    numbers = texts.indices.to_numpy()
    caption_M = numbers[of.record_M]
    caption_M[records["captions"].is_valid().to_numpy()[of.record_M]] = numbers[len(shared) :]
    image_M = pc.list_flatten(records["images"]).to_numpy().astype(np.int64)
    key_U, first_U, of_M = np.unique(
        image_M * len(texts.dictionary) + caption_M, return_index=True, return_inverse=True
    )
    return _Distinct(key_U, first_U, of_M, texts.dictionary)
